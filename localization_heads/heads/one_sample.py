"""The criteria in a single sample: the heads that it selects, and the rows of its analysis file."""

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
    """The `k` heads that both criteria select in this sample alone (the paper's "greedy" ablation, Tab. 5).

    Fewer if fewer pass criterion 1 with a finite entropy, unless `options.fallback` adds others.

    Args:
        sensitivity: of this sample: the heads that pass are then ordered by sensitivity score instead of entropy.

    >>> from localization_heads.heads.criteria import head_statistics
    >>> maps = np.zeros((4, 2, 3, 3))  # layer, head, row, column
    >>> maps[3, 1, 0, 0] = 1.0
    >>> greedy_heads(head_statistics(maps), CriteriaOptions(), k=3)
    [Head(layer=3, head=1)]
    """
    select = partial(
        select_in_sample, statistics.attention_sum, statistics.spatial_entropy, statistics.bottom_row_focus
    )
    if sensitivity is None:
        return select(options, k)
    passing = select(replace(options, fallback="none"), statistics.attention_sum.size)
    with_fallback = select(options, statistics.attention_sum.size)
    return [*sorted(passing, key=partial(_descending_score, sensitivity)), *with_fallback[len(passing) :]][:k]


def _descending_score(statistics: SensitivityStatistics, head: Head) -> float:
    """Sort key for descending sensitivity scores, unknown ones last."""
    values = (float(array[head]) for array in statistics)
    score = sensitivity_score(*(None if math.isnan(value) else value for value in values))
    return math.inf if score is None else -round(score, 6)


def pick_own_heads(
    statistics: HeadStatistics,
    options: CriteriaOptions,
    k: int,
    sensitivity: SensitivityStatistics | None = None,
) -> list[Head]:
    """`greedy_heads` to ground the sample with: at least one.

    Raises:
        NoHeadError: no head passes the criteria in this sample.
    """
    heads = greedy_heads(statistics, options, k, sensitivity)
    if not heads:
        raise NoHeadError(f"no head passes the criteria in this sample, so none can ground it: {NO_HEAD_HINT}")
    return heads


def analysis_rows(statistics: HeadStatistics, options: CriteriaOptions) -> list[dict[str, Any]]:
    """One row per head: those that pass criterion 1 first, then by spatial entropy, with the usual tie rule.

    So `analysis[:k]` holds heads that pass; of these, the ones that `options.bottom_row_filter` drops come last.
    `above_threshold` says whether criterion 1 keeps the head in this sample; `head_idx` is `layer * H + head`.
    """
    kept = keep_heads(statistics.attention_sum, options)
    dropped = statistics.bottom_row_focus & options.bottom_row_filter
    group = np.where(kept, np.where(dropped, 1, 0), 2).ravel()  # sorted by group first
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

    Ties (many heads have entropy 0 on small grids) go to the higher attention sum in this sample, then the lower
    layer, then the lower head; with `ties="order"` directly to the lower layer and head.

    Args:
        sums: attention sums, `[layer, head]`.
        entropy: spatial entropies, `[layer, head]`.
        kept: the heads that criterion 1 keeps, `[layer, head]`.

    Returns:
        At most `top_n` heads; fewer if fewer have a finite entropy.

    >>> sums = np.array([[0.5, 0.25], [0.75, 0.125]])
    >>> entropy = np.array([[1.0, 0.0], [0.0, np.inf]])
    >>> select_by_entropy(sums, entropy, kept=sums > 0, top_n=2)
    [Head(layer=1, head=0), Head(layer=0, head=1)]
    """
    allowed = (kept & np.isfinite(entropy)).ravel()
    order = entropy_order(sums.ravel(), entropy.ravel(), ties)
    return _to_heads(order[allowed[order]][:top_n], sums.shape[1])


def select_in_sample(
    sums: NDArray[np.floating[Any]],
    entropy: NDArray[np.floating[Any]],
    bottom_row: NDArray[np.bool_],
    options: CriteriaOptions,
    top_n: int,
) -> list[Head]:
    """The `top_n` heads that one sample selects by both criteria, with its own elbow; best first.

    Args:
        sums: attention sums, `[layer, head]`.
        entropy: spatial entropies, `[layer, head]`.
        bottom_row: the flags for `options.bottom_row_filter`, `[layer, head]`.

    Returns:
        Fewer heads if fewer pass, unless `options.fallback` adds others.

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
        return _highest_sum(sums, bottom_row, options)
    return chosen


def _highest_sum(
    sums: NDArray[np.floating[Any]], bottom_row: NDArray[np.bool_], options: CriteriaOptions
) -> list[Head]:
    """The head with the highest sum in any layer, unless the bottom-row filter drops it.

    As in the code of August 2025, the filter only applies to heads above the elbow.
    """
    above = keep_heads(sums, replace(options, exclude_layers=0))
    dropped = (above & bottom_row & options.bottom_row_filter).ravel()
    order = np.argsort(-sums, axis=None, kind="stable")
    return _to_heads(order[~dropped[order]][:1], sums.shape[1])


def _to_heads(flat: NDArray[np.intp], num_heads: int) -> list[Head]:
    return [Head(*divmod(index, num_heads)) for index in flat.tolist()]


def entropy_order(
    sums: NDArray[np.floating[Any]], entropies: NDArray[np.floating[Any]], ties: Ties = "sum"
) -> NDArray[np.intp]:
    """Indices that sort heads along the last axis by entropy, then by descending sum, then by index: the tie rule."""
    keys = (entropies,) if ties == "order" else (-sums, entropies)
    return np.lexsort(keys, axis=-1)  # stable: equal keys stay in the order of layer and head
