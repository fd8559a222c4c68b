"""How every figure looks: palette, sizes, and matplotlib's settings, whatever the user's matplotlibrc says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style

from localization_heads.figures.letters import FONT

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
    "axes.titley": 1.0,  # where matplotlib would find it has to be after measuring the ticks
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # conferences refuse the Type 3 fonts that matplotlib embeds by default
}

# rcParams belong to the process: figures of ours drawn in several threads take turns with them.
style_lock = threading.RLock()


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and our style, whatever the user's matplotlibrc says."""
    with style_lock, matplotlib.style.context(["default", {**_STYLE, "font.family": [FONT]}]):
        yield
