"""A reference for generated answers: greedy decoding with eager attention and without a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from test_query_token import tiny_lvlm
from torch import Tensor

from localization_heads.lvlm.attention_model import SampleAttention
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.model import LVLM


class Decoded(NamedTuple):
    """The attention rows of each step `[layer, head, key]`, the answer's tokens, and the first one's log-probability.

    Row 0 is that of the last prompt token, row n that of answer token n - 1.
    """

    rows: list[Tensor]
    tokens: list[int]
    first_logprob: float

    @property
    def answer_row(self) -> Tensor | None:
        return torch.stack(self.rows[1:]).mean(0) if self.tokens else None


def decode_without_cache(
    lvlm: LVLM, image: Image.Image, expression: str, num_tokens: int, eos: tuple[int, ...] = ()
) -> Decoded:
    """Read the whole text again in every step, longer by one token."""
    inputs = dict(lvlm.model_inputs([image], [lvlm.prompt(expression)]))
    inputs.pop("labels", None)
    decodes, length = lvlm.model.config.is_encoder_decoder, inputs["input_ids"].shape[1]
    decoder_ids = [lvlm.model.config.text_config.decoder_start_token_id] if decodes else []
    rows, tokens, first_logprob = list[Tensor](), list[int](), 0.0
    with eager_attention(lvlm.model), torch.inference_mode():
        for step in range(num_tokens + 1):
            given = {**inputs, "decoder_input_ids": torch.tensor([decoder_ids])} if decodes else inputs
            with last_rows(lvlm) as seen:
                logits = lvlm.model(**given, use_cache=False).logits[0, -1]
            stacked = torch.stack([seen[layer] for layer in sorted(seen)])
            rows.append(stacked if lvlm.uses_cross_attention else stacked[..., :length])
            token = int(logits.argmax())
            if step == 0:
                first_logprob = float(torch.log_softmax(logits.float(), -1)[token])
            if token in eos:
                break
            tokens.append(token)
            decoder_ids.append(token)
            if not decodes:
                inputs = append_token(inputs, token, type_id=int(lvlm.name.startswith("paligemma")))
    return Decoded(rows, tokens[:num_tokens], first_logprob)


@contextmanager
def last_rows(lvlm: LVLM) -> Iterator[dict[int, Tensor]]:
    """By layer, the last row (H, K) of the attention weights that its module returns."""
    rows: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _args, output: rows.update({layer: output[1][0, :, -1].float()})

    hooks = [module.register_forward_hook(keep(layer)) for layer, module in lvlm.attention_modules.items()]
    yield rows
    for hook in hooks:
        hook.remove()


def append_token(inputs: dict[str, Any], token: int, type_id: int) -> dict[str, Any]:
    """`type_id`: PaliGemma's generated tokens (1) see its prompt (0), and not the other way round."""
    new = {"input_ids": token, "attention_mask": 1, "token_type_ids": type_id, "mm_token_type_ids": 0}
    longer = dict(inputs)
    for name in new.keys() & inputs:
        last = inputs[name][:, -1:]
        longer[name] = torch.cat([inputs[name], torch.full_like(last, new[name])], 1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        longer["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
    return longer


def maps_of_row(lvlm: LVLM, image: Image.Image, expression: str, row: Tensor) -> np.ndarray:
    """The maps of a row [layer, head, key] of the captured layers."""
    inputs = lvlm.model_inputs([image], [lvlm.prompt(expression)])
    full = torch.zeros(lvlm.num_layers, *row.shape[1:])
    full[sorted(lvlm.attention_modules)] = row
    views = lvlm.views_of_images(inputs, 0, image)
    return lvlm.maps(SampleAttention(full), views, image, expression, "").attention


def variant(lvlm: LVLM, **attributes: Any) -> LVLM:
    """The same loaded model with other settings."""
    twin = copy.copy(lvlm)
    vars(twin).update(attributes)
    return twin


def endless_lvlm(query_token: str, **options: Any) -> LVLM:
    """A tiny model that answers until it is stopped."""
    lvlm = tiny_lvlm(query_token, **options)
    lvlm.model.generation_config.eos_token_id = None
    # An image token that it generates could not be read again without a cache.
    lvlm.model.lm_head.weight.data[lvlm.image_token_id] = 0
    return lvlm
