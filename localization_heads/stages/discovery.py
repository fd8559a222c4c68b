"""Finding the heads over a data set: `find` (statistics only, streaming) and `batch` (every file and figure).

Both go through the data in fixed chunks and append each chunk's statistics to a store before the next begins.
A run that was killed finds them there and goes on, with the same batches and so the same bytes in heads.json.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from localization_heads.attention import AttentionMaps
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError, WorkError
from localization_heads.grounding.maps import ground_maps
from localization_heads.heads.analysis import analysis_rows
from localization_heads.heads.criteria import HeadStatistics, head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking, random_draws, rank_heads
from localization_heads.stages.entries import Entries, attend_chunk, chunks, key_of, select_entries
from localization_heads.stages.outcome import Outcome, outcome_of, save_predictions
from localization_heads.stages.run import Run, check_heads
from localization_heads.stages.single import Analysed, draw
from localization_heads.store.attention_files import load_attention, save_analysis, save_attention
from localization_heads.store.heads_file import save_ranking
from localization_heads.store.lock import RunLock
from localization_heads.store.paths import analysis_path, attention_path
from localization_heads.store.statistics import StatisticsStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Discovered:
    """What `find` and `batch` end with. `grounded` is empty after `find`."""

    ranking: HeadRanking
    grounded: list[Outcome]
    failures: list[BadEntry]
    paths: list[Path]


def find(run: Run) -> Discovered:
    """Rank the heads over a data set; only each head's sum and entropy are kept."""
    with RunLock(run.folder):
        entries = select_entries(run)
        draws = random_draws(len(entries.samples), run["num_trials"], run["num_samples"], run["random_seed"])
        used = [s for s, drawn in zip(entries.samples, np.any(draws, axis=0).tolist(), strict=True) if drawn]
        store = _store(run)
        _collect(run, entries, used, store, keep_maps=False)
        ranking = _rank(run, entries, draws, store)
        return Discovered(ranking, [], entries.failures, _save(run, ranking))


def batch(run: Run) -> Discovered:
    """Collect and analyse every entry, rank the heads, ground every entry with the best ones, draw."""
    with RunLock(run.folder):
        entries = select_entries(run)
        draws = random_draws(len(entries.samples), run["num_trials"], run["num_samples"], run["random_seed"])
        store = _store(run)
        _collect(run, entries, entries.samples, store, keep_maps=True)
        ranking = _rank(run, entries, draws, store)
        paths = _save(run, ranking)
        grounded = _ground_all(run, entries, ranking)
        paths.append(save_predictions(run, grounded, entries.failures))
        return Discovered(ranking, grounded, entries.failures, paths)


def _store(run: Run) -> StatisticsStore:
    """The statistics of this model under these options; other options keep theirs in another file."""
    settings = {
        "model": run.lvlm.name,
        "weights": run.lvlm.fingerprint,
        "conv_mode": run["conv_mode"],
        "system": run.lvlm.system,
        "entropy": run.criteria.entropy,
        "threshold": run.criteria.threshold,
    }
    return StatisticsStore(
        run.folder / "statistics",
        settings=settings,
        num_layers=run.lvlm.num_layers,
        num_heads=run.lvlm.num_heads,
    )


def _collect(
    run: Run, entries: Entries, samples: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> None:
    """Run the model over the samples whose statistics (and, for a batch, attention files) are not there yet."""
    bar = tqdm(total=len(samples), desc="collect", unit="expression", disable=None)
    for chunk in chunks(samples, run["batch_size"]):
        if not all(_is_done(run, sample, store, keep_maps) for sample in chunk):
            _collect_chunk(run, entries, chunk, store, keep_maps=keep_maps)
        bar.update(len(chunk))
    bar.close()


def _is_done(run: Run, sample: Sample, store: StatisticsStore, keep_maps: bool) -> bool:
    if key_of(sample) not in store:
        return False
    if not keep_maps:
        return True
    path = attention_path(run.attention_folder, sample.id, run["attention_format"])
    return analysis_path(path).is_file() and _belongs(run, sample, path)


def _belongs(run: Run, sample: Sample, path: Path) -> bool:
    """Whether an attention file is of this very question to this very model."""
    try:
        maps = load_attention(path)
    except UsageError:
        return False
    return (maps.model, maps.prompt) == (run.lvlm.name, run.lvlm.prompt(sample.expression)) and (
        maps.image_file == sample.image_file
    )


def _collect_chunk(
    run: Run, entries: Entries, chunk: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> None:
    attended = attend_chunk(run, entries, chunk)
    statistics = [head_statistics(one.maps.attention, run.criteria) for one in attended]
    if keep_maps:
        for one, found in zip(attended, statistics, strict=True):
            _save_entry(run, one.sample, one.maps, found)
    if attended:
        store.append(
            [key_of(one.sample) for one in attended],
            np.stack([found.attention_sum for found in statistics]),
            np.stack([found.spatial_entropy for found in statistics]),
            np.stack([found.bottom_row_focus for found in statistics]),
        )


def _save_entry(run: Run, sample: Sample, maps: AttentionMaps, statistics: HeadStatistics) -> None:
    path = attention_path(run.attention_folder, sample.id, run["attention_format"])
    save_attention(maps.named(id=sample.id, image_file=sample.image_file), path)
    save_analysis(analysis_rows(statistics, run.criteria), analysis_path(path))


def _rank(run: Run, entries: Entries, draws: np.ndarray, store: StatisticsStore) -> HeadRanking:
    """Selection frequency over the samples that were drawn and could be used, in file order."""
    failed = {failure.line for failure in entries.failures}
    usable = np.array([sample.line not in failed for sample in entries.samples], dtype=bool)
    chosen = usable & draws.any(axis=0)
    if not chosen.any():
        raise WorkError(_nothing_left(entries))
    keys = [key_of(sample) for sample, wanted in zip(entries.samples, chosen, strict=True) if wanted]
    rows = store.rows(keys)
    return rank_heads(
        rows.attention_sum,
        rows.spatial_entropy,
        bottom_row=rows.bottom_row_focus,
        draws=draws[:, chosen],
        options=run.criteria,
        top_n=run["top_n"],
        num_trials=run["num_trials"],
        num_samples=run["num_samples"],
        seed=run["random_seed"],
        model=run.lvlm.name,
    )


def _nothing_left(entries: Entries) -> str:
    first = entries.failures[0]
    return f"no entry could be used; the first: line {first.line}: {first.reason}"


def _save(run: Run, ranking: HeadRanking) -> list[Path]:
    """heads.json, heads.csv and the figures of both criteria."""
    from localization_heads import figures

    paths = [*save_ranking(ranking, run.folder)]
    top = [head.address for head in ranking.kept[: run["k"]]]
    shape = run.lvlm.num_layers, run.lvlm.num_heads
    sums, frequency, kept = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for head in ranking.heads:
        sums[head.address], frequency[head.address] = head.attention_sum, head.selection_frequency
        kept[head.address] = head.kept
    targets = [run.folder / f"{name}.png" for name in ("attention_sums", "selection_frequency", "head_grid")]
    drawn = [
        figures.plot_selection_frequency(ranking, targets[1], emphasised=run["k"]),
        figures.plot_head_grid(100 * frequency, targets[2], top=top, exclude_layers=ranking.exclude_layers),
    ]
    if ranking.tau is not None:
        exclude = ranking.exclude_layers
        drawn.append(
            figures.plot_attention_sums(
                sums, ranking.tau, targets[0], kept=kept, top=top, exclude_layers=exclude
            )
        )
    if run["show_plot"]:
        for figure in drawn:
            figures.show(figure)
    return paths + [target for target in targets if target.is_file()]


def _ground_all(run: Run, entries: Entries, ranking: HeadRanking) -> list[Outcome]:
    """Boxes for every entry, from the maps on disk, with the heads just found or those that were named."""
    k = min(run["k"], len(ranking.kept))
    heads: Sequence[Head] | None = ranking.top(k) if run["heads"] == "auto" else run.named_heads
    limit = run["visualize_limit"] if run["visualize_batch"] else 0
    grounded = []
    for number, sample in enumerate(tqdm(entries.good, desc="ground", unit="expression", disable=None)):
        path = attention_path(run.attention_folder, sample.id, run["attention_format"])
        maps = load_attention(path)
        statistics = head_statistics(maps.attention, run.criteria)
        chosen = list(heads) if heads else run.heads_for(statistics)
        check_heads(chosen, maps.num_layers, maps.num_heads)
        if limit is None or number < limit:
            analysed = Analysed(maps, statistics, [], analysis_path(path))
            grounding = draw(run, analysed, path, heads=chosen, truth=sample.bbox).grounding
        else:
            grounding = ground_maps(maps, chosen, run.grounding)
        grounded.append(outcome_of(sample, grounding))
    return grounded
