"""From the maps of a few heads to one box and one pseudo-mask (Sec. 5, App. B.2 of the paper).

`maps` smooths and sums the heads' maps; the sum is binarised at its mean (`binarise`); of the 8-connected components
of positive cells, the one with the largest convex hull is kept (`shapes`). Its tight box is the answer and its filled
hull the pseudo-mask, which a segmenter may replace (`segmentation.refine`).

Components are chosen on the grid, where areas are integers and ties are exact. Boxes and masks are in pixels of the
original image: `AttentionMaps.image_box` accounts for the processor's padding and cropping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box, clip_box
from localization_heads.cells import (
    label_components,
    mass_inside,
    mean_box_iou,
    normalised_heatmap,
    tight_box,
    visible_cells,
    visible_edges,
)
from localization_heads.grounding.binarise import threshold
from localization_heads.grounding.maps import combine, maps_to_smooth
from localization_heads.grounding.shapes import (
    Point,
    containing_peak,
    convex_hull,
    corners,
    fill_polygon,
    largest_hull,
    largest_mass,
    level_crossings,
)
from localization_heads.heads.head import Head
from localization_heads.options.groups import Component, GroundingOptions

MIN_INSTANCE_MASS = 0.15
"""A component is an instance from this share of the strongest component's attention on (docs/readouts.md)."""
MIN_INSTANCE_MASS_OF_PLACES = 0.3
"""The same for the mean map of prompts that name several places (docs/readouts.md): it attends to all objects."""


def ground_maps(attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions | None = None) -> Grounding:
    """The box of an expression from the maps of the given heads (Sec. 5).

    Raises:
        ValueError: for no head, a head that the model does not have, or maps with NaN or infinite values.

    >>> maps = np.zeros((4, 2, 4, 4), np.float32)
    >>> maps[3, 1, 1:3, 2:] = 0.25
    >>> attention = AttentionMaps(maps, image_box=(0, 0, 64, 64), image_size=(64, 64))
    >>> ground_maps(attention, [Head(3, 1)], GroundingOptions(sigma=0)).box
    (32.0, 16.0, 64.0, 48.0)
    """
    options = options or GroundingOptions()
    binarised = _combine_and_binarise(attention, heads, options)
    cells = _choose_component(binarised.positive, binarised.combined, options.component)
    return binarised.grounding(cells)


def ground_instances(
    attention: AttentionMaps,
    heads: Sequence[Head],
    options: GroundingOptions | None = None,
    least: float = MIN_INSTANCE_MASS,
) -> list[Grounding]:
    """One grounding for each 8-connected component of positive cells, by descending attention.

    Args:
        least: components with less than this share of the strongest component's attention are left out.

    Returns:
        At least one: if there is no positive cell, what `ground_maps` returns.
    """
    binarised = _combine_and_binarise(attention, heads, options or GroundingOptions())
    positive, combined = binarised.positive, binarised.combined
    labels = label_components(positive)
    masses = np.bincount(labels.ravel(), weights=(combined * positive).ravel())[1:]
    if not masses.size:
        return [binarised.grounding(positive)]
    order = np.argsort(-masses, kind="stable")
    return [binarised.grounding(labels == 1 + i) for i in order if masses[i] >= least * masses.max()]


def _combine_and_binarise(attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions) -> _BinarisedMap:
    if options.ignore_padding:
        whole_image = (0.0, 0.0, float(attention.image_size[0]), float(attention.image_size[1]))
        attention = replace(attention, image_box=whole_image)
    maps = maps_to_smooth(attention, heads, options)  # (k, h, w)
    combined = combine(maps, options.kernel_size, options.sigma, options.border)  # (h, w)
    visible = visible_cells(*visible_edges(attention.image_box, attention.image_size, combined.shape))
    level = threshold(combined, options, visible)
    positive = (combined > level) & visible
    return _BinarisedMap(attention, tuple(Head(*head) for head in heads), options, maps, combined, positive, level)


def _choose_component(
    positive: NDArray[np.bool_], combined: NDArray[np.float64], choice: Component
) -> NDArray[np.bool_]:
    """The positive cells `[h, w]` that make up the box: one component of them, or all."""
    if choice == "all":
        return positive
    choose = {"largest_hull": largest_hull, "largest_mass": largest_mass, "containing_peak": containing_peak}
    return choose[choice](positive, combined)


@dataclass(frozen=True, eq=False)
class _BinarisedMap:
    """The combined map of an expression and its positive cells, from which groundings are made.

    Args:
        attention: the maps that it was made from, with the `image_box` that boxes are computed with.
        maps: `[k, h, w]`, before smoothing.
        combined, positive: `[h, w]`.
        level: the threshold.
    """

    attention: AttentionMaps
    heads: tuple[Head, ...]
    options: GroundingOptions
    maps: NDArray[np.floating[Any]]
    combined: NDArray[np.float64]
    positive: NDArray[np.bool_]
    level: float

    def grounding(self, cells: NDArray[np.bool_]) -> Grounding:
        """The grounding whose box encloses these positive cells; the whole image if there are none."""
        image_box, (W, H) = self.attention.image_box, self.attention.image_size
        edges = visible_edges(image_box, (W, H), self.combined.shape)
        values = self.combined
        if self.options.trim:  # only the cells that are above the threshold before smoothing, too
            values = self.maps.sum(axis=0, dtype=np.float64)
            trimmed = cells & (values > self.level)
            cells = trimmed if trimmed.any() else cells
        box = tight_box(cells, *edges)
        if box and self.options.edges == "interpolated":
            box = self._to_pixels(level_crossings(values, self.level, cells, visible_cells(*edges)))
        return Grounding(
            box=box or (0.0, 0.0, float(W), float(H)),
            score=mass_inside(self.combined, image_box, (W, H), box) if box else 0.0,
            combined=self.combined,
            cells=cells,
            heads=self.heads,
            image_box=image_box,
            image_size=(W, H),
            threshold=self.level,
            point_map=self.point_map,
        )

    def _to_pixels(self, box: Box) -> Box:
        """A box in cells of the grid, in pixels of the image and clipped to it."""
        (left, top, right, bottom), (h, w) = self.attention.image_box, self.combined.shape
        cell_width, cell_height = (right - left) / w, (bottom - top) / h
        x0, y0, x1, y1 = box
        return clip_box(
            (left + x0 * cell_width, top + y0 * cell_height, left + x1 * cell_width, top + y1 * cell_height),
            self.attention.image_size,
        )

    @cached_property
    def point_map(self) -> NDArray[np.float64] | None:
        sigma = self.options.point_sigma
        return None if sigma is None else combine(self.maps, sigma=sigma, border=self.options.border)


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where an expression is in an image. The mask, heat map and polygon are computed on first access.

    Args:
        box: xyxy floats in image pixels, half-open, inside the image. The whole image if there is no positive cell.
        score: share of the combined map's mass on the image that lies in the box, 0 to 1; 0 if there is no positive
            cell.
        combined: sum of the smoothed maps, float64 `[h, w]` (finer by `upsample`).
        cells: the cells that the box encloses, bool `[h, w]`.
        heads: whose maps were summed.
        image_box: the region of the image, in pixels, that the grid covers.
        image_size: `(W, H)`.
        threshold: value of `combined` above which a cell is positive; infinite if no cell is.
        point_map: the map whose strongest cell is `point`, if it is not `combined`.
        own_boxes: the box of each head alone, None for a head without a positive cell; empty if not computed.
        signals: evidence for the box, by name (`confidence.signals`); empty if not computed.
        confidence: the probability that the box is right (IoU of at least 0.5) if it is `calibrated`, else a raw
            signal between 0 and 1; None if not computed.
        presence: the probability that the expression refers to something in the image; None if unknown.
        absent: the expression refers to nothing, as `abstain` decides; the box is the rejected one.
        refined: the segmenter's mask, bool `[H, W]`, if one was used.
        mask_overlap: IoU of the tight box of the segmenter's mask with the map's box, if the box may be taken from the
            mask; 0 if the segmenter found nothing, None if none was used.
        mask_from: where `mask` comes from: `"map"` (the pseudo-mask), or the segmenter's name.
        each: for a prompt with several images, one grounding per image, in order, including this one; else empty.
        image_index: which of these images this grounding is of, from 0; None for a single image.
        image_share: the share of the heads' attention to all images that this image receives (`maps.image_shares`).
        chosen: whether its box is an answer; False for the other images if one box was asked for.
    """

    box: Box
    score: float
    combined: NDArray[np.float64] = field(repr=False)
    cells: NDArray[np.bool_] = field(repr=False)
    heads: tuple[Head, ...]
    image_box: Box
    image_size: tuple[int, int]
    threshold: float = math.inf
    refined: NDArray[np.bool_] | None = field(default=None, repr=False)
    mask_overlap: float | None = None
    mask_from: str = "map"
    point_map: NDArray[np.float64] | None = field(default=None, repr=False)
    own_boxes: tuple[Box | None, ...] = field(default=(), repr=False)
    confidence: float | None = None
    presence: float | None = None
    calibrated: bool = False
    absent: bool = False
    signals: Mapping[str, float] = field(default_factory=dict, repr=False)
    each: tuple[Grounding, ...] = field(default=(), repr=False)
    image_index: int | None = None
    image_share: float | None = None
    chosen: bool = True

    @property
    def agreement(self) -> float | None:
        """Mean IoU of the box with each head's own box, 0 for a head without one; None if these are not known."""
        return mean_box_iou(self.box, self.own_boxes) if self.own_boxes else None

    @property
    def grid(self) -> tuple[int, int]:
        """`(h, w)` of `combined`."""
        return self.combined.shape[0], self.combined.shape[1]

    @property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Borders of the grid's columns `[w + 1]` and rows `[h + 1]` in pixels, clipped to the image."""
        return visible_edges(self.image_box, self.image_size, self.combined.shape)

    def mass_in(self, box: Box) -> float:
        """Share of the combined map's mass on the image that lies in a box, 0 to 1."""
        return mass_inside(self.combined, self.image_box, self.image_size, box)

    def with_box(self, box: Box) -> Grounding:
        """A copy with another box and that box's score."""
        return replace(self, box=box, score=self.mass_in(box))

    @cached_property
    def polygon(self) -> NDArray[np.float64]:
        """Convex hull of the cells inside the image: vertices `[n, 2]` (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        if not self.cells.any():
            return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        return np.array(convex_hull(corners(self.cells, *self.edges)), dtype=np.float64)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """The segmenter's mask, bool `[H, W]`, or without one the pseudo-mask."""
        return self.pseudo_mask if self.refined is None else self.refined

    @cached_property
    def pseudo_mask(self) -> NDArray[np.bool_]:
        """The filled convex hull, bool `[H, W]`: the pixels whose centres lie in it."""
        return fill_polygon(self.polygon, self.image_size)

    @cached_property
    def heatmap(self) -> NDArray[np.float32]:
        """The combined map on the image's pixels, float32 `[H, W]`, with a maximum of 1.

        Bilinear between cell centres, constant from the outer centres to the grid's border, 0 on pixels
        that the grid does not cover (centre-cropped images).
        """
        return normalised_heatmap(self.combined, self.image_box, self.image_size)

    @property
    def pointing_map(self) -> NDArray[np.float64]:
        """The map `[h, w]` that `point` is taken from, and that GrabCut starts from."""
        return self.combined if self.point_map is None else self.point_map

    @property
    def point(self) -> Point:
        """Centre (x, y), in pixels, of the strongest cell on the image: the answer to the pointing game."""
        x_edges, y_edges = self.edges
        on_image = np.where(visible_cells(x_edges, y_edges), self.pointing_map, -np.inf)
        row, column = np.unravel_index(np.argmax(on_image), on_image.shape)
        return (float(x_edges[column] + x_edges[column + 1]) / 2, float(y_edges[row] + y_edges[row + 1]) / 2)
