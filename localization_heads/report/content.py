"""What a report holds, as data classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import BadEntry
from localization_heads.evaluation.metrics import spearman
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking
from localization_heads.report.gallery import Card

LEAST_FREQUENCY = 0.01
"""Heads that are selected less often take no part in the scatter and its correlation (paper, Sec. 4.4, Fig. 6b)."""


@dataclass(frozen=True)
class HeadFacts:
    """The heads of a model and what is known of each.

    Args:
        shape: `(layers, heads)` of the model; `ranking` may list fewer (a heads.json lists those kept).
        used: the heads that made the boxes, or would: the localization heads.
        bottom_row: share of the samples whose map has a whole positive bottom row, `[layer, head]`.
        iou: mean IoU of each head alone, `[layer, head]`, NaN where it was not measured; over `iou_samples`.
        origin: where the ranking is from, unless the run has just found it: a sentence.
    """

    ranking: HeadRanking
    shape: tuple[int, int]
    used: Sequence[Head] = ()
    bottom_row: NDArray[np.float64] | None = None
    iou: NDArray[np.float64] | None = None
    iou_samples: int = 0
    origin: str = ""

    @property
    def scatter(self) -> list[tuple[float, float]]:
        """Selection frequency and IoU of the heads that are selected often enough and measured."""
        if self.iou is None:
            return []
        return [
            (head.selection_frequency, float(self.iou[head.address]))
            for head in self.ranking.heads
            if head.selection_frequency >= LEAST_FREQUENCY and math.isfinite(self.iou[head.address])
        ]

    @property
    def correlation(self) -> tuple[float, float] | None:
        """Spearman's rho and its two-sided p over the heads of the scatter; None where it is undefined."""
        frequency, iou = np.array(self.scatter, dtype=np.float64).reshape(-1, 2).T
        return spearman(frequency, iou)


@dataclass(frozen=True)
class Report:
    """Everything that one `report.html` shows; where a part is missing a sentence says why.

    Args:
        facts: what was run, where and with what, as (name, value).
        options: every option of the run, as (name, value).
        num_entries: lines of the data set that were to be used, failures included.
        num_grounded: samples that got a box; the gallery may show fewer.
        ious: of every one of them whose true box is known.
    """

    stage: str
    model: str
    date: str
    facts: Sequence[tuple[str, str]]
    options: Sequence[tuple[str, str]]
    num_entries: int
    heads: HeadFacts | None = None
    no_heads: str = ""
    no_scatter: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    cards: Sequence[Card] = ()
    no_cards: str = ""
    num_grounded: int = 0
    ious: Sequence[float] = ()
    failures: Sequence[BadEntry] = ()
