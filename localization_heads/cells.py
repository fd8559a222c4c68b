"""The grid of a map over its image: components of cells, coverage of cells by boxes and masks, resampling to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import Box, clip_box
from localization_heads.options.groups import Interpolation

SLIVER = 1e-6
"""Pixels: a cell that shows less of the image than this lies outside of it but for rounding."""


def label_components(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Label the 8-connected components of a stack of masks: 1..n through the whole stack, 0 for the background.

    Args:
        masks: bool `[..., h, w]`.

    Returns:
        int32 `[..., h, w]`, in the order of the components' first cells: map by map, row by row.

    >>> label_components(np.array([[True, False, True], [False, False, True]])).tolist()
    [[1, 0, 2], [0, 0, 2]]
    """
    *stack, height, width = masks.shape
    separated = np.zeros((*stack, height + 1, width), dtype=np.bool_)
    separated[..., :-1, :] = masks
    return label_separated(separated)[1][..., :-1, :].copy()


def label_separated(separated: NDArray[np.bool_]) -> tuple[int, NDArray[np.int32]]:
    """`label_components` of masks `[..., h, w]` that an empty last row keeps apart: one more than n, and the labels."""
    if not separated.size:
        return 1, np.zeros(separated.shape, dtype=np.int32)
    stacked = separated.view(np.uint8).reshape(-1, separated.shape[-1])
    # Only this algorithm of OpenCV labels components in the order of their first cells.
    count, labels = cv2.connectedComponentsWithAlgorithm(stacked, 8, cv2.CV_32S, cv2.CCL_WU)
    return count, np.asarray(labels, dtype=np.int32).reshape(separated.shape)


def tight_box(
    mask: NDArray[np.bool_],
    x_edges: NDArray[np.float64] | None = None,
    y_edges: NDArray[np.float64] | None = None,
) -> Box | None:
    """The smallest box that contains a mask, bool `(h, w)`: xyxy, half-open; None for an empty mask.

    Args:
        x_edges, y_edges: borders of its columns `[w + 1]` and rows `[h + 1]` in pixels; by default a cell is a pixel.

    >>> tight_box(np.array([[False, False, False], [False, True, True]]))
    (1.0, 1.0, 3.0, 2.0)
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    x = np.arange(mask.shape[1] + 1.0) if x_edges is None else x_edges
    y = np.arange(mask.shape[0] + 1.0) if y_edges is None else y_edges
    return float(x[columns[0]]), float(y[rows[0]]), float(x[columns[-1] + 1]), float(y[rows[-1] + 1])


def upsample(
    maps: NDArray[np.floating[Any]], times: int, interpolation: Interpolation = "nearest"
) -> NDArray[np.floating[Any]]:
    """Maps `[..., h, w]` with every cell split into `times x times`: `[..., h * times, w * times]`.

    `nearest` repeats the cell's value; `bilinear` interpolates between cell centres and is constant from the outer
    centres to the border, like OpenCV, and PyTorch with `align_corners=False`.
    """
    if times == 1:
        return maps
    if interpolation == "nearest":
        return np.repeat(np.repeat(maps, times, -2), times, -1)
    h, w = maps.shape[-2:]
    return _interpolate(maps.astype(np.float64), _interpolation(0, h, h, h, times), _interpolation(0, w, w, w, times))


def normalised_heatmap(
    combined: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int]
) -> NDArray[np.float32]:
    """A map `[h, w]` over `image_box`, interpolated on the pixels of the image, `[H, W]`, with a maximum of 1."""
    heat = upsample_to_image(combined, image_box, image_size)
    peak = heat.max()
    return heat / peak if peak > 0 else heat


def upsample_to_image(
    combined: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int], outside: float = 0.0
) -> NDArray[np.float32]:
    """A map `[h, w]` over `image_box`, interpolated on the pixels of the image: `[H, W]`.

    Bilinear between cell centres, constant from the outer centres to the grid's border, `outside` beyond it.
    """
    x0, y0, x1, y1 = image_box
    columns = _interpolation(x0, x1, combined.shape[1], image_size[0])
    rows = _interpolation(y0, y1, combined.shape[0], image_size[1])
    heat = _interpolate(combined.astype(np.float32), rows, columns)
    heat[~rows.covered] = outside
    heat[:, ~columns.covered] = outside
    return heat


def mass_inside(mass: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int], box: Box) -> float:
    """Share of a map's mass on the image that lies in `box`: `sum m_c |c ∩ box| / sum m_c |c ∩ image|`, 0 to 1.

    Of its own box, this is a grounding's score; of the true box, the metric `energy`. Cells that the box or the image's
    edge cuts count by area; mass on the padding does not count. 0 for a map without mass on the image.

    Args:
        mass: `[h, w]`, not negative, over the region `image_box` of the image, in pixels.
        image_size: `(W, H)`.
        box: xyxy in pixels; clipped to the image.

    >>> mass_inside(np.array([[3.0, 1.0]]), (0, 0, 4, 2), (4, 2), (1, 0, 4, 2))
    0.625
    """
    x_edges, y_edges = grid_edges(image_box, mass.shape)

    def mass_in(x0: float, y0: float, x1: float, y1: float) -> float:
        return float(interval_coverage(y_edges, y0, y1) @ mass @ interval_coverage(x_edges, x0, x1))

    total, inside = mass_in(0, 0, *image_size), mass_in(*clip_box(box, image_size))
    return min(1.0, inside / total) if total > 0 else 0.0


def box_iou(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """`|a ∩ b| / |a ∪ b|` of boxes `[..., 4]`, broadcast against each other: float64 `[...]`.

    A box is empty unless x0 < x1 and y0 < y1; two empty boxes have IoU 0.

    >>> float(box_iou((0, 0, 2, 2), (1, 0, 3, 2)))
    0.3333333333333333
    """
    a, b = _as_boxes(a), _as_boxes(b)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., 2:], b[..., 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=-1)
    union = _area(a) + _area(b) - intersection
    return np.asarray(intersection / np.where(union > 0, union, 1.0))


def mean_box_iou(box: Box, boxes: Sequence[Box | None]) -> float:
    """Mean IoU of a box with several others, of which a missing one (None) counts 0.

    >>> mean_box_iou((0, 0, 2, 2), [(0, 0, 2, 2), (0, 0, 2, 1), None])
    0.5
    """
    return float(np.mean([0.0 if other is None else float(box_iou(box, other)) for other in boxes]))


def _as_boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(boxes, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes must be [..., 4] as x0, y0, x1, y1, not {array.shape}")
    return array


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1))


def interval_coverage(edges: ArrayLike, low: float, high: float) -> NDArray[np.float64]:
    """The share of each interval between ascending `edges` `[n + 1]` that lies in `[low, high]`: float64 `[n]`.

    >>> interval_coverage([0, 2, 4, 6], 1, 4.5).tolist()
    [0.5, 1.0, 0.25]
    """
    edges = np.asarray(edges, dtype=np.float64)
    return np.asarray(interval_overlaps(edges, np.array([low, high]))[:, 0] / np.diff(edges))


def interval_overlaps(edges: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths of the overlaps of the intervals between ascending `edges` `[n + 1]` and `others` `[m + 1]`: `[n, m]`.

    >>> interval_overlaps(np.array([0.0, 2.0, 4.0]), np.array([1.0, 1.5, 3.0])).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    start = np.maximum(edges[:-1, None], others[None, :-1])
    end = np.minimum(edges[1:, None], others[None, 1:])
    return np.asarray(np.clip(end - start, 0, None))


def mask_coverage(mask: NDArray[np.bool_], image_box: Box, grid: tuple[int, int]) -> NDArray[np.float64]:
    """The share of each cell that a mask `[H, W]` covers: float64 `[h, w]` for a grid over `image_box`.

    Pixels that a cell's edge cuts count by area; outside the image the mask is empty.

    >>> mask_coverage(np.array([[True, False, False, True]]), (0, 0, 4, 1), (1, 2)).tolist()
    [[0.5, 0.5]]
    """
    height, width = mask.shape
    x_edges, y_edges = grid_edges(image_box, grid)
    column_weights = interval_overlaps(x_edges, np.arange(width + 1.0))  # (w, W)
    row_weights = interval_overlaps(y_edges, np.arange(height + 1.0))  # (h, H)
    areas = np.zeros(grid)
    for row, weights in enumerate(row_weights):  # one row of the grid at a time: no float copy of a whole large mask
        pixels = np.flatnonzero(weights)
        areas[row] = column_weights @ (weights[pixels] @ mask[pixels].astype(np.float64))
    return np.asarray(areas / ((x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])))


def box_coverage(box: Box, image_box: Box, grid: tuple[int, int]) -> NDArray[np.float64]:
    """The share of each cell that a box covers: float64 `[h, w]` for a grid over `image_box`.

    >>> box_coverage((1, 0, 4, 1), (0, 0, 4, 1), (1, 2)).tolist()
    [[0.5, 1.0]]
    """
    x_edges, y_edges = grid_edges(image_box, grid)
    return np.outer(interval_coverage(y_edges, box[1], box[3]), interval_coverage(x_edges, box[0], box[2]))


def grid_edges(image_box: Box, grid: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Borders of the columns `[w + 1]` and rows `[h + 1]` of a grid over `image_box`, in pixels."""
    x0, y0, x1, y1 = image_box
    return np.linspace(x0, x1, grid[1] + 1), np.linspace(y0, y1, grid[0] + 1)


def visible_edges(
    image_box: Box, image_size: tuple[int, int], grid: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Borders of the grid's columns `[w + 1]` and rows `[h + 1]` in pixels, clipped to the image.

    Cells outside the image have an extent of 0.

    >>> x_edges, y_edges = visible_edges((-2, 0, 6, 4), (4, 4), (2, 4))  # padded on both sides
    >>> x_edges.tolist(), y_edges.tolist()
    ([0.0, 0.0, 2.0, 4.0, 4.0], [0.0, 2.0, 4.0])
    """
    x_edges, y_edges = grid_edges(image_box, grid)
    return np.clip(x_edges, 0.0, image_size[0]), np.clip(y_edges, 0.0, image_size[1])


def visible_cells(x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The cells that show some of the image: bool `[h, w]`, from `visible_edges`."""
    return np.logical_and.outer(np.diff(y_edges) > SLIVER, np.diff(x_edges) > SLIVER)


class _Interpolation(NamedTuple):
    """For each pixel centre: the two neighbouring cells, its position between them, and if the grid covers it."""

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    share: NDArray[np.float32]
    covered: NDArray[np.bool_]


def _interpolation(start: float, stop: float, cells: int, pixels: int, parts: int = 1) -> _Interpolation:
    """Along one axis, for `cells` from `start` to `stop` and for `pixels` pixels, each split into `parts`."""
    centres = (np.arange(pixels * parts) + 0.5) / parts
    position = np.clip((centres - start) * cells / (stop - start) - 0.5, 0, cells - 1)
    lower = position.astype(np.intp)
    upper = np.minimum(lower + 1, cells - 1)
    covered = (start <= centres) & (centres <= stop)
    return _Interpolation(lower, upper, (position - lower).astype(np.float32), covered)


def _interpolate(cells: NDArray[np.floating[Any]], rows: _Interpolation, columns: _Interpolation) -> NDArray[Any]:
    """Maps `[..., h, w]` interpolated bilinearly at the crossings of rows and columns: `[..., H, W]`, same dtype."""
    above, below = cells[..., rows.lower, :], cells[..., rows.upper, :]
    lines = above + rows.share[:, None] * (below - above)  # (..., H, w)
    left, right = lines[..., columns.lower], lines[..., columns.upper]
    return left + columns.share * (right - left)  # (..., H, W)
