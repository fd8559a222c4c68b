"""One sample's verdict on every head: the rows of an analysis file, and the heads that this sample alone picks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NoHeadError
from localization_heads.heads.criteria import CriteriaOptions, HeadStatistics
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import by_entropy, criterion_1, sample_heads

WAY_OUT = "lower criteria.tau, or name heads as in heads=[14-24,14-13,14-26]"

NONE_KEPT = "no head passes criterion 1 on average"
"""Then there are no localization heads: a ranking lists none as kept, and what needs some says so."""


def greedy_heads(statistics: HeadStatistics, options: CriteriaOptions, k: int) -> list[Head]:
    """The `k` heads that both criteria pick in this sample alone (the paper's "greedy" ablation, Tab. 5).

    Fewer if fewer pass criterion 1 with a finite entropy, unless `options.fallback` names others.

    >>> from localization_heads.heads.criteria import head_statistics
    >>> maps = np.zeros((4, 2, 3, 3))  # layer, head, row, column
    >>> maps[3, 1, 0, 0] = 1.0
    >>> greedy_heads(head_statistics(maps), CriteriaOptions(), k=3)
    [Head(layer=3, head=1)]
    """
    found = statistics
    return sample_heads(found.attention_sum, found.spatial_entropy, found.bottom_row_focus, options, k)


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
    """A row a head: those that pass criterion 1 first, then by spatial entropy; ties as everywhere (`options.ties`).

    So `analysis[:k]` holds heads that pass. Of these, heads that `options.bottom_row_filter` drops come last.
    `above_threshold` says whether criterion 1 keeps the head in this sample; `head_idx` is `layer * H + head`.
    """
    kept = criterion_1(statistics.attention_sum, options)
    dropped = statistics.bottom_row_focus & options.bottom_row_filter
    group = np.where(kept, np.where(dropped, 1, 0), 2).ravel()
    order = by_entropy(statistics.attention_sum.ravel(), statistics.spatial_entropy.ravel(), options.ties)
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
