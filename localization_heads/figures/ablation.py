"""The curves of `stage=ablate`: what is measured against the number of heads that are switched off, or steered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREY, VERMILLION, paper_style
from localization_heads.figures.svg import tell

LINES = {
    "heads": ("heads of the list", VERMILLION, "o"),
    "random": ("random, of the same layers", GREY, "s"),
    "attention_sum": ("of highest attention sum", BLUE, "^"),
}
PANELS = 3
"""At most; `ablation.json` has all."""


def plot_ablation(numbers: Mapping[str, Any], what: str, path: str | Path | None = None) -> Figure:
    """A panel a measure, the main one first: means with 95 % intervals; dashed, the model as it is.
    Dotted, of the other heads' maps: the same heads' maps in the model as it is.

    Args:
        numbers: of `ablation.json`.
        what: is done to the heads.
    """
    shown = list(numbers["measures"].items())[:PANELS]
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
    for step, (kind, (label, colour, marker)) in enumerate(LINES.items()):
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
