"""Which heads are selected (Fig. 3 and 6a), and how stable the selection is under tau (Fig. 13) and N (Fig. 14)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from localization_heads.experiments import paper
from localization_heads.experiments.paper import MISSING, Finding, Table, percent
from localization_heads.experiments.study import Study, first_heads, join_names
from localization_heads.experiments.validation import Recipe, RecipeScores
from localization_heads.heads.ranking import NONE_KEPT
from localization_heads.heads.record import HeadRanking

ELBOWS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""The default values of tau in Fig. 13, as multiples of the elbow."""


def attention_sums(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Fig. 3: the elbow of the sorted average attention sums, and the heads that it keeps."""
    ranking = study.ranking
    paper_model = paper.MODELS.get(study.model)
    considered = [head for head in ranking.heads if head.layer >= ranking.exclude_layers]
    sums = np.array([head.attention_sum for head in considered])
    tau = "none" if ranking.tau is None else f"{ranking.tau:.3f}"
    cells = (tau, str(len(ranking.kept)), str(len(considered)), f"{sums.min():.3f} to {sums.max():.3f}")
    rows = [(f"ours, {study.model}", *cells)]
    if paper_model and paper_model.tau is not None:
        rows.append((f"paper, {paper_model.name}", f"{paper_model.tau:.2f}", MISSING, MISSING, MISSING))
    share = len(ranking.kept) / len(considered)
    kept = f"criterion 1 keeps {len(ranking.kept)} of {len(considered)} heads ({percent(share, 0)} %)"
    reading = (
        f"Each of {len(study):,} expressions has its own elbow, on average tau = {tau}: in one at least, {kept}."
        if ranking.options.per_sample
        else f"The elbow of the sorted averages over {len(study):,} expressions lies at tau = {tau}: {kept}."
    )
    table = Table(("model", "tau", "kept", "heads", "attention sums"), tuple(rows))
    numbers = {"tau": ranking.tau, "kept": len(ranking.kept), "considered": len(considered)}
    return Finding("fig3", "Fig. 3: attention sums and their elbow", (table,), reading, numbers)


def selection_frequency(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Fig. 6a: the ten heads that are selected most often."""
    paper_model = paper.MODELS.get(study.model)
    paper_ranks = {name: str(rank) for rank, name in enumerate(paper_model.heads, 1)} if paper_model else {}
    columns: tuple[str, ...] = ("rank", "head", "selection frequency (%)", "attention sum", "spatial entropy")
    if paper_model:
        columns = (*columns, "paper's rank")
    rows = []
    for rank, head in enumerate(study.ranking.kept[:10], start=1):
        row = (
            str(rank),
            str(head.address),
            f"{percent(head.selection_frequency)} ± {percent(head.selection_frequency_std)}",
            f"{head.attention_sum:.3f}",
            MISSING if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}",
            paper_ranks.get(str(head.address), MISSING),
        )
        rows.append(row[: len(columns)])
    table = Table(columns, tuple(rows))
    top = study.top()
    frequencies = [head.selection_frequency for head in study.ranking.kept[: len(top)]]
    num_selected = sum(head.selection_frequency > 0 for head in study.ranking.kept)
    num_heads, n = study.shape[0] * study.shape[1], study.options.top_n
    reading = (
        f"Of {num_heads} heads {num_selected} are ever among the {n} kept heads of lowest entropy. First come "
        f"{join_names(top)}, selected in "
        f"{', '.join(percent(frequency, 0) for frequency in frequencies)} % of the expressions."
        if top
        else f"{NONE_KEPT.capitalize()}: none is selected."
    )
    if paper_model and paper_ranks:
        shared = sum(str(head) in paper_ranks for head in top)
        reading += (
            f" The paper names {' '.join(paper_ranks)} for {paper_model.name}; "
            f"{shared} of them are in our first {len(top)}."
        )
    numbers = {"top": [list(head) for head in top], "frequency": frequencies, "ever_selected": num_selected}
    return Finding("fig6a", "Fig. 6a: selection frequency", (table,), reading, numbers)


def tau_rankings(study: Study) -> dict[float, HeadRanking]:
    """Fig. 13: `[tau]`, the ranking at each threshold, in ascending order."""
    taus: Sequence[float] = study.options.sweeps.taus or ()
    if not taus:
        elbow = study.ranking.tau
        if elbow is None:
            elbow = float(np.median(study.sums.mean(axis=0)))
        taus = [factor * elbow for factor in ELBOWS]
    return {tau: study.rank(tau=tau) for tau in sorted(set(map(float, taus)))}


def n_rankings(study: Study) -> dict[float, HeadRanking]:
    """Fig. 14: `[N]`, the ranking at each number of marked heads, in ascending order."""
    return {n: study.rank(top_n=n) for n in sorted(set(study.options.sweeps.top_ns))}


def tau_recipes(study: Study) -> dict[Hashable, Recipe]:
    return _sweep_recipes(study, tau_rankings(study))


def n_recipes(study: Study) -> dict[Hashable, Recipe]:
    return _sweep_recipes(study, n_rankings(study))


def _sweep_recipes(study: Study, rankings: Mapping[float, HeadRanking]) -> dict[Hashable, Recipe]:
    tops = [first_heads(ranking, study.options.k) for ranking in rankings.values()]
    return {top: Recipe(top, study.options.grounding) for top in tops if top}


def tau_sweep(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Fig. 13: the first heads at each threshold of criterion 1, and how well they ground."""
    rankings = {f"{tau:.3f}": (tau, ranking) for tau, ranking in tau_rankings(study).items()}
    return _sweep(study, rankings, study.ranking.tau, scores, "fig13", "Fig. 13: the threshold tau", "tau")


def n_sweep(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Fig. 14: the first heads at each N, and how well they ground."""
    rankings = {str(n): (n, ranking) for n, ranking in n_rankings(study).items()}
    default, title = float(study.options.top_n), "Fig. 14: N, the heads marked in each sample"
    return _sweep(study, rankings, default, scores, "fig14", title, "N")


def _sweep(
    study: Study,
    rankings: Mapping[str, tuple[float, HeadRanking]],
    default_value: float | None,
    scores: Mapping[Any, RecipeScores],
    name: str,
    title: str,
    symbol: str,
) -> Finding:
    """The finding of a sweep.

    Args:
        rankings: by the text of each value, the value and its ranking.
        default_value: the value of the default recipe, which figures mark.
        symbol: of the parameter that is swept.
    """
    default = study.top()
    rows, points = [], []
    for text, (value, ranking) in rankings.items():
        top = first_heads(ranking, study.options.k)
        metrics = scores[top].metrics if top else {}
        shared = sum(head in default for head in top)
        cells = (percent(metrics.get(metric)) for metric in ("acc@0.5", "ciou"))
        rows.append((text, str(len(ranking.kept)), join_names(top), f"{shared} of {len(default)}", *cells))
        points.append(
            {
                "value": value,
                "kept": len(ranking.kept),
                "top": [list(head) for head in top],
                "shared": shared,
                "acc@0.5": metrics.get("acc@0.5"),
            }
        )
    columns = (
        symbol,
        "heads kept",
        f"first {study.options.k}",
        "as with the default",
        "REC Acc@0.5",
        "RES cIoU",
    )
    numbers = {"points": points, "default": default_value, "default_top": [list(head) for head in default]}
    reading = _sweep_reading(points, len(default), symbol)
    return Finding(name, title, (Table(columns, tuple(rows)),), reading, numbers)


def _sweep_reading(points: Sequence[Mapping[str, Any]], k: int, symbol: str) -> str:
    num_same = sum(point["shared"] == k for point in points)
    accuracies = [point["acc@0.5"] for point in points if point["acc@0.5"] is not None]
    reading = (
        f"Over {len(points)} values of {symbol} the first {k} heads are the default's in {num_same}; at worst "
        f"{min(point['shared'] for point in points)} of the {k} stay."
    )
    if accuracies:
        reading += (
            f" Acc@0.5 lies between {percent(min(accuracies))} and {percent(max(accuracies))}. "
            "The paper reports that the first three heads hardly change."
        )
    return reading
