"""`heads_by=mass|iou|pointing|vrh`: heads ranked by how well they look at true objects; how many labels it takes.

The label-free statistics of `find` are kept on the way, so that both rankings can be compared and mixed.
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
from localization_heads.heads.labels import Curve, LabelRecipe, mass_on_patches, quality_curve, rank_by_labels
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
from localization_heads.stages.evaluate import truths, with_box
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

OF_THE_MAP = {"mass": "<f4", "iou": "<f4", "pointing": "<f4"}
OF_THE_BOX = {"vrh": "<f4"}
"""The columns of the stores of scores: those that the query token's map gives, and that of the generated box."""


class Labelled(NamedTuple):
    """The result, the curve, and the same curve without shrinkage where there is some."""

    result: Result
    curve: Curve
    plain: Curve | None
    recipe: LabelRecipe
    free: HeadRanking


@dataclass(frozen=True)
class _Scored:
    sample: Sample
    statistics: HeadStatistics
    sensitivity: SensitivityStatistics | None
    scores: Mapping[str, NDArray[np.float32]]


def find_by_labels(run: Run) -> Labelled:
    """Rank the heads by labels -> heads.json, heads.csv, labels.json and figures."""
    entries = _labelled(run)
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        form = with_box_span(run.lvlm).box_format if run.options.heads_by == "vrh" else None
        store = open_ranking_statistics(run, entries)
        scores = _scores_of(run, store.settings, form, run.lvlm.num_layers, run.lvlm.num_heads).open()
        _collect(run, entries, store, scores, form)
        failed = {failure.line: failure.reason for failure in entries.failures}
        scores.note_failures(
            {_key(entries, one): failed[one.line] for one in entries.samples if one.line in failed}
        )
        found = _ranked(run, entries, store, scores)
        paths = [*found.result.paths, *Reporter(run, found.result.ranking).write(entries, store=store)]
        return found._replace(result=replace(found.result, paths=paths))


def rank_by_kept_labels(run: Run) -> Labelled:
    """The ranking of `find_by_labels` from the statistics and scores on disk, without the model."""
    by, entries, record = run.options.heads_by, _labelled(run), find_stored_statistics(run)
    check_criteria(run.options.criteria, record.num_layers)
    entries.with_sensitivity = record.has_sensitivity
    form = FORMATS.get(run.spec.native_box or "") if by == "vrh" else None
    wanted = _scores_of(run, record.settings, form, record.num_layers, record.num_heads)
    there = (
        one.settings == wanted.settings and one.columns == wanted.columns
        for one in find_stores(wanted.folder)
    )
    if (by == "vrh" and form is None) or not any(there):
        raise UsageError(
            f"stage=rank heads_by={by}: no such scores of these options in {wanted.folder}: run stage=find with them "
            "first"
        )
    with RunLock(run.folder):
        store, scores = record.open(), wanted.open()
        missing = [
            one
            for one in entries.samples
            if entries.stored_statistics_key(one, store) not in store or _key(entries, one) not in scores
        ]
        known = scores.failures()
        for sample in missing:
            if (reason := known.get(_key(entries, sample))) is None:
                raise WorkError(
                    f"{len(missing)} of the {len(entries.samples)} entries have no scores on disk (the first: line "
                    f"{sample.line}, {sample.id}): run stage=find with the same options, which does only those"
                )
            entries.fail(sample, reason)
        return _ranked(run, entries, store, scores)


def _labelled(run: Run) -> Entries:
    """The entries with truth that are used, `num_labels` of them at least."""
    by = run.options.heads_by
    what = f"heads_by={by} (heads_by=criteria needs no truth)"
    entries = _pool(run, require_truth(load_entries(run), what, with_box))
    wanted = run.options.num_labels
    if wanted is not None and wanted > len(entries.samples):
        raise UsageError(_too_few(wanted, len(entries.samples), run))
    return entries


def _too_few(wanted: int, there: int, run: Run) -> str:
    few = f"num_samples={run.options.num_samples} allows" if there == run.options.num_samples else "there are"
    return (
        f"num_labels={wanted}: {few} only {there} entries with a true box or mask that can be used; write "
        f"num_labels={there} or fewer, or null for all"
    )


def _pool(run: Run, entries: Entries) -> Entries:
    """At most `num_samples` entries, drawn by `random_seed`, in file order."""
    draw = random_draws(len(entries.samples), 1, run.options.num_samples, run.options.random_seed)[0]
    return Entries([entries.samples[place] for place in np.flatnonzero(draw)], entries.failures)


def _scores_of(
    run: Run, settings: Mapping[str, Any], form: BoxFormat | None, num_layers: int, num_heads: int
) -> StoreHeader:
    """Where the scores by these labels are; those of a sample have its truth in their key.

    Args:
        settings: of the statistics of the same maps.
    """
    asked = None if form is None else [form.prompt, form.pattern, form.max_new_tokens]
    of_model = {name: value for name, value in settings.items() if name != "asked"}
    columns = OF_THE_MAP if form is None else OF_THE_BOX
    return StoreHeader(
        run.folder / "labels", {**of_model, "native_box": asked}, num_layers, num_heads, 0.0, columns
    )


def _key(entries: Entries, sample: Sample) -> bytes:
    """16 bytes that change with the sample and its truth."""
    return hashlib.blake2b(entries.key(sample) + truths([sample]).encode(), digest_size=16).digest()


def _collect(
    run: Run, entries: Entries, store: StatisticsStore, scores: StatisticsStore, form: BoxFormat | None
) -> None:
    """Run the model over the entries whose statistics or scores are not there yet."""
    criteria = run.options.criteria
    mirrored = choose_mirrored_samples(entries.samples, criteria)

    def statistics_key(sample: Sample) -> bytes:
        if sample.id in mirrored:
            return entries.statistics_key(sample, mirrored=True)
        return entries.stored_statistics_key(sample, store)

    def keep(found: Sequence[_Scored]) -> None:
        append_statistics(
            entries,
            [(one.sample, one.statistics) for one in found],
            store,
            [statistics_key(one.sample) for one in found],
            [one.sensitivity for one in found if one.sensitivity],
        )
        keys = [_key(entries, one.sample) for one in found]
        scores.append(keys, *(np.stack([one.scores[name] for one in found]) for name in scores.columns))

    run_over_samples(
        run,
        entries,
        entries.samples,
        "find",
        is_done=lambda sample: statistics_key(sample) in store and _key(entries, sample) in scores,
        process=partial(_score, form=form),
        save=keep,
        process_runs_model=form is not None,
        second_pass=mirrored_pass(mirrored),
        extra_prompts=sensitivity_prompts(criteria),
    )


def _score(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, form: BoxFormat | None
) -> list[_Scored]:
    found = []
    for one in attended:
        with entries.skip_on_error(one.sample):
            truth = truth_of(one.sample, one.single_image.size)
            if form is None:
                scores = label_scores(one.maps, truth)
            else:
                maps = with_box_span(run.lvlm).attend(one.single_image, one.sample.expression)
                scores = {"vrh": mass_on_patches(maps, truth.box)}
            statistics = head_statistics(one.maps.attention, run.options.criteria)
            sensitivity = (
                measure_sensitivity(one.maps, one.mirrored_maps)
                if measures_sensitivity(run.options.criteria)
                else None
            )
            found.append(_Scored(one.sample, statistics, sensitivity, scores))
    return found


def _ranked(run: Run, entries: Entries, store: StatisticsStore, scores: StatisticsStore) -> Labelled:
    """The ranking of all entries that could be used, with its files."""
    options, samples = run.options, entries.usable
    if not samples:
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    if options.num_labels is not None and options.num_labels > len(samples):
        raise UsageError(_too_few(options.num_labels, len(samples), run))
    recipe = recipe_of(run)
    rows = store.rows([entries.stored_statistics_key(sample, store) for sample in samples])
    free = run.rank_heads(rows, store.settings["weights"][0])
    shape = store.num_layers, store.num_heads
    free = add_stored_sensitivity(free, rows, np.ones((1, len(samples)), np.int64), shape)
    columns = scores.views([_key(entries, sample) for sample in samples])
    by, quality = columns[recipe.by], columns["vrh" if recipe.by == "vrh" else "mass"]
    draw = recipe.drawn(len(samples))[0]
    # What is mixed in was found on all of them, without their labels.
    images = image_keys(samples)
    used = {key for key, held in zip(images, draw, strict=True) if key and (held or recipe.shrink != "none")}
    ranking = replace(
        rank_by_labels(by, free, recipe),
        pictures=tuple(sorted(used)),
        found_with=found_with(
            prompt_conditions(store.settings, of_box=recipe.by == "vrh"),
            options.criteria,
            recipe.named(int(draw.sum())),
        ),
    )
    pictures = [key or sample.id for key, sample in zip(images, samples, strict=True)]
    curve = quality_curve(by, quality, free, recipe, pictures)
    bare = replace(recipe, shrink="none")
    plain = None if recipe == bare else quality_curve(by, quality, free, bare, pictures)
    found = Labelled(Result([], entries.sorted_failures(), ranking=ranking), curve, plain, recipe, free)
    return found._replace(result=replace(found.result, paths=_save(run, found)))


def recipe_of(run: Run) -> LabelRecipe:
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


QUALITY = {
    "mass": "mean attention mass in the truth of each of the first {k} heads, on entries not drawn",
    "vrh": "mean attention of the generated box's tokens on the patches of the true box, of each of the first {k} "
    "heads, on entries not drawn",
}


def curve_json(curve: Curve) -> dict[str, Any]:
    """Plain values, to six decimals."""
    return {
        "counts": curve.counts,
        "mean": [round(float(np.mean(one)), 6) for one in curve.quality],
        "std": [round(float(np.std(one)), 6) for one in curve.quality],
        "draws": [[round(value, 6) for value in one] for one in curve.quality],
        "same_heads": [round(value, 6) for value in curve.stable],
    }


def _save(run: Run, found: Labelled) -> list[Path]:
    """heads.json, heads.csv, labels.json and the figures."""
    from localization_heads import figures

    ranking, recipe, curve = found.result.ranking, found.recipe, found.curve
    assert ranking is not None
    k, measure = recipe.k, "vrh" if recipe.by == "vrh" else "mass"
    written = {
        "version": 1,
        "model": ranking.model,
        "heads_by": recipe.by,
        "num_labels": ranking.num_samples,
        "num_entries": found.free.num_samples,
        "num_trials": recipe.num_trials,
        "shrink": recipe.shrink,
        "n0": None if recipe.shrink == "none" else recipe.n0,
        "heads": [list(head) for head in ranking.top(k)],
        "label_free_heads": [list(head.address) for head in found.free.kept[:k]],
        "quality": QUALITY[measure].format(k=k),
        "curve": curve_json(curve),
        "curve_without_shrinkage": None if found.plain is None else curve_json(found.plain),
        "label_free": round(curve.free, 6),
        "all_heads": round(curve.every, 6),
        "all_labels": round(curve.best, 6),
    }
    back_up_heads_file(run, ranking)
    paths = [*save_ranking(ranking, run.folder), run.folder / "labels.json"]
    write_json(paths[-1], written)
    score = np.zeros(tuple(1 + np.max([head.address for head in ranking.heads], axis=0)))
    for head in ranking.kept:
        score[head.address] = head.score or 0.0
    grid, drawn = run.folder / "head_grid.png", run.folder / "labels.png"
    named: dict[str, Any] = {"top": ranking.top(k), "exclude_layers": ranking.exclude_layers}
    paths.append(
        run.draw(figures.plot_head_grid, score, path=grid, label=f"Score by labels ({recipe.by})", **named)
    )
    paths.append(run.draw(figures.plot_label_curve, written, path=drawn))
    return paths
