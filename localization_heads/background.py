"""Prefetching and postprocessing in background threads, while the main thread runs the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

PREFETCH = 2
"""Items prepared in advance, and items that may wait for postprocessing."""
MAX_PENDING_BYTES = 128 << 20
"""Bytes that may wait for postprocessing; a larger item is finished before the next one is computed."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], prepare: Callable[[Item], Result]) -> Generator[Result, None, None]:
    """Yield `prepare(item)` for every item in order, running up to `PREFETCH` items ahead of the consumer.

    A consumer that stops early must close the generator.
    """
    source = iter(items)

    def prepare_next() -> list[Result]:
        return [prepare(item) for item in islice(source, 1)]  # empty at the end

    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        try:
            pending.extend(thread.submit(prepare_next) for _ in range(PREFETCH))
            while prepared := pending.popleft().result():
                pending.append(thread.submit(prepare_next))
                yield prepared.pop()
        finally:
            for future in pending:
                future.cancel()


def postprocess(
    items: Iterable[Item],
    finish: Callable[[Item], Result],
    num_bytes: Callable[[Item], int] = lambda _: 0,
    max_pending: int = PREFETCH,
) -> Generator[Result, None, None]:
    """Yield `finish(item)` for every item in order, while the consumer's thread computes the next items.

    If computing an item raises, the items before it are still finished.

    Args:
        num_bytes: size of an item; at most `MAX_PENDING_BYTES` are pending at a time.
        max_pending: items that may be pending; below the batch size of `items`, the next batch waits for them.
    """
    pending: deque[tuple[Future[Result], int]] = deque()
    with ThreadPoolExecutor(1, "postprocess") as thread:
        try:
            for item in items:
                pending.append((thread.submit(finish, item), num_bytes(item)))
                del item  # its arrays are freed as soon as it is finished
                while len(pending) > max_pending or sum(size for _, size in pending) > MAX_PENDING_BYTES:
                    yield pending.popleft()[0].result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.result()
