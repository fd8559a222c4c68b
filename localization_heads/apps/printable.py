"""Text of strangers on a terminal: data sets, file names and models may hold anything."""

from __future__ import annotations

import unicodedata


def printable(text: object, limit: int | None = None) -> str:
    """`text` without what a terminal would obey (escapes, turned writing direction), cut to `limit` characters.

    Line ends and tabs stay where there is no limit, and become spaces where there is one.

    >>> printable("the\\x1b[2J dog"), printable("the dog on the left", 8)
    ('the�[2J dog', 'the dog…')
    """
    text = str(text)
    if limit is not None:
        text = " ".join(text.split())
        text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if char.isprintable() or char in "\n\t":
        return char
    return " " if unicodedata.category(char) == "Zs" else "�"
