"""The figures of the experiments, in the paper's layout (Fig. 3, 6, 13 and 14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from localization_heads.experiments.paper import format_p_value, two_decimals
from localization_heads.figures.charts import (
    COLUMN_WIDTH,
    MAX_NAMES,
    axis_limits,
    name_points,
    plot_attention_sums,
    plot_selection_frequency,
)
from localization_heads.figures.rendering import set_tooltips
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREY, VERMILLION, paper_style
from localization_heads.heads.head import Head

if TYPE_CHECKING:
    from localization_heads.experiments.paper import Finding
    from localization_heads.experiments.study import Study


def plot_experiment(study: Study, finding: Finding, path: str | Path | None = None) -> Figure | None:
    """The figure of an experiment; None for the experiments that only have tables."""
    draw = _FIGURES.get(finding.name)
    return draw(study, finding.numbers, path) if draw else None


def plot_fig3(study: Study, numbers: Mapping[str, Any], path: str | Path | None) -> Figure:
    ranking = study.ranking
    sums, kept = np.zeros(study.shape), np.zeros(study.shape, dtype=bool)
    for head in ranking.heads:
        sums[head.address], kept[head.address] = head.attention_sum, head.kept
    exclude = ranking.exclude_layers
    return plot_attention_sums(sums, ranking.tau, path, kept=kept, top=study.top(), exclude_layers=exclude)


def plot_fig6a(study: Study, numbers: Mapping[str, Any], path: str | Path | None) -> Figure:
    return plot_selection_frequency(study.ranking, path, emphasised=study.options.k)


def plot_fig6b(study: Study, numbers: Mapping[str, Any], path: str | Path | None) -> Figure:
    return plot_frequency_iou(
        [(Head(*point["head"]), point["frequency"], point["iou"]) for point in numbers["points"]],
        path,
        least_frequency=numbers["min_frequency"],
        top=[Head(*head) for head in numbers["top"]],
        title=_correlation_title(numbers.get("selected"), numbers["num_selected"]),
    )


def plot_frequency_iou(
    points: Sequence[tuple[Head, float, float]],
    path: str | Path | None = None,
    *,
    least_frequency: float,
    top: Sequence[Head] = (),
    title: str = "",
) -> Figure:
    """Fig. 6b: the selection frequency and the mean IoU of each head's own map.

    Args:
        points: head, selection frequency and mean IoU, both from 0 to 1.
        least_frequency: heads selected less often do not enter the correlation, and are drawn hollow.
        top: the localization heads, which are named (at most ten).
    """
    groups: dict[str, list[tuple[Head, float, float]]] = {name: [] for name in _FREQUENCY_MARKERS}
    for head, frequency, iou in points:
        kind = "localization heads" if head in top else "selected"
        groups[kind if frequency >= least_frequency else "hardly ever selected"].append((head, frequency, iou))
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 2.7)
        axes = figure.add_subplot()
        for name, group in groups.items():
            frequencies, ious = 100 * np.array([point[1:] for point in group], dtype=float).reshape(-1, 2).T
            marks = axes.scatter(frequencies, ious, label=name, clip_on=False, **_FREQUENCY_MARKERS[name])
            set_tooltips(marks, [f"{head}: selected {100 * f:.1f} %, IoU {100 * iou:.1f} %" for head, f, iou in group])
        axes.set_xlabel("Selection frequency (%)")
        axes.set_ylabel("Mean IoU of the head's map (%)")
        low, high = axis_limits([100 * point[1] for point in points])
        axes.set_xlim(low - 0.04 * (high - low), high)  # keeps the many points at 0 off the axis
        axes.set_ylim(*axis_limits([100 * point[2] for point in points]))
        named = [(head, 100 * f, 100 * iou) for head, f, iou in points if head in top]
        name_points(axes, sorted(named, key=lambda point: -point[2])[:MAX_NAMES])
        axes.set_title(title, loc="left", color="0.25")
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handletextpad=0.1, columnspacing=0.8)
        return save(figure, path)


_FREQUENCY_MARKERS: dict[str, dict[str, Any]] = {
    "hardly ever selected": {"s": 14, "facecolors": "none", "edgecolors": GREY},
    "selected": {"s": 14, "color": BLUE},
    "localization heads": {"s": 24, "marker": "D", "color": VERMILLION, "zorder": 3},
}


def _correlation_title(correlation: Mapping[str, float] | None, count: int) -> str:
    if correlation is None:
        return f"{count} heads: too few for a correlation"
    rho = f"\N{GREEK SMALL LETTER RHO} = {two_decimals(correlation['rho'])}"
    return f"Spearman's {rho}, {format_p_value(correlation['p'])}, {count} heads"


def plot_sweep(study: Study, numbers: Mapping[str, Any], path: str | Path | None, label: str) -> Figure:
    """Fig. 13 and 14: the first heads at each value (above), and their accuracy (below)."""
    points = numbers["points"]
    values = [point["value"] for point in points]
    default = [tuple(head) for head in numbers["default_top"]]
    others = sorted({tuple(head) for point in points for head in point["top"]} - set(default))
    rows = {head: row for row, head in enumerate([*default, *others])}
    place = range(len(values))
    with paper_style():
        figure = new_figure(max(COLUMN_WIDTH, 0.9 + 0.3 * len(values)), 1.7 + 0.17 * len(rows))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(1.0, 0.17 * len(rows)), 1.0])
        for x, point in zip(place, points, strict=True):
            for rank, head in enumerate(map(tuple, point["top"]), start=1):
                colour = BLUE if head in default else GREY
                above.scatter([x], [rows[head]], s=70, color=colour, zorder=2)
                above.text(x, rows[head], str(rank), color="white", ha="center", va="center", fontsize=6.5)
        above.set_yticks(list(rows.values()), [str(Head(*head)) for head in rows])
        above.set_ylim(len(rows) - 0.4, -0.6)
        above.grid(axis="y", color="0.92", linewidth=0.6, zorder=0)
        above.set_title("heads that come first, by rank", loc="left", color="0.25")
        accuracy = [np.nan if point["acc@0.5"] is None else 100 * point["acc@0.5"] for point in points]
        below.plot(place, accuracy, "o-", color=BLUE, markersize=4)
        below.set_ylabel("Acc@0.5 (%)")
        below.set_ylim(0, max(1.0, float(np.nanmax([*accuracy, 0])) * 1.25))
        below.set_xticks(list(place), [_tick_label(value) for value in values])
        below.set_xlim(-0.5, len(values) - 0.5)
        below.set_xlabel(label)
        if numbers["default"] in values:
            for axes in (above, below):
                axes.axvline(
                    values.index(numbers["default"]),
                    color=VERMILLION,
                    linewidth=0.9,
                    linestyle="--",
                    zorder=1,
                )
        return save(figure, path)


def _tick_label(value: float) -> str:
    """Counts without decimals, thresholds with two or, if they are small, three."""
    return f"{value:g}" if value == int(value) else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def plot_random(study: Study, numbers: Mapping[str, Any], path: str | Path | None) -> Figure:
    """The localization heads and every random set from the same layers, for each measure."""
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 1.0 + 0.4 * len(numbers))
        axes = figure.add_subplot()
        for row, result in enumerate(numbers.values()):
            sets = 100 * np.array(result["sets"])
            axes.scatter(sets, np.full(len(sets), row), s=14, color=GREY, alpha=0.55, linewidths=0)
            axes.plot([sets.mean()] * 2, [row - 0.2, row + 0.2], color="0.3", linewidth=1.2)
            axes.scatter([100 * result["found"]], [row], s=34, marker="D", color=VERMILLION, zorder=3)
        axes.scatter([], [], s=34, marker="D", color=VERMILLION, label="heads found")
        axes.scatter([], [], s=14, color=GREY, label="a random set")
        axes.plot([], [], color="0.3", linewidth=1.2, label="their mean")
        axes.set_yticks(range(len(numbers)), list(numbers))
        axes.set_ylim(len(numbers) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        axes.grid(axis="x", color="0.92", linewidth=0.6, zorder=0)
        figure.legend(loc="outside upper left", ncols=3, fontsize=7, handletextpad=0.2, columnspacing=0.9)
        return save(figure, path)


_FIGURES: dict[str, Callable[[Study, Mapping[str, Any], str | Path | None], Figure]] = {
    "fig3": plot_fig3,
    "fig6a": plot_fig6a,
    "fig6b": plot_fig6b,
    "random": plot_random,
    "fig13": partial(plot_sweep, label="Threshold τ of the attention sum"),
    "fig14": partial(plot_sweep, label="N, heads marked in each sample"),
}
