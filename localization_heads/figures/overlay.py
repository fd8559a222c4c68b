"""What the figures with a picture share: the picture, a map on the pixels its cells cover, boxes, outlines.

Every axes here is measured in pixels of the original image, whatever the resolution of what is drawn on it.
"""

from __future__ import annotations

import math

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import Box
from localization_heads.figures.canvas import COLOUR_MAP, DPI
from localization_heads.grounding.raster import SLIVER, visible_edges

Picture = Image.Image | NDArray[np.uint8]
"""An RGB picture; as an array `[H, W, 3]`, 0 to 255."""

LONGEST = 1200  # pixels of a heat map or a mask worth drawing
BOX_WIDTH = 1.7  # points
RIM = [matplotlib.patheffects.withStroke(linewidth=2.6, foreground="black")]


def prepare(image: Picture | None, inches: float) -> Image.Image | None:
    """The picture in RGB, no larger than a panel of that length shows: it is drawn once for every panel."""
    if image is None:
        return None
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    shrink = math.ceil(inches * DPI) / max(picture.size)
    if shrink >= 1:
        return picture
    W, H = (max(1, round(side * shrink)) for side in picture.size)
    return picture.resize(
        (W, H), Image.Resampling.BICUBIC, reducing_gap=2
    )  # unlike `thumbnail`, copies nothing


def draw_image(axes: Axes, picture: Image.Image | None, image_size: tuple[int, int]) -> None:
    """Draw the picture on axes whose limits are the image's `(W, H)` pixels, y downwards; `None`: grey."""
    W, H = image_size
    axes.set_facecolor("0.9")
    if picture is not None:
        axes.imshow(np.asarray(picture), extent=(0, W, H, 0))
    axes.set_xlim(0, W)
    axes.set_ylim(H, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_map(axes: Axes, values: NDArray[np.floating], box: Box, *, opaque: bool = False) -> AxesImage:
    """Lay a map `[h, w]` over the region `box` of the image, from 0 to its maximum inside the image.

    The cells are drawn as they are, square-edged: smoothing would show a resolution the map does not have.
    What is low stays see-through (`opacity`), so that the picture keeps its colours where nobody looks.
    """
    x0, y0, x1, y1 = box
    values = np.nan_to_num(np.asarray(values, dtype=float), posinf=0)
    image_size = int(axes.get_xlim()[1]), int(axes.get_ylim()[0])
    inside = values[cells_inside(values.shape, box, image_size)]
    top = float(inside.max(initial=0.0)) or 1.0
    share = np.clip(values / top, 0, 1)
    return axes.imshow(
        share,
        extent=(x0, x1, y1, y0),
        cmap=COLOUR_MAP,
        vmin=0,
        vmax=1,
        alpha=None if opaque else opacity(share),
        interpolation="nearest",
        zorder=2,
    )


def opacity(share: NDArray[np.floating]) -> NDArray[np.float64]:
    """How much a map hides of the picture below, from its value as a share of its maximum."""
    return np.asarray(0.1 + 0.75 * share)


def draw_cells(axes: Axes, cells: NDArray[np.floating], box: Box) -> AxesImage:
    """Lay coloured cells, RGBA `[h, w, 4]` from 0 to 1, over the region `box` of the image."""
    x0, y0, x1, y1 = box
    return axes.imshow(cells, extent=(x0, x1, y1, y0), interpolation="nearest", zorder=2)


def cells_inside(
    shape: tuple[int, ...], box: Box, image_size: tuple[int, int]
) -> tuple[NDArray[np.intp], ...]:
    """Index of the cells of a grid over `box` that overlap the image; those in the padding are not seen."""
    columns, rows = visible_edges(box, image_size, shape)
    return np.ix_(np.flatnonzero(np.diff(rows) > SLIVER), np.flatnonzero(np.diff(columns) > SLIVER))


def draw_box(axes: Axes, box: Box, colour: str, *, dashed: bool = False) -> None:
    """Draw a box (pixels), cut at the image's edge, with a rim that lifts it from any background."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x0, x1 = np.clip(box[0::2], left, right)
    y0, y1 = np.clip(box[1::2], top, bottom)
    rim = matplotlib.patheffects.withStroke(linewidth=2.9, foreground="black" if dashed else "white")
    patch = Rectangle(
        (x0, y0),
        x1 - x0,
        y1 - y0,
        fill=False,
        edgecolor=colour,
        linewidth=BOX_WIDTH,
        linestyle=(0, (4, 2)) if dashed else "-",
        path_effects=[rim],
        clip_on=False,  # half of a line on the image's edge would be lost
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
