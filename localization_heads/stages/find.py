"""`find`, `rank` and `batch`: the model goes over a data set once, and its heads are ranked from their statistics."""

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
from localization_heads.heads.one_sample import WAY_OUT, analysis_rows
from localization_heads.heads.ranking import NONE_KEPT, random_draws
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, measure_sensitivity, sensitivity_prompts
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import (
    Outcome,
    Result,
    choose_grounding_heads,
    save_predictions,
    save_ranking_files,
)
from localization_heads.stages.records import (
    add_stored_sensitivity,
    append_statistics,
    choose_mirrored_samples,
    find_stored_statistics,
    mirrored_pass,
    open_ranking_store,
    prompt_conditions,
    warn_of_disagreement,
)
from localization_heads.stages.report import Reporter, offer_card
from localization_heads.stages.run import Run
from localization_heads.stages.single import analyse_file, attend_again, draw_sample, image_or_none
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

KEPT_HEADS = 3_000_000
"""Heads of samples whose statistics go from collecting to grounding in memory: 64 MB."""
ROUNDING = 2e-5
"""How far the sums of one sample may lie apart when a model in float32 saw it in another batch (1.5e-6 seen).

The same weights in bfloat16 differ by more (4e-4 or more seen), so their maps are not mistaken for these. Maps of
bfloat16 from another batch differ as much, and are made again: time lost, but never a wrong file.
"""


def collect_statistics(
    run: Run, entries: Entries, samples: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> dict[str, HeadStatistics]:
    """Run the model over the samples whose statistics (and, for a batch, attention files) are not there yet.

    Returns:
        The statistics, by id, of the first samples (of `KEPT_HEADS` heads) whose maps were kept by this run: they need
        not be analysed again.
    """
    fresh: dict[str, HeadStatistics] = {}
    criteria = run.options.criteria
    mirrored = choose_mirrored_samples(samples, criteria) if entries.with_sensitivity else frozenset()

    def is_done(sample: Sample) -> bool:
        key = entries.stored_statistics_key(sample, store)
        if sample.id in mirrored:
            key = entries.statistics_key(sample, mirrored=True)
        if key not in store:
            return False
        return not keep_maps or _is_on_disk(run, sample, store.rows([key]).attention_sum[0])

    def keep(collected: Sequence[_Collected]) -> None:
        """Files first, statistics last: whatever the store holds is complete."""
        collected = [one for one in collected if one.maps is None or _is_saved(run, entries, one)]
        for sample, statistics, maps, _ in collected:
            if maps is not None and len(fresh) * statistics.attention_sum.size < KEPT_HEADS:
                fresh[sample.id] = statistics
        found = [(one.sample, one.statistics) for one in collected]
        if not entries.with_sensitivity:
            append_statistics(entries, found, store)
            return
        keys = [entries.statistics_key(one.sample, mirrored=one.sample.id in mirrored) for one in collected]
        append_statistics(
            entries, found, store, keys, [one.sensitivity for one in collected if one.sensitivity]
        )

    run_over_samples(
        run,
        entries,
        samples,
        "collect",
        is_done=is_done,
        process=partial(_analysed, keep_maps=keep_maps, with_sensitivity=entries.with_sensitivity),
        save=keep,
        second_pass=mirrored_pass(mirrored),
        extra_prompts=sensitivity_prompts(criteria) if entries.with_sensitivity else NO_EXTRA_PROMPTS,
    )
    return fresh


def _is_on_disk(run: Run, sample: Sample, stored: NDArray[np.float32]) -> bool:
    """Whether the attention file is the one that the statistics were made from.

    Another prompt or model under the same id gives other sums; another batch around it gives the same but for rounding.
    """
    path = run.attention_file(sample.id)
    if not is_in_format(path, run.options.attention_format):
        return False
    try:
        maps = load_attention(path)
    except UsageError:
        return False
    same = np.allclose(attention_sum(maps.attention), stored, rtol=0, atol=ROUNDING)
    return same and maps.query == sample.expression and analysis_path(path).is_file()


class _Collected(NamedTuple):
    """A sample's statistics, its maps where they are kept, and its sensitivity where the criteria use it."""

    sample: Sample
    statistics: HeadStatistics
    maps: AttentionMaps | None
    sensitivity: SensitivityStatistics | None = None


def _analysed(
    run: Run, _: Entries, attended: Sequence[AttendedSample], *, keep_maps: bool, with_sensitivity: bool
) -> list[_Collected]:
    return [
        _Collected(
            one.sample,
            head_statistics(one.maps.attention, run.options.criteria),
            replace(one.maps, others=(), images=()) if keep_maps else None,
            measure_sensitivity(one.maps, one.mirrored_maps) if with_sensitivity else None,
        )
        for one in attended
    ]


def _is_saved(run: Run, entries: Entries, one: _Collected) -> bool:
    """Write a sample's attention file and its analysis; where `attention_format` has no place for it, it fails."""
    assert one.maps is not None
    path = run.attention_file(one.sample.id)
    with entries.skip_on_error(one.sample):
        save_attention(one.maps, path, run.options.attention_format)
        save_analysis(analysis_rows(one.statistics, run.options.criteria), analysis_path(path))
        return True
    return False


def find(run: Run) -> Result:
    """Rank the heads over a data set, of which only each head's statistics are kept."""
    entries = load_entries(run)
    with RunLock(run.folder):  # before the model is loaded, so that a second run hears of the first at once
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        draws = draw_trials(run, entries)
        used = [entries.samples[place] for place in np.flatnonzero(draws.any(axis=0))]
        store = open_ranking_store(run, entries)
        collect_statistics(run, entries, used, store, keep_maps=False)
        _note_failures(entries, store)
        ranking = _rank(run, entries, draws, store)
        paths = [*save_ranking_files(run, ranking), *Reporter(run, ranking).write(entries, store=store)]
        return Result(paths, entries.sorted_failures(), ranking=ranking)


def rank(run: Run) -> Result:
    """The ranking of `find` from the statistics on disk, without the model."""
    entries = load_entries(run)
    record = find_stored_statistics(run)
    entries.with_sensitivity = record.has_sensitivity
    check_criteria(run.options.criteria, record.num_layers)
    with RunLock(run.folder):
        draws = draw_trials(run, entries)
        store = record.open()
        _expect(entries, np.flatnonzero(draws.any(axis=0)).tolist(), store)
        ranking = _rank(run, entries, draws, store)
        return Result(save_ranking_files(run, ranking), entries.sorted_failures(), ranking=ranking)


def batch(run: Run) -> Result:
    """Collect and analyse every entry, rank the heads, ground every entry with the best ones, draw."""
    entries = load_entries(run)
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        if run.options.heads != "auto":  # before the work, not after it
            run.check_named_heads()
        draws = draw_trials(run, entries)
        store = open_ranking_store(run, entries)
        entries.images_reused = True
        fresh = collect_statistics(run, entries, entries.samples, store, keep_maps=True)
        _note_failures(entries, store)
        ranking = _rank(run, entries, draws, store)
        paths = save_ranking_files(run, ranking)
        report = Reporter(run, ranking)
        outcomes = _ground_all(run, entries, ranking, report, fresh)
        paths.append(save_predictions(run, outcomes, entries.sorted_failures()))
        paths += report.write(entries, outcomes, store=store)
        return Result(paths, entries.sorted_failures(), outcomes, ranking)


def draw_trials(run: Run, entries: Entries) -> np.ndarray:
    """`random_draws` of the entries: `[trial, entry]`."""
    options = run.options
    return random_draws(len(entries.samples), options.num_trials, options.num_samples, options.random_seed)


def _note_failures(entries: Entries, store: StatisticsStore) -> None:
    """Lets `rank`, which opens no image, report the failures of this run."""
    reasons = {failure.line: failure.reason for failure in entries.failures}
    failed = (sample for sample in entries.samples if sample.line in reasons)
    store.note_failures({entries.statistics_key(sample): reasons[sample.line] for sample in failed})


def _expect(entries: Entries, drawn: Sequence[int], store: StatisticsStore) -> None:
    """Put aside the drawn samples that are known to fail. WorkError if others have no statistics."""
    wanted = (entries.samples[place] for place in drawn)
    missing = [sample for sample in wanted if entries.stored_statistics_key(sample, store) not in store]
    known = store.failures() if missing else {}
    for sample in missing:
        if (reason := known.get(entries.statistics_key(sample))) is not None:
            entries.fail(sample, reason)
    unseen = [sample for sample in missing if entries.statistics_key(sample) not in known]
    if unseen:
        raise WorkError(
            f"{len(unseen)} of the {len(drawn)} entries drawn have no statistics on disk (the first: line "
            f"{unseen[0].line}, {unseen[0].id}): run stage=find with the same options, which does only those"
        )


def _rank(run: Run, entries: Entries, draws: np.ndarray, store: StatisticsStore) -> HeadRanking:
    """The ranking, with the images and the conditions that it was made under."""
    ranking = rank_entries(run, entries, draws, store)
    warn_of_disagreement(ranking, run.options.k)
    if not ranking.kept:
        log.warning("%s: heads.json lists none to ground with; %s", NONE_KEPT, WAY_OUT)
    images = image_keys(entries.samples[place] for place in _usable(entries, draws))
    return replace(
        ranking,
        pictures=tuple(sorted({key for key in images if key})),
        found_with=found_with(prompt_conditions(store.settings), run.options.criteria),
    )


def _usable(entries: Entries, draws: np.ndarray) -> np.ndarray:
    """The places of the samples that were drawn and have not failed."""
    failed = {failure.line for failure in entries.failures}
    good = np.array([sample.line not in failed for sample in entries.samples], dtype=bool)
    return np.flatnonzero(good & draws.any(axis=0))


def rank_entries(run: Run, entries: Entries, draws: np.ndarray, store: StatisticsStore) -> HeadRanking:
    """Selection frequency over the samples that were drawn and could be used, in file order.

    Raises:
        NothingDoneError: there are none.
    """
    places = _usable(entries, draws)
    if not len(places):
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    rows = store.rows([entries.stored_statistics_key(entries.samples[place], store) for place in places])
    ranking = run.ranking_of(rows, store.settings["weights"][0], draws[:, places])
    return add_stored_sensitivity(ranking, rows, draws[:, places], (store.num_layers, store.num_heads))


def _ground_all(
    run: Run, entries: Entries, ranking: HeadRanking, report: Reporter, fresh: Mapping[str, HeadStatistics]
) -> list[Outcome]:
    """Boxes for every entry, from the maps on disk, with the heads of `choose_grounding_heads`.

    Args:
        fresh: of `collect_statistics`.
    """
    heads, _ = choose_grounding_heads(run, ranking)
    grounder = run.grounder(heads, run.calibration_of(heads))
    alone = report.alone(entries)
    outcomes = []
    for number, sample in enumerate(tqdm(entries.usable, desc="ground", unit="expression", disable=None)):
        with entries.skip_on_error(sample):
            path = run.attention_file(sample.id)
            maps, statistics = load_attention(path), fresh.get(sample.id)
            if statistics is None:  # the analysis on disk may be of an earlier run under other criteria
                statistics = analyse_file(run, maps, path).statistics
            opened = cache(partial(image_or_none, partial(entries.images.load, sample)))
            if run.needs_model(heads, grounder.calibration) or num_images(sample.image) > 1:
                maps = attend_again(run, entries, grounder, sample, maps)
            if run.num_figures is None or number < run.num_figures:
                drawn = draw_sample(run, grounder, maps, statistics, path, opened(), truth=sample.bbox)
                grounding = drawn.grounding
            else:
                image = opened() if grounder.segmenter else None
                grounding = grounder.ground(maps, image, statistics)
            outcome = Outcome.of(sample, grounding)
            measured = alone.measure(sample, maps, run.options.grounding)
            place = grounding.image_index
            card = offer_card(
                report.gallery, outcome, maps.at(place), grounding, partial(_one_of, opened, place)
            )
            outcomes.append(replace(outcome, measured=measured, card=card))
    return outcomes


def _one_of(opened: Callable[[], PromptImages | None], place: int | None) -> Image.Image | None:
    """The image at that place of what a prompt shows, if it could be opened."""
    shown = opened()
    return None if shown is None else image_at(shown, place)
