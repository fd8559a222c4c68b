"""The content of the page as plain values for its template: texts, numbers and rows, none of them markup."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from localization_heads.attention import Box
from localization_heads.evaluation.metrics import FEWEST
from localization_heads.experiments.paper import format_p_value
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking, RankedHead, resting_heads
from localization_heads.report.content import Card, HeadFacts, Report

MAX_ROWS = 100
"""Heads in the ranking table and failures in theirs; the files hold all."""
FIRST_ROWS = 14
"""Rows that are shown before the reader asks for more."""


def plain(text: object, limit: int = 300) -> str:
    """One line of text that any browser and any encoder takes: no control character, no half of a pair.

    >>> plain("the\\x00 dog\\n on the left", 8)
    'the� do…'
    """
    line = " ".join(str(text)[: 8 * limit].split())
    line = line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
    return clean(line)


_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` with a sign in place of every control character and every half of a surrogate pair."""
    return _UNFIT.sub("\ufffd", text)


def number(value: object, digits: int = 3) -> str:
    """A count stays whole; what is not known, or not finite, is a dash.

    >>> number(0.5), number(12345), number(None), number(float("inf"))
    ('0.500', '12,345', '-', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        text = f"{value:.{digits}f}"
        return text if float(text) else text.removeprefix("-")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value, 160)


def counted(count: int, noun: str) -> str:
    """
    >>> counted(1, "head"), counted(1200, "sample")
    ('1 head', '1,200 samples')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Tile(NamedTuple):
    label: str
    value: str
    note: str = ""
    kind: str = ""


def summary(report: Report) -> Iterator[Tile]:
    """The answers first: which heads, how good, how many failed."""
    if used := _used(report):
        yield Tile("localization heads", " ".join(map(str, used[:6])))
    if report.heads is not None:
        ranking, (layers, heads) = report.heads.ranking, report.heads.shape
        left_out = f", {counted(ranking.exclude_layers, 'layer')} left out" if ranking.exclude_layers else ""
        yield Tile("kept by criterion 1", f"{len(ranking.kept)}", f"of {layers * heads} heads{left_out}")
        if ranking.tau is not None:
            yield Tile("threshold τ", number(ranking.tau))
    yield from _scores(report)
    failed = len(report.failures)
    yield Tile("failed", f"{failed:,}", f"of {report.num_entries:,} entries", "bad" if failed else "")


def _used(report: Report) -> Sequence[Head]:
    """The heads that made the boxes; without a ranking those of the samples, where they are the same in all."""
    if report.heads is not None:
        return report.heads.used
    sets = {card.heads for card in report.cards if card.heads}
    return sets.pop() if len(sets) == 1 else ()


def _scores(report: Report) -> list[Tile]:
    low, high = report.metrics.get("acc@0.5_interval") or (None, None)
    bounds = f"95 % interval {number(low, 2)} to {number(high, 2)}" if high is not None else ""
    names = {"acc@0.5": "Acc@0.5", "mean_iou": "mean IoU", "giou": "gIoU"}
    found = [
        Tile(label, number(report.metrics[name]), bounds if name == "acc@0.5" else "")
        for name, label in names.items()
        if isinstance(report.metrics.get(name), float)
    ]
    if not found and report.ious:
        mean = number(sum(report.ious) / len(report.ious))
        found.append(Tile("mean IoU", mean, f"over {len(report.ious):,} with a true box"))
    return found


def method(facts: HeadFacts) -> str:
    """Explains the columns to a reader who has not read the paper."""
    ranking = facts.ranking
    where, average = (" in a sample", " on average") if ranking.options.per_sample else ("", "")
    tau = (
        "" if ranking.tau is None else f" if its attention sum on the image reaches τ = {number(ranking.tau)}"
    )
    by = (ranking.found_with or {}).get("heads_by")
    sentences = [
        plain(facts.origin, 1000),
        f"The order is that of labels (heads_by={plain(by, 20)}), not that of the selection frequency."
        if by
        else "",
        f"Criterion 1 keeps a head{where}{tau}{average if tau else ''}.",
        f"Criterion 2 marks, in every sample, the {ranking.top_n} kept heads whose maps are the most compact "
        "(lowest spatial entropy); the selection frequency is the share of samples that mark a head.",
        f"Averages over {counted(ranking.num_samples, 'sample')}.",
        _spread(ranking),
        _sensitivity_sentence(ranking),
        "" if facts.bottom_row is None else BOTTOM_ROW,
    ]
    return " ".join(filter(None, sentences))


BOTTOM_ROW = (
    "Bottom row: the share of samples in which all cells of a map's lowest row are above its mean, "
    "a sign of a sink rather than of an object."
)


def _sensitivity_sentence(ranking: HeadRanking) -> str:
    """What the sensitivities say; nothing where they were not measured."""
    if not ranking.has_sensitivity:
        return ""
    rest = " ".join(str(head.address) for head in resting_heads(ranking)[:FIRST_ROWS])
    return " ".join(
        [
            "Sensitivity: 1 minus the overlap of a head's map with those of other expressions of the same image.",
            _ranked_by(ranking),
            f"Resting (much attention, maps that hardly follow the expression): {rest}."
            if rest
            else "No head rests.",
        ]
    )


def _ranked_by(ranking: HeadRanking) -> str:
    if ranking.options.sensitivity == "none":
        return ""
    if all(head.consistency is None for head in ranking.kept):
        return "The heads kept are ranked by it."
    return (
        "The heads kept are ranked by it, less what is missing to a full overlap with the map of the mirrored image "
        "(consistency in heads.csv)."
    )


def _spread(ranking: HeadRanking) -> str:
    if ranking.num_trials == 1:
        return ""
    trials = "bootstrap resamples of them" if ranking.spread == "bootstrap" else "random draws"
    return f"Error bars: one standard deviation over {ranking.num_trials} {trials}."


def correlation(facts: HeadFacts) -> str:
    """Spearman's correlation with the number of heads and the p-value."""
    heads = counted(len(facts.scatter), "head")
    if facts.correlation is None:
        why = "they are too few" if len(facts.scatter) < FEWEST else "one of the two is the same for all"
        return f"No rank correlation over {heads}: {why}."
    rho, p = facts.correlation
    return f"Spearman's rank correlation: {rho:.2f} over {heads} ({format_p_value(p)})."


class Cell(NamedTuple):
    """A cell of the ranking: its text, the value that it is sorted by, and a bar with its error from 0 to 1."""

    text: str
    value: float | None
    bar: tuple[float, float] | None = None

    @property
    def sorted_by(self) -> str | None:
        return None if self.value is None or math.isnan(self.value) else f"{self.value:.6g}"


def ranking_columns(facts: HeadFacts) -> dict[str, str]:
    """The columns of the ranking: their keys, and what stands above them."""
    known = {
        "sensitivity": facts.ranking.has_sensitivity,
        "bottom": facts.bottom_row is not None,
        "iou": facts.iou is not None,
    }
    names = {
        "rank": "#", "head": "head", "frequency": "selection frequency", "sum": "attention sum",
        "entropy": "spatial entropy", "sensitivity": "sensitivity", "bottom": "bottom row", "iou": "IoU",
    }  # fmt: skip
    return {key: name for key, name in names.items() if known.get(key, True)}


def ranking_cells(facts: HeadFacts, rank: int, head: RankedHead) -> list[Cell]:
    """In the order of `ranking_columns`."""
    frequency, deviation = head.selection_frequency, head.selection_frequency_std
    cells = [
        Cell(str(rank), rank),
        Cell(str(head.address), head.layer * facts.shape[1] + head.head),
        Cell(f"{100 * frequency:.1f} ± {100 * deviation:.1f} %", frequency, (frequency, deviation)),
        Cell(number(head.attention_sum), head.attention_sum),
        Cell(number(head.spatial_entropy), head.spatial_entropy),
    ]
    if facts.ranking.has_sensitivity:
        rests = " (rests)" if head in resting_heads(facts.ranking) else ""
        cells.append(Cell(number(head.sensitivity) + rests, head.sensitivity))
    if facts.bottom_row is not None:
        share = float(facts.bottom_row[head.address])
        cells.append(Cell(f"{100 * share:.0f} %", share))
    if facts.iou is not None:
        iou = float(facts.iou[head.address])
        cells.append(Cell(number(iou), iou))
    return cells


class Value(NamedTuple):
    text: str
    bounds: str = ""


class Table(NamedTuple):
    """Rows with a name each; `header` names the columns after it, if they have names."""

    rows: list[tuple[str, list[Value]]]
    title: str = ""
    header: Sequence[str] = ()


CONTROLS = (
    "The controls tell an effect from luck: random heads of the same layers, the mean of all heads, "
    "a box in the middle, and the oracle, which is the truth on the model's own grid."
)
DIFFERENCE = "how far these heads are ahead of each"


def own_metrics(metrics: Mapping[str, Any]) -> Table:
    """Those that are not in a group."""
    return _pairs({name: value for name, value in metrics.items() if not isinstance(value, Mapping)})


def metric_groups(metrics: Mapping[str, Any]) -> list[list[Table]]:
    """The groups of metrics.json under their names; one without a header holds settings, which are folded away."""
    return [
        _group(plain(name.replace("_", " "), 80), group, metrics)
        for name, group in metrics.items()
        if isinstance(group, Mapping) and group
    ]


def _group(title: str, group: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Table]:
    """Rows of numbers as a table with ours on top, and one more for each kind of numbers within them."""
    if not all(isinstance(row, Mapping) for row in group.values()):
        return [_pairs(dict(_flattened(group)), title)]
    names = {name for row in group.values() for name in row}
    own = {name: value for name, value in ours.items() if name in names and not isinstance(value, Mapping)}
    inner = dict.fromkeys(
        k for row in group.values() for k, value in row.items() if isinstance(value, Mapping)
    )
    tables = [_table(title, {"these heads": own, **group})]
    for key in inner:
        rows = {name: row[key] for name, row in group.items() if isinstance(row.get(key), Mapping)}
        tables.append(_table(f"{title}: {DIFFERENCE if key == 'difference' else plain(key, 80)}", rows))
    return tables


def _pairs(metrics: Mapping[str, Any], title: str = "") -> Table:
    names = [name for name in metrics if not name.endswith("_interval")]
    return Table([(plain(name, 80), [_value(metrics, name)]) for name in names], title)


def _table(title: str, group: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = [
        name
        for name in dict.fromkeys(name for row in group.values() for name in row)
        if not name.endswith("_interval")
        and not any(isinstance(row.get(name), Mapping) for row in group.values())
    ]
    rows = [
        (plain(name.replace("_", " "), 80), [_value(row, column) for column in columns])
        for name, row in group.items()
    ]
    return Table(rows, title, [plain(name, 80) for name in columns])


def _flattened(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], list)):  # curves are drawn
            yield f"{prefix}{name}", value


def _value(row: Mapping[str, Any], name: str) -> Value:
    """The value and its interval: that of the row, or the two numbers after it; other lists are written out."""
    value, interval = row.get(name), row.get(f"{name}_interval")
    if isinstance(value, list):
        if len(value) != 3 or not all(isinstance(one, float) for one in value):
            return Value(plain(", ".join(map(number, value)), 120))
        value, *interval = value
    if not isinstance(interval, list):
        return Value(number(value))
    return Value(number(value), f"[{', '.join(number(bound, 2) for bound in interval)}]")


def which_samples(report: Report) -> str:
    shown, all = len(report.cards), report.num_grounded
    if shown >= all:
        return f"All {all:,} grounded samples." if all > 1 else ""
    worst = "lowest IoU" if any(card.iou is not None for card in report.cards) else "lowest score"
    return (
        f"{shown:,} of {all:,} grounded samples: the first {shown - shown // 2:,} of the data set "
        f"and, of the others, the {shown // 2:,} with the {worst}."
    )


def shapes_drawn(cards: Sequence[Card]) -> dict[str, str]:
    """The entries of the legend: only shapes that are drawn in some sample."""
    shapes = [
        ("predicted", "predicted box", True),
        ("mask", "predicted mask", any(card.mask for card in cards)),
        ("truth", "true box", any(card.truths for card in cards)),
        ("truth-mask", "true mask", any(card.truth_mask for card in cards)),
    ]
    return {kind: name for kind, name, is_drawn in shapes if is_drawn}


def described(card: Card) -> str:
    """The image in words, for screen readers."""
    named = [("predicted box", box) for box in card.boxes] + [("true box", box) for box in card.truths]
    parts = [f"{name} {' '.join(f'{edge:.0f}' for edge in box)}" for name, box in named]
    parts += [] if card.image else ["the image cannot be opened"]
    return f"{plain(card.expression, 600)}: {'; '.join(parts)}"


def cut(box: Box, image_size: tuple[int, int]) -> dict[str, str]:
    """The box as the attributes of a rectangle, cut at the image's edge."""
    W, H = image_size
    x0, x1 = (min(max(x, 0.0), W) for x in box[0::2])
    y0, y1 = (min(max(y, 0.0), H) for y in box[1::2])
    return {"x": f"{x0:.1f}", "y": f"{y0:.1f}", "width": f"{x1 - x0:.1f}", "height": f"{y1 - y0:.1f}"}


def script_data(cards: Sequence[Card]) -> dict[str, Any]:
    """The data of the page's script: the maps of every sample."""
    return {
        "cards": [
            {"region": [round(edge, 2) for edge in card.image_box], "maps": _maps(card)} for card in cards
        ]
    }


def _maps(card: Card) -> list[dict[str, Any]]:
    named = list(zip(map(str, card.heads), card.maps, strict=False))
    combined = [] if card.combined is None else [("combined", card.combined)]
    return [
        {"name": name, "rows": m.rows, "columns": m.columns, "cells": m.cells} for name, m in named + combined
    ]


def reasons(report: Report) -> list[tuple[int, str]]:
    """Reasons with their counts, without the part that differs from entry to entry."""
    kinds = (bad.reason.rpartition(": ")[2] if ": " in bad.reason else bad.reason for bad in report.failures)
    counts = Counter(plain(kind, 160) for kind in kinds)
    return [(count, reason) for reason, count in counts.most_common(MAX_ROWS)]


def failed(report: Report) -> list[tuple[str, str, str]]:
    """Line, id and reason of the first entries that failed."""
    return [
        (str(bad.line or "-"), plain(bad.id or "-", 80), plain(bad.reason))
        for bad in report.failures[:MAX_ROWS]
    ]


def json_text(value: object) -> str:
    """`value` as JSON for a script element: no sign in it can end the element or open another.

    Raises:
        ValueError: for NaN or infinite numbers, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
