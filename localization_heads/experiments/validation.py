"""Scores of recipes (heads and read-out) in one pass over the maps; Fig. 6b; the comparison with random heads."""

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
from localization_heads.experiments.paper import Finding, Table, percent, probability, two_digits
from localization_heads.experiments.study import Study, names
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.heads.record import RankedHead
from localization_heads.options.groups import GroundingOptions

Heads = tuple[Head, ...]
Refine = Callable[[int, Grounding], Grounding]
"""The grounding of the sample with that index, with the segmenter's mask."""


@dataclass(frozen=True)
class Recipe:
    """The heads whose maps are summed, and the read-out of the sum.

    Args:
        heads: the same for every sample or, as a tuple of tuples, one tuple per sample. A sample without heads is
            not scored.
        segmented: whether the segmenter, if any, makes the mask. Sweeps go without: it would take most of their time
            and blur the comparison.
    """

    heads: Heads | tuple[Heads, ...]
    options: GroundingOptions
    segmented: bool = False

    def of(self, sample: int) -> Heads:
        """The heads of the sample with that index."""
        own = bool(self.heads) and not isinstance(self.heads[0], Head)
        return self.heads[sample] if own else self.heads  # type: ignore[return-value]


METRICS = ("acc@0.5", "acc@0.5_interval", "mean_iou", "pointing", "ciou", "giou")


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of one recipe on the samples for which it has heads, in the order of the study."""

    scores: Sequence[Score]

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """METRICS as `metrics.json` has them; None where undefined: without samples, or without true masks."""
        found: Mapping[str, Any] = {"acc@0.5_interval": [None, None]}
        if self.scores:
            found = summarize({"recipe": [[score] for score in self.scores]})["recipe"]
        return {name: found.get(name) for name in METRICS}


def score(
    recipes: Mapping[Any, Recipe],
    samples: Iterable[tuple[AttentionMaps, Truth]],
    refine: Refine | None = None,
) -> dict[Any, Scored]:
    """The scores of every recipe. The maps of each sample are read once, and equal recipes are computed once.

    Args:
        samples: the maps and the truth of each sample, in the order of the study.
        refine: the segmenter, for the recipes that ask for it.
    """
    found: dict[Recipe, list[Score]] = {recipe: [] for recipe in recipes.values()}
    for number, (maps, truth) in enumerate(samples):
        for recipe, scores in found.items():
            if heads := recipe.of(number):
                grounding = ground_maps(maps, heads, recipe.options)
                if refine and recipe.segmented:
                    grounding = refine(number, grounding)
                scores.append(score_grounding(grounding, truth))
    scored = {recipe: Scored(scores) for recipe, scores in found.items()}
    return {name: scored[recipe] for name, recipe in recipes.items()}


def frequency_and_iou(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Fig. 6b: selection frequency against the IoU of the head's own map, averaged over the samples."""
    assert study.ious is not None
    assert study.hits is not None
    iou, hit = study.ious.mean(axis=0, dtype=np.float64), study.hits.mean(axis=0, dtype=np.float64)
    ranking, least = study.ranking, study.options.sweeps.min_frequency
    often = [head for head in ranking.kept if head.selection_frequency >= least]
    everyone = [head for head in ranking.heads if head.layer >= ranking.exclude_layers]
    rows = [
        (
            str(head.address),
            percent(head.selection_frequency),
            percent(iou[head.address]),
            percent(hit[head.address]),
            str(1 + sum(iou[other.address] > iou[head.address] for other in everyone)),
        )
        for head in often[:10]
    ]
    numbers_of = ("selection frequency (%)", "mean IoU (%)", "pointing (%)", "its IoU's rank among all heads")
    results = {"selected": _correlation(often, iou), "all": _correlation(everyone, iou)}
    tables = (
        _correlation_table(study, often, everyone, results),
        Table(("head", *numbers_of), tuple(rows), "The heads selected most often"),
    )
    points = [
        {"head": list(head.address), "frequency": head.selection_frequency, "iou": float(iou[head.address])}
        for head in everyone
    ]
    numbers = {
        "points": points,
        "min_frequency": least,
        "top": [list(head) for head in study.found()],
        **{name: found and {"rho": found[0], "p": found[1]} for name, found in results.items()},
        "num_selected": len(often),
        "num_all": len(everyone),
    }
    title = "Fig. 6b: selection frequency and IoU"
    return Finding("fig6b", title, tables, _reading(study, results, often), numbers)


def _correlation(heads: Sequence[RankedHead], iou: NDArray[np.float64]) -> tuple[float, float] | None:
    return spearman([head.selection_frequency for head in heads], [iou[head.address] for head in heads])


def _correlation_table(
    study: Study,
    often: Sequence[RankedHead],
    everyone: Sequence[RankedHead],
    results: Mapping[str, tuple[float, float] | None],
) -> Table:
    share = f"{study.options.sweeps.min_frequency:.0%}"
    rows = [
        (f"ours, heads selected in at least {share}", str(len(often)), *_rho_cells(results["selected"])),
        ("ours, all heads", str(len(everyone)), *_rho_cells(results["all"])),
    ]
    rows.append(("paper, every model", "-", f"> {paper.LEAST_RHO}", "p < 0.001"))
    return Table(("heads", "number", "Spearman rho", "p"), tuple(rows))


def _rho_cells(found: tuple[float, float] | None) -> tuple[str, str]:
    return ("-", "-") if found is None else (two_digits(found[0]), probability(found[1]))


def _reading(
    study: Study, results: Mapping[str, tuple[float, float] | None], often: Sequence[RankedHead]
) -> str:
    found, truth = results["selected"], "mask" if study.num_masks == len(study) else "mask or box"
    if found is None:
        return f"Only {len(often)} heads are selected often enough: no correlation can be told."
    rho, p = found
    if p >= 0.05:
        verdict = "so here, unlike in the paper, heads selected more often are not seen to localise better"
    elif rho <= 0:
        verdict = "so here, unlike in the paper, heads that are selected more often localise worse"
    elif rho > paper.LEAST_RHO:
        verdict = "as in the paper's models, heads that are selected more often localise better"
    else:
        verdict = "heads that are selected more often localise better, though less strictly than in the paper"
    reading = (
        f"Over the {len(often)} heads that are selected often enough, selection frequency, which no label went into, "
        f"and the IoU of the head's own map with the true {truth} have Spearman's rho = {two_digits(rho)} "
        f"({probability(p)}): {verdict} (there rho > {paper.LEAST_RHO}, p < 0.001)."
    )
    if (everyone := results["all"]) is not None:
        rho, p = everyone
        reading += f" With all heads, also those never selected, rho is {two_digits(rho)} ({probability(p)})."
    return reading


def random_sets(study: Study) -> list[tuple[Head, ...]]:
    """Random heads from the layers of the localization heads, the same sets in every run."""
    rng, count = np.random.default_rng(study.options.seed), study.options.sweeps.random_sets
    return [layer_matched(study.needed_heads(), study.shape, rng) for _ in range(count)]


def random_recipes(study: Study) -> dict[Hashable, Recipe]:
    sets: dict[Hashable, Heads] = {"found": study.needed_heads(), "all": study.everyone}
    sets |= {("random", number): heads for number, heads in enumerate(random_sets(study))}
    return {name: Recipe(heads, study.options.grounding) for name, heads in sets.items()}


MEASURES: dict[str, Callable[[Score], float]] = {
    "REC Acc@0.5": lambda score: score.iou >= 0.5,
    "mean box IoU": lambda score: score.iou,
    "pointing": lambda score: score.pointing,
}


def against_random(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """The heads found against random heads of the same layers, paired by sample."""
    random = [scores["random", number].scores for number in range(study.options.sweeps.random_sets)]
    rows, numbers = [], {}
    for name, measure in MEASURES.items():
        ours = [measure(score) for score in scores["found"].scores]
        result = contrast(ours, [[measure(score) for score in theirs] for theirs in random])
        result["all"] = every = float(np.mean([measure(score) for score in scores["all"].scores]))
        low, high = result["interval"]
        rows.append(
            (
                name,
                percent(result["found"]),
                percent(result["random"]),
                f"{percent(result['difference'])} [{percent(low)}, {percent(high)}]",
                f"{result['beaten']} of {len(random)}",
                percent(every),
            )
        )
        numbers[name] = result
    columns = ("measure (%)", "heads found", "random heads", "difference [95 %]", "sets beaten", "all heads")
    against = f"{names(study.heads)} against {len(random)} random sets of the same layers"
    table, title = Table(columns, tuple(rows), against), "Against random heads of the same layers"
    return Finding("random", title, (table,), _random_reading(numbers["REC Acc@0.5"], len(random)), numbers)


def contrast(found: ArrayLike, random: Sequence[ArrayLike]) -> dict[str, Any]:
    """How far the mean of `found [sample]` is above that of `random [set, sample]`, paired by sample.

    The interval is the 95 % bootstrap interval, over samples, of the mean difference to the sets' average.
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
        "more than luck gives"
        if low > 0
        else "less than random heads give"
        if high < 0
        else "not to be told from luck with this many expressions"
    )
    return (
        f"The heads found reach an Acc@0.5 of {percent(result['found'])}, random heads of the same layers "
        f"{percent(result['random'])} on average over {num_sets} sets. The difference of "
        f"{percent(result['difference'])} points [{percent(low)}, {percent(high)}] is {verdict}; "
        f"{result['beaten']} of the {num_sets} sets do worse. All heads, without any choice, reach "
        f"{percent(result['all'])}."
    )
