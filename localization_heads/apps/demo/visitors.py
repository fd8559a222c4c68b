"""The visitors of the page and their state, bounded in memory, files and waiting work.

The name of a visitor is gradio's session, one per open page. It comes from the browser and is trusted for nothing but
finding that visitor's own answer.
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
from localization_heads.apps.demo.session import Asked
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head

MAX_BYTES = 512 << 20  # of images and maps, all visitors together
MAX_VISITORS = 64
MAX_WAITING = 4  # pieces of work of one visitor
IDLE_SECONDS = 3600.0
NOTHING_ASKED = (
    "no answer to redraw: press Ground (an answer is kept for an hour, or until others need its place)"
)


@dataclass(eq=False)
class Visitor:
    """One open page.

    Args:
        folder: for the files of its answers.
        asked: its last question, None before the first.
        heads_b: those of the second set.
        upload: its image's file.
    """

    folder: Path
    asked: Asked | None = None
    heads_b: list[Head] = field(default_factory=list)
    upload: Path | None = None
    used: float = field(default_factory=time.monotonic)
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def answer(self) -> Asked:
        """The last question. UsageError if there is none, or none any more."""
        if self.asked is None:
            raise UsageError(NOTHING_ASKED)
        return self.asked

    def new_folder(self) -> Path:
        """For the files of the next redraw. Those of the last one stay, which the browser may still be fetching."""
        folder = self.folder / f"{time.monotonic_ns():020d}"
        folder.mkdir(parents=True)
        for old in sorted(self.folder.iterdir())[:-2]:
            remove(old)
        return folder


class Visitors:
    """All visitors, least recently active first.

    Args:
        folder: for their files, a folder each.
        is_kept: files of the page itself, which no visitor takes along.
        max_bytes: of images and maps in memory.
    """

    def __init__(
        self,
        folder: Path,
        is_kept: Callable[[Path], bool],
        max_bytes: int = MAX_BYTES,
        limit: int = MAX_VISITORS,
    ) -> None:
        self.folder, self.is_kept, self.max_bytes, self.limit = folder, is_kept, max_bytes, limit
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_bytes(self) -> int:
        """Size of their images and maps in memory."""
        return sum(v.asked.num_bytes for v in self._known.values() if v.asked)

    @contextmanager
    def turn(self, name: str | None) -> Iterator[Visitor]:
        """One piece of work of a visitor, after the earlier ones. UsageError if too many are waiting."""
        visitor = self._enter(name or "")
        try:
            with visitor.lock:
                if self.is_closed:
                    raise UsageError("the page is closing")
                yield visitor
        finally:
            self._leave(visitor)

    def end(self, name: str | None) -> None:
        """The page was closed: its images go."""
        with self._lock:
            visitor = self._known.pop(name or "", None)
            if visitor and not visitor.waiting:
                self._free(visitor)

    def close(self, seconds: float = 10) -> None:
        """Accept no more work, and wait for what has begun: it writes into a folder that is about to go."""
        self.is_closed = True
        with self._lock:
            visitors = list(self._known.values())
        for visitor in visitors:
            if visitor.lock.acquire(timeout=seconds):
                visitor.lock.release()

    def _enter(self, name: str) -> Visitor:
        with self._lock:
            visitor = self._known.setdefault(name, Visitor(self.folder / uuid4().hex))
            self._known.move_to_end(name)
            if visitor.waiting >= MAX_WAITING:
                raise UsageError("the page is still busy with what you did before: wait for it")
            visitor.waiting += 1
            visitor.used = time.monotonic()
            return visitor

    def _leave(self, visitor: Visitor) -> None:
        with self._lock:
            visitor.waiting -= 1
            if not visitor.waiting and visitor not in self._known.values():
                self._free(visitor)
            for name, other in list(self._known.items()):  # the least recently used first
                if other.waiting or other is visitor:
                    continue
                is_idle = other.used < time.monotonic() - IDLE_SECONDS
                if is_idle or len(self._known) > self.limit or self.num_bytes > self.max_bytes:
                    self._free(self._known.pop(name))

    def _free(self, visitor: Visitor) -> None:
        visitor.asked = None
        shutil.rmtree(visitor.folder, ignore_errors=True)
        self._drop_upload(visitor)

    def replace_upload(self, visitor: Visitor, upload: Path) -> None:
        """Another image: the file of the one before goes."""
        with self._lock:
            if visitor.upload != upload:
                self._drop_upload(visitor)
            visitor.upload = upload

    def _drop_upload(self, visitor: Visitor) -> None:
        """gradio keeps one file for all who uploaded the same."""
        upload, visitor.upload = visitor.upload, None
        shared = any(other.upload == upload for other in self._known.values())
        if upload and not shared and not self.is_kept(upload.parent):
            remove(upload.parent)
