"""The paper's tables: REC, RES and ReasonSeg (Tab. 1 to 3), number of heads (4), criteria (5), smoothing (8)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localization_heads.experiments import paper
from localization_heads.experiments.paper import MISSING, Finding, Table, percent, printed, than
from localization_heads.experiments.study import Study, highest, names
from localization_heads.experiments.validation import Heads, Recipe, Scored
from localization_heads.heads.ranking import NONE_KEPT, top_by_paper_criteria

ALL = "all heads"
"""The control: the maps of all heads of the layers that are not left out, added as they are."""
ROBUST = "both and the third"
"""The heads of `criteria=robust`: kept by criterion 1, ranked by how far their maps follow the expression."""
WHICH, WAYS = ("criterion 1", "criterion 2", "both"), ("fixed", "greedy")


def main_recipes(study: Study) -> dict[Hashable, Recipe]:
    return {"ours": Recipe(study.needed_heads(), study.options.grounding, segmented=True)}


def comprehension(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 1: referring expression comprehension, Acc@0.5 of the box."""
    found = scores["ours"].metrics
    low, high = found["acc@0.5_interval"]
    reading = (
        f"{study.model} with {names(study.heads)} reaches an Acc@0.5 of {percent(found['acc@0.5'])} "
        f"[{percent(low)}, {percent(high)}] over {len(study):,} expressions; the mean IoU is "
        f"{percent(found['mean_iou'])}, the pointing game {percent(found['pointing'])}."
    )
    return _benchmark(study, scores, "tab1", "Tab. 1: REC", {"Acc@0.5": "acc@0.5"}, reading)


def segmentation(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 2: referring expression segmentation, cIoU of the mask."""
    found = scores["ours"].metrics
    reading = (
        f"The cIoU of the masks is {percent(found['ciou'])}, their gIoU {percent(found['giou'])}, over "
        f"{_num_masks(scores):,} expressions with a true mask. {_masks(study)}"
    )
    return _benchmark(study, scores, "tab2", "Tab. 2: RES", {"cIoU": "ciou"}, reading)


def reasoning(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 3: reasoning segmentation, cIoU (the paper) and gIoU of the mask."""
    found = scores["ours"].metrics
    reading = (
        f"cIoU {percent(found['ciou'])} and gIoU {percent(found['giou'])} over {_num_masks(scores):,} expressions. "
        f"{_masks(study)}"
    )
    if study.options.sweeps.benchmark not in paper.REASON_SPLITS:
        reading += " These entries are not said to be ReasonSeg (experiment.benchmark): nothing is told of reasoning."
    return _benchmark(study, scores, "tab3", "Tab. 3: ReasonSeg", {"cIoU": "ciou", "gIoU": "giou"}, reading)


def _num_masks(scores: Mapping[Any, Scored]) -> int:
    return sum(score.overlap is not None for score in scores["ours"].scores)


def _masks(study: Study) -> str:
    if study.segmenter == "none":
        return "Masks are pseudo-masks (the filled hull); the paper's are SAM's."
    return f"Masks are those of segmenter={study.segmenter}; the paper's are SAM's."


def _benchmark(
    study: Study, scores: Mapping[Any, Scored], name: str, title: str, shown: Mapping[str, str], reading: str
) -> Finding:
    """One row per model: the paper's, if it has this model, then ours, in the column of the entries' split.

    Args:
        shown: our metrics by the name that their row bears.
    """
    known, benchmark = paper.MODELS.get(study.model), study.options.sweeps.benchmark
    splits = paper.REASON_SPLITS if name == "tab3" else paper.SPLITS
    reported = known and {"tab1": known.rec, "tab2": known.res, "tab3": known.reasonseg}[name]
    on_split = benchmark in splits
    columns = splits if on_split or reported else ()
    if not on_split:
        columns = (*columns, study.data)
    rows = []
    if known and reported:
        theirs = dict(zip(splits, reported, strict=True))
        rows.append((f"paper, {known.name}", *(printed(theirs.get(column)) for column in columns)))
    ours, own_column = scores["ours"].metrics, benchmark if on_split else study.data
    for label, metric in shown.items():
        cells = (percent(ours[metric]) if column == own_column else MISSING for column in columns)
        rows.append((f"ours, {study.model}, {label}", *cells))
    return Finding(name, title, (Table(("model", *columns), tuple(rows)),), reading, ours)


def head_counts(study: Study) -> list[int]:
    """The numbers of heads in Tab. 4 for which enough pass criterion 1."""
    return [k for k in sorted(set(study.options.sweeps.ks)) if k <= len(study.ranking.kept)]


def head_count_recipes(study: Study) -> dict[Hashable, Recipe]:
    found: dict[Hashable, Recipe] = {ALL: Recipe(study.everyone, study.options.grounding)}
    return found | {k: Recipe(study.found(k), study.options.grounding) for k in head_counts(study)}


def head_count(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 4: the number of heads whose maps are summed."""
    ks = head_counts(study)
    rows = (
        *_rec_and_res([scores[k] for k in (*ks, ALL)]),
        ("paper, RES (mean of ten models)", *(printed(paper.HEAD_COUNT_RES.get(k)) for k in ks), MISSING),
    )
    numbers = {"points": [{"k": k, **scores[k].metrics} for k in ks], "all": scores[ALL].metrics}
    table = Table(("number of heads k", *map(str, ks), ALL), rows)
    title = "Tab. 4: the number of heads"
    return Finding("tab4", title, (table,), _head_count_reading(study, scores, ks), numbers)


def _rec_and_res(found: Sequence[Scored]) -> Iterator[tuple[str, ...]]:
    """A row of boxes and one of masks, with a column for each recipe."""
    for label, metric in (("ours, REC Acc@0.5", "acc@0.5"), ("ours, RES cIoU", "ciou")):
        yield label, *(percent(one.metrics[metric]) for one in found)


def _head_count_reading(study: Study, scores: Mapping[Any, Scored], ks: list[int]) -> str:
    if not ks:
        return f"Criterion 1 keeps only {len(study.ranking.kept)} heads: fewer than any count asked for."
    accuracy = {k: scores[k].metrics["acc@0.5"] for k in ks}
    best = max(ks, key=lambda k: accuracy[k])
    comparison = "" if 3 not in ks or best == 3 else f", with k = 3 it is {percent(accuracy[3])}"
    return (
        f"Acc@0.5 is highest with k = {best} ({percent(accuracy[best])}){comparison}; the paper's masks are "
        f"best with k = 3. The heads, best first: {names(study.found(max(ks)))}. All heads added, without any choice, "
        f"reach {percent(scores[ALL].metrics['acc@0.5'])}."
    )


def criteria_recipes(study: Study) -> dict[Hashable, Recipe]:
    """Tab. 5, as we read it: each criterion alone ranks the heads.

    Criterion 1 alone takes the highest attention sums; criterion 2 alone ranks by selection frequency without
    a threshold (tau = 0). "Greedy" does the same with the values of one sample; both criteria together then take
    that sample's own elbow.
    """
    options = study.options
    k, exclude = options.k, options.criteria.exclude_layers
    chosen: dict[Hashable, Heads | tuple[Heads, ...]] = {
        ("criterion 1", "fixed"): highest(study.sums.mean(axis=0, dtype=np.float64), k, exclude),
        ("criterion 2", "fixed"): tuple(top_by_paper_criteria(study.ranked(tau=0.0), k)),
        ("both", "fixed"): tuple(top_by_paper_criteria(study.ranking, k)),
        ("criterion 1", "greedy"): tuple(highest(sums, k, exclude) for sums in study.sums),
        ("criterion 2", "greedy"): study.greedy(tau=0.0),
        ("both", "greedy"): study.greedy(),
    }
    if study.sensitivity is not None:
        chosen[ROBUST] = study.found()
    found = {name: Recipe(heads, options.grounding) for name, heads in chosen.items()}
    return found | {ALL: Recipe(study.everyone, options.grounding)}


def criteria(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 5: each criterion alone and both; fixed heads against heads selected per sample."""
    recipes = criteria_recipes(study)
    rows: list[tuple[str, ...]] = []

    def add(label: str, heads: str, found: Scored, reported: tuple[float, float] | None = None) -> None:
        ours = (percent(found.metrics[name]) for name in ("acc@0.5", "ciou"))
        rows.append((label, heads, *ours, *map(printed, reported or (None, None))))

    for way in WAYS:
        for which in WHICH:
            found = scores[which, way]
            some = f" ({len(found):,} of {len(study):,})" if len(found) < len(study) else ""
            heads = names(recipes[which, way].of(0)) if way == "fixed" else "each sample's own"
            add(f"{which}, {way}{some}", heads, found, paper.CRITERIA.get((which, way)))
    if study.sensitivity is not None:
        add(f"{ROBUST}, fixed", names(study.found()), scores[ROBUST])
    add("no choice", f"all {len(study.everyone):,}", scores[ALL])
    columns = ("criteria, heads", "the heads", "ours REC", "ours RES", "paper REC", "paper RES")
    table = Table(columns, tuple(rows), "The paper's columns: LLaVA-1.5-13B on RefCOCO val")
    known = {f"{which}, {way}": scores[which, way] for which in WHICH for way in WAYS}
    known |= {name: scores[name] for name in (ROBUST, ALL) if name in recipes}
    numbers = {name: {"samples": len(found), **found.metrics} for name, found in known.items()}
    reading = _criteria_reading(study, scores)
    return Finding("tab5", "Tab. 5: the criteria, and fixed or greedy heads", (table,), reading, numbers)


def _criteria_reading(study: Study, scores: Mapping[Any, Scored]) -> str:
    first, second, both = (scores[which, "fixed"].metrics["acc@0.5"] for which in WHICH)
    greedy = scores["both", "greedy"].metrics["acc@0.5"]
    reading = f"{NONE_KEPT.capitalize()}, so both criteria leave no fixed heads"
    if study.ranking.kept:
        reading = (
            f"With fixed heads, both criteria reach an Acc@0.5 of {percent(both)}, which is "
            f"{than(both, first)} criterion 1 alone ({percent(first)}) and "
            f"{than(both, second)} criterion 2 alone ({percent(second)})"
        )
    reading += (
        f"; heads that each expression picks by itself reach {percent(greedy)}. The paper finds both criteria far "
        "above either, and fixed heads above greedy ones. The maps of all heads, added without any choice, reach "
        f"{percent(scores[ALL].metrics['acc@0.5'])}."
    )
    if study.sensitivity is not None:
        reading += (
            " Heads that criterion 1 keeps and whose maps follow the expression most (criteria=robust, not in the "
            f"paper) reach {percent(scores[ROBUST].metrics['acc@0.5'])}."
        )
    if len(scores["both", "greedy"]) < len(study):
        reading += (
            " Rows with fewer expressions leave those out in which no head passes, as stage=evaluate does."
        )
    return reading


def smoothing_recipes(study: Study) -> dict[Hashable, Recipe]:
    base, sweeps = study.options.grounding, study.options.sweeps
    sigmas = {("sigma", sigma): replace(base, sigma=sigma) for sigma in sweeps.sigmas}
    kernels = {("kernel", size): replace(base, kernel_size=size) for size in sweeps.kernels}
    return {name: Recipe(study.needed_heads(), grounding) for name, grounding in (sigmas | kernels).items()}


def smoothing(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Tab. 8: the Gaussian that smooths the maps."""
    fixed, sweeps = study.options.grounding, study.options.sweeps
    sigmas, kernels = sorted(set(sweeps.sigmas)), sorted(set(sweeps.kernels))
    tables = (
        _smoothing_table("sigma", sigmas, scores, paper.SMOOTHING_SIGMA, f"kernel {fixed.kernel_size}"),
        _smoothing_table("kernel", kernels, scores, paper.SMOOTHING_KERNEL, f"sigma {fixed.sigma:g}"),
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
    what: str, values: list[Any], scores: Mapping[Any, Scored], reported: Mapping[Any, float], held: str
) -> Table:
    rows = (
        *_rec_and_res([scores[what, value] for value in values]),
        ("paper, REC (LLaVA-1.5-13B, RefCOCO val)", *(printed(reported.get(value)) for value in values)),
    )
    return Table((f"{what} ({held})", *(f"{value:g}" for value in values)), rows)
