"""One sample's verdict on every head: the rows of an analysis file, and the heads that this sample alone picks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NoHeadError
from localization_heads.heads.criteria import HeadStatistics, keep_heads
from localization_heads.heads.head import Head
from localization_heads.heads.sensitivity import SensitivityStatistics, sensitivity_score
from localization_heads.options.groups import CriteriaOptions, Ties

NO_HEAD_HINT = "lower criteria.tau, or name heads as in heads=[14-24,14-13,14-26]"


def greedy_heads(
    statistics: HeadStatistics,
    options: CriteriaOptions,
    k: int,
    sensitivity: SensitivityStatistics | None = None,
) -> list[Head]:
    """The `k` heads that both criteria pick in this sample alone (the paper's "greedy" ablation, Tab. 5).

    Fewer if fewer pass criterion 1 with a finite entropy, unless `options.fallback` names others.

    Args:
        sensitivity: of this sample; then the heads that pass come in the order of their sensitivity score, whatever
            their entropy, and those that `options.fallback` names come after them.

    >>> from localization_heads.heads.criteria import head_statistics
    >>> maps = np.zeros((4, 2, 3, 3))  # layer, head, row, column
    >>> maps[3, 1, 0, 0] = 1.0
    >>> greedy_heads(head_statistics(maps), CriteriaOptions(), k=3)
    [Head(layer=3, head=1)]
    """
    found = statistics
    of_sample = partial(select_in_sample, found.attention_sum, found.spatial_entropy, found.bottom_row_focus)
    if sensitivity is None:
        return of_sample(options, k)
    passing = of_sample(replace(options, fallback="none"), found.attention_sum.size)
    every = of_sample(options, found.attention_sum.size)  # and those of the fallback behind them
    return [*sorted(passing, key=partial(_stays, sensitivity)), *every[len(passing) :]][:k]


def _stays(statistics: SensitivityStatistics, head: Head) -> float:
    """Less for a head that moves more; most where that is not known."""
    sensitivity, consistency = (None if np.isnan(one[head]) else float(one[head]) for one in statistics)
    score = sensitivity_score(sensitivity, consistency)
    return math.inf if score is None else -round(score, 6)


def pick_own_heads(
    statistics: HeadStatistics,
    options: CriteriaOptions,
    k: int,
    sensitivity: SensitivityStatistics | None = None,
) -> list[Head]:
    """`greedy_heads` where a box has to come of them: at least one.

    A sample without is not grounded, nowhere: it fails alone, and no metric counts it.

    Raises:
        NoHeadError: no head passes the criteria in this sample.
    """
    heads = greedy_heads(statistics, options, k, sensitivity)
    if not heads:
        raise NoHeadError(
            f"no head passes the criteria in this sample, so none can ground it: {NO_HEAD_HINT}"
        )
    return heads


def analysis_rows(statistics: HeadStatistics, options: CriteriaOptions) -> list[dict[str, Any]]:
    """A row a head: those that pass criterion 1 first, then by spatial entropy; ties as everywhere (`options.ties`).

    So `analysis[:k]` holds heads that pass. Of these, heads that `options.bottom_row_filter` drops come last.
    `above_threshold` says whether criterion 1 keeps the head in this sample; `head_idx` is `layer * H + head`.
    """
    kept = keep_heads(statistics.attention_sum, options)
    dropped = statistics.bottom_row_focus & options.bottom_row_filter
    group = np.where(kept, np.where(dropped, 1, 0), 2).ravel()
    order = entropy_order(statistics.attention_sum.ravel(), statistics.spatial_entropy.ravel(), options.ties)
    order = order[np.argsort(group[order], kind="stable")]
    return [_row(statistics, kept, Head(*divmod(index, kept.shape[1]))) for index in order.tolist()]


def _row(statistics: HeadStatistics, kept: NDArray[np.bool_], head: Head) -> dict[str, Any]:
    return {
        "layer": head.layer,
        "head": head.head,
        "head_idx": head.layer * kept.shape[1] + head.head,
        "attn_sum": float(statistics.attention_sum[head]),
        "spatial_entropy": float(statistics.spatial_entropy[head]),
        "bottom_row_focus": bool(statistics.bottom_row_focus[head]),
        "num_components": int(statistics.num_components[head]),
        "above_threshold": bool(kept[head]),
    }


def select_by_entropy(
    sums: NDArray[np.floating[Any]],
    entropy: NDArray[np.floating[Any]],
    kept: NDArray[np.bool_],
    top_n: int = 10,
    ties: Ties = "sum",
) -> list[Head]:
    """Criterion 2 in one sample: the `top_n` kept heads of lowest finite spatial entropy, best first.

    Ties (many heads have entropy 0 on small grids) go to the higher attention sum of this sample, then the
    lower layer, then the lower head; with `ties="order"` to the lower layer at once.

    Args:
        sums: attention sums, `[layer, head]`.
        entropy: spatial entropies, `[layer, head]`.
        kept: what criterion 1 keeps, `[layer, head]`.

    Returns:
        At most `top_n` heads; fewer if fewer have a finite entropy.

    >>> sums = np.array([[0.5, 0.25], [0.75, 0.125]])
    >>> entropy = np.array([[1.0, 0.0], [0.0, np.inf]])
    >>> select_by_entropy(sums, entropy, kept=sums > 0, top_n=2)
    [Head(layer=1, head=0), Head(layer=0, head=1)]
    """
    allowed = (kept & np.isfinite(entropy)).ravel()
    order = entropy_order(sums.ravel(), entropy.ravel(), ties)
    return _addresses(order[allowed[order]][:top_n], sums.shape[1])


def select_in_sample(
    sums: NDArray[np.floating[Any]],
    entropy: NDArray[np.floating[Any]],
    bottom_row: NDArray[np.bool_],
    options: CriteriaOptions,
    top_n: int,
) -> list[Head]:
    """The `top_n` heads that one sample picks by both criteria, with its own elbow; best first.

    Args:
        sums: attention sums, `[layer, head]`; likewise the others.
        bottom_row: the flags that `options.bottom_row_filter` looks at.

    Returns:
        Fewer heads where fewer pass, unless `options.fallback` names others.

    >>> sums = np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> options = CriteriaOptions(exclude_layers=0, tau=0.5, fallback="order")
    >>> select_in_sample(sums, np.array([[1.0, 0.0], [0.0, 0.5]]), sums < 0, options, top_n=3)
    [Head(layer=1, head=1), Head(layer=0, head=0), Head(layer=0, head=1)]
    """
    allowed = keep_heads(sums, options)
    if options.bottom_row_filter:
        allowed &= ~bottom_row
    chosen = select_by_entropy(sums, entropy, allowed, top_n, options.ties)
    if options.fallback == "order":
        taken = set(chosen)
        others = [head for index in np.ndindex(sums.shape) if (head := Head(*index)) not in taken]
        return [*chosen, *others][:top_n]
    if options.fallback == "sum" and not chosen:
        return _highest(sums, bottom_row, options)
    return chosen


def _highest(
    sums: NDArray[np.floating[Any]], bottom_row: NDArray[np.bool_], options: CriteriaOptions
) -> list[Head]:
    """The head of the highest sum in any layer; one above the elbow only if its bottom row is not in focus.

    The code of August 2025 looks at no bottom row below the elbow.
    """
    above = keep_heads(sums, replace(options, exclude_layers=0))
    left_out = (above & bottom_row & options.bottom_row_filter).ravel()
    order = np.argsort(-sums, axis=None, kind="stable")
    return _addresses(order[~left_out[order]][:1], sums.shape[1])


def _addresses(flat: NDArray[np.intp], num_heads: int) -> list[Head]:
    return [Head(*divmod(index, num_heads)) for index in flat.tolist()]


def entropy_order(
    sums: NDArray[np.floating[Any]], entropies: NDArray[np.floating[Any]], ties: Ties = "sum"
) -> NDArray[np.intp]:
    """Order of heads along the last axis by (entropy, higher sum, index): the tie rule in one place."""
    keys = (entropies,) if ties == "order" else (-sums, entropies)
    return np.lexsort(keys, axis=-1)  # stable, so equal keys stay in layer, head order
