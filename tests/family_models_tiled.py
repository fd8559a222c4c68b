"""`family_models` continued: families with tiles, with images of any size, and with cross-attention."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family_models import VOCABULARY, family, ids, siglip, square_size, text, tokenizer, tower

from localization_heads.lvlm.checkpoints.processors import without_video

ROWS_AND_COLUMNS = [(row, column) for row in range(1, 9) for column in range(1, 9)]
ONE_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@family
def internvl() -> tuple[Any, Any]:
    t = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    ip = hf.GotOcr2ImageProcessor(size=square_size(224), crop_to_patches=True)
    config = hf.InternVLConfig(
        text_config=text("qwen2"),
        vision_config=tower(None, [224, 224], [14, 14]),
        image_token_id=t.context_image_token_id,
        image_seq_length=64,
    )
    processor = without_video(hf.InternVLProcessor)(ip, t, image_seq_length=64)
    return processor, hf.InternVLForConditionalGeneration(config)


@family
def aya_vision() -> tuple[Any, Any]:
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    t = tokenizer(["<image>", *marks, *(f"TILE_{n}" for n in range(1, 13))])
    ip = hf.GotOcr2ImageProcessor(size=square_size(364), crop_to_patches=True, max_patches=6)
    config = hf.AyaVisionConfig(
        text_config=text("cohere2", **ONE_SLIDING),
        vision_config=siglip(364, 14),
        **ids(t, image_token_index="<|IMG_PATCH|>"),
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = hf.AyaVisionProcessor(ip, t, patch_size=28, img_size=364)
    return processor, hf.AyaVisionForConditionalGeneration(config)


@family
def cohere2_vision() -> tuple[Any, Any]:
    t = tokenizer(
        image_token="<|IMG_PATCH|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    config = hf.Cohere2VisionConfig(
        text_config=text("cohere2", **ONE_SLIDING),
        vision_config=siglip(512, 16),
        image_token_id=t.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    processor = hf.Cohere2VisionProcessor(hf.Cohere2VisionImageProcessor(), t)
    return processor, hf.Cohere2VisionForConditionalGeneration(config)


@family
def ovis2() -> tuple[Any, Any]:
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    t = tokenizer(["<image>", "<IMG_ATOM>", *marks])
    ip = hf.Ovis2ImageProcessor(crop_to_patches=True, size=square_size(448), max_patches=9)
    config = hf.Ovis2Config(
        text_config=text("qwen2"),
        vision_config=tower(None, 448, 14, vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5),
        **ids(t, image_token_id="<IMG_ATOM>"),
        visual_indicator_token_ids=t.convert_tokens_to_ids(marks),
        hidden_size=32,
        vocab_size=VOCABULARY,
    )
    return hf.Ovis2Processor(ip, t, image_seq_length=256), hf.Ovis2ForConditionalGeneration(config)


@family
def idefics3() -> tuple[Any, Any]:
    t = tokenizer([f"<row_{row}_col_{column}>" for row, column in ROWS_AND_COLUMNS] + ["<global-img>"])
    ip = hf.Idefics3ImageProcessor(size={"longest_edge": 3 * 364})
    processor = hf.Idefics3Processor(ip, t, image_seq_len=169)
    config = hf.Idefics3Config(
        text_config=text("llama"),
        vision_config=tower(None, 364, 14),
        scale_factor=2,
        **ids(t, image_token_id="<image>"),
    )
    return processor, hf.Idefics3ForConditionalGeneration(config)


@family
def smolvlm() -> tuple[Any, Any]:
    t = tokenizer(
        [f"<row_{row}_col_{column}>" for row, column in ROWS_AND_COLUMNS],
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    ip = hf.SmolVLMImageProcessor(size={"longest_edge": 1536}, max_image_size={"longest_edge": 512})
    processor = without_video(hf.SmolVLMProcessor)(ip, t, image_seq_len=64)
    config = hf.SmolVLMConfig(
        text_config=text("llama"),
        vision_config=tower(None, 512, 16),
        scale_factor=4,
        **ids(t, image_token_id="<image>"),
    )
    return processor, hf.SmolVLMForConditionalGeneration(config)


@family
def lfm2_vl() -> tuple[Any, Any]:
    """One layer of convolutions, which has no heads, and one of attention."""
    t = tokenizer(
        [f"<|img_row_{row}_col_{column}|>" for row, column in ROWS_AND_COLUMNS],
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    vision = tower("siglip2_vision_model", None, 16, num_patches=256, vision_use_head=False)
    del vision["image_size"]
    config = hf.Lfm2VlConfig(
        text_config=text("lfm2", layer_types=["conv", "full_attention"]),
        vision_config=vision,
        image_token_id=t.image_token_id,
        downsample_factor=2,
        projector_hidden_size=32,
    )
    return hf.Lfm2VlProcessor(hf.Lfm2VlImageProcessor(), t), hf.Lfm2VlForConditionalGeneration(config)


@family
def llama4() -> tuple[Any, Any]:
    separators = ["<|tile_x_separator|>", "<|tile_y_separator|>"]
    t = tokenizer(["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", *separators])
    processor = hf.Llama4Processor(hf.Llama4ImageProcessor(), t, patch_size=14, pixel_shuffle_ratio=0.5)
    widths = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    vision = tower(None, 336, 14, pixel_shuffle_ratio=0.5, **widths)
    config = hf.Llama4Config(
        text_config=text(head_dim=16, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=64),
        vision_config={**vision, "intermediate_size": 64},
        **ids(t, image_token_index="<|patch|>"),
    )
    return processor, hf.Llama4ForConditionalGeneration(config)


@family
def gemma3() -> tuple[Any, Any]:
    return gemma3_of()


@family
def gemma3_pan_and_scan() -> tuple[Any, Any]:
    """The processor's own defaults switch it off, whatever its image processor says."""
    processor, model = gemma3_of()
    processor.images_kwargs = {
        "do_convert_rgb": True,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 64,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    return processor, model


def gemma3_of() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    ip = hf.Gemma3ImageProcessor(size=square_size(448))
    config = hf.Gemma3Config(
        text_config=text(head_dim=16, query_pre_attn_scalar=16, **ONE_SLIDING),
        vision_config=siglip(448, 14),
        image_token_index=t.image_token_id,
        boi_token_index=t.boi_token_id,
        eoi_token_index=t.eoi_token_id,
        mm_tokens_per_image=64,
    )
    return hf.Gemma3Processor(ip, t, image_seq_length=64), hf.Gemma3ForConditionalGeneration(config)


SHARED_KEYS = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
"""Gemma 3n and 4: the upper layers take the keys and values of lower ones."""
SOUND = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}


@family
def gemma4() -> tuple[Any, Any]:
    t = tokenizer(
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        video_token="<|video|>",
        **SOUND,
    )
    sound = hf.Gemma4AudioFeatureExtractor()
    processor = without_video(hf.Gemma4Processor)(sound, hf.Gemma4ImageProcessor(), t)
    vision = tower(None, None, 16, num_key_value_heads=2, head_dim=16, pooling_kernel_size=3)
    del vision["image_size"]
    config = hf.Gemma4Config(
        text_config=text(**SHARED_KEYS, global_head_dim=32),
        vision_config={**vision, "position_embedding_size": 256},
        audio_config=None,
        image_token_id=t.image_token_id,
        boi_token_id=t.boi_token_id,
        eoi_token_id=t.eoi_token_id,
        video_token_id=t.video_token_id,
        audio_token_id=t.audio_token_id,
        boa_token_id=t.boa_token_id,
    )
    return processor, hf.Gemma4ForConditionalGeneration(config)


@family
def gemma3n() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image_soft_token>", boi_token="<boi>", eoi_token="<eoi>", **SOUND)
    ip = hf.SiglipImageProcessor(size=square_size(768), do_normalize=False)
    processor = hf.Gemma3nProcessor(hf.Gemma3nAudioFeatureExtractor(), ip, t)
    config = hf.Gemma3nConfig(
        text_config=text(
            **{**SHARED_KEYS, "intermediate_size": [32] * 4},
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        vision_config={
            "architecture": "mobilenetv5_base",
            "hidden_size": 2048,
            "vocab_size": 8,
            "vocab_offset": 330,
        },
        audio_config={
            "vocab_size": 8,
            "vocab_offset": 340,
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
        },
        image_token_id=t.image_token_id,
        audio_token_id=t.audio_token_id,
        boi_token_id=t.boi_token_id,
        eoi_token_id=t.eoi_token_id,
        boa_token_id=t.boa_token_id,
        eoa_token_id=t.eoa_token_id,
        vision_soft_tokens_per_image=256,
    )
    return processor, hf.Gemma3nForConditionalGeneration(config)


PIXTRAL_TOWER = tower("pixtral", 1540, 14, num_attention_heads=1, head_dim=16)


def pixtral_processor(t: Any, merge: int) -> Any:
    ip = hf.PixtralImageProcessor(size={"longest_edge": 560}, patch_size=square_size(14))
    return hf.PixtralProcessor(ip, t, patch_size=14, spatial_merge_size=merge)


@family
def mistral3() -> tuple[Any, Any]:
    t = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = hf.Mistral3Config(
        vision_config=PIXTRAL_TOWER,
        text_config=text("mistral", sliding_window=None, head_dim=16),
        **ids(t, image_token_index="[IMG]"),
        spatial_merge_size=2,
    )
    return pixtral_processor(t, 2), hf.Mistral3ForConditionalGeneration(config)


@family
def pixtral() -> tuple[Any, Any]:
    """Pixtral 12B: of the type `llava`."""
    t = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = hf.LlavaConfig(
        vision_config=PIXTRAL_TOWER,
        text_config=text("mistral", sliding_window=None, head_dim=16),
        **ids(t, image_token_index="[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return pixtral_processor(t, 1), hf.LlavaForConditionalGeneration(config)


@family
def kimi_k25() -> tuple[Any, Any]:
    t = tokenizer(
        ["<|vs|>", "<|ve|>"], image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>"
    )
    mla = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    experts = {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    }
    vision = tower(None, None, 14, num_attention_heads=1, pos_emb_height=8, pos_emb_width=8)
    del vision["image_size"]
    config = hf.Kimi_K25Config(
        text_config=text("deepseek_v3", num_key_value_heads=4, first_k_dense_replace=1, **mla, **experts)
        | {"num_key_value_heads": 4},
        vision_config=vision,
        projection_hidden_size=16,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
        **ids(t, vision_start_token_id="<|vs|>", vision_end_token_id="<|ve|>"),
    )
    processor = hf.Kimi_K25Processor(
        hf.Kimi_K25ImageProcessor(size={"max_height": 40, "max_width": 40}), t, hf.Kimi_K25VideoProcessor()
    )
    return processor, hf.Kimi_K25ForConditionalGeneration(config)


@family
def mllama() -> tuple[Any, Any]:
    """Layers 1 and 3 look at the image, through cross-attention."""
    t = tokenizer(["<|python_tag|>"], image_token="<|image|>")
    vision = tower(
        None,
        112,
        14,
        num_global_layers=1,
        attention_heads=2,
        vision_output_dim=32,
        intermediate_layers_indices=[0],
    )
    del vision["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.MllamaConfig(
        text_config=text(num_hidden_layers=4, cross_attention_layers=[1, 3], rope_parameters=rope),
        vision_config=vision,
        image_token_index=t.image_token_id,
    )
    processor = hf.MllamaProcessor(hf.MllamaImageProcessor(size=square_size(112)), t)
    return processor, hf.MllamaForConditionalGeneration(config)


@family
def florence2() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>")
    ip = hf.CLIPImageProcessor(size=square_size(768), do_center_crop=False, crop_size=square_size(768))
    ip.image_seq_length = 577
    bart = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
        "init_std": 0.2,
    }
    vision = {
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    config = hf.Florence2Config(text_config=bart, vision_config=vision, image_token_id=t.image_token_id)
    return hf.Florence2Processor(ip, t), hf.Florence2ForConditionalGeneration(config)
