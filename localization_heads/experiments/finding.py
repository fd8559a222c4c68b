"""`Finding`: what an experiment ends with, for people (a table, a sentence) and for programs (numbers)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is for names, the others for numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"every row of {self.title or 'the table'} must have {len(self.columns)} cells")

    def markdown(self) -> str:
        """A GitHub table; what Markdown would read as its own is escaped."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        return f"**{_escaped(self.title)}**\n\n{text}\n" if self.title else f"{text}\n"


@dataclass(frozen=True)
class Finding:
    """Args:
    name: as in `experiment=`.
    title: what the paper calls it.
    reading: what the numbers show, in sentences that follow from them.
    numbers: plain values, for `<name>.json` and for the figure.
    """

    name: str
    title: str
    tables: tuple[Table, ...]
    reading: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self, image: str | None = None) -> str:
        """A section of `docs/experiments.md`; `image` is the figure's path from there."""
        parts = [f"## {self.title}", self.reading]
        if image:
            parts.append(f"![{_escaped(self.title)}]({image})")
        return "\n\n".join([*parts, *(table.markdown().rstrip("\n") for table in self.tables)]) + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as the papers print it.

    >>> percent(0.8652), percent(None)
    ('86.5', '-')
    """
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def printed(value: float | None) -> str:
    """A number of the paper, which is in percent already."""
    return MISSING if value is None else f"{value:.1f}"


def than(ours: float, other: float) -> str:
    """`above`, `below` or `equal to`, by what is printed.

    >>> than(0.5, 0.3), than(0.3001, 0.3002)
    ('above', 'equal to')
    """
    if round(1000 * ours) == round(1000 * other):
        return "equal to"
    return "above" if ours > other else "below"


def two_digits(value: float) -> str:
    """With no minus before a zero.

    >>> two_digits(-0.001), two_digits(0.614)
    ('0.00', '0.61')
    """
    return f"{round(value, 2) + 0.0:.2f}"


def probability(p: float) -> str:
    """`p < 0.001`, `p = 0.023`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
