"""The paper's tables: REC, RES and ReasonSeg (Tab. 1 to 3), number of heads (4), criteria (5), smoothing (8)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from localization_heads.experiments import paper
from localization_heads.experiments.paper import Finding, Table, percent, printed, than
from localization_heads.experiments.study import Study, first, highest, names
from localization_heads.experiments.validation import Heads, Recipe, Scores
from localization_heads.heads.ranking import NONE_KEPT

WHICH, WAYS = ("criterion 1", "criterion 2", "both"), ("fixed", "greedy")


def main_recipes(study: Study) -> dict[Hashable, Recipe]:
    return {"ours": Recipe(study.needed_heads(), study.options.grounding, segmented=True)}


def _masks(study: Study) -> str:
    if study.segmenter == "none":
        return "Masks are pseudo-masks (the filled hull); the paper's are SAM's."
    return f"Masks are those of segmenter={study.segmenter}; the paper's are SAM's."


def comprehension(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 1: referring expression comprehension, Acc@0.5 of the box."""
    found = scores["ours"]
    low, high = found.summary()["acc@0.5_interval"]
    reading = (
        f"{study.model} with {names(study.heads)} reaches an Acc@0.5 of {percent(found.accuracy)} "
        f"[{percent(low)}, {percent(high)}] over {len(study):,} expressions; the mean IoU is "
        f"{percent(found.mean_iou)}, the pointing game {percent(found.pointing)}."
    )
    ours = {"Acc@0.5": found.accuracy}
    return _benchmark(study, ours, "tab1", "Tab. 1: REC", paper.SPLITS, "rec", reading, found)


def segmentation(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 2: referring expression segmentation, cIoU of the mask."""
    found = scores["ours"]
    reading = (
        f"The cIoU of the masks is {percent(found.ciou)}, their gIoU {percent(found.giou)}, over "
        f"{len(found.overlap):,} expressions with a true mask. {_masks(study)}"
    )
    ours = {"cIoU": found.ciou}
    return _benchmark(study, ours, "tab2", "Tab. 2: RES", paper.SPLITS, "res", reading, found)


def reasoning(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 3: reasoning segmentation, cIoU (the paper) and gIoU of the mask."""
    found = scores["ours"]
    reading = (
        f"cIoU {percent(found.ciou)} and gIoU {percent(found.giou)} over {len(found.overlap):,} expressions. "
        f"{_masks(study)}"
    )
    if study.options.benchmark not in paper.REASON_SPLITS:
        reading += " These entries are not said to be ReasonSeg (experiment.benchmark): nothing is told of reasoning."
    ours = {"cIoU": found.ciou, "gIoU": found.giou}
    return _benchmark(
        study, ours, "tab3", "Tab. 3: ReasonSeg", paper.REASON_SPLITS, "reasonseg", reading, found
    )


def _benchmark(
    study: Study,
    ours: Mapping[str, float],
    name: str,
    title: str,
    splits: tuple[str, ...],
    attribute: str,
    reading: str,
    found: Scores,
) -> Finding:
    """One row per model: the paper's, if it has this model, then ours, in the column of the entries' split."""
    known, benchmark = paper.MODELS.get(study.model), study.options.benchmark
    reported = getattr(known, attribute) if known else None
    on_split = benchmark in splits
    columns = splits if on_split or reported else ()
    if not on_split:
        columns = (*columns, study.data)
    rows = []
    if known and reported:
        theirs = dict(zip(splits, reported, strict=True))
        rows.append((f"paper, {known.name}", *(printed(theirs.get(column)) for column in columns)))
    for metric, value in ours.items():
        cells = (
            percent(value) if column == (benchmark if on_split else study.data) else "-" for column in columns
        )
        rows.append((f"ours, {study.model}, {metric}", *cells))
    return Finding(name, title, (Table(("model", *columns), tuple(rows)),), reading, found.summary())


def head_counts(study: Study) -> list[int]:
    """The numbers of heads in Tab. 4 for which enough pass criterion 1."""
    return [k for k in sorted(set(study.options.ks)) if k <= len(study.ranking.kept)]


def head_count_recipes(study: Study) -> dict[Hashable, Recipe]:
    return {k: Recipe(study.found(k), study.options.grounding) for k in head_counts(study)}


def head_count(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 4: the number of heads whose maps are summed."""
    ks = head_counts(study)
    rows = (
        ("ours, REC Acc@0.5", *(percent(scores[k].accuracy) for k in ks)),
        ("ours, RES cIoU", *(percent(scores[k].ciou) for k in ks)),
        ("paper, RES (mean of ten models)", *(printed(paper.HEAD_COUNT_RES.get(k)) for k in ks)),
    )
    numbers = {"points": [{"k": k, **scores[k].summary()} for k in ks]}
    table = Table(("number of heads k", *map(str, ks)), rows)
    title = "Tab. 4: the number of heads"
    return Finding("tab4", title, (table,), _head_count_reading(study, scores, ks), numbers)


def _head_count_reading(study: Study, scores: Mapping[Any, Scores], ks: list[int]) -> str:
    if not ks:
        return f"Criterion 1 keeps only {len(study.ranking.kept)} heads: fewer than any count asked for."
    best = max(ks, key=lambda k: scores[k].accuracy)
    comparison = "" if 3 not in ks or best == 3 else f", with k = 3 it is {percent(scores[3].accuracy)}"
    return (
        f"Acc@0.5 is highest with k = {best} ({percent(scores[best].accuracy)}){comparison}; the paper's masks are "
        f"best with k = 3. The heads, best first: {names(study.found(max(ks)))}."
    )


def criteria_recipes(study: Study) -> dict[Hashable, Recipe]:
    """Tab. 5, as we read it: each criterion alone ranks by itself.

    Criterion 1 alone takes the highest attention sums; criterion 2 alone ranks by selection frequency with
    no threshold (tau = 0). "Greedy" does the same with one sample's values; both criteria together then take
    that sample's own elbow.
    """
    options = study.options
    k, exclude = options.k, options.criteria.exclude_layers
    own_sums = tuple(highest(sums, k, exclude) for sums in study.sums)
    chosen: dict[Hashable, Heads | tuple[Heads, ...]] = {
        ("criterion 1", "fixed"): highest(study.sums.mean(axis=0, dtype=np.float64), k, exclude),
        ("criterion 2", "fixed"): first(study.ranked(tau=0.0), k),
        ("both", "fixed"): study.found(),
        ("criterion 1", "greedy"): own_sums,
        ("criterion 2", "greedy"): study.greedy(tau=0.0),
        ("both", "greedy"): study.greedy(),
    }
    return {name: Recipe(heads, options.grounding) for name, heads in chosen.items()}


def criteria(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 5: each criterion alone and both; fixed heads against heads selected per sample."""
    recipes = criteria_recipes(study)
    rows = []
    for way in WAYS:
        for which in WHICH:
            found, reported = scores[which, way], paper.CRITERIA.get((which, way))
            heads = names(recipes[which, way].of(0)) if way == "fixed" else "each sample's own"
            rec, res = reported or (None, None)
            rows.append(
                (
                    f"{which}, {way}"
                    + (f" ({len(found):,} of {len(study):,})" if len(found) < len(study) else ""),
                    heads,
                    percent(found.accuracy),
                    percent(found.ciou),
                    printed(rec),
                    printed(res),
                )
            )
    columns = ("criteria, heads", "the heads", "ours REC", "ours RES", "paper REC", "paper RES")
    table = Table(columns, tuple(rows), "The paper's columns: LLaVA-1.5-13B on RefCOCO val")
    numbers = {
        f"{which}, {way}": {"samples": len(scores[which, way]), **scores[which, way].summary()}
        for which in WHICH
        for way in WAYS
    }
    reading = _criteria_reading(study, scores)
    return Finding("tab5", "Tab. 5: the criteria, and fixed or greedy heads", (table,), reading, numbers)


def _criteria_reading(study: Study, scores: Mapping[Any, Scores]) -> str:
    both = scores["both", "fixed"].accuracy
    alone = {which: scores[which, "fixed"].accuracy for which in ("criterion 1", "criterion 2")}
    greedy = scores["both", "greedy"].accuracy
    reading = f"{NONE_KEPT.capitalize()}, so both criteria leave no fixed heads"
    if study.found():
        reading = (
            f"With fixed heads, both criteria reach an Acc@0.5 of {percent(both)}, which is "
            f"{than(both, alone['criterion 1'])} criterion 1 alone ({percent(alone['criterion 1'])}) and "
            f"{than(both, alone['criterion 2'])} criterion 2 alone ({percent(alone['criterion 2'])})"
        )
    reading += (
        f"; heads that each expression picks by itself reach {percent(greedy)}. The paper finds both criteria far "
        "above either, and fixed heads above greedy ones."
    )
    if len(scores["both", "greedy"]) < len(study):
        reading += (
            " Rows with fewer expressions leave those out in which no head passes, as stage=evaluate does."
        )
    return reading


def smoothing_recipes(study: Study) -> dict[Hashable, Recipe]:
    base, options = study.options.grounding, study.options
    sigmas = {("sigma", sigma): replace(base, sigma=sigma) for sigma in options.sigmas}
    kernels = {("kernel", size): replace(base, kernel_size=size) for size in options.kernels}
    return {name: Recipe(study.needed_heads(), grounding) for name, grounding in (sigmas | kernels).items()}


def smoothing(study: Study, scores: Mapping[Any, Scores]) -> Finding:
    """Tab. 8: the Gaussian that smooths the maps."""
    options = study.options
    sigmas, kernels = sorted(set(options.sigmas)), sorted(set(options.kernels))
    tables = (
        _smoothing_table(
            "sigma", sigmas, scores, paper.SMOOTHING_SIGMA, f"kernel {options.grounding.kernel_size}"
        ),
        _smoothing_table(
            "kernel", kernels, scores, paper.SMOOTHING_KERNEL, f"sigma {options.grounding.sigma:g}"
        ),
    )
    best = max(sigmas, key=lambda sigma: scores["sigma", sigma].accuracy)
    bare, ours = scores["sigma", sigmas[0]], scores["sigma", best]
    reading = (
        f"Over sigma, Acc@0.5 runs from {percent(min(scores['sigma', s].accuracy for s in sigmas))} to "
        f"{percent(ours.accuracy)}, the highest at sigma = {best:g}; at sigma = {sigmas[0]:g} it is "
        f"{percent(bare.accuracy)}. In the paper the whole range of the smoothing moves it by 2.9 points "
        "(84.3 to 87.2). Sigma counts cells, so what suits one grid need not suit another."
    )
    numbers = {
        "sigma": [{"sigma": s, **scores["sigma", s].summary()} for s in sigmas],
        "kernel": [{"kernel": s, **scores["kernel", s].summary()} for s in kernels],
    }
    return Finding("tab8", "Tab. 8: smoothing", tables, reading, numbers)


def _smoothing_table(
    what: str, values: list[Any], scores: Mapping[Any, Scores], reported: Mapping[Any, float], held: str
) -> Table:
    rows = (
        ("ours, REC Acc@0.5", *(percent(scores[what, value].accuracy) for value in values)),
        ("ours, RES cIoU", *(percent(scores[what, value].ciou) for value in values)),
        ("paper, REC (LLaVA-1.5-13B, RefCOCO val)", *(printed(reported.get(value)) for value in values)),
    )
    return Table((f"{what} ({held})", *(f"{value:g}" for value in values)), rows)
