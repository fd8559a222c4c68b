"""One sample's verdict on every head: the rows of an analysis file, and the heads that this sample alone picks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NoHeadError
from localization_heads.heads.criteria import CriteriaOptions, HeadStatistics, keep_heads
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import select_heads

WAY_OUT = "lower criteria.tau, or name heads as in heads=[14-24,14-13,14-26]"

NONE_KEPT = "no head passes criterion 1 on average"
"""Then there are no localization heads: a ranking lists none as kept, and what needs some says so."""


def kept_heads(statistics: HeadStatistics, options: CriteriaOptions) -> NDArray[np.bool_]:
    """Criterion 1 with this sample's own elbow: bool `[layer, head]`."""
    return keep_heads(
        statistics.attention_sum,
        tau=options.tau,
        elbow=options.elbow,
        exclude_layers=options.exclude_layers,
    )


def greedy_heads(statistics: HeadStatistics, options: CriteriaOptions, k: int) -> list[Head]:
    """The `k` heads that both criteria pick in this sample alone (the paper's "greedy" ablation, Tab. 5).

    Fewer if fewer pass criterion 1 with a finite entropy.

    >>> from localization_heads.heads.criteria import head_statistics
    >>> maps = np.zeros((4, 2, 3, 3))  # layer, head, row, column
    >>> maps[3, 1, 0, 0] = 1.0
    >>> greedy_heads(head_statistics(maps), CriteriaOptions(), k=3)
    [Head(layer=3, head=1)]
    """
    kept = kept_heads(statistics, options)
    if options.bottom_row_filter:
        kept = kept & ~statistics.bottom_row_focus
    return select_heads(statistics.attention_sum, statistics.spatial_entropy, kept, k)


def own_heads(statistics: HeadStatistics, options: CriteriaOptions, k: int) -> list[Head]:
    """`greedy_heads` where a box has to come of them: at least one.

    A sample without is not grounded, nowhere: it fails alone, and no metric counts it.

    Raises:
        NoHeadError: no head passes the criteria in this sample.
    """
    heads = greedy_heads(statistics, options, k)
    if not heads:
        raise NoHeadError(f"no head passes the criteria in this sample, so none can ground it: {WAY_OUT}")
    return heads


def analysis_rows(statistics: HeadStatistics, options: CriteriaOptions) -> list[dict[str, Any]]:
    """A row a head, lowest spatial entropy first; ties as everywhere: higher sum, then layer, then head.

    `above_threshold` says whether criterion 1 keeps the head in this sample; `head_idx` is `layer * H + head`.
    """
    kept = kept_heads(statistics, options)
    everyone = np.ones_like(kept)
    order = select_heads(statistics.attention_sum, statistics.spatial_entropy, everyone, kept.size)
    without_component = [Head(*index) for index in np.argwhere(np.isinf(statistics.spatial_entropy)).tolist()]
    return [_row(statistics, kept, head) for head in [*order, *without_component]]


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
