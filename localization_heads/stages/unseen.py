"""Heads are scored on pictures that they were not found on, or the user has said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from localization_heads.data.leakage import picture_keys
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.interop.hub import load_heads
from localization_heads.stages.run import Run


def check_unseen(run: Run, samples: Sequence[Sample]) -> None:
    """UsageError if samples show pictures that the heads of `heads=` were found on, unless `allow_leakage=true`.

    Of heads that no heads.json names (published ones, a list) it is not known what they were found on.
    """
    if run["allow_leakage"] or (source := run.heads_source) is None:
        return
    seen = set(load_heads(source).pictures)
    shared = sum(key in seen for key in picture_keys(samples)) if seen else 0
    if shared:
        raise UsageError(
            f"{shared} of the {len(samples)} entries show pictures that {source} was found on: find the heads on "
            "others (stage=prepare has exclude=), or write allow_leakage=true"
        )
