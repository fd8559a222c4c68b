"""Heads with scores in the formats of other tools: `[[layer, head, score], ...]` or `{"layer-head": score}`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.record import HeadRanking

HeadScore = tuple[Head, float]

EXPECTED = 'write [[layer, head, score], ...] or {"layer-head": score, ...}'


def scores_of(ranking: HeadRanking) -> list[list[int | float]]:
    """`[[layer, head, selection frequency], ...]` of the kept heads, best first."""
    return [[head.layer, head.head, round(head.selection_frequency, 6)] for head in ranking.kept]


def as_mapping(scores: Mapping[Head, float]) -> dict[str, list[float]]:
    """The format of SparseMM: `{"layer-head": [score]}` for every head of the model, in order.

    Args:
        scores: of some heads; all others, up to the last layer and head, get 0.

    >>> as_mapping({Head(1, 1): 0.5, Head(0, 1): 0.25})
    {'0-0': [0.0], '0-1': [0.25], '1-0': [0.0], '1-1': [0.5]}
    """
    num_layers, num_heads = (1 + max(head[axis] for head in scores) for axis in (0, 1))
    heads = (Head(layer, head) for layer in range(num_layers) for head in range(num_heads))
    return {f"{head.layer}-{head.head}": [scores.get(head, 0.0)] for head in heads}


def as_objects(ranking: HeadRanking) -> list[dict[str, int | float]]:
    """The format of gaze-head analyses: `[{"layer", "head", "score"}, ...]` of the kept heads, best first."""
    return [{"layer": layer, "head": head, "score": score} for layer, head, score in scores_of(ranking)]


def read_scores(data: Any) -> list[HeadScore]:
    """Read heads with their scores, highest first; ties keep their order. A list of scores counts by its mean.

    Raises:
        UsageError: naming what is wrong, for anything that is not such a list or mapping.

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
        raise UsageError(f"it names no head; {EXPECTED}")
    if duplicate := find_duplicate(heads):
        raise UsageError(f"{duplicate} is listed twice")
    return sorted(rows, key=lambda row: -row[1])


def _rows_of_list(data: Any) -> list[HeadScore]:
    if not isinstance(data, list):
        raise UsageError(f"a {type(data).__name__} is no list of heads; {EXPECTED}")
    return [_row(entry, number) for number, entry in enumerate(data)]


def _row(entry: Any, number: int) -> HeadScore:
    if isinstance(entry, Mapping):
        entry = [entry.get("layer"), entry.get("head"), entry.get("score", entry.get("frequency"))]
    if not (isinstance(entry, list) and len(entry) == 3 and _is_index(entry[0]) and _is_index(entry[1])):
        raise UsageError(f"entry {number} is {shown(entry)}; {EXPECTED}")
    return Head(entry[0], entry[1]), _score(entry[2], f"entry {number}")


def _rows_of_mapping(data: Mapping[str, Any]) -> list[HeadScore]:
    rows = []
    for name, value in data.items():
        try:
            head = Head.parse(str(name))
        except ValueError as error:
            raise UsageError(f"{error}; {EXPECTED}") from None
        scores = value if isinstance(value, list) and value else [value]
        rows.append((head, fmean(_score(score, shown(name)) for score in scores)))
    return rows


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _score(value: Any, where: str) -> float:
    """A finite number; integers too large for a float are refused, too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UsageError(f"{where}: the score must be a finite number, not {shown(value)}")
    return float(value)
