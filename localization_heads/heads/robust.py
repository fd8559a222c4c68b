"""A ranking with the third criterion: which heads come first, and where the paper's two criteria were fooled."""

from __future__ import annotations

import math
from dataclasses import replace

from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.heads.sensitivity import Movement


def with_movement(ranking: HeadRanking, movement: Movement) -> HeadRanking:
    """The ranking with each head's sensitivity and consistency, in the order that its options ask for.

    With `options.sensitivity="siblings"` the heads that criterion 1 keeps are ranked by `RankedHead.movement`, then by
    selection frequency, attention sum, layer and head; those whose movement is not known come after the others. With
    `"none"` the order stays the paper's.
    """
    heads = [_with(head, movement) for head in ranking.heads]
    if ranking.options.sensitivity != "none":
        heads.sort(key=_by_movement)  # stable: ties stay in the paper's order
    return replace(ranking, heads=tuple(heads))


def _with(head: RankedHead, movement: Movement) -> RankedHead:
    known = (float(values[head.address]) for values in movement)
    sensitivity, consistency = (None if math.isnan(value) else value for value in known)
    return replace(head, sensitivity=sensitivity, consistency=consistency)


def _by_movement(head: RankedHead) -> tuple[bool, bool, float]:
    movement = head.movement
    return not head.kept, movement is None, 0.0 if movement is None else -round(movement, 6)


def papers_first(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by the paper's two criteria, whatever the ranking is ordered by."""
    order = sorted(
        ranking.kept, key=lambda head: (-head.selection_frequency, -head.attention_sum, head.address)
    )
    return [head.address for head in order[:k]]


def robust_first(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by the third criterion; none where it was not measured."""
    if not ranking.is_moved:
        return []
    order = sorted(
        ranking.kept, key=lambda head: (-head.selection_frequency, -head.attention_sum, head.address)
    )
    return [head.address for head in sorted(order, key=_by_movement)[:k]]


def disagreement(ranking: HeadRanking, k: int) -> str | None:
    """One sentence where the first `k` heads of the two rankings are not the same; None where they are, or where the
    third criterion was not measured.
    """
    paper, robust = papers_first(ranking, k), robust_first(ranking, k)
    if not robust or set(paper) == set(robust):
        return None
    resting = [head for head in paper if head not in robust]
    named = {head.address: head for head in ranking.kept}
    facts = ", ".join(f"{head} (movement {named[head].movement or 0:.2f})" for head in resting)
    return (
        f"the paper's two criteria put {_names(paper)} first, and the heads whose maps follow the expression are "
        f"{_names(robust)} (criteria=robust): look at the maps of {facts}, which move less"
    )


def _names(heads: list[Head]) -> str:
    return " ".join(map(str, heads))
