"""The sheet a figure is drawn on: its style, its colours, how it gets onto the disk and onto the screen."""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

from localization_heads.figures.text import font_families
from localization_heads.store.atomic import write_bytes

log = logging.getLogger(__name__)

# Okabe and Ito's palette, which the common colour blindnesses keep apart
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8C8C8C"
COLOUR_MAP = "viridis"
TITLE_SIZE = 10.0  # points
DPI = 200

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # conferences refuse the Type 3 fonts that matplotlib embeds by default
}
_MAX_BYTES = 1_000_000

# rcParams belong to the process: figures of ours drawn in several threads take turns with them.
_style_lock = threading.RLock()


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and our style, whatever the user's matplotlibrc says."""
    with _style_lock, matplotlib.style.context(["default", {**_STYLE, "font.family": list(font_families())}]):
        yield


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
    content = _rendered(figure, kind, DPI)
    if len(content) > _MAX_BYTES and kind == "png":
        # the size of a photograph goes with its pixels, and small ones compress a little worse
        content = _rendered(figure, kind, int(DPI * math.sqrt(0.65 * _MAX_BYTES / len(content))))
    write_bytes(path, content)
    return figure


def _rendered(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.05)
    return buffer.getvalue()


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
