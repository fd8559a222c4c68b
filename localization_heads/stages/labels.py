"""`heads_by=mass|iou|pointing|vrh`: heads ranked by how well they localise labelled objects.

The label-free statistics of `find` are stored in the same pass, so that both rankings can be compared and mixed. A
curve shows how the ranking improves with the number of labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.samples import Sample
from localization_heads.datasets.leakage import image_keys
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.head_iou import label_scores
from localization_heads.evaluation.judging import truth_of
from localization_heads.heads.criteria import HeadStatistics, check_criteria, head_statistics
from localization_heads.heads.labels import (
    LabelRecipe,
    QualityCurve,
    mass_on_patches,
    quality_curve,
    rank_by_labels,
)
from localization_heads.heads.ranking import random_draws
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.lvlm.answers.box_formats import FORMATS, BoxFormat
from localization_heads.lvlm.extra_prompts import (
    measure_sensitivity,
    measures_sensitivity,
    sensitivity_prompts,
)
from localization_heads.lvlm.native_box import with_box_span
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries, require_truth
from localization_heads.stages.evaluate import complete_box, truth_digest
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import Result
from localization_heads.stages.ranking import back_up_heads_file
from localization_heads.stages.report import Reporter
from localization_heads.stages.run import Run
from localization_heads.stages.sensitivity import (
    add_stored_sensitivity,
    choose_mirrored_samples,
    mirrored_pass,
)
from localization_heads.stages.statistics import (
    append_statistics,
    find_stored_statistics,
    open_ranking_statistics,
    prompt_conditions,
)
from localization_heads.store.files import RunLock, write_json
from localization_heads.store.results import save_ranking
from localization_heads.store.statistics import StatisticsStore, StoreHeader, find_stores

MAP_SCORES = {"mass": "<f4", "iou": "<f4", "pointing": "<f4"}
"""The columns of a store of scores from the query token's map."""
BOX_SCORES = {"vrh": "<f4"}
"""The column of a store of scores from the tokens of the generated box."""
QUALITY = {
    "mass": "mean attention mass in the truth of each of the first {k} heads, on entries not drawn",
    "vrh": "mean attention of the generated box's tokens on the patches of the true box, of each of the first {k} "
    "heads, on entries not drawn",
}


class LabelRanking(NamedTuple):
    """The ranking by labels with its files (`result`), and what it is compared with.

    Attributes:
        curve: the quality of the ranking by the number of labels.
        unshrunk_curve: the same without shrinkage; None if the recipe has none.
        label_free: the label-free ranking of the same entries.
    """

    result: Result
    curve: QualityCurve
    unshrunk_curve: QualityCurve | None
    recipe: LabelRecipe
    label_free: HeadRanking


def find_by_labels(run: Run) -> LabelRanking:
    """Rank the heads by labels -> heads.json, heads.csv, labels.json and figures."""
    entries = _select_labelled(run)
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        box_format = with_box_span(run.lvlm).box_format if run.options.heads_by == "vrh" else None
        store = open_ranking_statistics(run, entries)
        scores = _scores_header(run, store.settings, box_format, run.lvlm.num_layers, run.lvlm.num_heads).open()
        _collect_scores(run, entries, store, scores, box_format)
        failed = {failure.line: failure.reason for failure in entries.failures}
        scores.record_failures(
            {_score_key(entries, sample): failed[sample.line] for sample in entries.samples if sample.line in failed}
        )
        ranked = _rank(run, entries, store, scores)
        report_paths = Reporter(run, ranked.result.ranking).write(entries, store=store)
        paths = [*ranked.result.paths, *report_paths]
        return ranked._replace(result=replace(ranked.result, paths=paths))


def rank_by_stored_labels(run: Run) -> LabelRanking:
    """The ranking of `find_by_labels` from the statistics and scores on disk, without the model."""
    by, entries, record = run.options.heads_by, _select_labelled(run), find_stored_statistics(run)
    check_criteria(run.options.criteria, record.num_layers)
    entries.with_sensitivity = record.has_sensitivity
    box_format = FORMATS.get(run.spec.native_box or "") if by == "vrh" else None
    header = _scores_header(run, record.settings, box_format, record.num_layers, record.num_heads)
    exists = any(
        stored.settings == header.settings and stored.columns == header.columns for stored in find_stores(header.folder)
    )
    if (by == "vrh" and box_format is None) or not exists:
        raise UsageError(
            f"stage=rank heads_by={by}: no such scores of these options in {header.folder}: run stage=find with them "
            "first"
        )
    with RunLock(run.folder):
        store, scores = record.open(), header.open()
        missing = [
            sample
            for sample in entries.samples
            if entries.stored_statistics_key(sample, store) not in store or _score_key(entries, sample) not in scores
        ]
        stored_failures = scores.failures()
        for sample in missing:
            if (reason := stored_failures.get(_score_key(entries, sample))) is None:
                raise WorkError(
                    f"{len(missing)} of the {len(entries.samples)} entries have no scores on disk (the first: line "
                    f"{sample.line}, {sample.id}): run stage=find with the same options, which does only those"
                )
            entries.fail(sample, reason)
        return _rank(run, entries, store, scores)


def _select_labelled(run: Run) -> Entries:
    """The entries with ground truth to use; raises UsageError if there are fewer than `num_labels`."""
    purpose = f"heads_by={run.options.heads_by} (heads_by=criteria needs no truth)"
    entries = _draw_entries(run, require_truth(load_entries(run), purpose, complete_box))
    _check_num_labels(run, len(entries.samples))
    return entries


def _check_num_labels(run: Run, num_usable: int) -> None:
    num_labels, num_samples = run.options.num_labels, run.options.num_samples
    if num_labels is None or num_labels <= num_usable:
        return
    limit = f"num_samples={num_samples} allows" if num_usable == num_samples else "there are"
    raise UsageError(
        f"num_labels={num_labels}: {limit} only {num_usable} entries with a true box or mask that can be used; write "
        f"num_labels={num_usable} or fewer, or null for all"
    )


def _draw_entries(run: Run, entries: Entries) -> Entries:
    """At most `num_samples` entries, drawn with `random_seed`, in file order."""
    draw = random_draws(len(entries.samples), 1, run.options.num_samples, run.options.random_seed)[0]
    return Entries([entries.samples[index] for index in np.flatnonzero(draw)], entries.failures)


def _scores_header(
    run: Run, settings: Mapping[str, Any], box_format: BoxFormat | None, num_layers: int, num_heads: int
) -> StoreHeader:
    """The header of the store of scores. The ground truth is not part of it, but of each sample's key.

    Args:
        settings: those of the statistics of the same maps.
    """
    native_box = None if box_format is None else [box_format.prompt, box_format.pattern, box_format.max_new_tokens]
    of_model = {name: value for name, value in settings.items() if name != "asked"}
    columns = MAP_SCORES if box_format is None else BOX_SCORES
    return StoreHeader(
        run.folder / "labels", {**of_model, "native_box": native_box}, num_layers, num_heads, 0.0, columns
    )


def _score_key(entries: Entries, sample: Sample) -> bytes:
    """A key of 16 bytes for the sample and its ground truth."""
    return hashlib.blake2b(entries.key(sample) + truth_digest([sample]).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _ScoredSample:
    sample: Sample
    statistics: HeadStatistics
    sensitivity: SensitivityStatistics | None
    scores: Mapping[str, NDArray[np.float32]]


def _collect_scores(
    run: Run, entries: Entries, store: StatisticsStore, scores: StatisticsStore, box_format: BoxFormat | None
) -> None:
    """Run the model over the entries whose statistics or scores are missing."""
    criteria = run.options.criteria
    mirrored = choose_mirrored_samples(entries.samples, criteria)

    def statistics_key(sample: Sample) -> bytes:
        if sample.id in mirrored:
            return entries.statistics_key(sample, mirrored=True)
        return entries.stored_statistics_key(sample, store)

    def save(scored: Sequence[_ScoredSample]) -> None:
        append_statistics(
            entries,
            [(item.sample, item.statistics) for item in scored],
            store,
            [statistics_key(item.sample) for item in scored],
            [item.sensitivity for item in scored if item.sensitivity],
        )
        keys = [_score_key(entries, item.sample) for item in scored]
        scores.append(keys, *(np.stack([item.scores[name] for item in scored]) for name in scores.columns))

    run_over_samples(
        run,
        entries,
        entries.samples,
        "find",
        is_done=lambda sample: statistics_key(sample) in store and _score_key(entries, sample) in scores,
        process=partial(_score_chunk, box_format=box_format),
        save=save,
        process_runs_model=box_format is not None,
        second_pass=mirrored_pass(mirrored),
        extra_prompts=sensitivity_prompts(criteria),
    )


def _score_chunk(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, box_format: BoxFormat | None
) -> list[_ScoredSample]:
    scored = []
    for entry in attended:
        with entries.skip_on_error(entry.sample):
            truth = truth_of(entry.sample, entry.single_image.size)
            if box_format is None:
                scores = label_scores(entry.maps, truth)
            else:
                maps = with_box_span(run.lvlm).attend(entry.single_image, entry.sample.expression)
                scores = {"vrh": mass_on_patches(maps, truth.box)}
            statistics = head_statistics(entry.maps.attention, run.options.criteria)
            sensitivity = None
            if measures_sensitivity(run.options.criteria):
                sensitivity = measure_sensitivity(entry.maps, entry.mirrored_maps)
            scored.append(_ScoredSample(entry.sample, statistics, sensitivity, scores))
    return scored


def _rank(run: Run, entries: Entries, store: StatisticsStore, scores: StatisticsStore) -> LabelRanking:
    """Rank the heads on all usable entries, and write the files of the ranking."""
    options, samples = run.options, entries.usable
    if not samples:
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    _check_num_labels(run, len(samples))
    recipe = _label_recipe(run)
    rows = store.rows([entries.stored_statistics_key(sample, store) for sample in samples])
    label_free = run.rank_heads(rows, store.settings["weights"][0])
    shape = store.num_layers, store.num_heads
    label_free = add_stored_sensitivity(label_free, rows, np.ones((1, len(samples)), np.int64), shape)
    columns = scores.views([_score_key(entries, sample) for sample in samples])
    by, quality = columns[recipe.by], columns["vrh" if recipe.by == "vrh" else "mass"]
    draw = recipe.draw(len(samples))[0]
    # The images that the heads have seen: the drawn ones or, as shrinkage mixes in the label-free ranking, all.
    images = image_keys(samples)
    seen = {key for key, drawn in zip(images, draw, strict=True) if key and (drawn or recipe.shrink != "none")}
    ranking = replace(
        rank_by_labels(by, label_free, recipe),
        pictures=tuple(sorted(seen)),
        found_with=found_with(
            prompt_conditions(store.settings, of_box=recipe.by == "vrh"),
            options.criteria,
            recipe.found_with(int(draw.sum())),
        ),
    )
    groups = [key or sample.id for key, sample in zip(images, samples, strict=True)]
    curve = quality_curve(by, quality, label_free, recipe, groups)
    unshrunk = replace(recipe, shrink="none")
    unshrunk_curve = None if recipe == unshrunk else quality_curve(by, quality, label_free, unshrunk, groups)
    result = Result([], entries.sorted_failures(), ranking=ranking)
    ranked = LabelRanking(result, curve, unshrunk_curve, recipe, label_free)
    return ranked._replace(result=replace(result, paths=_save(run, ranked)))


def _label_recipe(run: Run) -> LabelRecipe:
    options = run.options
    return LabelRecipe(
        by=options.heads_by,
        num_labels=options.num_labels,
        num_trials=options.num_trials,
        seed=options.random_seed,
        shrink=options.shrink,
        n0=options.shrink_n0,
        k=options.k,
    )


def _curve_json(curve: QualityCurve) -> dict[str, Any]:
    """JSON values, rounded to six decimals."""
    return {
        "counts": curve.counts,
        "mean": [round(float(np.mean(values)), 6) for values in curve.quality],
        "std": [round(float(np.std(values)), 6) for values in curve.quality],
        "draws": [[round(value, 6) for value in values] for values in curve.quality],
        "same_heads": [round(value, 6) for value in curve.shared],
    }


def _save(run: Run, ranked: LabelRanking) -> list[Path]:
    """Write heads.json, heads.csv, labels.json and the figures; returns their paths."""
    from localization_heads import figures

    ranking, recipe, curve = ranked.result.ranking, ranked.recipe, ranked.curve
    assert ranking is not None
    k, measure = recipe.k, "vrh" if recipe.by == "vrh" else "mass"
    labels = {
        "version": 1,
        "model": ranking.model,
        "heads_by": recipe.by,
        "num_labels": ranking.num_samples,
        "num_entries": ranked.label_free.num_samples,
        "num_trials": recipe.num_trials,
        "shrink": recipe.shrink,
        "n0": None if recipe.shrink == "none" else recipe.n0,
        "heads": [list(head) for head in ranking.top(k)],
        "label_free_heads": [list(head.address) for head in ranked.label_free.kept[:k]],
        "quality": QUALITY[measure].format(k=k),
        "curve": _curve_json(curve),
        "curve_without_shrinkage": ranked.unshrunk_curve and _curve_json(ranked.unshrunk_curve),
        "label_free": round(curve.label_free, 6),
        "all_heads": round(curve.all_heads, 6),
        "all_labels": round(curve.all_labels, 6),
    }
    back_up_heads_file(run, ranking)
    paths = [*save_ranking(ranking, run.folder), run.folder / "labels.json"]
    write_json(paths[-1], labels)
    scores = np.zeros(tuple(1 + np.max([head.address for head in ranking.heads], axis=0)))
    for head in ranking.kept:
        scores[head.address] = head.score or 0.0
    grid_path, curve_path = run.folder / "head_grid.png", run.folder / "labels.png"
    marks: dict[str, Any] = {"top": ranking.top(k), "exclude_layers": ranking.exclude_layers}
    paths.append(
        run.draw(figures.plot_head_grid, scores, path=grid_path, label=f"Score by labels ({recipe.by})", **marks)
    )
    paths.append(run.draw(figures.plot_label_curve, labels, path=curve_path))
    return paths
