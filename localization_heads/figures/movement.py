"""The third criterion over the heads of a model: which follow the expression, and which rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localization_heads.figures.charts import COLUMN, MAX_NAMES, span
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, GREY, ORANGE, VERMILLION, paper_style
from localization_heads.figures.svg import tell
from localization_heads.heads.head import Head
from localization_heads.heads.record import RankedHead, resting
from localization_heads.heads.sensitivity import RESTING

if TYPE_CHECKING:
    from localization_heads.heads.ranking import HeadRanking


def plot_sensitivity(ranking: HeadRanking, path: str | Path | None = None, *, emphasised: int = 3) -> Figure:
    """A point for each head that criterion 1 keeps: how much it looks at the image, and how far its map moves.

    The shaded corner is that of heads that rest: at least average attention, and little movement.

    Args:
        emphasised: how many of the first heads are the localization heads, which are named; so are ten that rest.
    """
    known = [(head, head.movement) for head in ranking.kept if head.movement is not None]
    movement = {head.address: float(value) for head, value in known if value is not None}
    heads = [head for head, _ in known]
    rest = resting(ranking)
    first = [head for head in heads if head in ranking.kept[:emphasised]]
    groups = {
        "kept by criterion 1": [head for head in heads if head not in rest and head not in first],
        "resting": [head for head in rest if head not in first],
        "localization heads": first,
    }
    looks: dict[str, dict[str, Any]] = {
        "kept by criterion 1": {"s": 14, "color": BLUE},
        "resting": {"s": 22, "marker": "s", "facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.4},
        "localization heads": {"s": 24, "marker": "D", "color": VERMILLION, "zorder": 3},
    }
    with paper_style():
        figure = new_figure(COLUMN, 2.7)
        axes = figure.add_subplot()
        for name, group in groups.items():
            across = [head.attention_sum for head in group]
            marks = axes.scatter(
                across, [movement[head.address] for head in group], label=name, clip_on=False, **looks[name]
            )
            tell(marks, [f"{head.address}: S = {head.attention_sum:.3f}, movement {movement[head.address]:.3f}"
                         for head in group])  # fmt: skip
        axes.set_xlabel("Average attention sum S")
        axes.set_ylabel("Movement with the expression")
        if heads:
            axes.set_xlim(*span([0.0, *(head.attention_sum for head in heads)]))
            axes.set_ylim(*_limits(list(movement.values())))
            _shade(axes, fmean(head.attention_sum for head in ranking.kept), RESTING * max(movement.values()))
        _name(axes, [*first, *groups["resting"][:MAX_NAMES]], movement)
        found = f"{len(rest)} of {len(heads)} kept heads rest" if rest else "no head rests"
        axes.set_title(found, loc="left", color="0.25")
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handletextpad=0.1, columnspacing=0.8)
        return save(figure, path)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(*values, 0.0) or 1.0
    return low - 0.03 * (high - low), high + 0.06 * (high - low)


def _shade(axes: Axes, least_sum: float, limit: float) -> None:
    (_, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([least_sum, right], bottom, limit, color=GREY, alpha=0.15, linewidth=0, zorder=0)


def _name(axes: Axes, heads: Sequence[RankedHead], movement: Mapping[Head, float]) -> None:
    """Names in a column right of the axes, each led to its point."""
    (bottom, top), height, step = axes.get_ylim(), 1.0, 0.075
    for head in sorted(heads, key=lambda head: -movement[head.address]):
        place = movement[head.address]
        height = min(height, (place - bottom) / (top - bottom))
        axes.annotate(
            str(head.address),
            (head.attention_sum, place),
            xytext=(1.03, max(height, 0.0)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
        )
        height -= step
