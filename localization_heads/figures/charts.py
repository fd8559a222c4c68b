"""Figures of a whole model: its heads under the criteria (Fig. 3, Fig. 6a; sensitivity), and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from localization_heads.figures.overlay import draw_box
from localization_heads.figures.rendering import tell
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, COLOUR_MAP, GREY, ORANGE, VERMILLION, paper_style
from localization_heads.heads.head import Head
from localization_heads.heads.record import resting_heads
from localization_heads.heads.sensitivity import RESTING_SHARE

if TYPE_CHECKING:
    from localization_heads.heads.record import HeadRanking


COLUMN = 3.4  # inches: a column of a two-column page
MAX_NAMES = 10  # more names than this do not fit beside a chart
_MOST_DRAWN_CELLS = 2048  # of a grid; more are drawn as one image, without tooltips


def plot_attention_sums(
    sums: NDArray[np.floating],
    tau: float | None,
    path: str | Path | None = None,
    *,
    kept: NDArray[np.bool_] | None = None,
    top: Sequence[Head] = (),
    exclude_layers: int = 2,
) -> Figure:
    """Fig. 3: the heads in ascending order of average attention sum, the elbow, and the heads kept above it.

    Args:
        sums: `[layer, head]`, average attention sum `S` of every head; NaN where it is not known: not drawn.
        tau: the threshold, as criterion 1 chose it or as the user set it; none where the rule has none.
        kept: `[layer, head]`, the heads criterion 1 keeps; by default those with `S >= tau`, or none.
        top: heads to mark and name, best first (ten names at most).
        exclude_layers: the first layers, which are not considered and not drawn.
    """
    known = [Head(layer, head) for layer, head in np.argwhere(np.isfinite(sums)).tolist()]
    considered = [head for head in known if head.layer >= exclude_layers]
    considered.sort(key=lambda head: sums[head])
    curve = np.array([sums[head] for head in considered])  # [head], ascending
    if kept is None:
        kept = sums >= (np.inf if tau is None else tau)
    is_kept = np.array([bool(kept[head]) for head in considered], dtype=bool)
    with paper_style():
        figure = new_figure(COLUMN, 2.5)
        axes = figure.add_subplot()
        place = np.arange(1, len(curve) + 1)
        axes.plot(place, curve, color=GREY, zorder=2)
        said = np.array([f"{head}: S = {sums[head]:.3f}" for head in considered], dtype=object)
        for chosen, colour, size, rim in ((~is_kept, GREY, 4, 0), (is_kept, BLUE, 5, 1.5)):
            dots = axes.scatter(
                place[chosen], curve[chosen], s=size, color=colour, linewidths=rim, zorder=3, clip_on=False
            )
            tell(dots, said[chosen])
        which = f"Heads of layers {exclude_layers} and up" if exclude_layers else "Heads"
        axes.set_xlabel(f"{which}, in ascending order")
        axes.set_ylabel("Average attention sum S")
        if len(curve):
            axes.plot(place[[0, -1]], curve[[0, -1]], color=GREY, linewidth=0.6, linestyle=":", zorder=1)
            axes.set_xlim(0, len(curve) * 1.03 + 0.5)
            axes.set_ylim(*span(curve if tau is None else [*curve, tau]))
            axes.set_title(f"{is_kept.sum()} of {len(curve)} heads kept", loc="left", color=BLUE)
            if tau is not None:
                _mark_elbow(axes, curve, tau)
            marks = [(h, considered.index(h) + 1, float(sums[h])) for h in top if h in considered]
            _name_heads(axes, marks, curve, tau)
        return save(figure, path)


def span(values: Sequence[float] | NDArray[np.floating]) -> tuple[float, float]:
    """Limits of an axis: from 0, unless all that is drawn lies in the upper half of that."""
    low, high = float(np.min(values, initial=np.inf)), float(np.max(values, initial=0))
    if low > 0.5 * high and low < high:
        return low - 0.06 * (high - low), high + 0.06 * (high - low)
    return 0.0, high * 1.06 or 1.0


def _mark_elbow(axes: Axes, curve: NDArray[np.floating], tau: float) -> None:
    """Mark where the ascending curve reaches tau, shade what lies above, and write its value."""
    below = np.searchsorted(curve, tau)
    axes.axvspan(below + 0.5, axes.get_xlim()[1], color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(tau, color=VERMILLION, linewidth=0.9, linestyle="--", zorder=2)
    crossing = np.interp(tau, curve, np.arange(1, len(curve) + 1))
    axes.plot([crossing], [tau], "o", color="white", mec=VERMILLION, mew=1.4, markersize=6, zorder=5)
    bottom, top = axes.get_ylim()
    early = bool(curve[0] < tau and crossing < 0.35 * axes.get_xlim()[1])  # the curve rises on the left
    low = tau > bottom + (0.1 if early else 0.6) * (top - bottom)
    axes.annotate(
        f"τ = {tau:.2f}" if tau >= 0.1 else f"τ = {tau:.2g}",
        (0.98 if early else 0.02, tau),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3 if low else 3),
        textcoords="offset points",
        color=VERMILLION,
        ha="right" if early else "left",
        va="top" if low else "bottom",
        path_effects=[withStroke(linewidth=2, foreground="white")],
        zorder=5,
    )


def _name_heads(
    axes: Axes, marks: list[tuple[Head, int, float]], curve: NDArray[np.floating], tau: float | None
) -> None:
    """Mark heads (head, place, sum) on the curve; their names stand in a column on its hollow side.

    That is above a curve that sags below its chord and below one that bulges above it: a line from there to
    the curve does not cross it. The names closest to the corner have the farthest
    marks, so that no line crosses another. The line of tau passes between names.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    sags = np.mean((curve - bottom) / (top - bottom)) < 0.5
    height, step = (0.95, -0.08) if sags else (0.05, 0.08)
    if tau is not None:  # less than a step further on, so that its line passes between names
        off = (tau - bottom) / (top - bottom) - height - step * np.arange(min(len(marks), MAX_NAMES))
        further = (step * part / 16 for part in range(12 if sags else 9))  # above, the curve is near
        height += max(further, key=lambda one: min(np.abs(off - one).min(initial=1), abs(step) / 2))
    rim = withStroke(linewidth=2, foreground="white")  # over the lines it crosses

    def across(mark: tuple[Head, int, float]) -> float:
        """How far right of the column, which is in the middle, a mark is, in widths of the axes."""
        return (mark[1] - left) / (right - left) - 0.5

    for one in sorted(marks[:MAX_NAMES], key=lambda mark: -abs(across(mark))):
        head, place, value = one
        (mark,) = axes.plot(
            [place], [value], "D", color=VERMILLION, mec="white", mew=0.6, markersize=5, zorder=6
        )
        tell(mark, [f"{head}: S = {value:.3f}"])
        axes.annotate(
            str(head),
            (place, value),
            xytext=(0.5, height),
            textcoords="axes fraction",
            ha="center",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.4",
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (float(across(one) > 0), 0.5),
            },
            zorder=4,
            path_effects=[rim],
        )
        height += step


def plot_selection_frequency(
    ranking: HeadRanking, path: str | Path | None = None, *, top: int = 15, emphasised: int = 3
) -> Figure:
    """Fig. 6a: the selection frequency of the first `top` heads, with its standard deviation over the trials.

    Args:
        emphasised: how many of them are the localization heads.
    """
    heads = [head for head in ranking.heads if head.layer >= ranking.exclude_layers][:top]
    frequency = 100 * np.array([head.selection_frequency for head in heads])
    deviation = 100 * np.array([head.selection_frequency_std for head in heads])
    reach = np.array(
        [np.minimum(deviation, frequency), np.minimum(deviation, 100 - frequency)]
    )  # it is a share
    with paper_style():
        figure = new_figure(max(COLUMN, 0.9 + 0.17 * len(heads)), 2.4)
        axes = figure.add_subplot()
        place = np.arange(len(heads))
        colours = [BLUE if i < emphasised else "#A9C4DA" for i in place]
        axes.bar(place, frequency, width=0.75, color=colours, zorder=2)
        if ranking.num_trials > 1:
            axes.errorbar(
                place, frequency, reach, fmt="none", ecolor="0.15", elinewidth=0.9, capsize=2, zorder=3
            )
        axes.set_xticks(place, [str(Head(h.layer, h.head)) for h in heads], rotation=60, ha="right")
        axes.tick_params(axis="x", length=0, pad=1)
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
        for label in axes.get_xticklabels()[:emphasised]:
            label.set_fontweight("bold")
        axes.set_xlim(-0.6, max(len(heads), 1) - 0.4)
        axes.set_ylim(0, max(float((frequency + reach[1]).max(initial=0)) * 1.05, 1.0))
        axes.set_ylabel("Selection frequency (%)")
        axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)
        axes.set_title(_trials(ranking), loc="right", color="0.35")
        return save(figure, path)


def _trials(ranking: HeadRanking) -> str:
    """The caption that says what the error bars are."""
    samples = f"{ranking.num_samples:,} sample{'s' if ranking.num_samples != 1 else ''}"
    if ranking.num_trials == 1:
        return samples
    trials = "bootstrap resamples" if ranking.spread == "bootstrap" else "draws"
    return f"± s.d. over {ranking.num_trials} {trials} of {samples}"


def plot_head_grid(
    values: NDArray[np.floating],
    path: str | Path | None = None,
    *,
    label: str = "Selection frequency (%)",
    top: Sequence[Head] = (),
    exclude_layers: int = 0,
) -> Figure:
    """Layers x heads: one value for every head of the model, such as its selection frequency.

    Args:
        values: `[layer, head]`, in the unit that `label` names.
        top: heads to frame.
        exclude_layers: the first layers, which were not considered: left blank.
    """
    layers, heads = values.shape
    with paper_style():
        side = min(0.22, max(0.07, 2.6 / max(heads, 8)))  # inches a cell
        width = side * heads
        figure = new_figure(max(width, 0.3) + 1.3, max(1.2, side * layers) + 0.6)
        axes = figure.add_subplot()
        shown = np.array(values, dtype=float)
        shown[:exclude_layers] = np.nan
        axes.set_facecolor("0.92")
        edges = np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5
        fine = values.size > _MOST_DRAWN_CELLS
        cells = axes.pcolormesh(*edges, shown, cmap=COLOUR_MAP, vmin=0, rasterized=fine, clip_on=False)
        if not fine:
            tell(cells, [_cell_tip(Head(*place), value) for place, value in np.ndenumerate(shown)])
        axes.set_aspect("equal")
        for head in top:
            draw_box(axes, (head.head - 0.5, head.layer - 0.5, head.head + 0.5, head.layer + 0.5), VERMILLION)
        axes.set_xlabel("Head")
        axes.set_ylabel("Layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.spines[:].set_visible(False)
        bar = axes.inset_axes((1 + 0.08 / width, 0, 0.1 / width, 1))  # as high as the grid
        figure.colorbar(cells, cax=bar, label=label).outline.set_visible(False)
        return save(figure, path)


def _cell_tip(head: Head, value: float) -> str:
    return f"{head}: {value:.3g}" if np.isfinite(value) else f"{head}: no value"


def plot_sensitivity(ranking: HeadRanking, path: str | Path | None = None, *, emphasised: int = 3) -> Figure:
    """A point for each head that criterion 1 keeps: how much it looks at the image, and how far its map moves.

    The shaded corner is that of heads that rest: at least average attention, and a low sensitivity score.

    Args:
        emphasised: how many of the first heads are the localization heads, which are named; so are ten that rest.
    """
    scores = {
        head.address: float(head.sensitivity_score)
        for head in ranking.kept
        if head.sensitivity_score is not None
    }
    heads = [head for head in ranking.kept if head.address in scores]
    rest = resting_heads(ranking)
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
                across, [scores[head.address] for head in group], label=name, clip_on=False, **looks[name]
            )
            tell(marks, [f"{head.address}: S = {head.attention_sum:.3f}, sensitivity score {scores[head.address]:.3f}"
                         for head in group])  # fmt: skip
        axes.set_xlabel("Average attention sum S")
        axes.set_ylabel("Sensitivity score")
        if heads:
            axes.set_xlim(*span([0.0, *(head.attention_sum for head in heads)]))
            axes.set_ylim(*_limits(list(scores.values())))
            corner = [fmean(head.attention_sum for head in ranking.kept), axes.get_xlim()[1]]
            limit = RESTING_SHARE * max(scores.values())
            axes.fill_between(
                corner, axes.get_ylim()[0], limit, color=GREY, alpha=0.15, linewidth=0, zorder=0
            )
        named = [
            (h.address, h.attention_sum, scores[h.address]) for h in [*first, *groups["resting"][:MAX_NAMES]]
        ]
        name_points(axes, sorted(named, key=lambda point: -point[2]), lowest=0)
        found = f"{len(rest)} of {len(heads)} kept heads rest" if rest else "no head rests"
        axes.set_title(found, loc="left", color="0.25")
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handletextpad=0.1, columnspacing=0.8)
        return save(figure, path)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(*values, 0.0) or 1.0
    return low - 0.03 * (high - low), high + 0.06 * (high - low)


def name_points(axes: Axes, points: Sequence[tuple[Head, float, float]], lowest: float = -1) -> None:
    """The names of `(head, x, y)`, the highest first, in a column right of the axes, each led to its point.

    Args:
        lowest: place of a name, in heights of the axes.
    """
    (bottom, top), height = axes.get_ylim(), 1.0
    for head, x, y in points:
        height = min(height, (y - bottom) / (top - bottom))
        axes.annotate(
            str(head),
            (x, y),
            xytext=(1.03, max(height, lowest)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
        )
        height -= 0.075
