"""Charts of ablations (`stage=ablate`), of the number of labels (`heads_by=`) and of confidence (`stage=evaluate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from localization_heads.figures.rendering import set_tooltips
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREEN, GREY, VERMILLION, paper_style

_ABLATION_LINES = {
    "heads": ("heads of the list", VERMILLION, "o"),
    "random": ("random, of the same layers", GREY, "s"),
    "attention_sum": ("of highest attention sum", BLUE, "^"),
}
_MAX_PANELS = 3
"""Measures that are drawn; `ablation.json` has all."""
_QUALITY_LABELS = {"mass": "Attention mass in the truth", "vrh": "Box tokens' attention on the truth"}
_MAX_MARK_AREA, _MIN_MARK_AREA = 70.0, 10.0  # points squared, of the fullest and of an almost empty bin


def plot_ablation(numbers: Mapping[str, Any], change: str, path: str | Path | None = None) -> Figure:
    """Each measure by the number of changed heads, in a panel per measure, the main one first.

    Means with 95 % intervals; the unchanged model is dashed. For measures of the other heads' maps, those of the same
    maps in the unchanged model are dotted.

    Args:
        numbers: the content of `ablation.json`.
        change: what was done to the heads, such as `switched off`.
    """
    measures = list(numbers["measures"].items())[:_MAX_PANELS]
    with paper_style():
        figure = new_figure(max(3.4, 2.6 * len(measures)), 2.8)
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (label, curves) in zip(panels, measures, strict=True):
            _draw_ablation(axes, label, curves, change)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
        return save(figure, path)


def _draw_ablation(axes: Axes, measure: str, curves: Mapping[str, Any], change: str) -> None:
    places = np.arange(len(curves["counts"]))
    for index, (kind, (label, colour, marker)) in enumerate(_ABLATION_LINES.items()):
        means = 100 * np.array(curves["curves"][kind], dtype=np.float64)
        low, high = 100 * np.array(curves["intervals"][kind], dtype=np.float64).T
        x = places + 0.08 * (index - 1)  # so that intervals do not overlap
        axes.vlines(x, low, high, color=colour, linewidth=1)
        (line,) = axes.plot(x, means, color=colour, marker=marker, markersize=3.5, label=label)
        before = means + 100 * np.array(curves["falls"][kind], dtype=np.float64)
        if np.ptp(before) > 0.05:  # a measure of maps, whose baseline varies
            axes.plot(x, before, color=colour, linewidth=0.9, linestyle=":")
        points = zip(curves["counts"], means, low, high, strict=True)
        set_tooltips(line, [f"{label}, {n}: {mean:.1f} % [{a:.1f}, {b:.1f}]" for n, mean, a, b in points])
    axes.axhline(100 * curves["curves"]["heads"][0], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(places, [str(count) for count in curves["counts"]])
    axes.set_ylim(0, 103)
    axes.set_xlabel(f"Heads {change}")
    axes.set_title(f"{measure[0].upper()}{measure[1:]} (%)", loc="left", fontsize=7.5)
    axes.grid(color="0.92", linewidth=0.6, axis="y", zorder=0)
    axes.set_axisbelow(True)


def plot_label_curve(labels: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """The quality of the ranking on held-out entries by the number of labels: mean and standard deviation over draws.

    Horizontal lines show the rankings by all labels and without labels, and all heads.

    Args:
        labels: the content of labels.json.
    """
    curve, unshrunk = labels["curve"], labels["curve_without_shrinkage"]
    with paper_style():
        figure = new_figure(3.6, 2.6)
        axes = figure.add_subplot()
        for name, label, colour, dash in (
            ("all_labels", "all labels", GREEN, ":"),
            ("label_free", "without labels", VERMILLION, "--"),
            ("all_heads", "all heads", GREY, "-."),
        ):
            axes.axhline(labels[name], color=colour, linestyle=dash, linewidth=1, label=label, zorder=1)
        if unshrunk is not None:
            _draw_label_curve(axes, unshrunk, "0.45", "labels alone")
        _draw_label_curve(axes, curve, BLUE, "labels" if unshrunk is None else f"labels, {labels['shrink']} shrunk")
        counts = curve["counts"]
        axes.set_xscale("log")
        if counts:
            axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
        axes.xaxis.set_major_locator(FixedLocator(counts or [1]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0, None)
        axes.set_xlabel("Number of labels")
        axes.set_ylabel(_QUALITY_LABELS["vrh" if labels["heads_by"] == "vrh" else "mass"])
        axes.set_title(f"Heads by {labels['heads_by']}, ± s.d. over {labels['num_trials']} draws", loc="left")
        axes.grid(axis="y", color="0.92", linewidth=0.6, zorder=0)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
        return save(figure, path)


def _draw_label_curve(axes: Axes, curve: Mapping[str, Any], colour: str, label: str) -> None:
    mean, std = np.array(curve["mean"]), np.array(curve["std"])
    axes.fill_between(curve["counts"], mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve["counts"], mean, color=colour, marker="o", markersize=3.5, label=label, zorder=3)


def plot_confidence(trust: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """The reliability diagram (left) and the risk-coverage curve (right).

    Args:
        trust: the block `confidence` of metrics.json.
    """
    with paper_style():
        figure = new_figure(6.4, 3.0)
        left, right = figure.subplots(1, 2)
        _draw_reliability(left, trust["reliability"], trust)
        _draw_risk(right, trust["risk_coverage"], trust)
        return save(figure, path)


def _draw_reliability(axes: Axes, bins: Sequence[Sequence[float]], trust: Mapping[str, Any]) -> None:
    """The share of right boxes in each bin of confidence; marks grow with the number of answers in the bin."""
    mean, share, count = np.array(bins, dtype=np.float64).reshape(-1, 3).T
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.vlines(mean, np.minimum(mean, share), np.maximum(mean, share), color=VERMILLION, linewidth=1, zorder=2)
    axes.plot(mean, share, color=BLUE, linewidth=1, zorder=3)
    size = np.clip(_MAX_MARK_AREA * count / max(count.max(initial=1), 1), _MIN_MARK_AREA, None)
    marks = axes.scatter(mean, share, s=size, color=BLUE, zorder=4, clip_on=False)
    points = zip(mean, share, count, strict=True)
    set_tooltips(marks, [f"confidence {m:.2f}: {s:.2f} right of {int(n)}" for m, s, n in points])
    raw = "" if trust["calibrated"] else " (uncalibrated)"
    axes.set_xlabel(f"Confidence{raw}\n(dashed: calibrated)")
    axes.set_ylabel("Share of right boxes")
    axes.set_title(_metric_text("calibration error", trust, "ece"), loc="left")
    _unit_axes(axes)


def _draw_risk(axes: Axes, points: Sequence[Sequence[float]], trust: Mapping[str, Any]) -> None:
    """The share of wrong boxes among the surest answers, at each share of answers."""
    coverage, risk = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.fill_between(coverage, risk, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(coverage, risk, color=BLUE, clip_on=False)
    baseline = ""
    if risk.size:
        axes.plot([0, 1], [risk[-1]] * 2, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        baseline = f"\n(dashed: if confidence said nothing, {risk[-1]:.2f})"
    axes.set_xlabel(f"Coverage: share of answers given, surest first{baseline}")
    axes.set_ylabel("Risk: share of wrong boxes")
    axes.set_title(_metric_text("area (AURC)", trust, "aurc"), loc="left")
    _unit_axes(axes)
    axes.set_ylim(0, min(1.0, max(float(risk.max(initial=0)) * 1.3, 0.1)))


def _metric_text(label: str, trust: Mapping[str, Any], name: str) -> str:
    """`label 0.123 [0.100, 0.150]`, as far as the metric and its interval are known."""
    if trust.get(name) is None:
        return label
    low, high = trust.get(f"{name}_interval") or (None, None)
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{label} {trust[name]:.3f}{bounds}"


def _unit_axes(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(color="0.92", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
