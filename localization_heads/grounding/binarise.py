"""The threshold that separates positive cells from the rest: the mean (Sec. 5), Otsu's, or a share of the mass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NotFiniteError
from localization_heads.options.groups import GroundingOptions

FLAT = 1e-6
"""A map whose maximum exceeds its mean by less than this, relatively, is flat: it points at nothing."""
ROUNDING = 1e-12
"""Relative rounding error of a sum of cells."""


def threshold(
    combined: NDArray[np.floating[Any]], options: GroundingOptions, visible: NDArray[np.bool_] | None = None
) -> float:
    """The value above which a cell of a map `[h, w]` is positive; infinite if no cell is, as in a flat map.

    With `binarise="mean"` it is `means * mean + margin`, or if `large` is set, at most `large * sum m^2 / sum m`.

    Args:
        visible: the cells that show some of the image, bool `[h, w]`; all by default.

    Raises:
        NotFiniteError: NaN or infinite values.
    """
    if not np.isfinite(combined).all():
        raise NotFiniteError("the map")
    mean = float(combined.mean())
    if combined.size == 0 or not combined.max() - mean > FLAT * abs(mean):
        return float("inf")  # a constant map after smoothing differs from its mean by rounding
    values = combined[visible] if visible is not None else combined.ravel()
    if options.binarise == "otsu":
        return otsu(values)
    if options.binarise == "top_mass":
        return top_mass(values, options.top_mass)
    averaged = values if options.mean_of == "image" and values.size else combined
    level = options.means * float(averaged.mean()) + options.margin
    if options.large is not None and (total := float(averaged.sum())) > 0:
        level = min(level, options.large * float(np.square(averaged).sum()) / total)
    return level if level < combined.max() else float("inf")


def otsu(values: NDArray[np.floating[Any]]) -> float:
    """`argmax_t w0 w1 (m1 - m0)^2`: splits into `<= t` and `> t` with the largest between-class variance.

    Exact: computed on the values, not on a histogram. The lowest t if several are best; infinite if all values are
    equal.

    >>> otsu(np.array([0.0, 0.0, 1.0, 8.0, 9.0]))
    1.0
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    cuts = np.flatnonzero(np.diff(ordered) > 0)  # the values rise after these
    if cuts.size == 0:
        return float("inf")
    num_below = cuts + 1.0
    num_above = ordered.size - num_below
    sums = np.cumsum(ordered)
    mean_below, mean_above = sums[cuts] / num_below, (sums[-1] - sums[cuts]) / num_above
    return float(ordered[cuts[np.argmax(num_below * num_above * (mean_above - mean_below) ** 2)]])


def top_mass(values: NDArray[np.floating[Any]], share: float = 0.5) -> float:
    """The threshold that leaves the fewest, strongest cells which hold `share` of the mass.

    Cells of equal value are kept or dropped together. Negative values have no mass; infinite if there is no mass.

    >>> values = np.array([1.0, 2.0, 3.0, 4.0])
    >>> (values > top_mass(values, 0.7)).tolist()
    [False, False, True, True]
    """
    descending = np.sort(np.clip(np.asarray(values, dtype=np.float64), 0, None), axis=None)[::-1]
    cumulative = np.cumsum(descending)
    if cumulative.size == 0 or cumulative[-1] <= 0:
        return float("inf")
    last = int(np.argmax(cumulative >= share * cumulative[-1] * (1 - ROUNDING)))
    return float(np.nextafter(descending[last], -np.inf))
