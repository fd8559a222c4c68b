"""Work done beside the model: what comes next made ready in one thread, what it has computed finished in another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 2
"""Items that may be made ready, or wait to be finished, at a time."""
WAITING = 128 << 20
"""Bytes that may wait to be finished; an item of more is finished before the next one is computed."""

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(items: Iterable[Given], prepare: Callable[[Given], Made]) -> Generator[Made, None, None]:
    """`prepare(item)` for every item, up to `AHEAD` items before they are wanted. Close it where it is left early."""
    source = iter(items)

    def next_one() -> list[Made]:
        return [prepare(item) for item in islice(source, 1)]  # empty at the end

    coming: deque[Future[list[Made]]] = deque()
    with ThreadPoolExecutor(1, "ahead") as thread:
        try:
            coming.extend(thread.submit(next_one) for _ in range(AHEAD))
            while ready := coming.popleft().result():
                coming.append(thread.submit(next_one))
                yield ready.pop()
        finally:
            for waiting in coming:
                waiting.cancel()


def behind(
    items: Iterable[Given],
    finish: Callable[[Given], Made],
    weigh: Callable[[Given], int] = lambda _: 0,
    most: int = AHEAD,
) -> Generator[Made, None, None]:
    """`finish(item)` for every item, while the next ones are computed. Where these fail, what there is is finished.

    Args:
        weigh: bytes that an item takes; at most `WAITING` of them wait.
        most: items that may wait: more than are computed at once, or the next ones wait for them.
    """
    going: deque[tuple[Future[Made], int]] = deque()
    with ThreadPoolExecutor(1, "behind") as thread:
        try:
            for item in items:
                going.append((thread.submit(finish, item), weigh(item)))
                del item
                while len(going) > most or sum(size for _, size in going) > WAITING:
                    yield going.popleft()[0].result()
            while going:
                yield going.popleft()[0].result()
        finally:
            for last, _ in going:
                last.result()
