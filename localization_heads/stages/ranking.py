"""The files and figures of a ranking, the backup of the previous `heads.json`, and the heads to ground with."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.heads.ready import describe_difference
from localization_heads.heads.record import HeadRanking
from localization_heads.stages.run import Run
from localization_heads.store.results import load_ranking, save_ranking

log = logging.getLogger(__name__)

STABLE_SAMPLES = 100
"""From this many samples on, the order of the first heads hardly changes (docs/find-heads.md)."""
BACKUP = "heads_before.json"


def save_ranking_files(run: Run, ranking: HeadRanking) -> list[Path]:
    """Write heads.json, heads.csv and the figures of the criteria -> their paths. Warn of too few samples."""
    from localization_heads import figures

    if ranking.num_samples < STABLE_SAMPLES:
        log.warning("%d samples: the order of the heads is not stable below %d", ranking.num_samples, STABLE_SAMPLES)
    back_up_heads_file(run, ranking)
    paths = [*save_ranking(ranking, run.folder)]
    shape = tuple(1 + np.max([head.address for head in ranking.heads], axis=0))
    sums, frequency, kept = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for head in ranking.heads:
        sums[head.address], frequency[head.address] = head.attention_sum, head.selection_frequency
        kept[head.address] = head.kept
    marked: dict[str, Any] = {
        "top": [head.address for head in ranking.kept[: run.options.k]],
        "exclude_layers": ranking.exclude_layers,
    }
    frequencies, grid = run.folder / "selection_frequency.png", run.folder / "head_grid.png"
    if ranking.tau is not None:
        elbow = run.folder / "attention_sums.png"
        paths.append(run.draw(figures.plot_attention_sums, sums, ranking.tau, path=elbow, kept=kept, **marked))
    paths.append(run.draw(figures.plot_selection_frequency, ranking, path=frequencies, emphasised=run.options.k))
    paths.append(run.draw(figures.plot_head_grid, 100 * frequency, path=grid, **marked))
    if ranking.has_sensitivity:
        sensitivity = run.folder / "sensitivity.png"
        paths.append(run.draw(figures.plot_sensitivity, ranking, path=sensitivity, emphasised=run.options.k))
    return paths


def back_up_heads_file(run: Run, ranking: HeadRanking) -> None:
    """Copy an existing heads.json that this ranking would replace, if it has more samples or other settings."""
    path = run.folder / "heads.json"
    if not path.is_file():
        return
    try:
        previous = load_ranking(path)
    except UsageError:
        return
    if reason := _what_is_lost(previous, ranking):
        shutil.copyfile(path, run.folder / BACKUP)
        log.warning("heads.json is replaced; the previous one, %s, is kept as %s", reason, run.folder / BACKUP)


def _what_is_lost(previous: HeadRanking, new: HeadRanking) -> str | None:
    """What the new ranking lacks of the previous one, in words; None if nothing."""
    if previous.model != new.model:
        return f"of {previous.model or 'another model'}"
    if previous.num_samples > new.num_samples:
        return f"from {previous.num_samples} samples"
    if (previous.options, previous.top_n) != (new.options, new.top_n):
        return "under other criteria"
    return describe_difference(previous.found_with or {}, new.found_with or {})


def choose_grounding_heads(run: Run, ranking: HeadRanking) -> tuple[Sequence[Head] | None, str]:
    """The heads that `batch` grounds with (None if each sample picks its own), and in words where they come from."""
    if run.options.heads != "auto":
        return run.named_heads, "as heads= says"
    if run.ready_heads.heads:
        return run.ready_heads.heads[: run.options.k], f"known for {run.spec.name} (heads= takes others)"
    return [head.address for head in ranking.kept[: run.options.k]], "the first ones above"
