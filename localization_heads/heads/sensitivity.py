"""The third criterion (`criteria=robust`, not in the paper): a head that localizes moves when the expression changes.

A head that rests on a place, on salient patches or on some content of the image has a compact map and a high attention
sum, and the paper's two criteria take it for a localization head. Its map stays the same whatever is asked. A head
whose peak wanders moves, but without a reason: asked about the mirrored image, its map is another one again. So

    sensitivity(h) = 1 - mean overlap of h's map with those of other expressions of the image
    consistency(h) = overlap of h's map with that of the mirrored image, mirrored back
    movement(h)    = consistency(h) - (1 - sensitivity(h))

where the overlap of two maps is the Bhattacharyya coefficient of the maps scaled to a sum of 1. No label is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESTING = 0.5
"""A kept head of at least average attention sum rests if its movement is below this share of the most movable one's."""
PROBES = 3
"""Other expressions that a map is compared with."""
OF_THE_DATA = 2
"""Of them, how many at most are the data's: those of one object in other words would hardly move a head."""


class Moved(NamedTuple):
    """How the heads' maps of one sample change. Both are float32 `[layer, head]`, NaN where that was not measured."""

    sensitivity: NDArray[np.float32]
    consistency: NDArray[np.float32]


def overlap(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The Bhattacharyya coefficient `sum sqrt(p q)` of maps `[..., h, w]` scaled to a sum of 1: float64 `[...]`.

    1 of maps that are equal but for their scale, 0 of maps without a common cell. A map without any attention points
    nowhere and cannot have moved: 1.

    Raises:
        ValueError: for maps of different grids.

    >>> one, other = np.array([[0.2, 0.2]]), np.array([[0.1, 0.0]])
    >>> round(float(overlap(one, other)), 4), float(overlap(one, one))
    (0.7071, 1.0)
    """
    if one.shape[-2:] != other.shape[-2:]:
        raise ValueError(f"maps of different grids do not overlap: {one.shape[-2:]}, {other.shape[-2:]}")
    return _of_roots(roots(one), roots(other))


def roots(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """`sqrt(p)` of maps `[..., h, w]` scaled to a sum of 1; zero where a map has no attention."""
    values = np.asarray(maps, dtype=np.float64)
    totals = values.sum(axis=(-2, -1), keepdims=True)
    return np.asarray(np.sqrt(np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)))


def _of_roots(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    shared = np.einsum("...hw,...hw->...", one, other)
    nowhere = ~(one.any(axis=(-2, -1)) & other.any(axis=(-2, -1)))
    return np.where(nowhere, 1.0, np.minimum(shared, 1.0))


def moved(
    maps: NDArray[np.floating[Any]],
    others: Sequence[NDArray[np.floating[Any]]],
    mirrored: NDArray[np.floating[Any]] | None = None,
) -> Moved:
    """Sensitivity and consistency of every head in one sample.

    Args:
        maps: `[layer, head, h, w]`.
        others: the maps of other expressions of the same image; those of another grid are passed over.
        mirrored: the maps of the mirrored image as the model gave them, asked with left and right swapped.
    """
    own, shape = roots(maps), maps.shape[:2]
    fitting = [_of_roots(own, roots(other)) for other in others if other.shape == maps.shape]
    sensitivity = 1 - np.mean(fitting, axis=0) if fitting else np.full(shape, np.nan)
    consistency = np.full(shape, np.nan)
    if mirrored is not None and mirrored.shape == maps.shape:
        consistency = _of_roots(own, roots(mirrored)[..., ::-1])
    return Moved(sensitivity.astype(np.float32), consistency.astype(np.float32))


class OneImage:
    """Mean sensitivity over expressions of one image whose maps come one after the other; none of them is kept.

    With `r_i` the roots of n maps, the overlaps of all pairs add up to `(|r_1 + ... + r_n|^2 - n) / 2`.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None
        self._own: NDArray[np.float64] | None = None
        self._count = 0

    def add(self, maps: NDArray[np.floating[Any]]) -> None:
        """Maps `[layer, head, h, w]`. ValueError for another grid than that of the first."""
        added = roots(maps)
        squares = np.einsum("lhij,lhij->lh", added, added)
        if self._sum is None or self._own is None:
            self._sum, self._own = added, squares
        else:
            if added.shape != self._sum.shape:
                raise ValueError("maps of one image must be of one grid")
            self._sum += added
            self._own += squares
        self._count += 1

    @property
    def sensitivity(self) -> NDArray[np.float64] | None:
        """`[layer, head]`; None of fewer than two expressions. A pair with a map of nothing counts as unmoved."""
        if self._sum is None or self._own is None or self._count < 2:
            return None
        pairs = self._count * (self._count - 1) / 2
        seen = np.rint(self._own)  # maps that have attention: each adds its square, 1
        shared = (np.einsum("lhij,lhij->lh", self._sum, self._sum) - self._own) / 2
        unmoved = pairs - seen * (seen - 1) / 2
        return np.asarray(np.clip(1 - (shared + unmoved) / pairs, 0.0, 1.0))


class Movement(NamedTuple):
    """Means over samples, float64 `[layer, head]`; NaN where no sample was measured."""

    sensitivity: NDArray[np.float64]
    consistency: NDArray[np.float64]


class Means:
    """The weighted mean of arrays `[layer, head]`, over those that are not NaN."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._total, self._weight = np.zeros(shape), np.zeros(shape)

    def add(self, values: NDArray[np.floating[Any]], weight: float = 1.0) -> None:
        known = np.isfinite(values)
        self._total += np.where(known, values, 0.0) * weight
        self._weight += known * weight

    @property
    def mean(self) -> NDArray[np.float64]:
        nothing = np.full(self._total.shape, np.nan)
        return np.asarray(np.divide(self._total, self._weight, out=nothing, where=self._weight > 0))


def mean_movement(samples: Iterable[Moved], weights: Iterable[float], shape: tuple[int, int]) -> Movement:
    """The means over samples, each counted as often as it was drawn; one sample is in memory at a time."""
    sensitivity, consistency = Means(shape), Means(shape)
    for sample, weight in zip(samples, weights, strict=True):
        sensitivity.add(sample.sensitivity, weight)
        consistency.add(sample.consistency, weight)
    return Movement(sensitivity.mean, consistency.mean)


def movement_of(sensitivity: float | None, consistency: float | None) -> float | None:
    """`consistency - (1 - sensitivity)`; without a mirrored image the sensitivity. None where that is not known.

    >>> movement_of(0.75, None), movement_of(0.75, 0.5), movement_of(None, 0.5)
    (0.75, 0.25, None)
    """
    if sensitivity is None:
        return None
    return sensitivity if consistency is None else consistency - (1 - sensitivity)


_SIDES = {"left": "right", "right": "left"}


def swapped(expression: str) -> str:
    """The expression for the mirrored image: left and right swapped, also in leftmost, left-hand and right-hand.

    >>> swapped("The dog on the Left, not the rightmost one")
    'The dog on the Right, not the leftmost one'
    """

    def other(found: re.Match[str]) -> str:
        word = found[0]
        swap = _SIDES[word.lower()]
        return swap.upper() if word.isupper() else swap.title() if word[0].isupper() else swap

    return re.sub(r"\b(?:left|right)(?=\b|most\b|hand\b|ward)", other, expression, flags=re.IGNORECASE)


def probes(expression: str, others: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """What is asked beside an expression: two other expressions of its image at most, and words up to `PROBES`.

    Of many others the last and the middle one, for the first are often the same object in other words. Words that
    the expression contains are passed over, unless there are no others.

    >>> probes("the animal on the left", ["the dog", "a tree", "the hill"], ["animal", "thing", "vehicle"])
    ('the hill', 'a tree', 'thing')
    """
    given = list(dict.fromkeys([*others[-1:], *others[len(others) // 2 :][:1]]))[:OF_THE_DATA]
    own = set(re.findall(r"\w+", expression.lower()))
    new = [word for word in words if word.lower() not in own and word not in given]
    chosen = [*given, *new][:PROBES]
    return tuple(chosen or words[:PROBES])
