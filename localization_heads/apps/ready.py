"""What the commands print of ready lists: whose heads are taken, and how many of them a new ranking found again."""

from __future__ import annotations

from collections.abc import Iterator

from localization_heads.heads.ranking import HeadRanking
from localization_heads.heads.ready import overlap, ready_list
from localization_heads.stages.keeping import heads_of_boxes
from localization_heads.stages.run import Run

OWN = "own-"
"""Begins the names of this project's own lists, which need no introduction."""


def whose(run: Run) -> str | None:
    """One line on whose heads grounded, where others have published them."""
    taken = run.heads_from
    if taken is None or taken.startswith(OWN):
        return None
    return f"heads={run.options.heads}: the first {len(run.named_heads or ())} of {taken}"


def of_boxes(run: Run, ranking: HeadRanking) -> str:
    """One line on the heads that a batch grounded with."""
    heads, source = heads_of_boxes(run, ranking)
    names = "each sample's own" if heads is None else " ".join(map(str, heads)) or "none"
    return f"boxes below: heads {names}, {source}"


def found_again(run: Run, ranking: HeadRanking) -> Iterator[str]:
    """A line a published list of the model: how many of its first heads are among as many first ones found now."""
    ranked = [head.address for head in ranking.kept]
    num_heads = sum(head.layer >= ranking.exclude_layers for head in ranking.heads)
    for name in run.spec.lists:
        one = ready_list(name)
        if name.startswith(OWN):
            continue
        found, of, chance = overlap(one.heads, ranked, num_heads)
        yield f"{one}: {found} of its first {of} heads are among the first {of} found; by chance {chance:.1f}"
