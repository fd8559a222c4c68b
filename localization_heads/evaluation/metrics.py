"""Metrics of referring expression comprehension (boxes) and segmentation (masks), as pure functions.

Boxes are xyxy floats in pixels, half-open, so `(0, 0, 2, 2)` has area 4. Masks are bool `[H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import Box

THRESHOLDS = (0.5, 0.25, 0.75)
"""IoUs at which accuracy is reported; the first is REC's Acc@0.5."""


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
    """Intersection and union of two masks in pixels: what `ciou` and `giou` add up.

    Raises:
        ValueError: for masks of different shapes.
    """
    prediction, truth = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"masks must have one shape, not {prediction.shape} and {truth.shape}")
    return int((prediction & truth).sum()), int((prediction | truth).sum())


def mask_iou(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """`|a ∩ b| / |a ∪ b|` of two masks `[H, W]`; two empty masks agree: 1."""
    return giou([mask_overlap(prediction, truth)])


def ciou(overlaps: Sequence[tuple[int, int]]) -> float:
    """`sum I_i / sum U_i` over the samples: cumulative IoU, which favours large objects.

    Args:
        overlaps: `mask_overlap` of each sample; no prediction is an empty one, `(0, area of the truth)`.

    Returns:
        0 to 1; 1 if every prediction and every truth is empty, NaN without samples.
    """
    shared, union = np.asarray(overlaps, dtype=np.float64).reshape(-1, 2).sum(axis=0)
    if len(overlaps) == 0:
        return float("nan")
    return float(shared / union) if union > 0 else 1.0


def giou(overlaps: Sequence[tuple[int, int]]) -> float:
    """`mean(I_i / U_i)` over the samples: every object counts the same (ReasonSeg's gIoU).

    A sample with empty prediction and empty truth counts 1, one with either empty counts 0. NaN without
    samples.
    """
    pairs = np.asarray(overlaps, dtype=np.float64).reshape(-1, 2)
    shared, union = pairs.T
    return _mean(np.where(union > 0, shared / np.where(union > 0, union, 1.0), 1.0))


def pointing_hit(point: tuple[float, float], truth: Box | NDArray[np.bool_]) -> bool:
    """Pointing game: whether a point lies on the object.

    Args:
        point: (x, y) in pixels, such as `Grounding.point`, the centre of the strongest cell.
        truth: a box, or a mask `[H, W]`.
    """
    x, y = point
    if isinstance(truth, np.ndarray) and truth.ndim == 2:
        height, width = truth.shape
        return 0 <= x < width and 0 <= y < height and bool(truth[int(y), int(x)])
    x0, y0, x1, y1 = truth
    return bool(x0 <= x < x1 and y0 <= y < y1)


def accuracy_at(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Share of samples with `IoU >= threshold` (Acc@0.5 of REC); NaN without samples."""
    return _mean(np.asarray(ious, dtype=np.float64) >= threshold)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 42
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`; `(NaN, NaN)` without values.

    The same seed and values give the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows = max(1, (1 << 20) // array.size)  # resamples at a time, a million numbers
    means: list[float] = []
    while len(means) < num_resamples:
        size = (min(rows, num_resamples - len(means)), array.size)
        means.extend(array[rng.integers(array.size, size=size)].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def summarize(
    ious: Sequence[float],
    *,
    pointing: Sequence[bool] | None = None,
    overlaps: Sequence[tuple[int, int]] | None = None,
    num_failed: int = 0,
    seed: int = 42,
) -> dict[str, Any]:
    """The content of `metrics.json`: plain values, rounded to six decimals, null where undefined.

    Args:
        ious: box IoU of every sample that was evaluated; a sample without a box counts as 0.
        pointing: pointing-game hits of the samples that have a truth to point at.
        overlaps: `mask_overlap` of the samples with masks; adds `ciou`, `giou` and `num_masks`.
        num_failed: entries that could not be read or run; they are counted and not part of any mean.

    Raises:
        ValueError: for an IoU that is not between 0 and 1.
    """
    values = np.asarray(ious, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("every IoU must lie between 0 and 1")
    summary: dict[str, Any] = {
        f"acc@{threshold}": _rounded(accuracy_at(values, threshold)) for threshold in THRESHOLDS
    }
    interval = bootstrap_interval(values >= THRESHOLDS[0], seed=seed)
    summary[f"acc@{THRESHOLDS[0]}_interval"] = [_rounded(bound) for bound in interval]
    summary["mean_iou"] = _rounded(_mean(values))
    summary["pointing"] = _rounded(_mean(() if pointing is None else pointing))
    if overlaps is not None:
        summary |= {"ciou": _rounded(ciou(overlaps)), "giou": _rounded(giou(overlaps))}
        summary["num_masks"] = len(overlaps)
    return summary | {"num_samples": len(values), "num_failed": num_failed}


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


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
