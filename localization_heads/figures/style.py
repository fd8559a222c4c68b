"""How every figure looks: palette, sizes, matplotlib's settings whatever the user's matplotlibrc says, and typed texts.

Texts that people typed are drawn in fonts that have their letters, on lines that fit.
"""

from __future__ import annotations

import bisect
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontEntry, FontProperties
from numpy.typing import NDArray

FONT = "DejaVu Sans"
"""Comes with matplotlib; has Latin, Greek, Cyrillic, Arabic and most signs, but no CJK and no Devanagari."""
_TOFU = "\N{WHITE SQUARE}"


@lru_cache(maxsize=1)
def _fonts() -> tuple[tuple[str, ...], NDArray[np.int16]]:
    """Names of the installed fonts, and for each code point the first of them that has it, -1 for none.

    Every font is opened once, when a text first needs more than `FONT` has.
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
    """What decides which font draws a letter that several have: `FONT`, then upright regular sans-serif ones."""
    regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
    return entry.name != FONT, not regular, "Sans" not in entry.name, "Mono" in entry.name, entry.name


@lru_cache(maxsize=1)
def _own_letters() -> frozenset[int]:
    path = font_manager.findfont(FontProperties(family=[FONT]))
    return frozenset(font_manager.get_font(path).get_charmap())


def _font_of(character: str) -> str | None:
    """The font that draws a character, None where no installed one has it."""
    if ord(character) in _own_letters():
        return FONT
    names, first = _fonts()
    return names[number] if (number := int(first[ord(character)])) >= 0 else None


def font_families(text: str) -> list[str]:
    """The fonts that draw `text`, in matplotlib's order of fallback: `FONT`, then others for letters it lacks."""
    fonts = map(_font_of, text)
    return list(dict.fromkeys([FONT, *(font for font in fonts if font)]))


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
