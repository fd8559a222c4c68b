"""Sheets of image panels, images drawn on them pixel by pixel, and the files of figures.

`plot_once` draws a figure only if its file was not made from the same inputs, of which the PNG contains a digest.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.transforms import Affine2D, Bbox
from numpy.typing import NDArray
from PIL import Image

from localization_heads.figures.rendering import encode_png, render, render_pixels, svg
from localization_heads.figures.style import COLOUR_MAP, DPI, TITLE_SIZE, user_text_style, wrap
from localization_heads.store.files import write_bytes
from localization_heads.version import __version__

log = logging.getLogger(__name__)

DIGEST_KEY = "Inputs"
"""The key of the PNG text chunk with the digest of the figure's inputs."""
current_digest: ContextVar[str] = ContextVar("current_digest", default="")
"""The digest that `save` writes, set by `plot_once`."""
_MAX_BYTES = 1_000_000
_NON_INTERACTIVE = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
_MAX_WIDTH = 9.9  # inches, of a sheet
_MIN_PANEL_WIDTH = 1.75  # inches: the title `L14H24  S 0.41  H 0.00` fits on one line
_MAX_WIDENED_HEIGHT = 2.9  # inches: a panel is not widened for its title beyond this height
_GAP = 0.06  # inches between columns
_NOTE_SIZE = 7.5  # points
_PANEL_TITLE, _COLOUR_BAR, _LEGEND = 0.22, 0.2, 0.2  # inches high
MIN_UPSAMPLING = 3
"""Images that are enlarged at least this much are drawn with square pixels, not interpolated, as in matplotlib."""


def plot_once(
    plot: Callable[..., Figure], *inputs: object, path: Path, always: bool = False, **named: object
) -> Figure | None:
    """`plot(*inputs, path=path, **named)`; None if the PNG at `path` was made from the same inputs by the same code.

    Args:
        always: draw in any case, for a figure that will be shown.
    """
    digest = hashlib.sha256(_code_digest())
    _update_digest(
        digest,
        [
            plot.__name__,
            sorted({font.name for font in font_manager.fontManager.ttflist}),
            inputs,
            sorted(named.items()),
        ],
    )
    inputs_digest = digest.hexdigest()
    if not always and _contains_digest(path, inputs_digest):
        return None
    token = current_digest.set(inputs_digest)
    try:
        return plot(*inputs, path=path, **named)
    finally:
        current_digest.reset(token)


@cache
def _code_digest() -> bytes:
    """The digest of the drawing code: of this package's sources and of the versions."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    sources = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(f"{__version__} {matplotlib.__version__} ".encode() + sources).digest()


def _contains_digest(path: Path, digest: str) -> bool:
    """Whether there is a complete PNG with that digest."""
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
            file.seek(-12, io.SEEK_END)
            return digest.encode() in beginning and b"IEND" in file.read()
    except OSError:
        return False


def _update_digest(digest: Any, value: object) -> None:
    """Update the digest with a value and, recursively, with its fields or items."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode())
        digest.update(value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _update_digest(digest, [(field.name, getattr(value, field.name)) for field in fields(value)])
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _update_digest(digest, item)
    else:
        digest.update(f"{value!r};".encode())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width x height` inches with constrained layout, not registered with pyplot."""
    return Figure(figsize=(width, height), layout="constrained")


def new_sheet(
    size: tuple[float, float],
    panels: int,
    title: str,
    *,
    titled: bool = True,
    legend: Sequence[Line2D] = (),
    bar: Callable[[NDArray[np.floating]], NDArray[np.floating]] | None = None,
    note: str = "",
) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` empty axes of `size` inches, in rows of even length.

    Args:
        title: user text, wrapped to the width of the sheet.
        titled: whether each panel has a title of its own.
        legend: entries of the legend at the bottom.
        bar: the opacity of a map by its share of the maximum, for a colour bar at the bottom; None draws none.
        note: a remark below the panels.
    """
    width = max(size[0], _MIN_PANEL_WIDTH) + _GAP
    rows = max(1, math.ceil(panels / max(1, _MAX_WIDTH // width)))
    columns = max(1, math.ceil(panels / rows))
    sheet_width = max(width * columns, 3.6)
    lines = wrap(title, sheet_width - 0.1, TITLE_SIZE)
    head = (lines.count("\n") + 1) * TITLE_SIZE * 1.25 / 72 + 0.06 if lines else 0.0
    note_lines = wrap(note, sheet_width - 0.1, _NOTE_SIZE)
    note_height = (note_lines.count("\n") + 1) * _NOTE_SIZE * 1.25 / 72 if note_lines else 0.0
    foot = _LEGEND * bool(legend) + _COLOUR_BAR * (bar is not None) + note_height
    row_height = size[1] + (_PANEL_TITLE if titled else _GAP)
    figure = Figure(figsize=(sheet_width, head + row_height * rows + foot + 0.05))
    figure.suptitle(lines, y=1, va="top", fontsize=TITLE_SIZE, linespacing=1.2, **user_text_style(lines))
    axes = []
    for n in range(panels):
        centre = sheet_width / 2 + width * (n % columns - (columns - 1) / 2)
        bottom = foot + 0.05 + row_height * (rows - 1 - n // columns)
        axes.append(_add_panel(figure, centre - size[0] / 2, bottom, *size))
    if legend:
        figure.legend(handles=legend, loc="lower center", ncols=len(legend), handlelength=2.8, borderaxespad=0)
    if bar is not None:
        _draw_colour_bar(figure, sheet_width, _LEGEND * bool(legend), bar)
    if note_lines:
        bottom = (foot - note_height) / figure.get_size_inches()[1]
        figure.text(0.5, bottom, note_lines, ha="center", va="bottom", fontsize=_NOTE_SIZE, linespacing=1.2)
    return figure, axes


def panel_size(image_size: tuple[int, int], area: float, *, widest: float = math.inf) -> tuple[float, float]:
    """Width and height in inches of a panel of `area` square inches for an image of `(W, H)` pixels.

    Panels are at least as wide as their titles, unless that makes them too tall. The aspect ratio is limited to 4:1;
    a longer image leaves part of its panel blank.
    """
    aspect = min(4.0, max(0.25, image_size[0] / image_size[1]))
    width = min(max(math.sqrt(area * aspect), min(_MIN_PANEL_WIDTH, _MAX_WIDENED_HEIGHT * aspect)), widest)
    return width, width / aspect


def _add_panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add a panel at a position in inches from the bottom left corner."""
    W, H = figure.get_size_inches()
    return figure.add_axes(Panel(figure, (left / W, bottom / H, width / W, height / H)))


def _draw_colour_bar(
    figure: Figure,
    sheet_width: float,
    bottom: float,
    opacity: Callable[[NDArray[np.floating]], NDArray[np.floating]],
) -> None:
    """Draw the colour bar of all maps: from 0, where the image shows through, to the maximum of each map."""
    width = min(2.0, sheet_width * 0.3)
    axes = _add_panel(figure, (sheet_width - width) / 2 - 0.1, bottom + 0.09, width, 0.08)
    shares = np.linspace(0, 1, 256)[None]
    draw_pixels(axes, shares, (0, 0, 1, 1), cmap=COLOUR_MAP, norm=Normalize(0, 1), alpha=opacity(shares))
    axes.text(-0.03, 0.45, "attention: 0", transform=axes.transAxes, ha="right", va="center")
    axes.text(1.03, 0.45, "each map's maximum", transform=axes.transAxes, ha="left", va="center")


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure atomically, unless `path` is None, and return it.

    A PNG over 1 MB, as photographs make it, is drawn again at a lower resolution that keeps it below.
    """
    if path is None:
        return figure
    path = Path(path)
    format = path.suffix[1:].lower() or "png"
    if format == "svg":
        write_bytes(path, svg(figure, path.stem).encode())
    else:
        write_bytes(path, _small_png(figure) if format == "png" else render(figure, format))
    return figure


def _small_png(figure: Figure) -> bytes:
    """A PNG of at most `_MAX_BYTES`.

    Fast compression comes first: half of a figure's time went into the last tenth of its bytes.
    """
    content = _encode(pixels := render_pixels(figure, DPI), DPI)
    if len(content) > _MAX_BYTES:
        content = _encode(pixels, DPI, compact=True)
    if len(content) > _MAX_BYTES:
        # The bytes of a photograph are about proportional to its pixels; small ones compress slightly worse.
        dpi = int(DPI * math.sqrt(0.65 * _MAX_BYTES / len(content)))
        content = _encode(render_pixels(figure, dpi), dpi, compact=True)
    return content


def _encode(pixels: NDArray[np.uint8], dpi: int, *, compact: bool = False) -> bytes:
    text = {"Software": f"Matplotlib {matplotlib.__version__}"}
    if digest := current_digest.get():
        text[DIGEST_KEY] = digest
    return encode_png(pixels, dpi, text, compact=compact)


def show(*figures: Figure) -> bool:
    """Open each figure in a window and wait until all are closed; without a display, log a warning.

    Returns:
        Whether windows were opened.
    """
    try:
        import matplotlib.pyplot as plt

        backend = plt.get_backend()
        if backend.lower() in _NON_INTERACTIVE:
            raise RuntimeError(f"matplotlib's backend here is '{backend}', which opens none")
        windows = [plt.figure(figsize=figure.get_size_inches()) for figure in figures]
        for window, figure in zip(windows, figures, strict=True):
            # pyplot only shows figures that it created: put ours into the window of an empty one.
            canvas = window.canvas
            canvas.figure = figure
            figure.set_canvas(canvas)
        plt.show()
        for figure in figures:
            plt.close(figure)
    except Exception as error:  # each GUI toolkit raises its own errors, and the figures are on disk anyway
        log.warning("show_plot: no window can be opened (%s)", error)
        return False
    return True


def draw_pixels(
    axes: Axes,
    values: NDArray[Any],
    box: tuple[float, float, float, float],
    *,
    alpha: NDArray[np.floating] | None = None,
    **options: Any,
) -> PixelImage:
    """Draw an image or cells over the region `box` of the axes, y downwards; `options` are those of `AxesImage`."""
    x0, y0, x1, y1 = box
    image = PixelImage(axes, extent=(x0, x1, y1, y0), **options)
    image.set_data(values)
    image.set_alpha(alpha)
    image.set_clip_path(axes.patch)
    axes.add_image(image)
    return image


class PixelImage(AxesImage):
    """An image that is resampled directly to the figure's pixels, six times faster than matplotlib does it.

    The first row is on top. The cells of a map are drawn as squares; an image, RGB `[H, W, 3]`, is interpolated.
    """

    def make_image(
        self, renderer: RendererBase, magnification: float = 1.0, unsampled: bool = False
    ) -> tuple[NDArray[np.uint8], float, float, Affine2D]:
        """RGBA `[h, w, 4]` with the bottom row first, and the position of its lower left corner."""
        extent = Bbox(self.get_window_extent().get_points() * magnification)
        visible = Bbox.intersection(extent, Bbox(self.axes.bbox.get_points() * magnification))
        if visible is None:
            return np.zeros((1, 1, 4), np.uint8), 0, 0, Affine2D()
        left, bottom, right, top = (int(edge) for edge in np.floor(np.array(visible.extents) + 0.5))
        size = max(1, right - left), max(1, top - bottom)
        pixels = self._pixels_of(_relative_box(extent, left, bottom, size), size)
        return pixels[::-1], left / magnification, bottom / magnification, Affine2D()

    def _pixels_of(self, relative_box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
        """The part of the image in a box (x0, y0, x1, y1 from 0 to 1, y downwards), resampled to `size`."""
        values = self.get_array()
        assert values is not None
        h, w = values.shape[:2]
        box = relative_box * [w, h, w, h]
        if values.ndim == 3 and values.shape[2] == 3 and not _is_enlarged(box, size):
            return _interpolate(np.asarray(values), box, size)
        x0, y0, x1, y1 = box
        columns = np.clip(np.floor(x0 + (np.arange(size[0]) + 0.5) * (x1 - x0) / size[0]), 0, w - 1)
        rows = np.clip(np.floor(y0 + (np.arange(size[1]) + 0.5) * (y1 - y0) / size[1]), 0, h - 1)
        coloured = np.ascontiguousarray(self.to_rgba(values, alpha=self.get_alpha(), bytes=True))
        cells = coloured.view(np.uint32)[..., 0]  # four bytes at a time
        taken = cells.take(rows.astype(int), axis=0).take(columns.astype(int), axis=1)
        return np.asarray(taken.view(np.uint8).reshape(*taken.shape, 4))


def _relative_box(extent: Bbox, left: int, bottom: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """The box of `size` pixels at `left` and `bottom`, relative to an image that fills `extent`."""
    x = (np.array([left, left + size[0]]) - extent.x0) / extent.width
    y = (extent.y1 - np.array([bottom + size[1], bottom])) / extent.height
    return np.asarray(np.clip([x[0], y[0], x[1], y[1]], 0, 1))


def _is_enlarged(box: NDArray[np.float64], size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    return bool(size[0] >= MIN_UPSAMPLING * (x1 - x0) and size[1] >= MIN_UPSAMPLING * (y1 - y0))


def _interpolate(image: NDArray[np.uint8], box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The box of the image resampled with the filter that matplotlib uses for images, as opaque RGBA."""
    x0, y0, x1, y1 = box.tolist()
    resized = Image.fromarray(image).resize(size, Image.Resampling.HAMMING, box=(x0, y0, x1, y1))
    return np.asarray(resized.convert("RGBA"))


class _XAxis(XAxis):
    """An invisible x-axis: its `set_clip_path` does not clip ticks, which would create them."""

    set_clip_path = Artist.set_clip_path


class _YAxis(YAxis):
    """An invisible y-axis: its `set_clip_path` does not clip ticks, which would create them."""

    set_clip_path = Artist.set_clip_path


class Panel(Axes):
    """Axes without ticks, grid and spines, for images that fill them.

    matplotlib creates eight ticks for every axis, visible or not, which took a fourth of a figure's time.
    """

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.xaxis.set_visible(False)
        self.yaxis.set_visible(False)
        self.spines[:].set_visible(False)

    def _init_axis(self) -> None:
        """Overrides the hook with which matplotlib's own projections choose their axes."""
        self.xaxis = _XAxis(self, clear=False)
        self.yaxis = _YAxis(self, clear=False)

    def grid(self, *args: Any, **kw: Any) -> None:
        """Do nothing: `Axes.clear` would create the ticks in order to hide the grid."""

    def tick_params(self, *args: Any, **kw: Any) -> None:
        """Do nothing: there are no ticks."""
