"""Of several boxes or masks of one expression, those that the map attends to, and no object twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box, rescaled
from localization_heads.cells import (
    box_iou,
    label_components,
    mask_shares,
    mass_inside,
    spread,
    tight_box,
    visible_cells,
    visible_edges,
)
from localization_heads.grounding.ground import LEAST_MASS, Grounding

OVERLAP = 0.5
"""IoU above which two boxes are of the same object; of masks, the share of the smaller one that both have."""


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


def attended(
    whole: Grounding, proposals: NDArray[np.bool_], name: str, least: float = LEAST_MASS
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
        shares = mask_shares(proposals[place], _drawn(whole, proposals), _grid(whole))
        if sum(shares[cells].sum() > OVERLAP * cells.sum() for cells in components) > 1:
            continue
        common = [np.count_nonzero(proposals[place] & proposals[other]) for other in kept]
        if all(both <= OVERLAP * min(sizes[place], sizes[i]) for both, i in zip(common, kept, strict=True)):
            kept.append(int(place))
    return [_of_mask(whole, proposals[place], name) for place in kept]


def _drawn(whole: Grounding, proposals: NDArray[np.bool_]) -> Box:
    """The region that the grid covers, in pixels of the proposals."""
    return rescaled(whole.image_box, whole.image_size, (proposals.shape[2], proposals.shape[1]))


def _grid(whole: Grounding) -> tuple[int, int]:
    return whole.combined.shape[0], whole.combined.shape[1]


def _components(whole: Grounding, least: float) -> list[NDArray[np.bool_]]:
    """The components of the map's positive cells with at least this share of the strongest one's attention."""
    shown = visible_cells(*visible_edges(whole.image_box, whole.image_size, _grid(whole)))
    labels = label_components((whole.combined > whole.threshold) & shown)
    masses = np.bincount(labels.ravel(), weights=whole.combined.ravel())[1:]
    return [labels == 1 + i for i, mass in enumerate(masses) if mass >= least * masses.max()]


def _worth(whole: Grounding, proposals: NDArray[np.bool_]) -> NDArray[np.float64]:
    drawn = proposals.shape[2], proposals.shape[1]
    excess = spread(whole.combined, _drawn(whole, proposals), drawn) - whole.threshold
    return np.array([excess[mask].sum(dtype=np.float64) for mask in proposals])


def _of_mask(whole: Grounding, mask: NDArray[np.bool_], name: str) -> Grounding:
    fine = cv2.resize(mask.astype(np.uint8) * 255, whole.image_size, interpolation=cv2.INTER_LINEAR) > 127
    shares = mask_shares(fine, whole.image_box, _grid(whole))
    box = tight_box(fine) or whole.box
    found = replace(whole, box=box, cells=(shares >= 0.5) & (whole.combined > whole.threshold))
    return replace(
        found,
        score=mass_inside(whole.combined, whole.image_box, whole.image_size, box),
        refined=fine,
        mask_from=name,
        mask_overlap=float(box_iou(box, box_of_cells(found))),
    )


def box_of_cells(grounding: Grounding) -> Box:
    """The tight box of a grounding's cells; its own box where it has none."""
    edges = visible_edges(grounding.image_box, grounding.image_size, grounding.cells.shape)
    return tight_box(grounding.cells, *edges) or grounding.box
