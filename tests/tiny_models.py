"""Small random LLaVA models with the real processors, for tests of what does not depend on training."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "red", "car", "dog", "left", "in", "this", "image", ".", ",", "?"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llava_config(*, side: int = 48, patch: int = 8, text: str = "llama", **text_options: Any) -> LlavaConfig:
    """Two KV heads for four query heads, so that grouped-query attention is exercised."""
    text_config = dict(
        model_type=text,
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        **text_options,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=tokenizer().image_token_id,
        vision_feature_layer=-1,
    )


def llava_model(*, seed: int = 0, attention: str = "sdpa", **options: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(llava_config(**options), attn_implementation=attention)
    with torch.no_grad():  # sharper than the usual initialisation: uniform attention would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(0, 0.25)
    return model.eval()


def llava_processor(*, side: int = 48, patch: int = 8, mode: str = "crop") -> LlavaProcessor:
    """`mode`: crop (llava-hf's default), pad (the original LLaVA) or squeeze (resizing without the aspect)."""
    size = {"height": side, "width": side}
    if mode == "pad":
        images: Any = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size=size, do_pad=True)
    elif mode == "crop":
        images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)
    else:
        images = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_llava(folder: str | Path) -> Path:
    """Save a random LLaVA with `save_pretrained`."""
    llava_model().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return Path(folder)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the settings in a JSON file of a checkpoint."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def save_overflowing(folder: Path) -> Path:
    """Save a checkpoint whose attention is NaN if the expression has the word dog, as after an overflow."""
    model = llava_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids("dog")] = float("inf")
    model.save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder
