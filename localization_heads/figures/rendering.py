"""A figure as bytes: laid out once, as PNG, and as SVG for an HTML page.

In the SVG text stays text, marks carry tooltips, and a style sheet can change the colours.
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


_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS_OF_8_BITS = 8, 2, 0, 0, 0  # bits, RGB, the only packing, the only set of filters, not interlaced
_UP = 2  # the filter that keeps each byte's difference from the one above: good for images and for flat areas


def png(pixels: NDArray[np.uint8], dpi: int, text: Mapping[str, str], *, well: bool = False) -> bytes:
    """RGB `[H, W, 3]` as a PNG.

    Args:
        text: keys and what they say, both in Latin letters.
        well: a seventh smaller, in twice the time.
    """
    height, width, _ = pixels.shape
    metres = round(dpi / 0.0254)
    said = (_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in text.items())
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *_COLOURS_OF_8_BITS)),
            _chunk(b"pHYs", struct.pack(">IIB", metres, metres, 1)),
            *said,
            _chunk(
                b"IDAT", zlib.compress(_filtered(pixels.reshape(height, width * 3)).data, 6 if well else 1)
            ),
            _chunk(b"IEND", b""),
        )
    )


def _filtered(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each row behind the number of its filter, less the row above it."""
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


_ID = re.compile(r"#([\w-]+)")
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_PLACES = ("d", "x", "y", "width", "height", "transform")
_LEFT_OUT = ("metadata", "style")
_TOLD, _BETWEEN = "tooltips:", "|"  # they travel through matplotlib in the id of the group of marks


def tell(artist: Artist, tooltips: Sequence[str]) -> None:
    """Give each mark of a collection, or of a line, what is said of it where the figure is an SVG."""
    if len(tooltips):
        artist.set_gid(_TOLD + _BETWEEN.join(tooltips))


def svg(figure: Figure, name: str, label: str = "") -> str:
    """The figure as one `<svg>` element for an HTML page: the same figure always gives the same text.

    Text stays text, in the page's font; tooltips (`tell`) become `<title>` elements. Colours and sizes are
    attributes, none is a style: a page's style sheet can change them (for a dark scheme) with selectors such as
    `[fill="#0072b2"]`, and its content security policy need not allow styles of elements.

    Args:
        name: makes the ids inside differ from those of the page's other figures.
        label: what the figure shows, for those who do not see it.
    """
    for text in (text for axes in figure.axes for text in axes.texts):
        text.set_path_effects([])  # matplotlib would draw the letters as outlines
    with style_lock, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        root = ET.fromstring(rendered(figure, "svg", DPI, metadata={"Date": None}))
    used = {id for element in root.iter() for value in element.attrib.values() for id in _ID.findall(value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _LEFT_OUT:
                parent.remove(child)
            elif _local(parent.tag) == "defs":
                child.attrib.pop("style", None)  # each use says it anew, and a style sheet reaches only that
    for element in root.iter():
        _tidy(element, used)
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": f"{FONT}, sans-serif"}
    root.attrib |= {"stroke-linejoin": "round", "role": "img", "aria-label": label or name}
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A tag or an attribute without its namespace, which HTML does not need."""
    return name.rpartition("}")[2]


def _tidy(element: ET.Element, used: set[str]) -> None:
    """Tooltips where a group's id holds them, attributes in place of styles, no id that nothing refers to."""
    element.tag = _local(element.tag)
    values = {_local(name): value for name, value in element.attrib.items()}
    styles = (pair.partition(":") for pair in values.pop("style", "").split(";") if pair.strip())
    values |= {key.strip(): value.strip() for key, _, value in styles if key.strip() != "font-family"}
    # `700 10px 'DejaVu Sans'`, as matplotlib 3.8 has it: SVG knows its parts alone
    if font := values.pop("font", ""):
        *words, size = font.partition("px")[0].split()
        values |= {"font-weight" if word.isdigit() else "font-style": word for word in words}
        values["font-size"] = f"{size}px"
    if values.get("id") not in used and (id := values.pop("id", "")).startswith(_TOLD):
        _add_titles(element, id.removeprefix(_TOLD).split(_BETWEEN))
    element.attrib = {
        key: _short(value) if key in _PLACES else value
        for key, value in values.items()
        if not value.startswith("rotate(-0 ")
    }
    element.tail = None
    if not (element.text or "").strip():
        element.text = None


def _short(places: str) -> str:
    """Hundredths of a point, single spaces."""
    return " ".join(_LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", places).split())


def _add_titles(group: ET.Element, tooltips: Sequence[str]) -> None:
    defined = {id(part) for parent in group.iter() if _local(parent.tag) == "defs" for part in parent.iter()}
    parts = [part for part in group.iter() if id(part) not in defined]
    marks = [part for part in parts if _local(part.tag) == "use"]
    marks = marks or [part for part in parts if _local(part.tag) == "path"]
    for mark, tooltip in zip(marks, tooltips, strict=True):
        ET.SubElement(mark, "title").text = tooltip
