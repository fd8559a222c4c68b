"""Mask overlap, pointing game, bootstrap intervals and rank correlation, as pure functions.

Boxes are xyxy floats in pixels, half-open; masks are bool `[H, W]`.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from localization_heads.attention import Box

FEWEST = 3
"""Pairs that a rank correlation needs."""
FEW = 8
"""Up to this many pairs p is exact, from all permutations; beyond, Student's t approximates it well."""


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float] | None:
    """Spearman's rho of pairs (`a [n]`, `b [n]`) and its two-sided p; None for n < 3 or where either side is constant.

    >>> rho, p = spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    >>> round(rho, 6), round(p, 6)  # all six orders of three values have |rho| >= 0.5
    (0.5, 1.0)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = _ranks(x), _ranks(y)
    rho = float(np.corrcoef(x, y)[0, 1])
    return rho, _exact_p(x, y) if len(x) <= FEW else _students_t_p(rho, len(x))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; ties get their mean rank. (`scipy.stats.rankdata` would cost 0.2 s of import time.)

    >>> _ranks(np.array([30.0, 10.0, 30.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[inverse])


def _exact_p(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The share of the permutations of `y` with at least the observed |rho|."""
    orders = np.array(list(permutations(y - y.mean())))
    agreement = np.abs(orders @ (x - x.mean()))  # |rho| up to a factor; the first order is the observed one
    return float((agreement >= agreement[0] - 1e-9).mean())


def _students_t_p(rho: float, pairs: int) -> float:
    """The two-sided p of rho by Student's t approximation."""
    degrees = pairs - 2
    unexplained = max(0.0, (1 - rho) * (1 + rho))
    t = np.inf if unexplained == 0 else abs(rho) * np.sqrt(degrees / unexplained)
    return float(2 * special.stdtr(degrees, -t))


THRESHOLDS = (0.5, 0.25, 0.75, 0.9)
"""IoU thresholds of the reported accuracies; the first is REC's Acc@0.5."""
MEAN_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU thresholds that mAcc averages over: 0.5, 0.55, ..., 0.95, as COCO's AP does."""
NUM_RESAMPLES = 1000
"""Bootstrap resamples behind every interval."""


def mask_overlap(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[int, int]:
    """Intersection and union of two masks in pixels, which cIoU and gIoU are computed from.

    Raises:
        ValueError: for masks of different shapes.

    >>> mask_overlap(np.array([[1, 1, 0]]), np.array([[0, 1, 1]]))
    (1, 3)
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"masks must have one shape, not {prediction.shape} and {truth.shape}")
    return int((prediction & truth).sum()), int((prediction | truth).sum())


def pointing_hit(point: tuple[float, float], truth: Box) -> bool:
    """Pointing game: whether a point (x, y), such as `Grounding.point`, lies in the true box.

    >>> pointing_hit((3.0, 1.0), (2, 0, 4, 2)), pointing_hit((4.0, 1.0), (2, 0, 4, 2))
    (True, False)
    """
    x, y = point
    x0, y0, x1, y1 = truth
    return bool(x0 <= x < x1 and y0 <= y < y1)


def bootstrap_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 42,
) -> NDArray[np.float64]:
    """`sum n_i / sum d_i` over samples drawn with replacement: float64 `[num_resamples, column]`.

    All columns share the same resamples, so differences between columns are paired. With denominators of 1 the ratio is
    a mean, with unions as denominators it is cIoU. NaN where the denominators of a resample sum to 0.

    Args:
        numerators: `[sample, column]`.
        denominators: `[sample, column]`.
        groups: `[sample]`, such as each expression's image: whole groups are resampled. None resamples samples.
    """
    sums = np.stack([np.asarray(part, dtype=np.float64) for part in (numerators, denominators)], -1)
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        group_sums = np.zeros((int(group.max(initial=-1)) + 1, *sums.shape[1:]))
        np.add.at(group_sums, group.ravel(), sums)
        sums = group_sums
    count, columns = sums.shape[:2]
    if count == 0:
        return np.full((num_resamples, columns), np.nan)
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 20) // count)  # resamples per block: a million drawn samples at a time
    blocks = [
        _draw_counts(rng, min(step, num_resamples - start), count) @ sums.reshape(count, -1)
        for start in range(0, num_resamples, step)
    ]
    top, bottom = np.moveaxis(np.concatenate(blocks).reshape(num_resamples, columns, 2), -1, 0)
    return divided(top, bottom)


def divided(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """`top / bottom`, NaN where `bottom` is 0."""
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)


def _draw_counts(rng: np.random.Generator, rows: int, count: int) -> NDArray[np.float64]:
    """How often each of `count` samples is drawn in each of `rows` resamples of that size: `[rows, count]`."""
    drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def percentile_interval(resampled: ArrayLike) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values, NaN ones ignored; `(NaN, NaN)` if there are no others.

    >>> percentile_interval(range(1001))
    (25.0, 975.0)
    """
    values = np.asarray(resampled, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_interval(values: ArrayLike, seed: int = 42) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`; `(NaN, NaN)` without values.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    return percentile_interval(bootstrap_ratios(column, np.ones_like(column), seed=seed))
