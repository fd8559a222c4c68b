"""Shapes of cells: which component makes the box, its convex hull (App. B.2), its edges between the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.cells import label_components

Point = tuple[float, float]


def largest_hull(
    cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]] | None = None
) -> NDArray[np.bool_]:
    """The 8-connected component whose convex hull has the largest area (App. B.2).

    The hull is that of the cells' corners, so a single cell has area 1. Of equal hulls the one with more
    `mass` wins, then the one whose first cell comes first, row by row.

    Args:
        cells, mass: `[h, w]`.

    Returns:
        bool `[h, w]`; no cell if `cells` has none.
    """
    labels = label_components(cells)
    best, best_area, best_mass = 0, 0.0, 0.0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        member = labels[rows, columns] == label
        if member.size < best_area:  # the hull lies within the bounding box
            continue
        area = hull_area(member)
        weight = 0.0 if mass is None else float(mass[rows, columns][member].sum())
        # Masses of mirrored components differ by rounding, which must not overrule the order of the cells.
        heavier = weight > best_mass * (1 + 1e-9)
        if area > best_area or (area == best_area and heavier):
            best, best_area, best_mass = label, area, weight
    return np.asarray((labels == best) & cells)


def largest_mass(cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The 8-connected component that holds the most `mass`; of equal ones that whose first cell comes first.

    Args:
        cells, mass: `[h, w]`; no mass is below 0.

    >>> largest_mass(np.array([[True, False, True]]), np.array([[2.0, 9.0, 3.0]])).tolist()
    [[False, False, True]]
    """
    labels = label_components(cells)
    held = np.bincount(labels.ravel(), weights=np.where(cells, mass, 0.0).ravel())
    held[0] = 0.0
    # As in `largest_hull`, rounding must not overrule the order of the cells.
    return np.asarray((labels == np.argmax(held >= held.max() * (1 - 1e-9))) & cells)


def containing_peak(cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The 8-connected component of `cells` `[h, w]` that its cell of most `mass` lies in; of equal cells the first."""
    if not cells.any():
        return cells
    labels = label_components(cells)
    return np.asarray(labels == labels.flat[np.argmax(np.where(cells, mass, -np.inf))])


def level_crossings(
    values: NDArray[np.floating[Any]], level: float, cells: NDArray[np.bool_], visible: NDArray[np.bool_]
) -> tuple[float, float, float, float]:
    """Where a map, linear between the centres of its cells, falls to `level` around some of them: x0, y0, x1, y1.

    Each row has a left and a right crossing, each column an upper and a lower one, next to its outermost cells; the
    outermost of them all are taken. A side stays on the border of its cell where the next one is outside the grid or
    the image, or above the level itself.

    Args:
        values: `[h, w]`, above `level` in `cells`.
        cells: bool `[h, w]`, not empty.
        visible: the cells that show some of the image, bool `[h, w]`.

    Returns:
        In cells from the top left corner of the grid.

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
    rows = np.flatnonzero(cells.any(axis=1))
    first = cells[rows].argmax(axis=1)
    inside, outside = values[rows, first], values[rows, np.maximum(first - 1, 0)]
    falls = (first > 0) & (outside <= level)
    drop = np.where(falls, inside - outside, 1.0)
    return float(np.where(falls, first + 0.5 - (inside - level) / drop, first).min())


def hull_area(cells: NDArray[np.bool_]) -> float:
    """Area, in cells, of the convex hull of the corners of the active cells `[h, w]`; exact."""
    points = corners(cells, np.arange(cells.shape[1] + 1), np.arange(cells.shape[0] + 1))
    return cv2.contourArea(cv2.convexHull(np.array(points, dtype=np.int32))) if points else 0.0


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Vertices of the convex hull, in order around it (Andrew's monotone chain); none on a straight side.

    In float64, for points in pixels: OpenCV's hull rounds them to float32, and pixels at the outline change sides.

    >>> convex_hull([(0, 0), (2, 0), (1, 0), (2, 2), (1, 1), (0, 2)])
    [(0, 0), (2, 0), (2, 2), (0, 2)]
    """
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    return _chain(ordered)[:-1] + _chain(ordered[::-1])[:-1]


def fill_polygon(polygon: NDArray[np.float64], image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in a convex polygon: bool `[H, W]`.

    Not OpenCV's `fillPoly`, which rounds vertices to whole pixels and paints the outline, too.

    A polygon too small to hold any pixel's centre gets the pixel under the middle of its box, so that a
    mask is never empty.

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
    """Corners of the outermost active cells of each row: all that the convex hull depends on."""
    corners: list[Point] = []
    for row in np.flatnonzero(cells.any(axis=1)):
        active = np.flatnonzero(cells[row])
        for x in (x_edges[active[0]].item(), x_edges[active[-1] + 1].item()):
            corners += [(x, y_edges[row].item()), (x, y_edges[row + 1].item())]
    return corners


def _chain(ordered: list[Point]) -> list[Point]:
    """The half of the hull that turns left all the way from the first point to the last."""
    chain: list[Point] = []
    for x, y in ordered:
        while len(chain) > 1:
            (ax, ay), (bx, by) = chain[-2:]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            chain.pop()
        chain.append((x, y))
    return chain
