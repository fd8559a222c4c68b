"""The shared prefix of all prompts about one image, as a KV cache that any number of prompts can continue.

The prefill fills a cache of transformers, which is read-only from then on: each batch of suffixes gets a cache of its
own, whose layers expose the prefix to every prompt and keep nothing of what follows. So several threads can share a
prefix, and a layer's concatenated keys and values are freed as soon as its attention is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from localization_heads.lvlm.families.table import family_of

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Processor outputs with an entry for each token, `[B, T, ...]`."""


def why_not_shared(config: Any) -> str | None:
    """Return why a model cannot encode an image once for all expressions; None if it can.

    Follows from the configuration: from the family (`Family.why_not_shared`) and from options of its decoder.
    """
    if reason := family_of(config).why_not_shared:
        return reason
    if config.is_encoder_decoder:
        return "its encoder reads image and expression together"
    text = config.get_text_config()
    if any(type(layer) not in _LAYERS for layer in DynamicCache(config=text).layers):
        return "its cache has layers of an unknown kind"
    return None


def max_shareable_length(config: Any) -> float:
    """Return the maximum length, in tokens, of prompts that can share a prefix; infinite for most models.

    Beyond the trained length, `dynamic` rotary frequencies (InternVL 3) depend on the length of the whole prompt, so
    that prompts of different lengths have different keys. `longrope` switches to other frequencies there.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    length_dependent = [
        part for part in (rope, *rope.values()) if isinstance(part, Mapping) and _depends_on_length(part)
    ]
    trained = getattr(text, "max_position_embeddings", None) or 0
    limits = [min(trained, part.get("original_max_position_embeddings") or trained) for part in length_dependent]
    return min(limits) - 1 if limits else math.inf


def _depends_on_length(rope: Mapping[str, Any]) -> bool:
    """Whether frequencies depend on the prompt's length; those of `longrope` may be equal for short and long ones."""
    if rope.get("rope_type") == "longrope":
        return bool(rope["long_factor"] != rope["short_factor"])
    return rope.get("rope_type") == "dynamic"


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the model has computed for the first tokens of a prompt.

    Args:
        ids: token ids, including the image's.
        layers: the cache layers of the language model; those above `depth` are empty.
        depth: the deepest layer that was run.
        can_be_cut: whether every layer caches exactly one entry per token. Recurrent layers cache a state instead, and
            cross-attention the image's keys.
    """

    ids: list[int]
    layers: list[Any]
    depth: int
    can_be_cut: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in _tensors(layer))

    def cache(self, batch_size: int, length: int, *, grows: bool = False) -> Cache:
        """Return a cache for prompts that continue the first `length` tokens of the prefix.

        Args:
            grows: keep later tokens as well, as generation requires.
        """
        kept = length if self.can_be_cut else None
        layer_class = GrowingLayer if grows else SharedLayer
        cache = Cache(layers=[_batch_layer(layer, batch_size, kept, layer_class) for layer in self.layers])
        cache.first_ids = self.ids[:length]  # type: ignore[attr-defined]  # `steering` finds the image in them
        return cache


class GrowingLayer(DynamicLayer):
    """Cache layer that starts with the prefix, expanded to a batch, and keeps all later tokens.

    Growing makes new tensors: the prefix itself is not changed.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.prefix = keys, values  # each (B, H, P, D), expanded without a copy
        self.keys, self.values = keys, values


class SharedLayer(GrowingLayer):
    """Cache layer that shows later tokens to the attention that adds them, but does not keep them."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


DummyLayer: Any = getattr(cache_utils, "DummyLayer", None) or type("DummyLayer", (DynamicLayer,), {})
"""Cache layer of decoder layers without keys. Missing before transformers 5.23."""

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)


def recording_cache(config: Any) -> DynamicCache:
    """Return an empty cache that keeps all tokens, including those outside a sliding window."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers]
    return cache


def _batch_layer(layer: Any, batch_size: int, length: int | None, layer_class: type[GrowingLayer]) -> Any:
    """Return a layer of the prefix's cache for a batch."""
    if isinstance(layer, LinearAttentionLayer):
        return _copy_state(layer, batch_size)
    if isinstance(layer, DummyLayer) or not layer.is_initialized:
        # A layer without keys, or above the deepest one that was run.
        return type(layer)()
    keys, values = (t[:, :, :length].expand(batch_size, -1, -1, -1) for t in (layer.keys, layer.values))
    return layer_class(keys, values)


def _copy_state(layer: LinearAttentionLayer, batch_size: int) -> LinearAttentionLayer:
    """Copy a recurrent layer for a batch, since it updates its state in place."""
    copied = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = {key: state for key, state in value.items() if isinstance(state, Tensor)}
            batched = {key: state.repeat_interleave(batch_size, 0) for key, state in states.items()}
            setattr(copied, name, {**value, **batched})
    return copied


def _tensors(layer: Any) -> list[Tensor]:
    states = [t for value in vars(layer).values() if isinstance(value, dict) for t in value.values()]
    values = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [value for value in values if isinstance(value, Tensor)]


def take_prefix(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Cut the inputs of one prompt to its first tokens; inputs that belong to the image stay whole."""
    return {name: t[:, :length] if name in TOKEN_INPUTS else t for name, t in inputs.items()}


def batch_suffixes(prompts: Sequence[Mapping[str, Any]], start: int) -> dict[str, Any]:
    """Return the tokens after the first `start` of each prompt, as a batch.

    Shorter suffixes are padded on the right with their own last token: attention is causal, so no mask is needed.
    """
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    names = [name for name in ("input_ids", "cross_attention_mask") if name in prompts[0]]
    return {name: torch.cat([_pad_with_last(prompt[name], length)[:, start:] for prompt in prompts]) for name in names}


def _pad_with_last(tokens: Tensor, length: int) -> Tensor:
    """(1, T, ...) to (1, length, ...), repeating the last entry."""
    missing = length - tokens.shape[1]
    return torch.cat([tokens, *[tokens[:, -1:]] * missing], 1)


def rotary_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return (3, 1, T) rotary positions in time, height and width of one prompt; None for models with 1-D positions."""
    get_rope_index = getattr(model.base_model, "get_rope_index", None)
    if get_rope_index is None:
        return None
    names = signature(get_rope_index).parameters
    positions: Tensor = get_rope_index(**{name: value for name, value in inputs.items() if name in names})[0]
    return positions
