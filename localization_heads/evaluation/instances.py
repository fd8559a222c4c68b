"""Scores of several boxes an expression, as gRefCOCO defines them (Liu et al., CVPR 2023): F1, Pr@(F1=1), N-acc."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localization_heads.attention import Box
from localization_heads.cells import box_iou

RIGHT = 0.5
"""IoU from which on a box is right."""


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


def suppressed(boxes: Sequence[Box], overlap: float = RIGHT) -> list[int]:
    """Places of the boxes, best first, that no better one overlaps with an IoU above `overlap`: no duplicates.

    >>> suppressed([(0, 0, 4, 4), (0, 0, 4, 3), (4, 0, 8, 4)])
    [0, 2]
    """
    kept: list[int] = []
    for place, box in enumerate(boxes):
        if all(float(box_iou(box, boxes[other])) <= overlap for other in kept):
            kept.append(place)
    return kept
