"""Small maps by hand: a mask drawn with `#`, and the grounding of one head's grid."""

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
    """Nothing but one value in these rows and columns."""
    grid = np.zeros(shape)
    grid[rows, columns] = value
    return grid


def flood(mask: Any) -> list[list[tuple[int, int]]]:
    """The components of a mask, each a list of cells, by flood fill over eight neighbours: the obvious way."""
    left = {(y, x) for y in range(len(mask)) for x in range(len(mask[0])) if mask[y][x]}
    components = []
    while left:
        stack, component = [left.pop()], []
        while stack:
            y, x = stack.pop()
            component.append((y, x))
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            stack += around
        components.append(component)
    return components


def grounded(
    grid: ArrayLike, image_box: Any = None, image_size: Any = None, whole: Any = None, **options: Any
) -> Grounding:
    """One head's map without smoothing, or under `whole` options; a cell is 10 pixels wide unless told otherwise."""
    grid = np.asarray(grid, dtype=np.float32)
    size = image_size or (grid.shape[1] * 10, grid.shape[0] * 10)
    maps = AttentionMaps(grid[None, None], image_box or (0, 0, *size), size)
    return ground_maps(maps, [Head(0, 0)], whole or GroundingOptions(**{"sigma": 0.0, **options}))
