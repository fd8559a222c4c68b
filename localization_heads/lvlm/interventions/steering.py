"""`steer`: draws the attention of heads towards a region of the image while a `with` block runs.

A constant is added to the attention logits of the chosen heads, from every token after the image to the image tokens
whose cells overlap the region. It is passed to the kernel (sdpa or eager) as a per-head additive attention mask; layers
without steered heads are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import Box, is_outside_image, rescale_box
from localization_heads.cells import interval_overlaps
from localization_heads.data.sources import PromptImages
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.lvlm.attention_model import AttentionModel
from localization_heads.lvlm.families.geometry import View
from localization_heads.lvlm.forward.capture import changed_masks
from localization_heads.lvlm.forward.changes import validate_heads

KERNELS = ("sdpa", "eager")
"""Attention implementations that take a mask per head."""


@contextmanager
def steer(
    lvlm: AttentionModel, heads: Iterable[Head | tuple[int, int]], region: Box, strength: float
) -> Iterator[None]:
    """Draw the attention of heads towards a region while the block runs, for everything that the model is asked.

    `strength` is added to these heads' logits, from every token after the image (the rest of the prompt, and the
    answer) to the image tokens whose cells overlap the region. That multiplies their weight relative to other tokens
    by `exp(strength)`. Captured maps are those of the steered attention.

    >>> with lh.steer(lvlm, ranking.top(3), (10, 20, 90, 80), 4.0):          # doctest: +SKIP
    ...     lvlm.attend(image, "the dog")

    The model itself is changed, also for other threads that use it. Blocks may be nested: their biases add up.

    Args:
        heads: layer and head, counted from 0.
        region: xyxy in pixels of the image; all images of a block must have one size.
        strength: in nats; a negative one draws attention away. With 0, or without heads, results are bit-identical.

    Raises:
        UsageError: the model does not have a head, its attention takes no bias for single heads, or (when the image is
            asked about) the region lies outside the image.
    """
    box = _parse_region(region)
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise UsageError(f"steer: the strength must be a finite number, not {strength!r}")
    chosen = validate_heads(heads, lvlm, "steer")
    if not chosen or strength == 0:
        yield
        return
    kernel = lvlm.model.config.get_text_config()._attn_implementation
    if kernel not in KERNELS:
        raise UsageError(
            f"steer: the attention of {lvlm.name} ({kernel}) takes no bias for single heads; load it with "
            "model.attn_implementation=sdpa or eager"
        )
    by_layer: dict[int, list[int]] = {}
    for head in chosen:
        by_layer.setdefault(head.layer, []).append(head.head)
    change = Steering(lvlm, by_layer, box, float(strength))
    masks = {lvlm.attention_modules[layer]: _mask_of(change, layer) for layer in by_layer}
    begin = lvlm.model.base_model.register_forward_pre_hook(change.begin, with_kwargs=True)
    lvlm.changes.append(change)
    try:
        with changed_masks(masks):
            yield
    finally:
        lvlm.changes.remove(change)
        begin.remove()


def _parse_region(region: Any) -> Box:
    try:
        x0, y0, x1, y1 = (float(side) for side in region)
    except (TypeError, ValueError):
        raise UsageError("steer: the region must be four numbers [x0, y0, x1, y1] in pixels") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise UsageError("steer: the region must be [x0, y0, x1, y1] with x1 > x0 and y1 > y0, in pixels")
    return x0, y0, x1, y1


def _mask_of(change: Steering, layer: int) -> Any:
    def mask(module: nn.Module, query: Tensor, key: Tensor, mask: Any, extras: Mapping[str, Any]) -> Any:
        causal = extras.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return change.mask(layer, query, key, mask, causal=bool(causal))

    return mask


class Steering:
    """The change of a model that `steer` makes.

    Args:
        heads: the heads to steer, by layer.
        region: xyxy in pixels of the image.
    """

    why_not_shared: str | None = None

    def __init__(self, lvlm: AttentionModel, heads: Mapping[int, list[int]], region: Box, strength: float) -> None:
        self.lvlm, self.heads, self.region, self.strength = lvlm, heads, region, strength
        self._image_size: tuple[int, int] | None = None
        self._in_region = torch.zeros(0, dtype=torch.bool)  # for each image token, in order
        self._current: _TokenSequence | None = None  # of the running forward pass
        self._cached: WeakKeyDictionary[Any, _TokenSequence] = WeakKeyDictionary()  # by KV cache

    def on_inputs(self, lvlm: AttentionModel, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """Find the region's tokens. All images of a block have one size, and so the same token layout."""
        for number, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise UsageError("steer: the region belongs to a single image, and the prompt has several")
            if self._image_size is not None and image.size != self._image_size:
                width, height = self._image_size
                raise UsageError(
                    f"steer: the region is in pixels of an image of {width} x {height}, and this one is "
                    f"{image.width} x {image.height}: open a block for each"
                )
            if self._image_size is None:
                original_size = getattr(image, "original_size", image.size)
                region = rescale_box(self.region, original_size, image.size)
                keys = region_keys(lvlm.views_in(inputs, number, image), region, image.size)
                self._in_region = self._mark_region(inputs["input_ids"][number], keys)
                self._image_size = image.size

    def _mark_region(self, ids: Tensor, keys: np.ndarray) -> Tensor:
        """Bool for each image token of a prompt, or for each key of cross-attention: whether it is among `keys`."""
        across = self.lvlm.uses_cross_attention
        marked = torch.zeros(int(keys.max()) + 1 if across else len(ids), dtype=torch.bool)
        marked[torch.from_numpy(keys)] = True
        return marked if across else marked[ids == self.lvlm.image_token_id]

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a forward pass: locate the region among all tokens so far. A pre-forward hook."""
        if self._image_size is None:
            raise UsageError("steer: the model inputs were prepared before the block: prepare them inside it")
        if self.lvlm.uses_cross_attention:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # `cache` from transformers 5.24 on
        if ids is None:
            raise UsageError(
                f"steer: {self.lvlm.name} is called without input_ids, so the image's tokens cannot be found"
            )
        if (ids == self.lvlm.image_token_id).any():
            self._current = self._locate(ids)
        elif cache is None:
            self._current = None  # a text without an image
        else:
            self._current = self._extend(cache, ids)
        if cache is not None and self._current is not None:
            self._cached[cache] = self._current

    def _locate(self, ids: Tensor) -> _TokenSequence:
        """The sequence of prompts (B, T) that contain the image."""
        is_image = ids.cpu() == self.lvlm.image_token_id
        counts = is_image.sum(1)
        if (counts != len(self._in_region)).any():
            raise UsageError(
                f"steer: a prompt has {int(counts.max())} image tokens, and the image of the region has "
                f"{len(self._in_region)}: open a block for each image"
            )
        region = torch.zeros_like(is_image)
        region[is_image] = self._in_region.repeat(len(ids))
        positions = torch.arange(ids.shape[1]).expand_as(is_image)
        return _TokenSequence(region, positions.masked_fill(~is_image, -1).amax(1), ids.shape[1])

    def _extend(self, cache: Any, ids: Tensor) -> _TokenSequence:
        """The sequence of tokens (B, T) that follow those in the cache."""
        before = self._cached.get(cache)
        if before is None:
            first = getattr(cache, "first_ids", None)  # the shared prefix of an encoded image
            if first is None:
                raise UsageError("steer: the KV cache was filled before the block: start inside it")
            before = self._locate(torch.tensor([first]).expand(len(ids), -1))
        return before._replace(length=before.length + ids.shape[1])

    def mask(self, layer: int, query: Tensor, key: Tensor, mask: Any, *, causal: bool) -> Any:
        """The mask of one layer with the bias added: additive, (B, H, Q, K) for `query` (B, H, Q, D).

        Args:
            causal: whether attention is causal if the kernel gets no mask.
        """
        B, H, Q, K = *query.shape[:3], key.shape[2]
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise UsageError(f"steer: the mask of {self.lvlm.name} cannot hold a bias for single heads")
        if self.lvlm.uses_cross_attention:
            steered = _slice_padded(self._in_region.expand(B, -1), 0, K)[:, None, :].expand(B, Q, K)
        elif self._current is None:  # a text without an image
            return mask
        else:
            region, last_image_token, length = self._current
            positions = torch.arange(length - Q, length)  # of the queries
            follows = positions[None, :] > last_image_token[:, None]  # (B, Q)
            # The keys are the last K tokens (a sliding window), or all tokens and free slots (a static cache).
            first_key = max(0, length - K)
            steered = follows[:, :, None] & _slice_padded(region, first_key, K)[:, None, :]
            if mask is None and causal and Q > 1:
                mask = (torch.arange(K) + first_key <= positions[:, None])[None, None].to(query.device)
        bias = torch.zeros(B, H, Q, K, dtype=query.dtype)
        bias[:, self.heads[layer]] = self.strength * steered[:, None].to(query.dtype)
        bias = bias.to(query.device)
        if mask is None:
            return bias
        mask = mask[..., :K]
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(query.dtype).min)
        return mask.to(query.dtype) + bias


class _TokenSequence(NamedTuple):
    """The tokens that the model has read so far.

    Args:
        region: bool (B, T), which tokens show the region; later tokens do not.
        last_image_token: (B,) index of the image's last token.
        length: number of tokens.
    """

    region: Tensor
    last_image_token: Tensor
    length: int


def _slice_padded(region: Tensor, start: int, length: int) -> Tensor:
    """(B, length) of a mask (B, T) from `start` on, padded with False."""
    return nn.functional.pad(region[:, start : start + length], (0, max(0, start + length - region.shape[1])))


def region_keys(views: Sequence[View], region: Box, image_size: tuple[int, int]) -> np.ndarray:
    """The keys of all cells, of every view, that overlap a box in pixels of the image.

    Raises:
        UsageError: the box lies outside the image, or in a part of it that no token covers.
    """
    x0, y0, x1, y1 = region
    written = ", ".join(f"{side:g}" for side in region)
    if is_outside_image(region, image_size):
        raise UsageError(
            f"steer: the region [{written}] lies outside the image, which is {image_size[0]} x {image_size[1]} pixels"
        )
    found = [
        view.index[
            np.ix_(
                interval_overlaps(view.y_edges, np.array([y0, y1]))[:, 0] > 0,
                interval_overlaps(view.x_edges, np.array([x0, x1]))[:, 0] > 0,
            )
        ].ravel()
        for view in views
    ]
    keys = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.intp)
    if not keys.size:
        raise UsageError(
            f"steer: the region [{written}] lies in a part of the image that the model does not see (its processor "
            "crops)"
        )
    return keys
