"""Which segmenter, and what it is told: the options of `segmenter=`, and the object they stand for."""

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


LOGIT = 10.0
"""Mask prompts reach from minus to plus this: SAM's own masks, which it learned to take back, have about that range."""


@dataclass(frozen=True)
class Frame:
    """Where the image lies in the square that a segmenter sees.

    Args:
        image_size: `(W, H)` of the original image.
        side: of the square, in its pixels.
        inner: `(width, height)` of the image in the square, from its top left corner; the rest is padding.
        squashes: whether the image fills the square whatever its shape.
    """

    image_size: tuple[int, int]
    side: int
    inner: tuple[int, int]
    squashes: bool = False

    @classmethod
    def padded(cls, image_size: tuple[int, int], side: int) -> Frame:
        """The long side fills the square, right or below is padding (SAM)."""
        scale = side / max(image_size)
        width, height = (max(1, int(length * scale + 0.5)) for length in image_size)
        return cls(image_size, side, (width, height))

    @classmethod
    def squashed(cls, image_size: tuple[int, int], side: int) -> Frame:
        """The image fills the square, whatever its shape (SAM 2 and 3)."""
        return cls(image_size, side, (side, side), squashes=True)

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the square for a pixel of the image, across and down."""
        (width, height), (W, H) = self.inner, self.image_size
        return width / W, height / H


def interior_points(grounding: Grounding, count: int) -> list[Point]:
    """At most `count` points (x, y), in pixels, inside what the map points at: compact, spread, away from its border.

    Only cells at least half as deep inside the region as its deepest one are taken. The deepest comes first, then
    always the cell farthest from all before; ties go to the stronger cell, then row by row. Depth is the distance,
    in pixels, to the nearest cell that does not belong (the image's border counts as one). A point is the centre
    of what its cell shows of the image; none where no cell stands out.
    """
    cells = grounding.cells
    if not cells.any():
        return []
    centres = np.stack(np.meshgrid(*map(_middles, grounding.edges)), axis=-1)  # (h, w, 2)
    depth = _depth(cells, grounding)
    core = np.argwhere(cells & (depth >= depth.max() / 2))
    places = centres[core[:, 0], core[:, 1]]
    strength = grounding.combined[core[:, 0], core[:, 1]]
    chosen = [_best(depth[core[:, 0], core[:, 1]], strength)]
    while len(chosen) < min(count, len(core)):
        gaps = np.linalg.norm(places[:, None] - places[chosen], axis=-1).min(axis=1)
        chosen.append(_best(gaps, strength))
    return [(float(x), float(y)) for x, y in places[chosen]]


def background_points(grounding: Grounding, count: int) -> list[Point]:
    """At most `count` points (x, y), in pixels, inside the box but where the map is lowest: not on the object.

    Centres of what the cells show of the image, the lowest first, of equal ones row by row. Cells that the box encloses
    as the object's are never taken; none where no other cell has its centre in the box, or no cell stands out.
    """
    cells = grounding.cells
    if not cells.any():
        return []
    x, y = map(_middles, grounding.edges)
    x0, y0, x1, y1 = grounding.box
    inside = np.logical_and.outer((y0 <= y) & (y < y1), (x0 <= x) & (x < x1))
    rows, columns = np.nonzero(inside & visible_cells(*grounding.edges) & ~cells)
    lowest = np.argsort(grounding.combined[rows, columns], kind="stable")[:count]
    return [(float(x[columns[i]]), float(y[rows[i]])) for i in lowest]


def map_logits(grounding: Grounding, frame: Frame, side: int) -> NDArray[np.float32]:
    """The combined map as a mask prompt: logits `[side, side]` over the whole square of the frame.

    0 at the value above which a cell is active, `LOGIT` at the map's maximum on the image, `-LOGIT` at its minimum
    and wherever the square or the grid shows no image; bilinear between the cells' centres.
    """
    shrink = side / frame.side
    (across, down), (x0, y0, x1, y1) = frame.scale, grounding.image_box
    x, y = across * shrink, down * shrink
    values = _logits(grounding)
    logits = upsample_to_image(values, (x0 * x, y0 * y, x1 * x, y1 * y), (side, side), outside=-LOGIT)
    middles = np.arange(side) + 0.5
    logits[middles > frame.inner[1] * shrink] = -LOGIT
    logits[:, middles > frame.inner[0] * shrink] = -LOGIT
    return logits


def _logits(grounding: Grounding) -> NDArray[np.float64]:
    """The combined map `[h, w]` in two straight pieces: minimum, threshold and maximum on the image to -, 0 and +."""
    shown = grounding.combined[visible_cells(*grounding.edges)]
    level = min(grounding.threshold, float(shown.max()))
    above = (grounding.combined - level) / max(float(shown.max()) - level, np.finfo(float).tiny)
    below = (grounding.combined - level) / max(level - float(shown.min()), np.finfo(float).tiny)
    return np.asarray(LOGIT * np.clip(np.where(grounding.combined > level, above, below), -1, 1))


def _depth(cells: NDArray[np.bool_], grounding: Grounding) -> NDArray[np.float64]:
    """Pixels from each cell's centre to the centre of the nearest one outside the region, `[h, w]`."""
    x0, y0, x1, y1 = grounding.image_box
    cell = (y1 - y0) / cells.shape[0], (x1 - x0) / cells.shape[1]
    return np.asarray(ndimage.distance_transform_edt(np.pad(cells, 1), sampling=cell))[1:-1, 1:-1]


def _best(values: NDArray[np.float64], strength: NDArray[np.float64]) -> int:
    """Index of the largest value; of those that differ by rounding only, the strongest, then the first."""
    ties = values >= values.max() * (1 - 1e-9)
    return int(np.argmax(np.where(ties, strength, -np.inf)))


def _middles(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return (edges[:-1] + edges[1:]) / 2


class Segmenter(Protocol):
    """Makes masks of groundings. `name` is what outputs call it."""

    @property
    def name(self) -> str: ...

    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`, of what the grounding points at; empty if it finds nothing."""
        ...


@runtime_checkable
class Proposer(Segmenter, Protocol):
    """A segmenter that also says what there may be, whatever is asked for (`instances_by=segmenter`)."""

    def propose(self, image: Image.Image) -> NDArray[np.bool_]:
        """Masks of what the image shows, bool `[n, h, w]`, at the size that `proposal_size` says; n may be 0."""
        ...


PROPOSED_SIDE = 256  # pixels


def proposal_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """`(w, h)` of the masks that are proposed for an image of `(W, H)`, so that hundreds of them take little memory.

    >>> proposal_size((4000, 10)), proposal_size((100, 50))
    ((256, 1), (100, 50))
    """
    shrink = min(1.0, PROPOSED_SIDE / max(image_size))
    return max(1, round(image_size[0] * shrink)), max(1, round(image_size[1] * shrink))


def checked_proposals(segmenter: Proposer, image: Image.Image) -> NDArray[np.bool_]:
    """`Proposer.propose`. ArgumentError, which names the segmenter, where it gives no masks: it may be anybody's."""
    masks = np.asarray(segmenter.propose(image))
    if masks.ndim != 3 or masks.dtype != bool:
        found = f"{masks.dtype} {list(masks.shape)}"
        raise ArgumentError(f"segmenter={segmenter.name}: it must propose bool masks [n, h, w], not {found}")
    return masks


WIDER = 2
"""Cells by which `box_from="refined"` widens the map's box on each side before the segmenter starts."""
AGREE = 0.6
"""IoU with the map's box from which on `box_from="refined"` keeps the box of the mask."""


def refine(
    grounding: Grounding,
    image: Image.Image | None,
    segmenter: Segmenter | None,
    *,
    box_from: BoxFrom = "map",
    name: str = "",
) -> Grounding:
    """The grounding with the segmenter's mask in place of the pseudo-mask.

    With `box_from="mask"` the box becomes the mask's tight box, and the score the map's mass inside that. With
    `"refined"` the segmenter starts from a box `WIDER` cells wider, so that a map's box that is too tight does not
    bound it; mask and box are kept where the box overlaps the map's by `AGREE` or more, and are the map's otherwise.
    Nothing changes without a segmenter or an image, where no cell stands out (there is nothing to prompt with), or
    where the segmenter finds nothing; the last is said in the log, with the `name` of the entry.
    """
    entry = f"{name}: " if name else ""
    if segmenter is None or image is None or not grounding.cells.any():
        return grounding
    if image.size != grounding.image_size:
        log.warning(
            "%sthe image is no longer the one that the maps are of: the mask is that of the map", entry
        )
        return grounding
    start = replace(grounding, box=_wider(grounding)) if box_from == "refined" else grounding
    mask = segmenter.segment(image, start)
    box = tight_box(mask)
    if box is None:
        log.warning(
            "%ssegmenter=%s finds nothing in the box %s: the mask is that of the map",
            entry,
            segmenter.name,
            [round(x) for x in start.box],
        )
        return grounding if box_from == "map" else replace(grounding, mask_overlap=0.0)
    if box_from == "map":
        return replace(grounding, refined=mask, mask_from=segmenter.name)
    overlap = float(box_iou(box, grounding.box))
    if box_from == "refined" and overlap < AGREE:
        return replace(grounding, mask_overlap=overlap)
    return replace(grounding.with_box(box), refined=mask, mask_from=segmenter.name, mask_overlap=overlap)


def _wider(grounding: Grounding) -> Box:
    """The box with `WIDER` cells more on each side, cut at the image's edge."""
    (left, top, right, bottom), (h, w) = grounding.image_box, grounding.cells.shape
    across, down = WIDER * (right - left) / w, WIDER * (bottom - top) / h
    x0, y0, x1, y1 = grounding.box
    return clip_box((x0 - across, y0 - down, x1 + across, y1 + down), grounding.image_size)
