"""Heads are scored on pictures that they were not found on, or the user has said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localization_heads.data.leakage import picture_keys
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.interop.hub import is_repository, load_heads
from localization_heads.lvlm.spec import find_spec
from localization_heads.stages.run import Run
from localization_heads.store.heads_file import is_ranking, load_ranking


def check_unseen(run: Run, samples: Sequence[Sample]) -> None:
    """UsageError if samples show pictures that the heads of `heads=` were found on, unless `allow_leakage=true`.

    Of heads that no heads.json names (published ones, a list) it is not known what they were found on.
    """
    if run["allow_leakage"] or (source := _source(run)) is None:
        return
    seen = set(load_heads(source).pictures)
    shared = sum(key in seen for key in picture_keys(samples)) if seen else 0
    if shared:
        raise UsageError(
            f"{shared} of the {len(samples)} entries show pictures that {source} was found on: find the heads on "
            "others (stage=prepare has exclude=), or write allow_leakage=true"
        )


def _source(run: Run) -> Path | str | None:
    """The heads.json that `heads=` names, here or on the hub, or that `heads=auto` takes."""
    wanted, latest = run["heads"], run.folder / "heads.json"
    if isinstance(wanted, str) and wanted.endswith(".json"):
        return Path(wanted) if is_ranking(wanted) else None
    if isinstance(wanted, str) and is_repository(wanted):
        return wanted
    published = run.spec.heads or find_spec(run.spec.name).heads
    own = wanted == "auto" and not published and latest.is_file()
    return latest if own and load_ranking(latest).model == run.spec.name else None
