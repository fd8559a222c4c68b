"""Several objects in one picture: a colour, a number and an outline each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import Box
from localization_heads.figures.canvas import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    paper_style,
    save,
)
from localization_heads.figures.overlay import LONGEST, draw_box, draw_image, draw_outline, prepare
from localization_heads.figures.sheet import new_sheet, panel_size

COLOURS = (VERMILLION, SKY, YELLOW, GREEN, PURPLE, ORANGE, BLUE)
"""Okabe and Ito's, in an order that keeps the first few far apart; the numbers tell those apart that come again."""
_TINT = 0.35  # opacity of a mask


@dataclass(frozen=True)
class Found:
    """One object: what was asked, its box in pixels, its score, and its mask, bool `[H, W]`, if there is one."""

    phrase: str
    box: Box
    score: float
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)


def plot_several(image: Image.Image, objects: Sequence[Found], path: str | Path | None = None) -> Figure:
    """The picture with every object's box and mask, numbered; the title says which number is what.

    Args:
        objects: at least one.
    """
    size = panel_size(image.size, area=14)
    title = " | ".join(f"{n}: {found.phrase} ({found.score:.2f})" for n, found in enumerate(objects, start=1))
    with paper_style():
        figure, (axes,) = new_sheet(size, 1, title, titled=False)
        draw_image(axes, prepare(image, max(size)), image.size)
        for number, found in enumerate(objects, start=1):
            colour = COLOURS[(number - 1) % len(COLOURS)]
            if found.mask is not None:
                _draw_mask(axes, found.mask, colour)
            draw_box(axes, found.box, colour)
        for number, found in enumerate(objects, start=1):  # above every box
            _draw_number(axes, found.box, number, COLOURS[(number - 1) % len(COLOURS)])
        return save(figure, path)


def _draw_mask(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """Tint and outline, at no more pixels than can be seen."""
    H, W = mask.shape
    step = max(1, int(np.ceil(max(H, W) / LONGEST)))
    small = mask[step // 2 :: step, step // 2 :: step]
    small = small if small.size else mask
    tint = np.zeros((*small.shape, 4))
    tint[..., :3] = to_rgb(colour)
    tint[..., 3] = _TINT * small
    axes.imshow(tint, extent=(0, W, H, 0), interpolation="nearest", zorder=3)
    draw_outline(axes, small)


def _draw_number(axes: Axes, box: Box, number: int, colour: str) -> None:
    """The object's number inside the top left corner of its box."""
    (_, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    x, y = min(max(box[0], 0.0), right), min(max(box[1], 0.0), bottom)
    axes.annotate(
        str(number),
        (x, y),
        xytext=(4, -4),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=10,
        fontweight="bold",
        color=colour,
        path_effects=[matplotlib.patheffects.withStroke(linewidth=2.5, foreground="black")],
        zorder=7,
    )
