"""The page's images, drawn with Pillow, which is fast enough to follow a slider."""

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
"""Okabe and Ito's colours, one for each expression."""
PAGE_SIDE = 720  # longest side of an image on the page, in pixels
MARGIN = 40  # left of and above the grid of heads, for its labels
BLACK, WHITE = (40, 40, 40), (255, 255, 255)
TRANSPARENT, GREY = (0, 0, 0, 0), (118, 118, 118)
"""The grid of heads has a transparent background. Its grey labels have a contrast of 4.5 on white and 3.3 on dark."""
LabelBox = tuple[float, float, float, float]
"""The background of a label: x0, y0, x1, y1 in pixels of the drawn image."""


def draw_boxes(
    image: Image.Image,
    groundings: Sequence[Grounding],
    labels: Sequence[str],
    longest_side: int | None = PAGE_SIDE,
) -> Image.Image:
    """The image with a tinted mask, a box and a label for each grounding, one colour per grounding."""
    canvas = _downscaled(image, longest_side)
    groundings = [resized(grounding, canvas.size) for grounding in groundings]
    for colour, grounding in zip(COLOURS, groundings, strict=False):
        tint = Image.new("RGB", canvas.size, colour)
        alpha = Image.fromarray(grounding.mask).convert("L").point(lambda value: value and 90)
        canvas.paste(tint, mask=alpha)
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(max(canvas.size) / 180))
    boxes = [grounding.box for grounding in groundings]
    for colour, box, (index, count) in zip(COLOURS, boxes, dash_slots(boxes, 1.5 * width), strict=False):
        if index == 0:
            pen.rectangle(_pixel_corners(box), outline=WHITE, width=width + 2)
            pen.rectangle(_pixel_corners(box), outline=colour, width=width)
        else:
            _draw_dashes(pen, _pixel_corners(box), colour, width, index, count)
    taken: list[LabelBox] = []
    for colour, grounding, label in zip(COLOURS, groundings, labels, strict=False):
        text = f"{label}  {grounding.score:.2f}"
        taken.append(_draw_label(pen, canvas.size, grounding.box[:2], text, colour, taken))
    return canvas


def _pixel_corners(box: Box) -> tuple[int, int, int, int]:
    """The first and the last pixels of a box."""
    x0, y0, x1, y1 = map(round, box)
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _draw_dashes(
    pen: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    colour: str,
    width: int,
    index: int,
    count: int,
) -> None:
    """Draw every `count`-th dash over a box already drawn in this place, so that all boxes there are visible."""
    x0, y0, x1, y1 = corners
    dash = 4 * width
    for x in range(x0 + index * dash, x1, count * dash):
        for y in (y0, y1 - width + 1):
            pen.rectangle((x, y, min(x + dash - 1, x1), y + width - 1), fill=colour)
    for y in range(y0 + index * dash, y1, count * dash):
        for x in (x0, x1 - width + 1):
            pen.rectangle((x, y, x + width - 1, min(y + dash - 1, y1)), fill=colour)


def draw_map(image: Image.Image, grounding: Grounding) -> Image.Image:
    """The image under the combined map, whose low values are transparent."""
    canvas = _downscaled(image, PAGE_SIDE)
    values = np.clip(resized(grounding, canvas.size).heatmap, 0, 1)
    colours = colormaps[COLOUR_MAP](values)[..., :3] * 255
    alpha = opacity(values)[..., None]
    return Image.fromarray((np.asarray(canvas) * (1 - alpha) + colours * alpha).astype(np.uint8))


def draw_grid(sums: NDArray[np.floating], selected: Sequence[Head], second_set: Sequence[Head] = ()) -> Image.Image:
    """Every head's attention sum, one row per layer. Selected heads have a frame, those of the second set a dot.

    The image is RGBA with a transparent background, so that it suits a light page and a dark one.
    """
    layers, heads = sums.shape
    cell = cell_size(sums.shape)
    canvas = Image.new("RGBA", (MARGIN + heads * cell + 4, MARGIN + layers * cell + 4), TRANSPARENT)
    pen = ImageDraw.Draw(canvas)
    values = np.nan_to_num(sums / (np.nanmax(sums) or 1.0))
    for (layer, head), value in np.ndenumerate(values):
        x, y = MARGIN + head * cell, MARGIN + layer * cell
        colour = tuple(int(255 * c) for c in colormaps[COLOUR_MAP](float(value))[:3])
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=colour)
        if Head(layer, head) in selected:
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=WHITE, width=4)
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=VERMILLION, width=3)
        if Head(layer, head) in second_set:
            cx, cy, r = x + cell / 2, y + cell / 2, cell / 6
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=WHITE, outline=BLACK)
    _draw_axes(pen, layers, heads, cell)
    return canvas


def cell_size(shape: tuple[int, ...]) -> int:
    """Side of a cell of the grid of heads in pixels."""
    return max(14, min(44, 560 // max(shape)))


def head_at(x: float, y: float, shape: tuple[int, int]) -> Head | None:
    """The head at a pixel of the grid's image, None in its margins."""
    cell = cell_size(shape)
    head, layer = int((x - MARGIN) // cell), int((y - MARGIN) // cell)
    return Head(layer, head) if 0 <= layer < shape[0] and 0 <= head < shape[1] else None


def resized(grounding: Grounding, size: tuple[int, int]) -> Grounding:
    """The grounding in pixels of the image at another size, so that large images are drawn as fast as small ones."""
    old_size = grounding.image_size
    refined = grounding.refined
    if refined is not None:
        refined = np.asarray(Image.fromarray(refined).resize(size, Image.Resampling.NEAREST))
    return replace(
        grounding,
        box=rescale_box(grounding.box, old_size, size),
        image_box=rescale_box(grounding.image_box, old_size, size),
        image_size=size,
        refined=refined,
        own_boxes=tuple(box and rescale_box(box, old_size, size) for box in grounding.own_boxes),
    )


def _downscaled(image: Image.Image, longest_side: int | None) -> Image.Image:
    """An RGB copy whose sides are at most `longest_side`; None keeps the size."""
    scale = min(1.0, longest_side / max(image.size)) if longest_side else 1.0
    W, H = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((W, H), Image.Resampling.LANCZOS, reducing_gap=2)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    colour: str,
    taken: Sequence[LabelBox],
) -> LabelBox:
    """Draw a label above the corner, or below it at the image's edge, without covering the labels already drawn.

    Returns its background's box.
    """
    font = _font(max(13, round(max(size) / 45)))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 10, bottom - top + 8
    x = min(max(0.0, corner[0]), max(0.0, size[0] - width))
    preferred, lowest = (corner[1] - height if corner[1] >= height else corner[1]), max(0.0, size[1] - height)
    same_columns = [(y0, y1) for x0, y0, x1, y1 in taken if x0 <= x + width and x <= x1]
    candidates = [
        preferred,
        *sorted(y1 + 1 for _, y1 in same_columns),
        *sorted((y0 - height - 1 for y0, _ in same_columns), reverse=True),
    ]
    free = (y for y in candidates if 0 <= y <= lowest and all(y > y1 or y + height < y0 for y0, y1 in same_columns))
    y = next(free, min(preferred, lowest))
    pen.rectangle((x, y, x + width, y + height), fill=colour, outline=WHITE)
    pen.text((x + 5 - left, y + 4 - top), text, font=font, fill="white" if colour != SKY else "black")
    return x, y, x + width, y + height


def _draw_axes(pen: ImageDraw.ImageDraw, layers: int, heads: int, cell: int) -> None:
    font, step = _font(12), 1 if cell >= 22 else 4
    edge = MARGIN - 8
    for head in range(0, heads, step):
        pen.text((MARGIN + (head + 0.5) * cell, edge), str(head), font=font, fill=GREY, anchor="ms")
    for layer in range(0, layers, step):
        pen.text((edge, MARGIN + (layer + 0.5) * cell), str(layer), font=font, fill=GREY, anchor="rm")
    pen.text((MARGIN + heads * cell / 2, 9), "head", font=font, fill=GREY, anchor="mm")
    pen.text((2, edge), "layer", font=font, fill=GREY, anchor="ls")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's font, which is always installed and covers more characters than Pillow's."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)
