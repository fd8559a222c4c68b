"""Scores of each method on each expression, and metrics over a data set with bootstrap intervals.

A method is the localization heads or one of the controls. If it answers an expression several times, as random heads
do, its scores on that expression are averaged first. Expressions with several boxes are scored as gRefCOCO defines (Liu
et al., CVPR 2023): F1, Pr@(F1=1) and N-acc.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.cells import box_iou, mass_inside
from localization_heads.evaluation.metrics import (
    MEAN_THRESHOLDS,
    THRESHOLDS,
    bootstrap_ratios,
    divided,
    mask_overlap,
    percentile_interval,
    pointing_hit,
)
from localization_heads.grounding.ground import Grounding
from localization_heads.grounding.shapes import fill_polygon

METRICS = (
    *(f"acc@{threshold}" for threshold in THRESHOLDS),
    *("macc", "mean_iou", "pointing", "energy", "ciou", "giou"),
)
"""Metrics in the order of `metrics.json`; the last two need true masks.

`ciou`, cumulative IoU, is `sum I / sum U` over the masks and favours large objects; `giou` is `mean(I / U)`, which
weighs all objects the same (ReasonSeg).
"""


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth: the object's box in pixels and, if there is one, its mask, bool `[H, W]`.

    Args:
        ignored: bool `[H, W]`, pixels excluded from both intersection and union, as LISA scores ReasonSeg.
    """

    box: Box
    mask: NDArray[np.bool_] | None = None
    ignored: NDArray[np.bool_] | None = None

    def overlap(self, predicted: NDArray[np.bool_] | None) -> tuple[int, int] | None:
        """`mask_overlap` with the true mask, None without one. A prediction of None is an empty mask."""
        if self.mask is None:
            return None
        valid = np.ones_like(self.mask) if self.ignored is None else ~self.ignored
        prediction = np.zeros_like(self.mask) if predicted is None else predicted & valid
        return mask_overlap(prediction, self.mask & valid)


class Score(NamedTuple):
    """The scores of one answer.

    Attributes:
        iou: box IoU.
        pointing: whether the centre of the strongest cell lies in the true box.
        energy: share of the map's mass on the image that lies in the true box.
        overlap: intersection and union of the masks in pixels; None without a true mask.
    """

    iou: float
    pointing: bool
    energy: float
    overlap: tuple[int, int] | None = None

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Score:
        """From the list that a score is in JSON."""
        iou, pointing, energy, overlap = data
        return cls(iou, pointing, energy, None if overlap is None else (overlap[0], overlap[1]))


Answers = Sequence[Sequence[Score]]
"""The scores of one method: one or more for each expression."""


def score_grounding(grounding: Grounding, truth: Truth) -> Score:
    """Score a grounding's box, combined map and mask."""
    energy = grounding.mass_in(truth.box)
    iou = float(box_iou(grounding.box, truth.box))
    # Reading the mask computes it, so it is read only if there is one to compare with.
    overlap = None if truth.mask is None else truth.overlap(grounding.mask)
    return Score(iou, pointing_hit(grounding.point, truth.box), energy, overlap)


def score_box(box: Box | None, truth: Truth, image_size: tuple[int, int]) -> Score:
    """Score a box without a map: it points at its centre and has uniform mass and a filled mask. None is a miss.

    >>> score_box((0, 0, 2, 2), Truth((1, 0, 3, 2)), image_size=(4, 4))
    Score(iou=0.3333333333333333, pointing=True, energy=0.5, overlap=None)
    """
    if box is None:
        return Score(0.0, False, 0.0, truth.overlap(None))
    x0, y0, x1, y1 = box
    overlap = None
    if truth.mask is not None:
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        overlap = truth.overlap(fill_polygon(corners, image_size))
    energy = mass_inside(np.ones((1, 1)), box, image_size, truth.box)
    hit = pointing_hit(((x0 + x1) / 2, (y0 + y1) / 2), truth.box)
    return Score(float(box_iou(box, truth.box)), hit, energy, overlap)


def summarize(
    methods: Mapping[str, Answers], *, groups: Sequence[str] | None = None, seed: int = 42
) -> dict[str, dict[str, Any]]:
    """Every metric of every method with its 95 % bootstrap interval, to six decimals, without undefined metrics.

    Args:
        methods: scores by method, all of the same expressions in the same order. Each method after the first also gets
            `difference`: the first method's metric minus its own, as `[value, low, high]` with the interval of the
            paired difference.
        groups: as in `bootstrap_ratios`, such as each expression's image.

    Returns:
        By method, `<metric>` and `<metric>_interval` for each of METRICS.

    >>> scores = [[Score(0.6, True, 0.5)], [Score(0.2, False, 0.1)]]
    >>> summary = summarize({"heads": scores})["heads"]
    >>> summary["acc@0.5"], summary["mean_iou"], summary["acc@0.5_interval"]
    (0.5, 0.4, [0.0, 1.0])
    """
    tables = [ratio_table(answers) for answers in methods.values()]
    tops, bottoms = (np.concatenate([table[i] for table in tables], axis=1) for i in (0, 1))
    values = _set_empty_ciou(divided(tops.sum(axis=0), bottoms.sum(axis=0)).reshape(len(tables), -1))
    resampled = bootstrap_ratios(tops, bottoms, groups=groups, seed=seed)
    resampled = _set_empty_ciou(resampled.reshape(-1, len(tables), len(METRICS)))
    defined = {METRICS[i]: i for i in np.flatnonzero(~np.isnan(values[0])).tolist()}
    return _compare_methods(methods, defined, values, resampled)


def _compare_methods(
    methods: Iterable[str],
    metrics: Mapping[str, int],
    values: NDArray[np.float64],
    resampled: NDArray[np.float64],
) -> dict[str, dict[str, Any]]:
    """The metrics of each method, and the paired differences of the first method from the others.

    Args:
        metrics: column of each metric.
        values: `[method, column]`.
        resampled: `[resample, method, column]`.
    """
    summary: dict[str, dict[str, Any]] = {}
    for i, method in enumerate(methods):
        row = summary[method] = {}
        for metric, column in metrics.items():
            row |= number(metric, values[i, column], percentile_interval(resampled[:, i, column]))
        if i:
            difference, differences = values[0] - values[i], resampled[:, 0] - resampled[:, i]
            row["difference"] = {
                metric: [
                    rounded(difference[column]),
                    *map(rounded, percentile_interval(differences[:, column])),
                ]
                for metric, column in metrics.items()
            }
    return summary


def ratio_table(answers: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerators and denominators `[expression, metric]`: each of METRICS is the ratio of their sums.

    An expression without a true mask has denominator 0 in cIoU and gIoU. Two empty masks have an IoU of 1.
    """
    counts = np.array([len(scores) for scores in answers])
    row = np.repeat(np.arange(len(answers)), counts)
    flat = [score for scores in answers for score in scores]

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        """The mean over the answers to each expression."""
        return np.asarray(np.bincount(row, weights=values, minlength=len(answers)) / counts)

    iou, hit, energy = np.array([score[:3] for score in flat], dtype=np.float64).reshape(-1, 3).T
    masked = np.array([score.overlap is not None for score in flat], dtype=np.float64)
    pairs = [score.overlap or (0, 0) for score in flat]
    shared, union = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    mask_iou = np.where(union > 0, divided(shared, union), 1.0) * masked
    accurate = [mean(iou >= threshold) for threshold in THRESHOLDS]
    averaged = mean(np.mean([iou >= threshold for threshold in MEAN_THRESHOLDS], axis=0))
    boxes = [*accurate, averaged, mean(iou), mean(hit), mean(energy)]
    tops = [*boxes, mean(shared), mean(mask_iou)]
    bottoms = [*(np.ones_like(column) for column in boxes), mean(union), mean(masked)]
    return np.stack(tops, 1), np.stack(bottoms, 1)


def _set_empty_ciou(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Set cIoU in `[..., metric]`, in place, to 1 where all masks are empty, predicted and true."""
    ciou, giou = METRICS.index("ciou"), METRICS.index("giou")
    values[..., ciou] = np.where(np.isnan(values[..., ciou]) & ~np.isnan(values[..., giou]), 1.0, values[..., ciou])
    return values


def number(name: str, value: float, interval: tuple[float, float]) -> dict[str, Any]:
    """A metric and its interval under their keys in `metrics.json`.

    >>> number("aurc", 0.25, (0.1, 1 / 3))
    {'aurc': 0.25, 'aurc_interval': [0.1, 0.333333]}
    """
    return {name: rounded(value), f"{name}_interval": [rounded(bound) for bound in interval]}


def rounded(value: float) -> float | None:
    """Rounded to six decimals; None for NaN.

    >>> rounded(1 / 3), rounded(float("nan"))
    (0.333333, None)
    """
    return None if np.isnan(value) else round(float(value), 6)


RIGHT = 0.5
"""A box matches a true box if their IoU is at least this."""
INSTANCE_METRICS = ("f1@0.5", "pr@f1=1")


def num_matched(boxes: Sequence[Box], truths: Sequence[Box]) -> int:
    """True positives: boxes matched one-to-one to true boxes, greedily by highest IoU, while IoU >= `RIGHT`.

    >>> num_matched([(0, 0, 2, 2), (0, 0, 2, 1)], [(0, 0, 2, 2)])
    1
    """
    if not boxes or not truths:
        return 0
    overlap = box_iou(np.array(boxes)[:, None], np.array(truths)[None])
    count = 0
    while overlap.size and overlap.max() >= RIGHT:
        row, column = np.unravel_index(np.argmax(overlap), overlap.shape)
        overlap = np.delete(np.delete(overlap, row, axis=0), column, axis=1)
        count += 1
    return count


def f1(boxes: Sequence[Box], truths: Sequence[Box]) -> float:
    """`2 TP / (2 TP + FP + FN)` of one expression; without true boxes, 1 if nothing is predicted, else 0.

    Pr@(F1=1) is the share of expressions for which it is 1; N-acc is its mean over those without a target.

    >>> f1([(0, 0, 2, 2)], [(0, 0, 2, 2), (5, 5, 6, 6)]), f1([], []), f1([(0, 0, 1, 1)], [])
    (0.6666666666666666, 1.0, 0.0)
    """
    if not truths:
        return float(not boxes)
    return 2 * num_matched(boxes, truths) / (len(boxes) + len(truths))


def instance_metrics(
    answers: Mapping[str, Sequence[Sequence[Box]]],
    truths: Sequence[Sequence[Box]],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Mean F1 and Pr@(F1=1) of several methods on the same expressions, with 95 % bootstrap intervals.

    Args:
        answers: by method, the predicted boxes of each expression. Methods after the first also get `difference`, as in
            `summarize`.
        truths: the true boxes of each expression; empty for absent objects.
        groups: as in `bootstrap_ratios`.

    Returns:
        By method, `<metric>` and `<metric>_interval` for each of INSTANCE_METRICS.

    >>> a, b = (0, 0, 2, 2), (5, 5, 6, 6)
    >>> found = instance_metrics({"all": [[a, b], [a]], "one": [[a], [a]]}, [[a, b], [a]])
    >>> several, one = found.values()
    >>> several["f1@0.5"], one["f1@0.5"], one["pr@f1=1"]
    (1.0, 0.833333, 0.5)
    """
    scores = np.array([[f1(*pair) for pair in zip(boxes, truths, strict=True)] for boxes in answers.values()])
    table = np.stack([scores, scores == 1], axis=-1).transpose(1, 0, 2)  # (expression, method, metric)
    values = table.mean(axis=0)
    flat = table.reshape(len(table), -1)
    resampled = bootstrap_ratios(flat, np.ones_like(flat), groups=groups, seed=seed).reshape(-1, *values.shape)
    metrics = {metric: i for i, metric in enumerate(INSTANCE_METRICS)}
    return _compare_methods(answers, metrics, values, resampled)
