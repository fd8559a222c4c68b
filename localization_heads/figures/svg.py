"""A figure as SVG for an HTML page: text stays text, marks carry tooltips, a style sheet can change the colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from localization_heads.figures.letters import FONT
from localization_heads.figures.rendering import rendered
from localization_heads.figures.style import DPI, style_lock

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
