"""How far the confidences of an evaluation can be trusted: reliability diagram and risk-coverage curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREY, VERMILLION, paper_style
from localization_heads.figures.svg import tell

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
