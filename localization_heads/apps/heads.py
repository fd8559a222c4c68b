"""What is printed of heads: those of one sample, of a data set and by labels, and whose they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from localization_heads.apps.tables import cell, new_table
from localization_heads.errors import printable
from localization_heads.heads.ready import ready_list, shared_heads
from localization_heads.heads.record import HeadRanking, resting_heads
from localization_heads.stages.labels import LabelRanking
from localization_heads.stages.ranking import choose_grounding_heads
from localization_heads.stages.run import Run

if TYPE_CHECKING:
    pass


MOST_RESTING = 8
"""Resting heads that a caption names."""


def analysis_table(rows: Sequence[Mapping[str, Any]], top_k: int) -> Table:
    """The `top_k` heads of one sample that criterion 1 keeps, lowest entropy first."""
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
    rest = resting_heads(ranking)
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
        caption += f"; resting: {' '.join(str(head.address) for head in rest[:MOST_RESTING]) or 'none'}"
        caption += f" and {len(rest) - MOST_RESTING} more" if len(rest) > MOST_RESTING else ""
    table = new_table(
        f"Heads of {cell(ranking.model)} over {ranking.num_samples} samples", *columns, caption=caption
    )
    for rank, head in enumerate(ranking.kept[: max(10, k)], start=1):
        entropy = "-" if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}"
        frequency = f"{head.selection_frequency:.3f} ± {head.selection_frequency_std:.3f}"
        cells = [str(rank), str(head.address), frequency, f"{head.attention_sum:.3f}", entropy]
        values = [head.sensitivity, head.consistency][: len(columns) - len(cells)]
        cells += ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*cells, style="bold" if rank <= k else "dim" if head in rest else "")
    return table


LABEL_ROWS = 10


def label_tables(found: LabelRanking) -> Iterator[Table]:
    """The first heads with their scores; and the quality of the first `k` at each number of labels, if measured."""
    ranking, recipe, curve = found.result.ranking, found.recipe, found.curve
    assert ranking is not None
    spread = "draws" if ranking.spread == "draws" else "bootstrap resamples"
    first = ", ".join(str(head.address) for head in found.label_free.kept[: recipe.k]) or "none"
    table = new_table(
        f"Heads of {printable(ranking.model)[:60]} by {recipe.by}, {ranking.num_samples} labels",
        *("rank", "head", "score", "selection frequency", "attention sum"),
        caption=f"± over {recipe.num_trials} {spread}; first without labels: {first}",
    )
    for rank, head in enumerate(ranking.kept[: max(LABEL_ROWS, recipe.k)], start=1):
        score = f"{head.score or 0:.3f} ± {head.score_std or 0:.3f}"
        means = f"{head.selection_frequency:.3f}", f"{head.attention_sum:.3f}"
        table.add_row(str(rank), str(head.address), score, *means, style="bold" if rank <= recipe.k else "")
    yield table
    if curve.counts:
        yield _curve(found)


def _curve(found: LabelRanking) -> Table:
    curve, plain, k = found.curve, found.unshrunk_curve, found.recipe.k
    caption = (
        f"without labels {curve.label_free:.3f}, all heads {curve.all_heads:.3f}, "
        f"all labels {curve.all_labels:.3f}"
    )
    columns = ["labels", "quality", *(["without shrinkage"] if plain else []), f"same {k} heads"]
    table = new_table(f"The first {k} heads on entries not drawn", *columns, caption=caption)
    for place, count in enumerate(curve.counts):
        both = [curve.quality[place], *([plain.quality[place]] if plain else [])]
        cells = [f"{np.mean(one):.3f} ± {np.std(one):.3f}" for one in both]
        table.add_row(str(count), *cells, f"{100 * curve.shared[place]:.0f} %")
    return table


OWN = "own-"
"""Begins the names of this project's own lists, which need no introduction."""


def whose(run: Run) -> str | None:
    """One line on whose heads grounded, where others have published them."""
    taken = run.heads_from
    if taken is None or taken.startswith(OWN):
        return None
    return f"heads={run.options.heads}: the first {len(run.named_heads or ())} of {taken}"


def of_boxes(run: Run, ranking: HeadRanking) -> str:
    """One line on the heads that a batch grounded with."""
    heads, source = choose_grounding_heads(run, ranking)
    names = "each sample's own" if heads is None else " ".join(map(str, heads)) or "none"
    return f"boxes below: heads {names}, {source}"


def found_again(run: Run, ranking: HeadRanking) -> Iterator[str]:
    """A line a published list of the model: how many of its first heads are among as many first ones found now."""
    ranked = [head.address for head in ranking.kept]
    num_heads = sum(head.layer >= ranking.exclude_layers for head in ranking.heads)
    for name in run.spec.lists:
        one = ready_list(name)
        if name.startswith(OWN):
            continue
        shared, compared, chance = shared_heads(one.heads, ranked, num_heads)
        yield (
            f"{one}: {shared} of its first {compared} heads are among the first {compared} found; "
            f"by chance {chance:.1f}"
        )
