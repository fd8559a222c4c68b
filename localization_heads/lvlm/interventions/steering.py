"""Heads steered: their attention is drawn towards a region of the image while a `with` block runs.

A constant is added to the logits of chosen heads, before the softmax: from every token after the image to the image
tokens whose cells overlap the region. It comes through the attention mask, which has then an entry for each head, so
the kernel stays what it is (sdpa or eager); layers without such heads are not touched.
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
from localization_heads.lvlm.families.geometry import View
from localization_heads.lvlm.forward.capture import changed_masks
from localization_heads.lvlm.forward.changes import resolve_heads
from localization_heads.lvlm.loaded import LoadedModel

KERNELS = ("sdpa", "eager")
"""Attention functions that take a mask with an entry for each head."""


class _Tokens(NamedTuple):
    """What is known of the tokens read so far.

    Args:
        region: (B, T) which of the first tokens show the region.
        last: (B,) the place of the image's last token.
        total: how many there are.
    """

    region: Tensor
    last: Tensor
    total: int


class Steering:
    """The change that `steer` makes.

    Args:
        heads: by layer, the heads' numbers.
        region: xyxy in pixels of the image.
    """

    why_not_shared: str | None = None

    def __init__(
        self, lvlm: LoadedModel, heads: Mapping[int, list[int]], region: Box, strength: float
    ) -> None:
        self.lvlm, self.heads, self.region, self.strength = lvlm, heads, region, strength
        self._size: tuple[int, int] | None = None
        self._chosen = torch.zeros(0, dtype=torch.bool)  # of the image's tokens, in their order
        self._now: _Tokens | None = None
        self._read: WeakKeyDictionary[Any, _Tokens] = WeakKeyDictionary()  # by cache

    def on_inputs(self, lvlm: LoadedModel, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """Find the region's tokens. All images of a block are of one size, and so have their tokens alike."""
        for number, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise UsageError("steer: the region is one of a single image, and the prompt shows several")
            if self._size is not None and image.size != self._size:
                wide, high = self._size
                raise UsageError(
                    f"steer: the region is in pixels of an image of {wide} x {high}, and this one is "
                    f"{image.width} x {image.height}: open a block for each"
                )
            if self._size is None:
                before = getattr(image, "original_size", image.size)
                region = rescale_box(self.region, before, image.size)
                chosen = region_keys(lvlm.views_in(inputs, number, image), region, image.size)
                self._chosen = self._in_order(inputs["input_ids"][number], chosen)
                self._size = image.size

    def _in_order(self, ids: Tensor, keys: np.ndarray) -> Tensor:
        """Of a prompt's image tokens, or of all keys of cross-attention, those that show the region."""
        if self.lvlm.uses_cross_attention:
            chosen = torch.zeros(int(keys.max()) + 1, dtype=torch.bool)
            chosen[torch.from_numpy(keys)] = True
            return chosen
        marked = torch.zeros(len(ids), dtype=torch.bool)
        marked[torch.from_numpy(keys)] = True
        return marked[ids == self.lvlm.image_token_id]

    def begin(self, _: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Before a forward pass: where among all tokens so far the region is."""
        if self._size is None:
            raise UsageError("steer: what the model reads was made ready before the block: ask inside it")
        if self.lvlm.uses_cross_attention:
            return
        ids = named.get("input_ids", given[0] if given else None)
        cache = named.get("cache", named.get("past_key_values"))  # the first from transformers 5.24 on
        if ids is None:
            raise UsageError(
                f"steer: {self.lvlm.name} is not given tokens, among which the image could be found"
            )
        if (ids == self.lvlm.image_token_id).any():
            self._now = self._located(ids)
        elif cache is None:
            self._now = None  # a text without an image
        else:
            self._now = self._continued(cache, ids)
        if cache is not None and self._now is not None:
            self._read[cache] = self._now

    def _located(self, ids: Tensor) -> _Tokens:
        """Of prompts (B, T) with their image."""
        found = ids.cpu() == self.lvlm.image_token_id
        counts = found.sum(1)
        if (counts != len(self._chosen)).any():
            raise UsageError(
                f"steer: a prompt has {int(counts.max())} image tokens, and the image of the region has "
                f"{len(self._chosen)}: open a block for each image"
            )
        region = torch.zeros_like(found)
        region[found] = self._chosen.repeat(len(ids))
        places = torch.arange(ids.shape[1]).expand_as(found)
        return _Tokens(region, places.masked_fill(~found, -1).amax(1), ids.shape[1])

    def _continued(self, cache: Any, ids: Tensor) -> _Tokens:
        """Of tokens (B, T) that follow those in the cache."""
        before = self._read.get(cache)
        if before is None:
            first = getattr(cache, "first_ids", None)  # an encoded image's, seen by the whole batch
            if first is None:
                raise UsageError("steer: the model goes on from what it read before the block: ask inside it")
            before = self._located(torch.tensor([first]).expand(len(ids), -1))
        return before._replace(total=before.total + ids.shape[1])

    def mask(self, layer: int, query: Tensor, key: Tensor, mask: Any, *, causal: bool) -> Any:
        """The mask of one layer with the bias in it: additive, (B, H, Q, K) for `query` (B, H, Q, D).

        Args:
            causal: what holds where the kernel gets no mask.
        """
        B, H, Q, K = *query.shape[:3], key.shape[2]
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise UsageError(f"steer: the mask of {self.lvlm.name} cannot hold a bias for single heads")
        if self.lvlm.uses_cross_attention:
            towards = _cut(self._chosen.expand(B, -1), 0, K)[:, None, :].expand(B, Q, K)
        elif self._now is None:  # a text without an image
            return mask
        else:
            region, last, total = self._now
            own = torch.arange(total - Q, total)
            asks = own[None, :] > last[:, None]  # (B, Q)
            # The keys are the last of all tokens (a sliding window), or all and room for more (a static cache).
            towards = asks[:, :, None] & _cut(region, max(0, total - K), K)[:, None, :]
            if mask is None and causal and Q > 1:
                mask = (torch.arange(K) + max(0, total - K) <= own[:, None])[None, None].to(query.device)
        bias = torch.zeros(B, H, Q, K, dtype=query.dtype)
        bias[:, self.heads[layer]] = self.strength * towards[:, None].to(query.dtype)
        bias = bias.to(query.device)
        if mask is None:
            return bias
        mask = mask[..., :K]
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(query.dtype).min)
        return mask.to(query.dtype) + bias


def _cut(region: Tensor, start: int, length: int) -> Tensor:
    """(B, length) of a region (B, T) from `start` on; later tokens do not show it."""
    return nn.functional.pad(region[:, start : start + length], (0, max(0, start + length - region.shape[1])))


def region_keys(views: Sequence[View], region: Box, image_size: tuple[int, int]) -> np.ndarray:
    """The keys of all cells, of every view, that overlap a box in pixels of the image.

    Raises:
        UsageError: the box lies outside the image, or where no image token is.
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


def _box(region: Any) -> Box:
    try:
        x0, y0, x1, y1 = (float(side) for side in region)
    except (TypeError, ValueError):
        raise UsageError("steer: the region must be four numbers [x0, y0, x1, y1] in pixels") from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise UsageError("steer: the region must be [x0, y0, x1, y1] with x1 > x0 and y1 > y0, in pixels")
    return x0, y0, x1, y1


@contextmanager
def steer(
    lvlm: LoadedModel, heads: Iterable[Head | tuple[int, int]], region: Box, strength: float
) -> Iterator[None]:
    """Draw the attention of heads towards a region while the block runs, for everything that the model is asked.

    `strength` is added to the logits of these heads, from every token after the image (the rest of the prompt, and
    the answer) to the image tokens whose cells overlap the region: each of them gets `exp(strength)` times the weight
    that it had against the others. Captured maps are those of the steered attention.

    >>> with lh.steer(lvlm, ranking.top(3), (10, 20, 90, 80), 4.0):          # doctest: +SKIP
    ...     lvlm.attend(image, "the dog")

    The model itself is changed, so for other threads that use it, too. Blocks may be nested: their biases add up.

    Args:
        heads: layer and head, counted from 0.
        region: xyxy in pixels of the image that is asked about; all images of a block are of one size.
        strength: in nats; negative ones draw it away. 0, or no head, changes nothing, to the last bit.

    Raises:
        UsageError: the model does not have a head, its attention takes no bias for single heads, or (when the image is
            asked about) the region lies outside the image.
    """
    box = _box(region)
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise UsageError(f"steer: the strength must be a finite number, not {strength!r}")
    chosen = resolve_heads(heads, lvlm, "steer")
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


def _mask_of(change: Steering, layer: int) -> Any:
    def mask(module: nn.Module, query: Tensor, key: Tensor, mask: Any, extras: Mapping[str, Any]) -> Any:
        causal = extras.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return change.mask(layer, query, key, mask, causal=bool(causal))

    return mask
