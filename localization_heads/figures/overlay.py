"""What is laid over an image: maps, boxes, masks and cells; and the figures that consist of that alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import Box
from localization_heads.cells import visible_cells, visible_edges
from localization_heads.figures.sheet import Pixels, lay, new_sheet, panel_size, save
from localization_heads.figures.style import (
    COLOUR_MAP,
    DPI,
    ORANGE,
    SKY,
    VERMILLION,
    as_typed,
    paper_style,
    wrap,
)
from localization_heads.lvlm.families.geometry import View

ImageLike = Image.Image | NDArray[np.uint8]
"""An RGB image; as an array `[H, W, 3]`, 0 to 255."""

LONGEST = 1200  # pixels of a heat map or a mask worth drawing
BOX_WIDTH = 1.7  # points
_DASH = 4.0  # widths of the line, of boxes in one place
RIM = [withStroke(linewidth=2.6, foreground="black")]


def shrink_to_panel(image: ImageLike | None, inches: float) -> Image.Image | None:
    """The image in RGB, no larger than a panel of that length shows: it is drawn once for every panel."""
    if image is None:
        return None
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened = opened if opened.mode == "RGB" else opened.convert("RGB")
    shrink = math.ceil(inches * DPI) / max(opened.size)
    if shrink >= 1:
        return opened
    W, H = (max(1, round(side * shrink)) for side in opened.size)
    return opened.resize(
        (W, H), Image.Resampling.BICUBIC, reducing_gap=2
    )  # unlike `thumbnail`, copies nothing


def draw_image(
    axes: Axes, image: Image.Image | None, image_size: tuple[int, int], part: Box | None = None
) -> None:
    """Draw the image on axes whose limits are the image's `(W, H)` pixels, y downwards; `None`: grey.

    Args:
        part: what of it the image shows, and the axes then; None for all.
    """
    x0, y0, x1, y1 = part or (0, 0, *image_size)
    axes.set_facecolor("0.9")
    if image is not None:
        lay(axes, np.asarray(image), (x0, y0, x1, y1))
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    axes.set_aspect("equal")


def draw_map(
    axes: Axes,
    values: NDArray[np.floating],
    box: Box,
    *,
    opaque: bool = False,
    faint: bool = False,
    top: float | None = None,
) -> Pixels:
    """Lay a map `[h, w]` over the region `box` of the image, from 0 to its maximum inside the image, or to `top`.

    The cells are drawn as they are, square-edged: smoothing would show a resolution the map does not have.
    What is low stays see-through (`opacity`), so that the image keeps its colours where nobody looks.

    Args:
        faint: the map is of next to nothing, and must not look like the others.
    """
    values = np.nan_to_num(np.asarray(values, dtype=float), posinf=0)
    image_size = int(axes.get_xlim()[1]), int(axes.get_ylim()[0])
    inside = values[cells_inside(values.shape, box, image_size)]
    top = top or float(inside.max(initial=0.0)) or 1.0
    share = np.clip(values / top, 0, 1)
    alpha = np.ones_like(share) if opaque else opacity(share)
    if faint:
        alpha = FAINT * alpha
    return draw_cells(axes, share, box, cmap=COLOUR_MAP, norm=Normalize(0, 1), alpha=alpha)


FAINT = 0.25
"""Of the opacity of other maps: that of a map without attention."""


def opacity(share: NDArray[np.floating]) -> NDArray[np.float64]:
    """How much a map hides of the image below, from its value as a share of its maximum."""
    return np.asarray(0.1 + 0.75 * share)


def draw_cells(axes: Axes, cells: NDArray[np.floating], box: Box, **colours: Any) -> Pixels:
    """Lay cells over the region `box` of the image: RGBA `[h, w, 4]` from 0 to 1, or `[h, w]` with their colours."""
    return lay(axes, cells, box, zorder=2, **colours)


def cells_inside(
    shape: tuple[int, ...], box: Box, image_size: tuple[int, int]
) -> tuple[NDArray[np.intp], ...]:
    """Index of the cells of a grid over `box` that overlap the image; those in the padding are not seen."""
    visible = visible_cells(*visible_edges(box, image_size, shape))
    return np.ix_(*(np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0)))


def draw_box(
    axes: Axes, box: Box, colour: str, *, dashed: bool = False, turn: tuple[int, int] = (0, 1)
) -> None:
    """Draw a box, in the units of the axes, cut at their edge, with a rim that lifts it from any background.

    Args:
        turn: `(which, how many)` of the boxes in one place: each has its part of the line in turn.
    """
    which, many = turn
    shared = ((many - which) % many * _DASH, (_DASH, (many - 1) * _DASH))
    left, right = sorted(axes.get_xlim())
    low, high = sorted(axes.get_ylim())
    x0, x1 = np.clip(box[0::2], left, right)
    y0, y1 = np.clip(box[1::2], low, high)
    patch = Rectangle(
        (x0, y0),
        x1 - x0,
        y1 - y0,
        fill=False,
        edgecolor=colour,
        linewidth=BOX_WIDTH,
        linestyle=(0, (4, 2)) if dashed else shared if many > 1 else "-",
        path_effects=[withStroke(linewidth=2.9, foreground="black" if dashed else "white")],
        clip_on=False,  # half of a line on the edge would be lost
        zorder=5,
    )
    axes.add_patch(patch)


def draw_outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    """Draw the outline of a mask `[h, w]` that covers the image, at any size: white with a black rim."""
    if not mask.any():
        return
    (_, W), (H, _) = axes.get_xlim(), axes.get_ylim()
    # the contour cuts corners by half a pixel, which must not show where pixels are large
    fine = mask.repeat(repeats := max(1, 500 // max(mask.shape)), axis=0).repeat(repeats, axis=1)
    padded = np.pad(fine, 1).astype(float)  # closes the outline at the image's edge
    x = (np.arange(padded.shape[1]) - 0.5) * W / (padded.shape[1] - 2)
    y = (np.arange(padded.shape[0]) - 0.5) * H / (padded.shape[0] - 2)
    outline = axes.contour(x, y, padded, levels=[0.5], colors=["white"], linewidths=1.4, zorder=4)
    outline.set(path_effects=RIM)


_BOX_AREA = 5.2  # square inches: four panels a row
_PANEL_FONT = 8.0  # points


@dataclass(frozen=True)
class BoxPanel:
    """One image of the sheet.

    Args:
        image: the image, at any resolution.
        image_size: `(W, H)` of the original, in whose pixels the boxes are.
        text: what was asked; cut to one line.
    """

    image: ImageLike
    image_size: tuple[int, int]
    text: str
    predicted: Box
    truth: Box | None
    iou: float


def plot_boxes(panels: Sequence[BoxPanel], path: str | Path | None = None, *, title: str = "") -> Figure:
    """Each image with the predicted box, solid, and the true one, dashed; its IoU and expression above it."""
    size = panel_size((1, 1), area=_BOX_AREA)
    legend = [
        Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label="predicted box"),
        Line2D([], [], color=SKY, linewidth=BOX_WIDTH, linestyle="--", label="true box"),
    ]
    with paper_style():
        figure, sheet = new_sheet(size, len(panels), title, legend=legend)
        for axes, panel in zip(sheet, panels, strict=True):
            draw_image(axes, shrink_to_panel(panel.image, max(size)), panel.image_size)
            draw_box(axes, panel.predicted, VERMILLION)
            if panel.truth is not None:
                draw_box(axes, panel.truth, SKY, dashed=True)
            label = wrap(f"IoU {panel.iou:.2f}  {panel.text}", size[0] - 0.05, _PANEL_FONT, max_lines=1)
            axes.set_title(label, fontsize=_PANEL_FONT, **as_typed(label))
        return save(figure, path)


_AREA = 14.0  # square inches of all panels together
_LINE = 0.7  # points


def plot_cells(
    image: ImageLike, views: Sequence[View], path: str | Path | None = None, *, title: str = ""
) -> Figure:
    """The image under the cell grid of each view, one panel a view, its first and last cell filled.

    A panel reaches as far as its view: what the processor padded is grey, what it cropped off has no cells.

    Args:
        views: edges in pixels of the image.
        title: one line above the panels.
    """
    frame = _frame(image, views)
    size = panel_size((round(frame[2] - frame[0]), round(frame[3] - frame[1])), _AREA / min(len(views), 2))
    shown = shrink_to_panel(image, max(size))
    with paper_style():
        figure, sheet = new_sheet(size, len(views), title, legend=_legend())
        for view, axes in zip(views, sheet, strict=True):
            draw_image(axes, shown, _size(image))
            _draw_view(axes, view, frame)
        return save(figure, path)


def _size(image: ImageLike) -> tuple[int, int]:
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _frame(image: ImageLike, views: Sequence[View]) -> Box:
    """The smallest box that holds the image and all views, and a hair more for the outermost lines."""
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
    draw_box(axes, view.box, VERMILLION)
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
