"""Axes of an image and what is laid over it, without all that makes matplotlib's own slow to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backend_bases import RendererBase
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D, Bbox
from numpy.typing import NDArray
from PIL import Image

_COARSE = 3
"""From this many pixels of the figure for one of the image on, pixels are drawn as squares, as matplotlib does."""


class _XAxis(XAxis):
    """Makes no ticks before they are drawn, and they never are."""

    set_clip_path = Artist.set_clip_path


class _YAxis(YAxis):
    """Makes no ticks before they are drawn, and they never are."""

    set_clip_path = Artist.set_clip_path


class Panel(Axes):
    """Axes without ticks, grid and spines, for images that fill them.

    matplotlib makes eight ticks for each of its axes, seen or not: that was a fourth of a figure's time.
    """

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.xaxis.set_visible(False)
        self.yaxis.set_visible(False)
        self.spines[:].set_visible(False)

    def _init_axis(self) -> None:
        """Where matplotlib's own kinds of axes choose theirs, too."""
        self.xaxis = _XAxis(self, clear=False)
        self.yaxis = _YAxis(self, clear=False)

    def grid(self, *args: Any, **kw: Any) -> None:
        """There is none; `Axes.clear` would make the ticks to hide it."""

    def tick_params(self, *args: Any, **kw: Any) -> None:
        """There are none."""


class Pixels(AxesImage):
    """An image put on the very pixels of the figure, at once: matplotlib's way of doing it takes six times as long.

    It lies upright, its first row on top. A map's cells are squares; an image, RGB `[H, W, 3]`, is smoothed.
    """

    def make_image(
        self, renderer: RendererBase, magnification: float = 1.0, unsampled: bool = False
    ) -> tuple[NDArray[np.uint8], float, float, Affine2D]:
        """RGBA `[h, w, 4]` with the lowest row first, and where its lower left corner is."""
        place = Bbox(self.get_window_extent().get_points() * magnification)
        seen = Bbox.intersection(place, Bbox(self.axes.bbox.get_points() * magnification))
        if seen is None:
            return np.zeros((1, 1, 4), np.uint8), 0, 0, Affine2D()
        left, bottom, right, top = (int(edge) for edge in np.floor(np.array(seen.extents) + 0.5))
        size = max(1, right - left), max(1, top - bottom)
        drawn = self._drawn(_share(place, left, bottom, size), size)
        return drawn[::-1], left / magnification, bottom / magnification, Affine2D()

    def _drawn(self, share: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
        """What of the image lies in `share` (x0, y0, x1, y1 from 0 to 1, y downwards), at `size`."""
        values = self.get_array()
        assert values is not None
        h, w = values.shape[:2]
        box = share * [w, h, w, h]
        if values.ndim == 3 and values.shape[2] == 3 and not _is_coarse(box, size):
            return _smooth(np.asarray(values), box, size)
        x0, y0, x1, y1 = box
        columns = np.clip(np.floor(x0 + (np.arange(size[0]) + 0.5) * (x1 - x0) / size[0]), 0, w - 1)
        rows = np.clip(np.floor(y0 + (np.arange(size[1]) + 0.5) * (y1 - y0) / size[1]), 0, h - 1)
        coloured = np.ascontiguousarray(self.to_rgba(values, alpha=self.get_alpha(), bytes=True))
        cells = coloured.view(np.uint32)[..., 0]  # four bytes at a time
        drawn = cells.take(rows.astype(int), axis=0).take(columns.astype(int), axis=1)
        return np.asarray(drawn.view(np.uint8).reshape(*drawn.shape, 4))


def _share(place: Bbox, left: int, bottom: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Which part of an image that is to fill `place` lies on `size` pixels from `left` and `bottom` on."""
    x = (np.array([left, left + size[0]]) - place.x0) / place.width
    y = (place.y1 - np.array([bottom + size[1], bottom])) / place.height
    return np.asarray(np.clip([x[0], y[0], x[1], y[1]], 0, 1))


def _is_coarse(box: NDArray[np.float64], size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    return bool(size[0] >= _COARSE * (x1 - x0) and size[1] >= _COARSE * (y1 - y0))


def _smooth(image: NDArray[np.uint8], box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resampled with the window that matplotlib takes for images, and opaque."""
    x0, y0, x1, y1 = box.tolist()
    resized = Image.fromarray(image).resize(size, Image.Resampling.HAMMING, box=(x0, y0, x1, y1))
    return np.asarray(resized.convert("RGBA"))


def lay(
    axes: Axes,
    values: NDArray[Any],
    box: tuple[float, float, float, float],
    *,
    alpha: NDArray[np.floating] | None = None,
    **how: Any,
) -> Pixels:
    """Lay an image or cells over the region `box` of the axes, y downwards; `how` are options of `AxesImage`."""
    x0, y0, x1, y1 = box
    pixels = Pixels(axes, extent=(x0, x1, y1, y0), **how)
    pixels.set_data(values)
    pixels.set_alpha(alpha)
    pixels.set_clip_path(axes.patch)
    axes.add_image(pixels)
    return pixels
