"""`find`, `rank` and `batch`: the model goes over a data set once, and its heads are ranked by their statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from localization_heads.attention import AttentionMaps
from localization_heads.data.samples import Sample
from localization_heads.data.sources import PromptImages, image_at, num_images
from localization_heads.datasets.leakage import image_keys
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.heads.criteria import HeadStatistics, attention_sum, check_criteria, head_statistics
from localization_heads.heads.one_sample import NO_HEAD_HINT, analysis_rows
from localization_heads.heads.ranking import NONE_KEPT, random_draws
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, measure_sensitivity, sensitivity_prompts
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import Outcome, Result, save_predictions
from localization_heads.stages.ranking import choose_grounding_heads, save_ranking_files
from localization_heads.stages.report import Reporter, offer_card
from localization_heads.stages.run import Run
from localization_heads.stages.sensitivity import (
    add_stored_sensitivity,
    choose_mirrored_samples,
    mirrored_pass,
    warn_of_disagreement,
)
from localization_heads.stages.single import analyse_file, attend_again, draw_sample, image_or_none
from localization_heads.stages.statistics import (
    append_statistics,
    find_stored_statistics,
    open_ranking_statistics,
    prompt_conditions,
)
from localization_heads.store.attention_files import (
    is_in_format,
    load_attention,
    save_analysis,
    save_attention,
)
from localization_heads.store.files import RunLock
from localization_heads.store.paths import analysis_path
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

MAX_CACHED_HEADS = 3_000_000
"""Heads, summed over samples, whose statistics `batch` keeps in memory from collecting to grounding: 64 MB."""
SUM_TOLERANCE = 2e-5
"""Largest difference between the attention sums of one sample in two batches of a float32 model (1.5e-6 was seen).

The same weights in bfloat16 differ by 4e-4 or more, so their maps are not taken for these. bfloat16 maps of another
batch differ by as much and are computed again, which costs time but never keeps a wrong file.
"""


def find(run: Run) -> Result:
    """Rank the heads over a data set, keeping only each head's statistics."""
    entries = load_entries(run)
    with RunLock(run.folder):  # before the model is loaded, so that a second run is refused at once
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        draws = draw_trials(run, entries)
        drawn = [entries.samples[i] for i in np.flatnonzero(draws.any(axis=0))]
        store = open_ranking_statistics(run, entries)
        collect_statistics(run, entries, drawn, store, keep_maps=False)
        _store_failures(entries, store)
        ranking = _rank(run, entries, draws, store)
        paths = [*save_ranking_files(run, ranking), *Reporter(run, ranking).write(entries, store=store)]
        return Result(paths, entries.sorted_failures(), ranking=ranking)


def rank(run: Run) -> Result:
    """Rank the heads by statistics that `find` has stored, without the model."""
    entries = load_entries(run)
    record = find_stored_statistics(run)
    entries.with_sensitivity = record.has_sensitivity
    check_criteria(run.options.criteria, record.num_layers)
    with RunLock(run.folder):
        draws = draw_trials(run, entries)
        store = record.open()
        _require_statistics(entries, np.flatnonzero(draws.any(axis=0)).tolist(), store)
        ranking = _rank(run, entries, draws, store)
        return Result(save_ranking_files(run, ranking), entries.sorted_failures(), ranking=ranking)


def batch(run: Run) -> Result:
    """Collect and analyse every entry, rank the heads, ground every entry with the best heads, and draw figures."""
    entries = load_entries(run)
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        if run.options.heads != "auto":  # fail before hours of work
            run.check_named_heads()
        draws = draw_trials(run, entries)
        store = open_ranking_statistics(run, entries)
        entries.images_reused = True
        statistics = collect_statistics(run, entries, entries.samples, store, keep_maps=True)
        _store_failures(entries, store)
        ranking = _rank(run, entries, draws, store)
        paths = save_ranking_files(run, ranking)
        report = Reporter(run, ranking)
        outcomes = _ground_all(run, entries, ranking, report, statistics)
        paths.append(save_predictions(run, outcomes, entries.sorted_failures()))
        paths += report.write(entries, outcomes, store=store)
        return Result(paths, entries.sorted_failures(), outcomes, ranking)


def draw_trials(run: Run, entries: Entries) -> NDArray[np.int64]:
    """How often each trial draws each entry, `[trial, entry]` (`random_draws`)."""
    options = run.options
    return random_draws(len(entries.samples), options.num_trials, options.num_samples, options.random_seed)


def collect_statistics(
    run: Run, entries: Entries, samples: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> dict[str, HeadStatistics]:
    """Run the model over the samples whose statistics are not stored yet.

    Args:
        keep_maps: write attention files as well, also for samples that lack only those.

    Returns:
        With `keep_maps`, the new statistics by sample id, up to `MAX_CACHED_HEADS`, so that `batch` need not compute
        them again.
    """
    cached: dict[str, HeadStatistics] = {}
    criteria, with_sensitivity = run.options.criteria, entries.with_sensitivity
    mirrored = choose_mirrored_samples(samples, criteria) if with_sensitivity else frozenset()

    def is_done(sample: Sample) -> bool:
        key = entries.stored_statistics_key(sample, store)
        if sample.id in mirrored:
            key = entries.statistics_key(sample, mirrored=True)
        if key not in store:
            return False
        return not keep_maps or _is_file_current(run, sample, store.rows([key]).attention_sum[0])

    def save(analysed: Sequence[_AnalysedSample]) -> None:
        # The statistics are stored last, so a sample in the store has all its files.
        saved = [one for one in analysed if one.maps is None or _save_files(run, entries, one)]
        for one in saved:
            if one.maps is not None and len(cached) * one.statistics.attention_sum.size < MAX_CACHED_HEADS:
                cached[one.sample.id] = one.statistics
        statistics = [(one.sample, one.statistics) for one in saved]
        if not with_sensitivity:
            append_statistics(entries, statistics, store)
            return
        keys = [entries.statistics_key(one.sample, mirrored=one.sample.id in mirrored) for one in saved]
        append_statistics(entries, statistics, store, keys, [one.sensitivity for one in saved if one.sensitivity])

    run_over_samples(
        run,
        entries,
        samples,
        "collect",
        is_done=is_done,
        process=partial(_analyse_chunk, keep_maps=keep_maps, with_sensitivity=with_sensitivity),
        save=save,
        second_pass=mirrored_pass(mirrored),
        extra_prompts=sensitivity_prompts(criteria) if with_sensitivity else NO_EXTRA_PROMPTS,
    )
    return cached


class _AnalysedSample(NamedTuple):
    """A sample's statistics, its maps if they are kept, and its sensitivity if it is measured."""

    sample: Sample
    statistics: HeadStatistics
    maps: AttentionMaps | None
    sensitivity: SensitivityStatistics | None = None


def _analyse_chunk(
    run: Run, _: Entries, attended: Sequence[AttendedSample], *, keep_maps: bool, with_sensitivity: bool
) -> list[_AnalysedSample]:
    return [
        _AnalysedSample(
            one.sample,
            head_statistics(one.maps.attention, run.options.criteria),
            replace(one.maps, others=(), images=()) if keep_maps else None,
            measure_sensitivity(one.maps, one.mirrored_maps) if with_sensitivity else None,
        )
        for one in attended
    ]


def _is_file_current(run: Run, sample: Sample, stored_sums: NDArray[np.float32]) -> bool:
    """Whether the sample's attention file holds the maps that the stored statistics were computed from.

    Another prompt or model under the same id has other attention sums; another batch changes them only by rounding.
    """
    path = run.attention_file(sample.id)
    if not is_in_format(path, run.options.attention_format):
        return False
    try:
        maps = load_attention(path)
    except UsageError:
        return False
    same_sums = np.allclose(attention_sum(maps.attention), stored_sums, rtol=0, atol=SUM_TOLERANCE)
    return same_sums and maps.query == sample.expression and analysis_path(path).is_file()


def _save_files(run: Run, entries: Entries, one: _AnalysedSample) -> bool:
    """Write a sample's attention file and its analysis; False if it fails as `attention_format` cannot hold it."""
    assert one.maps is not None
    path = run.attention_file(one.sample.id)
    with entries.skip_on_error(one.sample):
        save_attention(one.maps, path, run.options.attention_format)
        save_analysis(analysis_rows(one.statistics, run.options.criteria), analysis_path(path))
        return True
    return False


def _store_failures(entries: Entries, store: StatisticsStore) -> None:
    """Store the failures of this run for `rank`, which opens no image and could not find them itself."""
    reasons = {failure.line: failure.reason for failure in entries.failures}
    failed = (sample for sample in entries.samples if sample.line in reasons)
    store.record_failures({entries.statistics_key(sample): reasons[sample.line] for sample in failed})


def _require_statistics(entries: Entries, drawn: Sequence[int], store: StatisticsStore) -> None:
    """Record the drawn samples that `find` saw fail. WorkError if other samples have no statistics."""
    samples = (entries.samples[i] for i in drawn)
    missing = [sample for sample in samples if entries.stored_statistics_key(sample, store) not in store]
    failures = store.failures() if missing else {}
    for sample in missing:
        if (reason := failures.get(entries.statistics_key(sample))) is not None:
            entries.fail(sample, reason)
    unseen = [sample for sample in missing if entries.statistics_key(sample) not in failures]
    if unseen:
        raise WorkError(
            f"{len(unseen)} of the {len(drawn)} entries drawn have no statistics on disk (the first: line "
            f"{unseen[0].line}, {unseen[0].id}): run stage=find with the same options, which does only those"
        )


def _rank(run: Run, entries: Entries, draws: NDArray[np.int64], store: StatisticsStore) -> HeadRanking:
    """The ranking with its provenance: the images it was made from, and how the model was prompted."""
    ranking = rank_entries(run, entries, draws, store)
    warn_of_disagreement(ranking, run.options.k)
    if not ranking.kept:
        log.warning("%s: heads.json lists none to ground with; %s", NONE_KEPT, NO_HEAD_HINT)
    images = image_keys(entries.samples[i] for i in _usable_draws(entries, draws))
    return replace(
        ranking,
        pictures=tuple(sorted({key for key in images if key})),
        found_with=found_with(prompt_conditions(store.settings), run.options.criteria),
    )


def rank_entries(run: Run, entries: Entries, draws: NDArray[np.int64], store: StatisticsStore) -> HeadRanking:
    """Rank the heads by selection frequency over the drawn samples that have not failed.

    Raises:
        NothingDoneError: there are none.
    """
    usable = _usable_draws(entries, draws)
    if not len(usable):
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    rows = store.rows([entries.stored_statistics_key(entries.samples[i], store) for i in usable])
    ranking = run.rank_heads(rows, store.settings["weights"][0], draws[:, usable])
    return add_stored_sensitivity(ranking, rows, draws[:, usable], (store.num_layers, store.num_heads))


def _usable_draws(entries: Entries, draws: NDArray[np.int64]) -> NDArray[np.intp]:
    """Indices of the samples that some trial draws and that have not failed."""
    failed = {failure.line for failure in entries.failures}
    usable = np.array([sample.line not in failed for sample in entries.samples], dtype=bool)
    return np.flatnonzero(usable & draws.any(axis=0))


def _ground_all(
    run: Run, entries: Entries, ranking: HeadRanking, report: Reporter, cached: Mapping[str, HeadStatistics]
) -> list[Outcome]:
    """Ground every entry from its attention file, with the heads of `choose_grounding_heads`.

    Args:
        cached: what `collect_statistics` returned.
    """
    heads, _ = choose_grounding_heads(run, ranking)
    grounder = run.grounder(heads, run.calibration_for(heads))
    head_iou = report.single_head_iou(entries)
    outcomes = []
    for number, sample in enumerate(tqdm(entries.usable, desc="ground", unit="expression", disable=None)):
        with entries.skip_on_error(sample):
            path = run.attention_file(sample.id)
            maps, statistics = load_attention(path), cached.get(sample.id)
            if statistics is None:  # the analysis on disk may have been made under other criteria
                statistics = analyse_file(run, maps, path).statistics
            load = cache(partial(image_or_none, partial(entries.images.load, sample)))
            if run.needs_model(heads, grounder.calibration) or num_images(sample.image) > 1:
                maps = attend_again(run, entries, grounder, sample, maps)
            if run.num_figures is None or number < run.num_figures:
                drawn = draw_sample(run, grounder, maps, statistics, path, load(), truth=sample.bbox)
                grounding = drawn.grounding
            else:
                image = load() if grounder.segmenter else None
                grounding = grounder.ground(maps, image, statistics)
            outcome = Outcome.of(sample, grounding)
            measured = head_iou.measure(sample, maps, run.options.grounding)
            index = grounding.image_index
            open_image = partial(_select_image, load, index)
            card = offer_card(report.gallery, outcome, maps.at(index), grounding, open_image)
            outcomes.append(replace(outcome, measured=measured, card=card))
    return outcomes


def _select_image(load: Callable[[], PromptImages | None], index: int | None) -> Image.Image | None:
    """The image with that index in the prompt, or None if it cannot be opened."""
    loaded = load()
    return None if loaded is None else image_at(loaded, index)
