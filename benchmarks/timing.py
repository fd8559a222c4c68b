"""The one way things are timed here: the ways take turns, round after round, and each round gives a ratio.

Whatever else the machine does meanwhile hits both ways of a round alike, so a ratio of one round means more than a
quotient of two times taken minutes apart.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

SCATTER = 0.15
"""How much slower than its fastest round the median round of a way may be."""
FEWEST = 2
"""Rounds that every comparison gets, however long they take: one has no spread."""


@dataclass(frozen=True)
class Timings:
    """Seconds of every round by way, each list in the order of the rounds.

    Args:
        repeated: whether the rounds scattered so much that as many were added.
    """

    seconds: Mapping[str, list[float]]
    repeated: bool = False

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, way: str) -> float:
        return median(self.seconds[way])

    def ratios(self, way: str, other: str) -> list[float]:
        """`way` over `other`, a ratio a round."""
        return [a / b for a, b in zip(self.seconds[way], self.seconds[other], strict=True)]

    def fastest(self, way: str, other: str) -> float:
        """The ratio of the fastest round of each: what is left when nothing else ran on the machine."""
        return min(self.seconds[way]) / min(self.seconds[other])

    @property
    def scatter(self) -> float:
        """By how much the median round of the most disturbed way exceeds its fastest one; 0 for rounds all alike."""
        return max(median(times) / min(times) - 1 for times in self.seconds.values())


def interleaved(
    ways: Mapping[str, Callable[[], Any]], rounds: int, *, at_most: float | None = None, warm_up: bool = True
) -> Timings:
    """Time every way once a round, in a random order, after one round that is not counted.

    Args:
        at_most: seconds after which no round begins, but for the first `FEWEST`.
    """
    shuffled, begin = random.Random(0), perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1 if warm_up else 0, rounds):
        if at_most is not None and number >= FEWEST and perf_counter() - begin > at_most:
            break
        for name in shuffled.sample(list(ways), len(ways)):
            gc.collect()
            start = perf_counter()
            ways[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(perf_counter() - start)
    return Timings(seconds)


def settled(ways: Mapping[str, Callable[[], Any]], rounds: int, *, at_most: float | None = None) -> Timings:
    """`interleaved`, and once more where the rounds scatter by more than `SCATTER`: the fastest ones mean more then."""
    first = interleaved(ways, rounds, at_most=at_most)
    if first.scatter <= SCATTER:
        return first
    more = interleaved(ways, rounds, at_most=at_most, warm_up=False)
    return Timings(
        {name: [*times, *more.seconds[name]] for name, times in first.seconds.items()}, repeated=True
    )


def synchronize() -> None:
    """A GPU works on after the call has returned."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
