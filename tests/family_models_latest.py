"""`family_models` continued: towers of timm, images at their own size, and DeepSeek's way to read pages."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family_models import VOCABULARY, family, ids, square_size, text, tokenizer, tower
from tokenizers import AddedToken, Regex
from tokenizers.normalizers import Replace

from localization_heads.lvlm.checkpoints.processors import without_video


def timm_tower(architecture: str, **options: Any) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": options}


@family
def fast_vlm() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>")
    ip = hf.CLIPImageProcessor(
        size={"shortest_edge": 320}, crop_size=square_size(320), image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    vision = timm_tower(
        "fastvit_mci3", layers=[1] * 5, embed_dims=[8, 8, 8, 32, 32], layer_scale_init_value=1e-9
    )
    config = hf.FastVlmConfig(
        text_config=text("qwen2"),
        vision_config={**vision, "hidden_size": 64},
        image_token_index=t.image_token_id,
    )
    processor = hf.LlavaProcessor(ip, t, patch_size=64, vision_feature_select_strategy="full")
    return processor, hf.FastVlmForConditionalGeneration(config)


@family
def perception_lm() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>", video_token="<video>")
    vision = timm_tower(
        "vit_pe_lang_large_patch14_448",
        img_size=[112, 112],
        depth=1,
        embed_dim=32,
        num_heads=2,
        init_values=1e-9,
    )
    config = hf.PerceptionLMConfig(
        text_config=text("llama"),
        vision_config=vision,
        projector_pooling_ratio=2,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    ip = hf.PerceptionLMImageProcessor(tile_size=112, max_num_tiles=6)
    processor = without_video(hf.PerceptionLMProcessor)(image_processor=ip, tokenizer=t, patch_size=14)
    return processor, hf.PerceptionLMForConditionalGeneration(config)


@family
def fuyu() -> tuple[Any, Any]:
    """Its processor drops the first of the image's tokens: the tokenizer has to write one before them."""
    t = tokenizer(["<0x04>"])
    t.add_tokens([AddedToken(token, normalized=True) for token in ("|SPEAKER|", "|NEWLINE|")])
    t.backend_tokenizer.normalizer = Replace(Regex(r"^(?=\|SPEAKER\|\|)"), "this ")
    ip = hf.FuyuImageProcessor(size={"height": 270, "width": 480})
    config = hf.FuyuConfig(text_config=text("persimmon"), **ids(t, image_token_id="|SPEAKER|"))
    return hf.FuyuProcessor(ip, t), hf.FuyuForCausalLM(config)


INKLING_TEXT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "head_dim": 8,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}


@family
def inkling_mm_model() -> tuple[Any, Any]:
    t = tokenizer(
        ["<|content_image|>", "<|content_audio_input|>"], image_token="<patch>", audio_token="<sound>"
    )
    config = hf.InklingConfig(
        text_config=text(**INKLING_TEXT, n_shared_experts=1),
        vision_config={"patch_size": 40, "num_hidden_layers": 4},
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 4},
        image_token_id=t.image_token_id,
        audio_token_id=t.audio_token_id,
        **ids(t, image_bos_token_id="<|content_image|>", audio_bos_token_id="<|content_audio_input|>"),
    )
    processor = hf.InklingProcessor(hf.InklingFeatureExtractor(), hf.InklingImageProcessor(), t)
    return processor, hf.InklingForConditionalGeneration(config)


@family
def inkling2() -> tuple[Any, Any]:
    t = tokenizer(image_token="<patch>")
    config = hf.Inkling2Config(
        text_config=text(**INKLING_TEXT, unpadded_vocab_size=VOCABULARY),
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_hidden_dim": 16,
            "text_hidden_size": 32,
        },
        image_token_id=t.image_token_id,
    )
    return hf.Inkling2Processor(hf.Inkling2ImageProcessor(), t), hf.Inkling2ForConditionalGeneration(config)


@family
def unlimited_ocr() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>")
    sam = tower(None, 768, 16, output_channels=8, mlp_dim=16, window_size=1, global_attn_indexes=[])
    del sam["intermediate_size"]
    config = hf.UnlimitedOcrConfig(
        text_config=text(
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_shared_experts=1,
            sliding_window=8,
        ),
        vision_config={
            "sam_config": dict(sam, downsample_channels=[8, 16], initializer_range=0.02),
            "encoder_config": tower(None, 192, 16, hidden_size=16),
        },
        image_token_id=t.image_token_id,
    )
    ip = hf.UnlimitedOcrImageProcessor(size=square_size(768), tile_size=384, max_patches=4)
    return hf.UnlimitedOcrProcessor(ip, t), hf.UnlimitedOcrForConditionalGeneration(config)
