"""Masks offline, without weights: OpenCV's GrabCut (Rother, Kolmogorov, Blake 2004), started from box and map.

Everything outside the box is definite background. Inside the box, pixels in the upper half of the map's range start as
probable foreground and the others as probable background; colours decide from there. No pixel is definite foreground,
as a head may attend beside the object. Of several connected components, the one with the most of the map is kept.

Only the box and its surroundings are segmented, at no more than `WORKING_SIDE` pixels a side, so the time does not
depend on the size of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.attention import Box
from localization_heads.cells import upsample_to_image
from localization_heads.grounding.ground import Grounding
from localization_heads.segmentation.segmenter import proposal_size

if TYPE_CHECKING:
    from PIL import Image


SURROUNDINGS = 0.5
"""Margin around the box that the background's colours are learned from, in sides of the box."""
WORKING_SIDE = 256
"""Longest side of the segmented region, in pixels."""
FOREGROUND_LEVEL = 0.5
"""Share of the map's range in the box above which a pixel starts as foreground."""
RIM = 0.02
"""Proposals: width of the rim of the image that is definite background, in longer sides of the image."""
OPENINGS = (0, 2, 4)
"""Proposals: iterations of the morphological openings of the foreground."""
MIN_PROPOSAL_AREA = 0.0015
"""Smallest proposal, as a share of the image."""
MAX_COMPONENTS = 200
"""Proposals from one opening, at most."""

Region = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels."""


@dataclass(frozen=True)
class GrabCut:
    """Segments with OpenCV's GrabCut; deterministic.

    Args:
        iterations: of fitting the colour models and cutting the graph.
    """

    iterations: int = 5
    name: str = "grabcut"

    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`; empty if colours do not separate an object."""
        region = _region_around(grounding.box, SURROUNDINGS, grounding.image_size)
        sides = region[2] - region[0], region[3] - region[1]
        scale = min(1.0, WORKING_SIDE / max(sides))
        size = max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))
        image = image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies
        pixels = np.asarray(image.resize(size, box=region, reducing_gap=2.0))
        heat = upsample_to_image(grounding.pointing_map, _to_region(grounding.image_box, region, size), size)
        mask = cut(pixels, heat, _to_region(grounding.box, region, size), self.iterations)
        return _paste(mask, region, grounding.image_size)

    def propose(self, image: Image.Image) -> NDArray[np.bool_]:
        """Masks of the objects in the image, bool `[n, h, w]`: components whose colours differ from the image's rim."""
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return foreground_components(
            np.asarray(rgb.resize(proposal_size(image.size), reducing_gap=2.0)), self.iterations
        )


def cut(pixels: NDArray[np.uint8], heat: NDArray[np.floating], box: Box, iterations: int = 5) -> NDArray[np.bool_]:
    """GrabCut on a small image.

    Args:
        pixels: RGB `[h, w, 3]`.
        heat: the map on these pixels, `[h, w]`.
        box: xyxy in these pixels.

    Returns:
        bool `[h, w]`; empty if there is no foreground or no background to start from, or OpenCV finds no foreground.
    """
    labels = initial_labels(heat, box)
    return _strongest_component(_grabcut(pixels, labels, iterations), heat)


def _grabcut(pixels: NDArray[np.uint8], labels: NDArray[np.uint8], iterations: int) -> NDArray[np.bool_]:
    """The foreground that OpenCV finds from initial labels `[h, w]`; empty if it cannot start from them."""
    nothing = np.zeros(labels.shape, dtype=bool)
    foreground = labels == cv2.GC_PR_FGD
    if not foreground.any() or foreground.all():
        return nothing
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # the colour clusters are initialised at random
    try:
        bgr = np.ascontiguousarray(pixels[:, :, ::-1])
        cv2.grabCut(bgr, labels, (0, 0, 0, 0), *models, iterations, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # fewer pixels than colour clusters
        return nothing
    return np.asarray((labels == cv2.GC_PR_FGD) | (labels == cv2.GC_FGD))


def foreground_components(pixels: NDArray[np.uint8], iterations: int = 5) -> NDArray[np.bool_]:
    """The 8-connected components of a small image's foreground, bool `[n, h, w]`; the rim starts as background.

    Stronger and stronger openings separate objects that touch; a component may appear several times.

    Args:
        pixels: RGB `[h, w, 3]`.
    """
    h, w = pixels.shape[:2]
    rim = max(1, round(RIM * max(h, w)))
    initial = np.full((h, w), cv2.GC_BGD, dtype=np.uint8)
    initial[rim:-rim, rim:-rim] = cv2.GC_PR_FGD
    foreground = _grabcut(pixels, initial, iterations)
    masks = []
    for times in OPENINGS:
        opened = ndimage.binary_opening(foreground, iterations=times) if times else foreground
        labels, count = ndimage.label(opened, np.ones((3, 3)))
        masks += [labels == label for label in range(1, min(count, MAX_COMPONENTS) + 1)]
    min_area = MIN_PROPOSAL_AREA * h * w
    return np.array([mask for mask in masks if mask.sum() >= min_area], dtype=bool).reshape(-1, h, w)


def _strongest_component(mask: NDArray[np.bool_], heat: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The 8-connected component of a mask with the most of the map; the others merely have the same colours."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    masses = ndimage.sum_labels(heat, labels, range(1, count + 1))
    return np.asarray(labels == 1 + np.argmax(masses)) if count else mask


def initial_labels(heat: NDArray[np.floating], box: Box) -> NDArray[np.uint8]:
    """OpenCV's labels, uint8 `[h, w]`: background outside the box, probable background or foreground inside."""
    h, w = heat.shape
    x0, y0, x1, y1 = _region_around(box, 0, (w, h))
    labels = np.full((h, w), cv2.GC_BGD, dtype=np.uint8)
    inside = heat[y0:y1, x0:x1]
    level = inside.min() + FOREGROUND_LEVEL * (inside.max() - inside.min())
    labels[y0:y1, x0:x1] = np.where(inside > level, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    return labels


def _region_around(box: Box, margin: float, size: tuple[int, int]) -> Region:
    """The pixels that a box touches, with a margin in sides of the box, clipped to the image; at least one pixel."""
    x0, y0, x1, y1 = box
    across, down = margin * (x1 - x0), margin * (y1 - y0)
    left, top = min(max(0, int(x0 - across)), size[0] - 1), min(max(0, int(y0 - down)), size[1] - 1)
    right, bottom = min(size[0], int(np.ceil(x1 + across))), min(size[1], int(np.ceil(y1 + down)))
    return left, top, max(left + 1, right), max(top + 1, bottom)


def _to_region(box: Box, region: Region, size: tuple[int, int]) -> Box:
    """A box of the image, in pixels of the region resized to `size`."""
    across, down = size[0] / (region[2] - region[0]), size[1] / (region[3] - region[1])
    (x0, y0, x1, y1), (left, top, _, _) = box, region
    return (x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down


def _paste(mask: NDArray[np.bool_], region: Region, image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of a region, at any resolution, in a mask of the whole image `[H, W]`."""
    whole = np.zeros(image_size[::-1], dtype=bool)
    x0, y0, x1, y1 = region
    resized = cv2.resize(mask.astype(np.uint8) * 255, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
    whole[y0:y1, x0:x1] = resized > 127
    return whole
