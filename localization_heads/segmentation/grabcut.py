"""GrabCut (Rother, Kolmogorov, Blake 2004) from OpenCV, started from box and map: masks offline, without weights.

Outside the box is background for certain. Inside it the half of the map's range next to its peak is probably object,
the rest probably background; colours decide from there, and of several pieces the
one that holds most of the map is kept. Nothing is certainly object: a head may look beside it.
Only the box and its surroundings are looked at, and never more than `WORKING_SIDE` pixels a side, so a large image
costs no more time than a small one.
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
"""How far beyond the box the background is learned from, in sides of the box."""
WORKING_SIDE = 256  # pixels
LIKELY = 0.5
"""Share of the map's range in the box above which a pixel begins as object."""
RIM = 0.02
"""Of proposals: the rim of the image that is background for certain, in longer sides."""
OPENED = (0, 2, 4)
"""How often the foreground is opened, for proposals."""
SMALLEST = 0.0015
"""Share of the image that a proposal covers at least."""
MOST_PIECES = 200
"""Of one opening."""

Region = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels."""


@dataclass(frozen=True)
class GrabCut:
    """Segments with OpenCV's GrabCut; the same input gives the same mask.

    Args:
        iterations: of fitting colours and cutting.
    """

    iterations: int = 5
    name: str = "grabcut"

    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`; empty where colours tell nothing apart."""
        region = _around(grounding.box, SURROUNDINGS, grounding.image_size)
        sides = region[2] - region[0], region[3] - region[1]
        shrink = min(1.0, WORKING_SIDE / max(sides))
        size = max(1, round(sides[0] * shrink)), max(1, round(sides[1] * shrink))
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy a large image
        pixels = np.asarray(image.resize(size, box=region, reducing_gap=2.0))
        heat = upsample_to_image(grounding.pointing_map, _seen_from(grounding.image_box, region, size), size)
        found = cut(pixels, heat, _seen_from(grounding.box, region, size), self.iterations)
        return _placed(found, region, grounding.image_size)

    def propose(self, image: Image.Image) -> NDArray[np.bool_]:
        """Masks of what the image shows, bool `[n, h, w]`: connected pieces of other colours than its rim has."""
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return pieces(np.asarray(rgb.resize(proposal_size(image.size), reducing_gap=2.0)), self.iterations)


def cut(
    pixels: NDArray[np.uint8], heat: NDArray[np.floating], box: Box, iterations: int = 5
) -> NDArray[np.bool_]:
    """GrabCut on a small image.

    Args:
        pixels: RGB `[h, w, 3]`.
        heat: the map on these pixels, `[h, w]`.
        box: xyxy in these pixels.

    Returns:
        bool `[h, w]`; empty if there is no object or no background to begin with, or OpenCV finds none.
    """
    labels = first_guess(heat, box)
    return _hottest(_cut(pixels, labels, iterations), heat)


def _cut(pixels: NDArray[np.uint8], labels: NDArray[np.uint8], iterations: int) -> NDArray[np.bool_]:
    """What OpenCV makes of the labels of a first guess `[h, w]`; empty if it cannot make anything of them."""
    nothing = np.zeros(labels.shape, dtype=bool)
    is_object = labels == cv2.GC_PR_FGD
    if not is_object.any() or is_object.all():
        return nothing
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its first clusters are drawn
    try:
        bgr = np.ascontiguousarray(pixels[:, :, ::-1])
        cv2.grabCut(bgr, labels, (0, 0, 0, 0), *models, iterations, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # fewer pixels than colour clusters
        return nothing
    return np.asarray((labels == cv2.GC_PR_FGD) | (labels == cv2.GC_FGD))


def pieces(pixels: NDArray[np.uint8], iterations: int = 5) -> NDArray[np.bool_]:
    """What stands out from the rim of a small image, in 8-connected pieces, bool `[n, h, w]`.

    The foreground is opened more and more, so that things that touch come apart; a piece may come several times.

    Args:
        pixels: RGB `[h, w, 3]`.
    """
    h, w = pixels.shape[:2]
    rim = max(1, round(RIM * max(h, w)))
    heat = np.zeros((h, w))
    heat[rim:-rim, rim:-rim] = 1.0
    foreground = _cut(pixels, np.where(heat > 0, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8), iterations)
    found = []
    for times in OPENED:
        opened = ndimage.binary_opening(foreground, iterations=times) if times else foreground
        labels, count = ndimage.label(opened, np.ones((3, 3)))
        found += [labels == label for label in range(1, min(count, MOST_PIECES) + 1)]
    smallest = SMALLEST * h * w
    return np.array([mask for mask in found if mask.sum() >= smallest], dtype=bool).reshape(-1, h, w)


def _hottest(mask: NDArray[np.bool_], heat: NDArray[np.floating]) -> NDArray[np.bool_]:
    """The one 8-connected piece of a mask that holds most of the map: the others are of the same colours."""
    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    held = ndimage.sum_labels(heat, pieces, range(1, count + 1))
    return np.asarray(pieces == 1 + np.argmax(held)) if count else mask


def first_guess(heat: NDArray[np.floating], box: Box) -> NDArray[np.uint8]:
    """OpenCV's labels, uint8 `[h, w]`: 0 background; 2 and 3 probably background, probably object."""
    h, w = heat.shape
    x0, y0, x1, y1 = _around(box, 0, (w, h))
    labels = np.zeros((h, w), dtype=np.uint8)
    inside = heat[y0:y1, x0:x1]
    middle = inside.min() + LIKELY * (inside.max() - inside.min())
    labels[y0:y1, x0:x1] = np.where(inside > middle, 3, 2)
    return labels


def _around(box: Box, margin: float, size: tuple[int, int]) -> Region:
    """The whole pixels that a box touches, with `margin` sides more on each side, inside an image; never none."""
    x0, y0, x1, y1 = box
    across, down = margin * (x1 - x0), margin * (y1 - y0)
    left, top = min(max(0, int(x0 - across)), size[0] - 1), min(max(0, int(y0 - down)), size[1] - 1)
    right, bottom = min(size[0], int(np.ceil(x1 + across))), min(size[1], int(np.ceil(y1 + down)))
    return left, top, max(left + 1, right), max(top + 1, bottom)


def _seen_from(box: Box, region: Region, size: tuple[int, int]) -> Box:
    """A box of the image in pixels of the region drawn at `size`."""
    across, down = size[0] / (region[2] - region[0]), size[1] / (region[3] - region[1])
    (x0, y0, x1, y1), (left, top, _, _) = box, region
    return (x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down


def _placed(found: NDArray[np.bool_], region: Region, image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The region's mask, of any size, in a mask of the whole image `[H, W]`."""
    mask = np.zeros(image_size[::-1], dtype=bool)
    x0, y0, x1, y1 = region
    fine = cv2.resize(found.astype(np.uint8) * 255, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
    mask[y0:y1, x0:x1] = fine > 127
    return mask
