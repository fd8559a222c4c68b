"""`AttentionMaps`: what one expression made every head of one model look at in one image.

This is the record that flows through the whole tool: the model side produces it, the criteria, the grounding,
the figures and the store consume it. It holds numpy arrays and plain values only and never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image: floats, half-open, origin at the top left."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention of the query token over the image tokens, for every head (`A[l,h]` of Sec. 4.1).

    Args:
        attention: float32 `[layer, head, grid_h, grid_w]`; softmax weights, *not* renormalised over the image.
        image_box: the region of the original image that the grid covers, in pixels. Its cells are equal in
            size. It reaches beyond the image where the processor padded and stays inside where it cropped.
        image_size: `(W, H)` of the original image in pixels.
    """

    attention: NDArray[np.float32]
    image_box: Box
    image_size: tuple[int, int]
    image_file: str = ""
    query: str = ""
    prompt: str = ""
    model: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if self.attention.ndim != 4:
            raise ValueError(f"attention must be [layer, head, grid_h, grid_w], not {self.attention.shape}")

    @property
    def grid(self) -> tuple[int, int]:
        """`(grid_h, grid_w)`."""
        return self.attention.shape[2], self.attention.shape[3]

    @property
    def num_layers(self) -> int:
        return self.attention.shape[0]

    @property
    def num_heads(self) -> int:
        return self.attention.shape[1]

    def named(self, *, id: str, image_file: str) -> AttentionMaps:
        """The same maps with the entry's name and picture written on them."""
        return replace(self, id=id, image_file=image_file)
