"""Figures of one picture: what its top heads look at, and the box that comes of it (Sec. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.figures.canvas import SKY, VERMILLION, paper_style, save
from localization_heads.figures.overlay import (
    BOX_WIDTH,
    LONGEST,
    RIM,
    Picture,
    draw_box,
    draw_image,
    draw_map,
    draw_outline,
    opacity,
    prepare,
)
from localization_heads.figures.sheet import new_sheet, panel_size
from localization_heads.grounding.hull import fill_polygon
from localization_heads.grounding.maps import Grounding
from localization_heads.grounding.raster import resample
from localization_heads.heads.head import Head

if TYPE_CHECKING:
    from localization_heads.heads.criteria import HeadStatistics


def plot_top_maps(
    image: Picture | None,
    attention: AttentionMaps,
    heads: Sequence[Head],
    path: str | Path | None = None,
    *,
    grounding: Grounding | None = None,
    truth: Box | None = None,
    expression: str | None = None,
    statistics: HeadStatistics | None = None,
) -> Figure:
    """The picture, the maps of `heads` laid over it, and their combined map with the predicted box.

    All maps share one colour scale, which the bar below states: from 0 to the map's own maximum inside the
    image. What cells in the padding see is not shown.

    Args:
        image: `None` draws the maps alone.
        heads: best first; one panel each.
        grounding: adds the combined map and its box.
        truth: true box in pixels, drawn dashed.
        expression: the title; by default the query of the maps.
        statistics: adds the spatial entropy `H` to the attention sum `S` in the titles.
    """
    size = panel_size(attention.image_size, area=2.4)
    picture = prepare(image, max(size))
    panels = (image is not None) + len(heads) + (grounding is not None)
    title = attention.query if expression is None else expression
    with paper_style():
        bar = np.ones_like if image is None else opacity
        figure, sheet = new_sheet(size, panels, title, legend=_box_entries(grounding, truth), bar=bar)
        for axes in sheet:
            draw_image(axes, picture, attention.image_size)
        rest = iter(sheet)
        if image is not None:
            next(rest).set_title("picture")
        for head, axes in zip(heads, rest, strict=False):
            draw_map(axes, attention.attention[head], attention.image_box, opaque=image is None)
            axes.set_title(_map_title(attention, head, statistics))
        if grounding is not None:
            draw_map(sheet[-1], grounding.combined, attention.image_box, opaque=image is None)
            sheet[-1].set_title(f"combined: {len(grounding.heads)} heads")
        if sheet:
            _draw_boxes(sheet[-1], grounding, truth)
        return save(figure, path)


def _map_title(attention: AttentionMaps, head: Head, statistics: HeadStatistics | None) -> str:
    """`L14H24  S 0.41  H 0.00`: the head and its two criteria on this sample."""
    if statistics is None:
        return f"{head}  S {attention.attention[head].sum():.2f}"
    entropy = statistics.spatial_entropy[head]
    H = f"{entropy:.2f}" if math.isfinite(entropy) else "∞"
    return f"{head}  S {statistics.attention_sum[head]:.2f}  H {H}"


def _box_entries(grounding: Grounding | None, truth: Box | None) -> list[Line2D]:
    """What the legend says of the boxes that are drawn."""
    entries = []
    if grounding is not None:
        found = bool(grounding.cells.any())
        label = f"predicted box, score {grounding.score:.2f}" if found else "no cell stands out: whole image"
        entries.append(Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label))
    if truth is not None:
        entries.append(Line2D([], [], color=SKY, linewidth=BOX_WIDTH, linestyle="--", label="true box"))
    return entries


def _draw_boxes(axes: Axes, grounding: Grounding | None, truth: Box | None) -> None:
    """Draw the predicted box, solid, and the true one, dashed, on top."""
    if grounding is not None:
        draw_box(axes, grounding.box, VERMILLION)
    if truth is not None:
        draw_box(axes, truth, SKY, dashed=True)


def plot_grounding(
    image: Picture | None,
    grounding: Grounding,
    path: str | Path | None = None,
    *,
    truth: Box | None = None,
    expression: str = "",
) -> Figure:
    """The heat map over the picture, the outline of the mask, the box with its score, the true box.

    Args:
        image: `None` draws the heat map alone.
        grounding: its heat map and mask are made at the size drawn, whatever the size of the picture.
        truth: true box in pixels, drawn dashed.
        expression: the title.
    """
    size = panel_size(grounding.image_size, area=14)
    picture = prepare(image, max(size))
    heat, mask = _at_drawn_size(grounding)
    legend = _box_entries(grounding, truth)
    label = "pseudo-mask" if grounding.refined is None else f"mask ({grounding.mask_from})"
    legend.append(Line2D([], [], color="white", linewidth=1.4, path_effects=RIM, label=label))
    with paper_style():
        figure, (axes,) = new_sheet(size, 1, expression, titled=False, legend=legend)
        draw_image(axes, picture, grounding.image_size)
        draw_map(axes, heat, (0, 0, *grounding.image_size), opaque=image is None)
        draw_outline(axes, mask)
        _draw_boxes(axes, grounding, truth)
        return save(figure, path)


def _at_drawn_size(grounding: Grounding) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Heat map and mask of the picture shrunk to at most `LONGEST` pixels a side, `[H, W]` each.

    Those of a photograph's every pixel would take gigabytes, and nobody could see the difference.
    """
    W, H = grounding.image_size
    shrink = min(1.0, LONGEST / max(W, H))
    drawn = max(1, round(W * shrink)), max(1, round(H * shrink))
    scale = np.array([drawn[0] / W, drawn[1] / H])
    x0, y0, x1, y1 = np.multiply(grounding.image_box, [*scale, *scale]).tolist()
    heat = resample(grounding.combined, (x0, y0, x1, y1), drawn)
    if grounding.refined is None:
        return heat, fill_polygon(grounding.polygon * scale, drawn)
    rows, columns = (
        ((np.arange(n) + 0.5) / share).astype(int) for n, share in zip(drawn[::-1], scale[::-1], strict=True)
    )
    return heat, grounding.refined[np.ix_(rows, columns)]
