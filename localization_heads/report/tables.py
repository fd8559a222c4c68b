"""HTML that cannot be broken by what is in it: `element` escapes every text and every attribute.

Expressions, ids, file names and models come from strangers. They enter the page here and nowhere else: as text
of an element, as the value of an attribute, or as a string in a JSON block.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
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


def number(value: object, digits: int = 3) -> str:
    """A count stays whole; what is not known, or not finite, is a dash.

    >>> number(0.5), number(12345), number(None), number(float("inf"))
    ('0.500', '12,345', '-', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        text = f"{value:.{digits}f}"
        return text if float(text) else text.removeprefix("-")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value, 160)


DIFFERENCE = "how far these heads are ahead of each"


def metrics_tables(metrics: Mapping[str, Any]) -> list[Markup]:
    """The metrics themselves, then whatever groups lie among them, under their names."""
    flat = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    tables = [_flat_table(flat, "pairs numbers")] if flat else []
    for name, group in metrics.items():
        if isinstance(group, Mapping) and group:
            tables.append(_group_tables(plain(name.replace("_", " "), 80), group, flat))
    return tables


def _group_tables(title: str, group: Mapping[str, Any], ours: Mapping[str, Any]) -> Markup:
    """Rows of numbers as a table with ours on top, and one more for each kind of numbers within them.

    A group of anything else (the choices behind the numbers) is a list of names and values, folded away.
    """
    if not all(isinstance(row, Mapping) for row in group.values()):
        folded = element("summary", None, title)
        return element("details", None, folded, _flat_table(dict(_flattened(group)), "pairs"))
    inner = dict.fromkeys(
        key for row in group.values() for key, value in row.items() if isinstance(value, Mapping)
    )
    parts = [element("h3", None, title), _group_table({"these heads": _numbers(ours, group), **group})]
    for key in inner:
        rows = {name: row[key] for name, row in group.items() if isinstance(row.get(key), Mapping)}
        name = DIFFERENCE if key == "difference" else plain(key, 80)
        parts += [element("h3", None, f"{title}: {name}"), _group_table(rows)]
    return element("div", {"class": "panel"}, *parts)


def _numbers(ours: Mapping[str, Any], group: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those of our numbers that the group has as well."""
    names = {name for row in group.values() for name in row}
    return {name: value for name, value in ours.items() if name in names}


def _flattened(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _flat_table(metrics: Mapping[str, Any], kind: str) -> Markup:
    rows = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, plain(name, 80)),
            element("td", None, _cell(metrics, name)),
        )
        for name in metrics
        if not name.endswith("_interval")
    ]
    table = element("table", {"class": kind}, element("tbody", None, *rows))
    return element("div", {"class": "scroll"}, table)


def _group_table(group: Mapping[str, Mapping[str, Any]]) -> Markup:
    columns = [
        name
        for name in dict.fromkeys(name for row in group.values() for name in row)
        if not name.endswith("_interval")
        and not any(isinstance(row.get(name), Mapping) for row in group.values())
    ]
    header = [element("th", {"scope": "col"}, plain(name, 80)) for name in ("", *columns)]
    rows = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, plain(name.replace("_", " "), 80)),
            *(element("td", None, _cell(row, column)) for column in columns),
        )
        for name, row in group.items()
    ]
    content = [element("thead", None, element("tr", None, *header)), element("tbody", None, *rows)]
    return element("div", {"class": "scroll"}, element("table", {"class": "numbers"}, *content))


def _cell(row: Mapping[str, Any], name: str) -> Markup:
    """The value and its interval: that of the row, or the two numbers after it; other lists are written out."""
    value, interval = row.get(name), row.get(f"{name}_interval")
    if isinstance(value, list):
        if len(value) != 3 or not all(isinstance(one, float) for one in value):
            return join(plain(", ".join(map(number, value)), 120))
        value, *interval = value
    if not isinstance(interval, list):
        return join(number(value))
    bounds = f"[{', '.join(number(bound, 2) for bound in interval)}]"
    return join(number(value), " ", element("span", {"class": "bounds"}, bounds))
