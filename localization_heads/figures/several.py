"""Figures of several boxes: numbered on one image, with labels that do not overlap, or in the images of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import Box
from localization_heads.cells import normalised_heatmap
from localization_heads.figures.overlay import (
    BOX_WIDTH,
    MAX_SIDE,
    ImageLike,
    draw_box,
    draw_cells,
    draw_image,
    draw_map,
    draw_outline,
    shrink_to_panel,
)
from localization_heads.figures.sheet import new_sheet, panel_size, save
from localization_heads.figures.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW, paper_style
from localization_heads.grounding.ground import Grounding

COLOURS = (VERMILLION, SKY, YELLOW, GREEN, PURPLE, ORANGE, BLUE)
"""The palette of Okabe and Ito, with the first few colours most distinct. It repeats; boxes also have numbers."""
_PANEL_AREA = 14.0  # square inches of the image
_TOGETHER_AREA = 7.0  # square inches of each image of a prompt
_MASK_OPACITY = 0.35
_LABEL_SIZE = 10.0  # points
_DIGIT_WIDTH, _LABEL_HEIGHT = 0.11, 0.19  # inches, with the gap around them
_LINE_TOLERANCE = 0.03  # inches: closer lines count as coinciding
_MAX_PER_SIDE = 40  # positions tried along a side
_NUM_RINGS = 7  # of positions around a box


@dataclass(frozen=True)
class DetectedObject:
    """An object to draw: its phrase, its box in pixels, its score and, if there is one, its mask, bool `[H, W]`."""

    phrase: str
    box: Box
    score: float
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)


def plot_several(image: Image.Image, objects: Sequence[DetectedObject], path: str | Path | None = None) -> Figure:
    """The image with every object's box and mask, numbered; the title lists the phrases and scores by number.

    Args:
        objects: at least one.
    """
    size = panel_size(image.size, area=_PANEL_AREA)
    title = " | ".join(f"{n}: {found.phrase} ({found.score:.2f})" for n, found in enumerate(objects, start=1))
    with paper_style():
        figure, (axes,) = new_sheet(size, 1, title, titled=False)
        draw_image(axes, shrink_to_panel(image, max(size)), image.size)
        for number, found in enumerate(objects):
            if found.mask is not None:
                _draw_mask(axes, found.mask, colour_of(number))
        _draw_numbered(axes, [found.box for found in objects], size[0])
        return save(figure, path)


def plot_instances(
    image: ImageLike | None,
    grounding: Grounding,
    objects: Sequence[DetectedObject],
    path: str | Path | None = None,
    *,
    truths: Sequence[Box] = (),
    expression: str = "",
) -> Figure:
    """The heat map over the image, the numbered box and the mask outline of every object, and the true boxes.

    Args:
        image: `None` draws the heat map alone.
        grounding: of any of the objects, which share one map.
        objects: at least one, best first.
        truths: true boxes in pixels, drawn dashed.
        expression: the title.
    """
    size = panel_size(grounding.image_size, area=_PANEL_AREA)
    scores = ", ".join(f"{n}={found.score:.2f}" for n, found in enumerate(objects, start=1))
    label = f"{len(objects)} predicted box{'es' if len(objects) > 1 else ''}"
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label)]
    if truths:
        legend.append(Line2D([], [], color="white", linewidth=BOX_WIDTH, linestyle="--", label="true box"))
        legend[-1].set_path_effects([withStroke(linewidth=2.9, foreground="black")])
    with paper_style():
        figure, (axes,) = new_sheet(size, 1, expression, titled=False, legend=legend, note=f"scores: {scores}")
        draw_image(axes, shrink_to_panel(image, max(size)), grounding.image_size)
        draw_map(axes, _heatmap_to_draw(grounding), (0, 0, *grounding.image_size), opaque=image is None)
        for found in objects:
            if found.mask is not None:
                draw_outline(axes, _shrink_mask(found.mask))
        _draw_numbered(axes, [found.box for found in objects], size[0])
        for truth in truths:
            draw_box(axes, truth, "white", dashed=True)
        return save(figure, path)


def plot_together(
    images: Sequence[ImageLike] | None,
    each: Sequence[Grounding],
    path: str | Path | None = None,
    *,
    expression: str = "",
) -> Figure:
    """The images of one prompt side by side, each under its heat map and, if there is one, its box.

    All maps share one colour scale, as they share one softmax: an image with little attention stays clear.

    Args:
        images: in the order of the prompt; `None` draws the heat maps alone.
        each: a grounding for each image.
        expression: the title.
    """
    aspects = [grounding.image_size[0] / grounding.image_size[1] for grounding in each]
    size = panel_size((round(1000 * float(np.median(aspects))), 1000), area=_TOGETHER_AREA)
    boxed = [grounding for grounding in each if grounding.chosen and not grounding.absent]
    label = f"predicted box{'es' if len(boxed) > 1 else ''}"
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label)] if boxed else []
    top = max(float(grounding.combined.max(initial=0.0)) for grounding in each) or 1.0
    with paper_style():
        figure, sheet = new_sheet(size, len(each), expression, legend=legend)
        for index, (axes, grounding) in enumerate(zip(sheet, each, strict=True)):
            image = None if images is None else images[index]
            draw_image(axes, shrink_to_panel(image, max(size)), grounding.image_size)
            heatmap = float(grounding.combined.max(initial=0.0)) / top * _heatmap_to_draw(grounding)
            draw_map(axes, heatmap, (0, 0, *grounding.image_size), opaque=image is None, top=1.0)
            if grounding.refined is not None:
                draw_outline(axes, _shrink_mask(grounding.refined))
            if grounding in boxed:
                draw_box(axes, grounding.box, VERMILLION)
            axes.set_title(f"image {index}: {grounding.image_share or 0:.0%} of the attention")
        return save(figure, path)


def colour_of(index: int) -> str:
    """The colour of the box with that index; the palette repeats."""
    return COLOURS[index % len(COLOURS)]


def _draw_numbered(axes: Axes, boxes: Sequence[Box], width: float) -> None:
    """Draw the boxes with their numbers, from 1, on axes `width` inches wide."""
    (_, W), (H, _) = axes.get_xlim(), axes.get_ylim()
    per_inch = W / width  # pixels
    label_sizes = [(_DIGIT_WIDTH * len(str(n)) * per_inch, _LABEL_HEIGHT * per_inch) for n in range(1, len(boxes) + 1)]
    slots = dash_slots(boxes, _LINE_TOLERANCE * per_inch)
    for index, (box, slot) in enumerate(zip(boxes, slots, strict=True)):
        draw_box(axes, box, colour_of(index), dash_slot=slot)
    for index, (x, y) in enumerate(place_labels(boxes, label_sizes, (W, H))):
        axes.text(
            x + label_sizes[index][0] / 2,
            y + label_sizes[index][1] / 2,
            str(index + 1),
            ha="center",
            va="center",
            fontsize=_LABEL_SIZE,
            fontweight="bold",
            color=colour_of(index),
            path_effects=[withStroke(linewidth=2.5, foreground="black")],
            zorder=7,
        )


def dash_slots(boxes: Sequence[Box], tolerance: float) -> list[tuple[int, int]]:
    """For each box `(index, count)` among the boxes that coincide, within `tolerance` of every edge of the first one.

    >>> dash_slots([(0, 0, 9, 9), (0, 0, 5, 5), (0, 1, 9, 9)], tolerance=1)
    [(0, 2), (0, 1), (1, 2)]
    """
    edges = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    firsts = [int(np.argmax(np.abs(edges - box).max(axis=1) <= tolerance)) for box in edges]
    return [(firsts[:n].count(first), firsts.count(first)) for n, first in enumerate(firsts)]


def place_labels(
    boxes: Sequence[Box], sizes: Sequence[tuple[float, float]], image_size: tuple[float, float]
) -> list[tuple[float, float]]:
    """The top left corner of each box's label, such that labels do not overlap as far as there is room.

    A label takes the first free position inside its box, row by row from the top left corner, or around it; without
    any, it takes the top left corner.

    Args:
        sizes: width and height of each label, in the pixels of the boxes.

    >>> place_labels([(0, 0, 9, 9), (0, 0, 6, 6)], [(2, 3), (2, 3)], (9, 9))
    [(0, 0), (2, 0)]
    """
    placed: list[Box] = []
    for box, (w, h) in zip(boxes, sizes, strict=True):
        W, H = image_size
        corner = min(max(box[0], 0), max(W - w, 0)), min(max(box[1], 0), max(H - h, 0))
        free = (
            position for position in _candidate_positions(box, w, h) if _is_free(position, (w, h), placed, image_size)
        )
        x, y = next(free, corner)
        placed.append((x, y, x + w, y + h))
    return [(x, y) for x, y, _, _ in placed]


def _candidate_positions(box: Box, w: float, h: float) -> Iterator[tuple[float, float]]:
    """Positions for a label of that size: inside the box, then in rings around it."""
    x0, y0, x1, y1 = box
    columns, rows = (min(int(length // step), _MAX_PER_SIDE) for length, step in ((x1 - x0, w), (y1 - y0, h)))
    for row in range(rows):
        yield from ((x0 + column * w, y0 + row * h) for column in range(columns))
    for ring in range(1, _NUM_RINGS + 1):
        left, top, right, bottom = x0 - ring * w, y0 - ring * h, x1 + (ring - 1) * w, y1 + (ring - 1) * h
        for y in (top, bottom):
            yield from ((x0 + column * w, y) for column in range(1 - ring, columns + ring))
        for x in (right, left):
            yield from ((x, y0 + row * h) for row in range(1 - ring, rows + ring))


def _is_free(
    position: tuple[float, float],
    size: tuple[float, float],
    placed: Sequence[Box],
    image_size: tuple[float, float],
) -> bool:
    (x, y), (w, h) = position, size
    if x < 0 or y < 0 or x + w > image_size[0] or y + h > image_size[1]:
        return False
    return all(x >= x1 or x + w <= x0 or y >= y1 or y + h <= y0 for x0, y0, x1, y1 in placed)


def _heatmap_to_draw(grounding: Grounding) -> NDArray[np.float32]:
    """The heat map, at most `MAX_SIDE` pixels a side."""
    W, H = grounding.image_size
    shrink = min(1.0, MAX_SIDE / max(W, H))
    x0, y0, x1, y1 = (side * shrink for side in grounding.image_box)
    return normalised_heatmap(
        grounding.combined, (x0, y0, x1, y1), (max(1, round(W * shrink)), max(1, round(H * shrink)))
    )


def _draw_mask(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """Tint and outline a mask."""
    H, W = mask.shape
    small = _shrink_mask(mask)
    tint = np.zeros((*small.shape, 4))
    tint[..., :3] = to_rgb(colour)
    tint[..., 3] = _MASK_OPACITY * small
    draw_cells(axes, tint, (0, 0, W, H))
    draw_outline(axes, small)


def _shrink_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask subsampled to at most `MAX_SIDE` pixels a side."""
    step = max(1, int(np.ceil(max(mask.shape) / MAX_SIDE)))
    small = mask[step // 2 :: step, step // 2 :: step]
    return small if small.size else mask
