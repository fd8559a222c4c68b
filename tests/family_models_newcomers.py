"""`family_models` continued: families that came with transformers 5, most of them built like another."""

from __future__ import annotations

from typing import Any

import transformers as hf
from family_models import (
    QWEN3_TOWER,
    family,
    glm_like,
    ids,
    mrope,
    qwen_like,
    square_size,
    text,
    tokenizer,
    tower,
)

from localization_heads.lvlm.checkpoints.processors import without_video


def without_side(tower_options: dict[str, Any]) -> dict[str, Any]:
    """A tower for images of any size: its configuration names none."""
    return {name: value for name, value in tower_options.items() if name != "image_size"}


def template(image: str) -> str:
    """A chat template that writes an image like this, and nothing around the text."""
    part = f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    return f"{{% for m in messages %}}{{% for c in m.content %}}{part}{{% endfor %}}{{% endfor %}}"


@family
def cosmos3_omni() -> tuple[Any, Any]:
    language_model = text(head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True))
    tower_options = dict(QWEN3_TOWER, deepstack_visual_indexes=[0])
    return qwen_like("Cosmos3Omni", hf.Qwen3VLProcessor, 16, language_model, **tower_options)


@family
def glmga() -> tuple[Any, Any]:
    """The model of GLM-4.6V under a name of its own."""
    processor, model = glm_like("Glm46V", hf.Glm46VProcessor, hf.GlmgaImageProcessor)
    config = model.config.to_dict()
    config.pop("model_type")
    return processor, hf.Glm46VForConditionalGeneration(hf.GlmgaConfig(**config))


@family
def glm_ocr() -> tuple[Any, Any]:
    return glm_like("GlmOcr", hf.Glm46VProcessor, hf.Glm46VImageProcessor)


@family
def hyperclovax_vision_v2() -> tuple[Any, Any]:
    """Qwen2.5-VL's tower before another language model."""
    t = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    ip = hf.Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 400 * 28 * 28})
    vision = {"depth": 1, "patch_size": 14, "num_heads": 1, "hidden_size": 16, "out_hidden_size": 32}
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=text("hyperclovax"),
        vision_config=dict(vision, intermediate_size=16, fullatt_block_indexes=[5], window_size=112),
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    processor = without_video(hf.HyperCLOVAXVisionV2Processor)(ip, t)
    return processor, hf.HyperCLOVAXVisionV2ForConditionalGeneration(config)


@family
def cosmos3_edge() -> tuple[Any, Any]:
    t = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    ip = hf.Cosmos3EdgeImageProcessor(size={"shortest_edge": 4096, "longest_edge": 400 * 32 * 32})
    config = hf.Cosmos3EdgeConfig(
        text_config=text(head_dim=16, rope_parameters=mrope(2, 3, 3)),
        vision_config=without_side(tower(None, None, 16, num_attention_heads=1)),
        projector_hidden_size=32,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    processor = without_video(hf.Cosmos3EdgeProcessor)(ip, t)
    processor.return_mm_token_type_ids = True
    return processor, hf.Cosmos3EdgeForConditionalGeneration(config)


MUSE_TOWER = without_side(tower(None, None, 14, num_attention_heads=1, pos_emb_height=8, pos_emb_width=8))


@family
def muse_glimmer() -> tuple[Any, Any]:
    t = tokenizer(["<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"])
    ip = hf.MuseGlimmerImageProcessor(max_image_tokens=100)
    config = hf.MuseGlimmerConfig(
        text_config=text(head_dim=16, sliding_window=16),
        vision_config=MUSE_TOWER,
        **ids(t, image_token_id="<|patch|>", video_token_id="<|video|>"),
        out_hidden_size=64,
        projector_hidden_size=32,
    )
    processor = without_video(hf.MuseGlimmerProcessor)(image_processor=ip, tokenizer=t)
    return processor, hf.MuseGlimmerForConditionalGeneration(config)


@family
def qianfan_ocr() -> tuple[Any, Any]:
    t = tokenizer(
        ["<image>"], start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>"
    )
    ip = hf.GotOcr2ImageProcessor(size=square_size(224), crop_to_patches=True)
    config = hf.QianfanOCRConfig(
        text_config=text("qwen3", head_dim=16),
        vision_config=tower(None, [224, 224], [14, 14]),
        image_token_id=t.context_image_token_id,
        image_seq_length=64,
    )
    processor = hf.QianfanOCRProcessor(ip, t, image_seq_length=64)
    return processor, hf.QianfanOCRForConditionalGeneration(config)


@family
def muse_spark() -> tuple[Any, Any]:
    t = tokenizer(["<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|audio|>"])
    config = hf.MuseSparkConfig(
        text_config=text(
            head_dim=16,
            sliding_window=16,
            moe_intermediate_size=32,
            moe_hidden_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        vision_config=MUSE_TOWER,
        audio_config={
            "patch_sizes": [16],
            "hidden_sizes": [8],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
        **ids(t, image_token_id="<|patch|>", video_token_id="<|video|>", audio_token_id="<|audio|>"),
        out_hidden_size=64,
        projector_hidden_size=32,
    )
    processor = without_video(hf.MuseSparkProcessor)(
        image_processor=hf.MuseGlimmerImageProcessor(max_image_tokens=100),
        tokenizer=t,
        feature_extractor=hf.MuseSparkFeatureExtractor(),
    )
    return processor, hf.MuseSparkForConditionalGeneration(config)


def got_like(prefix: str, patch: int) -> tuple[Any, Any]:
    """Windows of one patch: its attention, which cannot be switched off otherwise, sees that alone."""
    t = tokenizer(["<imgpad>", "<img>", "</img>"])
    vision = tower(None, 512, patch, output_channels=8, mlp_dim=16, window_size=1, global_attn_indexes=[])
    del vision["intermediate_size"]
    config = getattr(hf, f"{prefix}Config")(
        text_config=text("qwen2"),
        vision_config=dict(vision, initializer_range=0.02),
        **ids(t, image_token_index="<imgpad>"),
        image_seq_length=64,
    )
    ip = getattr(hf, f"{prefix}ImageProcessor")(size=square_size(512))
    return getattr(hf, f"{prefix}Processor")(ip, t), hf.GotOcr2ForConditionalGeneration(config)


@family
def got_ocr2() -> tuple[Any, Any]:
    return got_like("GotOcr2", 8)


@family
def pp_chart2table() -> tuple[Any, Any]:
    """Its chat template writes the image's tokens."""
    processor, model = got_like("PPChart2Table", 16)
    processor.chat_template = template("<img>" + "<imgpad>" * 64 + "</img>")
    return processor, model


@family
def granite_docling() -> tuple[Any, Any]:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    t = tokenizer([*places, "<fake_token_around_image>", "<global-img>"], image_token="<image>")
    ip = hf.GraniteDoclingImageProcessor(size=square_size(256), max_patches=6)
    vision = tower(None, 256, 16, deepstack_visual_indexes=[0])
    config = hf.GraniteDoclingConfig(
        text_config=text(), vision_config=dict(vision, out_hidden_size=32), image_token_id=t.image_token_id
    )
    processor = hf.GraniteDoclingProcessor(ip, t, image_seq_len=16)
    return processor, hf.GraniteDoclingForConditionalGeneration(config)


@family
def lfm3_vl() -> tuple[Any, Any]:
    """One layer of convolutions, which has no heads, and one of attention."""
    t = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    ip = hf.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 4096, "longest_edge": 400 * 32 * 32})
    vision = without_side(tower(None, None, 16, num_attention_heads=2, num_key_value_heads=1))
    config = hf.Lfm3VlConfig(
        text_config=text("lfm3", layer_types=["conv", "full_attention"], head_dim=16),
        vision_config=dict(vision, layer_types=["full_attention"]),
        projector_hidden_size=32,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    return without_video(hf.Lfm3VlProcessor)(ip, t), hf.Lfm3VlForConditionalGeneration(config)


def omni_like(prefix: str, patch: int, language_model: dict[str, Any], **vision: Any) -> tuple[Any, Any]:
    kinds = [f"{kind}_{mark}_token" for kind in ("vision", "audio") for mark in ("bos", "eos")]
    names = {name: f"<{name}>" for name in (*kinds, "image_token", "video_token", "audio_token")}
    t = tokenizer(**names)
    ip = hf.Qwen2VLImageProcessor(
        patch_size=patch, size={"shortest_edge": 3136, "longest_edge": 400 * (2 * patch) ** 2}
    )
    audio = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "d_model": 8}
    config = getattr(hf, f"{prefix}ThinkerConfig")(
        text_config=language_model,
        vision_config=dict(
            depth=1,
            patch_size=patch,
            num_heads=1,
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=16,
            **vision,
        ),
        audio_config=dict(audio, num_mel_bins=8, output_dim=32),
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
        audio_token_id=t.audio_token_id,
        vision_start_token_id=t.vision_bos_token_id,
    )
    sound = hf.WhisperFeatureExtractor(feature_size=8)
    processor = without_video(getattr(hf, f"{prefix}Processor"))(ip, sound, t)
    return processor, getattr(hf, f"{prefix}ThinkerForConditionalGeneration")(config)


@family
def qwen2_5_omni_thinker() -> tuple[Any, Any]:
    windows = {"fullatt_block_indexes": [5], "window_size": 112}
    return omni_like("Qwen2_5Omni", 14, text(rope_parameters=mrope(1, 1, 2)), **windows)


@family
def qwen3_omni_moe_thinker() -> tuple[Any, Any]:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    language_model = text(head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True), **experts)
    positions = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return omni_like("Qwen3OmniMoe", 16, language_model, **positions)


@family
def molmo2() -> tuple[Any, Any]:
    marks = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>"]
    t = tokenizer([*marks, "<frame_end>", "<im_low>"], image_token="<|image|>", video_token="<|video|>")
    ip = hf.Molmo2ImageProcessor(size=square_size(182), max_crops=4, overlap_margins=[2, 2])
    narrow = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
    config = hf.Molmo2Config(
        text_config=text(head_dim=16, additional_vocab_size=8),
        vision_config=dict(
            narrow, hidden_size=16, num_hidden_layers=1, image_size=[182, 182], num_position_embeddings=169
        ),
        adapter_config=dict(narrow, hidden_size=16, text_hidden_size=32, vision_feature_layer=[-1]),
        **ids(
            t, image_patch_id="<im_patch>", image_start_token_id="<im_start>", image_end_token_id="<im_end>"
        ),
        **ids(t, low_res_image_start_token_id="<low_res_im_start>"),
        **ids(t, frame_start_token_id="<frame_start>", frame_end_token_id="<frame_end>"),
    )
    processor = without_video(hf.Molmo2Processor)(ip, t)
    return processor, hf.Molmo2ForConditionalGeneration(config)


@family
def video_llava() -> tuple[Any, Any]:
    t = tokenizer(image_token="<image>", video_token="<video>")
    config = hf.VideoLlavaConfig(
        vision_config=tower("clip_vision_model", 224, 14, num_hidden_layers=2, projection_dim=16),
        text_config=text("llama"),
        image_token_index=t.image_token_id,
        video_token_index=t.video_token_id,
    )
    processor = without_video(hf.VideoLlavaProcessor)(
        image_processor=hf.VideoLlavaImageProcessor(), tokenizer=t
    )
    return processor, hf.VideoLlavaForConditionalGeneration(config)


@family
def gemma4_unified() -> tuple[Any, Any]:
    """No vision tower: patches are projected as they are."""
    marks = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    sounds = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    t = tokenizer(video_token="<|video|>", **marks, **sounds)
    processor = without_video(hf.Gemma4UnifiedProcessor)(
        hf.Gemma4UnifiedAudioFeatureExtractor(), hf.Gemma4UnifiedImageProcessor(), t
    )
    sliding = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma4UnifiedConfig(
        text_config=text(head_dim=16, global_head_dim=16, **sliding),
        vision_config={"mm_embed_dim": 16, "mm_posemb_size": 64, "output_proj_dims": 16},
        audio_config=None,
        image_token_id=t.image_token_id,
        boi_token_id=t.boi_token_id,
        eoi_token_id=t.eoi_token_id,
        video_token_id=t.video_token_id,
        audio_token_id=t.audio_token_id,
        boa_token_id=t.boa_token_id,
    )
    return processor, hf.Gemma4UnifiedForConditionalGeneration(config)


def minicpm_like(prefix: str, **marks: str) -> tuple[Any, Any]:
    """Tiles need not be square; one layer of linear attention, which has no heads."""
    spans = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    named = {f"{span}_token": f"<{span}>" for span in spans}
    t = tokenizer([*marks.values()], image_token="<image>", video_token="<video>", **named)
    language_model = text(
        "qwen3_5_text",
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        rope_parameters=mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
    )
    config = getattr(hf, f"{prefix}Config")(
        text_config=language_model,
        vision_config=tower(None, 224, 14, insert_layer_id=0),
        insert_layer_id=0,
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
        **ids(t, **marks),
    )
    images = "MiniCPMOcr" if prefix == "MiniCPMOcr" else "MiniCPMV4_6"
    ip = getattr(hf, f"{images}ImageProcessor")(scale_resolution=256)
    processor = without_video(getattr(hf, f"{prefix}Processor"))(image_processor=ip, tokenizer=t)
    return processor, getattr(hf, f"{prefix}ForConditionalGeneration")(config)


@family
def minicpmv4_6() -> tuple[Any, Any]:
    return minicpm_like("MiniCPMV4_6")


@family
def minicpmv4_7() -> tuple[Any, Any]:
    spans = {f"{span}_id": f"<{span}>" for span in ("image_start", "image_end", "slice_start", "slice_end")}
    return minicpm_like("MiniCPMV4_7", **spans, newline_id="\n")


@family
def minicpm_ocr() -> tuple[Any, Any]:
    return minicpm_like("MiniCPMOcr")


@family
def cohere_compass() -> tuple[Any, Any]:
    t = tokenizer(image_token="<|IMAGE_PAD|>", video_token="<|VIDEO_PAD|>")
    ip = hf.CohereCompassImageProcessor(
        patch_size=16, size={"shortest_edge": 4096, "longest_edge": 400 * 32 * 32}
    )
    sliding = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    rope = mrope(1, 1, 2)
    config = hf.CohereCompassConfig(
        text_config=text(**sliding, rope_parameters=dict.fromkeys(sliding["layer_types"], rope)),
        vision_config=dict(QWEN3_TOWER, depth=1, num_heads=1, patch_size=16, deepstack_visual_indexes=[0]),
        image_token_id=t.image_token_id,
        video_token_id=t.video_token_id,
    )
    processor = without_video(hf.CohereCompassProcessor)(ip, t)
    return processor, hf.CohereCompassForConditionalGeneration(config)
