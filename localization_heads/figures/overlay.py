"""Overlays on an image: maps, boxes, masks and cells; and the figures that show only boxes or cells."""

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
from localization_heads.figures.sheet import PixelImage, draw_pixels, new_sheet, panel_size, save
from localization_heads.figures.style import (
    COLOUR_MAP,
    DPI,
    ORANGE,
    SKY,
    VERMILLION,
    paper_style,
    user_text_style,
    wrap,
)
from localization_heads.lvlm.families.geometry import View

ImageLike = Image.Image | NDArray[np.uint8]
"""An RGB image; as an array `[H, W, 3]`, 0 to 255."""
MAX_SIDE = 1200  # pixels: heat maps and masks are drawn no larger
BOX_WIDTH = 1.7  # points
_DASH = 4.0  # line widths: the dashes of boxes that coincide
BLACK_RIM = [withStroke(linewidth=2.6, foreground="black")]
FAINT_OPACITY = 0.25
"""The opacity of a map with almost no attention, relative to other maps."""
_BOX_PANEL_AREA = 5.2  # square inches: four panels per row
_BOX_TITLE_SIZE = 8.0  # points
_CELLS_AREA = 14.0  # square inches, of one panel or of two together
_GRID_LINE_WIDTH = 0.7  # points


def shrink_to_panel(image: ImageLike | None, inches: float) -> Image.Image | None:
    """The image in RGB, shrunk to the pixels of a panel of `inches` a side: it is resampled for every panel."""
    if image is None:
        return None
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened = opened if opened.mode == "RGB" else opened.convert("RGB")
    shrink = math.ceil(inches * DPI) / max(opened.size)
    if shrink >= 1:
        return opened
    W, H = (max(1, round(side * shrink)) for side in opened.size)
    # Unlike `thumbnail`, this does not copy the image first.
    return opened.resize((W, H), Image.Resampling.BICUBIC, reducing_gap=2)


def draw_image(axes: Axes, image: Image.Image | None, image_size: tuple[int, int], part: Box | None = None) -> None:
    """Draw the image, grey for None, and set the limits of the axes to its `(W, H)` pixels, y downwards.

    Args:
        part: the region that `image` and the axes show, in pixels; None for the whole image.
    """
    x0, y0, x1, y1 = part or (0, 0, *image_size)
    axes.set_facecolor("0.9")
    if image is not None:
        draw_pixels(axes, np.asarray(image), (x0, y0, x1, y1))
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
) -> PixelImage:
    """Draw a map `[h, w]` over the region `box` of the image.

    The cells are drawn as squares: interpolation would suggest a resolution that the map does not have. Low values are
    nearly transparent (`opacity`), so that the image keeps its colours where there is no attention.

    Args:
        opaque: ignore `opacity`, for a map without an image.
        faint: draw a map with almost no attention fainter than others.
        top: the end of the colour scale, which starts at 0; by default the maximum inside the image.
    """
    values = np.nan_to_num(np.asarray(values, dtype=float), posinf=0)
    image_size = int(axes.get_xlim()[1]), int(axes.get_ylim()[0])
    inside = values[visible_cells_index(values.shape, box, image_size)]
    top = top or float(inside.max(initial=0.0)) or 1.0
    share = np.clip(values / top, 0, 1)
    alpha = np.ones_like(share) if opaque else opacity(share)
    if faint:
        alpha = FAINT_OPACITY * alpha
    return draw_cells(axes, share, box, cmap=COLOUR_MAP, norm=Normalize(0, 1), alpha=alpha)


def opacity(share: NDArray[np.floating]) -> NDArray[np.float64]:
    """The opacity of a map over the image, from 0 to 1, for each value as a share of the maximum."""
    return np.asarray(0.1 + 0.75 * share)


def draw_cells(axes: Axes, cells: NDArray[np.floating], box: Box, **colouring: Any) -> PixelImage:
    """Draw cells over the region `box` of the image: RGBA `[h, w, 4]` from 0 to 1, or values `[h, w]` and a `cmap`."""
    return draw_pixels(axes, cells, box, zorder=2, **colouring)


def visible_cells_index(shape: tuple[int, ...], box: Box, image_size: tuple[int, int]) -> tuple[NDArray[np.intp], ...]:
    """Index of the cells of a grid over `box` that overlap the image; the others are in the padding."""
    visible = visible_cells(*visible_edges(box, image_size, shape))
    return np.ix_(*(np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0)))


def draw_box(axes: Axes, box: Box, colour: str, *, dashed: bool = False, dash_slot: tuple[int, int] = (0, 1)) -> None:
    """Draw a box, in the units of the axes and clipped to them, with a rim that stands out from any background.

    Args:
        dash_slot: `(index, count)` among the boxes that coincide (`dash_slots`): their dashes alternate.
    """
    index, count = dash_slot
    alternating = ((count - index) % count * _DASH, (_DASH, (count - 1) * _DASH))
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
        linestyle=(0, (4, 2)) if dashed else alternating if count > 1 else "-",
        path_effects=[withStroke(linewidth=2.9, foreground="black" if dashed else "white")],
        clip_on=False,  # clipping would hide half of a line on the edge
        zorder=5,
    )
    axes.add_patch(patch)


def draw_outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    """Draw the outline of a mask `[h, w]` of the whole image, at any resolution, in white with a black rim."""
    if not mask.any():
        return
    (_, W), (H, _) = axes.get_xlim(), axes.get_ylim()
    # A contour cuts corners by half a pixel; upsampling a small mask keeps that invisible.
    fine = mask.repeat(repeats := max(1, 500 // max(mask.shape)), axis=0).repeat(repeats, axis=1)
    padded = np.pad(fine, 1).astype(float)  # closes the outline at the edge of the image
    x = (np.arange(padded.shape[1]) - 0.5) * W / (padded.shape[1] - 2)
    y = (np.arange(padded.shape[0]) - 0.5) * H / (padded.shape[0] - 2)
    outline = axes.contour(x, y, padded, levels=[0.5], colors=["white"], linewidths=1.4, zorder=4)
    outline.set(path_effects=BLACK_RIM)


@dataclass(frozen=True)
class BoxPanel:
    """One panel of `plot_boxes`.

    Args:
        image: at any resolution.
        image_size: `(W, H)` of the original image, in whose pixels the boxes are.
        text: the expression; cut to one line.
    """

    image: ImageLike
    image_size: tuple[int, int]
    text: str
    predicted: Box
    truth: Box | None
    iou: float


def plot_boxes(panels: Sequence[BoxPanel], path: str | Path | None = None, *, title: str = "") -> Figure:
    """Each image with the predicted box (solid) and the true box (dashed), under its IoU and expression."""
    size = panel_size((1, 1), area=_BOX_PANEL_AREA)
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
            label = wrap(f"IoU {panel.iou:.2f}  {panel.text}", size[0] - 0.05, _BOX_TITLE_SIZE, max_lines=1)
            axes.set_title(label, fontsize=_BOX_TITLE_SIZE, **user_text_style(label))
        return save(figure, path)


def plot_cells(image: ImageLike, views: Sequence[View], path: str | Path | None = None, *, title: str = "") -> Figure:
    """The image under the cell grid of each view, one panel per view, with the first and the last cell filled.

    Padding by the processor is grey; cropped parts of the image have no cells.

    Args:
        views: edges in pixels of the image.
    """
    frame = _common_frame(image, views)
    size = panel_size((round(frame[2] - frame[0]), round(frame[3] - frame[1])), _CELLS_AREA / min(len(views), 2))
    shown = shrink_to_panel(image, max(size))
    with paper_style():
        figure, sheet = new_sheet(size, len(views), title, legend=_cells_legend())
        for view, axes in zip(views, sheet, strict=True):
            draw_image(axes, shown, _image_size(image))
            _draw_view(axes, view, frame)
        return save(figure, path)


def _image_size(image: ImageLike) -> tuple[int, int]:
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _common_frame(image: ImageLike, views: Sequence[View]) -> Box:
    """The smallest box that contains the image and all views, with a margin for the outermost lines."""
    W, H = _image_size(image)
    boxes = np.array([(0, 0, W, H), *(view.box for view in views)], dtype=float)
    (x0, y0), (x1, y1) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    margin = 0.004 * max(x1 - x0, y1 - y0)
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def _draw_view(axes: Axes, view: View, frame: Box) -> None:
    rows, columns = view.index.shape
    x0, y0, x1, y1 = view.box
    axes.set_xlim(frame[0], frame[2])
    axes.set_ylim(frame[3], frame[1])
    lines = [[(x, y0), (x, y1)] for x in view.x_edges] + [[(x0, y), (x1, y)] for y in view.y_edges]
    width = min(_GRID_LINE_WIDTH, 24 / max(rows, columns))
    axes.add_collection(LineCollection(lines, colors="black", linewidths=2 * width, alpha=0.55))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=width))
    for row, column, colour in ((0, 0, ORANGE), (rows - 1, columns - 1, SKY)):
        axes.add_patch(_filled_cell(view, row, column, colour))
    draw_box(axes, view.box, VERMILLION)
    axes.set_title(f"{view.name}: {columns} x {rows} cells{_cell_size_text(view)}")


def _filled_cell(view: View, row: int, column: int, colour: str) -> Rectangle:
    x, y = view.x_edges[column], view.y_edges[row]
    width, height = view.x_edges[column + 1] - x, view.y_edges[row + 1] - y
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=_GRID_LINE_WIDTH, zorder=3)


def _cell_size_text(view: View) -> str:
    """` of 16.7 x 13.3 pixels`, if all cells have one size."""
    if not view.is_uniform:
        return ", of several sizes"
    w, h = (math.fabs(edges[1] - edges[0]) for edges in (view.x_edges, view.y_edges))
    return f" of {w:.1f} x {h:.1f} pixels"


def _cells_legend() -> list[Line2D]:
    square = {"linestyle": "none", "marker": "s", "markersize": 6}
    return [
        Line2D([], [], color=ORANGE, label="first token", **square),  # type: ignore[arg-type]
        Line2D([], [], color=SKY, label="last token", **square),  # type: ignore[arg-type]
        Line2D([], [], color=VERMILLION, linewidth=1.4, label="what the view covers"),
    ]
