"""`AttentionMaps`: the attention of every head of a model over one image, for one expression.

This record flows through the whole tool: the model produces it; criteria, grounding, figures and store consume it. It
holds numpy arrays and plain values only, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import NotFiniteError

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image: floats, half-open, origin at the top left."""


def is_outside_image(box: Box, image_size: tuple[int, int]) -> bool:
    """Whether a box lies entirely outside its image of `(W, H)` pixels.

    >>> is_outside_image((-5, 0, 1, 1), (4, 4)), is_outside_image((4, 0, 5, 1), (4, 4))
    (False, True)
    """
    x0, y0, x1, y1 = box
    return min(x1, image_size[0]) <= max(x0, 0) or min(y1, image_size[1]) <= max(y0, 0)


def clip_box(box: Box, image_size: tuple[int, int]) -> Box:
    """A box clipped to its image of `(W, H)` pixels; empty if it lies outside.

    >>> clip_box((-5.0, 0.0, 1.0, 9.0), (4, 4)), clip_box((5.0, 0.0, 6.0, 1.0), (4, 4))
    ((0.0, 0.0, 1.0, 4.0), (5.0, 0.0, 5.0, 1.0))
    """
    (x0, y0, x1, y1), (W, H) = box, image_size
    x0, y0 = max(x0, 0.0), max(y0, 0.0)
    return x0, y0, max(min(x1, float(W)), x0), max(min(y1, float(H)), y0)


def rescale_box(box: Box, before: tuple[int, int], after: tuple[int, int]) -> Box:
    """A box of an image of size `before`, `(W, H)`, in pixels of the same image resized to `after`.

    >>> rescale_box((1, 2, 3, 4), (4, 4), (8, 2))
    (2.0, 1.0, 6.0, 2.0)
    """
    if before == after:
        return box
    across, down = after[0] / before[0], after[1] / before[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention of the query token over the image tokens, for every head (`A[l,h]` of Sec. 4.1).

    Args:
        attention: float32 `[layer, head, grid_h, grid_w]`; softmax weights, *not* renormalised over the image.
        image_box: the region of the original image that the grid covers, in pixels; all cells have the same size. It
            extends beyond the image if the processor padded, and stays inside if it cropped.
        image_size: `(W, H)` of the original image in pixels.
        answer: the mean over the answer's tokens, of the shape of `attention`; None unless
            `query_token=last_and_answer`.
        others: maps of other expressions of the same image, which a read-out may contrast these with.
        answer_text: the model's answer, if one was generated.
        answer_logprob: log-probability, in nats, of the first token that the model generates after the prompt; None if
            not computed.
        expression_logprob: log-probability, in nats, of the expression's tokens in the prompt after the first one, and
            of the closing punctuation; None if not computed.
        presence_logit: log-odds of yes against no, in nats, to whether the image shows the thing; None if not asked.
        statement_logit: the same to whether the expression holds, as in "is the dog on the left?".
        asked: the model's weights, prompt and query token (`LVLM.asked`); None if unknown.
        heads: the only heads whose maps were kept; `attention` and `answer` are then `[1, k, grid_h, grid_w]`, in this
            order. None if all heads are there.
        images: for a prompt with several images, the maps of each, in order; these maps are those of `image_index`.
        image_index: index of the image in the prompt, from 0; None for a prompt with one image.

    >>> maps = AttentionMaps(np.zeros((32, 32, 24, 24), np.float32), (0, 0, 640, 640), (640, 480))
    >>> maps.num_layers, maps.num_heads, maps.grid
    (32, 32, (24, 24))
    """

    attention: NDArray[np.float32]
    image_box: Box
    image_size: tuple[int, int]
    image_file: str = ""
    query: str = ""
    prompt: str = ""
    model: str = ""
    id: str = ""
    answer: NDArray[np.float32] | None = None
    others: tuple[AttentionMaps, ...] = ()
    answer_text: str = ""
    answer_logprob: float | None = None
    expression_logprob: float | None = None
    presence_logit: float | None = None
    statement_logit: float | None = None
    asked: Mapping[str, str | None] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    images: tuple[AttentionMaps, ...] = ()
    image_index: int | None = None

    def __post_init__(self) -> None:
        if self.attention.ndim != 4:
            raise ValueError(f"attention must be [layer, head, grid_h, grid_w], not {self.attention.shape}")
        if self.answer is not None and self.answer.shape != self.attention.shape:
            raise ValueError(f"answer must be of the shape of attention, not {self.answer.shape}")

    @property
    def grid(self) -> tuple[int, int]:
        """`(grid_h, grid_w)`."""
        return int(self.attention.shape[2]), int(self.attention.shape[3])

    @property
    def num_layers(self) -> int:
        return int(self.attention.shape[0])

    @property
    def num_heads(self) -> int:
        return int(self.attention.shape[1])

    @property
    def num_bytes(self) -> int:
        """Memory of the maps, including those of other expressions and images."""
        answer = 0 if self.answer is None else self.answer.nbytes
        other_images = [maps for index, maps in enumerate(self.images) if index != self.image_index]
        return self.attention.nbytes + answer + sum(maps.num_bytes for maps in (*self.others, *other_images))

    def of_size(self, image_size: tuple[int, int]) -> AttentionMaps:
        """The same maps for the image resized to `(W, H)`."""
        return replace(self, image_box=rescale_box(self.image_box, self.image_size, image_size), image_size=image_size)

    def check_finite(self) -> None:
        """NotFiniteError if a weight is NaN or infinite, as after an overflow in half precision."""
        answer = self.attention if self.answer is None else self.answer
        if not (np.isfinite(self.attention).all() and np.isfinite(answer).all()):
            raise NotFiniteError
        for other in (*self.others, *self.images):
            other.check_finite()

    def at(self, index: int | None) -> AttentionMaps:
        """The maps of another image of the prompt; self for `image_index`, and for None."""
        if index == self.image_index or index is None:
            return self
        other_image = self.images[index]
        return replace(
            self,
            attention=other_image.attention,
            answer=other_image.answer,
            image_box=other_image.image_box,
            image_size=other_image.image_size,
            others=tuple(other.at(index) for other in self.others),
            image_index=index,
        )

    def only(self, heads: Sequence[tuple[int, int]] | None) -> AttentionMaps:
        """A copy with the maps of these heads alone, so that the others can be freed; None keeps all."""
        if heads is None or self.heads is not None:
            return self
        layers, numbers = zip(*heads, strict=True)

        def picked(maps: NDArray[np.float32]) -> NDArray[np.float32]:
            return maps[list(layers), list(numbers)][None]

        answer = None if self.answer is None else picked(self.answer)
        chosen = tuple((int(layer), int(number)) for layer, number in heads)
        images = tuple(maps.only(heads) for maps in self.images)
        return replace(self, attention=picked(self.attention), answer=answer, heads=chosen, images=images)

    def places(self, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Indices `[layer, head]` of these heads in `attention`. ValueError for a head whose maps were not kept."""
        if self.heads is None:
            return [(int(layer), int(number)) for layer, number in heads]
        kept = {head: index for index, head in enumerate(self.heads)}
        try:
            return [(0, kept[int(layer), int(number)]) for layer, number in heads]
        except KeyError as error:
            raise ValueError(f"the maps of head {error} were not kept") from None

    def named(self, *, id: str, image_file: str) -> AttentionMaps:
        """A copy with the id and the image file of its entry."""
        return replace(self, id=id, image_file=image_file)


def join_images(images: Sequence[AttentionMaps]) -> AttentionMaps:
    """The maps of a prompt with several images, from those of each; `at` the image with the most attention."""
    index = int(np.argmax([maps.attention.sum(dtype=np.float64) for maps in images]))
    return replace(images[index], images=tuple(images), image_index=index)
