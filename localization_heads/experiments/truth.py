"""How well each head's map alone covers the object (Sec. 4.4, Fig. 6b)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.raster import visible_edges
from localization_heads.heads.criteria import binarise


def head_ious(maps: AttentionMaps, truth: Truth) -> NDArray[np.float32]:
    """IoU of every head's own map, binarised at its mean and laid over the picture, with the object.

    Exact: a cell's share of the object and of the picture are areas, not samples. Without a mask the object
    is its box. Cells outside the picture (padding) have no area; parts of the object outside the grid
    (cropping) count as missed.

    Returns:
        float32 `[layer, head]`; 0 for a map with no positive cell.
    """
    x_edges, y_edges = visible_edges(maps.image_box, maps.image_size, maps.grid)
    areas = np.outer(np.diff(y_edges), np.diff(x_edges))
    object_areas = cell_shares(truth, x_edges, y_edges)
    active = binarise(maps.attention).reshape(maps.num_layers, maps.num_heads, -1).astype(np.float64)
    shared = active @ object_areas.ravel()
    union = active @ areas.ravel() + object_area(truth, maps.image_size) - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1), 0), dtype=np.float32)


def head_hits(maps: AttentionMaps, truth: Truth) -> NDArray[np.bool_]:
    """Pointing game of every head alone: does its strongest cell on the picture have its centre in the box?

    Returns:
        bool `[layer, head]`.
    """
    x_edges, y_edges = visible_edges(maps.image_box, maps.image_size, maps.grid)
    visible = np.logical_and.outer(np.diff(y_edges) > 0, np.diff(x_edges) > 0)
    on_image = np.where(visible, maps.attention, -np.inf).reshape(maps.num_layers, maps.num_heads, -1)
    row, column = np.unravel_index(on_image.argmax(axis=-1), maps.grid)
    x, y = (x_edges[:-1] + x_edges[1:])[column] / 2, (y_edges[:-1] + y_edges[1:])[row] / 2
    x0, y0, x1, y1 = truth.box
    return np.asarray((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))


def cell_shares(
    truth: Truth, x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Pixels of the object in each cell `[h, w]`; a pixel that a border cuts counts in parts on both sides."""
    if truth.mask is None:
        x0, y0, x1, y1 = truth.box
        return np.outer(
            _overlap(y_edges, np.array([y0, y1]))[:, 0], _overlap(x_edges, np.array([x0, x1]))[:, 0]
        )
    height, width = truth.mask.shape
    rows, columns = _overlap(y_edges, np.arange(height + 1.0)), _overlap(x_edges, np.arange(width + 1.0))
    return np.asarray(rows @ truth.mask.astype(np.float64) @ columns.T)


def object_area(truth: Truth, image_size: tuple[int, int]) -> float:
    """Pixels of the object in the picture."""
    if truth.mask is not None:
        return float(truth.mask.sum())
    x0, y0, x1, y1 = truth.box
    width, height = min(x1, image_size[0]) - max(x0, 0), min(y1, image_size[1]) - max(y0, 0)
    return float(max(width, 0) * max(height, 0))


def _overlap(cells: NDArray[np.float64], pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length that each interval of `cells` shares with each of `pixels`, `[cell, pixel]`."""
    start = np.maximum(cells[:-1, None], pixels[None, :-1])
    end = np.minimum(cells[1:, None], pixels[None, 1:])
    return np.asarray(np.clip(end - start, 0, None))
