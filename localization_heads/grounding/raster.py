"""Between cells and pixels: which cells show the image, and a map on the pixels of the image."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box

Interpolation = Literal["nearest", "bilinear"]

SLIVER = 1e-6
"""Pixels: a cell that shows less of the image than this is outside; it touches the border by rounding."""


def upsample(
    maps: NDArray[np.floating[Any]], times: int, interpolation: Interpolation = "nearest"
) -> NDArray[np.floating[Any]]:
    """Maps `[..., h, w]` with every cell cut into `times x times`: `[..., h * times, w * times]`.

    `nearest` repeats the cell's value. `bilinear` goes linearly from centre to centre and stays constant from the
    outer centres to the border, as OpenCV and PyTorch resize (without aligned corners).
    """
    if times == 1:
        return maps
    if interpolation == "nearest":
        return np.repeat(np.repeat(maps, times, -2), times, -1)
    h, w = maps.shape[-2:]
    return _blended(
        maps.astype(np.float64), _between_centres(0, h, h, h, times), _between_centres(0, w, w, w, times)
    )


def resample(
    combined: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int]
) -> NDArray[np.float32]:
    """A map `[h, w]` over `image_box` on the pixels of the image, `[H, W]`, scaled to a maximum of 1."""
    heat = spread(combined, image_box, image_size)
    peak = heat.max()
    return heat / peak if peak > 0 else heat


def spread(
    combined: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int], outside: float = 0.0
) -> NDArray[np.float32]:
    """A map `[h, w]` over `image_box` on the pixels of the image, `[H, W]`, in its own values.

    Bilinear between cell centres, constant from the outer centres to the grid's border, `outside` beyond it.
    """
    x0, y0, x1, y1 = image_box
    columns = _between_centres(x0, x1, combined.shape[1], image_size[0])
    rows = _between_centres(y0, y1, combined.shape[0], image_size[1])
    heat = _blended(combined.astype(np.float32), rows, columns)
    heat[~rows.inside] = outside
    heat[:, ~columns.inside] = outside
    return heat


def mass_inside(
    box: Box, mass: NDArray[np.floating[Any]], x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]
) -> float:
    """Share of the map's mass on the image that lies in the box, 0 to 1: the score of a box.

    A cell that the box cuts counts by the part of what it shows of the image; cells that show nothing count nothing.

    Args:
        box: xyxy in pixels.
        mass: `[h, w]`.
        x_edges, y_edges: of `visible_edges`, `[w + 1]` and `[h + 1]`.
    """
    across, down = _covered(box[0], box[2], x_edges), _covered(box[1], box[3], y_edges)
    total = float(mass[visible_cells(x_edges, y_edges)].sum())
    return min(1.0, float(down @ mass @ across) / total) if total > 0 else 0.0


def _covered(start: float, stop: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each cell's visible extent between two coordinates, 0 for one that shows nothing."""
    extent = np.diff(edges)
    shared = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None)
    return np.where(extent > SLIVER, shared / np.where(extent > SLIVER, extent, 1.0), 0.0)


def visible_edges(
    image_box: Box, image_size: tuple[int, int], grid: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Borders of the grid's columns `[w + 1]` and rows `[h + 1]` in pixels, clipped to the image.

    A cell outside the image has no extent left.

    >>> x_edges, y_edges = visible_edges((-2, 0, 6, 4), (4, 4), (2, 4))  # padded on both sides
    >>> x_edges.tolist(), y_edges.tolist()
    ([0.0, 0.0, 2.0, 4.0, 4.0], [0.0, 2.0, 4.0])
    """
    x0, y0, x1, y1 = image_box
    x_edges = np.linspace(x0, x1, grid[1] + 1)
    y_edges = np.linspace(y0, y1, grid[0] + 1)
    return np.clip(x_edges, 0.0, image_size[0]), np.clip(y_edges, 0.0, image_size[1])


def visible_cells(x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The cells that show some of the image: bool `[h, w]`."""
    return np.logical_and.outer(np.diff(y_edges) > SLIVER, np.diff(x_edges) > SLIVER)


class _Between(NamedTuple):
    """For each pixel centre: the cells on either side, how far it is between them, and if the grid has it."""

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    share: NDArray[np.float32]
    inside: NDArray[np.bool_]


def _between_centres(start: float, stop: float, cells: int, pixels: int, parts: int = 1) -> _Between:
    """Between the cells from `start` to `stop`, for the centres of `pixels` pixels of `parts` parts each."""
    centres = (np.arange(pixels * parts) + 0.5) / parts
    place = np.clip((centres - start) * cells / (stop - start) - 0.5, 0, cells - 1)
    lower = place.astype(np.intp)
    upper = np.minimum(lower + 1, cells - 1)
    return _Between(lower, upper, (place - lower).astype(np.float32), (start <= centres) & (centres <= stop))


def _blended(cells: NDArray[np.floating[Any]], rows: _Between, columns: _Between) -> NDArray[Any]:
    """Bilinear values of maps `[..., h, w]` at the crossings of rows and columns, in the type of the maps."""
    above, below = cells[..., rows.lower, :], cells[..., rows.upper, :]
    lines = above + rows.share[:, None] * (below - above)  # (..., H, w)
    left, right = lines[..., columns.lower], lines[..., columns.upper]
    return left + columns.share * (right - left)  # (..., H, W)
