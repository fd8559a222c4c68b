"""What becomes of boxes: several of one expression, a second look at the image, boxes over time.

The crop of a second look is a square around the first box. Its box takes part only where it agrees with the first one:
a crop shows less of what tells objects apart ("the dog on the left"), so what it finds alone is no better
(docs/readouts.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box, rescale_box
from localization_heads.cells import (
    box_iou,
    label_components,
    mask_coverage,
    tight_box,
    upsample_to_image,
    visible_cells,
)
from localization_heads.grounding.ground import MIN_INSTANCE_MASS, Grounding

OVERLAP = 0.5
"""IoU above which two boxes are of the same object; of masks, the share of the smaller one that both have."""


def non_maximum_suppression(boxes: Sequence[Box]) -> list[int]:
    """Places of the boxes, best first, that no better one overlaps with an IoU above `OVERLAP`: no duplicates.

    >>> non_maximum_suppression([(0, 0, 4, 4), (0, 0, 4, 3), (4, 0, 8, 4)])
    [0, 2]
    """
    kept: list[int] = []
    for place, box in enumerate(boxes):
        if all(float(box_iou(box, boxes[other])) <= OVERLAP for other in kept):
            kept.append(place)
    return kept


def select_proposals(
    whole: Grounding, proposals: NDArray[np.bool_], name: str, least: float = MIN_INSTANCE_MASS
) -> list[Grounding]:
    """Of masks that somebody proposed, those of the objects that the map attends to, the best first.

    Each is worth `sum (map - threshold)` over its pixels. What it has of an object counts for it, what it has beside
    that against it, so that neither a part of an object nor an object with its surroundings beats the object itself.
    One with most of two or more components of the map is no object but a group of them, and left out.

    Args:
        whole: what the map alone gives: its map and threshold count, not its box.
        proposals: masks of the whole image drawn at any size, bool `[n, h, w]`.
        name: of what proposed them.
        least: proposals worth less than this share of the best are left out; so is one of which a better one has more
            than `OVERLAP`, or the other way round.

    Returns:
        The box of each is that of its mask, and its cells are the positive ones that the mask covers by half or more.
        Empty where no cell stands out, or no proposal is worth anything.
    """
    if not proposals.size or not math.isfinite(whole.threshold):
        return []
    worth = _worth(whole, proposals)
    components = _components(whole, least)
    sizes = np.count_nonzero(proposals, axis=(1, 2))
    kept: list[int] = []
    for place in np.argsort(-worth, kind="stable"):
        if worth[place] <= 0 or worth[place] < least * worth.max():
            break
        shares = mask_coverage(proposals[place], _drawn(whole, proposals), _grid(whole))
        if sum(shares[cells].sum() > OVERLAP * cells.sum() for cells in components) > 1:
            continue
        common = [np.count_nonzero(proposals[place] & proposals[other]) for other in kept]
        if all(both <= OVERLAP * min(sizes[place], sizes[i]) for both, i in zip(common, kept, strict=True)):
            kept.append(int(place))
    return [_of_mask(whole, proposals[place], name) for place in kept]


def _drawn(whole: Grounding, proposals: NDArray[np.bool_]) -> Box:
    """The region that the grid covers, in pixels of the proposals."""
    return rescale_box(whole.image_box, whole.image_size, (proposals.shape[2], proposals.shape[1]))


def _grid(whole: Grounding) -> tuple[int, int]:
    return whole.combined.shape[0], whole.combined.shape[1]


def _components(whole: Grounding, least: float) -> list[NDArray[np.bool_]]:
    """The components of the map's positive cells with at least this share of the strongest one's attention."""
    labels = label_components((whole.combined > whole.threshold) & visible_cells(*whole.edges))
    masses = np.bincount(labels.ravel(), weights=whole.combined.ravel())[1:]
    return [labels == 1 + i for i, mass in enumerate(masses) if mass >= least * masses.max()]


def _worth(whole: Grounding, proposals: NDArray[np.bool_]) -> NDArray[np.float64]:
    drawn = proposals.shape[2], proposals.shape[1]
    excess = upsample_to_image(whole.combined, _drawn(whole, proposals), drawn) - whole.threshold
    return np.array([excess[mask].sum(dtype=np.float64) for mask in proposals])


def _of_mask(whole: Grounding, mask: NDArray[np.bool_], name: str) -> Grounding:
    fine = cv2.resize(mask.astype(np.uint8) * 255, whole.image_size, interpolation=cv2.INTER_LINEAR) > 127
    shares = mask_coverage(fine, whole.image_box, _grid(whole))
    box = tight_box(fine) or whole.box
    found = replace(whole.boxed(box), cells=(shares >= 0.5) & (whole.combined > whole.threshold))
    overlap = float(box_iou(box, box_of_cells(found)))
    return replace(found, refined=fine, mask_from=name, mask_overlap=overlap)


def box_of_cells(grounding: Grounding) -> Box:
    """The tight box of a grounding's cells; its own box where it has none."""
    return tight_box(grounding.cells, *grounding.edges) or grounding.box


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


def to_image_pixels(box: Box, crop: Region) -> Box:
    """A box in pixels of the crop, in pixels of the image.

    >>> to_image_pixels((1, 2, 5, 6), (30, 25, 70, 65))
    (31, 27, 35, 31)
    """
    return box[0] + crop[0], box[1] + crop[1], box[2] + crop[0], box[3] + crop[1]


def average_boxes(first: Box, second: Box | None) -> Box:
    """The mean of both boxes' edges; the first box where there is no second, or it has drifted away.

    >>> average_boxes((0, 0, 10, 10), (2, 0, 10, 8)), average_boxes((0, 0, 10, 10), (8, 0, 18, 10))
    ((1.0, 0.0, 10.0, 9.0), (0, 0, 10, 10))
    """
    if second is None or box_iou(first, second) < DRIFT:
        return first
    x0, y0, x1, y1 = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    return x0, y0, x1, y1


def apply_second_look(grounding: Grounding, second: Box | None) -> Grounding:
    """The grounding with its box averaged with that of the second look, scored by the first map."""
    box = average_boxes(grounding.box, second)
    return grounding if box == grounding.box else grounding.boxed(box)


def smooth_boxes(boxes: Iterable[Box | None], weight: float) -> Iterator[Box | None]:
    """Exponential smoothing of each edge: `weight` of the box before, the rest of the new one.

    Only frames that came before have a say, so that it also works on a stream. Where there is no box, there is none,
    and the next one starts anew.

    Args:
        boxes: of one object, frame by frame, xyxy in pixels.
        weight: from 0 (the boxes as they are) to below 1.

    >>> list(smooth_boxes([(0, 0, 8, 8), (4, 0, 12, 8), None, (4, 0, 12, 8)], 0.5))
    [(0.0, 0.0, 8.0, 8.0), (2.0, 0.0, 10.0, 8.0), None, (4.0, 0.0, 12.0, 8.0)]
    """
    before: Box | None = None
    for box in boxes:
        if box is not None and before is not None:
            x0, y0, x1, y1 = (weight * old + (1 - weight) * new for old, new in zip(before, box, strict=True))
            before = x0, y0, x1, y1
        elif box is None:
            before = None
        else:
            x0, y0, x1, y1 = map(float, box)
            before = x0, y0, x1, y1
        yield before
