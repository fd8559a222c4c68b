"""The scores of each method on each expression, and their metrics over a data set, with intervals.

A method is the localization heads or one of the controls. It may answer an expression several times (random heads are
drawn repeatedly); its answers to one expression are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "macc",
    "mean_iou",
    "pointing",
    "energy",
    "ciou",
    "giou",
)
"""In the order of `metrics.json`; the last two only where there are true masks.

`ciou`, cumulative IoU, is `sum I / sum U` over the masks, which favours large objects; `giou` is `mean(I / U)`, in
which all objects weigh the same (ReasonSeg).
"""


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth: the object's box in pixels and, if known, its mask, bool `[H, W]`.

    Args:
        ignored: bool `[H, W]`, pixels that count in neither intersection nor union, as LISA scores ReasonSeg.
    """

    box: Box
    mask: NDArray[np.bool_] | None = None
    ignored: NDArray[np.bool_] | None = None

    def overlap(self, predicted: NDArray[np.bool_] | None) -> tuple[int, int] | None:
        """`mask_overlap` with the true mask, None without one. A prediction of None is an empty mask."""
        if self.mask is None:
            return None
        counted = np.ones_like(self.mask) if self.ignored is None else ~self.ignored
        covered = np.zeros_like(self.mask) if predicted is None else predicted & counted
        return mask_overlap(covered, self.mask & counted)


class Score(NamedTuple):
    """The scores of one answer.

    Attributes:
        iou: box IoU.
        pointing: whether the strongest cell's centre lies in the true box.
        energy: share of the map's mass on the image that lies in the true box.
        overlap: `Truth.overlap` of the masks.
    """

    iou: float
    pointing: bool
    energy: float
    overlap: tuple[int, int] | None = None

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Score:
        """From a list, which is what JSON makes of a score."""
        iou, pointing, energy, overlap = data
        return cls(iou, pointing, energy, None if overlap is None else (overlap[0], overlap[1]))


Answers = Sequence[Sequence[Score]]
"""The answers of one method: one or more for each expression."""


def score_grounding(grounding: Grounding, truth: Truth) -> Score:
    """The scores of a grounding's box, combined map and mask."""
    energy = mass_inside(grounding.combined, grounding.image_box, grounding.image_size, truth.box)
    iou = float(box_iou(grounding.box, truth.box))
    overlap = (
        None if truth.mask is None else truth.overlap(grounding.mask)
    )  # the mask is made when it is read
    return Score(iou, pointing_hit(grounding.point, truth.box), energy, overlap)


def score_box(box: Box | None, truth: Truth, image_size: tuple[int, int]) -> Score:
    """The scores of a box without a map: it points at its centre, with uniform mass and a filled mask. None is a miss.

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
    """Every metric of every method, with its 95 % bootstrap interval, to six decimals; undefined ones are left out.

    Args:
        methods: answers by name, all to the same expressions in the same order. The first is compared with the
            others: each of those also gets `difference`, how far the first is ahead, as `[value, low, high]` with the
            interval of the paired difference.
        groups: `bootstrap_ratios`'s, such as each expression's image.

    Returns:
        By method, `<metric>` and `<metric>_interval` of METRICS.

    >>> scores = [[Score(0.6, True, 0.5)], [Score(0.2, False, 0.1)]]
    >>> summary = summarize({"heads": scores})["heads"]
    >>> summary["acc@0.5"], summary["mean_iou"], summary["acc@0.5_interval"]
    (0.5, 0.4, [0.0, 1.0])
    """
    tables = [ratio_table(answers) for answers in methods.values()]
    tops, bottoms = (np.concatenate([table[i] for table in tables], axis=1) for i in (0, 1))
    values = _empty_agree(divided(tops.sum(axis=0), bottoms.sum(axis=0)).reshape(len(tables), -1))
    drawn = bootstrap_ratios(tops, bottoms, groups=groups, seed=seed)
    resampled = _empty_agree(drawn.reshape(-1, len(tables), len(METRICS)))
    known = np.flatnonzero(~np.isnan(values[0])).tolist()
    summary: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(methods):
        row = summary[name] = {}
        for i in known:
            row[METRICS[i]] = rounded(values[number, i])
            row[f"{METRICS[i]}_interval"] = _interval(resampled[:, number, i])
        if number:
            ahead, spread = values[0] - values[number], resampled[:, 0] - resampled[:, number]
            row["difference"] = {METRICS[i]: [rounded(ahead[i]), *_interval(spread[:, i])] for i in known}
    return summary


def ratio_table(answers: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerators and denominators `[expression, metric]`: each of METRICS is a ratio of their sums.

    An expression without a true mask has denominator 0 in cIoU and gIoU. Two empty masks agree: 1 of 1.
    """
    counts = np.array([len(scores) for scores in answers])
    row = np.repeat(np.arange(len(answers)), counts)
    flat = [score for scores in answers for score in scores]

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        """Over the answers to each expression."""
        return np.asarray(np.bincount(row, weights=values, minlength=len(answers)) / counts)

    iou, hit, energy = np.array([score[:3] for score in flat], dtype=np.float64).reshape(-1, 3).T
    masked = np.array([score.overlap is not None for score in flat], dtype=np.float64)
    pairs = [score.overlap or (0, 0) for score in flat]
    shared, union = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    agreement = np.where(union > 0, divided(shared, union), 1.0) * masked
    accurate = [mean(iou >= threshold) for threshold in THRESHOLDS]
    averaged = mean(np.mean([iou >= threshold for threshold in MEAN_THRESHOLDS], axis=0))
    boxes = [*accurate, averaged, mean(iou), mean(hit), mean(energy)]
    tops = [*boxes, mean(shared), mean(agreement)]
    bottoms = [*(np.ones_like(column) for column in boxes), mean(union), mean(masked)]
    return np.stack(tops, 1), np.stack(bottoms, 1)


def _empty_agree(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sets the cIoU in ratios `[..., metric]` to 1 where all masks are empty, predicted and true."""
    ciou, giou = METRICS.index("ciou"), METRICS.index("giou")
    values[..., ciou] = np.where(
        np.isnan(values[..., ciou]) & ~np.isnan(values[..., giou]), 1.0, values[..., ciou]
    )
    return values


def _interval(resampled: NDArray[np.float64]) -> list[float | None]:
    return [rounded(bound) for bound in percentile_interval(resampled)]


def rounded(value: float) -> float | None:
    """Rounded to six decimals; None for NaN.

    >>> rounded(1 / 3), rounded(float("nan"))
    (0.333333, None)
    """
    return None if np.isnan(value) else round(float(value), 6)
