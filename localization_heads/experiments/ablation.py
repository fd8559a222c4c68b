"""Head ablations: which heads to switch off (or steer), and the curves and tables of the results.

Pure functions of numbers; the stage that runs the model is `stages/ablate.py`. For every count, the first heads of a
list are compared with as many random heads of the same layers and with the heads of the highest attention sum.
"""

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
"""How the changed heads are chosen, with the label of each choice in sentences."""
COLUMN_LABELS = {"heads": "the list", "random": "random", "attention_sum": "highest sum"}
"""The labels of `KINDS` in table headers."""
MEASURES = {
    "answers": "answers right",
    "boxes": "native boxes right (IoU 0.5)",
    "maps": "Acc@0.5 of the other heads' maps",
    "pointing": "pointing of the other heads' maps",
    "follows": "answers that name what is in the region",
    "leaves": "answers that name what is outside it",
}
"""The measures with their labels. The first one that was measured is the main one."""
BEFORE = "_before"
"""Suffix of a map measure's baseline: the same heads' maps in the unchanged model."""

Measurements = Mapping[str, Mapping[str, float]]
"""`[condition name][measure]`: the values of one expression, from 0 to 1."""


class Condition(NamedTuple):
    """A set of heads that are changed together.

    Args:
        kind: a key of `KINDS`.
        size: the number of heads.
        draw: index of the random set, from 0; 0 for the other kinds.
    """

    kind: str
    size: int
    draw: int
    heads: tuple[Head, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}-{self.draw}"


def make_conditions(
    listed: Sequence[Head],
    by_sum: Sequence[Head],
    counts: Sequence[int],
    *,
    draws: int,
    heads_per_layer: int,
    seed: int = 42,
) -> tuple[Condition, ...]:
    """The unchanged model, then for each count the first heads of both lists and `draws` random sets.

    The random heads are from the same layers as the first heads of `listed`. Counts beyond its length are clipped.

    Args:
        listed: the heads under study, best first.
        by_sum: all heads by attention sum, highest first.

    >>> conditions = make_conditions([Head(2, 0)], [Head(2, 1)], [0, 1], draws=1, heads_per_layer=2)
    >>> [(condition.name, *map(str, condition.heads)) for condition in conditions]
    [('heads-0-0',), ('heads-1-0', 'L2H0'), ('attention_sum-1-0', 'L2H1'), ('random-1-0', 'L2H1')]
    """
    rng = np.random.default_rng(seed)
    orders = [_draw_order(listed, heads_per_layer, rng) for _ in range(draws)]
    conditions = [Condition("heads", 0, 0, ())]
    for count in usable_counts(counts, len(listed))[1:]:
        first = tuple(listed[:count])
        conditions.append(Condition("heads", count, 0, first))
        conditions.append(Condition("attention_sum", count, 0, tuple(by_sum[:count])))
        conditions += [
            Condition("random", count, draw, _layer_matched(first, order)) for draw, order in enumerate(orders)
        ]
    return tuple(conditions)


def usable_counts(counts: Sequence[int], length: int) -> list[int]:
    """The distinct counts in ascending order, clipped to the length of the list, and 0.

    >>> usable_counts([10, 1, 3], 7)
    [0, 1, 3, 7]
    """
    return sorted({0, *(min(count, length) for count in counts)})


def _draw_order(listed: Sequence[Head], heads_per_layer: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """`[layer]`: its heads in the order of drawing: a permutation of the unlisted heads, then the listed, best last."""
    order = {}
    for layer in sorted({head.layer for head in listed}):
        own = [head.head for head in listed if head.layer == layer]
        others = [head for head in range(heads_per_layer) if head not in own]
        order[layer] = [int(head) for head in rng.permutation(others)] + own[::-1]
    return order


def _layer_matched(heads: Sequence[Head], order: Mapping[int, Sequence[int]]) -> tuple[Head, ...]:
    """As many heads of each layer, taken in the given order, so that a larger set contains the smaller ones."""
    taken = dict.fromkeys(order, 0)
    matched = []
    for layer, _ in heads:
        matched.append(Head(layer, order[layer][taken[layer]]))
        taken[layer] += 1
    return tuple(matched)


def compute_curves(
    conditions: Sequence[Condition], measurements: Sequence[Measurements], measure: str, seed: int = 42
) -> dict[str, Any]:
    """A measure as a function of the number of changed heads, for each kind of heads.

    Means over the expressions that have the measure, with 95 % bootstrap intervals over expressions; the random sets
    of one expression are averaged first. `falls` are paired differences to the unchanged model or, for a measure of
    maps, to the same heads' maps in it.

    Returns:
        `counts`, `num` (expressions), and by kind `curves` [value], `intervals` [[low, high]], `falls` and
        `fall_intervals`.
    """
    unchanged = conditions[0].name
    measured = [values for values in measurements if measure in values[unchanged]]
    counts = sorted({condition.size for condition in conditions})
    result: dict[str, Any] = {"counts": counts, "num": len(measured)}
    result |= {name: {} for name in ("curves", "intervals", "falls", "fall_intervals")}
    for kind in KINDS:
        table = _values_and_falls(conditions, measured, kind, counts, measure)
        resampled = bootstrap_ratios(table, np.ones_like(table), seed=seed)
        half = len(counts)
        bounds = [[rounded(bound) for bound in percentile_interval(column)] for column in resampled.T]
        means = [rounded(mean) for mean in table.mean(axis=0)] if len(table) else [None] * table.shape[1]
        result["curves"][kind], result["falls"][kind] = means[:half], means[half:]
        result["intervals"][kind], result["fall_intervals"][kind] = bounds[:half], bounds[half:]
    return result


def _values_and_falls(
    conditions: Sequence[Condition],
    measurements: Sequence[Measurements],
    kind: str,
    counts: Sequence[int],
    measure: str,
) -> NDArray[np.float64]:
    """`[expression, 2 x counts]`: the value at each count, then its fall from the baseline at each count."""
    unchanged = conditions[0].name
    rows = []
    for values in measurements:
        at_count, falls = [], []
        for count in counts:
            names = [c.name for c in conditions if c.size == count and c.kind == kind] if count else [unchanged]
            after = [values[name][measure] for name in names]
            before = [values[name].get(measure + BEFORE, values[unchanged][measure]) for name in names]
            at_count.append(np.mean(after))
            falls.append(np.mean(before) - np.mean(after))
        rows.append([*at_count, *falls])
    return np.array(rows, dtype=np.float64).reshape(len(measurements), 2 * len(counts))


def ablation_finding(
    conditions: Sequence[Condition],
    measurements: Sequence[Measurements],
    question_labels: Mapping[str, str],
    change: str,
    seed: int = 42,
) -> Finding:
    """The tables of an ablation, and the numbers of `ablation.json`.

    Args:
        question_labels: further measures with their labels: the right answers to one kind of question each.
        change: what was done to the heads, such as `switched off`.
    """
    labels = {**MEASURES, **question_labels}
    unchanged = conditions[0].name
    measured = [name for name in labels if any(name in values[unchanged] for values in measurements)]
    curves = {name: compute_curves(conditions, measurements, name, seed) for name in measured}
    main, main_label = curves[measured[0]], labels[measured[0]]
    longest = max((condition.heads for condition in conditions if condition.kind == "heads"), key=len)
    numbers = {
        "heads": [list(head) for head in longest],
        **main,
        "measure": main_label,
        "measures": {labels[name]: curves[name] for name in measured},
        "conditions": {condition.name: [list(head) for head in condition.heads] for condition in conditions},
    }
    title = f"Heads {change}: {', '.join(map(str, longest))}"
    tables = [_measure_table(labels[name], curves[name]) for name in measured if name in MEASURES]
    if by_question := {labels[name]: curves[name] for name in measured if name not in MEASURES}:
        tables.append(_question_table(by_question, f"with {main['counts'][-1]} heads {change}"))
    return Finding("ablation", title, tuple(tables), _reading(main, main_label, change), numbers)


def _measure_table(label: str, curves: Mapping[str, Any]) -> Table:
    """One row per count; the row of 0 heads is the unchanged model, and fills the first column only."""
    columns = ("heads", *COLUMN_LABELS.values())
    of_maps = label in (MEASURES["maps"], MEASURES["pointing"])
    cell, unit = (_cell_with_baseline, "%; before") if of_maps else (_cell_with_interval, "%")
    rows = []
    for index, count in enumerate(curves["counts"]):
        cells = [cell(curves, kind, index) for kind in COLUMN_LABELS]
        rows.append((str(count), *(cells if count else (cells[0], "", ""))))
    return Table(columns, tuple(rows), f"{label} ({unit}), {curves['num']} expressions")


def _cell_with_baseline(curves: Mapping[str, Any], kind: str, index: int) -> str:
    """A percentage, and that of the same heads' maps in the unchanged model.

    >>> _cell_with_baseline({"curves": {"heads": [0.5]}, "falls": {"heads": [0.25]}}, "heads", 0)
    '50.0; 75.0'
    """
    after, fall = curves["curves"][kind][index], curves["falls"][kind][index]
    return f"{percent(after)}; {percent(after + fall)}"


def _cell_with_interval(curves: Mapping[str, Any], kind: str, index: int) -> str:
    """A percentage with its interval.

    >>> _cell_with_interval({"curves": {"heads": [0.5]}, "intervals": {"heads": [[0.25, 1.0]]}}, "heads", 0)
    '50.0 [25, 100]'
    """
    low, high = curves["intervals"][kind][index]
    return f"{percent(curves['curves'][kind][index])} [{percent(low, 0)}, {percent(high, 0)}]"


def _question_table(by_question: Mapping[str, Mapping[str, Any]], change: str) -> Table:
    """One row per kind of question: the unchanged model, and each kind of heads at the largest count."""
    columns = ("answers right (%)", "of", "none", *COLUMN_LABELS.values())
    rows = []
    for label, curves in by_question.items():
        question = label.rpartition(", ")[2]
        after = (percent(curves["curves"][kind][-1]) for kind in COLUMN_LABELS)
        rows.append((question, str(curves["num"]), percent(curves["curves"]["heads"][0]), *after))
    return Table(columns, tuple(rows), f"By question, {change}")


def _reading(curves: Mapping[str, Any], label: str, change: str) -> str:
    """A sentence that compares the kinds of heads at the largest count."""
    changes = []
    for kind, kind_label in KINDS.items():
        low, high = curves["fall_intervals"][kind][-1]
        changes.append(f"{kind_label} {_points(-curves['falls'][kind][-1])} [{_points(-high)}, {_points(-low)}]")
    before, count = percent(curves["curves"]["heads"][0]), curves["counts"][-1]
    return (
        f"{label[0].upper()}{label[1:]}: {before} % as the model is. What {count} heads {change} change, in points: "
        f"{'; '.join(changes)}."
    )


def _points(value: float) -> str:
    """A signed difference in percentage points, zero without a sign.

    >>> _points(0.125), _points(-0.0)
    ('+12.5', '0.0')
    """
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text
