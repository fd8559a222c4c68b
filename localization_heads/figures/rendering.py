"""A figure as bytes or pixels, laid out once and cut to what is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from localization_heads.figures.style import DPI

MARGIN = 0.05
"""Inches around what is drawn."""


def pixels(figure: Figure, dpi: int) -> NDArray[np.uint8]:
    """The figure as RGB `[H, W, 3]`: it is opaque, so a fourth of its bytes would say nothing."""
    canvas = FigureCanvasAgg(figure)
    rendered(figure, "rgba", dpi)
    return np.asarray(cv2.cvtColor(np.asarray(canvas.renderer.buffer_rgba()), cv2.COLOR_RGBA2RGB), np.uint8)


def rendered(figure: Figure, kind: str, dpi: int = DPI, **options: Any) -> bytes:
    """The figure cut to what is drawn and a margin."""
    buffer = io.BytesIO()
    with _laid_out(figure, dpi):
        figure.savefig(buffer, format=kind, dpi=dpi, bbox_inches=_extent(figure, dpi), **options)
    return buffer.getvalue()


@contextmanager
def _laid_out(figure: Figure, dpi: int) -> Iterator[None]:
    """Nothing left to lay out: matplotlib would draw the figure once more, unseen, to have it done."""
    engine = figure.get_layout_engine()
    if engine is None:
        yield
        return
    with _at_resolution(figure, dpi):
        engine.execute(figure)
    figure.set_layout_engine(None)
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


def _extent(figure: Figure, dpi: int) -> Bbox:
    """What `bbox_inches="tight"` finds out by drawing the figure unseen."""
    with _at_resolution(figure, dpi):
        return Bbox(figure.get_tightbbox(measuring(dpi)).get_points()).padded(MARGIN)


@cache
def measuring(dpi: int) -> RendererAgg:
    """What measures texts at that resolution: matplotlib keeps what one renderer has measured, and many texts recur."""
    return RendererAgg(1, 1, dpi)


@contextmanager
def _at_resolution(figure: Figure, dpi: int) -> Iterator[None]:
    before = figure.dpi
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.dpi = before
