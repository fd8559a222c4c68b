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

MAX_COVERED = 0.5
"""Largest share of a mask that a better mask may contain, and of a component that counts as not covered by a mask."""


def select_proposals(
    whole: Grounding, proposals: NDArray[np.bool_], name: str, least: float = MIN_INSTANCE_MASS
) -> list[Grounding]:
    """The proposed masks of the objects that the map attends to, the best first.

    The score of a mask is `sum (map - threshold)` over its pixels: pixels of the object add to it and pixels around the
    object are subtracted, so neither a part of an object nor an object with its surroundings beats the object itself.
    A mask that covers most of two or more components of the map is a group of objects and left out.

    Args:
        whole: the grounding from the map alone, of which the map and the threshold are used, not the box.
        proposals: masks of the whole image at any resolution, bool `[n, h, w]`.
        name: of the segmenter.
        least: masks that score less than this share of the best are left out.

    Returns:
        Groundings with the box of their mask; their cells are the positive ones that the mask covers by half or more.
        Of two masks that share more than `MAX_COVERED` of the smaller one, the better is kept. Empty if there is no
        positive cell, or no mask with a positive score.
    """
    if not proposals.size or not math.isfinite(whole.threshold):
        return []
    grid_box = _grid_box(whole, proposals)
    scores = _scores(whole, proposals)
    components = _components(whole, least)
    areas = np.count_nonzero(proposals, axis=(1, 2))
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] <= 0 or scores[index] < least * scores.max():
            break
        coverage = mask_coverage(proposals[index], grid_box, whole.grid)
        if sum(coverage[cells].sum() > MAX_COVERED * cells.sum() for cells in components) > 1:
            continue
        shared = [np.count_nonzero(proposals[index] & proposals[better]) for better in kept]
        smaller = [min(areas[index], areas[better]) for better in kept]
        if all(area <= MAX_COVERED * limit for area, limit in zip(shared, smaller, strict=True)):
            kept.append(int(index))
    return [_grounding_of_mask(whole, proposals[index], name) for index in kept]


def _grid_box(whole: Grounding, proposals: NDArray[np.bool_]) -> Box:
    """The region that the grid covers, in pixels of the proposals."""
    return rescale_box(whole.image_box, whole.image_size, (proposals.shape[2], proposals.shape[1]))


def _scores(whole: Grounding, proposals: NDArray[np.bool_]) -> NDArray[np.float64]:
    size = proposals.shape[2], proposals.shape[1]
    excess = upsample_to_image(whole.combined, _grid_box(whole, proposals), size) - whole.threshold
    return np.array([excess[mask].sum(dtype=np.float64) for mask in proposals])


def _components(whole: Grounding, least: float) -> list[NDArray[np.bool_]]:
    """The components of positive cells with at least this share of the strongest component's attention."""
    labels = label_components((whole.combined > whole.threshold) & visible_cells(*whole.edges))
    masses = np.bincount(labels.ravel(), weights=whole.combined.ravel())[1:]
    return [labels == 1 + i for i, mass in enumerate(masses) if mass >= least * masses.max()]


def _grounding_of_mask(whole: Grounding, mask: NDArray[np.bool_], name: str) -> Grounding:
    full_size = (
        cv2.resize(mask.astype(np.uint8) * 255, whole.image_size, interpolation=cv2.INTER_LINEAR) > 127
    )
    coverage = mask_coverage(full_size, whole.image_box, whole.grid)
    box = tight_box(full_size) or whole.box
    found = replace(whole.with_box(box), cells=(coverage >= 0.5) & (whole.combined > whole.threshold))
    overlap = float(box_iou(box, box_of_cells(found)))
    return replace(found, refined=full_size, mask_from=name, mask_overlap=overlap)
