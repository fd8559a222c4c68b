"""A second look: which part of the image is asked about again, and what its answer changes about the first box.

The crop is a square around the first box. Its box takes part only where it agrees with the first one: a crop shows less
of what tells objects apart ("the dog on the left"), so what it finds alone is no better (docs/grounding.md).
"""

from __future__ import annotations

from dataclasses import replace

from localization_heads.attention import Box
from localization_heads.cells import box_iou, mass_inside
from localization_heads.grounding.ground import Grounding

MARGIN = 0.5
"""Context on each side of the crop, in longer sides of the box."""
LEAST_CELLS = 6
"""Side of the smallest crop, in cells of the first map: less shows nothing but the object's inside."""
DRIFT = 0.5
"""IoU of both boxes below which the second has drifted away, and the first is kept."""

Region = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels."""


def crop_around(grounding: Grounding) -> Region | None:
    """The part of the image to ask about again; None where no cell stands out, or where it is the whole image."""
    if not grounding.cells.any():
        return None
    (left, top, right, bottom), (h, w) = grounding.image_box, grounding.combined.shape
    least = LEAST_CELLS * max((right - left) / w, (bottom - top) / h)
    crop = square_around(grounding.box, grounding.image_size, least)
    return None if crop == (0, 0, *grounding.image_size) else crop


def square_around(box: Box, image_size: tuple[int, int], least: float = 0.0) -> Region:
    """A square with the box in its middle and `MARGIN` of its longer side around it, moved and cut to fit the image.

    Args:
        least: its side in pixels, at least.

    >>> square_around((40, 40, 60, 50), (100, 80)), square_around((0, 40, 20, 50), (100, 80))
    ((30, 25, 70, 65), (0, 25, 40, 65))
    >>> square_around((10, 0, 70, 30), (100, 30)), square_around((50, 50, 52, 52), (100, 80), least=10)
    ((0, 0, 100, 30), (46, 46, 56, 56))
    """
    x0, y0, x1, y1 = box
    side = max(max(x1 - x0, y1 - y0) * (1 + 2 * MARGIN), least, 1.0)
    (left, right), (top, bottom) = (
        _span((start + end) / 2, side, length)
        for start, end, length in ((x0, x1, image_size[0]), (y0, y1, image_size[1]))
    )
    return left, top, right, bottom


def _span(middle: float, side: float, length: int) -> tuple[int, int]:
    """A span of `side` pixels about the middle, moved into `0..length`; all of that where it is too long."""
    side = min(max(round(side), 1), length)
    start = min(max(round(middle - side / 2), 0), length - side)
    return start, start + side


def mapped_back(box: Box, crop: Region) -> Box:
    """A box in pixels of the crop, in pixels of the image.

    >>> mapped_back((1, 2, 5, 6), (30, 25, 70, 65))
    (31, 27, 35, 31)
    """
    return box[0] + crop[0], box[1] + crop[1], box[2] + crop[0], box[3] + crop[1]


def averaged(first: Box, second: Box | None) -> Box:
    """The mean of both boxes' edges; the first box where there is no second, or it has drifted away.

    >>> averaged((0, 0, 10, 10), (2, 0, 10, 8)), averaged((0, 0, 10, 10), (8, 0, 18, 10))
    ((1.0, 0.0, 10.0, 9.0), (0, 0, 10, 10))
    """
    if second is None or box_iou(first, second) < DRIFT:
        return first
    x0, y0, x1, y1 = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    return x0, y0, x1, y1


def looked_again(grounding: Grounding, second: Box | None) -> Grounding:
    """The grounding with its box `averaged` with that of the second look, and the first map's mass in it as score."""
    box = averaged(grounding.box, second)
    if box == grounding.box:
        return grounding
    score = mass_inside(grounding.combined, grounding.image_box, grounding.image_size, box)
    return replace(grounding, box=box, score=score)
