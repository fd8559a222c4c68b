"""Whose turn it is at the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from localization_heads.errors import UsageError

MAX_ASKING = 24
MAX_BYTES = 384 << 20

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """The model: one piece of work at a time, in the order of asking. Whoever has more to do queues again for each.

    Args:
        places: questions at once; each waits in a thread of the page's.
        max_bytes: of their decoded images. One question has room in any case, and small images pass by large ones.
    """

    def __init__(self, places: int = MAX_ASKING, max_bytes: int = MAX_BYTES) -> None:
        self.places, self.max_bytes = places, max_bytes
        self._worker = ThreadPoolExecutor(1, "model")
        self._changed = threading.Condition()
        self._asking = self._held = 0

    @contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Room for one question with an image of so many bytes, waited for. UsageError if all places are taken."""
        with self._changed:
            if self._asking >= self.places:
                raise UsageError("too many visitors are asking at this moment: try again soon")
            self._asking += 1
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self.max_bytes)
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._asking -= 1
                self._held -= num_bytes
                self._changed.notify_all()

    def take(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """The result of `work`, once its turn has come. Raises what it raises."""
        return self._worker.submit(work, *arguments, **options).result()


MODEL = Turns()
