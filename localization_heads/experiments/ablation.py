"""Which heads are switched off (or steered) at a time, and the curves that come of it: functions of numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.evaluation.metrics import bootstrap_ratios, percentile_interval
from localization_heads.evaluation.scores import rounded
from localization_heads.experiments.paper import Finding, Table, percent
from localization_heads.heads.head import Head

KINDS = {
    "heads": "those of the list",
    "random": "random ones of the same layers",
    "attention_sum": "those of highest attention sum",
}
"""Which heads are changed, as tables and figures name them."""
COLUMNS = {"heads": "the list", "random": "random", "attention_sum": "highest sum"}
"""The same above the columns of a table."""
MEASURES = {
    "answers": "answers right",
    "boxes": "native boxes right (IoU 0.5)",
    "maps": "Acc@0.5 of the other heads' maps",
    "pointing": "pointing of the other heads' maps",
    "follows": "answers that name what is in the region",
    "leaves": "answers that name what is outside it",
}
"""What is measured of an expression, as tables and figures name it; the first that is there is the main one."""
BEFORE = "_before"
"""Of a measure of the other heads' maps: the same of those heads' maps in the model as it is."""

Values = Mapping[str, Mapping[str, float]]
"""Of one expression: by the name of a condition, by measure, a value from 0 to 1."""


class Condition(NamedTuple):
    """Heads that are changed together.

    Args:
        kind: of `KINDS`.
        number: how many there are.
        draw: which of several random sets, from 0.
    """

    kind: str
    number: int
    draw: int
    heads: tuple[Head, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}-{self.draw}"


def conditions(
    listed: Sequence[Head],
    by_sum: Sequence[Head],
    counts: Sequence[int],
    *,
    draws: int,
    num_heads: int,
    seed: int = 42,
) -> tuple[Condition, ...]:
    """For each count the first heads of the list, as many random ones of the same layers, and those of highest sum.

    The first condition changes no head. Counts beyond the list's length become its length.

    Args:
        num_heads: heads of a layer.

    >>> found = conditions([Head(2, 0)], [Head(2, 1)], [0, 1], draws=1, num_heads=2)
    >>> [(one.name, *map(str, one.heads)) for one in found]
    [('heads-0-0',), ('heads-1-0', 'L2H0'), ('attention_sum-1-0', 'L2H1'), ('random-1-0', 'L2H1')]
    """
    rng = np.random.default_rng(seed)
    orders = [_order(listed, num_heads, rng) for _ in range(draws)]
    found = [Condition("heads", 0, 0, ())]
    for count in usable_counts(counts, len(listed))[1:]:
        first = tuple(listed[:count])
        found.append(Condition("heads", count, 0, first))
        found.append(Condition("attention_sum", count, 0, tuple(by_sum[:count])))
        found += [Condition("random", count, draw, _alike(first, order)) for draw, order in enumerate(orders)]
    return tuple(found)


def usable_counts(counts: Sequence[int], length: int) -> list[int]:
    """Rising, each once, 0 among them; none beyond the length of the list.

    >>> usable_counts([10, 1, 3], 7)
    [0, 1, 3, 7]
    """
    return sorted({0, *(min(count, length) for count in counts)})


def _order(listed: Sequence[Head], num_heads: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """By layer, its heads in the order in which they are drawn: those that are not listed first, the best last."""
    order = {}
    for layer in sorted({head.layer for head in listed}):
        own = [head.head for head in listed if head.layer == layer]
        others = [head for head in range(num_heads) if head not in own]
        order[layer] = [int(head) for head in rng.permutation(others)] + own[::-1]
    return order


def _alike(heads: Sequence[Head], order: Mapping[int, Sequence[int]]) -> tuple[Head, ...]:
    """As many heads of each layer, in that order: larger sets hold the smaller ones."""
    taken = dict.fromkeys(order, 0)
    found = []
    for layer, _ in heads:
        found.append(Head(layer, order[layer][taken[layer]]))
        taken[layer] += 1
    return tuple(found)


def curves(
    every: Sequence[Condition], values: Sequence[Values], measure: str, seed: int = 42
) -> dict[str, Any]:
    """A measure by the number of heads, for each kind: means over the expressions that have it, with 95 % intervals.

    Intervals are of the bootstrap over expressions; random sets of one expression are averaged first. `falls` are
    paired differences: how much of the model as it is (of the same heads' maps in it, for a measure of maps) is lost.

    Returns:
        `counts`, `num`, and by kind `curves` [value], `intervals` [[low, high]], `falls` and `fall_intervals`.
    """
    first = every[0].name
    known = [one for one in values if measure in one[first]]
    counts = sorted({one.number for one in every})
    found: dict[str, Any] = {"counts": counts, "num": len(known)}
    found |= {name: {} for name in ("curves", "intervals", "falls", "fall_intervals")}
    for kind in KINDS:
        table = _table(every, known, kind, counts, measure)
        drawn = bootstrap_ratios(table, np.ones_like(table), seed=seed)
        half = len(counts)
        bounds = [[rounded(side) for side in percentile_interval(column)] for column in drawn.T]
        means = [rounded(mean) for mean in table.mean(axis=0)] if len(table) else [None] * table.shape[1]
        found["curves"][kind], found["falls"][kind] = means[:half], means[half:]
        found["intervals"][kind], found["fall_intervals"][kind] = bounds[:half], bounds[half:]
    return found


def _table(
    every: Sequence[Condition], values: Sequence[Values], kind: str, counts: Sequence[int], measure: str
) -> NDArray[np.float64]:
    """[expression, 2 x counts]: the values at each count, then how much less than before they are."""
    first = every[0].name
    rows = []
    for one in values:
        at, fall = [], []
        for count in counts:
            names = [c.name for c in every if c.number == count and c.kind == kind] if count else [first]
            now = [one[name][measure] for name in names]
            before = [one[name].get(measure + BEFORE, one[first][measure]) for name in names]
            at.append(np.mean(now))
            fall.append(np.mean(before) - np.mean(now))
        rows.append([*at, *fall])
    return np.array(rows, dtype=np.float64).reshape(len(values), 2 * len(counts))


def finding(
    every: Sequence[Condition], values: Sequence[Values], kinds: Mapping[str, str], what: str, seed: int = 42
) -> Finding:
    """The tables, and the numbers of `ablation.json`.

    Args:
        kinds: measures beside `MEASURES`, with their names: answers of one kind of question.
        what: what is done to the heads, such as `switched off`.
    """
    named = {**MEASURES, **kinds}
    there = [name for name in named if any(name in one[every[0].name] for one in values)]
    found = {name: curves(every, values, name, seed) for name in there}
    main = found[there[0]]
    longest = max((one.heads for one in every if one.kind == "heads"), key=len)
    numbers = {
        "heads": [list(head) for head in longest],
        **main,
        "measure": named[there[0]],
        "measures": {named[name]: found[name] for name in there},
        "conditions": {one.name: [list(head) for head in one.heads] for one in every},
    }
    title = f"Heads {what}: {', '.join(map(str, longest))}"
    tables = [_shown(named[name], found[name]) for name in there if name in MEASURES]
    if by_kind := {named[name]: found[name] for name in there if name not in MEASURES}:
        tables.append(_by_kind(by_kind, f"with {main['counts'][-1]} heads {what}"))
    return Finding("ablation", title, tuple(tables), _reading(main, named[there[0]], what), numbers)


def _shown(name: str, found: Mapping[str, Any]) -> Table:
    """A row a count; of no head, what the model does as it is."""
    columns = ("heads", *COLUMNS.values())
    of_maps = name in (MEASURES["maps"], MEASURES["pointing"])
    cell, said = (_from_before, "; before") if of_maps else (_cell, "")
    rows = []
    for place, count in enumerate(found["counts"]):
        cells = [cell(found, kind, place) for kind in COLUMNS]
        rows.append((str(count), *(cells if count else (cells[0], "", ""))))
    return Table(columns, tuple(rows), f"{name} (%{said}), {found['num']} expressions")


def _from_before(found: Mapping[str, Any], kind: str, place: int) -> str:
    """A percentage, and what the same heads' maps give in the model as it is.

    >>> _from_before({"curves": {"heads": [0.5]}, "falls": {"heads": [0.25]}}, "heads", 0)
    '50.0; 75.0'
    """
    now, fall = found["curves"][kind][place], found["falls"][kind][place]
    return f"{percent(now)}; {percent(now + fall)}"


def _by_kind(found: Mapping[str, Mapping[str, Any]], changed: str) -> Table:
    """A row a kind of question: as the model is, and at the largest count."""
    columns = ("answers right (%)", "of", "none", *COLUMNS.values())
    rows = []
    for name, one in found.items():
        after = (percent(one["curves"][kind][-1]) for kind in COLUMNS)
        rows.append((name.rpartition(", ")[2], str(one["num"]), percent(one["curves"]["heads"][0]), *after))
    return Table(columns, tuple(rows), f"By question, {changed}")


def _cell(found: Mapping[str, Any], kind: str, place: int) -> str:
    """A percentage with its interval.

    >>> _cell({"curves": {"heads": [0.5]}, "intervals": {"heads": [[0.25, 1.0]]}}, "heads", 0)
    '50.0 [25, 100]'
    """
    low, high = found["intervals"][kind][place]
    return f"{percent(found['curves'][kind][place])} [{percent(low, 0)}, {percent(high, 0)}]"


def _reading(found: Mapping[str, Any], name: str, what: str) -> str:
    """What the largest count of the list does, beside as many random heads."""
    said = []
    for kind, label in KINDS.items():
        low, high = found["fall_intervals"][kind][-1]
        said.append(f"{label} {_points(-found['falls'][kind][-1])} [{_points(-high)}, {_points(-low)}]")
    before, count = percent(found["curves"]["heads"][0]), found["counts"][-1]
    return (
        f"{name[0].upper()}{name[1:]}: {before} % as the model is. What {count} heads {what} change, in points: "
        f"{'; '.join(said)}."
    )


def _points(value: float) -> str:
    """
    >>> _points(0.125), _points(-0.0)
    ('+12.5', '0.0')
    """
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text
