"""How well each head grounds alone, where there is truth: the vertical axis of the paper's Fig. 6b, with boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.evaluation.metrics import box_iou
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions


def head_ious(
    maps: AttentionMaps, heads: Sequence[Head], truth: Box, options: GroundingOptions
) -> list[float | None]:
    """IoU of the true box and the box of each head's map; None where the map is empty (its layer was not run)."""
    return [
        float(box_iou(ground_maps(maps, [head], options).box, truth)) if maps.attention[head].any() else None
        for head in heads
    ]


class HeadIoU:
    """Mean IoU, over samples, of the true box and the box that one head's map makes by itself.

    Args:
        heads: which heads are measured.
        shape: `(layers, heads)` of the model.
        max_samples: later samples are not counted: a mean settles early, and grounding takes time.
    """

    def __init__(
        self, heads: Iterable[Head], shape: tuple[int, int], options: GroundingOptions, max_samples: int = 200
    ) -> None:
        self._heads = tuple(heads)
        self._options = options
        self._max_samples = max_samples
        self._total = np.zeros(shape)
        self._count = np.zeros(shape)
        self.num_samples = 0

    def add(self, maps: AttentionMaps, truth: Box) -> None:
        """Measure and count one sample."""
        if self.num_samples < self._max_samples:
            self.count(head_ious(maps, self._heads, truth, self._options))

    def count(self, ious: Sequence[float | None]) -> None:
        """Count one sample, whose `head_ious` were found before; a head without one is passed over."""
        self.num_samples += 1
        for head, iou in zip(self._heads, ious, strict=True):
            if iou is not None:
                self._total[head] += iou
                self._count[head] += 1

    @property
    def means(self) -> NDArray[np.float64]:
        """`[layer, head]`, NaN where nothing was measured."""
        return np.where(self._count > 0, self._total / np.maximum(self._count, 1), np.nan)
