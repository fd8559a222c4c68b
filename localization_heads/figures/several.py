"""Figures of several boxes on one image, each with its number, and no number on another."""

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
    LONGEST,
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
"""Okabe and Ito's, in an order that keeps the first few far apart; the numbers tell those apart that come again."""
_TOGETHER_AREA = 7.0  # square inches of each of several images
_TINT = 0.35  # opacity of a mask
_AREA = 14.0  # square inches
_DIGIT, _HEIGHT = 0.11, 0.19  # inches that a digit of a number takes, with the gap around it
_FONT = 10.0  # points
_NEAR = 0.03  # inches: lines less far apart lie on each other


@dataclass(frozen=True)
class Found:
    """One object: what was asked, its box in pixels, its score, and its mask, bool `[H, W]`, if there is one."""

    phrase: str
    box: Box
    score: float
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)


def plot_several(image: Image.Image, objects: Sequence[Found], path: str | Path | None = None) -> Figure:
    """The image with every object's box and mask, numbered; the title says which number is what.

    Args:
        objects: at least one.
    """
    size = panel_size(image.size, area=_AREA)
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
    objects: Sequence[Found],
    path: str | Path | None = None,
    *,
    truths: Sequence[Box] = (),
    expression: str = "",
) -> Figure:
    """The heat map over the image, the box and the outline of the mask of every object, numbered, and the true boxes.

    Args:
        image: `None` draws the heat map alone.
        grounding: of any of the objects, for the map is that of all.
        objects: at least one, the best first.
        truths: drawn dashed.
        expression: the title.
    """
    size = panel_size(grounding.image_size, area=_AREA)
    scores = ", ".join(f"{n}={found.score:.2f}" for n, found in enumerate(objects, start=1))
    label = f"{len(objects)} predicted box{'es' if len(objects) > 1 else ''}"
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label)]
    if truths:
        legend.append(Line2D([], [], color="white", linewidth=BOX_WIDTH, linestyle="--", label="true box"))
        legend[-1].set_path_effects([withStroke(linewidth=2.9, foreground="black")])
    with paper_style():
        figure, (axes,) = new_sheet(
            size, 1, expression, titled=False, legend=legend, note=f"scores: {scores}"
        )
        draw_image(axes, shrink_to_panel(image, max(size)), grounding.image_size)
        draw_map(axes, _drawn_heat(grounding), (0, 0, *grounding.image_size), opaque=image is None)
        for found in objects:
            if found.mask is not None:
                draw_outline(axes, _small(found.mask))
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
    """The images of one prompt side by side, each under its heat map; the box of each that has one.

    All maps share one scale, as they share one softmax: an image that draws little attention stays clear.

    Args:
        images: in the order of the prompt; `None` draws the heat maps alone.
        each: a grounding for each image.
        expression: the title.
    """
    shapes = [one.image_size[0] / one.image_size[1] for one in each]
    size = panel_size((round(1000 * float(np.median(shapes))), 1000), area=_TOGETHER_AREA)
    boxed = [one for one in each if one.chosen and not one.absent]
    label = f"predicted box{'es' if len(boxed) > 1 else ''}"
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label)] if boxed else []
    top = max(float(one.combined.max(initial=0.0)) for one in each) or 1.0
    with paper_style():
        figure, sheet = new_sheet(size, len(each), expression, legend=legend)
        for number, (axes, one) in enumerate(zip(sheet, each, strict=True)):
            image = None if images is None else images[number]
            draw_image(axes, shrink_to_panel(image, max(size)), one.image_size)
            strength = float(one.combined.max(initial=0.0)) / top
            draw_map(
                axes, strength * _drawn_heat(one), (0, 0, *one.image_size), opaque=image is None, top=1.0
            )
            if one.refined is not None:
                draw_outline(axes, _small(one.refined))
            if one in boxed:
                draw_box(axes, one.box, VERMILLION)
            axes.set_title(f"image {number}: {one.image_share or 0:.0%} of the attention")
        return save(figure, path)


def colour_of(number: int) -> str:
    """Of the box at that place, counted from 0; they come again."""
    return COLOURS[number % len(COLOURS)]


def _draw_numbered(axes: Axes, boxes: Sequence[Box], width: float) -> None:
    """The boxes with their numbers, counted from 1, on axes `width` inches wide."""
    (_, W), (H, _) = axes.get_xlim(), axes.get_ylim()
    across = W / width  # pixels an inch
    sizes = [(_DIGIT * len(str(n)) * across, _HEIGHT * across) for n in range(1, len(boxes) + 1)]
    for number, (box, turn) in enumerate(zip(boxes, turns(boxes, _NEAR * across), strict=True)):
        draw_box(axes, box, colour_of(number), turn=turn)
    for number, (x, y) in enumerate(label_places(boxes, sizes, (W, H))):
        axes.text(
            x + sizes[number][0] / 2,
            y + sizes[number][1] / 2,
            str(number + 1),
            ha="center",
            va="center",
            fontsize=_FONT,
            fontweight="bold",
            color=colour_of(number),
            path_effects=[withStroke(linewidth=2.5, foreground="black")],
            zorder=7,
        )


def turns(boxes: Sequence[Box], near: float) -> list[tuple[int, int]]:
    """`(which, how many)` of those in its place each box is: all their edges lie within `near` of the first one's.

    >>> turns([(0, 0, 9, 9), (0, 0, 5, 5), (0, 1, 9, 9)], near=1)
    [(0, 2), (0, 1), (1, 2)]
    """
    edges = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    firsts = [int(np.argmax(np.abs(edges - box).max(axis=1) <= near)) for box in edges]
    return [(firsts[:n].count(first), firsts.count(first)) for n, first in enumerate(firsts)]


def label_places(
    boxes: Sequence[Box], sizes: Sequence[tuple[float, float]], image_size: tuple[float, float]
) -> list[tuple[float, float]]:
    """The top left corner of each box's label, so that no label lies on another, as far as there is room.

    The first free place of: inside the box, row by row from its top left corner; around it; its top left corner.

    Args:
        sizes: width and height of each label, in pixels as the boxes.

    >>> label_places([(0, 0, 9, 9), (0, 0, 6, 6)], [(2, 3), (2, 3)], (9, 9))
    [(0, 0), (2, 0)]
    """
    placed: list[Box] = []
    for box, (w, h) in zip(boxes, sizes, strict=True):
        W, H = image_size
        first = min(max(box[0], 0), max(W - w, 0)), min(max(box[1], 0), max(H - h, 0))
        fitting = (place for place in _places(box, w, h) if _is_free(place, (w, h), placed, image_size))
        x, y = next(fitting, first)
        placed.append((x, y, x + w, y + h))
    return [(x, y) for x, y, _, _ in placed]


_MOST = 40  # places tried along a side
_RINGS = 7  # of places around a box


def _places(box: Box, w: float, h: float) -> Iterator[tuple[float, float]]:
    """Places of a label of that size: inside the box, then around it."""
    x0, y0, x1, y1 = box
    columns, rows = (min(int(length // step), _MOST) for length, step in ((x1 - x0, w), (y1 - y0, h)))
    for row in range(rows):
        yield from ((x0 + column * w, y0 + row * h) for column in range(columns))
    for ring in range(1, _RINGS + 1):
        left, top, right, bottom = x0 - ring * w, y0 - ring * h, x1 + (ring - 1) * w, y1 + (ring - 1) * h
        for y in (top, bottom):
            yield from ((x0 + column * w, y) for column in range(1 - ring, columns + ring))
        for x in (right, left):
            yield from ((x, y0 + row * h) for row in range(1 - ring, rows + ring))


def _is_free(
    place: tuple[float, float],
    size: tuple[float, float],
    placed: Sequence[Box],
    image_size: tuple[float, float],
) -> bool:
    (x, y), (w, h) = place, size
    if x < 0 or y < 0 or x + w > image_size[0] or y + h > image_size[1]:
        return False
    return all(x >= x1 or x + w <= x0 or y >= y1 or y + h <= y0 for x0, y0, x1, y1 in placed)


def _drawn_heat(grounding: Grounding) -> NDArray[np.float32]:
    """The heat map at no more pixels than can be seen."""
    W, H = grounding.image_size
    shrink = min(1.0, LONGEST / max(W, H))
    x0, y0, x1, y1 = (side * shrink for side in grounding.image_box)
    return normalised_heatmap(
        grounding.combined, (x0, y0, x1, y1), (max(1, round(W * shrink)), max(1, round(H * shrink)))
    )


def _draw_mask(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """Tint and outline, at no more pixels than can be seen."""
    H, W = mask.shape
    small = _small(mask)
    tint = np.zeros((*small.shape, 4))
    tint[..., :3] = to_rgb(colour)
    tint[..., 3] = _TINT * small
    draw_cells(axes, tint, (0, 0, W, H))
    draw_outline(axes, small)


def _small(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every so many pixels of a mask, so that it has at most `LONGEST` a side."""
    step = max(1, int(np.ceil(max(mask.shape) / LONGEST)))
    small = mask[step // 2 :: step, step // 2 :: step]
    return small if small.size else mask
