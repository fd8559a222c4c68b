"""What the commands print: tables as wide as the terminal, one line for a box, the files that were written.

Untrusted text is escaped and shortened before it is printed, so that a terminal does not interpret it.
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
"""Rows of a table that are printed at most; the files have all of them."""
MAX_REASONS = 10
"""Different reasons of failures that are listed at most."""
REASON_LENGTH = 300
"""Characters of the reason of a failure that are printed at most."""
TRACE_HEADS = 4
"""Heads that have a column in the table of a trace."""


def new_table(title: str, *columns: str, text_columns: Collection[str] = (), caption: str | None = None) -> Table:
    """An empty table whose columns hold numbers, except `text_columns`, which may be folded."""
    table = Table(title=title, caption=caption)
    for column in columns:
        if column in text_columns:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right")
    return table


def predictions_table(outcomes: Sequence[Outcome], read_out: str) -> Table:
    """Box, score and confidence of every entry, and the IoU with its true box, if it has one.

    Args:
        read_out: the preset that made the boxes (`options.compose.describe_preset`).
    """
    calibrated = any(outcome.prediction.calibrated for outcome in outcomes)
    confidence_heading = "confi-\ndence" if calibrated else "confi-\ndence*"
    names = ("id", "expression", "box (x0 y0 x1 y1)", "score", confidence_heading, "IoU")
    title = f"Predicted boxes, grounding={read_out}"
    caption = "; ".join([*_summary(outcomes), *([] if calibrated else ["* uncalibrated"])])
    table = new_table(title, *names, text_columns=names[:2], caption=caption or None)
    for outcome in outcomes[:ROWS]:
        sample, prediction = outcome.sample, outcome.prediction
        iou = "-" if outcome.iou is None else f"{outcome.iou:.2f}"
        box, score = "nothing there", "-"
        if prediction.bbox is not None:
            box, score = _prediction_box(prediction), f"{prediction.score or 0:.2f}"
        confidence = "-" if prediction.confidence is None else f"{prediction.confidence:.2f}"
        table.add_row(cell(sample.id), cell(sample.expression), box, score, confidence, iou)
        for other in (prediction.boxes or ())[1:]:
            table.add_row("", "", box_text(other.bbox), f"{other.score:.2f}")
    return table


def _prediction_box(prediction: Prediction) -> str:
    """The box, preceded by the index of its image if the prompt has several."""
    assert prediction.bbox is not None
    prefix = "" if prediction.image_index is None else f"image {prediction.image_index}: "
    return prefix + box_text(prediction.bbox)


def failures_table(failures: Iterable[BadEntry]) -> Table:
    table = new_table("Entries that failed", "line", "id", "reason", text_columns=("id", "reason"))
    for bad in failures:
        table.add_row(str(bad.line or "-"), cell(bad.id or "-"), cell(bad.reason, REASON_LENGTH))
    return table


def prepared_table(result: PreparedDataset) -> Table:
    """The counts of each split of the source, next to those of papers; the split that was written is bold."""
    written = result.written
    table = new_table(
        f"{cell(result.dataset)}, protocol {cell(result.protocol)}: what was found",
        *("split", "references", "expressions", "in papers"),
        text_columns=("split",),
        caption=f"{written.expressions} expressions for {written.references} references written",
    )
    for split, counts in result.splits.items():
        official = OFFICIAL_COUNTS.get((result.dataset, split))
        published = f"{official.references:,} / {official.expressions:,}" if official else "-"
        style = "bold" if split == result.split else ""
        table.add_row(split, f"{counts.references:,}", f"{counts.expressions:,}", published, style=style)
    return table


def reasons_table(failures: Sequence[BadEntry]) -> Table:
    """Each reason with the number of expressions that failed for it, such as those of a missing image."""
    reasons = Counter(bad.reason for bad in failures)
    title = f"{len(failures)} expressions could not be used, for {len(reasons)} reasons"
    table = new_table(title, "expressions", "reason", text_columns=("reason",))
    for reason, number in list(reasons.items())[:MAX_REASONS]:
        table.add_row(str(number), cell(reason, REASON_LENGTH))
    if others := list(reasons.values())[MAX_REASONS:]:
        table.add_row(str(sum(others)), f"{len(others)} more reasons")
    return table


def examination_table(examination: Examination) -> Table:
    """The findings of `stage=doctor`, one fact per line, problems in bold."""
    table = Table(title="What was found", show_header=False)
    table.add_column("fact", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in examination.facts:
        table.add_row(name, escape(value))
    table.add_row("query", escape(examination.query))
    for view in examination.views:
        table.add_row(f"view {escape(view.name)}", _view_text(view))
    if examination.unplaced:
        table.add_row("in no view", f"{examination.unplaced} image tokens (ends of lines, means)")
    if examination.problem:
        table.add_row("views", f"[bold]WRONG[/bold]: {escape(examination.problem)}")
    table.add_row("captured", _check_text(examination))
    return table


def _view_text(view: View) -> str:
    rows, columns = view.index.shape
    x0, y0, x1, y1 = (f"{edge:.1f}" for edge in view.box)
    sizes = "equal cells" if view.is_uniform else "cells of several sizes"
    return f"{columns} x {rows} {sizes} over the pixels x {x0} to {x1}, y {y0} to {y1}"


def _check_text(examination: Examination) -> str:
    check = examination.check
    if check.difference is None:
        return escape(check.note) if check.passed else f"[bold]WRONG[/bold]: {escape(check.note)}"
    verdict = "as eager attention" if check.passed else "[bold]WRONG[/bold]: not as eager attention"
    return f"{verdict}: they differ by {check.difference:.1e} at most ({escape(check.note)})"


def marked_prompt(examination: Examination) -> Text:
    """The tokenized prompt, with image tokens as a count and query tokens marked >>like this<<."""
    text = Text("prompt: ")
    for piece in examination.pieces:
        if piece.kind == "query":
            text.append(f">>{piece.text}<<", style="bold reverse")
        else:
            text.append(f"[{piece.text}]" if piece.kind == "image" else piece.text, style="dim")
    return text


def box_text(box: Box) -> str:
    """The edges in whole pixels, or in tenths if a side is shorter than 10 pixels.

    >>> box_text((0.4, 2.0, 30.6, 40.0)), box_text((0.4, 2.0, 3.6, 40.0))
    ('0 2 31 40', '0.4 2.0 3.6 40.0')
    """
    x0, y0, x1, y1 = box
    digits = 1 if min(x1 - x0, y1 - y0) < 10 else 0
    return " ".join(f"{value:.{digits}f}" for value in box)


def grounding_text(grounding: Grounding, read_out: str) -> str:
    """The box, its score and confidence, the heads and the read-out that made it, on one line."""
    heads = f"heads {' '.join(map(str, grounding.heads))}   grounding={read_out}"
    confidence = confidence_text(grounding)
    if grounding.absent:
        return f"nothing there   {confidence}   {heads}"
    index = grounding.image_index
    prefix = "" if index is None else f"in image {index} (counted from 0): "
    return "   ".join([prefix + box_text(grounding.box), f"score {grounding.score:.2f}", confidence, heads])


def confidence_text(grounding: Grounding) -> str:
    """`confidence 0.93, present 0.98`; a raw signal is marked as uncalibrated.

    >>> from types import SimpleNamespace
    >>> confidence_text(SimpleNamespace(confidence=0.5, calibrated=False, presence=None))
    'confidence 0.50 (uncalibrated)'
    """
    if grounding.confidence is None:
        text = "confidence -"
    else:
        text = f"confidence {grounding.confidence:.2f}{'' if grounding.calibrated else ' (uncalibrated)'}"
    return text if grounding.presence is None else f"{text}, present {grounding.presence:.2f}"


def show(content: object, **options: Any) -> None:
    """Print to the terminal at its current width; with `-q`, print nothing."""
    Console(quiet=frontdoor.is_quiet).print(content, **options)


def show_paths(paths: Iterable[Path]) -> None:
    """Print the files that were written, one per line and unwrapped, so that a terminal can link them."""
    for path in paths:
        show(printable(f"wrote {path}"), soft_wrap=True, highlight=False, markup=False)


def show_failures(failures: Sequence[BadEntry]) -> int:
    """Print the entries that have failed, if any, and return the exit status."""
    if failures:
        show(failures_table(failures))
    return 1 if failures else 0


def cell(text: str, limit: int = 80) -> str:
    """Untrusted text for a table cell: escaped, printable and at most `limit` characters long."""
    return escape(printable(text, limit))


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    """The number of rows not shown, and the mean IoU over the entries with a true box."""
    ious = [outcome.iou for outcome in outcomes if outcome.iou is not None]
    parts = [f"and {len(outcomes) - ROWS} more in predictions.jsonl"] if len(outcomes) > ROWS else []
    parts += [f"mean IoU {sum(ious) / len(ious):.2f} over {len(ious)} with a true box"] if ious else []
    return parts


def traced_table(traced: TraceResult) -> Table:
    """The words of a single answer, or the answers of a data set."""
    if traced.single is not None:
        return trace_table(traced.single)
    answers = traced.answers
    names = ("id", "query", "answer")
    caption = f"the first {ROWS} of {len(answers)}" if len(answers) > ROWS else None
    table = new_table("Answers", *names, text_columns=names, caption=caption)
    for id, query_and_answer in list(answers.items())[:ROWS]:
        query, answer = query_and_answer or ("", "its page was there already")
        table.add_row(cell(id), cell(query, 200), cell(answer or "(nothing)", 200))
    return table


def trace_table(trace: Trace) -> Table:
    """The words of an answer with their boxes, and the attention sums of the first heads."""
    names = ("word", "box", "score", *map(str, trace.heads[:TRACE_HEADS]))
    title = f"answer: {cell(trace.answer, 400) or '(nothing)'}"
    num_hidden = len(trace.words) - ROWS
    more = f"; {num_hidden} more words are on the page" if num_hidden > 0 else ""
    caption = f"score: share of the word's map in its box; under a head, its attention on the image{more}"
    table = new_table(title, *names, text_columns=("word",), caption=caption)
    table.title_justify = "left"
    parts = zip(trace.words, trace.groundings, trace.boxes, trace.word_masses, strict=True)
    for word, grounding, box, masses in list(parts)[:ROWS]:
        box_and_score = ("-", "-") if box is None else (box_text(box), f"{grounding.score:.2f}")
        table.add_row(cell(word.text, 60), *box_and_score, *(f"{mass:.3f}" for mass in masses[:TRACE_HEADS]))
    return table


def video_table(result: VideoResult) -> Table:
    """The first frame of each second, for at most `ROWS` seconds, with box, score and confidence."""
    names = ("time", "frame", "box (x0 y0 x1 y1)", "score", "confidence")
    title = f"{len(result.predictions)} frames: {result.query}"
    table = new_table(cell(title), *names, caption="one a second; predictions.jsonl has all")
    first_frames: dict[int, Prediction] = {}
    for frame in result.predictions:
        first_frames.setdefault(int(frame.time or 0), frame)
    for frame in list(first_frames.values())[:ROWS]:
        numbers = ("-" if value is None else f"{value:.2f}" for value in (frame.score, frame.confidence))
        table.add_row(f"{frame.time or 0:.1f} s", str(frame.frame), _frame_box(frame), *numbers)
    return table


def _frame_box(frame: Prediction) -> str:
    if frame.bbox is None:
        return "nothing there" if frame.absent else "failed"
    return " ".join(f"{edge:.0f}" for edge in frame.bbox)
