"""Interleaved timing: the variants to compare take turns within each round, and each round gives a ratio.

Background load on the machine affects all variants of a round alike, so a ratio within a round is more reliable than a
ratio of two times that were taken minutes apart.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

MAX_SCATTER = 0.15
"""By how much a variant's median round may exceed its fastest before the rounds are repeated."""
MIN_ROUNDS = 2
"""Rounds that every comparison gets, however long they take: a single round has no spread."""


@dataclass(frozen=True)
class Timings:
    """Seconds of every round by variant, in the order of the rounds.

    Args:
        repeated: whether a second set of rounds was added because the first scattered too much.
    """

    seconds: Mapping[str, list[float]]
    repeated: bool = False

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, variant: str) -> float:
        return median(self.seconds[variant])

    def ratios(self, variant: str, other: str) -> list[float]:
        """The ratio `variant / other` of each round."""
        return [a / b for a, b in zip(self.seconds[variant], self.seconds[other], strict=True)]

    def fastest(self, variant: str, other: str) -> float:
        """The ratio of the fastest rounds, which background load disturbs least."""
        return min(self.seconds[variant]) / min(self.seconds[other])

    @property
    def scatter(self) -> float:
        """The largest relative excess of a variant's median round over its fastest; 0 if all rounds are equal."""
        return max(median(times) / min(times) - 1 for times in self.seconds.values())


def time_interleaved(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    max_seconds: float | None = None,
    warm_up: bool = True,
) -> Timings:
    """Time every variant once per round, in random order.

    Args:
        max_seconds: no further round begins after this time, once `MIN_ROUNDS` are done.
        warm_up: run one round first that is not counted.
    """
    rng, begin = random.Random(0), perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1 if warm_up else 0, rounds):
        if max_seconds is not None and number >= MIN_ROUNDS and perf_counter() - begin > max_seconds:
            break
        for name in rng.sample(list(variants), len(variants)):
            gc.collect()
            start = perf_counter()
            variants[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(perf_counter() - start)
    return Timings(seconds)


def time_settled(
    variants: Mapping[str, Callable[[], Any]], rounds: int, *, max_seconds: float | None = None
) -> Timings:
    """`time_interleaved`, with as many rounds again if the first ones scatter by more than `MAX_SCATTER`."""
    first = time_interleaved(variants, rounds, max_seconds=max_seconds)
    if first.scatter <= MAX_SCATTER:
        return first
    more = time_interleaved(variants, rounds, max_seconds=max_seconds, warm_up=False)
    return Timings({name: [*times, *more.seconds[name]] for name, times in first.seconds.items()}, repeated=True)


def synchronize() -> None:
    """Wait for the GPU, if there is one: its kernels run asynchronously."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
