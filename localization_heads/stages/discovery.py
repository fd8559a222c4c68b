"""Finding the heads over a data set: `find` (statistics only, streaming) and `batch` (every file and figure).

Both go through the data in fixed chunks and append each chunk's statistics to a store before the next begins.
A run that was killed finds them there and goes on, with the same batches and so the same bytes in heads.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from localization_heads.data.jsonl import BadEntry
from localization_heads.errors import NothingDoneError
from localization_heads.grounding.maps import ground_maps
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking, random_draws, rank_heads
from localization_heads.stages.collecting import collect, open_store
from localization_heads.stages.entries import Entries, select_entries
from localization_heads.stages.outcome import Outcome, outcome_of, save_predictions
from localization_heads.stages.run import Run, check_criteria, check_heads
from localization_heads.stages.single import analyse_file, draw
from localization_heads.store.attention_files import load_attention
from localization_heads.store.heads_file import save_ranking
from localization_heads.store.lock import RunLock
from localization_heads.store.paths import attention_path
from localization_heads.store.statistics import StatisticsStore


@dataclass(frozen=True)
class Discovered:
    """What `find` and `batch` end with. `grounded` is empty after `find`."""

    ranking: HeadRanking
    grounded: list[Outcome]
    failures: list[BadEntry]
    paths: list[Path]


def find(run: Run) -> Discovered:
    """Rank the heads over a data set; only each head's sum and entropy are kept."""
    entries = select_entries(run)
    with RunLock(run.folder):  # before the model is loaded, so that a second run hears of the first at once
        check_criteria(run.criteria, run.lvlm.num_layers)
        draws = random_draws(len(entries.samples), run["num_trials"], run["num_samples"], run["random_seed"])
        used = [s for s, drawn in zip(entries.samples, np.any(draws, axis=0).tolist(), strict=True) if drawn]
        store = open_store(run)
        collect(run, entries, used, store, keep_maps=False)
        ranking = _rank(run, entries, draws, store)
        return Discovered(ranking, [], entries.in_order(), _save(run, ranking))


def batch(run: Run) -> Discovered:
    """Collect and analyse every entry, rank the heads, ground every entry with the best ones, draw."""
    entries = select_entries(run)
    with RunLock(run.folder):
        check_criteria(run.criteria, run.lvlm.num_layers)
        if run["heads"] != "auto":  # before the work, not after it
            check_heads(run.named_heads or (), run.lvlm.num_layers, run.lvlm.num_heads)
        draws = random_draws(len(entries.samples), run["num_trials"], run["num_samples"], run["random_seed"])
        store = open_store(run)
        collect(run, entries, entries.samples, store, keep_maps=True)
        ranking = _rank(run, entries, draws, store)
        paths = _save(run, ranking)
        grounded = _ground_all(run, entries, ranking)
        paths.append(save_predictions(run, grounded, entries.in_order()))
        return Discovered(ranking, grounded, entries.in_order(), paths)


def _rank(run: Run, entries: Entries, draws: np.ndarray, store: StatisticsStore) -> HeadRanking:
    """Selection frequency over the samples that were drawn and could be used, in file order."""
    failed = {failure.line for failure in entries.failures}
    usable = np.array([sample.line not in failed for sample in entries.samples], dtype=bool)
    chosen = usable & draws.any(axis=0)
    if not chosen.any():
        raise NothingDoneError("no entry could be used", entries.in_order())
    keys = [entries.key(sample) for sample, wanted in zip(entries.samples, chosen, strict=True) if wanted]
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
    best = [head.address for head in ranking.kept[: run["k"]]]
    heads: Sequence[Head] | None = best if run["heads"] == "auto" else run.named_heads
    limit = run["visualize_limit"] if run["visualize_batch"] else 0
    grounded = []
    for number, sample in enumerate(tqdm(entries.good, desc="ground", unit="expression", disable=None)):
        path = attention_path(run.attention_folder, sample.id, run["attention_format"])
        # The analysis on disk may be of an earlier run under other criteria.
        analysed = analyse_file(run, load_attention(path), path)
        chosen = list(heads or run.own_heads(analysed.statistics))
        if limit is None or number < limit:
            grounding = draw(run, analysed, path, heads=chosen, truth=sample.bbox).grounding
        else:
            grounding = ground_maps(analysed.maps, chosen, run.grounding)
        grounded.append(outcome_of(sample, grounding))
    return grounded
