"""HTML that cannot be broken by what is in it: `element` escapes every text and every attribute.

Expressions, ids, file names and models come from strangers. They enter the page here and nowhere else: as text
of an element, as the value of an attribute, or as a string in a JSON block.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

VOID = ("meta", "input", "img", "br")


class Markup(str):
    """Text that is HTML already; every other `str` is escaped."""

    __slots__ = ()


def element(tag: str, attributes: Mapping[str, Any] | None = None, *children: object) -> Markup:
    """`<tag name="value">children</tag>`; children that are None are left out.

    Args:
        attributes: None and False leave one out, True writes its name alone.

    >>> element("p", {"class": "a", "hidden": True}, "1 < 2", element("b", None, "&"))
    '<p class="a" hidden>1 &lt; 2<b>&amp;</b></p>'
    """
    parts = [f"<{tag}"]
    for name, value in (attributes or {}).items():
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{escape(str(value), quote=True)}"')
    parts.append(">")
    if tag in VOID:
        return Markup("".join(parts))
    return Markup("".join([*parts, join(*children), f"</{tag}>"]))


def join(*children: object) -> Markup:
    """The children one after the other, each escaped unless it is `Markup`."""
    shown = (child for child in children if child is not None)
    return Markup("".join(c if isinstance(c, Markup) else escape(str(c), quote=True) for c in shown))


def plain(text: object, limit: int = 300) -> str:
    """One line of text that any browser and any encoder takes: no control character, no half of a pair.

    >>> plain("the\\x00 dog\\n on the left", 8)
    'the� do…'
    """
    line = " ".join(str(text)[: 8 * limit].split())
    line = line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs") else char for char in line)


def json_block(value: object) -> Markup:
    """`value` as JSON for a script element: no sign in it can end the element or open another.

    Raises:
        ValueError: for NaN or infinite numbers, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
