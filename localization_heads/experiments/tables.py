"""The paper's tables: REC, RES and ReasonSeg (Tab. 1 to 3), number of heads (4), criteria (5), smoothing (8)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localization_heads.experiments import paper
from localization_heads.experiments.paper import (
    MISSING,
    Finding,
    Table,
    above_or_below,
    format_reported,
    percent,
)
from localization_heads.experiments.study import Study, highest, join_names
from localization_heads.experiments.validation import Heads, Recipe, RecipeScores
from localization_heads.heads.ranking import NONE_KEPT, top_by_paper_criteria

ALL = "all heads"
"""The control without selection: the sum of the maps of all heads in the layers that are not excluded."""
ROBUST = "both and the third"
"""The heads of `criteria=robust`: kept by criterion 1, ranked by how far their maps follow the expression."""
CRITERIA, SELECTIONS = ("criterion 1", "criterion 2", "both"), ("fixed", "greedy")


def main_recipes(study: Study) -> dict[Hashable, Recipe]:
    return {"ours": Recipe(study.require_heads(), study.options.grounding, segmented=True)}


def comprehension(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 1: referring expression comprehension, Acc@0.5 of the box."""
    metrics = scores["ours"].metrics
    low, high = metrics["acc@0.5_interval"]
    reading = (
        f"{study.model} with {join_names(study.heads)} reaches an Acc@0.5 of {percent(metrics['acc@0.5'])} "
        f"[{percent(low)}, {percent(high)}] over {len(study):,} expressions; the mean IoU is "
        f"{percent(metrics['mean_iou'])}, the pointing game {percent(metrics['pointing'])}."
    )
    return _benchmark(study, scores, "tab1", "Tab. 1: REC", {"Acc@0.5": "acc@0.5"}, reading)


def segmentation(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 2: referring expression segmentation, cIoU of the mask."""
    metrics = scores["ours"].metrics
    reading = (
        f"The cIoU of the masks is {percent(metrics['ciou'])}, their gIoU {percent(metrics['giou'])}, over "
        f"{_num_masks(scores):,} expressions with a true mask. {_mask_source(study)}"
    )
    return _benchmark(study, scores, "tab2", "Tab. 2: RES", {"cIoU": "ciou"}, reading)


def reasoning(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 3: reasoning segmentation, cIoU (the paper) and gIoU of the mask."""
    metrics = scores["ours"].metrics
    reading = (
        f"cIoU {percent(metrics['ciou'])} and gIoU {percent(metrics['giou'])} over {_num_masks(scores):,} expressions. "
        f"{_mask_source(study)}"
    )
    if study.options.sweeps.benchmark not in paper.REASON_SPLITS:
        reading += " These entries are not said to be ReasonSeg (experiment.benchmark): nothing is told of reasoning."
    return _benchmark(study, scores, "tab3", "Tab. 3: ReasonSeg", {"cIoU": "ciou", "gIoU": "giou"}, reading)


def _num_masks(scores: Mapping[Any, RecipeScores]) -> int:
    return sum(score.overlap is not None for score in scores["ours"].scores)


def _mask_source(study: Study) -> str:
    if study.segmenter == "none":
        return "Masks are pseudo-masks (the filled hull); the paper's are SAM's."
    return f"Masks are those of segmenter={study.segmenter}; the paper's are SAM's."


def _benchmark(
    study: Study,
    scores: Mapping[Any, RecipeScores],
    name: str,
    title: str,
    row_metrics: Mapping[str, str],
    reading: str,
) -> Finding:
    """The row of the paper's numbers for this model, if it has any, and our rows, in the column of the split.

    Args:
        row_metrics: for each of our rows its label and the key of its metric.
    """
    paper_model, benchmark = paper.MODELS.get(study.model), study.options.sweeps.benchmark
    splits = paper.REASON_SPLITS if name == "tab3" else paper.SPLITS
    reported = paper_model and {"tab1": paper_model.rec, "tab2": paper_model.res, "tab3": paper_model.reasonseg}[name]
    on_split = benchmark in splits
    columns = splits if on_split or reported else ()
    if not on_split:
        columns = (*columns, study.data)
    rows = []
    if paper_model and reported:
        by_split = dict(zip(splits, reported, strict=True))
        cells = (format_reported(by_split.get(column)) for column in columns)
        rows.append((f"paper, {paper_model.name}", *cells))
    ours, own_column = scores["ours"].metrics, benchmark if on_split else study.data
    for label, metric in row_metrics.items():
        cells = (percent(ours[metric]) if column == own_column else MISSING for column in columns)
        rows.append((f"ours, {study.model}, {label}", *cells))
    return Finding(name, title, (Table(("model", *columns), tuple(rows)),), reading, ours)


def head_counts(study: Study) -> list[int]:
    """The values of k in Tab. 4 for which enough heads pass criterion 1."""
    return [k for k in sorted(set(study.options.sweeps.ks)) if k <= len(study.ranking.kept)]


def head_count_recipes(study: Study) -> dict[Hashable, Recipe]:
    heads_by: dict[Hashable, Heads] = {ALL: study.all_heads, **{k: study.top(k) for k in head_counts(study)}}
    return {name: Recipe(heads, study.options.grounding) for name, heads in heads_by.items()}


def head_count(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 4: the number of heads whose maps are summed."""
    ks = head_counts(study)
    rows = (
        *_rec_and_res_rows([scores[k] for k in (*ks, ALL)]),
        (
            "paper, RES (mean of ten models)",
            *(format_reported(paper.HEAD_COUNT_RES.get(k)) for k in ks),
            MISSING,
        ),
    )
    numbers = {"points": [{"k": k, **scores[k].metrics} for k in ks], "all": scores[ALL].metrics}
    table = Table(("number of heads k", *map(str, ks), ALL), rows)
    title = "Tab. 4: the number of heads"
    return Finding("tab4", title, (table,), _head_count_reading(study, scores, ks), numbers)


def _rec_and_res_rows(recipes: Sequence[RecipeScores]) -> Iterator[tuple[str, ...]]:
    """The row of REC (Acc@0.5) and that of RES (cIoU), with a column for each recipe."""
    for label, metric in (("ours, REC Acc@0.5", "acc@0.5"), ("ours, RES cIoU", "ciou")):
        yield label, *(percent(scores.metrics[metric]) for scores in recipes)


def _head_count_reading(study: Study, scores: Mapping[Any, RecipeScores], ks: list[int]) -> str:
    if not ks:
        return f"Criterion 1 keeps only {len(study.ranking.kept)} heads: fewer than any count asked for."
    accuracy = {k: scores[k].metrics["acc@0.5"] for k in ks}
    best = max(ks, key=lambda k: accuracy[k])
    comparison = "" if 3 not in ks or best == 3 else f", with k = 3 it is {percent(accuracy[3])}"
    return (
        f"Acc@0.5 is highest with k = {best} ({percent(accuracy[best])}){comparison}; the paper's masks are "
        f"best with k = 3. The heads, best first: {join_names(study.top(max(ks)))}. All heads summed, without "
        f"selection, reach {percent(scores[ALL].metrics['acc@0.5'])}."
    )


def criteria_recipes(study: Study) -> dict[Hashable, Recipe]:
    """Tab. 5, as we read it: each criterion alone ranks the heads.

    Criterion 1 alone takes the heads of the highest attention sums; criterion 2 alone ranks by selection frequency
    without a threshold (tau = 0). "Greedy" applies the same rule to the values of each sample; with both criteria, tau
    is then the elbow of that sample.
    """
    options = study.options
    k, exclude = options.k, options.criteria.exclude_layers
    heads_by: dict[Hashable, Heads | tuple[Heads, ...]] = {
        ("criterion 1", "fixed"): highest(study.sums.mean(axis=0, dtype=np.float64), k, exclude),
        ("criterion 2", "fixed"): tuple(top_by_paper_criteria(study.rank(tau=0.0), k)),
        ("both", "fixed"): tuple(top_by_paper_criteria(study.ranking, k)),
        ("criterion 1", "greedy"): tuple(highest(sums, k, exclude) for sums in study.sums),
        ("criterion 2", "greedy"): study.greedy(tau=0.0),
        ("both", "greedy"): study.greedy(),
    }
    if study.sensitivity is not None:
        heads_by[ROBUST] = study.top()
    heads_by[ALL] = study.all_heads
    return {name: Recipe(heads, options.grounding) for name, heads in heads_by.items()}


def criteria(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 5: each criterion alone and both, with fixed heads and with heads selected per sample."""
    recipes = criteria_recipes(study)
    rows: list[tuple[str, ...]] = []

    def add_row(label: str, heads: str, ours: RecipeScores, reported: tuple[float, float] | None = None) -> None:
        cells = (percent(ours.metrics[name]) for name in ("acc@0.5", "ciou"))
        rows.append((label, heads, *cells, *map(format_reported, reported or (None, None))))

    for selection in SELECTIONS:
        for criterion in CRITERIA:
            ours = scores[criterion, selection]
            scored = f" ({len(ours):,} of {len(study):,})" if len(ours) < len(study) else ""
            fixed = selection == "fixed"
            heads = join_names(recipes[criterion, selection].heads_of(0)) if fixed else "each sample's own"
            add_row(f"{criterion}, {selection}{scored}", heads, ours, paper.CRITERIA.get((criterion, selection)))
    if study.sensitivity is not None:
        add_row(f"{ROBUST}, fixed", join_names(study.top()), scores[ROBUST])
    add_row("no choice", f"all {len(study.all_heads):,}", scores[ALL])
    columns = ("criteria, heads", "the heads", "ours REC", "ours RES", "paper REC", "paper RES")
    table = Table(columns, tuple(rows), "The paper's columns: LLaVA-1.5-13B on RefCOCO val")
    named = {f"{c}, {selection}": scores[c, selection] for c in CRITERIA for selection in SELECTIONS}
    named |= {name: scores[name] for name in (ROBUST, ALL) if name in recipes}
    numbers = {name: {"samples": len(ours), **ours.metrics} for name, ours in named.items()}
    reading = _criteria_reading(study, scores)
    return Finding("tab5", "Tab. 5: the criteria, and fixed or greedy heads", (table,), reading, numbers)


def _criteria_reading(study: Study, scores: Mapping[Any, RecipeScores]) -> str:
    first, second, both = (scores[criterion, "fixed"].metrics["acc@0.5"] for criterion in CRITERIA)
    greedy = scores["both", "greedy"].metrics["acc@0.5"]
    reading = f"{NONE_KEPT.capitalize()}, so both criteria leave no fixed heads"
    if study.ranking.kept:
        reading = (
            f"With fixed heads, both criteria reach an Acc@0.5 of {percent(both)}, which is "
            f"{above_or_below(both, first)} criterion 1 alone ({percent(first)}) and "
            f"{above_or_below(both, second)} criterion 2 alone ({percent(second)})"
        )
    reading += (
        f"; heads that each expression picks by itself reach {percent(greedy)}. The paper finds both criteria far "
        "above either, and fixed heads above greedy ones. The maps of all heads, summed without selection, reach "
        f"{percent(scores[ALL].metrics['acc@0.5'])}."
    )
    if study.sensitivity is not None:
        reading += (
            " Heads that criterion 1 keeps and whose maps follow the expression most (criteria=robust, not in the "
            f"paper) reach {percent(scores[ROBUST].metrics['acc@0.5'])}."
        )
    if len(scores["both", "greedy"]) < len(study):
        reading += " Rows with fewer expressions leave those out in which no head passes, as stage=evaluate does."
    return reading


def smoothing_recipes(study: Study) -> dict[Hashable, Recipe]:
    base, sweeps = study.options.grounding, study.options.sweeps
    sigmas = {("sigma", sigma): replace(base, sigma=sigma) for sigma in sweeps.sigmas}
    kernels = {("kernel", size): replace(base, kernel_size=size) for size in sweeps.kernels}
    return {name: Recipe(study.require_heads(), grounding) for name, grounding in (sigmas | kernels).items()}


def smoothing(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """Tab. 8: sigma and kernel size of the Gaussian that smooths the maps."""
    base, sweeps = study.options.grounding, study.options.sweeps
    sigmas, kernels = sorted(set(sweeps.sigmas)), sorted(set(sweeps.kernels))
    tables = (
        _smoothing_table("sigma", sigmas, scores, paper.SMOOTHING_SIGMA, f"kernel {base.kernel_size}"),
        _smoothing_table("kernel", kernels, scores, paper.SMOOTHING_KERNEL, f"sigma {base.sigma:g}"),
    )
    accuracy = {sigma: scores["sigma", sigma].metrics["acc@0.5"] for sigma in sigmas}
    best = max(sigmas, key=lambda sigma: accuracy[sigma])
    reading = (
        f"Over sigma, Acc@0.5 runs from {percent(min(accuracy.values()))} to {percent(accuracy[best])}, the highest "
        f"at sigma = {best:g}; at sigma = {sigmas[0]:g} it is {percent(accuracy[sigmas[0]])}. In the paper the whole "
        "range of the smoothing moves it by 2.9 points (84.3 to 87.2). Sigma counts cells, so what suits one grid need "
        "not suit another."
    )
    numbers = {
        "sigma": [{"sigma": s, **scores["sigma", s].metrics} for s in sigmas],
        "kernel": [{"kernel": s, **scores["kernel", s].metrics} for s in kernels],
    }
    return Finding("tab8", "Tab. 8: smoothing", tables, reading, numbers)


def _smoothing_table(
    parameter: str,
    values: list[Any],
    scores: Mapping[Any, RecipeScores],
    reported: Mapping[Any, float],
    fixed: str,
) -> Table:
    rows = (
        *_rec_and_res_rows([scores[parameter, value] for value in values]),
        (
            "paper, REC (LLaVA-1.5-13B, RefCOCO val)",
            *(format_reported(reported.get(value)) for value in values),
        ),
    )
    return Table((f"{parameter} ({fixed})", *(f"{value:g}" for value in values)), rows)
