"""Tiny random models of every family, from configs, with the family's real processor around a tiny tokenizer.

The image geometry (sizes, patches, tiles) is that of the family's checkpoints or a smaller one of the same kind;
widths and depths are as small as the architectures allow. A builder returns (processor, model).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from localization_heads.lvlm.checkpoints.processors import use_pillow, without_video
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec

WORDS = "the red car dog left in this image here is original and are some crops to help you see better . : ,"
VOCABULARY = 400

BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {}
NEEDS_TORCHVISION = {
    "cohere2_vision",
    "fast_vlm",
    "fuyu",
    "gemma4_unified",
    "inkling2",
    "inkling_mm_model",
    "kimi_k25",
    "lfm2_vl",
    "lighton_ocr",
    "llama4",
    "minicpm_ocr",
    "mistral3",
    "molmo2",
    "muse_glimmer",
    "muse_spark",
    "perception_lm",
    "pixtral",
    "unlimited_ocr",
}
"""Families whose processors transformers has for torchvision only, or whose others fail (Fuyu)."""
NEEDS_TIMM = {"fast_vlm", "gemma3n", "perception_lm"}


def family(builder: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    BUILDERS[builder.__name__] = builder
    return builder


@cache
def tiny(name: str) -> LVLM:
    """The tiny model of a family; skips the test where a package is missing that transformers needs for it."""
    if name in NEEDS_TORCHVISION and not is_torchvision_available():
        pytest.skip(f"the processor of {name} needs torchvision")
    if name in NEEDS_TIMM:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    processor, model = BUILDERS[name]()
    processor.image_processor = use_pillow(processor.image_processor)  # as `load_model` does
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
                parameter.normal_(0, 0.25)  # sharper than usual: uniform attention would hide mistakes
            elif not parameter.any():  # gates that start closed
                parameter.normal_(0, 0.1)
    return LVLM(model.eval(), processor, ModelSpec(name), system="", conv_mode="plain")


def tokenizer(tokens: list[str] | None = None, **named: str) -> Any:
    """Words, and special tokens: plain ones, and those that processors ask for by name."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": tokens or []})
    return made


def ids(made: Any, **tokens: str) -> dict[str, int]:
    """Config fields from token texts."""
    return {field: made.convert_tokens_to_ids(token) for field, token in tokens.items()}


def text(model_type: str | None = None, **options: Any) -> dict[str, Any]:
    """A language model of two layers, four query heads and two KV heads."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**config, **({"model_type": model_type} if model_type else {}), **options}


def tower(model_type: str | None, side: Any, patch: Any, **options: Any) -> dict[str, Any]:
    """A vision tower of one layer."""
    config = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }
    return {**config, **({"model_type": model_type} if model_type else {}), **options}


def clip(side: int, patch: int) -> dict[str, Any]:
    return tower("clip_vision_model", side, patch, num_hidden_layers=2, projection_dim=16)


def siglip(side: int, patch: int) -> dict[str, Any]:
    return tower("siglip_vision_model", side, patch, vision_use_head=False)


def square_size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava_like(prefix: str, ip: Any, language_model: str = "llama", **options: Any) -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>")
    settings = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    processor_class = hf.LlavaNextProcessor if prefix == "LlavaNext" else hf.LlavaProcessor
    config = getattr(hf, f"{prefix}Config")(
        vision_config=clip(336, 14),
        text_config=text(language_model),
        image_token_index=t.image_token_id,
        **options,
    )
    return processor_class(ip, t, **settings), getattr(hf, f"{prefix}ForConditionalGeneration")(config)


@family
def llava() -> tuple[Any, Any]:
    ip = hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=square_size(336))
    return llava_like("Llava", ip)


@family
def llava_padded() -> tuple[Any, Any]:
    ip = hf.LlavaImageProcessor(size={"shortest_edge": 336}, crop_size=square_size(336), do_pad=True)
    return llava_like("Llava", ip)


@family
def llava_siglip() -> tuple[Any, Any]:
    """LLaVA-Interleave: 27 patches of 14 pixels cover 378 of 384."""
    t = tokenizer(image_token="<image>")
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessor(size=square_size(384)),
        t,
        patch_size=14,
        vision_feature_select_strategy="full",
    )
    config = hf.LlavaConfig(
        vision_config=siglip(384, 14),
        text_config=text("qwen2"),
        image_token_index=t.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return processor, hf.LlavaForConditionalGeneration(config)


@family
def vipllava() -> tuple[Any, Any]:
    ip = hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=square_size(336))
    return llava_like("VipLlava", ip, vision_feature_layers=[-2, -1])


@family
def llava_next() -> tuple[Any, Any]:
    ip = hf.LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=square_size(336))
    return llava_like("LlavaNext", ip, "mistral")


@family
def llava_onevision() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>", video_token="<video>")
    processor = without_video(hf.LlavaOnevisionProcessor)(
        hf.LlavaOnevisionImageProcessor(), t, num_image_tokens=729, vision_feature_select_strategy="full"
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(384, 14),
        text_config=text("qwen2"),
        image_token_index=t.image_token_id,
        video_token_index=t.video_token_id,
    )
    return processor, hf.LlavaOnevisionForConditionalGeneration(config)


def qwen_like(
    prefix: str, processor: Any, patch: int, language_model: dict, **vision: Any
) -> tuple[Any, Any]:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    t = tokenizer(**names, **marks)
    most = 400 * (2 * patch) ** 2
    ip = hf.Qwen2VLImageProcessor(patch_size=patch, size={"shortest_edge": 3136, "longest_edge": most})
    config = getattr(hf, f"{prefix}Config")(
        text_config=language_model,
        vision_config=dict(depth=1, patch_size=patch, num_heads=1, **vision),
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
        vision_start_token_id=t.vision_start_token_id,
        vision_end_token_id=t.vision_end_token_id,
    )
    return without_video(processor)(ip, t), getattr(hf, f"{prefix}ForConditionalGeneration")(config)


def mrope(*sections: int, **options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **options}


@family
def qwen2_vl() -> tuple[Any, Any]:
    language_model = text(rope_parameters=mrope(1, 1, 2))
    return qwen_like(
        "Qwen2VL", hf.Qwen2VLProcessor, 14, language_model, embed_dim=16, hidden_size=32, mlp_ratio=1
    )


@family
def qwen2_5_vl() -> tuple[Any, Any]:
    return qwen_like(
        "Qwen2_5_VL",
        hf.Qwen2_5_VLProcessor,
        14,
        text(rope_parameters=mrope(1, 1, 2)),
        hidden_size=16,
        out_hidden_size=32,
        intermediate_size=16,
        fullatt_block_indexes=[5],
        window_size=112,
    )


QWEN3_TOWER = {
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 16,
    "num_position_embeddings": 64,
}


@family
def qwen3_vl() -> tuple[Any, Any]:
    language_model = text(head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True))
    tower_options = dict(QWEN3_TOWER, deepstack_visual_indexes=[0])
    return qwen_like("Qwen3VL", hf.Qwen3VLProcessor, 16, language_model, **tower_options)


@family
def qwen3_5() -> tuple[Any, Any]:
    """Three layers of linear attention, which has no heads to read, to one of full attention."""
    language_model = text(
        num_hidden_layers=4,
        head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        rope_parameters=mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
    )
    return qwen_like("Qwen3_5", hf.Qwen3VLProcessor, 16, language_model, **QWEN3_TOWER)


def glm_like(prefix: str, processor: Any, images: Any, **language_model: Any) -> tuple[Any, Any]:
    marks = ["begin_of_image", "end_of_image", "begin_of_video", "end_of_video"]
    t = tokenizer([f"<|{mark}|>" for mark in marks], image_token="<|image|>", video_token="<|video|>")
    ip = images(size={"shortest_edge": 12544, "longest_edge": 400 * 28 * 28})
    rope = mrope(1, 1, 2, partial_rotary_factor=0.5)
    config = getattr(hf, f"{prefix}Config")(
        text_config=text(head_dim=16, rope_parameters=rope, **language_model),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 1,
            "patch_size": 14,
            "intermediate_size": 16,
            "image_size": 336,
        },
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
        **ids(t, image_start_token_id="<|begin_of_image|>", image_end_token_id="<|end_of_image|>"),
        **ids(t, video_start_token_id="<|begin_of_video|>", video_end_token_id="<|end_of_video|>"),
    )
    return without_video(processor)(ip, t), getattr(hf, f"{prefix}ForConditionalGeneration")(config)


@family
def glm4v() -> tuple[Any, Any]:
    return glm_like("Glm4v", hf.Glm4vProcessor, hf.Glm4vImageProcessor)


@family
def deepseek_vl() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image_placeholder>")
    processor = hf.DeepseekVLProcessor(hf.DeepseekVLImageProcessor(), t, num_image_tokens=576)
    config = hf.DeepseekVLConfig(
        text_config=text("llama"), vision_config=siglip(384, 16), image_token_id=t.image_token_id
    )
    return processor, hf.DeepseekVLForConditionalGeneration(config)


@family
def deepseek_vl_hybrid() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image_placeholder>")
    ip = hf.DeepseekVLHybridImageProcessor(size=square_size(128), high_res_size=square_size(256))
    sam = {
        "hidden_size": 16,
        "output_channels": 8,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "num_pos_feats": 4,
    }
    config = hf.DeepseekVLHybridConfig(
        text_config=text("llama"),
        vision_config=siglip(128, 16),
        high_res_vision_config=tower("sam_vision_model", 256, 16, **sam),
        image_token_id=t.image_token_id,
    )
    processor = hf.DeepseekVLHybridProcessor(ip, t, num_image_tokens=64)
    return processor, hf.DeepseekVLHybridForConditionalGeneration(config)


@family
def janus() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    processor = hf.JanusProcessor(hf.JanusImageProcessor(), t, num_image_tokens=576)
    vision = dict(tower(None, 384, 16), mlp_ratio=2, projection_dim=32, num_image_tokens=576)
    del vision["intermediate_size"]
    quantiser = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    }
    config = hf.JanusConfig(
        text_config=text("llama"), vision_config=vision, vq_config=quantiser, image_token_id=t.image_token_id
    )
    return processor, hf.JanusForConditionalGeneration(config)


def paligemma_of(language_model: str, **options: Any) -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>")
    ip = hf.SiglipImageProcessor(size=square_size(224))
    ip.image_seq_length = 256
    config = hf.PaliGemmaConfig(
        text_config=text(language_model, head_dim=16, **options),
        vision_config=siglip(224, 14),
        image_token_index=t.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaProcessor(ip, t), hf.PaliGemmaForConditionalGeneration(config)


@family
def paligemma() -> tuple[Any, Any]:
    return paligemma_of("gemma")


@family
def paligemma2() -> tuple[Any, Any]:
    options = {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    processor, model = paligemma_of("gemma2", **options)
    model.set_attn_implementation("eager")  # soft-capped logits need it
    return processor, model
