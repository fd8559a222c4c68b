"""What is said when a ranking is written: how firm it is, and what it takes the place of."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking
from localization_heads.heads.record import difference
from localization_heads.stages.run import Run
from localization_heads.store.results import load_ranking

log = logging.getLogger(__name__)

FIRM = 100
"""Samples from which on the first heads hardly change (docs/find-heads.md)."""
BEFORE = "heads_before.json"
"""The heads.json that a lesser one has taken the place of."""


def note_ranking(run: Run, ranking: HeadRanking) -> None:
    """Warn of a ranking from few samples, and of a heads.json that it takes the place of."""
    if ranking.num_samples < FIRM:
        log.warning("%d samples: the order of the heads is not firm under %d", ranking.num_samples, FIRM)
    keep_former(run, ranking)


def keep_former(run: Run, ranking: HeadRanking) -> None:
    """Keep, and name, a heads.json that was made from more samples or otherwise, before this ranking replaces it."""
    latest = run.folder / "heads.json"
    if not latest.is_file():
        return
    try:
        before = load_ranking(latest)
    except UsageError:
        return
    if reason := _lesser(before, ranking):
        shutil.copyfile(latest, run.folder / BEFORE)
        log.warning("heads.json is made anew, and the one before, %s, is now %s", reason, run.folder / BEFORE)


def _lesser(before: HeadRanking, after: HeadRanking) -> str | None:
    """What the former ranking has that the new one lacks; None if it is no loss."""
    if before.model != after.model:
        return f"of {before.model or 'another model'}"
    if before.num_samples > after.num_samples:
        return f"from {before.num_samples} samples"
    if (before.options, before.top_n) != (after.options, after.top_n):
        return "under other criteria"
    return difference(before.found_with or {}, after.found_with or {})


def heads_of_boxes(run: Run, ranking: HeadRanking) -> tuple[Sequence[Head] | None, str]:
    """The heads that a batch grounds with, None where each sample picks its own; and where they come from."""
    if run.options.heads != "auto":
        return run.named_heads, "as heads= says"
    if run.ready.heads:
        return run.ready.heads[: run.options.k], f"known for {run.spec.name} (heads= takes others)"
    return [head.address for head in ranking.kept[: run.options.k]], "the first ones above"
