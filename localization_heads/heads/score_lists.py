"""Heads with scores, as other tools write and read them: `[[layer, head, score], ...]` or `{"layer-head": score}`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.record import HeadRanking

HeadScore = tuple[Head, float]

FORM = 'write [[layer, head, score], ...] or {"layer-head": score, ...}'


def scores_of(ranking: HeadRanking) -> list[list[int | float]]:
    """`[[layer, head, selection frequency], ...]` of the heads kept, best first."""
    return [[head.layer, head.head, round(head.selection_frequency, 6)] for head in ranking.kept]


def as_mapping(scores: Mapping[Head, float]) -> dict[str, list[float]]:
    """As SparseMM reads them: `{"layer-head": [score]}` of every head of the model, layer by layer, head by head.

    Args:
        scores: of the heads that have one; all others, up to the last layer and head, get 0.

    >>> as_mapping({Head(1, 1): 0.5, Head(0, 1): 0.25})
    {'0-0': [0.0], '0-1': [0.25], '1-0': [0.0], '1-1': [0.5]}
    """
    layers, heads = (1 + max(address[axis] for address in scores) for axis in (0, 1))
    every = (Head(layer, head) for layer in range(layers) for head in range(heads))
    return {f"{one.layer}-{one.head}": [scores.get(one, 0.0)] for one in every}


def as_objects(ranking: HeadRanking) -> list[dict[str, int | float]]:
    """As analyses of gaze heads read them: `[{"layer", "head", "score"}, ...]` of the heads kept, best first."""
    return [{"layer": layer, "head": head, "score": score} for layer, head, score in scores_of(ranking)]


def read_scores(data: Any) -> list[HeadScore]:
    """Heads with their scores, highest first; equal scores keep their order.

    Raises:
        UsageError: saying what is wrong, for anything that is not such a list or mapping.

    >>> read_scores([[3, 1, 0.2], [2, 0, 0.9]])
    [(Head(layer=2, head=0), 0.9), (Head(layer=3, head=1), 0.2)]
    >>> read_scores({"3-1": [0.1, 0.3], "2-0": 0.9})
    [(Head(layer=2, head=0), 0.9), (Head(layer=3, head=1), 0.2)]
    >>> read_scores({"head_frequency": [{"layer": 14, "head": 24, "count": 571, "frequency": 0.571}], "top_k": 5})
    [(Head(layer=14, head=24), 0.571)]
    """
    if isinstance(data, Mapping) and "head_frequency" in data:
        data = data["head_frequency"]
    rows = _rows_of_mapping(data) if isinstance(data, Mapping) else _rows_of_list(data)
    heads = [head for head, _ in rows]
    if not heads:
        raise UsageError(f"it names no head; {FORM}")
    if twice := find_duplicate(heads):
        raise UsageError(f"{twice} is listed twice")
    return sorted(rows, key=lambda row: -row[1])


def _rows_of_list(data: Any) -> list[HeadScore]:
    if not isinstance(data, list):
        raise UsageError(f"a {type(data).__name__} is no list of heads; {FORM}")
    return [_row(entry, number) for number, entry in enumerate(data)]


def _row(entry: Any, number: int) -> HeadScore:
    if isinstance(entry, Mapping):
        entry = [entry.get("layer"), entry.get("head"), entry.get("score", entry.get("frequency"))]
    if not (isinstance(entry, list) and len(entry) == 3 and _is_index(entry[0]) and _is_index(entry[1])):
        raise UsageError(f"entry {number} is {shown(entry)}; {FORM}")
    return Head(entry[0], entry[1]), _score(entry[2], f"entry {number}")


def _rows_of_mapping(data: Mapping[str, Any]) -> list[HeadScore]:
    rows = []
    for name, value in data.items():
        try:
            head = Head.parse(str(name))
        except ValueError as error:
            raise UsageError(f"{error}; {FORM}") from None
        scores = value if isinstance(value, list) and value else [value]
        rows.append((head, fmean(_score(score, shown(name)) for score in scores)))
    return rows


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _score(value: Any, where: str) -> float:
    """A finite number. Also refuses integers too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UsageError(f"{where}: the score must be a finite number, not {shown(value)}")
    return float(value)
