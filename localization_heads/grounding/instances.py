"""Of several boxes of one expression, those that are not the same object twice."""

from __future__ import annotations

from collections.abc import Sequence

from localization_heads.attention import Box
from localization_heads.cells import box_iou

OVERLAP = 0.5
"""IoU above which two boxes are of the same object."""


def suppressed(boxes: Sequence[Box], overlap: float = OVERLAP) -> list[int]:
    """Places of the boxes, best first, that no better one overlaps with an IoU above `overlap`: no duplicates.

    >>> suppressed([(0, 0, 4, 4), (0, 0, 4, 3), (4, 0, 8, 4)])
    [0, 2]
    """
    kept: list[int] = []
    for place, box in enumerate(boxes):
        if all(float(box_iou(box, boxes[other])) <= overlap for other in kept):
            kept.append(place)
    return kept
