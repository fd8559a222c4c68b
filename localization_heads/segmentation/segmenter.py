"""What a segmenter is, how its prompts are made from box and map, and how its mask refines a grounding."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.attention import Box, clip_box
from localization_heads.cells import box_iou, tight_box, upsample_to_image, visible_cells
from localization_heads.errors import ArgumentError
from localization_heads.grounding.ground import Grounding
from localization_heads.grounding.shapes import Point
from localization_heads.options.groups import BoxFrom, SegmenterOptions

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


GRABCUT = SegmenterOptions()
"""The default: offline, without weights."""


class Segmenter(Protocol):
    """Makes a mask for a grounding. `name` identifies it in outputs."""

    @property
    def name(self) -> str: ...

    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`, of the grounded object; empty if it finds none."""
        ...


@runtime_checkable
class Proposer(Segmenter, Protocol):
    """A segmenter that also proposes all objects of an image, without a prompt (`instances_by=segmenter`)."""

    def propose(self, image: Image.Image) -> NDArray[np.bool_]:
        """Masks of the objects in the image, bool `[n, h, w]`, of size `proposal_size`; n may be 0."""
        ...


LOGIT = 10.0
"""Range of mask prompts: SAM's own mask logits, which it was trained to take as prompts, are about -10 to 10."""


@dataclass(frozen=True)
class Frame:
    """How an image is fitted into the square input of a segmenter.

    Args:
        image_size: `(W, H)` of the original image.
        side: of the square, in its pixels.
        inner: `(width, height)` of the image in the square, from its top left corner; the rest is padding.
        squashes: whether the image fills the square, whatever its aspect ratio.
    """

    image_size: tuple[int, int]
    side: int
    inner: tuple[int, int]
    squashes: bool = False

    @classmethod
    def padded(cls, image_size: tuple[int, int], side: int) -> Frame:
        """The longer side fills the square, with padding at the right or the bottom (SAM)."""
        scale = side / max(image_size)
        width, height = (max(1, int(length * scale + 0.5)) for length in image_size)
        return cls(image_size, side, (width, height))

    @classmethod
    def squashed(cls, image_size: tuple[int, int], side: int) -> Frame:
        """The image fills the square, whatever its aspect ratio (SAM 2 and 3)."""
        return cls(image_size, side, (side, side), squashes=True)

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the square per pixel of the image, horizontally and vertically."""
        (width, height), (W, H) = self.inner, self.image_size
        return width / W, height / H


def interior_points(grounding: Grounding, count: int) -> list[Point]:
    """At most `count` points (x, y), in pixels, spread over the inside of the object's cells.

    The depth of a cell is its distance, in pixels, to the nearest cell outside the object or the grid. Only cells at
    least half as deep as the deepest are used. The deepest comes first, then repeatedly the one farthest from all
    chosen ones; ties go to the stronger cell, then in row-major order. A point is the centre of the visible part of
    its cell. Empty if there is no positive cell.
    """
    cells = grounding.cells
    if not cells.any():
        return []
    centres = np.stack(np.meshgrid(*map(_centres, grounding.edges)), axis=-1)  # (h, w, 2)
    depth = _depth(cells, grounding)
    core = np.argwhere(cells & (depth >= depth.max() / 2))
    points = centres[core[:, 0], core[:, 1]]
    strength = grounding.combined[core[:, 0], core[:, 1]]
    chosen = [_argmax(depth[core[:, 0], core[:, 1]], strength)]
    while len(chosen) < min(count, len(core)):
        distance = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1)
        chosen.append(_argmax(distance, strength))
    return [(float(x), float(y)) for x, y in points[chosen]]


def background_points(grounding: Grounding, count: int) -> list[Point]:
    """At most `count` points (x, y), in pixels, inside the box where the map is lowest: not on the object.

    These are centres of the visible parts of cells, by ascending value, ties in row-major order. The object's own cells
    are never used; empty if no other cell has its centre in the box, or there is no positive cell.
    """
    cells = grounding.cells
    if not cells.any():
        return []
    x, y = map(_centres, grounding.edges)
    x0, y0, x1, y1 = grounding.box
    inside = np.logical_and.outer((y0 <= y) & (y < y1), (x0 <= x) & (x < x1))
    rows, columns = np.nonzero(inside & visible_cells(*grounding.edges) & ~cells)
    lowest = np.argsort(grounding.combined[rows, columns], kind="stable")[:count]
    return [(float(x[columns[i]]), float(y[rows[i]])) for i in lowest]


def map_logits(grounding: Grounding, frame: Frame, side: int) -> NDArray[np.float32]:
    """The combined map as a mask prompt: logits `[side, side]` over the whole square of the frame.

    0 at the threshold, `LOGIT` at the map's maximum on the image, `-LOGIT` at its minimum and where the square shows no
    image or the grid does not cover it; bilinear between cell centres.
    """
    scale = side / frame.side
    (x_scale, y_scale), (x0, y0, x1, y1) = frame.scale, grounding.image_box
    x, y = x_scale * scale, y_scale * scale
    grid_box = (x0 * x, y0 * y, x1 * x, y1 * y)
    logits = upsample_to_image(_cell_logits(grounding), grid_box, (side, side), outside=-LOGIT)
    centres = np.arange(side) + 0.5
    logits[centres > frame.inner[1] * scale] = -LOGIT
    logits[:, centres > frame.inner[0] * scale] = -LOGIT
    return logits


def _cell_logits(grounding: Grounding) -> NDArray[np.float64]:
    """The combined map `[h, w]`, piecewise linearly scaled: minimum to -LOGIT, threshold to 0, maximum to LOGIT."""
    visible = grounding.combined[visible_cells(*grounding.edges)]
    level = min(grounding.threshold, float(visible.max()))
    above = (grounding.combined - level) / max(float(visible.max()) - level, np.finfo(float).tiny)
    below = (grounding.combined - level) / max(level - float(visible.min()), np.finfo(float).tiny)
    return np.asarray(LOGIT * np.clip(np.where(grounding.combined > level, above, below), -1, 1))


def _depth(cells: NDArray[np.bool_], grounding: Grounding) -> NDArray[np.float64]:
    """Distance, in pixels, of each cell to the nearest cell outside the object or the grid: `[h, w]`."""
    x0, y0, x1, y1 = grounding.image_box
    cell_size = (y1 - y0) / cells.shape[0], (x1 - x0) / cells.shape[1]
    return np.asarray(ndimage.distance_transform_edt(np.pad(cells, 1), sampling=cell_size))[1:-1, 1:-1]


def _argmax(values: NDArray[np.float64], strength: NDArray[np.float64]) -> int:
    """Index of the largest value; among those that differ by rounding only, of the strongest, then of the first."""
    ties = values >= values.max() * (1 - 1e-9)
    return int(np.argmax(np.where(ties, strength, -np.inf)))


def _centres(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return (edges[:-1] + edges[1:]) / 2


PROPOSAL_SIDE = 256  # pixels


def proposal_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """`(w, h)` of proposed masks for an image of `(W, H)`: small, so that hundreds of them take little memory.

    >>> proposal_size((4000, 10)), proposal_size((100, 50))
    ((256, 1), (100, 50))
    """
    scale = min(1.0, PROPOSAL_SIDE / max(image_size))
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def checked_proposals(segmenter: Proposer, image: Image.Image) -> NDArray[np.bool_]:
    """`Proposer.propose`, checked: ArgumentError, naming the segmenter, if a user's segmenter returns no masks."""
    masks = np.asarray(segmenter.propose(image))
    if masks.ndim != 3 or masks.dtype != bool:
        actual = f"{masks.dtype} {list(masks.shape)}"
        raise ArgumentError(f"segmenter={segmenter.name}: it must propose bool masks [n, h, w], not {actual}")
    return masks


REFINE_MARGIN = 2
"""Cells by which `box_from="refined"` widens the map's box on each side to prompt the segmenter."""
MIN_REFINED_IOU = 0.6
"""IoU with the map's box from which on `box_from="refined"` takes the box of the mask."""


def refine(
    grounding: Grounding,
    image: Image.Image | None,
    segmenter: Segmenter | None,
    *,
    box_from: BoxFrom = "map",
    name: str = "",
) -> Grounding:
    """The grounding with the segmenter's mask in place of the pseudo-mask.

    With `box_from="mask"` the box becomes the mask's tight box, and the score the map's mass in it. With `"refined"`
    the segmenter is prompted with a wider box (`REFINE_MARGIN`), so that a map's box that is too tight does not limit
    it; mask and box are taken if the box has an IoU of at least `MIN_REFINED_IOU` with the map's, else both stay the
    map's. The grounding is returned as it is without a segmenter, an image or a positive cell to prompt with, and with
    a warning if the image has another size or the segmenter finds nothing.

    Args:
        name: of the entry, for the warnings.
    """
    entry = f"{name}: " if name else ""
    if segmenter is None or image is None or not grounding.cells.any():
        return grounding
    if image.size != grounding.image_size:
        log.warning("%sthe image is no longer the one that the maps are of: the mask is that of the map", entry)
        return grounding
    prompt = replace(grounding, box=_widened_box(grounding)) if box_from == "refined" else grounding
    mask = segmenter.segment(image, prompt)
    box = tight_box(mask)
    if box is None:
        log.warning(
            "%ssegmenter=%s finds nothing in the box %s: the mask is that of the map",
            entry,
            segmenter.name,
            [round(x) for x in prompt.box],
        )
        return grounding if box_from == "map" else replace(grounding, mask_overlap=0.0)
    if box_from == "map":
        return replace(grounding, refined=mask, mask_from=segmenter.name)
    overlap = float(box_iou(box, grounding.box))
    if box_from == "refined" and overlap < MIN_REFINED_IOU:
        return replace(grounding, mask_overlap=overlap)
    return replace(grounding.with_box(box), refined=mask, mask_from=segmenter.name, mask_overlap=overlap)


def _widened_box(grounding: Grounding) -> Box:
    """The box with a margin of `REFINE_MARGIN` cells on each side, clipped to the image."""
    (left, top, right, bottom), (h, w) = grounding.image_box, grounding.cells.shape
    x_margin, y_margin = REFINE_MARGIN * (right - left) / w, REFINE_MARGIN * (bottom - top) / h
    x0, y0, x1, y1 = grounding.box
    return clip_box((x0 - x_margin, y0 - y_margin, x1 + x_margin, y1 + y_margin), grounding.image_size)
