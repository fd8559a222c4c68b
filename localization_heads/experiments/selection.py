"""Which heads are selected, and how stable that is: Fig. 3, Fig. 6a, and the sweeps of Fig. 13 (tau) and 14 (N)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from localization_heads.experiments import paper
from localization_heads.experiments.paper import Finding, Table, percent
from localization_heads.experiments.study import Study, first, names
from localization_heads.experiments.validation import Heads, Recipe, Scores
from localization_heads.heads.ranking import NONE_KEPT, HeadRanking

ELBOWS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Fig. 13 sweeps tau over these multiples of the elbow, unless told otherwise."""


def no_recipes(study: Study) -> dict[Hashable, Recipe]:
    return {}


def attention_sums(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Fig. 3: the average attention sums in ascending order, and tau."""
    ranking = study.ranking
    known = paper.MODELS.get(study.model)
    considered = [head for head in ranking.heads if head.layer >= ranking.exclude_layers]
    sums = np.array([head.attention_sum for head in considered])
    tau = "none" if ranking.tau is None else f"{ranking.tau:.3f}"
    cells = (tau, str(len(ranking.kept)), str(len(considered)), f"{sums.min():.3f} to {sums.max():.3f}")
    rows = [(f"ours, {study.model}", *cells)]
    if known and known.tau is not None:
        rows.append((f"paper, {known.name}", f"{known.tau:.2f}", "-", "-", "-"))
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


def selection_frequency(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Fig. 6a: the heads that are selected most often."""
    known = paper.MODELS.get(study.model)
    published = known.heads if known else ()
    rows = [
        (
            str(rank),
            str(head.address),
            f"{percent(head.selection_frequency)} ± {percent(head.selection_frequency_std)}",
            f"{head.attention_sum:.3f}",
            "-" if head.spatial_entropy is None else f"{head.spatial_entropy:.3f}",
            *(
                [str(published.index(str(head.address)) + 1) if str(head.address) in published else "-"]
                if known
                else []
            ),
        )
        for rank, head in enumerate(study.ranking.kept[:10], start=1)
    ]
    columns = ("rank", "head", "selection frequency (%)", "attention sum", "spatial entropy")
    table = Table((*columns, *(["paper's rank"] if known else [])), tuple(rows))
    top = study.found()
    shares = [head.selection_frequency for head in study.ranking.kept[: len(top)]]
    ever = sum(head.selection_frequency > 0 for head in study.ranking.kept)
    reading = (
        f"Of {study.shape[0] * study.shape[1]} heads {ever} are ever among the {study.options.top_n} kept heads of "
        f"lowest entropy. First come {names(top)}, selected in "
        f"{', '.join(percent(share, 0) for share in shares)} % of the expressions."
        if top
        else f"{NONE_KEPT.capitalize()}: none is selected."
    )
    if known and known.heads:
        both = [str(head) for head in top if str(head) in published]
        reading += (
            f" The paper names {' '.join(published)} for {known.name}; "
            f"{len(both)} of them are in our first {len(top)}."
        )
    numbers = {"top": [list(head) for head in top], "frequency": shares, "ever_selected": ever}
    return Finding("fig6a", "Fig. 6a: selection frequency", (table,), reading, numbers)


def tau_rankings(study: Study) -> dict[float, HeadRanking]:
    """Fig. 13: the ranking at each threshold, in ascending order."""
    taus: Sequence[float] = study.options.taus or ()
    if not taus:
        elbow = (
            study.ranking.tau if study.ranking.tau is not None else float(np.median(study.sums.mean(axis=0)))
        )
        taus = [factor * elbow for factor in ELBOWS]
    return {tau: study.ranked(tau=tau) for tau in sorted(set(map(float, taus)))}


def n_rankings(study: Study) -> dict[float, HeadRanking]:
    """Fig. 14: the ranking for each N, the number of heads selected per sample."""
    return {n: study.ranked(top_n=n) for n in sorted(set(study.options.top_ns))}


def tau_recipes(study: Study) -> dict[Hashable, Recipe]:
    return _sweep_recipes(study, tau_rankings(study))


def n_recipes(study: Study) -> dict[Hashable, Recipe]:
    return _sweep_recipes(study, n_rankings(study))


def tau_sweep(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Fig. 13: how the threshold of criterion 1 changes the heads found."""
    return _sweep(study, tau_rankings(study), scores, "fig13", "Fig. 13: the threshold tau", "tau")


def n_sweep(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Fig. 14: how N changes the heads found."""
    return _sweep(
        study, n_rankings(study), scores, "fig14", "Fig. 14: N, the heads marked in each sample", "N"
    )


def _sweep_recipes(study: Study, rankings: Mapping[float, HeadRanking]) -> dict[Hashable, Recipe]:
    tops = [first(ranking, study.options.k) for ranking in rankings.values()]
    return {top: Recipe(top, study.options.grounding) for top in tops if top}


def _sweep(
    study: Study,
    rankings: Mapping[float, HeadRanking],
    scores: Mapping[Any, Scores],
    name: str,
    title: str,
    symbol: str,
) -> Finding:
    default = study.found()
    rows, points = [], []
    for value, ranking in rankings.items():
        top: Heads = first(ranking, study.options.k)
        found = scores.get(top)
        kept = sum(head in default for head in top)
        written = f"{value:.3f}" if symbol == "tau" else str(int(value))
        rows.append(
            (
                written,
                str(len(ranking.kept)),
                names(top),
                f"{kept} of {len(default)}",
                percent(found.accuracy if found else None),
                percent(found.ciou if found else None),
            )
        )
        points.append(
            {
                "value": value,
                "kept": len(ranking.kept),
                "top": [list(head) for head in top],
                "shared": kept,
                "acc@0.5": found.accuracy if found else None,
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
    default_value = study.ranking.tau if symbol == "tau" else float(study.options.top_n)
    numbers = {"points": points, "default": default_value, "default_top": [list(head) for head in default]}
    return Finding(
        name, title, (Table(columns, tuple(rows)),), _sweep_reading(points, len(default), symbol), numbers
    )


def _sweep_reading(points: Sequence[Mapping[str, Any]], k: int, symbol: str) -> str:
    same = sum(point["shared"] == k for point in points)
    scored = [point["acc@0.5"] for point in points if point["acc@0.5"] is not None]
    reading = (
        f"Over {len(points)} values of {symbol} the first {k} heads are the default's in {same}; at worst "
        f"{min(point['shared'] for point in points)} of the {k} stay."
    )
    if scored:
        reading += (
            f" Acc@0.5 lies between {percent(min(scored))} and {percent(max(scored))}. "
            "The paper reports that the first three heads hardly change."
        )
    return reading
