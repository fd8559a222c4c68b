"""Objects from a segmenter's proposals (`instances_by=segmenter`): the masks that the combined map attends to."""

from __future__ import annotations

import math
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
from localization_heads.grounding.boxes import box_of_cells
from localization_heads.grounding.ground import MIN_INSTANCE_MASS, Grounding

OVERLAP = 0.5
"""Two masks that share more than this part of the smaller one show the same object, and a mask with more than this part
of a component covers it."""


def select_proposals(
    grounding: Grounding, proposals: NDArray[np.bool_], name: str, least: float = MIN_INSTANCE_MASS
) -> list[Grounding]:
    """The proposed masks of the objects that the map attends to, the best first.

    The score of a mask is `sum (map - threshold)` over its pixels: pixels of the object add to it and pixels around the
    object are subtracted, so neither a part of an object nor an object with its surroundings beats the object itself.
    A mask that covers most of two or more components of the map is a group of objects and left out.

    Args:
        grounding: the grounding from the map alone, of which the map and the threshold are used, not the box.
        proposals: masks of the whole image at any resolution, bool `[n, h, w]`.
        name: of the segmenter.
        least: masks that score less than this share of the best are left out.

    Returns:
        Groundings with the box of their mask; their cells are the positive ones that the mask covers by half or more.
        Of two masks that share more than `OVERLAP` of the smaller one, the better is kept. Empty if there is no
        positive cell, or no mask with a positive score.
    """
    if not proposals.size or not math.isfinite(grounding.threshold):
        return []
    grid_box = _grid_box(grounding, proposals)
    scores = _scores(grounding, proposals, grid_box)
    components = _components(grounding, least)
    areas = np.count_nonzero(proposals, axis=(1, 2))
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] <= 0 or scores[index] < least * scores.max():
            break
        coverage = mask_coverage(proposals[index], grid_box, grounding.grid)
        if sum(coverage[cells].sum() > OVERLAP * cells.sum() for cells in components) > 1:
            continue
        shared = [np.count_nonzero(proposals[index] & proposals[better]) for better in kept]
        smaller = [min(areas[index], areas[better]) for better in kept]
        if all(area <= OVERLAP * limit for area, limit in zip(shared, smaller, strict=True)):
            kept.append(int(index))
    return [_grounding_of_mask(grounding, proposals[index], name) for index in kept]


def _grid_box(grounding: Grounding, proposals: NDArray[np.bool_]) -> Box:
    """The region that the grid covers, in pixels of the proposals."""
    return rescale_box(grounding.image_box, grounding.image_size, (proposals.shape[2], proposals.shape[1]))


def _scores(grounding: Grounding, proposals: NDArray[np.bool_], grid_box: Box) -> NDArray[np.float64]:
    size = proposals.shape[2], proposals.shape[1]
    excess = upsample_to_image(grounding.combined, grid_box, size) - grounding.threshold
    return np.array([excess[mask].sum(dtype=np.float64) for mask in proposals])


def _components(grounding: Grounding, least: float) -> list[NDArray[np.bool_]]:
    """The components of positive cells with at least this share of the strongest component's attention."""
    labels = label_components((grounding.combined > grounding.threshold) & visible_cells(*grounding.edges))
    masses = np.bincount(labels.ravel(), weights=grounding.combined.ravel())[1:]
    return [labels == 1 + i for i, mass in enumerate(masses) if mass >= least * masses.max()]


def _grounding_of_mask(grounding: Grounding, mask: NDArray[np.bool_], name: str) -> Grounding:
    mask = cv2.resize(mask.astype(np.uint8) * 255, grounding.image_size, interpolation=cv2.INTER_LINEAR) > 127
    coverage = mask_coverage(mask, grounding.image_box, grounding.grid)
    box = tight_box(mask) or grounding.box
    cells = (coverage >= 0.5) & (grounding.combined > grounding.threshold)
    masked = replace(grounding.with_box(box), cells=cells)
    overlap = float(box_iou(box, box_of_cells(masked)))
    return replace(masked, refined=mask, mask_from=name, mask_overlap=overlap)
