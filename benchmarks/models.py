"""LLaVA models of any shape with random weights: time and memory do not depend on the weights' values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.floor import VOCABULARY, Shape
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.prompts import LLAVA_SYSTEM
from localization_heads.options.groups import ModelSpec

EXPRESSIONS = [
    "the cat on the left",
    "the red car",
    "a man in a blue shirt with a dog",
    "second giraffe from the right",
    "the table",
    "a woman holding the umbrella",
    "left zebra",
]
"""Seven expressions, about as many as RefCOCO has per image."""

QUICK = Shape(2, 64, 128, 4, 2, 32, 64, 2, side=56, patch=14)
"""Toy size for smoke tests."""


def sample_image() -> Image.Image:
    """Random noise of a typical RefCOCO image's size."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def random_llava(shape: Shape, device: torch.device, dtype: torch.dtype, *, distinct: int | None = None) -> LVLM:
    """A LLaVA with random weights, as `load_model` would return it.

    Args:
        distinct: how many decoder layers have weights of their own; the others repeat these in turn. A layer's weights
            are far larger than any CPU cache, so this saves memory but no time.
    """
    torch.manual_seed(0)
    distinct = min(shape.layers, distinct or shape.layers)
    with device:  # initialise the weights on the device
        model = LlavaForConditionalGeneration._from_config(
            _config(shape, distinct), attn_implementation="sdpa", dtype=dtype
        )
    _repeat_layers(model.model.language_model, shape.layers)
    spec = ModelSpec(name=f"random LLaVA, {shape.layers} layers of {shape.hidden}")
    return LVLM(model.eval().to(device), _processor(shape), spec, system=LLAVA_SYSTEM, conv_mode="referseg")


@contextmanager
def eager(lvlm: LVLM) -> Iterator[None]:
    """Switch the language model to eager attention, which returns attention matrices, while the block runs."""
    language_model = lvlm.model.model.language_model
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation("sdpa")


def _config(shape: Shape, layers: int) -> LlavaConfig:
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.side,
        patch_size=shape.patch,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=_tokenizer().image_token_id)


def _repeat_layers(language_model: Any, count: int) -> None:
    """Extend the model to `count` layers with copies that share the parameters of the existing ones."""
    layers = language_model.layers
    for index in range(len(layers), count):
        original = layers[index % language_model.config.num_hidden_layers]
        copy = deepcopy(original, {id(parameter): parameter for parameter in original.parameters()})
        copy.self_attn.layer_idx = index
        layers.append(copy)
    language_model.config.num_hidden_layers = count


def _processor(shape: Shape) -> LlavaProcessor:
    size = {"height": shape.side, "width": shape.side}
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": shape.side}, crop_size=size),
        _tokenizer(),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, about as many as the real tokenizer makes of these expressions."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in (LLAVA_SYSTEM, *EXPRESSIONS, ".") for word, _ in split.pre_tokenize_str(text)}
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
