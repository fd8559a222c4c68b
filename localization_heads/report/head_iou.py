"""How well each head grounds alone, where there is truth: the vertical axis of the paper's Fig. 6b, with boxes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.evaluation.metrics import box_iou
from localization_heads.grounding.maps import GroundingOptions, ground_maps
from localization_heads.heads.head import Head


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
        """Count one sample. A head whose map is empty (its layer was not run) is passed over."""
        if self.num_samples >= self._max_samples:
            return
        self.num_samples += 1
        for head in self._heads:
            if maps.attention[head].any():
                box = ground_maps(maps, [head], self._options).box
                self._total[head] += float(box_iou(box, truth))
                self._count[head] += 1

    @property
    def means(self) -> NDArray[np.float64]:
        """`[layer, head]`, NaN where nothing was measured."""
        return np.where(self._count > 0, self._total / np.maximum(self._count, 1), np.nan)
