"""Small maps by hand: masks drawn with `#`, maps of a few heads, and their groundings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions


def drawn(*rows: str) -> NDArray[np.bool_]:
    return np.array([[cell == "#" for cell in row] for row in rows])


def block(shape: tuple[int, int], rows: slice, columns: slice, value: float = 1.0) -> NDArray[np.float64]:
    """One value in these rows and columns, and zeros."""
    grid = np.zeros(shape)
    grid[rows, columns] = value
    return grid


def flood(mask: Any) -> list[list[tuple[int, int]]]:
    """The 8-connected components of a mask, each a list of cells, by flood fill."""
    unvisited = {(y, x) for y in range(len(mask)) for x in range(len(mask[0])) if mask[y][x]}
    components = []
    while unvisited:
        stack, component = [unvisited.pop()], []
        while stack:
            y, x = stack.pop()
            component.append((y, x))
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & unvisited
            unvisited -= around
            stack += around
        components.append(component)
    return components


def small_maps(*grids: ArrayLike, image_box: Any = None, image_size: Any = None, **more: Any) -> AttentionMaps:
    """The maps of one layer with a head per grid; cells are 10 pixels wide by default."""
    attention = np.array(grids, dtype=np.float32)[None]
    size = image_size or (attention.shape[3] * 10, attention.shape[2] * 10)
    return AttentionMaps(attention, image_box or (0, 0, *size), size, **more)


def heads_of(maps: AttentionMaps) -> list[Head]:
    return [Head(0, head) for head in range(maps.num_heads)]


def grounded(
    grid: ArrayLike, image_box: Any = None, image_size: Any = None, whole: Any = None, **options: Any
) -> Grounding:
    """The grounding of one head's map, without smoothing unless `whole` options are given."""
    maps = small_maps(grid, image_box=image_box, image_size=image_size)
    return ground_maps(maps, heads_of(maps), whole or GroundingOptions(**{"sigma": 0.0, **options}))
