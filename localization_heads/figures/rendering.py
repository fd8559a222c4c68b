"""Rendering figures: to pixels, to PNG, and to SVG for HTML pages.

The layout is computed once per rendering, where matplotlib would draw the figure an extra time. In the SVG text stays
text, marks have tooltips, and a style sheet can change the colours.
"""

from __future__ import annotations

import io
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from localization_heads.figures.style import DPI, FONT, style_lock

MARGIN = 0.05
"""Inches of padding around a rendered figure."""


def render_pixels(figure: Figure, dpi: int) -> NDArray[np.uint8]:
    """The figure as RGB `[H, W, 3]`; figures are opaque, so the alpha channel is dropped."""
    canvas = FigureCanvasAgg(figure)
    render(figure, "rgba", dpi)
    return np.asarray(cv2.cvtColor(np.asarray(canvas.renderer.buffer_rgba()), cv2.COLOR_RGBA2RGB), np.uint8)


def render(figure: Figure, format: str, dpi: int = DPI, **options: Any) -> bytes:
    """The figure in a format of matplotlib, cropped to its content and a margin."""
    buffer = io.BytesIO()
    with _fixed_layout(figure, dpi):
        figure.savefig(buffer, format=format, dpi=dpi, bbox_inches=_tight_bbox(figure, dpi), **options)
    return buffer.getvalue()


@contextmanager
def _fixed_layout(figure: Figure, dpi: int) -> Iterator[None]:
    """Run the layout engine now, and disable it for the context: with one, matplotlib draws the figure twice."""
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


def _tight_bbox(figure: Figure, dpi: int) -> Bbox:
    """The bounding box of `bbox_inches="tight"`, which matplotlib finds by drawing the figure an extra time."""
    with _at_resolution(figure, dpi):
        return Bbox(figure.get_tightbbox(_shared_renderer(dpi)).get_points()).padded(MARGIN)


@cache
def _shared_renderer(dpi: int) -> RendererAgg:
    """A renderer for measuring texts; matplotlib caches text sizes per renderer, and many texts recur."""
    return RendererAgg(1, 1, dpi)


@contextmanager
def _at_resolution(figure: Figure, dpi: int) -> Iterator[None]:
    original = figure.dpi
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.dpi = original


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (
    8,
    2,
    0,
    0,
    0,
)  # bit depth, colour type RGB, default compression and filter methods, not interlaced
_UP_FILTER = 2  # the difference from the byte above: good for images and for flat areas


def encode_png(pixels: NDArray[np.uint8], dpi: int, text: Mapping[str, str], *, compact: bool = False) -> bytes:
    """RGB pixels `[H, W, 3]` as a PNG.

    Args:
        text: text chunks by key, both in Latin-1.
        compact: compress better: a seventh smaller, in twice the time.
    """
    height, width, _ = pixels.shape
    pixels_per_metre = round(dpi / 0.0254)
    rows = _up_filtered(pixels.reshape(height, width * 3))
    return b"".join(
        (
            _PNG_SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *_RGB_8_BIT)),
            _chunk(b"pHYs", struct.pack(">IIB", pixels_per_metre, pixels_per_metre, 1)),
            *(_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in text.items()),
            _chunk(b"IDAT", zlib.compress(rows.data, 6 if compact else 1)),
            _chunk(b"IEND", b""),
        )
    )


def _up_filtered(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The rows after PNG's "up" filter, each after the byte that names the filter."""
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = _UP_FILTER
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


_ID_REFERENCE = re.compile(r"#([\w-]+)")
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_COORDINATES = ("d", "x", "y", "width", "height", "transform")
_REMOVED_TAGS = ("metadata", "style")
_TOOLTIP_PREFIX, _TOOLTIP_SEPARATOR = "tooltips:", "|"


def set_tooltips(artist: Artist, tooltips: Sequence[str]) -> None:
    """Give each mark of a collection or of a line a tooltip, which `svg` writes.

    The tooltips pass through matplotlib in the id of the group of marks.
    """
    if len(tooltips):
        artist.set_gid(_TOOLTIP_PREFIX + _TOOLTIP_SEPARATOR.join(tooltips))


def svg(figure: Figure, name: str, label: str = "") -> str:
    """The figure as one `<svg>` element for an HTML page; the same figure always gives the same text.

    Text stays text, in the page's font; tooltips (`set_tooltips`) become `<title>` elements. Colours and sizes are
    attributes instead of styles, so that a style sheet can change them (for dark mode) with selectors such as
    `[fill="#0072b2"]`, and a content security policy need not allow inline styles.

    Args:
        name: makes the ids unique among the figures of a page.
        label: the `aria-label`, for screen readers.
    """
    for text in (text for axes in figure.axes for text in axes.texts):
        text.set_path_effects([])  # matplotlib would draw the letters as outlines
    with style_lock, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        root = ET.fromstring(render(figure, "svg", DPI, metadata={"Date": None}))
    used_ids = {
        id for element in root.iter() for value in element.attrib.values() for id in _ID_REFERENCE.findall(value)
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if _local_name(child.tag) in _REMOVED_TAGS:
                parent.remove(child)
            elif _local_name(parent.tag) == "defs":
                # Each `<use>` repeats the style, and a style sheet can only change that one.
                child.attrib.pop("style", None)
    for element in root.iter():
        _clean_element(element, used_ids)
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": f"{FONT}, sans-serif"}
    root.attrib |= {"stroke-linejoin": "round", "role": "img", "aria-label": label or name}
    return ET.tostring(root, encoding="unicode")


def _local_name(name: str) -> str:
    """The name of a tag or an attribute without its namespace, which HTML does not need."""
    return name.rpartition("}")[2]


def _clean_element(element: ET.Element, used_ids: set[str]) -> None:
    """Turn styles into attributes and encoded ids into tooltips, and remove unused ids and whitespace."""
    element.tag = _local_name(element.tag)
    values = {_local_name(name): value for name, value in element.attrib.items()}
    styles = (pair.partition(":") for pair in values.pop("style", "").split(";") if pair.strip())
    values |= {key.strip(): value.strip() for key, _, value in styles if key.strip() != "font-family"}
    # matplotlib 3.8 writes the shorthand `font: 700 10px 'DejaVu Sans'`, which is not an attribute in SVG.
    if font := values.pop("font", ""):
        *words, size = font.partition("px")[0].split()
        values |= {"font-weight" if word.isdigit() else "font-style": word for word in words}
        values["font-size"] = f"{size}px"
    if values.get("id") not in used_ids and (id := values.pop("id", "")).startswith(_TOOLTIP_PREFIX):
        _add_tooltips(element, id.removeprefix(_TOOLTIP_PREFIX).split(_TOOLTIP_SEPARATOR))
    element.attrib = {
        key: _shorten_numbers(value) if key in _COORDINATES else value
        for key, value in values.items()
        if not value.startswith("rotate(-0 ")
    }
    element.tail = None
    if not (element.text or "").strip():
        element.text = None


def _shorten_numbers(coordinates: str) -> str:
    """The coordinates rounded to hundredths of a point, and separated by single spaces."""
    return " ".join(_LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", coordinates).split())


def _add_tooltips(group: ET.Element, tooltips: Sequence[str]) -> None:
    """Add a `<title>` to each mark of the group: to its `<use>` elements or, if it has none, to its paths."""
    definitions = {
        id(element) for parent in group.iter() if _local_name(parent.tag) == "defs" for element in parent.iter()
    }
    drawn = [element for element in group.iter() if id(element) not in definitions]
    marks = [element for element in drawn if _local_name(element.tag) == "use"]
    marks = marks or [element for element in drawn if _local_name(element.tag) == "path"]
    for mark, tooltip in zip(marks, tooltips, strict=True):
        ET.SubElement(mark, "title").text = tooltip
