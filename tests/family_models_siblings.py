"""`family_models` continued: families that are built like another, each with its own configuration and processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import family_models_latest  # noqa: F401 -- registers its families
import family_models_newcomers  # noqa: F401 -- registers its families
import transformers as hf
from family_models import (
    QWEN3_TOWER,
    VOCABULARY,
    clip,
    family,
    glm_like,
    mrope,
    qwen_like,
    square_size,
    text,
    tokenizer,
    tower,
)
from family_models_tiled import PIXTRAL_TOWER

from localization_heads.lvlm.checkpoints.processors import without_video

SIBLINGS = {
    "qwen3_vl_moe",
    "qwen3_5_moe",
    "glm4v_moe",
    "glm46v",
    "video_llama_3",
    "exaone4_5",
    "ernie4_5_vl_moe",
    "paddleocr_vl",
    "llava_next_video",
    "cohere_compass",
    "cosmos3_edge",
    "minicpm_ocr",
    "minicpmv4_7",
    "cosmos3_omni",
    "gemma4_unified",
    "glm_ocr",
    "glmga",
    "granite_docling",
    "hyperclovax_vision_v2",
    "lfm3_vl",
    "muse_glimmer",
    "muse_spark",
    "pp_chart2table",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llava",
}
"""Families that take another's row as it is."""
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
GLM_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


@family
def qwen3_vl_moe() -> tuple[Any, Any]:
    language_model = text(head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True), **EXPERTS)
    tower_options = dict(QWEN3_TOWER, deepstack_visual_indexes=[0])
    return qwen_like("Qwen3VLMoe", hf.Qwen3VLProcessor, 16, language_model, **tower_options)


@family
def qwen3_5_moe() -> tuple[Any, Any]:
    language_model = text(
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
        rope_parameters=mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
        **EXPERTS,
    )
    del language_model["intermediate_size"]
    return qwen_like("Qwen3_5Moe", hf.Qwen3VLProcessor, 16, language_model, **QWEN3_TOWER)


@family
def glm4v_moe() -> tuple[Any, Any]:
    return glm_like("Glm4vMoe", hf.Glm4vProcessor, hf.Glm4vImageProcessor, **GLM_EXPERTS)


@family
def glm46v() -> tuple[Any, Any]:
    return glm_like("Glm46V", hf.Glm46VProcessor, hf.Glm46VImageProcessor)


@family
def video_llama_3() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>", video_token="<video>")
    ip = hf.VideoLlama3ImageProcessor(patch_size=14, size={"shortest_edge": 3136, "longest_edge": 313600})
    vision = tower(None, None, 14)
    del vision["image_size"]
    config = hf.VideoLlama3Config(
        text_config=text("qwen2"),
        vision_config=vision,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    return without_video(hf.VideoLlama3Processor)(ip, t), hf.VideoLlama3ForConditionalGeneration(config)


@family
def exaone4_5() -> tuple[Any, Any]:
    language_model = text("exaone4", head_dim=16, sliding_window=16, sliding_window_pattern=2)
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 16, "num_key_value_heads": 1}
    windows = {"fullatt_block_indexes": [5], "window_size": 112}
    return qwen_like("Exaone4_5_", hf.Exaone4_5_Processor, 14, language_model, **vision, **windows)


@family
def ernie4_5_vl_moe() -> tuple[Any, Any]:
    names = {
        f"{kind}_{mark}token": f"<{kind}{mark}>"
        for kind in ("image", "video")
        for mark in ("", "start_", "end_")
    }
    t = tokenizer(**names)
    ip = hf.Ernie4_5_VLMoeImageProcessor(size={"shortest_edge": 3136, "longest_edge": 400 * 28 * 28})
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text(
            head_dim=16,
            moe_intermediate_size=[32, 16],
            moe_k=1,
            moe_num_experts=2,
            moe_num_shared_experts=1,
            rope_parameters=mrope(3, 3, 2),
        ),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 1,
            "patch_size": 14,
            "intermediate_size": 16,
        },
        **{f"{name}_id": getattr(t, f"{name}_id") for name in names},
    )
    processor = without_video(hf.Ernie4_5_VLMoeProcessor)(ip, t)
    type(processor).video_processor = SimpleNamespace(
        font=""
    )  # whose letters it saves, for the times of frames
    return processor, hf.Ernie4_5_VLMoeForConditionalGeneration(config)


@family
def paddleocr_vl() -> tuple[Any, Any]:
    t = tokenizer(image_token="<|IMAGE_PLACEHOLDER|>")
    ip = hf.PaddleOCRVLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 400 * 28 * 28})
    config = hf.PaddleOCRVLConfig(
        text_config=text(head_dim=16, rope_parameters=mrope(2, 3, 3)),
        vision_config=tower(None, 384, 14),
        image_token_id=t.image_token_id,
        vision_start_token_id=VOCABULARY - 1,
        vision_end_token_id=VOCABULARY - 2,
    )
    return hf.PaddleOCRVLProcessor(ip, t), hf.PaddleOCRVLForConditionalGeneration(config)


@family
def lighton_ocr() -> tuple[Any, Any]:
    """The sides are multiples of a patch, not of a cell of two by two."""
    t = tokenizer(
        image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>"
    )
    ip = hf.PixtralImageProcessor(size={"longest_edge": 560}, patch_size=square_size(14))
    config = hf.LightOnOcrConfig(
        vision_config=PIXTRAL_TOWER, text_config=text("qwen3", head_dim=16), image_token_id=t.image_token_id
    )
    processor = hf.LightOnOcrProcessor(ip, t, patch_size=14, spatial_merge_size=2)
    return processor, hf.LightOnOcrForConditionalGeneration(config)


@family
def llava_next_video() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>", video_token="<video>")
    ip = hf.LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=square_size(336))
    settings = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(336, 14),
        text_config=text("llama"),
        image_token_index=t.image_token_id,
        video_token_index=t.video_token_id,
    )
    processor = without_video(hf.LlavaNextVideoProcessor)(ip, t, **settings)
    return processor, hf.LlavaNextVideoForConditionalGeneration(config)
