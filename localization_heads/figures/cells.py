"""The figure of `stage=doctor`: which part of the picture each image token stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from localization_heads.attention import Box
from localization_heads.figures.canvas import ORANGE, SKY, VERMILLION, paper_style, save
from localization_heads.figures.overlay import Picture, draw_image, prepare
from localization_heads.figures.sheet import new_sheet, panel_size
from localization_heads.lvlm.geometry import View

_AREA = 14.0  # square inches of all panels together
_LINE = 0.7  # points


def plot_cells(
    image: Picture, views: Sequence[View], path: str | Path | None = None, *, title: str = ""
) -> Figure:
    """The picture under the cell grid of each view, one panel a view, its first and last cell filled.

    A panel reaches as far as its view: what the processor padded is grey, what it cropped off has no cells.

    Args:
        views: edges in pixels of the picture.
        title: one line above the panels.
    """
    frame = _frame(image, views)
    size = panel_size((round(frame[2] - frame[0]), round(frame[3] - frame[1])), _AREA / min(len(views), 2))
    picture = prepare(image, max(size))
    with paper_style():
        figure, sheet = new_sheet(size, len(views), title, legend=_legend())
        for view, axes in zip(views, sheet, strict=True):
            draw_image(axes, picture, _size(image))
            _draw_view(axes, view, frame)
        return save(figure, path)


def _size(image: Picture) -> tuple[int, int]:
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _frame(image: Picture, views: Sequence[View]) -> Box:
    """The smallest box that holds the picture and all views, and a hair more for the outermost lines."""
    W, H = _size(image)
    boxes = np.array([(0, 0, W, H), *(view.box for view in views)], dtype=float)
    (x0, y0), (x1, y1) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    margin = 0.004 * max(x1 - x0, y1 - y0)
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def _draw_view(axes: Axes, view: View, frame: Box) -> None:
    rows, columns = view.index.shape
    x0, y0, x1, y1 = view.box
    axes.set_xlim(frame[0], frame[2])
    axes.set_ylim(frame[3], frame[1])
    upright = [[(x, y0), (x, y1)] for x in view.x_edges]
    level = [[(x0, y), (x1, y)] for y in view.y_edges]
    width = min(_LINE, 24 / max(rows, columns))
    axes.add_collection(LineCollection(upright + level, colors="black", linewidths=2 * width, alpha=0.55))
    axes.add_collection(LineCollection(upright + level, colors="white", linewidths=width))
    for row, column, colour in ((0, 0, ORANGE), (rows - 1, columns - 1, SKY)):
        axes.add_patch(_cell(view, row, column, colour))
    axes.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=VERMILLION, linewidth=1.4, zorder=4)
    )
    axes.set_title(f"{view.name}: {columns} x {rows} cells{_cell_size(view)}")


def _cell(view: View, row: int, column: int, colour: str) -> Rectangle:
    x, y = view.x_edges[column], view.y_edges[row]
    width, height = view.x_edges[column + 1] - x, view.y_edges[row + 1] - y
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=_LINE, zorder=3)


def _cell_size(view: View) -> str:
    """` of 16.7 x 13.3 pixels`, where all are alike."""
    if not view.is_uniform:
        return ", of several sizes"
    w, h = (math.fabs(edges[1] - edges[0]) for edges in (view.x_edges, view.y_edges))
    return f" of {w:.1f} x {h:.1f} pixels"


def _legend() -> list[Line2D]:
    square = {"linestyle": "none", "marker": "s", "markersize": 6}
    return [
        Line2D([], [], color=ORANGE, label="first token", **square),  # type: ignore[arg-type]
        Line2D([], [], color=SKY, label="last token", **square),  # type: ignore[arg-type]
        Line2D([], [], color=VERMILLION, linewidth=1.4, label="what the view covers"),
    ]
