"""Tiny random models of every family, built from `family_recipes` with the family's real processor."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from family_recipes import RECIPES, Part, Recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from localization_heads.lvlm.checkpoints.processors import use_pillow, without_video
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec

WORDS = "the red car dog left in this image here is original and are some crops to help you see better . : ,"
FAMILY_NAMES = sorted(RECIPES)
NEEDS_TORCHVISION = {
    *("cohere2_vision", "fast_vlm", "fuyu", "gemma4_unified", "inkling2", "inkling_mm_model"),
    *("kimi_k25", "lfm2_vl", "lighton_ocr", "llama4", "minicpm_ocr", "mistral3", "molmo2"),
    *("muse_glimmer", "muse_spark", "perception_lm", "pixtral", "unlimited_ocr"),
}
"""Families whose processors exist for torchvision only, or whose Pillow version fails (Fuyu)."""
NEEDS_TIMM = {"fast_vlm", "gemma3n", "perception_lm"}


@cache
def tiny(name: str) -> LVLM:
    """The tiny model of a family; skips the test if a package is missing that transformers needs for it."""
    if name in NEEDS_TORCHVISION and not is_torchvision_available():
        pytest.skip(f"the processor of {name} needs torchvision")
    if name in NEEDS_TIMM:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    processor, model = build(RECIPES[name])
    processor.image_processor = use_pillow(processor.image_processor)  # as `load_model` does
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
                parameter.normal_(0, 0.25)  # sharper than usual: uniform attention would hide mistakes
            elif not parameter.any():  # gates that start closed
                parameter.normal_(0, 0.1)
    return LVLM(model.eval(), processor, ModelSpec(name), system="", conv_mode="plain")


def build(recipe: Recipe) -> tuple[Any, Any]:
    """Return processor and model."""
    recipe = deepcopy(recipe)  # transformers changes options in place
    tokenizer = build_tokenizer(recipe)
    parts = {"image_processor": create(recipe.images, "ImageProcessor"), "tokenizer": tokenizer}
    if recipe.sound:
        parts["feature_extractor"] = create(recipe.sound)
    if recipe.video:
        parts["video_processor"] = create(recipe.video)
    processor_class = getattr(hf, f"{recipe.processor_prefix or recipe.prefix}Processor")
    if not recipe.video and any("video" in name for name in processor_class.get_attributes()):
        processor_class = without_video(processor_class)
    processor = processor_class(**parts, **recipe.processor)

    vision = {} if recipe.vision is None else {"vision_config": recipe.vision}
    config = getattr(hf, f"{recipe.prefix}Config")(
        text_config=recipe.text, **vision, **token_ids(tokenizer, recipe), **recipe.config
    )
    model_class = getattr(hf, recipe.model_class or f"{recipe.prefix}ForConditionalGeneration")
    model = model_class(config)
    if recipe.finish:
        model = recipe.finish(processor, model) or model
    return processor, model


def create(part: Part, suffix: str = "") -> Any:
    name, options = part
    return getattr(hf, name + suffix)(**options)


def build_tokenizer(recipe: Recipe) -> Any:
    """A tokenizer of whole words, with the recipe's special tokens."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(recipe.named),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(recipe.tokens)})
    if recipe.adapt_tokenizer:
        recipe.adapt_tokenizer(tokenizer)
    return tokenizer


def token_ids(tokenizer: Any, recipe: Recipe) -> dict[str, Any]:
    """The fields of the configuration that hold token ids."""
    ids = {}
    for entry in recipe.ids:
        name, _, token = entry.partition("=")
        tokens: Any = token or recipe.named[re.sub("_(id|index)$", "", name)]
        ids[name] = tokenizer.convert_tokens_to_ids(tokens.split() if name.endswith("_ids") else tokens)
    return ids
