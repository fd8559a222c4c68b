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


@dataclass(frozen=True)
class Timings:
    """Seconds of every round by way, each list in the order of the rounds."""

    seconds: Mapping[str, list[float]]

    def median(self, way: str) -> float:
        return median(self.seconds[way])

    def ratios(self, way: str, other: str) -> list[float]:
        """`way` over `other`, a ratio a round."""
        return [a / b for a, b in zip(self.seconds[way], self.seconds[other], strict=True)]


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True) -> Timings:
    """Time every way once a round, in a random order, after one round that is not counted."""
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1 if warm_up else 0, rounds):
        for name in shuffled.sample(list(ways), len(ways)):
            gc.collect()
            start = perf_counter()
            ways[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(perf_counter() - start)
    return Timings(seconds)


def synchronize() -> None:
    """A GPU works on after the call has returned."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
