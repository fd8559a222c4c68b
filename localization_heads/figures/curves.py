"""The charts of ablations (`stage=ablate`), of labels (`stage=find heads_by=`) and of confidence (`stage=evaluate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from localization_heads.figures.rendering import tell
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREEN, GREY, VERMILLION, paper_style

_LINES = {
    "heads": ("heads of the list", VERMILLION, "o"),
    "random": ("random, of the same layers", GREY, "s"),
    "attention_sum": ("of highest attention sum", BLUE, "^"),
}
_PANELS = 3
"""At most; `ablation.json` has all."""


def plot_ablation(numbers: Mapping[str, Any], what: str, path: str | Path | None = None) -> Figure:
    """A panel a measure, the main one first: means with 95 % intervals; dashed, the model as it is.
    Dotted, of the other heads' maps: the same heads' maps in the model as it is.

    Args:
        numbers: of `ablation.json`.
        what: is done to the heads.
    """
    shown = list(numbers["measures"].items())[:_PANELS]
    with paper_style():
        figure = new_figure(max(3.4, 2.6 * len(shown)), 2.8)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (name, found) in zip(panels, shown, strict=True):
            _panel(axes, name, found, what)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
        return save(figure, path)


def _panel(axes: Axes, name: str, found: Mapping[str, Any], what: str) -> None:
    places = np.arange(len(found["counts"]))
    for step, (kind, (label, colour, marker)) in enumerate(_LINES.items()):
        means = 100 * np.array(found["curves"][kind], dtype=np.float64)
        low, high = 100 * np.array(found["intervals"][kind], dtype=np.float64).T
        x = places + 0.08 * (step - 1)  # intervals side by side
        axes.vlines(x, low, high, color=colour, linewidth=1)
        (line,) = axes.plot(x, means, color=colour, marker=marker, markersize=3.5, label=label)
        before = means + 100 * np.array(found["falls"][kind], dtype=np.float64)
        if np.ptp(before) > 0.05:  # of the other heads' maps, in the model as it is
            axes.plot(x, before, color=colour, linewidth=0.9, linestyle=":")
        said = zip(found["counts"], means, low, high, strict=True)
        tell(line, [f"{label}, {n}: {mean:.1f} % [{a:.1f}, {b:.1f}]" for n, mean, a, b in said])
    axes.axhline(100 * found["curves"]["heads"][0], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(places, [str(count) for count in found["counts"]])
    axes.set_ylim(0, 103)
    axes.set_xlabel(f"Heads {what}")
    axes.set_title(f"{name[0].upper()}{name[1:]} (%)", loc="left", fontsize=7.5)
    axes.grid(color="0.92", linewidth=0.6, axis="y", zorder=0)
    axes.set_axisbelow(True)


def plot_label_curve(labels: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Quality on entries not drawn, mean and standard deviation over draws; lines for the rankings without choice.

    Args:
        labels: the content of labels.json.
    """
    curve, plain = labels["curve"], labels["curve_without_shrinkage"]
    with paper_style():
        figure = new_figure(3.6, 2.6)
        axes = figure.add_subplot()
        for name, label, colour, dash in (
            ("all_labels", "all labels", GREEN, ":"),
            ("label_free", "without labels", VERMILLION, "--"),
            ("all_heads", "all heads", GREY, "-."),
        ):
            axes.axhline(labels[name], color=colour, linestyle=dash, linewidth=1, label=label, zorder=1)
        if plain is not None:
            _draw_curve(axes, plain, "0.45", "labels alone")
        _draw_curve(axes, curve, BLUE, "labels" if plain is None else f"labels, {labels['shrink']} shrunk")
        counts = curve["counts"]
        axes.set_xscale("log")
        if counts:
            axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
        axes.xaxis.set_major_locator(FixedLocator(counts or [1]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0, None)
        axes.set_xlabel("Number of labels")
        axes.set_ylabel(_WHAT["vrh" if labels["heads_by"] == "vrh" else "mass"])
        axes.set_title(f"Heads by {labels['heads_by']}, ± s.d. over {labels['num_trials']} draws", loc="left")
        axes.grid(axis="y", color="0.92", linewidth=0.6, zorder=0)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
        return save(figure, path)


_WHAT = {"mass": "Attention mass in the truth", "vrh": "Box tokens' attention on the truth"}


def _draw_curve(axes: Axes, curve: Mapping[str, Any], colour: str, label: str) -> None:
    mean, std = np.array(curve["mean"]), np.array(curve["std"])
    axes.fill_between(curve["counts"], mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve["counts"], mean, color=colour, marker="o", markersize=3.5, label=label, zorder=3)


_LARGEST, _SMALLEST = 70.0, 10.0  # points squared: the marks of the fullest bin and of an all but empty one


def plot_confidence(trust: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Left, the share of right boxes in each bin of confidence, against the diagonal; right, the risk at each coverage.

    Args:
        trust: the block `confidence` of metrics.json.
    """
    with paper_style():
        figure = new_figure(6.4, 3.0)
        left, right = figure.subplots(1, 2)
        _reliability(left, trust["reliability"], trust)
        _risk(right, trust["risk_coverage"], trust)
        return save(figure, path)


def _reliability(axes: Axes, bins: Sequence[Sequence[float]], trust: Mapping[str, Any]) -> None:
    """Marks grow with the number of answers in their bin."""
    mean, share, count = np.array(bins, dtype=np.float64).reshape(-1, 3).T
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.vlines(
        mean, np.minimum(mean, share), np.maximum(mean, share), color=VERMILLION, linewidth=1, zorder=2
    )
    axes.plot(mean, share, color=BLUE, linewidth=1, zorder=3)
    size = np.clip(_LARGEST * count / max(count.max(initial=1), 1), _SMALLEST, None)
    marks = axes.scatter(mean, share, s=size, color=BLUE, zorder=4, clip_on=False)
    said = zip(mean, share, count, strict=True)
    tell(marks, [f"confidence {m:.2f}: {s:.2f} right of {int(n)}" for m, s, n in said])
    raw = "" if trust["calibrated"] else " (uncalibrated)"
    axes.set_xlabel(f"Confidence{raw}\n(dashed: calibrated)")
    axes.set_ylabel("Share of right boxes")
    axes.set_title(_said("calibration error", trust, "ece"), loc="left")
    _unit(axes)


def _risk(axes: Axes, points: Sequence[Sequence[float]], trust: Mapping[str, Any]) -> None:
    coverage, risk = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.fill_between(coverage, risk, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(coverage, risk, color=BLUE, clip_on=False)
    said = ""
    if risk.size:
        axes.plot([0, 1], [risk[-1]] * 2, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        said = f"\n(dashed: if confidence said nothing, {risk[-1]:.2f})"
    axes.set_xlabel(f"Coverage: share of answers given, surest first{said}")
    axes.set_ylabel("Risk: share of wrong boxes")
    axes.set_title(_said("area (AURC)", trust, "aurc"), loc="left")
    _unit(axes)
    axes.set_ylim(0, min(1.0, max(float(risk.max(initial=0)) * 1.3, 0.1)))


def _said(label: str, trust: Mapping[str, Any], name: str) -> str:
    if trust.get(name) is None:
        return label
    low, high = trust.get(f"{name}_interval") or (None, None)
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{label} {trust[name]:.3f}{bounds}"


def _unit(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(color="0.92", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
