"""What the template of the report puts into the page: texts, numbers and table rows, never markup."""

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
"""Rows of the ranking table, and of the table of failures; the files hold all of them."""
FIRST_ROWS = 14
"""Rows shown until the reader asks for more."""


def single_line(text: object, limit: int = 300) -> str:
    """The text on one line of at most `limit` characters, without control characters or lone surrogates.

    >>> single_line("the\\x00 dog\\n on the left", 8)
    'the� do…'
    """
    line = " ".join(str(text)[: 8 * limit].split())
    line = line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
    return clean(line)


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace every control character and lone surrogate by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def format_number(value: object, digits: int = 3) -> str:
    """Format a value: integers with thousands separators, None and values that are not finite as a dash.

    >>> format_number(0.5), format_number(12345), format_number(None), format_number(float("inf"))
    ('0.500', '12,345', '-', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        text = f"{value:.{digits}f}"
        return text if float(text) else text.removeprefix("-")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else single_line(value, 160)


def count_noun(count: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1.

    >>> count_noun(1, "head"), count_noun(1200, "sample")
    ('1 head', '1,200 samples')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Tile(NamedTuple):
    """A key figure at the top of the page; `kind` is a CSS class."""

    label: str
    value: str
    note: str = ""
    kind: str = ""


def summary_tiles(report: Report) -> Iterator[Tile]:
    """The key figures: which heads, how good they are, how many entries failed."""
    if used := _used(report):
        yield Tile("localization heads", " ".join(map(str, used[:6])))
    if report.heads is not None:
        ranking, (layers, heads) = report.heads.ranking, report.heads.shape
        left_out = f", {count_noun(ranking.exclude_layers, 'layer')} left out" if ranking.exclude_layers else ""
        yield Tile("kept by criterion 1", f"{len(ranking.kept)}", f"of {layers * heads} heads{left_out}")
        if ranking.tau is not None:
            yield Tile("threshold τ", format_number(ranking.tau))
    yield from _score_tiles(report)
    failed = len(report.failures)
    yield Tile("failed", f"{failed:,}", f"of {report.num_entries:,} entries", "bad" if failed else "")


def _used(report: Report) -> Sequence[Head]:
    """The heads that made the boxes; without a ranking, the heads of the cards if all cards have the same."""
    if report.heads is not None:
        return report.heads.used
    sets = {card.heads for card in report.cards if card.heads}
    return sets.pop() if len(sets) == 1 else ()


def _score_tiles(report: Report) -> list[Tile]:
    low, high = report.metrics.get("acc@0.5_interval") or (None, None)
    interval = f"95 % interval {format_number(low, 2)} to {format_number(high, 2)}" if high is not None else ""
    labels = {"acc@0.5": "Acc@0.5", "mean_iou": "mean IoU", "giou": "gIoU"}
    tiles = [
        Tile(label, format_number(report.metrics[name]), interval if name == "acc@0.5" else "")
        for name, label in labels.items()
        if isinstance(report.metrics.get(name), float)
    ]
    if not tiles and report.ious:
        mean = format_number(sum(report.ious) / len(report.ious))
        tiles.append(Tile("mean IoU", mean, f"over {len(report.ious):,} with a true box"))
    return tiles


def describe_method(facts: HeadFacts) -> str:
    """An explanation of the ranking's columns for a reader who has not read the paper."""
    ranking = facts.ranking
    where, average = (" in a sample", " on average") if ranking.options.per_sample else ("", "")
    tau = "" if ranking.tau is None else f" if its attention sum on the image reaches τ = {format_number(ranking.tau)}"
    by = (ranking.found_with or {}).get("heads_by")
    sentences = [
        single_line(facts.origin, 1000),
        f"The order is that of labels (heads_by={single_line(by, 20)}), not that of the selection frequency."
        if by
        else "",
        f"Criterion 1 keeps a head{where}{tau}{average if tau else ''}.",
        f"Criterion 2 marks, in every sample, the {ranking.top_n} kept heads whose maps are the most compact "
        "(lowest spatial entropy); the selection frequency is the share of samples that mark a head.",
        f"Averages over {count_noun(ranking.num_samples, 'sample')}.",
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
    """What the sensitivity column means and which heads rest; "" if it was not measured."""
    if not ranking.has_sensitivity:
        return ""
    rest = " ".join(str(head.address) for head in resting_heads(ranking)[:FIRST_ROWS])
    return " ".join(
        [
            "Sensitivity: 1 minus the overlap of a head's map with those of other expressions of the same image.",
            _ranked_by(ranking),
            f"Resting (much attention, maps that hardly follow the expression): {rest}." if rest else "No head rests.",
        ]
    )


def _ranked_by(ranking: HeadRanking) -> str:
    if ranking.options.sensitivity == "none":
        return ""
    if all(head.consistency is None for head in ranking.kept):
        return "The kept heads are ranked by it."
    return (
        "The kept heads are ranked by it, minus 1 - consistency: the overlap with the map of the mirrored image, "
        "which is in heads.csv."
    )


def _spread(ranking: HeadRanking) -> str:
    if ranking.num_trials == 1:
        return ""
    trials = "bootstrap resamples of them" if ranking.spread == "bootstrap" else "random draws"
    return f"Error bars: one standard deviation over {ranking.num_trials} {trials}."


def describe_correlation(facts: HeadFacts) -> str:
    """Spearman's rank correlation with the number of heads and the p-value, as a sentence."""
    heads = count_noun(len(facts.scatter), "head")
    if facts.correlation is None:
        why = "there are too few" if len(facts.scatter) < FEWEST else "one of the two is the same for all"
        return f"No rank correlation over {heads}: {why}."
    rho, p = facts.correlation
    return f"Spearman's rank correlation: {rho:.2f} over {heads} ({format_p_value(p)})."


class Cell(NamedTuple):
    """A cell of the ranking: its text, the value it is sorted by, and a bar as value and deviation from 0 to 1."""

    text: str
    value: float | None
    bar: tuple[float, float] | None = None

    @property
    def sorted_by(self) -> str | None:
        return None if self.value is None or math.isnan(self.value) else f"{self.value:.6g}"


def ranking_columns(facts: HeadFacts) -> dict[str, str]:
    """The columns of the ranking: their keys and headers."""
    available = {
        "sensitivity": facts.ranking.has_sensitivity,
        "bottom": facts.bottom_row is not None,
        "iou": facts.iou is not None,
    }
    names = {
        "rank": "#", "head": "head", "frequency": "selection frequency", "sum": "attention sum",
        "entropy": "spatial entropy", "sensitivity": "sensitivity", "bottom": "bottom row", "iou": "IoU",
    }  # fmt: skip
    return {key: name for key, name in names.items() if available.get(key, True)}


def ranking_cells(facts: HeadFacts, rank: int, head: RankedHead) -> list[Cell]:
    """A row of the ranking, in the order of `ranking_columns`."""
    frequency, deviation = head.selection_frequency, head.selection_frequency_std
    cells = [
        Cell(str(rank), rank),
        Cell(str(head.address), head.layer * facts.shape[1] + head.head),
        Cell(f"{100 * frequency:.1f} ± {100 * deviation:.1f} %", frequency, (frequency, deviation)),
        Cell(format_number(head.attention_sum), head.attention_sum),
        Cell(format_number(head.spatial_entropy), head.spatial_entropy),
    ]
    if facts.ranking.has_sensitivity:
        rests = " (rests)" if head in resting_heads(facts.ranking) else ""
        cells.append(Cell(format_number(head.sensitivity) + rests, head.sensitivity))
    if facts.bottom_row is not None:
        share = float(facts.bottom_row[head.address])
        cells.append(Cell(f"{100 * share:.0f} %", share))
    if facts.iou is not None:
        iou = float(facts.iou[head.address])
        cells.append(Cell(format_number(iou), iou))
    return cells


class Value(NamedTuple):
    """A number as text, with its interval."""

    text: str
    bounds: str = ""


class Table(NamedTuple):
    """A table whose rows are named; `header` names the other columns, if they have names."""

    rows: list[tuple[str, list[Value]]]
    title: str = ""
    header: Sequence[str] = ()


CONTROLS = (
    "The controls show what other maps and boxes reach: random heads of the same layers, the mean of all heads, "
    "a centred box, and the oracle, which is the ground truth on the model's own grid."
)
DIFFERENCE = "lead of these heads over each"


def ungrouped_metrics(metrics: Mapping[str, Any]) -> Table:
    """The metrics that are in no group."""
    return _pairs({name: value for name, value in metrics.items() if not isinstance(value, Mapping)})


def metric_groups(metrics: Mapping[str, Any]) -> list[list[Table]]:
    """The tables of each group of metrics.json. A single table without a header holds settings, shown folded."""
    return [
        _group(single_line(name.replace("_", " "), 80), group, metrics)
        for name, group in metrics.items()
        if isinstance(group, Mapping) and group
    ]


def _group(title: str, group: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Table]:
    """The tables of a group. A group of methods gets one with these heads' own numbers on top, and one per subgroup."""
    if not all(isinstance(row, Mapping) for row in group.values()):
        return [_pairs(dict(_flattened(group)), title)]
    names = {name for row in group.values() for name in row}
    own = {name: value for name, value in metrics.items() if name in names and not isinstance(value, Mapping)}
    subgroups = dict.fromkeys(key for row in group.values() for key, value in row.items() if isinstance(value, Mapping))
    tables = [_table(title, {"these heads": own, **group})]
    for key in subgroups:
        rows = {name: row[key] for name, row in group.items() if isinstance(row.get(key), Mapping)}
        tables.append(_table(f"{title}: {DIFFERENCE if key == 'difference' else single_line(key, 80)}", rows))
    return tables


def _pairs(metrics: Mapping[str, Any], title: str = "") -> Table:
    names = [name for name in metrics if not name.endswith("_interval")]
    return Table([(single_line(name, 80), [_value(metrics, name)]) for name in names], title)


def _table(title: str, group: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = [
        name
        for name in dict.fromkeys(name for row in group.values() for name in row)
        if not name.endswith("_interval") and not any(isinstance(row.get(name), Mapping) for row in group.values())
    ]
    rows = [
        (single_line(name.replace("_", " "), 80), [_value(row, column) for column in columns])
        for name, row in group.items()
    ]
    return Table(rows, title, [single_line(name, 80) for name in columns])


def _flattened(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], list)):  # curves are drawn
            yield f"{prefix}{name}", value


def _value(row: Mapping[str, Any], name: str) -> Value:
    """A metric with its interval, which is `<name>_interval` or follows the value in a list of three numbers."""
    value, interval = row.get(name), row.get(f"{name}_interval")
    if isinstance(value, list):
        if len(value) != 3 or not all(isinstance(one, float) for one in value):
            return Value(single_line(", ".join(map(format_number, value)), 120))
        value, *interval = value
    if not isinstance(interval, list):
        return Value(format_number(value))
    return Value(format_number(value), f"[{', '.join(format_number(bound, 2) for bound in interval)}]")


def describe_selection(report: Report) -> str:
    """Which of the grounded samples the gallery shows, as a sentence."""
    shown, total = len(report.cards), report.num_grounded
    if shown >= total:
        return f"All {total:,} grounded samples." if total > 1 else ""
    worst = "lowest IoU" if any(card.iou is not None for card in report.cards) else "lowest score"
    return (
        f"{shown:,} of {total:,} grounded samples: the first {shown - shown // 2:,} of the data set "
        f"and, of the others, the {shown // 2:,} with the {worst}."
    )


def legend_entries(cards: Sequence[Card]) -> dict[str, str]:
    """The entries of the legend, only for shapes that some sample has."""
    shapes = [
        ("predicted", "predicted box", True),
        ("mask", "predicted mask", any(card.mask for card in cards)),
        ("truth", "true box", any(card.truths for card in cards)),
        ("truth-mask", "true mask", any(card.truth_mask for card in cards)),
    ]
    return {kind: name for kind, name, is_drawn in shapes if is_drawn}


def alt_text(card: Card) -> str:
    """A description of the image for screen readers."""
    boxes = [("predicted box", box) for box in card.boxes] + [("true box", box) for box in card.truths]
    parts = [f"{name} {' '.join(f'{edge:.0f}' for edge in box)}" for name, box in boxes]
    parts += [] if card.image else ["the image cannot be opened"]
    return f"{single_line(card.expression, 600)}: {'; '.join(parts)}"


def rect_attributes(box: Box, image_size: tuple[int, int]) -> dict[str, str]:
    """The attributes of an SVG rectangle for the box, clipped to the image."""
    W, H = image_size
    x0, x1 = (min(max(x, 0.0), W) for x in box[0::2])
    y0, y1 = (min(max(y, 0.0), H) for y in box[1::2])
    return {"x": f"{x0:.1f}", "y": f"{y0:.1f}", "width": f"{x1 - x0:.1f}", "height": f"{y1 - y0:.1f}"}


def script_data(cards: Sequence[Card]) -> dict[str, Any]:
    """The maps of every sample, for the page's script."""
    return {"cards": [{"region": [round(edge, 2) for edge in card.image_box], "maps": _maps(card)} for card in cards]}


def _maps(card: Card) -> list[dict[str, Any]]:
    named = list(zip(map(str, card.heads), card.maps, strict=False))
    combined = [] if card.combined is None else [("combined", card.combined)]
    return [{"name": name, "rows": m.rows, "columns": m.columns, "cells": m.cells} for name, m in named + combined]


def failure_reasons(report: Report) -> list[tuple[int, str]]:
    """The reasons of failures with their counts, without the parts that differ between entries."""
    kinds = (bad.reason.rpartition(": ")[2] if ": " in bad.reason else bad.reason for bad in report.failures)
    counts = Counter(single_line(kind, 160) for kind in kinds)
    return [(count, reason) for reason, count in counts.most_common(MAX_ROWS)]


def failed_entries(report: Report) -> list[tuple[str, str, str]]:
    """Line, id and reason of the first failed entries."""
    return [
        (str(bad.line or "-"), single_line(bad.id or "-", 80), single_line(bad.reason))
        for bad in report.failures[:MAX_ROWS]
    ]


def script_json(value: object) -> str:
    """`value` as JSON for a script element, with every character escaped that could end it or open another.

    Raises:
        ValueError: for NaN or infinite numbers, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
