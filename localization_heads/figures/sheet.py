"""The sheet that figures are drawn on: its panels, what is laid over them, the strips around them, and its file.

A figure is drawn once: its file says what it was made of, and a rerun on the same inputs leaves it as it is.
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

from localization_heads.figures.rendering import pixels, png, rendered, svg
from localization_heads.figures.style import COLOUR_MAP, DPI, TITLE_SIZE, as_typed, wrap
from localization_heads.store.files import write_bytes
from localization_heads.version import __version__

KEY = "Inputs"
"""Of the text in a PNG that says what the figure was made of."""
made_of: ContextVar[str] = ContextVar("made_of", default="")


def plot_once(
    plot: Callable[..., Figure], *inputs: object, path: Path, always: bool = False, **named: object
) -> Figure | None:
    """`plot(*inputs, path=path, **named)`; None where the PNG at `path` was made of the same inputs by the same code.

    The file itself says so: times of change say nothing of inputs.

    Args:
        always: draw in any case, for a figure that will be shown.
    """
    digest = hashlib.sha256(_code())
    _feed(
        digest,
        [
            plot.__name__,
            sorted({font.name for font in font_manager.fontManager.ttflist}),
            inputs,
            sorted(named.items()),
        ],
    )
    inputs_digest = digest.hexdigest()
    if not always and _is_made_of(path, inputs_digest):
        return None
    token = made_of.set(inputs_digest)
    try:
        return plot(*inputs, path=path, **named)
    finally:
        made_of.reset(token)


@cache
def _code() -> bytes:
    """What draws, as far as it may change."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    own = b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(f"{__version__} {matplotlib.__version__} ".encode() + own).digest()


def _is_made_of(path: Path, made_of: str) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
            file.seek(-12, io.SEEK_END)
            return made_of.encode() in beginning and b"IEND" in file.read()
    except OSError:
        return False


def _feed(digest: Any, value: object) -> None:
    """Add a value, with what it consists of, so that other values leave another digest."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode())
        digest.update(value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, [(field.name, getattr(value, field.name)) for field in fields(value)])
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{value!r};".encode())


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


log = logging.getLogger(__name__)

_MAX_BYTES = 1_000_000


def new_figure(width: float, height: float) -> Figure:
    """An empty chart of `width x height` inches that pyplot knows nothing of."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write the figure in one step (no reader sees half a file) and hand it back; `None` writes nothing.

    Photographs compress badly: a figure over 1 MB is drawn again at the resolution that keeps it below.
    """
    if path is None:
        return figure
    path = Path(path)
    kind = path.suffix[1:].lower() or "png"
    if kind == "svg":
        write_bytes(path, svg(figure, path.stem).encode())
    else:
        write_bytes(path, _png(figure) if kind == "png" else rendered(figure, kind))
    return figure


def _png(figure: Figure) -> bytes:
    content = _packed(drawn := pixels(figure, DPI), DPI)
    if len(content) > _MAX_BYTES:
        content = _packed(drawn, DPI, well=True)
    if len(content) > _MAX_BYTES:
        # the size of a photograph goes with its pixels, and small ones compress a little worse
        dpi = int(DPI * math.sqrt(0.65 * _MAX_BYTES / len(content)))
        content = _packed(pixels(figure, dpi), dpi, well=True)
    return content


def _packed(drawn: NDArray[np.uint8], dpi: int, *, well: bool = False) -> bytes:
    """Quickly where that is small enough: half of a figure's time went into the last tenth of its bytes."""
    said = {"Software": f"Matplotlib {matplotlib.__version__}"}
    if inputs_digest := made_of.get():
        said[KEY] = inputs_digest
    return png(drawn, dpi, said, well=well)


_WINDOWLESS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


def show(*figures: Figure) -> bool:
    """Open each figure in a window and wait until all are closed; without a display say so in one log line.

    Returns:
        Whether there were windows.
    """
    try:
        import matplotlib.pyplot as plt

        backend = plt.get_backend()
        if backend.lower() in _WINDOWLESS:
            raise RuntimeError(f"matplotlib's backend here is '{backend}', which opens none")
        windows = [plt.figure(figsize=figure.get_size_inches()) for figure in figures]
        for window, figure in zip(windows, figures, strict=True):
            # pyplot shows only figures of its own making: ours moves into the window of an empty one
            canvas = window.canvas
            canvas.figure = figure
            figure.set_canvas(canvas)
        plt.show()
        for figure in figures:
            plt.close(figure)
    except Exception as error:  # each toolkit fails in its own way, and the figures are on disk all the same
        log.warning("show_plot: no window can be opened (%s)", error)
        return False
    return True


_PAGE = 9.9  # inches: the width a sheet may take
_NARROWEST = 1.75  # inches: `L14H24  S 0.41  H 0.00` on one line
_TALLEST = 2.9  # inches: a panel of a small area
_GAP = 0.06  # inches between columns
_NOTE_SIZE = 7.5  # points
_PANEL_TITLE, _COLOUR_BAR, _LEGEND = 0.22, 0.2, 0.2  # inches high


def panel_size(image_size: tuple[int, int], area: float, *, widest: float = math.inf) -> tuple[float, float]:
    """Width and height in inches of a panel of `area` square inches for an image of `(W, H)` pixels.

    Panels are made as wide as their titles where that does not make them too tall. Beyond 4:1 the panel
    keeps its shape and the image leaves some of it blank.
    """
    aspect = min(4.0, max(0.25, image_size[0] / image_size[1]))
    width = min(max(math.sqrt(area * aspect), min(_NARROWEST, _TALLEST * aspect)), widest)
    return width, width / aspect


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
        title: what a person typed; wrapped to the width, one strip a line.
        titled: whether each panel has a title of its own.
        legend: entries of the legend at the bottom.
        bar: states how maps are coloured, given how opaque each share of the maximum is drawn.
        note: a remark below the panels.
    """
    width = max(size[0], _NARROWEST) + _GAP
    rows = max(1, math.ceil(panels / max(1, _PAGE // width)))
    columns = max(1, math.ceil(panels / rows))
    sheet = max(width * columns, 3.6)
    lines = wrap(title, sheet - 0.1, TITLE_SIZE)
    head = (lines.count("\n") + 1) * TITLE_SIZE * 1.25 / 72 + 0.06 if lines else 0.0
    remark = wrap(note, sheet - 0.1, _NOTE_SIZE)
    below = (remark.count("\n") + 1) * _NOTE_SIZE * 1.25 / 72 if remark else 0.0
    foot = _LEGEND * bool(legend) + _COLOUR_BAR * (bar is not None) + below
    row = size[1] + (_PANEL_TITLE if titled else _GAP)
    figure = Figure(figsize=(sheet, head + row * rows + foot + 0.05))
    figure.suptitle(lines, y=1, va="top", fontsize=TITLE_SIZE, linespacing=1.2, **as_typed(lines))
    axes = []
    for n in range(panels):
        middle = sheet / 2 + width * (n % columns - (columns - 1) / 2)
        bottom = foot + 0.05 + row * (rows - 1 - n // columns)
        axes.append(_axes_at(figure, middle - size[0] / 2, bottom, *size))
    if legend:
        figure.legend(
            handles=legend, loc="lower center", ncols=len(legend), handlelength=2.8, borderaxespad=0
        )
    if bar is not None:
        _colour_bar(figure, sheet, _LEGEND * bool(legend), bar)
    if remark:
        bottom = (foot - below) / figure.get_size_inches()[1]
        figure.text(0.5, bottom, remark, ha="center", va="bottom", fontsize=_NOTE_SIZE, linespacing=1.2)
    return figure, axes


def _axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the bottom left corner."""
    W, H = figure.get_size_inches()
    return figure.add_axes(Panel(figure, (left / W, bottom / H, width / W, height / H)))


def _colour_bar(
    figure: Figure,
    sheet: float,
    bottom: float,
    opacity: Callable[[NDArray[np.floating]], NDArray[np.floating]],
) -> None:
    """State how all maps are coloured: each from 0, which lets the image through, to its own maximum."""
    width = min(2.0, sheet * 0.3)
    axes = _axes_at(figure, (sheet - width) / 2 - 0.1, bottom + 0.09, width, 0.08)
    shares = np.linspace(0, 1, 256)[None]
    lay(axes, shares, (0, 0, 1, 1), cmap=COLOUR_MAP, norm=Normalize(0, 1), alpha=opacity(shares))
    axes.text(-0.03, 0.45, "attention: 0", transform=axes.transAxes, ha="right", va="center")
    axes.text(1.03, 0.45, "each map's maximum", transform=axes.transAxes, ha="left", va="center")
