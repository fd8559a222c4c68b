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


def grounded(
    grid: ArrayLike, image_box: Any = None, image_size: Any = None, whole: Any = None, **options: Any
) -> Grounding:
    """One head's map without smoothing, or under `whole` options; a cell is 10 pixels wide unless told otherwise."""
    grid = np.asarray(grid, dtype=np.float32)
    size = image_size or (grid.shape[1] * 10, grid.shape[0] * 10)
    maps = AttentionMaps(grid[None, None], image_box or (0, 0, *size), size)
    return ground_maps(maps, [Head(0, 0)], whole or GroundingOptions(**{"sigma": 0.0, **options}))
