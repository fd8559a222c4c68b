"""Geometry of cells on the grid: the component that makes the box, its convex hull (App. B.2), its sub-cell edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.cells import label_components

Point = tuple[float, float]


def largest_hull(cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]] | None = None) -> NDArray[np.bool_]:
    """The 8-connected component whose convex hull has the largest area (App. B.2).

    The hull encloses the cells' corners, so a single cell has area 1. Ties go to the component with more `mass`, then
    to the one whose first cell comes first in row-major order.

    Args:
        cells, mass: `[h, w]`.

    Returns:
        bool `[h, w]`; empty if `cells` is.
    """
    labels = label_components(cells)
    best, best_area, best_mass = 0, 0.0, 0.0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        member = labels[rows, columns] == label
        if member.size < best_area:  # the bounding box bounds the hull
            continue
        area = hull_area(member)
        weight = 0.0 if mass is None else float(mass[rows, columns][member].sum())
        # The masses of symmetric components may differ by rounding, which must not decide a tie.
        heavier = weight > best_mass * (1 + 1e-9)
        if area > best_area or (area == best_area and heavier):
            best, best_area, best_mass = label, area, weight
    return np.asarray((labels == best) & cells)


def largest_mass(cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The 8-connected component with the most `mass`; ties go to the one whose first cell comes first.

    Args:
        cells, mass: `[h, w]`; no mass is negative.

    >>> largest_mass(np.array([[True, False, True]]), np.array([[2.0, 9.0, 3.0]])).tolist()
    [[False, False, True]]
    """
    labels = label_components(cells)
    masses = np.bincount(labels.ravel(), weights=np.where(cells, mass, 0.0).ravel())
    masses[0] = 0.0
    # As in `largest_hull`, rounding must not decide a tie.
    return np.asarray((labels == np.argmax(masses >= masses.max() * (1 - 1e-9))) & cells)


def containing_peak(cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The 8-connected component of `cells` `[h, w]` that contains the cell with the most `mass`; the first if tied."""
    if not cells.any():
        return cells
    labels = label_components(cells)
    return np.asarray(labels == labels.flat[np.argmax(np.where(cells, mass, -np.inf))])


def level_crossings(
    values: NDArray[np.floating[Any]], level: float, cells: NDArray[np.bool_], visible: NDArray[np.bool_]
) -> tuple[float, float, float, float]:
    """The box around some cells, between cell centres: where the linearly interpolated map falls to `level`.

    Each row of cells has a left and a right crossing, each column an upper and a lower one; the box takes the outermost
    of them. A side stays on the border of its cell if the next cell is outside the grid or the image, or is above the
    level itself.

    Args:
        values: `[h, w]`, above `level` in `cells`.
        cells: bool `[h, w]`, not empty.
        visible: the cells that show some of the image, bool `[h, w]`.

    Returns:
        x0, y0, x1, y1 in cells from the top left corner of the grid.

    >>> row = np.array([[0.0, 1.0, 4.0, 2.0]])
    >>> level_crossings(row, 1.5, row > 1.5, row >= 0)
    (1.6666666666666665, 0.0, 4.0, 1.0)
    """
    values = np.where(visible, values, np.inf)
    h, w = values.shape
    return (
        _first_crossing(values, level, cells),
        _first_crossing(values.T, level, cells.T),
        w - _first_crossing(values[:, ::-1], level, cells[:, ::-1]),
        h - _first_crossing(values.T[:, ::-1], level, cells.T[:, ::-1]),
    )


def _first_crossing(values: NDArray[np.floating[Any]], level: float, cells: NDArray[np.bool_]) -> float:
    """The leftmost crossing of any row, in cells from the left."""
    rows = np.flatnonzero(cells.any(axis=1))
    first = cells[rows].argmax(axis=1)
    inside, outside = values[rows, first], values[rows, np.maximum(first - 1, 0)]
    falls = (first > 0) & (outside <= level)
    drop = np.where(falls, inside - outside, 1.0)
    return float(np.where(falls, first + 0.5 - (inside - level) / drop, first).min())


def hull_area(cells: NDArray[np.bool_]) -> float:
    """Area, in cells, of the convex hull of the corners of some cells, bool `[h, w]`; exact."""
    points = corners(cells, np.arange(cells.shape[1] + 1), np.arange(cells.shape[0] + 1))
    return cv2.contourArea(cv2.convexHull(np.array(points, dtype=np.int32))) if points else 0.0


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Vertices of the convex hull, in order around it, without collinear ones (Andrew's monotone chain).

    In float64, unlike OpenCV's hull, whose float32 moves pixels at the outline in or out.

    >>> convex_hull([(0, 0), (2, 0), (1, 0), (2, 2), (1, 1), (0, 2)])
    [(0, 0), (2, 0), (2, 2), (0, 2)]
    """
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    return _half_hull(ordered)[:-1] + _half_hull(ordered[::-1])[:-1]


def _half_hull(ordered: list[Point]) -> list[Point]:
    """The half of the hull from the first point to the last that only turns left."""
    chain: list[Point] = []
    for x, y in ordered:
        while len(chain) > 1:
            (ax, ay), (bx, by) = chain[-2:]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            chain.pop()
        chain.append((x, y))
    return chain


def fill_polygon(polygon: NDArray[np.float64], image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in a convex polygon: bool `[H, W]`.

    A polygon that contains no pixel centre gets the pixel at the centre of its box, so that no mask is empty. OpenCV's
    `fillPoly` would round the vertices to whole pixels and include the outline.

    Args:
        polygon: vertices `[n, 2]` (x, y) in pixels, in order.
        image_size: `(W, H)`.

    >>> fill_polygon(np.array([(0, 0), (2, 0), (2, 1), (0, 1)]), (3, 2)).tolist()
    [[True, True, False], [False, False, False]]
    """
    W, H = image_size
    y = np.arange(H) + 0.5
    left, right = np.full(H, np.inf), np.full(H, -np.inf)
    for (xa, ya), (xb, yb) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crossed = (min(ya, yb) <= y) & (y < max(ya, yb))  # never true of a horizontal side
        x = xa + (y[crossed] - ya) * (xb - xa) / (yb - ya) if crossed.any() else y[crossed]
        left[crossed] = np.minimum(left[crossed], x)
        right[crossed] = np.maximum(right[crossed], x)
    centres = np.arange(W) + 0.5
    mask = (centres >= left[:, None]) & (centres < right[:, None])
    if not mask.any():
        x, y = (polygon.min(axis=0) + polygon.max(axis=0)) / 2
        mask[min(int(y), H - 1), min(int(x), W - 1)] = True
    return mask


def corners(cells: NDArray[np.bool_], x_edges: NDArray[Any], y_edges: NDArray[Any]) -> list[Point]:
    """Corners of the first and the last cell of each row: the only ones that the convex hull depends on."""
    points: list[Point] = []
    for row in np.flatnonzero(cells.any(axis=1)):
        columns = np.flatnonzero(cells[row])
        for x in (x_edges[columns[0]].item(), x_edges[columns[-1] + 1].item()):
            points += [(x, y_edges[row].item()), (x, y_edges[row + 1].item())]
    return points
