"""Scores of several boxes an expression, as gRefCOCO defines them (Liu et al., CVPR 2023): F1, Pr@(F1=1), N-acc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.evaluation.metrics import bootstrap_ratios, percentile_interval
from localization_heads.evaluation.scores import rounded

RIGHT = 0.5
"""IoU from which on a box is right."""
METRICS = ("f1@0.5", "pr@f1=1")


def num_matched(boxes: Sequence[Box], truths: Sequence[Box], right: float = RIGHT) -> int:
    """Boxes that find a true one: the pair of highest IoU first, each box and each truth once, while IoU >= `right`.

    >>> num_matched([(0, 0, 2, 2), (0, 0, 2, 1)], [(0, 0, 2, 2)])
    1
    """
    if not boxes or not truths:
        return 0
    overlap = box_iou(np.array(boxes)[:, None], np.array(truths)[None])
    count = 0
    while overlap.size and overlap.max() >= right:
        row, column = np.unravel_index(np.argmax(overlap), overlap.shape)
        overlap = np.delete(np.delete(overlap, row, axis=0), column, axis=1)
        count += 1
    return count


def f1(boxes: Sequence[Box], truths: Sequence[Box]) -> float:
    """`2 TP / (2 TP + FP + FN)` of one expression; with no true box 1 for no box, else 0.

    Pr@(F1=1) is the share of expressions for which it is 1; N-acc its mean over those with no target.

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
    """Mean F1 and Pr@(F1=1) of several ways to answer the same expressions, with 95 % bootstrap intervals.

    Args:
        answers: by name, the boxes of each expression. The first is compared with the others: each of those also gets
            `difference`, how far the first is ahead, as `[value, low, high]` of the paired difference.
        truths: the true boxes of each expression; none of what is absent.
        groups: as of `bootstrap_ratios`.

    Returns:
        By name, `<metric>` and `<metric>_interval` of METRICS.

    >>> a, b = (0, 0, 2, 2), (5, 5, 6, 6)
    >>> found = instance_metrics({"all": [[a, b], [a]], "one": [[a], [a]]}, [[a, b], [a]])
    >>> found["all"]["f1@0.5"], found["one"]["f1@0.5"], found["one"]["pr@f1=1"]
    (1.0, 0.833333, 0.5)
    """
    single = np.array([[f1(*pair) for pair in zip(boxes, truths, strict=True)] for boxes in answers.values()])
    table = np.stack([single, single == 1], axis=-1).transpose(1, 0, 2)  # (expression, way, metric)
    values = table.mean(axis=0)
    flat = table.reshape(len(table), -1)
    drawn = bootstrap_ratios(flat, np.ones_like(flat), groups=groups, seed=seed).reshape(-1, *values.shape)
    found: dict[str, Any] = {}
    for way, name in enumerate(answers):
        row = found[name] = {}
        for i, metric in enumerate(METRICS):
            row[metric] = rounded(values[way, i])
            row[f"{metric}_interval"] = _rounded(drawn[:, way, i])
        if way:
            ahead, spread = values[0] - values[way], drawn[:, 0] - drawn[:, way]
            row["difference"] = {
                metric: [rounded(ahead[i]), *_rounded(spread[:, i])] for i, metric in enumerate(METRICS)
            }
    return found


def _rounded(resampled: NDArray[np.float64]) -> list[float | None]:
    return [rounded(bound) for bound in percentile_interval(resampled)]
