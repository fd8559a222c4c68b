"""The sheet that every figure is drawn on: its style, its fonts, the strips around its panels, its file."""

from __future__ import annotations

import bisect
import hashlib
import io
import logging
import math
import re
import threading
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from localization_heads.figures.panels import Panel, lay
from localization_heads.figures.png import png
from localization_heads.store.files import write_bytes
from localization_heads.version import __version__

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
    "axes.titley": 1.0,  # where matplotlib would find it has to be after measuring the ticks
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # conferences refuse the Type 3 fonts that matplotlib embeds by default
}
_MAX_BYTES = 1_000_000
_MARGIN = 0.05  # inches around what is drawn

# rcParams belong to the process: figures of ours drawn in several threads take turns with them.
_style_lock = threading.RLock()


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and our style, whatever the user's matplotlibrc says."""
    with _style_lock, matplotlib.style.context(["default", {**_STYLE, "font.family": [_FONT]}]):
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
    if kind == "svg":
        write_bytes(path, svg(figure, path.stem).encode())
    else:
        write_bytes(path, _png(figure) if kind == "png" else _rendered(figure, kind))
    return figure


def _png(figure: Figure) -> bytes:
    content = _packed(pixels := _pixels(figure, DPI), DPI)
    if len(content) > _MAX_BYTES:
        content = _packed(pixels, DPI, well=True)
    if len(content) > _MAX_BYTES:
        # the size of a photograph goes with its pixels, and small ones compress a little worse
        dpi = int(DPI * math.sqrt(0.65 * _MAX_BYTES / len(content)))
        content = _packed(_pixels(figure, dpi), dpi, well=True)
    return content


def _packed(pixels: NDArray[np.uint8], dpi: int, *, well: bool = False) -> bytes:
    """Quickly where that is small enough: half of a figure's time went into the last tenth of its bytes."""
    said = {"Software": f"Matplotlib {matplotlib.__version__}"}
    if made_of := _made_of.get():
        said[_KEY] = made_of
    return png(pixels, dpi, said, well=well)


def _pixels(figure: Figure, dpi: int) -> NDArray[np.uint8]:
    """The figure as RGB `[H, W, 3]`: it is opaque, so a fourth of its bytes would say nothing."""
    canvas = FigureCanvasAgg(figure)
    _rendered(figure, "rgba", dpi)
    return np.ascontiguousarray(np.asarray(canvas.renderer.buffer_rgba())[..., :3])


def _rendered(figure: Figure, kind: str, dpi: int = DPI, **options: Any) -> bytes:
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


_KEY = "Inputs"
"""Of the text in a PNG that says what the figure was made of."""
_made_of: ContextVar[str] = ContextVar("made_of", default="")


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
    made_of = digest.hexdigest()
    if not always and _is_made_of(path, made_of):
        return None
    token = _made_of.set(made_of)
    try:
        return plot(*inputs, path=path, **named)
    finally:
        _made_of.reset(token)


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


def _extent(figure: Figure, dpi: int) -> Bbox:
    """What `bbox_inches="tight"` finds out by drawing the figure unseen."""
    with _at_resolution(figure, dpi):
        return Bbox(figure.get_tightbbox(RendererAgg(1, 1, dpi)).get_points()).padded(_MARGIN)


@contextmanager
def _at_resolution(figure: Figure, dpi: int) -> Iterator[None]:
    before = figure.dpi
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.dpi = before


# ------------------------------------------------------------------------------------- texts that people typed

_FONT = "DejaVu Sans"
"""Comes with matplotlib; has Latin, Greek, Cyrillic, Arabic and most signs, but no CJK and no Devanagari."""
_TOFU = "\N{WHITE SQUARE}"


@lru_cache(maxsize=1)
def _fonts() -> tuple[tuple[str, ...], NDArray[np.int16]]:
    """Names of the installed fonts, and for each code point the first of them that has it, -1 for none.

    Every font is opened once, when a text first needs more than `_FONT` has.
    """
    names: list[str] = []
    first = np.full(0x110000, -1, dtype=np.int16)
    for entry in sorted(font_manager.fontManager.ttflist, key=_plainness):
        if entry.name in names or entry.name.startswith((".", "Last")):  # macOS: boxes for every code point
            continue
        try:
            codes = np.array(list(font_manager.get_font(entry.fname).get_charmap()), dtype=np.int64)
        except (OSError, RuntimeError):  # it was removed, or is broken
            continue
        first[codes[first[codes] < 0]] = len(names)
        names.append(entry.name)
    return tuple(names), first


def _plainness(entry: FontEntry) -> tuple[bool, bool, bool, bool, str]:
    """What decides which font draws a letter that several have: `_FONT`, then upright regular sans-serif ones."""
    regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
    return entry.name != _FONT, not regular, "Sans" not in entry.name, "Mono" in entry.name, entry.name


@lru_cache(maxsize=1)
def _own_letters() -> frozenset[int]:
    path = font_manager.findfont(FontProperties(family=[_FONT]))
    return frozenset(font_manager.get_font(path).get_charmap())


def _font_of(character: str) -> str | None:
    """The font that draws a character, None where no installed one has it."""
    if ord(character) in _own_letters():
        return _FONT
    names, first = _fonts()
    return names[number] if (number := int(first[ord(character)])) >= 0 else None


def font_families(text: str) -> list[str]:
    """The fonts that draw `text`, in matplotlib's order of fallback: `_FONT`, then others for letters it lacks."""
    fonts = map(_font_of, text)
    return list(dict.fromkeys([_FONT, *(font for font in fonts if font)]))


def as_typed(text: str) -> dict[str, Any]:
    """How matplotlib draws a `drawable` text: in fonts that have its letters, without reading it as mathematics."""
    return {"fontfamily": font_families(text), "parse_math": False}


def drawable(text: str) -> str:
    """`text` on one line, a white square where no font has the glyph (matplotlib would warn at each draw).

    >>> drawable("a  cat\\non the\\tmat")
    'a cat on the mat'
    """
    glyphs = (_glyph(character) for character in unicodedata.normalize("NFC", text))
    return " ".join("".join(glyphs).split())


def _glyph(character: str) -> str:
    """The character, or what stands for it: a space for control characters, nothing for invisible marks."""
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp", "Zs"):
        return " "
    if (
        category in ("Cs", "Co") or _font_of(character) is None
    ):  # private letters look different in every font
        return "" if category in ("Cf", "Mn") else _TOFU
    return character


def wrap(text: str, width: float, size: float, *, max_lines: int = 8) -> str:
    """Break text into lines that fit, by measuring it; what goes beyond `max_lines` ends in an ellipsis.

    matplotlib's own `Text(wrap=True)` breaks at spaces alone and has no last line: a long word and a Chinese
    sentence run out of the figure, and how many lines there will be is not known before the sheet has its size.

    Args:
        text: anything a person typed.
        width: of the line, in inches.
        size: of the font, in points.
    """
    renderer = RendererAgg(1, 1, 72)  # at 72 dots an inch a pixel is a point

    def fits(line: str) -> bool:
        # 3 % of slack: hinting makes glyphs a little wider at some resolutions than at this one
        across: float = renderer.get_text_width_height_descent(line, font, ismath=False)[0]
        return across * 1.03 <= width * 72

    lines: list[str] = []
    rest = drawable(text[:4000])
    font = FontProperties(family=font_families(rest), size=size)
    while rest and len(lines) < max_lines:
        cut = _line_length(rest, fits)
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest:
        end = lines[-1]
        while end and not fits(end + "…"):
            end = end[:-1]
        lines[-1] = end.rstrip() + "…"
    return "\n".join(lines)


def _line_length(text: str, fits: Callable[[str], bool]) -> int:
    """How many characters of `text` go on its first line: up to a place to break, if there is one."""
    lengths = range(1, min(len(text), 500) + 1)
    most = max(1, bisect.bisect_left(lengths, True, key=lambda n: not fits(text[:n])))
    if most == len(text):
        return most
    return next((n for n in range(most, 0, -1) if _breaks(text[n - 1], text[n])), most)


def _breaks(before: str, after: str) -> bool:
    """Whether a line may end between two characters: at spaces and hyphens, and anywhere beside CJK."""
    return " " in (before, after) or before == "-" or unicodedata.east_asian_width(before) in "WF"


# ---------------------------------------------------------------------------------------------------------- SVG

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
    with _style_lock, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        root = ET.fromstring(_rendered(figure, "svg", DPI, metadata={"Date": None}))
    used = {id for element in root.iter() for value in element.attrib.values() for id in _ID.findall(value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _LEFT_OUT:
                parent.remove(child)
            elif _local(parent.tag) == "defs":
                child.attrib.pop("style", None)  # each use says it anew, and a style sheet reaches only that
    for element in root.iter():
        _tidy(element, used)
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": f"{_FONT}, sans-serif"}
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


# ------------------------------------------------------------------------------------------- windows and sheets

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
