"""What `stage=find heads_by=mass|iou|pointing|vrh` prints: the ranking by labels, and how many labels it takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from localization_heads.errors import printable
from localization_heads.heads.head import Head
from localization_heads.stages.labels import Labelled

ROWS = 10


def label_tables(found: Labelled) -> Iterator[Table]:
    """The first heads with their scores; and the quality of the first `k` at each number of labels, if measured."""
    ranking, recipe, curve = found.result.ranking, found.recipe, found.curve
    assert ranking is not None
    spread = "draws" if ranking.spread == "draws" else "bootstrap resamples"
    table = Table(
        title=f"Heads of {printable(ranking.model)[:60]} by {recipe.by}, {ranking.num_samples} labels",
        caption=f"± over {recipe.num_trials} {spread}; first without labels: {_listed(found.free.kept, recipe.k)}",
    )
    for column in ("rank", "head", "score", "selection frequency", "attention sum"):
        table.add_column(column, justify="right")
    for rank, head in enumerate(ranking.kept[: max(ROWS, recipe.k)], start=1):
        score = f"{head.score or 0:.3f} ± {head.score_std or 0:.3f}"
        cells = (
            str(rank),
            str(head.address),
            score,
            f"{head.selection_frequency:.3f}",
            f"{head.attention_sum:.3f}",
        )
        table.add_row(*cells, style="bold" if rank <= recipe.k else "")
    yield table
    if curve.counts:
        yield _curve(found)


def _curve(found: Labelled) -> Table:
    curve, plain, k = found.curve, found.plain, found.recipe.k
    table = Table(
        title=f"The first {k} heads on entries not drawn",
        caption=f"without labels {curve.free:.3f}, all heads {curve.every:.3f}, all labels {curve.best:.3f}",
    )
    columns = ["labels", "quality", *(["without shrinkage"] if plain else []), f"same {k} heads"]
    for column in columns:
        table.add_column(column, justify="right")
    for place, count in enumerate(curve.counts):
        both = [curve.quality[place], *([plain.quality[place]] if plain else [])]
        cells = [f"{np.mean(one):.3f} ± {np.std(one):.3f}" for one in both]
        table.add_row(str(count), *cells, f"{100 * curve.stable[place]:.0f} %")
    return table


def _listed(heads: object, k: int) -> str:
    assert isinstance(heads, tuple)
    first: list[Head] = [head.address for head in heads[:k]]
    return ", ".join(map(str, first)) or "none"
