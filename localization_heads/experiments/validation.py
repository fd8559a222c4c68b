"""The scores of recipes (heads and read-out) in one pass over the maps; Fig. 6b; the comparison with random heads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.evaluation.controls import layer_matched
from localization_heads.evaluation.metrics import bootstrap_interval, spearman
from localization_heads.evaluation.scores import Score, Truth, score_grounding, summarize
from localization_heads.experiments import paper
from localization_heads.experiments.paper import Finding, Table, format_p_value, percent, two_decimals
from localization_heads.experiments.study import Study, join_names
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.heads.record import RankedHead
from localization_heads.options.groups import GroundingOptions

Heads = tuple[Head, ...]
Refine = Callable[[int, Grounding], Grounding]
"""`refine(sample index, grounding)`: the grounding with the segmenter's mask."""


@dataclass(frozen=True)
class Recipe:
    """The heads whose maps are summed, and the read-out of the sum.

    Args:
        heads: the same for every sample or, as a tuple of tuples, one tuple per sample. A sample without heads is
            not scored.
        segmented: whether the segmenter, if any, makes the mask. Sweeps do without: it would take most of their time
            and blur the comparison.
    """

    heads: Heads | tuple[Heads, ...]
    options: GroundingOptions
    segmented: bool = False

    def heads_of(self, sample: int) -> Heads:
        """The heads for the sample with that index."""
        per_sample = bool(self.heads) and not isinstance(self.heads[0], Head)
        return self.heads[sample] if per_sample else self.heads  # type: ignore[return-value]


METRICS = ("acc@0.5", "acc@0.5_interval", "mean_iou", "pointing", "ciou", "giou")


@dataclass(frozen=True, eq=False)
class RecipeScores:
    """The scores of one recipe on the samples for which it has heads, in the order of the study."""

    scores: Sequence[Score]

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`METRICS` as in `metrics.json`; None where undefined: without samples, or without ground-truth masks."""
        metrics: Mapping[str, Any] = {"acc@0.5_interval": [None, None]}
        if self.scores:
            metrics = summarize({"recipe": [[score] for score in self.scores]})["recipe"]
        return {name: metrics.get(name) for name in METRICS}


def score_recipes(
    recipes: Mapping[Any, Recipe],
    samples: Iterable[tuple[AttentionMaps, Truth]],
    refine: Refine | None = None,
) -> dict[Any, RecipeScores]:
    """The scores of every recipe, by name. Each sample's maps are read once, and equal recipes are computed once.

    Args:
        samples: the maps and the ground truth of each sample, in the order of the study.
        refine: the segmenter, for recipes with `segmented`.
    """
    scores_of: dict[Recipe, list[Score]] = {recipe: [] for recipe in recipes.values()}
    for index, (maps, truth) in enumerate(samples):
        for recipe, scores in scores_of.items():
            if heads := recipe.heads_of(index):
                grounding = ground_maps(maps, heads, recipe.options)
                if refine and recipe.segmented:
                    grounding = refine(index, grounding)
                scores.append(score_grounding(grounding, truth))
    results = {recipe: RecipeScores(scores) for recipe, scores in scores_of.items()}
    return {name: results[recipe] for name, recipe in recipes.items()}


def frequency_and_iou(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Fig. 6b: selection frequency against the mean IoU of the head's own map."""
    assert study.ious is not None
    assert study.hits is not None
    iou, hit = study.ious.mean(axis=0, dtype=np.float64), study.hits.mean(axis=0, dtype=np.float64)
    ranking, min_frequency = study.ranking, study.options.sweeps.min_frequency
    selected = [head for head in ranking.kept if head.selection_frequency >= min_frequency]
    considered = [head for head in ranking.heads if head.layer >= ranking.exclude_layers]
    rows = [
        (
            str(head.address),
            percent(head.selection_frequency),
            percent(iou[head.address]),
            percent(hit[head.address]),
            str(1 + sum(iou[other.address] > iou[head.address] for other in considered)),
        )
        for head in selected[:10]
    ]
    columns = (
        "head",
        "selection frequency (%)",
        "mean IoU (%)",
        "pointing (%)",
        "its IoU's rank among all heads",
    )
    correlations = {"selected": _correlation(selected, iou), "all": _correlation(considered, iou)}
    tables = (
        _correlation_table(study, selected, considered, correlations),
        Table(columns, tuple(rows), "The heads selected most often"),
    )
    points = [
        {"head": list(head.address), "frequency": head.selection_frequency, "iou": float(iou[head.address])}
        for head in considered
    ]
    numbers = {
        "points": points,
        "min_frequency": min_frequency,
        "top": [list(head) for head in study.top()],
        **{name: found and {"rho": found[0], "p": found[1]} for name, found in correlations.items()},
        "num_selected": len(selected),
        "num_all": len(considered),
    }
    title = "Fig. 6b: selection frequency and IoU"
    return Finding("fig6b", title, tables, _reading(study, correlations, len(selected)), numbers)


def _correlation(heads: Sequence[RankedHead], iou: NDArray[np.float64]) -> tuple[float, float] | None:
    """Spearman's rho and its p of selection frequency and IoU; None where they are undefined."""
    return spearman([head.selection_frequency for head in heads], [iou[head.address] for head in heads])


def _correlation_table(
    study: Study,
    selected: Sequence[RankedHead],
    considered: Sequence[RankedHead],
    correlations: Mapping[str, tuple[float, float] | None],
) -> Table:
    share = f"{study.options.sweeps.min_frequency:.0%}"
    rows = [
        (
            f"ours, heads selected in at least {share}",
            str(len(selected)),
            *_rho_cells(correlations["selected"]),
        ),
        ("ours, all heads", str(len(considered)), *_rho_cells(correlations["all"])),
    ]
    rows.append(("paper, every model", "-", f"> {paper.MIN_RHO}", "p < 0.001"))
    return Table(("heads", "number", "Spearman rho", "p"), tuple(rows))


def _rho_cells(found: tuple[float, float] | None) -> tuple[str, str]:
    return ("-", "-") if found is None else (two_decimals(found[0]), format_p_value(found[1]))


def _reading(study: Study, correlations: Mapping[str, tuple[float, float] | None], num_selected: int) -> str:
    correlation, truth = correlations["selected"], "mask" if study.num_masks == len(study) else "mask or box"
    if correlation is None:
        return f"Only {num_selected} heads are selected often enough: too few for a correlation."
    rho, p = correlation
    if p >= 0.05:
        verdict = "so here, unlike in the paper, heads that are selected more often do not clearly localise better"
    elif rho <= 0:
        verdict = "so here, unlike in the paper, heads that are selected more often localise worse"
    elif rho > paper.MIN_RHO:
        verdict = "as in the paper's models, heads that are selected more often localise better"
    else:
        verdict = "heads that are selected more often localise better, though less clearly than in the paper"
    reading = (
        f"Over the {num_selected} heads that are selected often enough, selection frequency, which uses no labels, "
        f"and the IoU of the head's own map with the true {truth} have Spearman's rho = {two_decimals(rho)} "
        f"({format_p_value(p)}): {verdict} (there rho > {paper.MIN_RHO}, p < 0.001)."
    )
    if (of_all := correlations["all"]) is not None:
        rho, p = of_all
        reading += f" With all heads, also those never selected, rho is {two_decimals(rho)} ({format_p_value(p)})."
    return reading


def random_sets(study: Study) -> list[tuple[Head, ...]]:
    """Sets of random heads from the layers of the localization heads; the seed makes them the same in every run."""
    rng, count = np.random.default_rng(study.options.seed), study.options.sweeps.random_sets
    return [layer_matched(study.require_heads(), study.shape, rng) for _ in range(count)]


def random_recipes(study: Study) -> dict[Hashable, Recipe]:
    sets: dict[Hashable, Heads] = {"found": study.require_heads(), "all": study.all_heads}
    sets |= {("random", index): heads for index, heads in enumerate(random_sets(study))}
    return {name: Recipe(heads, study.options.grounding) for name, heads in sets.items()}


MEASURES: dict[str, Callable[[Score], float]] = {
    "REC Acc@0.5": lambda score: score.iou >= 0.5,
    "mean box IoU": lambda score: score.iou,
    "pointing": lambda score: score.pointing,
}


def against_random(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """The localization heads against random heads of the same layers, paired by sample, and against all heads."""
    random = [scores["random", index].scores for index in range(study.options.sweeps.random_sets)]
    rows, numbers = [], {}
    for name, measure in MEASURES.items():
        ours = [measure(score) for score in scores["found"].scores]
        result = paired_difference(ours, [[measure(score) for score in theirs] for theirs in random])
        result["all"] = of_all = float(np.mean([measure(score) for score in scores["all"].scores]))
        low, high = result["interval"]
        rows.append(
            (
                name,
                percent(result["found"]),
                percent(result["random"]),
                f"{percent(result['difference'])} [{percent(low)}, {percent(high)}]",
                f"{result['beaten']} of {len(random)}",
                percent(of_all),
            )
        )
        numbers[name] = result
    columns = ("measure (%)", "heads found", "random heads", "difference [95 %]", "sets beaten", "all heads")
    against = f"{join_names(study.heads)} against {len(random)} random sets of the same layers"
    table, title = Table(columns, tuple(rows), against), "Against random heads of the same layers"
    return Finding("random", title, (table,), _random_reading(numbers["REC Acc@0.5"], len(random)), numbers)


def paired_difference(found: ArrayLike, random: Sequence[ArrayLike]) -> dict[str, Any]:
    """The mean difference between `found [sample]` and the average of `random [set, sample]`, paired by sample.

    `interval` is its 95 % bootstrap interval over samples; `beaten` counts the sets with a lower mean.
    """
    ours, sets = np.asarray(found, dtype=np.float64), np.asarray(random, dtype=np.float64)
    difference = ours - sets.mean(axis=0)
    return {
        "found": float(ours.mean()),
        "random": float(sets.mean()),
        "sets": [float(mean) for mean in sets.mean(axis=1)],
        "difference": float(difference.mean()),
        "interval": list(bootstrap_interval(difference)),
        "beaten": int((sets.mean(axis=1) < ours.mean()).sum()),
    }


def _random_reading(result: Mapping[str, Any], num_sets: int) -> str:
    low, high = result["interval"]
    verdict = (
        "larger than chance explains"
        if low > 0
        else "negative: random heads do better"
        if high < 0
        else "not significant with this many expressions"
    )
    return (
        f"The heads found reach an Acc@0.5 of {percent(result['found'])}, random heads of the same layers "
        f"{percent(result['random'])} on average over {num_sets} sets. The difference of "
        f"{percent(result['difference'])} points [{percent(low)}, {percent(high)}] is {verdict}; "
        f"{result['beaten']} of the {num_sets} sets do worse. All heads, without selection, reach "
        f"{percent(result['all'])}."
    )
