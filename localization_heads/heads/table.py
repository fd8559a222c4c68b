"""A ranking as people read it: in a terminal, and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Protocol

from localization_heads.heads.head import Head


class Ranked(Protocol):
    """What is shown of a head (`heads.record.RankedHead`)."""

    @property
    def address(self) -> Head: ...
    @property
    def selection_frequency(self) -> float: ...
    @property
    def selection_frequency_std(self) -> float: ...
    @property
    def attention_sum(self) -> float: ...
    @property
    def spatial_entropy(self) -> float | None: ...


ROWS = 15
NAMES = ("rank", "head", "selection frequency", "attention sum", "spatial entropy")


def as_text(title: str, heads: Sequence[Ranked]) -> str:
    """The first heads in columns, under a title."""
    rows = [NAMES, *_rows(heads)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(NAMES))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([title, *lines, *_rest(heads)])


def as_html(title: str, heads: Sequence[Ranked]) -> str:
    """The same as an HTML table."""
    head = "".join(f"<th>{name}</th>" for name in NAMES)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(heads))
    rest = "".join(f"<p>{escape(line)}</p>" for line in _rest(heads))
    return f"<table><caption>{escape(title)}</caption><tr>{head}</tr>{body}</table>{rest}"


def _rows(heads: Sequence[Ranked]) -> Iterator[tuple[str, ...]]:
    for rank, one in enumerate(heads[:ROWS], start=1):
        frequency = f"{one.selection_frequency:.3f} ± {one.selection_frequency_std:.3f}"
        entropy = "-" if one.spatial_entropy is None else f"{one.spatial_entropy:.3f}"
        yield str(rank), str(one.address), frequency, f"{one.attention_sum:.3f}", entropy


def _rest(heads: Sequence[Ranked]) -> list[str]:
    return [f"and {len(heads) - ROWS} more"] if len(heads) > ROWS else []
