"""The mirrored image, which the third criterion asks of a model besides other expressions. Needs no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from localization_heads.attention import AttentionMaps
from localization_heads.errors import NotFiniteError, OutOfMemoryError
from localization_heads.heads.sensitivity import swapped

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM

log = logging.getLogger(__name__)


def ask_mirrored(
    lvlm: LVLM, image: Image.Image, expression: str, maps: AttentionMaps
) -> NDArray[np.float32] | None:
    """The maps of the mirrored image with left and right swapped in the expression, as the model gives them.

    Args:
        maps: those of the image itself.

    Returns:
        None where they cannot be compared with `maps`, or the model cannot take the image.
    """
    try:
        found = lvlm.attend(ImageOps.mirror(image), swapped(expression))
    except (NotFiniteError, OutOfMemoryError) as error:
        log.warning("%r: the mirrored image could not be asked: %s", expression, error)
        return None
    return found.attention if covers_mirrored(maps, found) else None


def covers_mirrored(maps: AttentionMaps, mirrored: AttentionMaps) -> bool:
    """Whether the grid of the mirrored image covers the mirrored region.

    Edges may lie half a cell apart: a padded or cropped image has an odd pixel on one side.
    """
    if maps.attention.shape != mirrored.attention.shape:
        return False
    width, (rows, columns) = maps.image_size[0], maps.grid
    (x0, y0, x1, y1), own = mirrored.image_box, np.array(maps.image_box)
    cell = np.array([(own[2] - own[0]) / columns, (own[3] - own[1]) / rows] * 2)
    return bool((np.abs(np.array([width - x1, y0, width - x0, y1]) - own) <= 0.5 * cell).all())
