"""Printed tables of heads: of one sample, of a data set, and ranked by labels; and lines on published lists."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from localization_heads.apps.tables import cell, new_table
from localization_heads.errors import printable
from localization_heads.heads.ready import ready_list, shared_heads
from localization_heads.heads.record import HeadRanking, resting_heads
from localization_heads.stages.labels import LabelRanking
from localization_heads.stages.ranking import choose_grounding_heads
from localization_heads.stages.run import Run

MAX_RESTING = 8
"""Resting heads that a caption names."""
RANKING_ROWS = 10
"""Heads that a table of a ranking shows at least."""
OWN = "own-"
"""Prefix of the names of this project's own ready lists, which are not reported as published."""


def analysis_table(rows: Sequence[Mapping[str, Any]], top_k: int) -> Table:
    """The first `top_k` heads of one sample that pass criterion 1, lowest entropy first."""
    names = ("layer", "head", "attention sum", "spatial entropy", "components", "bottom row")
    table = new_table(f"Top {top_k} heads of this sample", *names)
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
    resting = resting_heads(ranking)
    if ranking.has_sensitivity:
        columns = [
            "rank",
            "head",
            "selection\nfrequency",
            "attention\nsum",
            "spatial\nentropy",
            "sensi-\ntivity",
        ]
        columns += ["consis-\ntency"] if any(head.consistency is not None for head in ranking.kept) else []
        caption += f"; resting: {' '.join(str(head.address) for head in resting[:MAX_RESTING]) or 'none'}"
        caption += f" and {len(resting) - MAX_RESTING} more" if len(resting) > MAX_RESTING else ""
    table = new_table(f"Heads of {cell(ranking.model)} over {ranking.num_samples} samples", *columns, caption=caption)
    for rank, head in enumerate(ranking.kept[: max(RANKING_ROWS, k)], start=1):
        entropy = "-" if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}"
        frequency = f"{head.selection_frequency:.3f} ± {head.selection_frequency_std:.3f}"
        cells = [str(rank), str(head.address), frequency, f"{head.attention_sum:.3f}", entropy]
        values = [head.sensitivity, head.consistency][: len(columns) - len(cells)]
        cells += ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*cells, style="bold" if rank <= k else "dim" if head in resting else "")
    return table


def label_tables(labelled: LabelRanking) -> Iterator[Table]:
    """The first heads with their scores, and, if measured, the quality of the first `k` at each number of labels."""
    ranking, recipe = labelled.result.ranking, labelled.recipe
    assert ranking is not None
    spread = "draws" if ranking.spread == "draws" else "bootstrap resamples"
    first = ", ".join(str(head.address) for head in labelled.label_free.kept[: recipe.k]) or "none"
    table = new_table(
        f"Heads of {printable(ranking.model)[:60]} by {recipe.by}, {ranking.num_samples} labels",
        *("rank", "head", "score", "selection frequency", "attention sum"),
        caption=f"± over {recipe.num_trials} {spread}; first without labels: {first}",
    )
    for rank, head in enumerate(ranking.kept[: max(RANKING_ROWS, recipe.k)], start=1):
        score = f"{head.score or 0:.3f} ± {head.score_std or 0:.3f}"
        means = f"{head.selection_frequency:.3f}", f"{head.attention_sum:.3f}"
        table.add_row(str(rank), str(head.address), score, *means, style="bold" if rank <= recipe.k else "")
    yield table
    if labelled.curve.counts:
        yield _curve_table(labelled)


def _curve_table(labelled: LabelRanking) -> Table:
    curve, unshrunk, k = labelled.curve, labelled.unshrunk_curve, labelled.recipe.k
    caption = (
        f"without labels {curve.label_free:.3f}, all heads {curve.all_heads:.3f}, all labels {curve.all_labels:.3f}"
    )
    columns = ["labels", "quality", *(["without shrinkage"] if unshrunk else []), f"same {k} heads"]
    table = new_table(f"The first {k} heads on entries not drawn", *columns, caption=caption)
    for index, count in enumerate(curve.counts):
        qualities = [curve.quality[index], *([unshrunk.quality[index]] if unshrunk else [])]
        cells = [f"{np.mean(draws):.3f} ± {np.std(draws):.3f}" for draws in qualities]
        table.add_row(str(count), *cells, f"{100 * curve.shared[index]:.0f} %")
    return table


def published_list_line(run: Run) -> str | None:
    """One line that names the published list of the heads used for grounding, None if they are not from one."""
    source = run.heads_from
    if source is None or source.startswith(OWN):
        return None
    return f"heads={run.options.heads}: the first {len(run.named_heads or ())} of {source}"


def grounding_heads_line(run: Run, ranking: HeadRanking) -> str:
    """One line on the heads that a batch grounded with."""
    heads, source = choose_grounding_heads(run, ranking)
    names = "each sample's own" if heads is None else " ".join(map(str, heads)) or "none"
    return f"boxes below: heads {names}, {source}"


def overlap_lines(run: Run, ranking: HeadRanking) -> Iterator[str]:
    """One line per published list of the model: how many of its first n heads are among the first n found here."""
    ranked = [head.address for head in ranking.kept]
    num_heads = sum(head.layer >= ranking.exclude_layers for head in ranking.heads)
    for name in run.spec.lists:
        if name.startswith(OWN):
            continue
        published = ready_list(name)
        shared, n, chance = shared_heads(published.heads, ranked, num_heads)
        yield f"{published}: {shared} of its first {n} heads are among the first {n} found; by chance {chance:.1f}"
