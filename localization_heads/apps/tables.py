"""What the finder prints: tables for people. Programs read the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from localization_heads.attention import Box
from localization_heads.data.jsonl import BadEntry
from localization_heads.heads.ranking import HeadRanking
from localization_heads.stages.outcome import Outcome

ROWS = 30
"""Longest table that is printed whole; the files hold everything."""


def analysis_table(rows: Sequence[Mapping[str, Any]], top_k: int) -> Table:
    """The `top_k` heads of one sample that criterion 1 keeps, lowest entropy first."""
    table = Table(title=f"Top {top_k} heads of this sample")
    for column in ("layer", "head", "attention sum", "spatial entropy", "components", "bottom row"):
        table.add_column(column, justify="right")
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
    table = Table(
        title=f"Heads of {escape(ranking.model)} over {ranking.num_samples} samples",
        caption=f"tau {tau}: {len(ranking.kept)} of {len(ranking.heads)} heads kept by criterion 1",
    )
    for column in ("rank", "head", "selection frequency", "attention sum", "spatial entropy"):
        table.add_column(column, justify="right")
    for rank, head in enumerate(ranking.kept[: max(10, k)], start=1):
        entropy = "-" if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}"
        frequency = f"{head.selection_frequency:.3f} ± {head.selection_frequency_std:.3f}"
        style = "bold" if rank <= k else ""
        table.add_row(
            str(rank), str(head.address), frequency, f"{head.attention_sum:.3f}", entropy, style=style
        )
    return table


def predictions_table(outcomes: Sequence[Outcome]) -> Table:
    """Box and score of every entry, and the IoU with the true box where there is one."""
    table = Table(title="Predicted boxes", caption=_summary(outcomes))
    table.add_column("id", overflow="fold")
    table.add_column("expression", overflow="fold")
    for column in ("box (x0 y0 x1 y1)", "score", "IoU"):
        table.add_column(column, justify="right")
    for outcome in outcomes[:ROWS]:
        sample, prediction = outcome.sample, outcome.prediction
        iou = "-" if outcome.iou is None else f"{outcome.iou:.2f}"
        box, score = box_text(prediction.bbox or (0, 0, 0, 0)), f"{prediction.score or 0:.2f}"
        table.add_row(escape(sample.id), escape(sample.expression), box, score, iou)
    return table


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Every metric with its 95 % interval where it has one."""
    table = Table(title="Metrics")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            table.add_row(escape(name), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table


def failures_table(failures: Iterable[BadEntry]) -> Table:
    table = Table(title="Entries that failed")
    table.add_column("line", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("reason", overflow="fold")
    for bad in failures:
        table.add_row(str(bad.line or "-"), escape(bad.id or "-"), escape(bad.reason))
    return table


def box_text(box: Box) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def written(console: Console, paths: Iterable[Path]) -> None:
    """Name the files that were written, one a line, so that a terminal can open them."""
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)


def _summary(outcomes: Sequence[Outcome]) -> str | None:
    """What the table does not show, and the mean IoU where truth is known."""
    ious = [outcome.iou for outcome in outcomes if outcome.iou is not None]
    parts = [f"and {len(outcomes) - ROWS} more in predictions.jsonl"] if len(outcomes) > ROWS else []
    parts += [f"mean IoU {sum(ious) / len(ious):.2f} over {len(ious)} with a true box"] if ious else []
    return "; ".join(parts) or None
