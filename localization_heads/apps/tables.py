"""What the commands print for people: tables as wide as the terminal, one line for a box, the files that were written.

Text of others is cleaned before it is printed: nothing in it is obeyed by the terminal, and nothing is endless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from localization_heads.apps import frontdoor
from localization_heads.attention import Box
from localization_heads.datasets.prepare import PreparedDataset
from localization_heads.datasets.source import OFFICIAL_COUNTS
from localization_heads.errors import BadEntry, printable
from localization_heads.grounding.ground import Grounding
from localization_heads.stages.outcome import Outcome
from localization_heads.store.results import Prediction

if TYPE_CHECKING:
    from localization_heads.lvlm.answers.trace import Trace
    from localization_heads.lvlm.checks.doctor import Examination
    from localization_heads.lvlm.families.geometry import View
    from localization_heads.stages.trace import TraceResult
    from localization_heads.stages.video import VideoResult


ROWS = 30
"""Longest table that is printed whole; the files hold everything."""
TOP_REASONS = 10
"""Different reasons that are listed of a run with many failures."""
REASON = 300
"""Longest reason of a failure that is printed whole, in characters."""


def new_table(title: str, *columns: str, texts: Collection[str] = (), caption: str | None = None) -> Table:
    """An empty table of numbers, and of `texts`, the columns that may be folded."""
    table = Table(title=title, caption=caption)
    for column in columns:
        if column in texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right")
    return table


def predictions_table(outcomes: Sequence[Outcome], read_out: str) -> Table:
    """Box, score and confidence of every entry, and the IoU with the true box where there is one.

    Args:
        read_out: the preset that made the boxes (`options.compose.describe_preset`).
    """
    calibrated = any(outcome.prediction.calibrated for outcome in outcomes)
    sure = "confi-\ndence" if calibrated else "confi-\ndence*"
    names = ("id", "expression", "box (x0 y0 x1 y1)", "score", sure, "IoU")
    title = f"Predicted boxes, grounding={read_out}"
    caption = "; ".join([*_summary(outcomes), *([] if calibrated else ["* uncalibrated"])])
    table = new_table(title, *names, texts=names[:2], caption=caption or None)
    for outcome in outcomes[:ROWS]:
        sample, prediction = outcome.sample, outcome.prediction
        iou = "-" if outcome.iou is None else f"{outcome.iou:.2f}"
        box, score = "nothing there", "-"
        if prediction.bbox is not None:
            box, score = _named_box(prediction), f"{prediction.score or 0:.2f}"
        sure = "-" if prediction.confidence is None else f"{prediction.confidence:.2f}"
        table.add_row(cell(sample.id), cell(sample.expression), box, score, sure, iou)
        for other in (prediction.boxes or ())[1:]:
            table.add_row("", "", box_text(other.bbox), f"{other.score:.2f}")
    return table


def _named_box(prediction: Prediction) -> str:
    """The box, after the place of its image where the prompt shows several."""
    assert prediction.bbox is not None
    of_image = "" if prediction.image_index is None else f"image {prediction.image_index}: "
    return of_image + box_text(prediction.bbox)


def failures_table(failures: Iterable[BadEntry]) -> Table:
    table = new_table("Entries that failed", "line", "id", "reason", texts=("id", "reason"))
    for bad in failures:
        table.add_row(str(bad.line or "-"), cell(bad.id or "-"), cell(bad.reason, REASON))
    return table


def prepared_table(result: PreparedDataset) -> Table:
    """What the source holds, beside the counts of papers; the split that was written stands in bold."""
    written = result.written
    table = new_table(
        f"{cell(result.dataset)}, protocol {cell(result.protocol)}: what was found",
        *("split", "references", "expressions", "in papers"),
        texts=("split",),
        caption=f"{written.expressions} expressions for {written.references} references written",
    )
    for split, found in result.splits.items():
        official = OFFICIAL_COUNTS.get((result.dataset, split))
        published = f"{official.references:,} / {official.expressions:,}" if official else "-"
        style = "bold" if split == result.split else ""
        table.add_row(split, f"{found.references:,}", f"{found.expressions:,}", published, style=style)
    return table


def reasons_table(failures: Sequence[BadEntry]) -> Table:
    """Each reason once, with its count: a missing image fails every expression that refers to it."""
    reasons = Counter(bad.reason for bad in failures)
    title = f"{len(failures)} expressions could not be used, for {len(reasons)} reasons"
    table = new_table(title, "expressions", "reason", texts=("reason",))
    for reason, number in list(reasons.items())[:TOP_REASONS]:
        table.add_row(str(number), cell(reason, REASON))
    if others := list(reasons.values())[TOP_REASONS:]:
        table.add_row(str(sum(others)), f"{len(others)} more reasons")
    return table


def examination_table(found: Examination) -> Table:
    """The findings of `stage=doctor`, one fact per line, problems in bold."""
    table = Table(title="What was found", show_header=False)
    table.add_column("fact", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in found.facts:
        table.add_row(name, escape(value))
    table.add_row("query", escape(found.query))
    for view in found.views:
        table.add_row(f"view {escape(view.name)}", _view_text(view))
    if found.unplaced:
        table.add_row("in no view", f"{found.unplaced} image tokens (ends of lines, means)")
    if found.problem:
        table.add_row("views", f"[bold]WRONG[/bold]: {escape(found.problem)}")
    table.add_row("captured", _check_text(found))
    return table


def _view_text(view: View) -> str:
    rows, columns = view.index.shape
    x0, y0, x1, y1 = (f"{edge:.1f}" for edge in view.box)
    sizes = "equal cells" if view.is_uniform else "cells of several sizes"
    return f"{columns} x {rows} {sizes} over the pixels x {x0} to {x1}, y {y0} to {y1}"


def _check_text(found: Examination) -> str:
    check = found.check
    if check.difference is None:
        return escape(check.note) if check.passed else f"[bold]WRONG[/bold]: {escape(check.note)}"
    verdict = "as eager attention" if check.passed else "[bold]WRONG[/bold]: not as eager attention"
    return f"{verdict}: they differ by {check.difference:.1e} at most ({escape(check.note)})"


def marked_prompt(found: Examination) -> Text:
    """The prompt as it was tokenized, image tokens counted, query tokens marked with >> <<."""
    text = Text("prompt: ")
    for piece in found.pieces:
        if piece.kind == "query":
            text.append(f">>{piece.text}<<", style="bold reverse")
        else:
            text.append(f"[{piece.text}]" if piece.kind == "image" else piece.text, style="dim")
    return text


def box_text(box: Box) -> str:
    """Whole pixels, but tenths where the box is smaller than 10 pixels a side.

    >>> box_text((0.4, 2.0, 30.6, 40.0)), box_text((0.4, 2.0, 3.6, 40.0))
    ('0 2 31 40', '0.4 2.0 3.6 40.0')
    """
    x0, y0, x1, y1 = box
    digits = 1 if min(x1 - x0, y1 - y0) < 10 else 0
    return " ".join(f"{value:.{digits}f}" for value in box)


def grounding_text(found: Grounding, read_out: str) -> str:
    """The box, its score, its confidence, the heads and the read-out that made it, on one line."""
    heads = f"heads {' '.join(map(str, found.heads))}   grounding={read_out}"
    if found.absent:
        return f"nothing there   {sureness(found)}   {heads}"
    of_image = "" if found.image_index is None else f"in image {found.image_index} (counted from 0): "
    return "   ".join([of_image + box_text(found.box), f"score {found.score:.2f}", sureness(found), heads])


def sureness(found: Grounding) -> str:
    """`confidence 0.93, present 0.98`; a raw signal is called uncalibrated.

    >>> from types import SimpleNamespace
    >>> sureness(SimpleNamespace(confidence=0.5, calibrated=False, presence=None))
    'confidence 0.50 (uncalibrated)'
    """
    parts = ["confidence -" if found.confidence is None else f"confidence {found.confidence:.2f}"]
    if found.confidence is not None and not found.calibrated:
        parts[0] += " (uncalibrated)"
    return ", ".join([*parts, *([] if found.presence is None else [f"present {found.presence:.2f}"])])


def show(content: object, **options: Any) -> None:
    """Print for people, as wide as the terminal is now; nothing with `-q`."""
    Console(quiet=frontdoor.is_quiet).print(content, **options)


def written(paths: Iterable[Path]) -> None:
    """Name the files that were written, one a line, so that a terminal can open them."""
    for path in paths:
        show(printable(f"wrote {path}"), soft_wrap=True, highlight=False, markup=False)


def show_failures(failures: Sequence[BadEntry]) -> int:
    """Print the entries that have failed, if any; returns the exit status."""
    if failures:
        show(failures_table(failures))
    return 1 if failures else 0


def cell(text: str, limit: int = 80) -> str:
    """Text of others in a table: nothing in it is obeyed, and nothing is endless."""
    return escape(printable(text, limit))


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    """The number of rows left out, and the mean IoU over the entries with a true box."""
    ious = [outcome.iou for outcome in outcomes if outcome.iou is not None]
    parts = [f"and {len(outcomes) - ROWS} more in predictions.jsonl"] if len(outcomes) > ROWS else []
    parts += [f"mean IoU {sum(ious) / len(ious):.2f} over {len(ious)} with a true box"] if ious else []
    return parts


_HEADS = 4
"""Heads with a column of their own."""


def traced_table(traced: TraceResult) -> Table:
    """The words of a single answer; of a data set, the answers."""
    if traced.single is not None:
        return trace_table(traced.single)
    answers = traced.answers
    names = ("id", "query", "answer")
    caption = f"the first {ROWS} of {len(answers)}" if len(answers) > ROWS else None
    table = new_table("Answers", *names, texts=names, caption=caption)
    for id, found in list(answers.items())[:ROWS]:
        query, answer = found or ("", "its page was there already")
        table.add_row(cell(id), cell(query, 200), cell(answer or "(nothing)", 200))
    return table


def trace_table(trace: Trace) -> Table:
    """The words of an answer with their boxes, and how much the first heads looked at the image."""
    names = ("word", "box", "score", *map(str, trace.heads[:_HEADS]))
    title = f"answer: {cell(trace.answer, 400) or '(nothing)'}"
    left = len(trace.words) - ROWS
    more = f"; {left} more words are on the page" if left > 0 else ""
    caption = f"score: share of the word's map in its box; under a head, its attention on the image{more}"
    table = new_table(title, *names, texts=("word",), caption=caption)
    table.title_justify = "left"
    parts = zip(trace.words, trace.groundings, trace.boxes, trace.word_masses, strict=True)
    for word, grounding, box, masses in list(parts)[:ROWS]:
        found = ("-", "-") if box is None else (box_text(box), f"{grounding.score:.2f}")
        table.add_row(cell(word.text, 60), *found, *(f"{mass:.3f}" for mass in masses[:_HEADS]))
    return table


def video_table(followed: VideoResult) -> Table:
    """The first frame of each second, of at most `ROWS` seconds, with box, score and confidence."""
    names = ("time", "frame", "box (x0 y0 x1 y1)", "score", "confidence")
    title = f"{len(followed.predictions)} frames: {followed.query}"
    table = new_table(cell(title), *names, caption="one a second; predictions.jsonl has all")
    seconds: dict[int, Prediction] = {}
    for one in followed.predictions:
        seconds.setdefault(int(one.time or 0), one)
    for one in list(seconds.values())[:ROWS]:
        numbers = ("-" if value is None else f"{value:.2f}" for value in (one.score, one.confidence))
        table.add_row(f"{one.time or 0:.1f} s", str(one.frame), _frame_box(one), *numbers)
    return table


def _frame_box(one: Prediction) -> str:
    if one.bbox is None:
        return "nothing there" if one.absent else "failed"
    return " ".join(f"{edge:.0f}" for edge in one.bbox)
