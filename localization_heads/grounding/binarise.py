"""Which cells of a map are active: three ways to find the value above which a cell counts.

`mean` is the paper's (App. B.2), over the whole grid with its padding; twice the mean, and a margin above it, are
readings of the published code. The other two look only at the cells that show some of the image: Otsu's threshold
(1979), and the fewest cells that hold a share of the attention.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NotFiniteError

Binarise = Literal["mean", "otsu", "top_mass"]

FLAT = 1e-6
"""A map whose peak is closer than this to its mean, relatively, is flat: it points at nothing."""
ROUNDING = 1e-12
"""How much of the mass a sum of cells may miss by rounding."""


def threshold(
    combined: NDArray[np.floating[Any]],
    method: Binarise = "mean",
    share: float = 0.5,
    visible: NDArray[np.bool_] | None = None,
    means: float = 1.0,
    margin: float = 0.0,
) -> float:
    """The value above which a cell of a map `[h, w]` is active; infinite if none is, as of a flat map.

    Args:
        share: of the mass that `top_mass` keeps.
        visible: the cells that show some of the image, bool `[h, w]`; all by default.
        means: of `mean`, whose threshold is `means * mean + margin`.
        margin: the same.

    Raises:
        NotFiniteError: NaN or infinite values.
    """
    if not np.isfinite(combined).all():
        raise NotFiniteError("the map")
    mean = float(combined.mean())
    if combined.size == 0 or not combined.max() - mean > FLAT * abs(mean):
        return float("inf")  # smoothing leaves rounding on a constant map
    if method == "mean":
        level = means * mean + margin
        return level if level < combined.max() else float("inf")
    values = combined[visible] if visible is not None else combined.ravel()
    return otsu(values) if method == "otsu" else top_mass(values, share)


def otsu(values: NDArray[np.floating[Any]]) -> float:
    """`argmax_t w0 w1 (m1 - m0)^2`: the split into `<= t` and `> t` with the largest variance between the parts.

    Exact, over the values themselves and not a histogram of them. Of equal splits the lowest; infinite if all
    values are equal.

    >>> otsu(np.array([0.0, 0.0, 1.0, 8.0, 9.0]))
    1.0
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    cuts = np.flatnonzero(np.diff(ordered) > 0)  # after these the value rises
    if cuts.size == 0:
        return float("inf")
    below = cuts + 1.0
    sums = np.cumsum(ordered)
    above = ordered.size - below
    low, high = sums[cuts] / below, (sums[-1] - sums[cuts]) / above
    return float(ordered[cuts[np.argmax(below * above * (high - low) ** 2)]])


def top_mass(values: NDArray[np.floating[Any]], share: float = 0.5) -> float:
    """The value above which lie the fewest, strongest cells that hold `share` of the mass.

    Cells of equal value go together. Negative values hold no mass; infinite where nothing does.

    >>> values = np.array([1.0, 2.0, 3.0, 4.0])
    >>> (values > top_mass(values, 0.7)).tolist()
    [False, False, True, True]
    """
    ordered = np.sort(np.clip(np.asarray(values, dtype=np.float64), 0, None), axis=None)[::-1]
    held = np.cumsum(ordered)
    if held.size == 0 or held[-1] <= 0:
        return float("inf")
    last = int(np.argmax(held >= share * held[-1] * (1 - ROUNDING)))
    return float(np.nextafter(ordered[last], -np.inf))
