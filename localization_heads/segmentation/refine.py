"""The segmenter's place in the flow: a grounding goes in, and comes out with a mask, and a box of it if asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.masks import tight_box
from localization_heads.grounding.maps import BoxFrom, Grounding
from localization_heads.grounding.raster import mass_inside

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


class Segmenter(Protocol):
    """Makes masks of groundings. `name` is what outputs call it."""

    @property
    def name(self) -> str: ...

    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`, of what the grounding points at; empty if it finds nothing."""
        ...


def refine(
    grounding: Grounding,
    image: Image.Image | None,
    segmenter: Segmenter | None,
    *,
    box_from: BoxFrom = "map",
) -> Grounding:
    """The grounding with the segmenter's mask in place of the pseudo-mask.

    With `box_from="mask"` the box becomes the mask's tight box, and the score the map's mass inside that. Nothing
    changes without a segmenter or a picture, where no cell stands out (there is nothing to prompt with), or where
    the segmenter finds nothing; the last is said in the log.
    """
    if segmenter is None or image is None or not grounding.cells.any():
        return grounding
    if image.size != grounding.image_size:
        log.warning("the picture is no longer the one that the maps are of: the mask is that of the map")
        return grounding
    mask = segmenter.segment(image, grounding)
    box = tight_box(mask)
    if box is None:
        log.warning(
            "segmenter=%s finds nothing in the box %s: the mask is that of the map",
            segmenter.name,
            [round(x) for x in grounding.box],
        )
        return grounding
    refined = replace(grounding, refined=mask, mask_from=segmenter.name)
    if box_from == "map":
        return refined
    score = mass_inside(grounding.combined, grounding.image_box, grounding.image_size, box)
    return replace(refined, box=box, score=score)
