"""The visitors of the page and their state, with limits on memory, files and pending work.

A visitor is identified by gradio's session hash, one per open page. It comes from the browser and is used only to find
that visitor's own question.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from localization_heads.apps.demo.guard import remove
from localization_heads.apps.demo.session import ImageQuestion
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head

MAX_BYTES = 512 << 20  # of the images and maps of all visitors
MAX_VISITORS = 64
MAX_PENDING = 4  # requests of one visitor
IDLE_SECONDS = 3600.0
NO_QUESTION = "no answer to redraw: press Ground (an answer is kept for an hour, or until others need its place)"


@dataclass(eq=False)
class Visitor:
    """One open page.

    Args:
        folder: the folder for the files of its answers.
        question: its last question, None before the first and after it was dropped.
        heads_b: the heads of the second set.
        upload: the file of its image.
        last_used: time of its last request.
        num_pending: requests that wait or run.
    """

    folder: Path
    question: ImageQuestion | None = None
    heads_b: list[Head] = field(default_factory=list)
    upload: Path | None = None
    last_used: float = field(default_factory=time.monotonic)
    num_pending: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def require_question(self) -> ImageQuestion:
        """The last question. UsageError if there is none, or if it was dropped."""
        if self.question is None:
            raise UsageError(NO_QUESTION)
        return self.question

    def new_folder(self) -> Path:
        """Create a folder for the next redraw. The previous one is kept, since the browser may still be loading it."""
        folder = self.folder / f"{time.monotonic_ns():020d}"
        folder.mkdir(parents=True)
        for old in sorted(self.folder.iterdir())[:-2]:
            remove(old)
        return folder


class Visitors:
    """All visitors, least recently active first.

    Args:
        folder: the parent of the visitors' folders.
        is_kept: whether a file belongs to the page itself and is never removed with a visitor.
        max_bytes: limit on images and maps in memory.
        limit: the number of visitors.
    """

    def __init__(
        self,
        folder: Path,
        is_kept: Callable[[Path], bool],
        max_bytes: int = MAX_BYTES,
        limit: int = MAX_VISITORS,
    ) -> None:
        self.folder, self.is_kept, self.max_bytes, self.limit = folder, is_kept, max_bytes, limit
        self._by_session: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._by_session)

    @property
    def num_bytes(self) -> int:
        """Size of their images and maps in memory."""
        return sum(v.question.num_bytes for v in self._by_session.values() if v.question)

    @contextmanager
    def request(self, session: str | None) -> Iterator[Visitor]:
        """Handle one request of a visitor, after its earlier ones. UsageError if too many are pending."""
        visitor = self._enter(session or "")
        try:
            with visitor.lock:
                if self.is_closed:
                    raise UsageError("the page is closing")
                yield visitor
        finally:
            self._leave(visitor)

    def end(self, session: str | None) -> None:
        """Drop the state of a page that was closed."""
        with self._lock:
            visitor = self._by_session.pop(session or "", None)
            if visitor and not visitor.num_pending:
                self._free(visitor)

    def close(self, seconds: float = 10) -> None:
        """Refuse further requests, and wait for running ones, which write into a folder that will be removed."""
        self.is_closed = True
        with self._lock:
            visitors = list(self._by_session.values())
        for visitor in visitors:
            if visitor.lock.acquire(timeout=seconds):
                visitor.lock.release()

    def replace_upload(self, visitor: Visitor, upload: Path) -> None:
        """Set the file of the visitor's image, and remove that of the previous one."""
        with self._lock:
            if visitor.upload != upload:
                self._remove_upload(visitor)
            visitor.upload = upload

    def _enter(self, session: str) -> Visitor:
        with self._lock:
            visitor = self._by_session.setdefault(session, Visitor(self.folder / uuid4().hex))
            self._by_session.move_to_end(session)
            if visitor.num_pending >= MAX_PENDING:
                raise UsageError("the page is still busy with what you did before: wait for it")
            visitor.num_pending += 1
            visitor.last_used = time.monotonic()
            return visitor

    def _leave(self, visitor: Visitor) -> None:
        with self._lock:
            visitor.num_pending -= 1
            if not visitor.num_pending and visitor not in self._by_session.values():
                self._free(visitor)
            for session, other in list(self._by_session.items()):  # the least recently used first
                if other.num_pending or other is visitor:
                    continue
                is_idle = other.last_used < time.monotonic() - IDLE_SECONDS
                if is_idle or len(self._by_session) > self.limit or self.num_bytes > self.max_bytes:
                    self._free(self._by_session.pop(session))

    def _free(self, visitor: Visitor) -> None:
        visitor.question = None
        shutil.rmtree(visitor.folder, ignore_errors=True)
        self._remove_upload(visitor)

    def _remove_upload(self, visitor: Visitor) -> None:
        """Remove the file of the visitor's image, unless another visitor uploaded the same one, which gradio shares."""
        upload, visitor.upload = visitor.upload, None
        is_shared = any(other.upload == upload for other in self._by_session.values())
        if upload and not is_shared and not self.is_kept(upload.parent):
            remove(upload.parent)
