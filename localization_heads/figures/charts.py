"""Charts of all heads of a model: the criteria (Fig. 3, Fig. 6a, sensitivity), and the grid of layers and heads."""

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
from localization_heads.figures.rendering import set_tooltips
from localization_heads.figures.sheet import new_figure, save
from localization_heads.figures.style import BLUE, COLOUR_MAP, GREY, ORANGE, VERMILLION, paper_style
from localization_heads.heads.head import Head
from localization_heads.heads.record import resting_heads
from localization_heads.heads.sensitivity import RESTING_SHARE

if TYPE_CHECKING:
    from localization_heads.heads.record import HeadRanking


COLUMN_WIDTH = 3.4  # inches, of a two-column page
MAX_NAMES = 10  # names of heads that fit next to a chart
_MAX_VECTOR_CELLS = 2048  # larger grids are rasterized, without tooltips


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
        sums: `[layer, head]`, average attention sum `S` of every head; NaN (unknown) is not drawn.
        tau: the threshold of criterion 1; None if the rule has none.
        kept: `[layer, head]`, the heads that criterion 1 keeps; by default those with `S >= tau`.
        top: heads to mark and name, best first (at most ten names).
        exclude_layers: the number of first layers that are not considered and not drawn.
    """
    known = [Head(layer, head) for layer, head in np.argwhere(np.isfinite(sums)).tolist()]
    considered = [head for head in known if head.layer >= exclude_layers]
    considered.sort(key=lambda head: sums[head])
    curve = np.array([sums[head] for head in considered])  # [head], ascending
    if kept is None:
        kept = sums >= (np.inf if tau is None else tau)
    is_kept = np.array([bool(kept[head]) for head in considered], dtype=bool)
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 2.5)
        axes = figure.add_subplot()
        ranks = np.arange(1, len(curve) + 1)
        axes.plot(ranks, curve, color=GREY, zorder=2)
        tooltips = np.array([f"{head}: S = {sums[head]:.3f}" for head in considered], dtype=object)
        for group, colour, size, rim in ((~is_kept, GREY, 4, 0), (is_kept, BLUE, 5, 1.5)):
            dots = axes.scatter(
                ranks[group], curve[group], s=size, color=colour, linewidths=rim, zorder=3, clip_on=False
            )
            set_tooltips(dots, tooltips[group])
        which = f"Heads of layers {exclude_layers} and up" if exclude_layers else "Heads"
        axes.set_xlabel(f"{which}, in ascending order")
        axes.set_ylabel("Average attention sum S")
        if len(curve):
            axes.plot(ranks[[0, -1]], curve[[0, -1]], color=GREY, linewidth=0.6, linestyle=":", zorder=1)
            axes.set_xlim(0, len(curve) * 1.03 + 0.5)
            axes.set_ylim(*axis_limits(curve if tau is None else [*curve, tau]))
            axes.set_title(f"{is_kept.sum()} of {len(curve)} heads kept", loc="left", color=BLUE)
            if tau is not None:
                _mark_elbow(axes, curve, tau)
            marks = [(h, considered.index(h) + 1, float(sums[h])) for h in top if h in considered]
            _name_heads(axes, marks, curve, tau)
        return save(figure, path)


def axis_limits(values: Sequence[float] | NDArray[np.floating]) -> tuple[float, float]:
    """The limits of an axis: from 0, unless all values lie in the upper half of that range."""
    low, high = float(np.min(values, initial=np.inf)), float(np.max(values, initial=0))
    if low > 0.5 * high and low < high:
        return low - 0.06 * (high - low), high + 0.06 * (high - low)
    return 0.0, high * 1.06 or 1.0


def _mark_elbow(axes: Axes, curve: NDArray[np.floating], tau: float) -> None:
    """Mark where the ascending curve reaches tau, shade the heads above, and write the value of tau."""
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
    """Mark heads `(head, rank, sum)` on the curve, and write their names in a column on its concave side.

    That is above a curve that sags below its chord, and below one that bulges above it, so that no line from a name to
    its mark crosses the curve. The names nearest to the corner have the farthest marks, so that no line crosses
    another. The column is shifted so that the line of tau passes between names.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    sags = np.mean((curve - bottom) / (top - bottom)) < 0.5
    height, step = (0.95, -0.08) if sags else (0.05, 0.08)
    if tau is not None:  # shift the column by less than a step
        distances = (tau - bottom) / (top - bottom) - height - step * np.arange(min(len(marks), MAX_NAMES))
        shifts = (step * part / 16 for part in range(12 if sags else 9))  # below the curve there is less room
        height += max(shifts, key=lambda shift: min(np.abs(distances - shift).min(initial=1), abs(step) / 2))
    rim = withStroke(linewidth=2, foreground="white")  # over the lines that the name crosses

    def offset(mark: tuple[Head, int, float]) -> float:
        """The horizontal distance of a mark from the column, which is in the middle, in widths of the axes."""
        return (mark[1] - left) / (right - left) - 0.5

    for mark in sorted(marks[:MAX_NAMES], key=lambda mark: -abs(offset(mark))):
        head, rank, value = mark
        (diamond,) = axes.plot([rank], [value], "D", color=VERMILLION, mec="white", mew=0.6, markersize=5, zorder=6)
        set_tooltips(diamond, [f"{head}: S = {value:.3f}"])
        axes.annotate(
            str(head),
            (rank, value),
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
                "relpos": (float(offset(mark) > 0), 0.5),
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
        emphasised: how many of the first heads are the localization heads.
    """
    heads = [head for head in ranking.heads if head.layer >= ranking.exclude_layers][:top]
    frequency = 100 * np.array([head.selection_frequency for head in heads])
    deviation = 100 * np.array([head.selection_frequency_std for head in heads])
    # Error bars stay within 0 and 100 %.
    error = np.array([np.minimum(deviation, frequency), np.minimum(deviation, 100 - frequency)])
    with paper_style():
        figure = new_figure(max(COLUMN_WIDTH, 0.9 + 0.17 * len(heads)), 2.4)
        axes = figure.add_subplot()
        place = np.arange(len(heads))
        colours = [BLUE if i < emphasised else "#A9C4DA" for i in place]
        axes.bar(place, frequency, width=0.75, color=colours, zorder=2)
        if ranking.num_trials > 1:
            axes.errorbar(place, frequency, error, fmt="none", ecolor="0.15", elinewidth=0.9, capsize=2, zorder=3)
        axes.set_xticks(place, [str(Head(h.layer, h.head)) for h in heads], rotation=60, ha="right")
        axes.tick_params(axis="x", length=0, pad=1)
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
        for label in axes.get_xticklabels()[:emphasised]:
            label.set_fontweight("bold")
        axes.set_xlim(-0.6, max(len(heads), 1) - 0.4)
        axes.set_ylim(0, max(float((frequency + error[1]).max(initial=0)) * 1.05, 1.0))
        axes.set_ylabel("Selection frequency (%)")
        axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)
        axes.set_title(_trials_caption(ranking), loc="right", color="0.35")
        return save(figure, path)


def _trials_caption(ranking: HeadRanking) -> str:
    """The number of samples, and what the error bars are."""
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
    """A grid of layers and heads: one value for every head of the model, such as its selection frequency.

    Args:
        values: `[layer, head]`, in the unit of `label`.
        top: heads to frame.
        exclude_layers: the number of first layers that were not considered and are left blank.
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
        rasterized = values.size > _MAX_VECTOR_CELLS
        cells = axes.pcolormesh(*edges, shown, cmap=COLOUR_MAP, vmin=0, rasterized=rasterized, clip_on=False)
        if not rasterized:
            set_tooltips(cells, [_cell_tooltip(Head(*index), value) for index, value in np.ndenumerate(shown)])
        axes.set_aspect("equal")
        for head in top:
            draw_box(axes, (head.head - 0.5, head.layer - 0.5, head.head + 0.5, head.layer + 0.5), VERMILLION)
        axes.set_xlabel("Head")
        axes.set_ylabel("Layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.spines[:].set_visible(False)
        bar = axes.inset_axes((1 + 0.08 / width, 0, 0.1 / width, 1))  # as tall as the grid
        figure.colorbar(cells, cax=bar, label=label).outline.set_visible(False)
        return save(figure, path)


def _cell_tooltip(head: Head, value: float) -> str:
    return f"{head}: {value:.3g}" if np.isfinite(value) else f"{head}: no value"


def plot_sensitivity(ranking: HeadRanking, path: str | Path | None = None, *, emphasised: int = 3) -> Figure:
    """The attention sum and the sensitivity score of each head that criterion 1 keeps.

    Resting heads lie in the shaded corner: at least average attention, but a low sensitivity score.

    Args:
        emphasised: how many of the first heads are the localization heads. They are named, and up to ten resting heads.
    """
    scores = {
        head.address: float(head.sensitivity_score) for head in ranking.kept if head.sensitivity_score is not None
    }
    heads = [head for head in ranking.kept if head.address in scores]
    rest = resting_heads(ranking)
    first = [head for head in heads if head in ranking.kept[:emphasised]]
    groups = {
        "kept by criterion 1": [head for head in heads if head not in rest and head not in first],
        "resting": [head for head in rest if head not in first],
        "localization heads": first,
    }
    markers: dict[str, dict[str, Any]] = {
        "kept by criterion 1": {"s": 14, "color": BLUE},
        "resting": {"s": 22, "marker": "s", "facecolors": "none", "edgecolors": ORANGE, "linewidths": 1.4},
        "localization heads": {"s": 24, "marker": "D", "color": VERMILLION, "zorder": 3},
    }
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 2.7)
        axes = figure.add_subplot()
        for name, group in groups.items():
            sums = [head.attention_sum for head in group]
            marks = axes.scatter(
                sums, [scores[head.address] for head in group], label=name, clip_on=False, **markers[name]
            )
            tooltips = [
                f"{head.address}: S = {head.attention_sum:.3f}, sensitivity score {scores[head.address]:.3f}"
                for head in group
            ]
            set_tooltips(marks, tooltips)
        axes.set_xlabel("Average attention sum S")
        axes.set_ylabel("Sensitivity score")
        if heads:
            axes.set_xlim(*axis_limits([0.0, *(head.attention_sum for head in heads)]))
            axes.set_ylim(*_score_limits(list(scores.values())))
            corner = [fmean(head.attention_sum for head in ranking.kept), axes.get_xlim()[1]]
            limit = RESTING_SHARE * max(scores.values())
            axes.fill_between(corner, axes.get_ylim()[0], limit, color=GREY, alpha=0.15, linewidth=0, zorder=0)
        named = [(h.address, h.attention_sum, scores[h.address]) for h in [*first, *groups["resting"][:MAX_NAMES]]]
        name_points(axes, sorted(named, key=lambda point: -point[2]), lowest=0)
        title = f"{len(rest)} of {len(heads)} kept heads rest" if rest else "no head rests"
        axes.set_title(title, loc="left", color="0.25")
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handletextpad=0.1, columnspacing=0.8)
        return save(figure, path)


def _score_limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(*values, 0.0) or 1.0
    return low - 0.03 * (high - low), high + 0.06 * (high - low)


def name_points(axes: Axes, points: Sequence[tuple[Head, float, float]], lowest: float = -1) -> None:
    """Write the names of points `(head, x, y)`, highest first, in a column right of the axes, with lines to the points.

    Args:
        lowest: the lowest position of a name, as a fraction of the height of the axes.
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
