"""Operations on boxes: duplicates removed, a second look at a crop around a box, boxes smoothed over time.

The crop of a second look (`zoom=true`) is a square around the first box. The second box counts only if it agrees with
the first: a crop lacks the context that tells objects apart ("the dog on the left"), so its box alone is no better
(docs/readouts.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from localization_heads.attention import Box
from localization_heads.cells import (
    box_iou,
    tight_box,
)
from localization_heads.grounding.ground import Grounding

NMS_IOU = 0.5
"""IoU above which two boxes are of the same object."""
CROP_MARGIN = 0.5
"""Context on each side of a crop, in longer sides of the box."""
MIN_CROP_CELLS = 6
"""Side of the smallest crop, in cells of the first map: a smaller one shows only the inside of the object."""
MIN_AGREEMENT = 0.5
"""IoU of the first and the second box from which on they are averaged; below it the first box is kept."""

Region = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels."""


def non_maximum_suppression(boxes: Sequence[Box]) -> list[int]:
    """Indices of the boxes, given best first, that overlap no better box with an IoU above `NMS_IOU`.

    >>> non_maximum_suppression([(0, 0, 4, 4), (0, 0, 4, 3), (4, 0, 8, 4)])
    [0, 2]
    """
    kept: list[int] = []
    for index, box in enumerate(boxes):
        if all(float(box_iou(box, boxes[better])) <= NMS_IOU for better in kept):
            kept.append(index)
    return kept


def box_of_cells(grounding: Grounding) -> Box:
    """The tight box of a grounding's cells; its own box if it has none."""
    return tight_box(grounding.cells, *grounding.edges) or grounding.box


def crop_around(grounding: Grounding) -> Region | None:
    """The crop for a second look; None if there is no positive cell, or if the crop would be the whole image."""
    if not grounding.cells.any():
        return None
    (left, top, right, bottom), (h, w) = grounding.image_box, grounding.combined.shape
    min_side = MIN_CROP_CELLS * max((right - left) / w, (bottom - top) / h)
    crop = square_around(grounding.box, grounding.image_size, min_side)
    return None if crop == (0, 0, *grounding.image_size) else crop


def square_around(box: Box, image_size: tuple[int, int], min_side: float = 0.0) -> Region:
    """A square centred on the box, `CROP_MARGIN` of its longer side around it, shifted and cut to fit the image.

    Args:
        min_side: smallest side of the square, in pixels.

    >>> square_around((40, 40, 60, 50), (100, 80)), square_around((0, 40, 20, 50), (100, 80))
    ((30, 25, 70, 65), (0, 25, 40, 65))
    >>> square_around((10, 0, 70, 30), (100, 30)), square_around((50, 50, 52, 52), (100, 80), min_side=10)
    ((0, 0, 100, 30), (46, 46, 56, 56))
    """
    x0, y0, x1, y1 = box
    side = max(max(x1 - x0, y1 - y0) * (1 + 2 * CROP_MARGIN), min_side, 1.0)
    (left, right), (top, bottom) = (
        _span((start + end) / 2, side, length)
        for start, end, length in ((x0, x1, image_size[0]), (y0, y1, image_size[1]))
    )
    return left, top, right, bottom


def _span(middle: float, side: float, length: int) -> tuple[int, int]:
    """An interval of `side` pixels around the middle, shifted into `0..length`; all of that if it is longer."""
    side = min(max(round(side), 1), length)
    start = min(max(round(middle - side / 2), 0), length - side)
    return start, start + side


def to_image_pixels(box: Box, crop: Region) -> Box:
    """A box in pixels of the crop, in pixels of the image.

    >>> to_image_pixels((1, 2, 5, 6), (30, 25, 70, 65))
    (31, 27, 35, 31)
    """
    return box[0] + crop[0], box[1] + crop[1], box[2] + crop[0], box[3] + crop[1]


def average_boxes(first: Box, second: Box | None) -> Box:
    """The mean of two boxes' edges; the first box if there is no second, or if they disagree (`MIN_AGREEMENT`).

    >>> average_boxes((0, 0, 10, 10), (2, 0, 10, 8)), average_boxes((0, 0, 10, 10), (8, 0, 18, 10))
    ((1.0, 0.0, 10.0, 9.0), (0, 0, 10, 10))
    """
    if second is None or box_iou(first, second) < MIN_AGREEMENT:
        return first
    x0, y0, x1, y1 = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    return x0, y0, x1, y1


def apply_second_look(grounding: Grounding, second: Box | None) -> Grounding:
    """The grounding with its box averaged with that of the second look, and scored by the first map."""
    box = average_boxes(grounding.box, second)
    return grounding if box == grounding.box else grounding.with_box(box)


def smooth_boxes(boxes: Iterable[Box | None], weight: float) -> Iterator[Box | None]:
    """Exponential smoothing of each edge: `weight` of the box before, the rest of the new one.

    It is causal, so it also works on a stream. A frame without a box stays without one and resets the smoothing.

    Args:
        boxes: of one object, frame by frame, xyxy in pixels.
        weight: from 0 (no smoothing) to below 1.

    >>> list(smooth_boxes([(0, 0, 8, 8), (4, 0, 12, 8), None, (4, 0, 12, 8)], 0.5))
    [(0.0, 0.0, 8.0, 8.0), (2.0, 0.0, 10.0, 8.0), None, (4.0, 0.0, 12.0, 8.0)]
    """
    smoothed: Box | None = None
    for box in boxes:
        if box is None:
            smoothed = None
        elif smoothed is None:
            x0, y0, x1, y1 = map(float, box)
            smoothed = x0, y0, x1, y1
        else:
            x0, y0, x1, y1 = (weight * old + (1 - weight) * new for old, new in zip(smoothed, box, strict=True))
            smoothed = x0, y0, x1, y1
        yield smoothed
