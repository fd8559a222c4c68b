"""Criterion 3, sensitivity (`criteria=robust`, not in the paper): a localization head follows the expression.

A head that always attends to the same place, to salient patches or to one kind of content has a compact map and a high
attention sum, so criteria 1 and 2 accept it, although its map does not depend on the expression. A head whose peak is
noise does change with the expression, but it also changes when the same question is asked about the mirrored image. So

    sensitivity(h) = 1 - mean overlap of h's map with its maps for other expressions of the image
    consistency(h) = overlap of h's map with its map of the mirrored image, mirrored back
    score(h)       = consistency(h) - (1 - sensitivity(h))

where the overlap of two maps is the Bhattacharyya coefficient of the maps scaled to a sum of 1. No labels are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESTING_SHARE = 0.5
"""A kept head of at least average attention sum rests if its score is below this share of the highest score."""
NUM_COMPARISONS = 3
"""Other expressions whose maps a map is compared with."""
MAX_FROM_DATA = 2
"""How many of these the data may provide: two phrasings of one object hardly change any head's map."""


class SensitivityStatistics(NamedTuple):
    """Sensitivity and consistency of every head, `[layer, head]`, in one sample or averaged over several.

    NaN where they were not measured.
    """

    sensitivity: NDArray[np.floating[Any]]
    consistency: NDArray[np.floating[Any]]


def sensitivity_statistics(
    maps: NDArray[np.floating[Any]],
    others: Sequence[NDArray[np.floating[Any]]],
    mirrored: NDArray[np.floating[Any]] | None = None,
) -> SensitivityStatistics:
    """Sensitivity and consistency of every head in one sample, float32.

    Args:
        maps: `[layer, head, h, w]`.
        others: the maps of other expressions of the same image; those of another shape are skipped.
        mirrored: the maps of the mirrored image, not mirrored back, for the expression with left and right swapped.
    """
    roots, shape = _sqrt_normalised(maps), maps.shape[:2]
    overlaps = [_overlap_of_roots(roots, _sqrt_normalised(other)) for other in others if other.shape == maps.shape]
    sensitivity = 1 - np.mean(overlaps, axis=0) if overlaps else np.full(shape, np.nan)
    consistency = np.full(shape, np.nan)
    if mirrored is not None and mirrored.shape == maps.shape:
        consistency = _overlap_of_roots(roots, _sqrt_normalised(mirrored)[..., ::-1])
    return SensitivityStatistics(sensitivity.astype(np.float32), consistency.astype(np.float32))


def sensitivity_score(sensitivity: float | None, consistency: float | None) -> float | None:
    """`consistency - (1 - sensitivity)`; the sensitivity alone if there was no mirrored image, None without either.

    >>> sensitivity_score(0.75, None), sensitivity_score(0.75, 0.5), sensitivity_score(None, 0.5)
    (0.75, 0.25, None)
    """
    if sensitivity is None:
        return None
    return sensitivity if consistency is None else consistency - (1 - sensitivity)


def map_overlap(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Bhattacharyya coefficient `sum sqrt(p q)` of maps `[..., h, w]` scaled to a sum of 1: float64 `[...]`.

    1 for maps that are equal up to scale, 0 for maps without a common cell. It is also 1 if either map has no
    attention at all: such a map cannot follow anything.

    Raises:
        ValueError: for maps of different grids.

    >>> one, other = np.array([[0.2, 0.2]]), np.array([[0.1, 0.0]])
    >>> round(float(map_overlap(one, other)), 4), float(map_overlap(one, one))
    (0.7071, 1.0)
    """
    if one.shape[-2:] != other.shape[-2:]:
        raise ValueError(f"maps of different grids cannot be compared: {one.shape[-2:]}, {other.shape[-2:]}")
    return _overlap_of_roots(_sqrt_normalised(one), _sqrt_normalised(other))


def _sqrt_normalised(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """`sqrt(p)` of maps `[..., h, w]` scaled to a sum of 1; zero where a map has no attention."""
    values = np.asarray(maps, dtype=np.float64)
    totals = values.sum(axis=(-2, -1), keepdims=True)
    return np.asarray(np.sqrt(np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)))


def _overlap_of_roots(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    overlap = np.einsum("...hw,...hw->...", one, other)
    empty = ~(one.any(axis=(-2, -1)) & other.any(axis=(-2, -1)))
    return np.where(empty, 1.0, np.minimum(overlap, 1.0))


class PairwiseSensitivity:
    """Mean sensitivity over all pairs of expressions of one image, whose maps are added one at a time and not kept.

    With `r_i` the square roots of n normalised maps, the overlaps of all pairs add up to
    `(|r_1 + ... + r_n|^2 - n) / 2`.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None  # of the roots, [layer, head, h, w]
        self._squares: NDArray[np.float64] | None = None  # sum of |r_i|^2, [layer, head]
        self._count = 0

    def add(self, maps: NDArray[np.floating[Any]]) -> None:
        """Add the maps `[layer, head, h, w]` of one expression. ValueError if the first had another shape."""
        roots = _sqrt_normalised(maps)
        squares = np.einsum("lhij,lhij->lh", roots, roots)
        if self._sum is None or self._squares is None:
            self._sum, self._squares = roots, squares
        else:
            if roots.shape != self._sum.shape:
                raise ValueError("maps of one image must be of one grid")
            self._sum += roots
            self._squares += squares
        self._count += 1

    @property
    def sensitivity(self) -> NDArray[np.float64] | None:
        """`[layer, head]`; None for fewer than two expressions. A pair with an empty map has an overlap of 1."""
        if self._sum is None or self._squares is None or self._count < 2:
            return None
        num_pairs = self._count * (self._count - 1) / 2
        num_maps = np.rint(self._squares)  # maps with attention: each has |r_i|^2 = 1
        num_empty_pairs = num_pairs - num_maps * (num_maps - 1) / 2
        overlaps = (np.einsum("lhij,lhij->lh", self._sum, self._sum) - self._squares) / 2
        return np.asarray(np.clip(1 - (overlaps + num_empty_pairs) / num_pairs, 0.0, 1.0))


class RunningMean:
    """Weighted mean of arrays `[layer, head]`, leaving out NaN."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._total, self._weight = np.zeros(shape), np.zeros(shape)

    def add(self, values: NDArray[np.floating[Any]], weight: float = 1.0) -> None:
        known = np.isfinite(values)
        self._total += np.where(known, values, 0.0) * weight
        self._weight += known * weight

    @property
    def mean(self) -> NDArray[np.float64]:
        """NaN where no value was added."""
        unknown = np.full(self._total.shape, np.nan)
        return np.asarray(np.divide(self._total, self._weight, out=unknown, where=self._weight > 0))


def mean_sensitivity(
    samples: Iterable[SensitivityStatistics], weights: Iterable[float], shape: tuple[int, int]
) -> SensitivityStatistics:
    """The weighted means over samples, which are read one at a time.

    Args:
        weights: of each sample: how often it was drawn.
        shape: `(num_layers, num_heads)`.
    """
    sensitivity, consistency = RunningMean(shape), RunningMean(shape)
    for sample, weight in zip(samples, weights, strict=True):
        sensitivity.add(sample.sensitivity, weight)
        consistency.add(sample.consistency, weight)
    return SensitivityStatistics(sensitivity.mean, consistency.mean)


_OPPOSITES = {"left": "right", "right": "left"}


def swap_left_right(expression: str) -> str:
    """The expression for the mirrored image: left and right are swapped, also in leftmost, left-hand and right-hand.

    >>> swap_left_right("The dog on the Left, not the rightmost one")
    'The dog on the Right, not the leftmost one'
    """

    def opposite(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _OPPOSITES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return re.sub(r"\b(?:left|right)(?=\b|most\b|hand\b|ward)", opposite, expression, flags=re.IGNORECASE)


def comparison_expressions(expression: str, others: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """The expressions whose maps are compared with that of `expression`: at most `NUM_COMPARISONS`.

    Up to `MAX_FROM_DATA` are other expressions of the image: the last and the middle one, because the first are often
    the same object in other words. Generic words fill up the rest; words that the expression contains are skipped,
    unless nothing else is left.

    >>> others, words = ["the dog", "a tree", "the hill"], ["animal", "thing", "vehicle"]
    >>> comparison_expressions("the animal on the left", others, words)
    ('the hill', 'a tree', 'thing')
    """
    from_data = list(dict.fromkeys([*others[-1:], *others[len(others) // 2 :][:1]]))[:MAX_FROM_DATA]
    contained = set(re.findall(r"\w+", expression.lower()))
    generic = [word for word in words if word.lower() not in contained and word not in from_data]
    chosen = [*from_data, *generic][:NUM_COMPARISONS]
    return tuple(chosen or words[:NUM_COMPARISONS])
