"""The shared prefix of all prompts about one image, as a key-value cache that any number of prompts can continue.

While the model reads the prefix, its keys and values are recorded in transformers' own cache. After that they are
only read: each batch of suffixes gets a cache of its own, whose layers show the prefix to every prompt and keep
nothing of what follows. So one prefix can serve several threads, and a layer's copies live no longer than the
computation of its attention.
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

SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
"""Outputs of processors `[B, T, ...]` that have an entry for each token."""


def why_not_shared(config: Any) -> str | None:
    """Why the images of such a model cannot be encoded once for all expressions; None if they can.

    Follows from the configuration alone: from the family (`Family.why_not_shared`) and from decoder options.
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
    """Tokens that a prompt may have at most if its prefix is to be that of any other prompt; infinite for most models.

    `dynamic` rotary frequencies are as if there were none up to the length that the model was trained for, and depend
    on the length of the whole prompt beyond it (InternVL 3). `longrope` has other ones beyond its original length.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [
        part for part in (rope, *rope.values()) if isinstance(part, Mapping) and _depends_on_length(part)
    ]
    trained = getattr(text, "max_position_embeddings", None) or 0
    limits = [min(trained, part.get("original_max_position_embeddings") or trained) for part in parts]
    return min(limits) - 1 if limits else math.inf


def _depends_on_length(rope: Mapping[str, Any]) -> bool:
    """`longrope` has factors for long and for short prompts; where they are the same, it is a list of frequencies."""
    if rope.get("rope_type") == "longrope":
        return bool(rope["long_factor"] != rope["short_factor"])
    return rope.get("rope_type") == "dynamic"


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the model has computed for the first tokens of a prompt.

    Args:
        ids: the tokens, the image's included.
        layers: a cache layer for each layer of the language model up to the deepest one that was run.
        depth: that layer.
        can_be_cut: whether every layer keeps one entry per token, and nothing else: recurrent layers keep only a
            state, cross-attention the image's keys.
    """

    ids: list[int]
    layers: list[Any]
    depth: int
    can_be_cut: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in _tensors(layer))

    def cache(self, batch_size: int, length: int, *, grows: bool = False) -> Cache:
        """For prompts that continue the first `length` tokens of the prefix.

        Args:
            grows: later tokens are kept as well, as generation needs it.
        """
        kept, kind = length if self.can_be_cut else None, GrowingLayer if grows else SharedLayer
        cache = Cache(layers=[_continued(layer, batch_size, kept, kind) for layer in self.layers])
        cache.first_ids = self.ids[:length]  # type: ignore[attr-defined]  # tells a steered model where the image is
        return cache


class GrowingLayer(DynamicLayer):
    """Keys and values of the prefix, for a batch, and those of all later tokens. The prefix itself stays as it is."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.prefix = keys, values  # each (B, H, P, D), one prefix seen B times


class SharedLayer(GrowingLayer):
    """The same, but later tokens, which are attended to as well, are not kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


DummyLayer: Any = getattr(cache_utils, "DummyLayer", None) or type("DummyLayer", (DynamicLayer,), {})
"""Of layers without keys, as some families have. Before transformers 5.23 there is none."""

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)


def recording_cache(config: Any) -> DynamicCache:
    """An empty cache that keeps all tokens, where transformers' own would forget those outside a sliding window."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers
    ]
    return cache


def _continued(layer: Any, batch_size: int, length: int | None, kind: type[GrowingLayer]) -> Any:
    """The layer for a batch. Those above the deepest one that was run are empty, and will not be run either."""
    if isinstance(layer, LinearAttentionLayer):
        return _state_copy(layer, batch_size)
    if isinstance(layer, DummyLayer) or not layer.is_initialized:
        return type(layer)()
    keys, values = (t[:, :, :length].expand(batch_size, -1, -1, -1) for t in (layer.keys, layer.values))
    return kind(keys, values)


def _state_copy(layer: LinearAttentionLayer, batch_size: int) -> LinearAttentionLayer:
    """Recurrent layers write into their states: each batch gets its own."""
    twin = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = {key: state for key, state in value.items() if isinstance(state, Tensor)}
            own = {key: state.repeat_interleave(batch_size, 0) for key, state in states.items()}
            setattr(twin, name, {**value, **own})
    return twin


def _tensors(layer: Any) -> list[Tensor]:
    states = [t for value in vars(layer).values() if isinstance(value, dict) for t in value.values()]
    own = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [tensor for tensor in own if isinstance(tensor, Tensor)]


def take_prefix(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The inputs of one prompt cut to its first tokens, with everything that belongs to its image."""
    return {name: t[:, :length] if name in SEQUENCES else t for name, t in inputs.items()}


def batch_suffixes(prompts: Sequence[Mapping[str, Any]], start: int) -> dict[str, Any]:
    """What follows the first `start` tokens of each prompt, as a batch.

    Shorter ones are padded on the right with their own last token: attention is causal, so no mask is needed.
    """
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    names = [name for name in ("input_ids", "cross_attention_mask") if name in prompts[0]]
    return {
        name: torch.cat([_padded(prompt[name], longest)[:, start:] for prompt in prompts]) for name in names
    }


def _padded(tokens: Tensor, length: int) -> Tensor:
    """(1, T, ...) with its last entry repeated up to `length`."""
    missing = length - tokens.shape[1]
    return torch.cat([tokens, *[tokens[:, -1:]] * missing], 1)


def rotary_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """(3, 1, T) rotary positions in time, height and width of one prompt; None for models that only count tokens."""
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None:
        return None
    names = signature(index).parameters
    positions: Tensor = index(**{name: value for name, value in inputs.items() if name in names})[0]
    return positions
