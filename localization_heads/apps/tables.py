"""What the commands print for people: tables as wide as the terminal, one line for a box, the files that were written.

Text of others is cleaned before it is printed: nothing in it is obeyed by the terminal, and nothing is endless.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from localization_heads.apps import frontdoor
from localization_heads.attention import Box
from localization_heads.datasets.prepare import Prepared
from localization_heads.datasets.source import OFFICIAL
from localization_heads.errors import BadEntry, printable
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.ranking import HeadRanking
from localization_heads.heads.record import resting
from localization_heads.stages.outcome import Outcome
from localization_heads.store.results import Prediction

if TYPE_CHECKING:
    from localization_heads.experiments.paper import Table as FindingTable
    from localization_heads.lvlm.checks.doctor import Examination
    from localization_heads.lvlm.families.geometry import View

ROWS = 30
"""Longest table that is printed whole; the files hold everything."""
MOST_RESTING = 8
"""Resting heads that a caption names."""
TOP_REASONS = 10
"""Different reasons that are listed of a run with many failures."""
REASON = 300
"""Longest reason of a failure that is printed whole, in characters."""
SHORT = 14
"""Cells of at most this many characters are never folded."""
HEADING = 16
"""Width at which the headings above such cells are folded."""
WIDE = 8
"""Metrics whose intervals fit on one line each in 80 columns."""
MOST_SIDE_BY_SIDE = 10
"""Metrics that fit in 80 columns with their intervals on two lines."""
HEADINGS = {
    "acc@0.25": "Acc\n@0.25",
    "acc@0.5": "Acc\n@0.5",
    "acc@0.75": "Acc\n@0.75",
    "acc@0.9": "Acc\n@0.9",
    "macc": "mAcc",
    "mean_iou": "mean\nIoU",
    "pointing": "point-\ning",
    "energy": "energy\nin box",
    "ciou": "cIoU\n(mask)",
    "giou": "gIoU\n(mask)",
    "f1@0.5": "F1\n@0.5",
    "pr@f1=1": "Pr\n@F1=1",
}
NAMES = {
    "random_heads": "random heads",
    "all_heads": "all heads",
    "centre_box": "centre box",
    "native": "model's box",
    "single_box": "best box alone",
}


def _table(title: str, *columns: str, texts: Collection[str] = (), caption: str | None = None) -> Table:
    """An empty table of numbers, and of `texts`, the columns that may be folded."""
    table = Table(title=title, caption=caption)
    for column in columns:
        if column in texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right")
    return table


def metrics_table(metrics: Mapping[str, Any]) -> Group:
    """The scores of `stage=evaluate`: a row per method, a column per metric, below each value its 95 % interval.

    The localization heads come first, the controls below, and how far the heads are ahead of random ones. More metrics
    than fit side by side in 80 columns stand in two halves, one below the other.
    """
    shown = [name for name in HEADINGS if name in metrics]
    half = -(-len(shown) // 2)
    parts = [shown] if len(shown) <= MOST_SIDE_BY_SIDE else [shown[:half], shown[half:]]
    tables = [_scores(metrics, part) for part in parts]
    tables[0].title, tables[-1].caption = _title(metrics), _ahead(metrics)
    return Group(*tables)


def _scores(metrics: Mapping[str, Any], shown: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in shown:
        table.add_column(HEADINGS[name], justify="right")
    single = {"single_box": metrics["single_box"]} if "single_box" in metrics else {}
    methods = {"heads": metrics, **single, **metrics.get("controls", {})}
    for number, (name, row) in enumerate(methods.items()):
        narrow = len(shown) > WIDE
        cells = [_score_cell(row.get(metric), row.get(f"{metric}_interval", ()), narrow) for metric in shown]
        table.add_row(NAMES.get(name, name), *cells, style="" if number else "bold")
    return table


def _title(metrics: Mapping[str, Any]) -> str:
    parts = [f"{metrics.get('num_answers', metrics['num_samples'])} expressions"]
    parts += [f"{metrics['num_samples']} with one true box"] if "num_answers" in metrics else []
    parts += [f"{metrics['num_masks']} with a mask"] if "num_masks" in metrics else []
    parts += [f"{metrics['num_failed']} failed"] if metrics["num_failed"] else []
    read_out = metrics.get("choices", {}).get("read_out")
    parts += [f"grounding={read_out}"] if read_out else []
    parts += [f"protocol {protocol}"] if (protocol := metrics.get("choices", {}).get("protocol")) else []
    return f"Scores of {', '.join(parts)}"


def _ahead(metrics: Mapping[str, Any]) -> str | None:
    """The paired difference to random heads of the same layers: whether the heads are luck."""
    random = metrics.get("controls", {}).get("random_heads")
    if random is None:
        return None
    difference = random["difference"]
    parts = [
        f"{name} {value:+.3f} ({low:+.2f} to {high:+.2f})"
        for metric, name in (("acc@0.5", "Acc@0.5"), ("mean_iou", "mean IoU"))
        for value, low, high in [difference[metric]]
    ]
    return f"95 % intervals; heads ahead of random heads: {', '.join(parts)}"


def _score_cell(value: float | None, interval: Sequence[float | None], narrow: bool) -> str:
    """The value, and its interval below, on two lines where columns are `narrow`."""
    if value is None:
        return "-"
    low, high = (_short(bound) for bound in interval)
    return f"{value:.3f}\n{low}-\n{high}" if narrow else f"{value:.3f}\n{low}-{high}"


def _short(bound: float | None) -> str:
    """`.36`, `1.0`: as narrow as a bound can be."""
    if bound is None:
        return "?"
    text = f"{bound:.2f}"
    return "1.0" if text == "1.00" else text.removeprefix("0")


def analysis_table(rows: Sequence[Mapping[str, Any]], top_k: int) -> Table:
    """The `top_k` heads of one sample that criterion 1 keeps, lowest entropy first."""
    names = ("layer", "head", "attention sum", "spatial entropy", "components", "bottom row")
    table = _table(f"Top {top_k} heads of this sample", *names)
    kept = [row for row in rows if row["above_threshold"]]
    for row in kept[:top_k]:
        table.add_row(
            str(row["layer"]),
            str(row["head"]),
            f"{row['attn_sum']:.3f}",
            f"{row['spatial_entropy']:.3f}" if math.isfinite(row["spatial_entropy"]) else "-",
            str(row["num_components"]),
            "yes" if row["bottom_row_focus"] else "no",
        )
    return table


def ranking_table(ranking: HeadRanking, k: int) -> Table:
    """The best heads over a data set; the first `k` are the localization heads."""
    tau = "none" if ranking.tau is None else f"{ranking.tau:.3f}"
    caption = f"tau {tau}: {len(ranking.kept)} of {len(ranking.heads)} heads kept by criterion 1"
    columns = ["rank", "head", "selection frequency", "attention sum", "spatial entropy"]
    rest = resting(ranking)
    if ranking.is_moved:
        columns = [
            "rank",
            "head",
            "selection\nfrequency",
            "attention\nsum",
            "spatial\nentropy",
            "sensi-\ntivity",
        ]
        columns += ["consis-\ntency"] if _is_mirrored(ranking) else []
        caption += f"; resting: {' '.join(str(head.address) for head in rest[:MOST_RESTING]) or 'none'}"
        caption += f" and {len(rest) - MOST_RESTING} more" if len(rest) > MOST_RESTING else ""
    table = _table(
        f"Heads of {_cell(ranking.model)} over {ranking.num_samples} samples", *columns, caption=caption
    )
    for rank, head in enumerate(ranking.kept[: max(10, k)], start=1):
        entropy = "-" if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}"
        frequency = f"{head.selection_frequency:.3f} ± {head.selection_frequency_std:.3f}"
        cells = [str(rank), str(head.address), frequency, f"{head.attention_sum:.3f}", entropy]
        moved = [head.sensitivity, head.consistency][: len(columns) - len(cells)]
        cells += ["-" if value is None else f"{value:.3f}" for value in moved]
        table.add_row(*cells, style="bold" if rank <= k else "dim" if head in rest else "")
    return table


def _is_mirrored(ranking: HeadRanking) -> bool:
    return any(head.consistency is not None for head in ranking.kept)


def predictions_table(outcomes: Sequence[Outcome], read_out: str) -> Table:
    """Box, score and confidence of every entry, and the IoU with the true box where there is one.

    Args:
        read_out: the preset that made the boxes (`options.compose.preset_name`).
    """
    calibrated = any(outcome.prediction.calibrated for outcome in outcomes)
    sure = "confi-\ndence" if calibrated else "confi-\ndence*"
    names = ("id", "expression", "box (x0 y0 x1 y1)", "score", sure, "IoU")
    title = f"Predicted boxes, grounding={read_out}"
    caption = "; ".join([*_summary(outcomes), *([] if calibrated else ["* uncalibrated"])])
    table = _table(title, *names, texts=names[:2], caption=caption or None)
    for outcome in outcomes[:ROWS]:
        sample, prediction = outcome.sample, outcome.prediction
        iou = "-" if outcome.iou is None else f"{outcome.iou:.2f}"
        box, score = "nothing there", "-"
        if prediction.bbox is not None:
            box, score = _named_box(prediction), f"{prediction.score or 0:.2f}"
        sure = "-" if prediction.confidence is None else f"{prediction.confidence:.2f}"
        table.add_row(_cell(sample.id), _cell(sample.expression), box, score, sure, iou)
        for other in (prediction.boxes or ())[1:]:
            table.add_row("", "", box_text(other.bbox), f"{other.score:.2f}")
    return table


def _named_box(prediction: Prediction) -> str:
    """The box, after the place of its image where the prompt shows several."""
    assert prediction.bbox is not None
    of_image = "" if prediction.image_index is None else f"image {prediction.image_index}: "
    return of_image + box_text(prediction.bbox)


def failures_table(failures: Iterable[BadEntry]) -> Table:
    table = _table("Entries that failed", "line", "id", "reason", texts=("id", "reason"))
    for bad in failures:
        table.add_row(str(bad.line or "-"), _cell(bad.id or "-"), _cell(bad.reason, REASON))
    return table


def prepared_table(result: Prepared) -> Table:
    """What the source holds, beside the counts of papers; the split that was written stands in bold."""
    written = result.written
    table = _table(
        f"{_cell(result.dataset)}, protocol {_cell(result.protocol)}: what was found",
        *("split", "references", "expressions", "in papers"),
        texts=("split",),
        caption=f"{written.expressions} expressions for {written.references} references written",
    )
    for split, found in result.splits.items():
        official = OFFICIAL.get((result.dataset, split))
        published = f"{official.references:,} / {official.expressions:,}" if official else "-"
        style = "bold" if split == result.split else ""
        table.add_row(split, f"{found.references:,}", f"{found.expressions:,}", published, style=style)
    return table


def reasons_table(failures: Sequence[BadEntry]) -> Table:
    """Each reason once, with its count: a missing image fails every expression that refers to it."""
    reasons = Counter(bad.reason for bad in failures)
    title = f"{len(failures)} expressions could not be used, for {len(reasons)} reasons"
    table = _table(title, "expressions", "reason", texts=("reason",))
    for reason, number in list(reasons.items())[:TOP_REASONS]:
        table.add_row(str(number), _cell(reason, REASON))
    if others := list(reasons.values())[TOP_REASONS:]:
        table.add_row(str(sum(others)), f"{len(others)} more reasons")
    return table


def finding_table(found: FindingTable) -> Table:
    """A table of an experiment, in the paper's layout."""
    table = Table(title=_cell(found.title) if found.title else None)
    for number, column in enumerate(found.columns):
        short = all(len(row[number]) <= SHORT for row in found.rows)
        heading = _cell(column)
        if short:  # rich folds no heading of such a column, but cuts the columns beside a long one
            heading = fill(heading, HEADING)
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=short)
    for row in found.rows:
        table.add_row(*(_cell(cell) for cell in row))
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


def _cell(text: str, limit: int = 80) -> str:
    """Text of others in a table: nothing in it is obeyed, and nothing is endless."""
    return escape(printable(text, limit))


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    """The number of rows left out, and the mean IoU over the entries with a true box."""
    ious = [outcome.iou for outcome in outcomes if outcome.iou is not None]
    parts = [f"and {len(outcomes) - ROWS} more in predictions.jsonl"] if len(outcomes) > ROWS else []
    parts += [f"mean IoU {sum(ious) / len(ious):.2f} over {len(ious)} with a true box"] if ious else []
    return parts
