"""Text that people typed, made safe to draw: glyphs that the fonts have, on lines that fit."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

_TOFU = "\N{WHITE SQUARE}"

# matplotlib ships DejaVu Sans, which has no CJK; these have it, on the systems where they are installed.
_FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Emoji",
    "Symbola",
    "Arial Unicode MS",
)


@lru_cache(maxsize=1)
def font_families() -> tuple[str, ...]:
    """DejaVu Sans, then those fallbacks that are installed (naming others makes matplotlib warn)."""
    installed = set(font_manager.fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FALLBACKS if name in installed))


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    paths = [font_manager.findfont(FontProperties(family=[name])) for name in font_families()]
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


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
    if category == "Cs" or not _has_glyph(character):
        return "" if category in ("Cf", "Mn") else _TOFU
    return character


def wrap(text: str, width: float, size: float, *, max_lines: int = 8) -> str:
    """Break text into lines that fit, by measuring it; what goes beyond `max_lines` ends in an ellipsis.

    Args:
        text: anything a person typed.
        width: of the line, in inches.
        size: of the font, in points.
    """
    font = FontProperties(family=list(font_families()), size=size)
    renderer = RendererAgg(1, 1, 72)  # at 72 dots an inch a pixel is a point

    def fits(line: str) -> bool:
        # 3 % of slack: hinting makes glyphs a little wider at some resolutions than at this one
        across: float = renderer.get_text_width_height_descent(line, font, ismath=False)[0]
        return across * 1.03 <= width * 72

    lines: list[str] = []
    rest = drawable(text[:4000])
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
