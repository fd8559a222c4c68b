"""What is printed of a trace: the answer, and a line for each of its words."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from localization_heads.apps.tables import ROWS, box_text
from localization_heads.errors import printable
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.stages.trace import Traced

_HEADS = 4
"""Heads with a column of their own."""


def traced_table(traced: Traced) -> Table:
    """The words of a single answer; of a data set, the answers."""
    if traced.alone is not None:
        return trace_table(traced.alone)
    answers = traced.answers
    table = Table(
        title="Answers", caption=f"the first {ROWS} of {len(answers)}" if len(answers) > ROWS else None
    )
    for name in ("id", "query", "answer"):
        table.add_column(name, overflow="fold")
    for id, found in list(answers.items())[:ROWS]:
        query, answer = found or ("", "its page was there already")
        said = (printable(text, 200) for text in (query, answer or "(nothing)"))
        table.add_row(escape(printable(id, 80)), *map(escape, said))
    return table


def trace_table(trace: Trace) -> Table:
    """The words of an answer with their boxes, and how much the first heads looked at the image."""
    title = f"answer: {escape(printable(trace.answer, 400)) or '(nothing)'}"
    table = Table(title=title, title_justify="left", caption=_caption(trace))
    table.add_column("word", overflow="fold")
    for name in ("box", "score", *map(str, trace.heads[:_HEADS])):
        table.add_column(name, justify="right")
    parts = zip(trace.words, trace.groundings, trace.boxes, trace.word_masses, strict=True)
    for word, grounding, box, masses in list(parts)[:ROWS]:
        found = ("-", "-") if box is None else (box_text(box), f"{grounding.score:.2f}")
        shown = escape(printable(word.text, 60))
        table.add_row(shown, *found, *(f"{mass:.3f}" for mass in masses[:_HEADS]))
    return table


def _caption(trace: Trace) -> str:
    left = len(trace.words) - ROWS
    more = f"; {left} more words are on the page" if left > 0 else ""
    return f"score: share of the word's map in its box; under a head, its attention on the image{more}"
