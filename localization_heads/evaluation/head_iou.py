"""How well each head localizes on its own.

`map_ious` compares the binarised map with the ground truth, as in the paper's Fig. 6b, and depends on no read-out.
`box_ious`, shown in the report, grounds with one head at a time by the options of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box, clip_box
from localization_heads.cells import (
    box_coverage,
    box_iou,
    grid_edges,
    mask_coverage,
    visible_cells,
    visible_edges,
)
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import binarise
from localization_heads.heads.head import Head
from localization_heads.heads.labels import mass_in_truth
from localization_heads.options.groups import GroundingOptions


def map_ious(maps: AttentionMaps, truth: Truth) -> NDArray[np.float32]:
    """IoU of every head's map, binarised at its mean and upsampled to the image, with the true mask or box (Fig. 6b).

    Exact: intersections are areas, not pixel counts. Cells outside the image (padding) have no area; parts of the
    object outside the grid (cropping) count as missed.

    Returns:
        float32 `[layer, head]`; 0 for a map with no positive cell.
    """
    x_edges, y_edges = visible_edges(maps.image_box, maps.image_size, maps.grid)
    areas = np.outer(np.diff(y_edges), np.diff(x_edges))
    object_areas, object_area = _object_areas(truth, maps)
    positive = binarise(maps.attention).reshape(maps.num_layers, maps.num_heads, -1).astype(np.float64)
    shared = positive @ object_areas.ravel()
    union = positive @ areas.ravel() + object_area - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1), 0), dtype=np.float32)


def _object_areas(truth: Truth, maps: AttentionMaps) -> tuple[NDArray[np.float64], float]:
    """Area of the object in each cell `[h, w]` and in the image, in pixels."""
    x_edges, y_edges = grid_edges(maps.image_box, maps.grid)
    cell = (x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])
    if truth.mask is not None:
        return cell * mask_coverage(truth.mask, maps.image_box, maps.grid), float(truth.mask.sum())
    x0, y0, x1, y1 = box = clip_box(truth.box, maps.image_size)
    return cell * box_coverage(box, maps.image_box, maps.grid), float((x1 - x0) * (y1 - y0))


def head_hits(maps: AttentionMaps, truth: Truth) -> NDArray[np.bool_]:
    """Pointing game of every head: whether the centre of its strongest cell on the image lies in the true box.

    Returns:
        bool `[layer, head]`.
    """
    x_edges, y_edges = visible_edges(maps.image_box, maps.image_size, maps.grid)
    visible = np.where(visible_cells(x_edges, y_edges), maps.attention, -np.inf)
    best = visible.reshape(maps.num_layers, maps.num_heads, -1).argmax(axis=-1)
    row, column = np.unravel_index(best, maps.grid)
    x, y = (x_edges[:-1] + x_edges[1:])[column] / 2, (y_edges[:-1] + y_edges[1:])[row] / 2
    x0, y0, x1, y1 = truth.box
    return np.asarray((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))


def label_scores(maps: AttentionMaps, truth: Truth) -> dict[str, NDArray[np.float32]]:
    """Scores that rank heads by labels, by the names of `heads_by=`: float32 `[layer, head]`, higher is better."""
    return {
        "mass": mass_in_truth(maps, truth.box, truth.mask),
        "iou": map_ious(maps, truth),
        "pointing": head_hits(maps, truth).astype(np.float32),
    }


def box_ious(maps: AttentionMaps, heads: Sequence[Head], truth: Box, options: GroundingOptions) -> list[float | None]:
    """IoU of the true box and the box of each head's own map; None for an empty map, of a layer that was not run."""
    return [
        float(box_iou(ground_maps(maps, [head], options).box, truth)) if maps.attention[head].any() else None
        for head in heads
    ]


def mean_ious(
    heads: Sequence[Head], shape: tuple[int, int], samples: Sequence[Sequence[float | None]]
) -> NDArray[np.float64]:
    """The mean of `box_ious` over samples: float64 `[layer, head]` of the given shape, NaN for heads without any."""
    means = np.full(shape, np.nan)
    for head, ious in zip(heads, zip(*samples, strict=True), strict=True):
        if known := [iou for iou in ious if iou is not None]:
            means[head] = np.mean(known)
    return means
