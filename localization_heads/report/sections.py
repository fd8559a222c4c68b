"""The parts of the page that stand without scripts: summary, ranking, metrics, samples, failures, the run.

Places that scripts fill (charts, maps) are empty elements here, hidden until a script shows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from localization_heads.evaluation.metrics import FEWEST
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking, RankedHead
from localization_heads.report.content import HeadFacts, Report
from localization_heads.report.tables import Markup, element, join, metrics_tables, number, plain

MAX_ROWS = 100
"""Heads in the ranking table and failures in theirs; the files hold all."""
FIRST_ROWS = 14
"""Rows that are shown before the reader asks for more."""


def section(id: str, title: str, *children: object, intro: str = "") -> Markup:
    lead = element("p", {"class": "intro"}, intro) if intro else None
    heading = element("h2", {"id": f"{id}-title"}, title)
    return element("section", {"id": id, "aria-labelledby": f"{id}-title"}, heading, lead, *children)


def summary(report: Report) -> Markup:
    """The answers first: which heads, how good, how many failed."""
    tiles = []
    if used := _used(report):
        tiles.append(_tile("localization heads", " ".join(map(str, used[:6]))))
    if report.heads is not None:
        ranking = report.heads.ranking
        left_out = ranking.exclude_layers
        left = f", {left_out} layer{'' if left_out == 1 else 's'} left out" if left_out else ""
        note = f"of {_num_heads(report.heads)} heads{left}"
        tiles.append(_tile("kept by criterion 1", f"{len(ranking.kept)}", note))
        if ranking.tau is not None:
            tiles.append(_tile("threshold τ", number(ranking.tau)))
    tiles += _scores(report)
    failed = len(report.failures)
    entries = f"of {report.num_entries:,} entries"
    tiles.append(_tile("failed", f"{failed:,}", entries, "bad" if failed else ""))
    return element("dl", {"class": "tiles"}, *tiles)


def _used(report: Report) -> Sequence[Head]:
    """The heads that made the boxes; without a ranking those of the samples, where they are the same in all."""
    if report.heads is not None:
        return report.heads.used
    sets = {card.heads for card in report.cards if card.heads}
    return sets.pop() if len(sets) == 1 else ()


def _scores(report: Report) -> list[Markup]:
    low, high = report.metrics.get("acc@0.5_interval") or (None, None)
    bounds = f"95 % interval {number(low, 2)} to {number(high, 2)}" if high is not None else ""
    names = {"acc@0.5": "Acc@0.5", "mean_iou": "mean IoU", "giou": "gIoU"}
    found = [
        _tile(label, number(report.metrics[name]), bounds if name == "acc@0.5" else "")
        for name, label in names.items()
        if isinstance(report.metrics.get(name), float)
    ]
    if not found and report.ious:
        mean = number(sum(report.ious) / len(report.ious))
        found.append(_tile("mean IoU", mean, f"over {len(report.ious):,} with a true box"))
    return found


def _tile(label: str, value: str, note: str = "", kind: str = "") -> Markup:
    more = element("span", {"class": "note"}, note) if note else None
    return element(
        "div", {"class": f"tile {kind}".strip()}, element("dt", None, label), element("dd", None, value, more)
    )


def _num_heads(facts: HeadFacts) -> int:
    return facts.shape[0] * facts.shape[1]


# ------------------------------------------------------------------------------------------------------- heads


def heads_section(report: Report) -> Markup:
    if report.heads is None:
        return section("heads", "Heads", element("p", {"class": "missing"}, plain(report.no_heads)))
    facts = report.heads
    ranking = facts.ranking
    grid = element(
        "div",
        {"class": "panel script", "id": "grid"},
        element("h3", None, "All heads, layer by layer"),
        element("div", {"class": "controls", "id": "grid-controls"}),
        element("div", {"class": "chart", "id": "grid-chart"}),
        element("p", {"class": "readout", "id": "grid-readout", "aria-live": "polite"}),
    )
    origin = f"{plain(facts.origin, 1000)} " if facts.origin else ""
    note = (
        f"{origin}{_method(ranking)} Averages over {_samples(ranking.num_samples)}. {_spread(ranking)}"
        f"{'' if facts.bottom_row is None else BOTTOM_ROW}"
    )
    table = element("div", {"class": "panel"}, element("h3", None, "Ranking"), _ranking_table(facts))
    columns = element("div", {"class": "columns"}, table, grid)
    return section(
        "heads", "Heads", columns, element("div", {"class": "columns"}, *_charts(report)), intro=note
    )


BOTTOM_ROW = (
    " Bottom row: the share of samples in which all cells of a map's lowest row are above its mean, "
    "a sign of a sink rather than of an object."
)


def _method(ranking: HeadRanking) -> str:
    """What the columns mean, for a reader who has not read the paper."""
    where = " in a sample" if ranking.options.per_sample else ""
    average = " on average" if ranking.options.per_sample else ""
    tau = "" if ranking.tau is None else f"τ = {number(ranking.tau)}{average}"
    kept = f"{where} if its attention sum on the image reaches {tau}" if tau else where
    return (
        f"Criterion 1 keeps a head{kept}. Criterion 2 marks, in every sample, the {ranking.top_n} kept heads "
        "whose maps are the most compact (lowest spatial entropy); the selection frequency is the share of samples "
        "that mark a head."
    )


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"


def _spread(ranking: HeadRanking) -> str:
    if ranking.num_trials == 1:
        return ""
    trials = "bootstrap resamples of them" if ranking.spread == "bootstrap" else "random draws"
    return f"Error bars: one standard deviation over {ranking.num_trials} {trials}."


def _charts(report: Report) -> list[Markup]:
    tau = "" if report.heads is None or report.heads.ranking.tau is None else " and the threshold τ"
    curve = element(
        "div",
        {"class": "panel script", "id": "curve"},
        element("h3", None, f"Criterion 1: attention sums{tau}"),
        element("div", {"class": "chart", "id": "curve-chart"}),
    )
    if report.no_scatter or report.heads is None:
        missing = element("p", {"class": "missing"}, report.no_scatter)
        title = element("h3", None, "Selection frequency and IoU")
        return [curve, element("div", {"class": "panel"}, title, missing)]
    return [curve, _scatter(report.heads)]


def _scatter(facts: HeadFacts) -> Markup:
    caption = (
        f"IoU of the box that a head's map makes alone, mean over {_samples(facts.iou_samples)}. "
        f"{_correlation(facts)}"
    )
    return element(
        "div",
        {"class": "panel script", "id": "scatter"},
        element("h3", None, "Selection frequency and IoU"),
        element("div", {"class": "chart", "id": "scatter-chart"}),
        element("p", {"class": "caption"}, caption),
    )


def _correlation(facts: HeadFacts) -> str:
    """The number with what it stands on: how many heads, and how often luck alone gives as much."""
    count = len(facts.scatter)
    heads = f"{count} head{'' if count == 1 else 's'}"
    found = facts.correlation
    if found is None:
        why = "they are too few" if count < FEWEST else "one of the two is the same for all"
        return f"No rank correlation over {heads}: {why}."
    rho, p = found
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"Spearman's rank correlation: {rho:.2f} over {heads} ({chance})."


COLUMNS = (
    ("rank", "#"), ("head", "head"), ("frequency", "selection frequency"), ("sum", "attention sum"),
    ("entropy", "spatial entropy"), ("bottom", "bottom row"), ("iou", "IoU"),
)  # fmt: skip


def _ranking_table(facts: HeadFacts) -> Markup:
    known = {"bottom": facts.bottom_row is not None, "iou": facts.iou is not None}
    columns = [(key, name) for key, name in COLUMNS if known.get(key, True)]
    heads = facts.ranking.kept[:MAX_ROWS]
    header = [element("th", {"scope": "col", "data-key": key}, name) for key, name in columns]
    rows = [
        _ranking_row(facts, rank, head, [key for key, _ in columns]) for rank, head in enumerate(heads, 1)
    ]
    body = element("tbody", None, *rows)
    table = element(
        "table",
        {"class": "ranking", "id": "ranking", "data-first": FIRST_ROWS},
        element("caption", {"class": "hidden"}, "Heads that criterion 1 keeps, best first"),
        element("thead", None, element("tr", None, *header)),
        body,
    )
    rest = len(facts.ranking.kept) - len(heads)
    where = "" if facts.origin else " in heads.csv"
    more = element("p", {"class": "caption"}, f"and {rest} more{where}") if rest else None
    return element("div", None, element("div", {"class": "scroll"}, table), more)


def _ranking_row(facts: HeadFacts, rank: int, head: RankedHead, keys: Sequence[str]) -> Markup:
    address = head.address
    frequency = f"{100 * head.selection_frequency:.1f} ± {100 * head.selection_frequency_std:.1f} %"
    bar = _bar(head.selection_frequency, head.selection_frequency_std)
    cells: dict[str, object] = {
        "rank": rank,
        "head": str(address),
        "frequency": join(bar, element("span", {"class": "figure"}, frequency)),
        "sum": number(head.attention_sum),
        "entropy": number(head.spatial_entropy),
    }
    values: dict[str, float | None] = {
        "rank": rank,
        "head": address.layer * facts.shape[1] + address.head,
        "frequency": head.selection_frequency,
        "sum": head.attention_sum,
        "entropy": head.spatial_entropy,
    }
    if facts.bottom_row is not None:
        values["bottom"] = float(facts.bottom_row[address])
        cells["bottom"] = f"{100 * facts.bottom_row[address]:.0f} %"
    if facts.iou is not None:
        values["iou"] = float(facts.iou[address])
        cells["iou"] = number(facts.iou[address])
    shown = [element("td", {"data-value": _plain_value(values[key])}, cells[key]) for key in keys]
    best = "best" if address in facts.used else None
    return element("tr", {"class": best, "data-layer": address.layer, "data-head": address.head}, *shown)


def _plain_value(value: float | None) -> str | None:
    return None if value is None or value != value else f"{value:.6g}"


def _bar(value: float, deviation: float) -> Markup:
    """A bar from 0 to 1 with its error bar, 100 wide; the numbers stand beside it."""
    x, low, high = 100 * value, 100 * max(0.0, value - deviation), 100 * min(1.0, value + deviation)
    parts = [
        element("rect", {"class": "bar-rail", "width": 100, "height": 10, "y": 2}),
        element("rect", {"class": "bar-value", "width": f"{x:.1f}", "height": 10, "y": 2}),
    ]
    if deviation > 0:
        path = f"M{low:.1f} 7H{high:.1f}M{low:.1f} 3.5V10.5M{high:.1f} 3.5V10.5"
        parts.append(element("path", {"class": "bar-error", "d": path}))
    view = {"class": "bar", "viewBox": "0 0 100 14", "preserveAspectRatio": "none", "aria-hidden": "true"}
    return element("svg", view, *parts)


# ----------------------------------------------------------------------------------------------------- the rest


CONTROLS = (
    "The controls tell an effect from luck: random heads of the same layers, the mean of all heads, "
    "a box in the middle, and the oracle, which is the truth on the model's own grid."
)


def metrics_section(report: Report) -> Markup | None:
    if not report.metrics:
        return None
    controls = CONTROLS if "controls" in report.metrics else ""
    intro = f"Named as in metrics.json; in brackets 95 % intervals. {controls}"
    return section("metrics", "Metrics", *metrics_tables(report.metrics), intro=intro)


def failures_section(report: Report) -> Markup:
    """How many, why, and which."""
    if not report.failures:
        return section("failures", "Failures", element("p", {"class": "missing"}, "No entry failed."))
    counts = Counter(_kind(bad.reason, bad.id) for bad in report.failures).most_common(MAX_ROWS)
    reasons = [[str(count), reason] for reason, count in counts]
    lines = [
        [str(bad.line or "-"), plain(bad.id or "-", 80), plain(bad.reason)]
        for bad in report.failures[:MAX_ROWS]
    ]
    rest = len(report.failures) - len(lines)
    more = element("p", {"class": "caption"}, f"and {rest:,} more in predictions.jsonl") if rest else None
    every = element(
        "details",
        {"open": len(lines) <= FIRST_ROWS},
        element("summary", None, "Every entry that failed"),
        table(("line", "id", "reason"), lines, "failures"),
        more,
    )
    by_reason = (
        table(("entries", "reason"), reasons, "reasons") if len(counts) < len(report.failures) else None
    )
    return section("failures", f"Failures: {len(report.failures):,}", by_reason, every)


def _kind(reason: str, id: str) -> str:
    """The reason without what differs from entry to entry: what stands before its last colon."""
    return plain(reason.rpartition(": ")[2] if ": " in reason else reason, 160)


def run_section(report: Report) -> Markup:
    """Enough to run it again."""
    options = element(
        "details",
        None,
        element("summary", None, f"All {len(report.options)} options"),
        _pairs(report.options),
    )
    return section("run", "The run", _pairs(report.facts), options)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    rows = [
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, plain(name, 80)),
            element("td", None, element("bdi", None, plain(value, 500))),
        )
        for name, value in pairs
    ]
    return element(
        "div", {"class": "scroll"}, element("table", {"class": "pairs"}, element("tbody", None, *rows))
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> Markup:
    """A plain table of texts."""
    top = element("tr", None, *(element("th", {"scope": "col"}, name) for name in header))
    body = [
        element("tr", None, *(element("td", None, element("bdi", None, cell)) for cell in row))
        for row in rows
    ]
    content = element("table", {"class": kind}, element("thead", None, top), element("tbody", None, *body))
    return element("div", {"class": "scroll"}, content)
