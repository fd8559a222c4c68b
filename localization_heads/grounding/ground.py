"""From the maps of a few heads to one box and one mask (Sec. 5, App. B.2 of the paper); `maps` makes one map of them.

Smooth each head's map, add them up, binarise the sum at its mean, take the convex hulls of the 8-connected
components and keep the largest: its tight box is the answer, its filled hull the pseudo-mask, until a segmenter
makes a better one (`segmentation.refine`). Choices are made in cells, where areas are whole numbers and ties
exact; the result is in pixels of the original image, with padding and cropping undone by `AttentionMaps.image_box`.
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
    upsample,
    visible_cells,
    visible_edges,
)
from localization_heads.errors import NotFiniteError
from localization_heads.grounding.maps import combine, contrast_maps, head_maps, limit_peaks, sum_maps
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

FLAT = 1e-6
"""A map whose peak is closer than this to its mean, relatively, is flat: it points at nothing."""
ROUNDING = 1e-12
"""How much of the mass a sum of cells may miss by rounding."""
MIN_INSTANCE_MASS = 0.15
"""Share of the strongest component's attention from which on another one counts as an instance (docs/grounding.md)."""
MIN_INSTANCE_MASS_OF_PLACES = 0.3
"""The same in the mean map of several places, where all objects draw attention (docs/grounding.md)."""


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where an expression is in an image. Images of it are made when asked for.

    Args:
        box: xyxy floats in image pixels, half-open, inside the image. The whole image if no cell stands out.
        score: share of the combined map's mass on the image that lies in the box, 0 to 1; 0 if no cell
            stands out.
        combined: sum of the smoothed maps, float64 `[h, w]` (finer by `upsample`).
        cells: the cells that the box encloses, bool `[h, w]`.
        heads: whose maps were added.
        image_box: the region of the image, in pixels, that the grid covers.
        image_size: `(W, H)`.
        threshold: value of `combined` above which a cell is active; infinite if no cell stands out.
        point_map: the map whose strongest cell is `point`, where it is another one than `combined`.
        own_boxes: the box of each of the heads alone, None for one that points at nothing; empty if not asked for.
        signals: what speaks for the box, by name (`confidence.signals`); empty if not asked for.
        confidence: the probability that the box is right (IoU of at least 0.5) if it is `calibrated`, else a raw
            signal between 0 and 1; None if not asked for.
        presence: the probability that the expression refers to something in the image; None if that is not known.
        absent: there is nothing there, as `abstain` decides: the box is the one that was turned down.
        refined: the segmenter's mask, bool `[H, W]`, where one has been at work.
        mask_overlap: IoU of the segmenter's mask, by its tight box, with the map's box, where the box may be taken from
            the mask; 0 if it found nothing, None if none was asked.
        mask_from: whose mask `mask` is: `"map"` (the pseudo-mask), or the segmenter's name.
        each: one for each image of a prompt with several, in their order, this one among them; empty of one image.
        image_index: which of them this is of, counted from 0; None of one image.
        image_share: the share of the heads' attention to all of them that this image draws (`maps.image_shares`).
        chosen: whether its box is an answer: not in the other images, where one box was asked for.
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
        """Mean IoU of the box with the own boxes of the heads, 0 for a head without one; None if not asked for."""
        return mean_box_iou(self.box, self.own_boxes) if self.own_boxes else None

    @property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Borders of the cells' columns `[w + 1]` and rows `[h + 1]` in pixels, cut at the image's edge."""
        return visible_edges(self.image_box, self.image_size, self.combined.shape)

    def mass_in(self, box: Box) -> float:
        """Share of the combined map's mass on the image that lies in a box, 0 to 1."""
        return mass_inside(self.combined, self.image_box, self.image_size, box)

    def boxed(self, box: Box) -> Grounding:
        """The same with another box, and the score of that."""
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
        """The segmenter's mask, bool `[H, W]`, or else the pseudo-mask: pixels whose centres lie in the hull."""
        return self.pseudo_mask if self.refined is None else self.refined

    @cached_property
    def pseudo_mask(self) -> NDArray[np.bool_]:
        """The filled hull, bool `[H, W]`. A pixel belongs if its centre does."""
        return fill_polygon(self.polygon, self.image_size)

    @cached_property
    def heatmap(self) -> NDArray[np.float32]:
        """The combined map on the image's pixels, float32 `[H, W]`, its largest value 1.

        Bilinear between cell centres, constant from the outer centres to the grid's border, 0 on pixels
        that the grid does not cover (centre-cropped images).
        """
        return normalised_heatmap(self.combined, self.image_box, self.image_size)

    @property
    def pointing_map(self) -> NDArray[np.float64]:
        """The map `[h, w]` that the point is taken from, and that a segmenter's colours start from."""
        return self.combined if self.point_map is None else self.point_map

    @property
    def point(self) -> Point:
        """Centre (x, y), in pixels, of the strongest cell on the image: the pointing game's answer."""
        x_edges, y_edges = self.edges
        on_image = np.where(visible_cells(x_edges, y_edges), self.pointing_map, -np.inf)
        row, column = np.unravel_index(np.argmax(on_image), on_image.shape)
        return (float(x_edges[column] + x_edges[column + 1]) / 2, float(y_edges[row] + y_edges[row + 1]) / 2)


def ground_maps(
    attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions | None = None
) -> Grounding:
    """The box of an expression from the maps of the given heads (Sec. 5).

    Raises:
        ValueError: for no head, a head that the model does not have, or maps with NaN or infinite values.

    >>> maps = np.zeros((4, 2, 4, 4), np.float32)
    >>> maps[3, 1, 1:3, 2:] = 0.25
    >>> attention = AttentionMaps(maps, image_box=(0, 0, 64, 64), image_size=(64, 64))
    >>> ground_maps(attention, [Head(3, 1)], GroundingOptions(sigma=0)).box
    (32.0, 16.0, 64.0, 48.0)
    """
    field = _field(attention, heads, options or GroundingOptions())
    return field.grounding(_component(field.positive, field.combined, field.options.component))


def ground_instances(
    attention: AttentionMaps,
    heads: Sequence[Head],
    options: GroundingOptions | None = None,
    least: float = MIN_INSTANCE_MASS,
) -> list[Grounding]:
    """One grounding for each 8-connected component of positive cells, that of most attention first.

    Args:
        least: components with less than this share of the first one's attention are left out.

    Returns:
        At least one: where no cell stands out, the grounding that `ground_maps` gives.
    """
    field = _field(attention, heads, options or GroundingOptions())
    labels = label_components(field.positive)
    masses = np.bincount(labels.ravel(), weights=(field.combined * field.positive).ravel())[1:]
    if not masses.size:
        return [field.grounding(field.positive)]
    order = np.argsort(-masses, kind="stable")
    return [field.grounding(labels == 1 + i) for i in order if masses[i] >= least * masses.max()]


@dataclass(frozen=True, eq=False)
class _Field:
    """The combined map of an expression, and which of its cells are positive.

    Args:
        attention: whose `image_box` is the one that is read.
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
        """The box of some of the positive cells; the whole image for none."""
        image_box, (W, H) = self.attention.image_box, self.attention.image_size
        edges = visible_edges(image_box, (W, H), self.combined.shape)
        read = self.combined
        if self.options.trim:
            read = self.maps.sum(axis=0, dtype=np.float64)
            trimmed = cells & (read > self.level)
            cells = trimmed if trimmed.any() else cells
        box = tight_box(cells, *edges)
        if box and self.options.edges == "interpolated":
            sides = level_crossings(read, self.level, cells, visible_cells(*edges))
            box = _between_cells(sides, self.attention, cells.shape)
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

    @cached_property
    def point_map(self) -> NDArray[np.float64] | None:
        sigma = self.options.point_sigma
        return None if sigma is None else combine(self.maps, sigma=sigma, border=self.options.border)


def _field(attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions) -> _Field:
    if options.ignore_padding:
        whole = (0.0, 0.0, float(attention.image_size[0]), float(attention.image_size[1]))
        attention = replace(attention, image_box=whole)
    maps = _read(attention, heads, options)
    combined = combine(maps, options.kernel_size, options.sigma, options.border)
    visible = visible_cells(*visible_edges(attention.image_box, attention.image_size, combined.shape))
    level = threshold(combined, options, visible)
    named = tuple(Head(*head) for head in heads)
    return _Field(attention, named, options, maps, combined, (combined > level) & visible, level)


def _read(
    attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions
) -> NDArray[np.floating[Any]]:
    """The maps that are smoothed and added, `[k, h, w]`: those of the heads, or of what was made of them, one."""
    maps = head_maps(attention.attention, heads)
    plain = options.combine == "sum" and attention.answer is None and options.peak_limit is None
    if plain and (options.contrast == "none" or not attention.others):
        return upsample(maps, options.upsample, options.interpolation)
    one = sum_maps(attention, heads, options)
    if options.contrast != "none" and attention.others:
        others = [sum_maps(other, heads, options) for other in attention.others]
        one = contrast_maps(one, others, options.contrast_weight)
    if options.peak_limit is not None:
        one = limit_peaks(one, options.peak_limit)
    return upsample(one[None], options.upsample, options.interpolation)


def _component(
    cells: NDArray[np.bool_], combined: NDArray[np.float64], choice: Component
) -> NDArray[np.bool_]:
    """Of the positive cells `[h, w]`, those that make the box."""
    if choice == "all":
        return cells
    choose = {"largest_hull": largest_hull, "largest_mass": largest_mass, "containing_peak": containing_peak}
    return choose[choice](cells, combined)


def _between_cells(sides: Box, attention: AttentionMaps, grid: tuple[int, ...]) -> Box:
    """A box in cells of the grid, in pixels, cut at the image's edge."""
    x0, y0, x1, y1 = attention.image_box
    across, down = (x1 - x0) / grid[1], (y1 - y0) / grid[0]
    left, top, right, bottom = sides
    box = x0 + left * across, y0 + top * down, x0 + right * across, y0 + bottom * down
    return clip_box(box, attention.image_size)


def threshold(
    combined: NDArray[np.floating[Any]], options: GroundingOptions, visible: NDArray[np.bool_] | None = None
) -> float:
    """The value above which a cell of a map `[h, w]` is active; infinite if none is, as of a flat map.

    With `binarise="mean"` it is `means * mean + margin`, or with `large` at most `large * sum m^2 / sum m`.

    Args:
        visible: the cells that show some of the image, bool `[h, w]`; all by default.

    Raises:
        NotFiniteError: NaN or infinite values.
    """
    if not np.isfinite(combined).all():
        raise NotFiniteError("the map")
    mean = float(combined.mean())
    if combined.size == 0 or not combined.max() - mean > FLAT * abs(mean):
        return float("inf")  # smoothing leaves rounding on a constant map
    values = combined[visible] if visible is not None else combined.ravel()
    if options.binarise == "otsu":
        return otsu(values)
    if options.binarise == "top_mass":
        return top_mass(values, options.top_mass)
    counted = values if options.mean_of == "image" and values.size else combined
    level = options.means * float(counted.mean()) + options.margin
    if options.large is not None and (total := float(counted.sum())) > 0:
        level = min(level, options.large * float(np.square(counted).sum()) / total)
    return level if level < combined.max() else float("inf")


def otsu(values: NDArray[np.floating[Any]]) -> float:
    """`argmax_t w0 w1 (m1 - m0)^2`: the split into `<= t` and `> t` with the largest variance between the parts.

    Exact, over the values themselves and not a histogram of them. Of equal splits the lowest; infinite if all
    values are equal.

    >>> otsu(np.array([0.0, 0.0, 1.0, 8.0, 9.0]))
    1.0
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    cuts = np.flatnonzero(np.diff(ordered) > 0)  # after these the value rises
    if cuts.size == 0:
        return float("inf")
    below = cuts + 1.0
    sums = np.cumsum(ordered)
    above = ordered.size - below
    low, high = sums[cuts] / below, (sums[-1] - sums[cuts]) / above
    return float(ordered[cuts[np.argmax(below * above * (high - low) ** 2)]])


def top_mass(values: NDArray[np.floating[Any]], share: float = 0.5) -> float:
    """The value above which lie the fewest, strongest cells that hold `share` of the mass.

    Cells of equal value go together. Negative values hold no mass; infinite where nothing does.

    >>> values = np.array([1.0, 2.0, 3.0, 4.0])
    >>> (values > top_mass(values, 0.7)).tolist()
    [False, False, True, True]
    """
    ordered = np.sort(np.clip(np.asarray(values, dtype=np.float64), 0, None), axis=None)[::-1]
    held = np.cumsum(ordered)
    if held.size == 0 or held[-1] <= 0:
        return float("inf")
    last = int(np.argmax(held >= share * held[-1] * (1 - ROUNDING)))
    return float(np.nextafter(ordered[last], -np.inf))
