"""How many labels it takes to find heads: the quality of the first heads against the number of labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREEN, GREY, VERMILLION, paper_style


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
            _draw(axes, plain, "0.45", "labels alone")
        _draw(axes, curve, BLUE, "labels" if plain is None else f"labels, {labels['shrink']} shrunk")
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


def _draw(axes: Axes, curve: Mapping[str, Any], colour: str, label: str) -> None:
    mean, std = np.array(curve["mean"]), np.array(curve["std"])
    axes.fill_between(curve["counts"], mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve["counts"], mean, color=colour, marker="o", markersize=3.5, label=label, zorder=3)
