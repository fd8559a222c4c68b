"""Metrics as pure functions: IoU of boxes and masks, cIoU, gIoU, pointing game, bootstrap intervals, rank correlation.

Boxes are xyxy floats in pixels, half-open; masks are bool `[H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from localization_heads.attention import Box

FEWEST = 3
"""A rank correlation of fewer pairs is meaningless."""
FEW = 8
"""Up to this many pairs p is exact, over all permutations; Student's t, used for more, is too small for few."""


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float] | None:
    """Spearman's rho and its two-sided p; None for fewer than three pairs or where either side is constant.

    Args:
        a: `[n]`, the first value of each pair.
        b: `[n]`, the second.

    >>> rho, p = spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    >>> round(rho, 6), round(p, 6)  # all six orders of three values have |rho| >= 0.5
    (0.5, 1.0)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = _ranks(x), _ranks(y)
    rho = float(np.corrcoef(x, y)[0, 1])
    return rho, _exact(x, y) if len(x) <= FEW else _students(rho, len(x))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1; those of equal values are their mean. (All of `scipy.stats` takes 0.2 s to import.)

    >>> _ranks(np.array([30.0, 10.0, 30.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place])


def _students(rho: float, pairs: int) -> float:
    """How often luck alone correlates as much, by Student's t."""
    free = pairs - 2
    against = max(0.0, (1 - rho) * (1 + rho))
    t = np.inf if against == 0 else abs(rho) * np.sqrt(free / against)
    return float(2 * special.stdtr(free, -t))


def _exact(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The share of the orders of `y` that go with `x`, or against it, at least as much as the one at hand."""
    orders = np.array(list(permutations(y - y.mean())))
    agreement = np.abs(orders @ (x - x.mean()))  # rho up to a factor; the first order is the one at hand
    return float((agreement >= agreement[0] - 1e-9).mean())


THRESHOLDS = (0.5, 0.25, 0.75)
"""IoUs at which accuracy is reported; the first is REC's Acc@0.5."""
NUM_RESAMPLES = 1000
"""Of the bootstrap."""


def box_iou(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """`|a ∩ b| / |a ∪ b|` of boxes `[..., 4]`, broadcast against each other: float64 `[...]`.

    A box whose right or bottom edge does not lie beyond the other one is empty; two empty boxes have IoU 0.

    >>> float(box_iou((0, 0, 2, 2), (1, 0, 3, 2)))
    0.3333333333333333
    """
    a, b = _as_boxes(a), _as_boxes(b)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., 2:], b[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    union = _area(a) + _area(b) - shared
    return np.asarray(shared / np.where(union > 0, union, 1.0))


def mask_overlap(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[int, int]:
    """Intersection and union of two masks in pixels, the input of `ciou` and `giou`.

    Raises:
        ValueError: for masks of different shapes.

    >>> mask_overlap(np.array([[1, 1, 0]]), np.array([[0, 1, 1]]))
    (1, 3)
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"masks must have one shape, not {prediction.shape} and {truth.shape}")
    return int((prediction & truth).sum()), int((prediction | truth).sum())


def mask_iou(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """`|a ∩ b| / |a ∪ b|` of two masks `[H, W]`; two empty masks agree: 1.

    >>> mask_iou(np.array([[1, 1, 0]]), np.array([[0, 1, 1]]))
    0.3333333333333333
    """
    return giou([mask_overlap(prediction, truth)])


def ciou(overlaps: Sequence[tuple[int, int]]) -> float:
    """`sum I_i / sum U_i` over the samples: cumulative IoU, which favours large objects.

    Args:
        overlaps: `mask_overlap` of each sample; without a prediction, `(0, area of the true mask)`.

    Returns:
        0 to 1; 1 if all masks are empty, predicted and true; NaN without samples.

    >>> ciou([(1, 2), (9, 10)])
    0.8333333333333334
    """
    shared, union = np.asarray(overlaps, dtype=np.float64).reshape(-1, 2).sum(axis=0)
    if len(overlaps) == 0:
        return float("nan")
    return float(shared / union) if union > 0 else 1.0


def giou(overlaps: Sequence[tuple[int, int]]) -> float:
    """`mean(I_i / U_i)` over the samples: all objects weigh the same (ReasonSeg's gIoU).

    A sample counts 1 if prediction and truth are both empty, 0 if only one of them is. NaN without samples.

    >>> giou([(1, 2), (9, 10)])
    0.7
    """
    pairs = np.asarray(overlaps, dtype=np.float64).reshape(-1, 2)
    shared, union = pairs.T
    return _mean(np.where(union > 0, divided(shared, union), 1.0))


def pointing_hit(point: tuple[float, float], truth: Box | NDArray[np.bool_]) -> bool:
    """Pointing game: whether a point lies on the object.

    Args:
        point: (x, y) in pixels, such as `Grounding.point`, the centre of the strongest cell.
        truth: a box, or a mask `[H, W]`.

    >>> pointing_hit((3.0, 1.0), (2, 0, 4, 2)), pointing_hit((4.0, 1.0), (2, 0, 4, 2))
    (True, False)
    """
    x, y = point
    if isinstance(truth, np.ndarray) and truth.ndim == 2:
        height, width = truth.shape
        return 0 <= x < width and 0 <= y < height and bool(truth[int(y), int(x)])
    x0, y0, x1, y1 = truth
    return bool(x0 <= x < x1 and y0 <= y < y1)


def accuracy_at(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Share of samples with `IoU >= threshold` (Acc@0.5 of REC); NaN without samples.

    >>> accuracy_at([0.5, 0.49, 0.9, 0.0])
    0.5
    """
    return _mean(np.asarray(ious, dtype=np.float64) >= threshold)


def bootstrap_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 42,
) -> NDArray[np.float64]:
    """`sum n_i / sum d_i` over samples drawn with replacement: float64 `[num_resamples, column]`.

    All columns share the same resamples, so the difference of two columns is paired. With denominators 1 the ratio is a
    mean, with unions it is cIoU. NaN where a resample has denominator 0.

    Args:
        numerators: `[sample, column]`.
        denominators: `[sample, column]`.
        groups: `[sample]`, the group of each (such as an expression's image): whole groups are resampled. None
            resamples single samples.
    """
    sums = np.stack([np.asarray(part, dtype=np.float64) for part in (numerators, denominators)], -1)
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        added = np.zeros((int(group.max(initial=-1)) + 1, *sums.shape[1:]))
        np.add.at(added, group.ravel(), sums)
        sums = added
    count, columns = sums.shape[:2]
    if count == 0:
        return np.full((num_resamples, columns), np.nan)
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 20) // count)  # resamples at a time: a million draws
    drawn = [
        _counts(rng, min(step, num_resamples - done), count) @ sums.reshape(count, -1)
        for done in range(0, num_resamples, step)
    ]
    top, bottom = np.moveaxis(np.concatenate(drawn).reshape(num_resamples, columns, 2), -1, 0)
    return divided(top, bottom)


def divided(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """`top / bottom`, NaN where `bottom` is 0."""
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)


def _counts(rng: np.random.Generator, rows: int, count: int) -> NDArray[np.float64]:
    """How often each of `count` samples comes up in `count` draws: `[rows, count]`."""
    drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def percentile_interval(resampled: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The middle `confidence` of the resampled values that are defined; `(NaN, NaN)` if none is.

    >>> percentile_interval([1.0, 2.0, 3.0], confidence=0.5)
    (1.5, 2.5)
    """
    values = np.asarray(resampled, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 42
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`; `(NaN, NaN)` without values.

    The same seed and values give the same interval.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    means = bootstrap_ratios(column, np.ones_like(column), num_resamples=num_resamples, seed=seed)
    return percentile_interval(means, confidence)


def _as_boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(boxes, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes must be [..., 4] as x0, y0, x1, y1, not {array.shape}")
    return array


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1))


def _mean(values: ArrayLike) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else float("nan")
