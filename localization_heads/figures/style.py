"""The style of all figures (palette, sizes, matplotlib's settings), and the drawing of user text.

User text is drawn in fonts that have its characters, and wrapped to lines that fit. The user's matplotlibrc is ignored.
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

# The palette of Okabe and Ito, which is safe for the common forms of colour blindness.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8C8C8C"
COLOUR_MAP = "viridis"
TITLE_SIZE = 10.0  # points
DPI = 200
FONT = "DejaVu Sans"
"""Comes with matplotlib; has Latin, Greek, Cyrillic, Arabic and most signs, but no CJK and no Devanagari."""
_TOFU = "\N{WHITE SQUARE}"
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
    "axes.titley": 1.0,  # saves measuring the ticks to find this position
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,  # conferences refuse the Type 3 fonts that matplotlib embeds by default
}
# rcParams are global to the process, so threads draw one figure at a time.
style_lock = threading.RLock()


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and our style, ignoring the user's matplotlibrc."""
    with style_lock, matplotlib.style.context(["default", {**_STYLE, "font.family": [FONT]}]):
        yield


def user_text_style(text: str) -> dict[str, Any]:
    """Options of matplotlib for a `drawable` text: fonts that have its characters, and no mathtext."""
    return {"fontfamily": font_families(text), "parse_math": False}


def drawable(text: str) -> str:
    """`text` on one line, with a white square for each missing glyph (matplotlib would warn at every draw).

    >>> drawable("a  cat\\non the\\tmat")
    'a cat on the mat'
    """
    characters = (_drawable_character(character) for character in unicodedata.normalize("NFC", text))
    return " ".join("".join(characters).split())


def _drawable_character(character: str) -> str:
    """The character or its replacement: a space for control characters, nothing for invisible marks, or a square."""
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp", "Zs"):
        return " "
    private = category in ("Cs", "Co")  # surrogates and private use: no font has a fixed glyph for them
    if private or _font_of(character) is None:
        return "" if category in ("Cf", "Mn") else _TOFU
    return character


def wrap(text: str, width: float, size: float, *, max_lines: int = 8) -> str:
    """Break text into lines that fit, by measuring it; text beyond `max_lines` is cut with an ellipsis.

    Unlike matplotlib's `Text(wrap=True)`, this also breaks long words and Chinese sentences, limits the number of
    lines, and gives their number before the figure has its size.

    Args:
        text: any user text.
        width: line width in inches.
        size: font size in points.
    """
    renderer = RendererAgg(1, 1, 72)  # at 72 dpi a pixel is a point

    def fits(line: str) -> bool:
        # 3 % of slack: at some resolutions hinting makes glyphs slightly wider than at this one.
        line_width: float = renderer.get_text_width_height_descent(line, font, ismath=False)[0]
        return line_width * 1.03 <= width * 72

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
    """The number of characters of `text` on its first line: up to the last possible break, if there is one."""
    lengths = range(1, min(len(text), 500) + 1)
    longest = max(1, bisect.bisect_left(lengths, True, key=lambda n: not fits(text[:n])))
    if longest == len(text):
        return longest
    return next((n for n in range(longest, 0, -1) if _can_break(text[n - 1], text[n])), longest)


def _can_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters: at spaces, after hyphens, and after wide (CJK) characters."""
    return " " in (before, after) or before == "-" or unicodedata.east_asian_width(before) in "WF"


def font_families(text: str) -> list[str]:
    """The fonts that draw `text`, in the order of fallback: `FONT`, then others for the characters that it lacks."""
    fonts = map(_font_of, text)
    return list(dict.fromkeys([FONT, *(font for font in fonts if font)]))


def _font_of(character: str) -> str | None:
    """The font that draws a character; None if no installed font has it."""
    if ord(character) in _default_code_points():
        return FONT
    names, first = _fonts()
    return names[number] if (number := int(first[ord(character)])) >= 0 else None


@lru_cache(maxsize=1)
def _default_code_points() -> frozenset[int]:
    """The code points that `FONT` has."""
    path = font_manager.findfont(FontProperties(family=[FONT]))
    return frozenset(font_manager.get_font(path).get_charmap())


@lru_cache(maxsize=1)
def _fonts() -> tuple[tuple[str, ...], NDArray[np.int16]]:
    """The names of the installed fonts, and `[code point]`: the index of the first that has a glyph for it, or -1.

    Opens every installed font, once, when a text first contains a character that `FONT` lacks.
    """
    names: list[str] = []
    first = np.full(0x110000, -1, dtype=np.int16)
    for entry in sorted(font_manager.fontManager.ttflist, key=_font_preference):
        if entry.name in names or entry.name.startswith((".", "Last")):
            continue  # the fallback fonts of macOS have a box for every code point
        try:
            codes = np.array(list(font_manager.get_font(entry.fname).get_charmap()), dtype=np.int64)
        except (OSError, RuntimeError):  # deleted or corrupt
            continue
        first[codes[first[codes] < 0]] = len(names)
        names.append(entry.name)
    return tuple(names), first


def _font_preference(entry: FontEntry) -> tuple[bool, bool, bool, bool, str]:
    """Sort key of fonts for a character that several have: `FONT`, then regular sans-serif fonts."""
    regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
    return entry.name != FONT, not regular, "Sans" not in entry.name, "Mono" in entry.name, entry.name
