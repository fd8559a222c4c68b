"""From one row of attention to maps of equal cells: a view by itself, or all of a picture's views in one.

A cell's attention is spread evenly over its pixels; the views' densities add up; the sum is gathered on a common
grid over the image. So no attention is lost or counted twice, but for what lies outside the image (padding).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.errors import UsageError
from localization_heads.lvlm.geometry import Edges, Size, View, whole_box

VIEWS = ("combined", "whole", "tiles")


def read_maps(
    row: NDArray[np.float32], views: Sequence[View], image_size: Size, choice: str = "combined"
) -> tuple[NDArray[np.float32], Box]:
    """Maps `[..., h, w]` of equal cells, and the region that they cover in pixels of the original image.

    A single view of equal cells is taken as it is, padding included; anything else is gathered on the image.

    Args:
        row: attention over the keys, `[..., key]`.
        choice: `combined`, or the name of one view.
    """
    views = choose(views, choice)
    if len(views) == 1 and views[0].is_uniform:
        return np.ascontiguousarray(row[..., views[0].index], np.float32), views[0].box
    box = whole_box(image_size)
    h, w = common_grid(views, image_size)
    x_edges, y_edges = np.linspace(box[0], box[2], w + 1), np.linspace(box[1], box[3], h + 1)
    maps = np.zeros((*row.shape[:-1], h, w))
    for view in views:
        maps += shares(view.y_edges, y_edges) @ row[..., view.index] @ shares(view.x_edges, x_edges).T
    return maps.astype(np.float32), box


def choose(views: Sequence[View], choice: str) -> Sequence[View]:
    """The views of that name. A picture too small for tiles has only the whole, which then stands for both.

    Raises:
        UsageError: no view has such a name.
    """
    if choice not in VIEWS:
        raise UsageError(f"view={choice}: choose one of {', '.join(VIEWS)}")
    named = [view for view in views if view.name == choice]
    return named if choice != "combined" and named else views


def common_grid(views: Sequence[View], image_size: Size) -> Size:
    """`(h, w)` of equal cells over the image that are about as fine as the finest view's."""
    cell_w = min(float(np.median(np.diff(view.x_edges))) for view in views)
    cell_h = min(float(np.median(np.diff(view.y_edges))) for view in views)
    return max(1, round(image_size[1] / cell_h)), max(1, round(image_size[0] / cell_w))


def shares(source: Edges, target: Edges) -> NDArray[np.float64]:
    """`[target cell, source cell]`: the share of each source interval that lies in each target interval.

    >>> shares(np.array([-1.0, 1.0, 2.0]), np.array([0.0, 1.5, 3.0])).tolist()
    [[0.5, 0.5], [0.0, 0.5]]
    """
    start = np.maximum(source[None, :-1], target[:-1, None])
    end = np.minimum(source[None, 1:], target[1:, None])
    return np.asarray(np.clip(end - start, 0, None) / np.diff(source))
