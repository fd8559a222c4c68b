"""The page's images, drawn with Pillow: quick enough to follow a slider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from localization_heads.attention import Box, rescale_box
from localization_heads.figures.overlay import opacity
from localization_heads.figures.several import dash_slots
from localization_heads.figures.style import BLUE, COLOUR_MAP, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head

COLOURS = (VERMILLION, SKY, ORANGE, GREEN, PURPLE, BLUE)
"""Okabe and Ito's, one for each expression."""
LONGEST = 720  # pixels of an image on the page
MARGIN = 40  # of the grid of heads, for its labels
INK, PAPER = (40, 40, 40), (255, 255, 255)
CLEAR, GREY = (0, 0, 0, 0), (118, 118, 118)
"""Of the grid of heads, which stands on the page's own ground: grey is read on white (4.5 to 1) and on dark (3.3)."""
Plate = tuple[float, float, float, float]
"""Where a name stands: x0, y0, x1, y1 in pixels of what is shown."""


def draw_boxes(
    image: Image.Image, groundings: Sequence[Grounding], labels: Sequence[str], longest: int | None = LONGEST
) -> Image.Image:
    """The image with a tinted mask, a box and a label for each grounding, each in its colour."""
    shown = _shown(image, longest)
    found_here = [resized(found, shown.size) for found in groundings]
    for colour, found in zip(COLOURS, found_here, strict=False):
        tint = Image.new("RGB", shown.size, colour)
        shown.paste(tint, mask=Image.fromarray(found.mask).convert("L").point(lambda value: value and 90))
    pen = ImageDraw.Draw(shown)
    line = max(2, round(max(shown.size) / 180))
    boxes = [found.box for found in found_here]
    for colour, box, (which, many) in zip(COLOURS, boxes, dash_slots(boxes, 1.5 * line), strict=False):
        if which == 0:
            pen.rectangle(_corners(box), outline=PAPER, width=line + 2)
            pen.rectangle(_corners(box), outline=colour, width=line)
        else:
            _dash(pen, _corners(box), colour, line, (which, many))
    plates: list[Plate] = []
    for colour, found, label in zip(COLOURS, found_here, labels, strict=False):
        plates.append(_label(pen, shown.size, found.box[:2], f"{label}  {found.score:.2f}", colour, plates))
    return shown


def _corners(box: Box) -> tuple[int, int, int, int]:
    """The first and the last pixels of a box."""
    x0, y0, x1, y1 = map(round, box)
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _dash(
    pen: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    colour: str,
    line: int,
    turn: tuple[int, int],
) -> None:
    """Dashes over the box that is drawn there already, so that each of those in this place is seen (`turns`)."""
    x0, y0, x1, y1 = corners
    step, (which, many) = 4 * line, turn
    for x in range(x0 + which * step, x1, many * step):
        for y in (y0, y1 - line + 1):
            pen.rectangle((x, y, min(x + step - 1, x1), y + line - 1), fill=colour)
    for y in range(y0 + which * step, y1, many * step):
        for x in (x0, x1 - line + 1):
            pen.rectangle((x, y, x + line - 1, min(y + step - 1, y1)), fill=colour)


def draw_heat(image: Image.Image, found: Grounding) -> Image.Image:
    """The image under the combined map, whose low values are transparent."""
    shown = _shown(image, LONGEST)
    share = np.clip(resized(found, shown.size).heatmap, 0, 1)
    colours = colormaps[COLOUR_MAP](share)[..., :3] * 255
    alpha = opacity(share)[..., None]
    return Image.fromarray((np.asarray(shown) * (1 - alpha) + colours * alpha).astype(np.uint8))


def draw_grid(sums: NDArray[np.floating], on: Sequence[Head], others: Sequence[Head] = ()) -> Image.Image:
    """Every head's attention sum, a row a layer: a frame around heads that are on, a dot in those of the other set.

    RGBA: nothing is drawn between the cells, so the grid suits a light page and a dark one.
    """
    layers, heads = sums.shape
    cell = cell_size(sums.shape)
    canvas = Image.new("RGBA", (MARGIN + heads * cell + 4, MARGIN + layers * cell + 4), CLEAR)
    pen = ImageDraw.Draw(canvas)
    shares = np.nan_to_num(sums / (np.nanmax(sums) or 1.0))
    for (layer, head), share in np.ndenumerate(shares):
        x, y = MARGIN + head * cell, MARGIN + layer * cell
        colour = tuple(int(255 * c) for c in colormaps[COLOUR_MAP](float(share))[:3])
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=colour)
        if Head(layer, head) in on:
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=PAPER, width=4)
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=VERMILLION, width=3)
        if Head(layer, head) in others:
            middle, r = (x + cell / 2, y + cell / 2), cell / 6
            pen.ellipse((middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r), fill=PAPER, outline=INK)
    _axes(pen, layers, heads, cell)
    return canvas


def cell_size(shape: tuple[int, ...]) -> int:
    """Pixels a cell of the grid of heads: the more heads, the smaller."""
    return max(14, min(44, 560 // max(shape)))


def head_at(x: float, y: float, shape: tuple[int, int]) -> Head | None:
    """The head whose cell holds a pixel of the grid's image, None on its margins."""
    cell = cell_size(shape)
    head, layer = int((x - MARGIN) // cell), int((y - MARGIN) // cell)
    return Head(layer, head) if 0 <= layer < shape[0] and 0 <= head < shape[1] else None


def resized(found: Grounding, size: tuple[int, int]) -> Grounding:
    """The grounding in pixels of the image at another size, so that large images are drawn no slower."""
    before = found.image_size
    refined = found.refined
    if refined is not None:
        refined = np.asarray(Image.fromarray(refined).resize(size, Image.Resampling.NEAREST))
    return replace(
        found,
        box=rescale_box(found.box, before, size),
        image_box=rescale_box(found.image_box, before, size),
        image_size=size,
        refined=refined,
        own_boxes=tuple(None if box is None else rescale_box(box, before, size) for box in found.own_boxes),
    )


def _shown(image: Image.Image, longest: int | None) -> Image.Image:
    """A copy no larger than the page shows it."""
    scale = min(1.0, longest / max(image.size)) if longest else 1.0
    W, H = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((W, H), Image.Resampling.LANCZOS, reducing_gap=2)


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    colour: str,
    taken: Sequence[Plate],
) -> Plate:
    """A name plate above the corner, or below it at the image's edge; below or above others, never on one."""
    font = _font(max(13, round(max(size) / 45)))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 10, bottom - top + 8
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    first, lowest = (corner[1] - height if corner[1] >= height else corner[1]), max(0.0, size[1] - height)
    beside = [(y0, y1) for x0, y0, x1, y1 in taken if x0 <= x + width and x <= x1]
    edges = [
        first,
        *sorted(y1 + 1 for _, y1 in beside),
        *sorted((y0 - height - 1 for y0, _ in beside), reverse=True),
    ]
    free = (y for y in edges if 0 <= y <= lowest and all(y > y1 or y + height < y0 for y0, y1 in beside))
    y = next(free, min(first, lowest))
    pen.rectangle((x, y, x + width, y + height), fill=colour, outline=PAPER)
    pen.text((x + 5 - left, y + 4 - top), text, font=font, fill="white" if colour != SKY else "black")
    return x, y, x + width, y + height


def _axes(pen: ImageDraw.ImageDraw, layers: int, heads: int, cell: int) -> None:
    font, step = _font(12), 1 if cell >= 22 else 4
    middle = MARGIN - 8
    for head in range(0, heads, step):
        pen.text((MARGIN + (head + 0.5) * cell, middle), str(head), font=font, fill=GREY, anchor="ms")
    for layer in range(0, layers, step):
        pen.text((middle, MARGIN + (layer + 0.5) * cell), str(layer), font=font, fill=GREY, anchor="rm")
    pen.text((MARGIN + heads * cell / 2, 9), "head", font=font, fill=GREY, anchor="mm")
    pen.text((2, MARGIN - 8), "layer", font=font, fill=GREY, anchor="ls")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's own font: it is on every machine and has more letters than Pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)
