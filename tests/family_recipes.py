"""One row per model family: what a tiny random model of it is built from (`family_models.tiny`).

The image geometry (sizes, patches, tiles) is that of the checkpoints, or a smaller one of the same kind; widths and
depths are as small as the architecture allows. Functions above the table make rows that families share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Regex
from tokenizers.normalizers import Replace

VOCABULARY = 400
Options = Mapping[str, Any]
Part = tuple[str, Options]
"""A prefix of a class name in transformers, and the options of the object."""


@dataclass(frozen=True)
class Recipe:
    """What a processor and a model are built from.

    Args:
        prefix: of the names of the configuration, model and processor classes.
        images: the image processor.
        text: configuration of the language model.
        vision: configuration of the vision tower; None if there is none.
        named: special tokens by the name under which the processor looks them up.
        tokens: other special tokens.
        ids: fields of the configuration that hold token ids: the name of a named token plus `_id` or `_index`, or
            `field=token`; a field whose name ends with `_ids` holds those of several tokens.
        config: other fields of the configuration.
        processor: options of the processor.
        processor_prefix: prefix of the processor's class, if it is another family's.
        model_class: name of the model class; by default `<prefix>ForConditionalGeneration`.
        sound: the feature extractor, if the processor needs one.
        video: the video processor, if the processor is to keep its video part.
        adapt_tokenizer: changes the tokenizer in place.
        finish: changes processor and model in place, or returns another model.
    """

    prefix: str
    images: Part
    text: Options
    vision: Options | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    tokens: Sequence[str] = ()
    ids: Sequence[str] = ("image_token_id",)
    config: Options = field(default_factory=dict)
    processor: Options = field(default_factory=dict)
    processor_prefix: str = ""
    model_class: str = ""
    sound: Part | None = None
    video: Part | None = None
    adapt_tokenizer: Callable[[Any], None] | None = None
    finish: Callable[[Any, Any], Any] | None = None


# --- parts of configurations


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
    """A vision tower of one layer; `side` None is one for images of any size. An option of None is left out."""
    config = {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        **options,
    }
    return {name: value for name, value in config.items() if value is not None}


def clip(side: int, patch: int) -> dict[str, Any]:
    return tower("clip_vision_model", side, patch, num_hidden_layers=2, projection_dim=16)


def siglip(side: int, patch: int) -> dict[str, Any]:
    return tower("siglip_vision_model", side, patch, vision_use_head=False)


def timm_tower(architecture: str, **options: Any) -> dict[str, Any]:
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": options}


def sam_tower(side: int, patch: int, **options: Any) -> dict[str, Any]:
    """A tower whose attention is confined to single patches (windows of one), so that footprints stay sharp."""
    windows = {"window_size": 1, "global_attn_indexes": [], "initializer_range": 0.02}
    return tower(None, side, patch, intermediate_size=None, output_channels=8, mlp_dim=16, **windows, **options)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def areas(least: int, cell: int) -> dict[str, int]:
    """Limits of a resized image's area: at most 400 cells."""
    return {"shortest_edge": least, "longest_edge": 400 * cell * cell}


def mrope(*sections: int, **options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **options}


def chat_template(image: str) -> str:
    """A template that writes this for an image, and nothing around the text."""
    part = f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    return f"{{% for m in messages %}}{{% for c in m.content %}}{part}{{% endfor %}}{{% endfor %}}"


def tile_tokens(pattern: str, count: int = 8) -> list[str]:
    return [pattern.format(row, column) for row in range(1, count + 1) for column in range(1, count + 1)]


IMAGE = {"image_token": "<image>"}
IMAGE_AND_VIDEO = {"image_token": "<image>", "video_token": "<video>"}
QWEN_PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
SOUND = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
IMAGE_AND_VIDEO_IDS = ("image_token_id", "video_token_id")
GEMMA_IDS = tuple(f"{kind}_token_id" for kind in ("image", "boi", "eoi", "audio", "boa"))

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
ROUTED_EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
QWEN2_TEXT = text(rope_parameters=mrope(1, 1, 2))
QWEN3_TEXT = text(head_dim=16, rope_parameters=mrope(2, 3, 3, mrope_interleaved=True))
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
}
"""Qwen3.5: layers of linear attention have no heads to read."""
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
    **ROUTED_EXPERTS,
}
WINDOWS = {"fullatt_block_indexes": [5], "window_size": 112}
QWEN2_5_TOWER = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, **WINDOWS}
QWEN3_TOWER = {
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 16,
    "num_position_embeddings": 64,
}
DEEPSTACK = {"deepstack_visual_indexes": [0]}
PIXTRAL_TOWER = tower("pixtral", 1540, 14, num_attention_heads=1, head_dim=16)
PIXTRAL_IMAGES: Part = ("Pixtral", {"size": {"longest_edge": 560}, "patch_size": square(14)})
MUSE_TOWER = tower(None, None, 14, num_attention_heads=1, pos_emb_height=8, pos_emb_width=8)
MOLMO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
LLAVA_IMAGES = {"size": {"shortest_edge": 336}, "crop_size": square(336)}
LLAVA_PROCESSOR = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


# --- rows that families share


def llava_like(prefix: str, images: Part, language_model: str = "llama", **config: Any) -> Recipe:
    return Recipe(
        prefix,
        images,
        text(language_model),
        clip(336, 14),
        named=IMAGE,
        ids=("image_token_index",),
        config=config,
        processor=LLAVA_PROCESSOR,
        processor_prefix="LlavaNext" if prefix == "LlavaNext" else "Llava",
    )


def qwen_like(prefix: str, patch: int, language_model: Options, processor: str = "", **vision: Any) -> Recipe:
    marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return Recipe(
        prefix,
        ("Qwen2VL", {"patch_size": patch, "size": areas(3136, 2 * patch)}),
        language_model,
        {"depth": 1, "patch_size": patch, "num_heads": 1, **vision},
        named=QWEN_PADS | marks,
        ids=(*IMAGE_AND_VIDEO_IDS, "vision_start_token_id", "vision_end_token_id"),
        processor_prefix=processor,
    )


def omni_like(prefix: str, patch: int, language_model: Options, **vision: Any) -> Recipe:
    kinds = [f"{kind}_{mark}_token" for kind in ("vision", "audio") for mark in ("bos", "eos")]
    names = (*kinds, "image_token", "video_token", "audio_token")
    audio = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "d_model": 8}
    return Recipe(
        f"{prefix}Thinker",
        ("Qwen2VL", {"patch_size": patch, "size": areas(3136, 2 * patch)}),
        language_model,
        {"depth": 1, "patch_size": patch, "num_heads": 1, **vision},
        named={name: f"<{name}>" for name in names},
        ids=(*IMAGE_AND_VIDEO_IDS, "audio_token_id", "vision_start_token_id=<vision_bos_token>"),
        config={"audio_config": {**audio, "num_mel_bins": 8, "output_dim": 32}},
        processor_prefix=prefix,
        sound=("WhisperFeatureExtractor", {"feature_size": 8}),
    )


def glm_like(prefix: str, processor: str = "", images: str = "", **language_model: Any) -> Recipe:
    marks = [f"<|{mark}_of_{kind}|>" for kind in ("image", "video") for mark in ("begin", "end")]
    fields = [f"{kind}_{mark}_token_id" for kind in ("image", "video") for mark in ("start", "end")]
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 1, "intermediate_size": 16}
    return Recipe(
        prefix,
        (images or processor or prefix, {"size": areas(12544, 28)}),
        text(head_dim=16, rope_parameters=mrope(1, 1, 2, partial_rotary_factor=0.5), **language_model),
        {**vision, "patch_size": 14, "image_size": 336},
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        tokens=marks,
        ids=(*IMAGE_AND_VIDEO_IDS, *(f"{name}={mark}" for name, mark in zip(fields, marks, strict=True))),
        processor_prefix=processor,
    )


def paligemma(language_model: str, finish: Callable[[Any, Any], Any] | None = None, **options: Any) -> Recipe:
    return Recipe(
        "PaliGemma",
        ("Siglip", {"size": square(224), "image_seq_length": 256}),
        text(language_model, head_dim=16, **options),
        siglip(224, 14),
        named=IMAGE,
        ids=("image_token_index",),
        config={"projection_dim": 32, "hidden_size": 32},
        finish=finish,
    )


def gemma3(finish: Callable[[Any, Any], Any] | None = None) -> Recipe:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return Recipe(
        "Gemma3",
        ("Gemma3", {"size": square(448)}),
        text(head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        siglip(448, 14),
        named=named,
        ids=("image_token_index", "boi_token_index", "eoi_token_index"),
        config={"mm_tokens_per_image": 64},
        processor={"image_seq_length": 64},
        finish=finish,
    )


def internvl_like(prefix: str, language_model: Options, **tokens: Any) -> Recipe:
    return Recipe(
        prefix,
        ("GotOcr2", {"size": square(224), "crop_to_patches": True}),
        language_model,
        tower(None, [224, 224], [14, 14]),
        ids=("image_token_id=<IMG_CONTEXT>",),
        config={"image_seq_length": 64},
        processor={"image_seq_length": 64},
        **tokens,
    )


OVIS_INDICATORS = "<IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>"
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}


def got_like(prefix: str, patch: int, finish: Callable[[Any, Any], Any] | None = None) -> Recipe:
    return Recipe(
        prefix,
        (prefix, {"size": square(512)}),
        text("qwen2"),
        sam_tower(512, patch),
        tokens=["<imgpad>", "<img>", "</img>"],
        ids=("image_token_index=<imgpad>",),
        config={"image_seq_length": 64},
        model_class="GotOcr2ForConditionalGeneration",
        finish=finish,
    )


def minicpm_like(prefix: str, images: str = "MiniCPMV4_6", **marks: str) -> Recipe:
    """Non-square tiles, and one layer of linear attention."""
    spans = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    return Recipe(
        prefix,
        (images, {"scale_resolution": 256}),
        text("qwen3_5_text", **LINEAR),
        tower(None, 224, 14, insert_layer_id=0),
        named=IMAGE_AND_VIDEO | {f"{span}_token": f"<{span}>" for span in spans},
        tokens=list(marks.values()),
        ids=(*IMAGE_AND_VIDEO_IDS, *(f"{name}={mark}" for name, mark in marks.items())),
        config={"insert_layer_id": 0},
    )


# --- changes of a tokenizer, a processor or a model


def fuyu_tokenizer(tokenizer: Any) -> None:
    """Insert a word before the image tokens, of which the processor drops the first."""
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ("|SPEAKER|", "|NEWLINE|")])
    tokenizer.backend_tokenizer.normalizer = Replace(Regex(r"^(?=\|SPEAKER\|\|)"), "this ")


def use_eager(_: Any, model: Any) -> None:
    """The only attention that soft-caps logits."""
    model.set_attn_implementation("eager")


def pan_and_scan(processor: Any, _: Any) -> None:
    """Switched off by the processor's own defaults, whatever its image processor says."""
    processor.images_kwargs = {
        "do_convert_rgb": True,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 64,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }


def return_token_types(processor: Any, _: Any) -> None:
    processor.return_mm_token_type_ids = True


def as_glmga(_: Any, model: Any) -> Any:
    """The model of GLM-4.6V with another model type."""
    config = model.config.to_dict()
    del config["model_type"]
    return hf.Glm46VForConditionalGeneration(hf.GlmgaConfig(**config))


def without_font(processor: Any, _: Any) -> None:
    """Saving the processor needs the video processor's font, for timestamps of frames."""
    type(processor).video_processor = SimpleNamespace(font="")


def chart_template(processor: Any, _: Any) -> None:
    """Its chat template, not its processor, writes the image tokens."""
    processor.chat_template = chat_template("<img>" + "<imgpad>" * 64 + "</img>")


ERNIE_TOKENS = {
    f"{kind}_{mark}token": f"<{kind}{mark}>" for kind in ("image", "video") for mark in ("", "start_", "end_")
}

RECIPES = {
    "llava": llava_like("Llava", ("CLIP", LLAVA_IMAGES)),
    "llava_padded": llava_like("Llava", ("Llava", {**LLAVA_IMAGES, "do_pad": True})),
    "llava_siglip": Recipe(  # LLaVA-Interleave: 27 patches of 14 pixels cover 378 of 384
        "Llava",
        ("Siglip", {"size": square(384)}),
        text("qwen2"),
        siglip(384, 14),
        named=IMAGE,
        ids=("image_token_index",),
        config={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        processor={"patch_size": 14, "vision_feature_select_strategy": "full"},
    ),
    "vipllava": llava_like("VipLlava", ("CLIP", LLAVA_IMAGES), vision_feature_layers=[-2, -1]),
    "llava_next": llava_like("LlavaNext", ("LlavaNext", LLAVA_IMAGES), "mistral"),
    "llava_next_video": Recipe(
        "LlavaNextVideo",
        ("LlavaNext", LLAVA_IMAGES),
        text("llama"),
        clip(336, 14),
        named=IMAGE_AND_VIDEO,
        ids=("image_token_index", "video_token_index"),
        processor=LLAVA_PROCESSOR,
    ),
    "llava_onevision": Recipe(
        "LlavaOnevision",
        ("LlavaOnevision", {}),
        text("qwen2"),
        siglip(384, 14),
        named=IMAGE_AND_VIDEO,
        ids=("image_token_index", "video_token_index"),
        processor={"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    ),
    "video_llava": Recipe(
        "VideoLlava",
        ("VideoLlava", {}),
        text("llama"),
        clip(224, 14),
        named=IMAGE_AND_VIDEO,
        ids=("image_token_index", "video_token_index"),
    ),
    "fast_vlm": Recipe(
        "FastVlm",
        (
            "CLIP",
            {
                "size": {"shortest_edge": 320},
                "crop_size": square(320),
                "image_mean": [0.0] * 3,
                "image_std": [1.0] * 3,
            },
        ),
        text("qwen2"),
        timm_tower("fastvit_mci3", layers=[1] * 5, embed_dims=[8, 8, 8, 32, 32], layer_scale_init_value=1e-9)
        | {"hidden_size": 64},
        named=IMAGE,
        ids=("image_token_index",),
        processor={"patch_size": 64, "vision_feature_select_strategy": "full"},
        processor_prefix="Llava",
    ),
    "qwen2_vl": qwen_like("Qwen2VL", 14, QWEN2_TEXT, embed_dim=16, hidden_size=32, mlp_ratio=1),
    "qwen2_5_vl": qwen_like("Qwen2_5_VL", 14, QWEN2_TEXT, **QWEN2_5_TOWER),
    "qwen3_vl": qwen_like("Qwen3VL", 16, QWEN3_TEXT, **QWEN3_TOWER, **DEEPSTACK),
    "qwen3_vl_moe": qwen_like("Qwen3VLMoe", 16, QWEN3_TEXT | EXPERTS, "Qwen3VL", **QWEN3_TOWER, **DEEPSTACK),
    "qwen3_5": qwen_like(
        "Qwen3_5",
        16,
        text(**LINEAR | {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
        "Qwen3VL",
        **QWEN3_TOWER,
    ),
    "qwen3_5_moe": qwen_like(
        "Qwen3_5Moe",
        16,
        {
            name: value
            for name, value in text(**LINEAR, **EXPERTS, shared_expert_intermediate_size=32).items()
            if name != "intermediate_size"
        },
        "Qwen3VL",
        **QWEN3_TOWER,
    ),
    "cosmos3_omni": qwen_like("Cosmos3Omni", 16, QWEN3_TEXT, "Qwen3VL", **QWEN3_TOWER, **DEEPSTACK),
    "qwen2_5_omni_thinker": omni_like("Qwen2_5Omni", 14, QWEN2_TEXT, **QWEN2_5_TOWER),
    "qwen3_omni_moe_thinker": omni_like("Qwen3OmniMoe", 16, QWEN3_TEXT | EXPERTS, **QWEN3_TOWER, **DEEPSTACK),
    "exaone4_5": qwen_like(
        "Exaone4_5_",
        14,
        text("exaone4", head_dim=16, sliding_window=16, sliding_window_pattern=2),
        **QWEN2_5_TOWER | {"hidden_size": 32, "num_key_value_heads": 1},
    ),
    "hyperclovax_vision_v2": Recipe(  # Qwen2.5-VL's tower before another language model
        "HyperCLOVAXVisionV2",
        ("Qwen2VL", {"size": areas(3136, 28)}),
        text("hyperclovax"),
        {"depth": 1, "patch_size": 14, "num_heads": 1, **QWEN2_5_TOWER},
        named=QWEN_PADS,
        ids=IMAGE_AND_VIDEO_IDS,
    ),
    "cosmos3_edge": Recipe(
        "Cosmos3Edge",
        ("Cosmos3Edge", {"size": areas(4096, 32)}),
        text(head_dim=16, rope_parameters=mrope(2, 3, 3)),
        tower(None, None, 16, num_attention_heads=1),
        named=QWEN_PADS,
        ids=IMAGE_AND_VIDEO_IDS,
        config={"projector_hidden_size": 32},
        finish=return_token_types,
    ),
    "cohere_compass": Recipe(
        "CohereCompass",
        ("CohereCompass", {"patch_size": 16, "size": areas(4096, 32)}),
        text(**SLIDING, rope_parameters=dict.fromkeys(SLIDING["layer_types"], mrope(1, 1, 2))),
        {**QWEN3_TOWER, **DEEPSTACK, "depth": 1, "num_heads": 1, "patch_size": 16},
        named={"image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>"},
        ids=IMAGE_AND_VIDEO_IDS,
    ),
    "lfm3_vl": Recipe(  # one layer of convolutions, which has no heads, and one of attention
        "Lfm3Vl",
        ("Qwen2VL", {"patch_size": 16, "size": areas(4096, 32)}),
        text("lfm3", layer_types=["conv", "full_attention"], head_dim=16),
        tower(None, None, 16, num_key_value_heads=1, layer_types=["full_attention"]),
        named=QWEN_PADS,
        ids=IMAGE_AND_VIDEO_IDS,
        config={"projector_hidden_size": 32},
    ),
    "video_llama_3": Recipe(
        "VideoLlama3",
        ("VideoLlama3", {"patch_size": 14, "size": areas(3136, 28)}),
        text("qwen2"),
        tower(None, None, 14),
        named=IMAGE_AND_VIDEO,
        ids=IMAGE_AND_VIDEO_IDS,
    ),
    "ernie4_5_vl_moe": Recipe(
        "Ernie4_5_VLMoe",
        ("Ernie4_5_VLMoe", {"size": areas(3136, 28)}),
        text(
            head_dim=16,
            moe_intermediate_size=[32, 16],
            moe_k=1,
            moe_num_experts=2,
            moe_num_shared_experts=1,
            rope_parameters=mrope(3, 3, 2),
        ),
        {"depth": 1, "hidden_size": 32, "num_heads": 1, "patch_size": 14, "intermediate_size": 16},
        named=ERNIE_TOKENS,
        ids=[f"{name}_id" for name in ERNIE_TOKENS],
        finish=without_font,
    ),
    "paddleocr_vl": Recipe(
        "PaddleOCRVL",
        ("PaddleOCRVL", {"size": areas(3136, 28)}),
        text(head_dim=16, rope_parameters=mrope(2, 3, 3)),
        tower(None, 384, 14),
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        config={"vision_start_token_id": VOCABULARY - 1, "vision_end_token_id": VOCABULARY - 2},
    ),
    "muse_glimmer": Recipe(
        "MuseGlimmer",
        ("MuseGlimmer", {"max_image_tokens": 100}),
        text(head_dim=16, sliding_window=16),
        MUSE_TOWER,
        tokens=["<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"],
        ids=("image_token_id=<|patch|>", "video_token_id=<|video|>"),
        config={"out_hidden_size": 64, "projector_hidden_size": 32},
    ),
    "muse_spark": Recipe(
        "MuseSpark",
        ("MuseGlimmer", {"max_image_tokens": 100}),
        text(
            head_dim=16,
            sliding_window=16,
            moe_intermediate_size=32,
            moe_hidden_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        MUSE_TOWER,
        tokens=["<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|audio|>"],
        ids=("image_token_id=<|patch|>", "video_token_id=<|video|>", "audio_token_id=<|audio|>"),
        config={
            "audio_config": {
                "patch_sizes": [16],
                "hidden_sizes": [8],
                "depths": [1],
                "num_hidden_layers": 1,
                "out_hidden_size": 32,
            },
            "out_hidden_size": 64,
            "projector_hidden_size": 32,
        },
        sound=("MuseSparkFeatureExtractor", {}),
    ),
    "kimi_k25": Recipe(
        "Kimi_K25",
        ("Kimi_K25", {"size": {"max_height": 40, "max_width": 40}}),
        text(
            "deepseek_v3",
            num_key_value_heads=4,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            **ROUTED_EXPERTS,
        ),
        MUSE_TOWER,
        named={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        tokens=["<|vs|>", "<|ve|>"],
        ids=(*IMAGE_AND_VIDEO_IDS, "vision_start_token_id=<|vs|>", "vision_end_token_id=<|ve|>"),
        config={"projection_hidden_size": 16},
        video=("Kimi_K25VideoProcessor", {}),
    ),
    "glm4v": glm_like("Glm4v"),
    "glm4v_moe": glm_like("Glm4vMoe", "Glm4v", moe_intermediate_size=32, **ROUTED_EXPERTS),
    "glm46v": glm_like("Glm46V"),
    "glm_ocr": glm_like("GlmOcr", "Glm46V"),
    "glmga": replace(glm_like("Glm46V", images="Glmga"), finish=as_glmga),
    "deepseek_vl": Recipe(
        "DeepseekVL",
        ("DeepseekVL", {}),
        text("llama"),
        siglip(384, 16),
        named={"image_token": "<image_placeholder>"},
        processor={"num_image_tokens": 576},
    ),
    "deepseek_vl_hybrid": Recipe(
        "DeepseekVLHybrid",
        ("DeepseekVLHybrid", {"size": square(128), "high_res_size": square(256)}),
        text("llama"),
        siglip(128, 16),
        named={"image_token": "<image_placeholder>"},
        config={
            "high_res_vision_config": tower(
                "sam_vision_model",
                256,
                16,
                output_channels=8,
                mlp_dim=16,
                window_size=2,
                global_attn_indexes=[0],
                num_pos_feats=4,
            )
        },
        processor={"num_image_tokens": 64},
    ),
    "janus": Recipe(
        "Janus",
        ("Janus", {}),
        text("llama"),
        tower(None, 384, 16, intermediate_size=None, mlp_ratio=2, projection_dim=32, num_image_tokens=576),
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        config={
            "vq_config": {
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
        },
        processor={"num_image_tokens": 576},
    ),
    "paligemma": paligemma("gemma"),
    "paligemma2": paligemma(
        "gemma2", use_eager, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gemma3": gemma3(),
    "gemma3_pan_and_scan": gemma3(pan_and_scan),
    "gemma3n": Recipe(
        "Gemma3n",
        ("Siglip", {"size": square(768), "do_normalize": False}),
        text(
            **SHARED_KEYS | {"intermediate_size": [32] * 4},
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        {"architecture": "mobilenetv5_base", "hidden_size": 2048, "vocab_size": 8, "vocab_offset": 330},
        named={"image_token": "<image_soft_token>", "boi_token": "<boi>", "eoi_token": "<eoi>"} | SOUND,
        ids=(*GEMMA_IDS, "eoa_token_id"),
        config={
            "audio_config": {
                "vocab_size": 8,
                "vocab_offset": 340,
                "hidden_size": 32,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [8, 4],
            },
            "vision_soft_tokens_per_image": 256,
        },
        sound=("Gemma3nAudioFeatureExtractor", {}),
    ),
    "gemma4": Recipe(
        "Gemma4",
        ("Gemma4", {}),
        text(**SHARED_KEYS, global_head_dim=32),
        tower(
            None,
            None,
            16,
            num_key_value_heads=2,
            head_dim=16,
            pooling_kernel_size=3,
            position_embedding_size=256,
        ),
        named={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "video_token": "<|video|>",
        }
        | SOUND,
        ids=(*GEMMA_IDS, "video_token_id"),
        config={"audio_config": None},
        sound=("Gemma4AudioFeatureExtractor", {}),
    ),
    "gemma4_unified": Recipe(  # no vision tower: patches are projected as they are
        "Gemma4Unified",
        ("Gemma4Unified", {}),
        text(head_dim=16, global_head_dim=16, **SLIDING),
        {"mm_embed_dim": 16, "mm_posemb_size": 64, "output_proj_dims": 16},
        named={
            "video_token": "<|video|>",
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
        }
        | SOUND,
        ids=(*GEMMA_IDS, "video_token_id"),
        config={"audio_config": None},
        sound=("Gemma4UnifiedAudioFeatureExtractor", {}),
    ),
    "internvl": internvl_like("InternVL", text("qwen2"), named=INTERNVL_TOKENS | {"video_token": "<video>"}),
    "qianfan_ocr": internvl_like("QianfanOCR", text("qwen3", head_dim=16), named=INTERNVL_TOKENS, tokens=["<image>"]),
    "aya_vision": Recipe(
        "AyaVision",
        ("GotOcr2", {"size": square(364), "crop_to_patches": True, "max_patches": 6}),
        text("cohere2", **SLIDING),
        siglip(364, 14),
        tokens=[
            *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
            *("TILE_GLOBAL", *(f"TILE_{n}" for n in range(1, 13))),
        ],
        ids=("image_token_index=<|IMG_PATCH|>",),
        config={"downsample_factor": 2, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        processor={"patch_size": 28, "img_size": 364},
    ),
    "cohere2_vision": Recipe(
        "Cohere2Vision",
        ("Cohere2Vision", {}),
        text("cohere2", **SLIDING),
        siglip(512, 16),
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        config={"downsample_factor": 2, "alignment_intermediate_size": 64},
    ),
    "ovis2": Recipe(
        "Ovis2",
        ("Ovis2", {"crop_to_patches": True, "size": square(448), "max_patches": 9}),
        text("qwen2"),
        tower(None, 448, 14, vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5),
        tokens=["<image>", "<IMG_ATOM>", *OVIS_INDICATORS.split()],
        ids=("image_token_id=<IMG_ATOM>", f"visual_indicator_token_ids={OVIS_INDICATORS}"),
        config={"hidden_size": 32, "vocab_size": VOCABULARY},
        processor={"image_seq_length": 256},
    ),
    "idefics3": Recipe(
        "Idefics3",
        ("Idefics3", {"size": {"longest_edge": 3 * 364}}),
        text("llama"),
        tower(None, 364, 14),
        tokens=[*tile_tokens("<row_{}_col_{}>"), "<global-img>"],
        ids=("image_token_id=<image>",),
        config={"scale_factor": 2},
        processor={"image_seq_len": 169},
    ),
    "smolvlm": Recipe(
        "SmolVLM",
        ("SmolVLM", {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 512}}),
        text("llama"),
        tower(None, 512, 16),
        named={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        tokens=tile_tokens("<row_{}_col_{}>"),
        config={"scale_factor": 4},
        processor={"image_seq_len": 64},
    ),
    "granite_docling": Recipe(
        "GraniteDocling",
        ("GraniteDocling", {"size": square(256), "max_patches": 6}),
        text(),
        tower(None, 256, 16, **DEEPSTACK, out_hidden_size=32),
        named=IMAGE,
        tokens=[*tile_tokens("<row_{}_col_{}>", 4), "<fake_token_around_image>", "<global-img>"],
        processor={"image_seq_len": 16},
    ),
    "lfm2_vl": Recipe(  # one layer of convolutions, which has no heads, and one of attention
        "Lfm2Vl",
        ("Lfm2Vl", {}),
        text("lfm2", layer_types=["conv", "full_attention"]),
        tower("siglip2_vision_model", None, 16, num_patches=256, vision_use_head=False),
        named=IMAGE
        | {
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        tokens=tile_tokens("<|img_row_{}_col_{}|>"),
        config={"downsample_factor": 2, "projector_hidden_size": 32},
    ),
    "llama4": Recipe(
        "Llama4",
        ("Llama4", {}),
        text(head_dim=16, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=64),
        tower(
            None,
            336,
            14,
            intermediate_size=64,
            pixel_shuffle_ratio=0.5,
            vision_output_dim=16,
            projector_input_dim=16,
            projector_output_dim=16,
        ),
        tokens=[
            *("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"),
            *("<|tile_x_separator|>", "<|tile_y_separator|>"),
        ],
        ids=("image_token_index=<|patch|>",),
        processor={"patch_size": 14, "pixel_shuffle_ratio": 0.5},
    ),
    "molmo2": Recipe(
        "Molmo2",
        ("Molmo2", {"size": square(182), "max_crops": 4, "overlap_margins": [2, 2]}),
        text(head_dim=16, additional_vocab_size=8),
        MOLMO_HEADS
        | {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "image_size": [182, 182],
            "num_position_embeddings": 169,
        },
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        tokens=[
            *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>"),
            *("<frame_end>", "<im_low>"),
        ],
        ids=(
            "image_patch_id=<im_patch>",
            "image_start_token_id=<im_start>",
            "image_end_token_id=<im_end>",
            "low_res_image_start_token_id=<low_res_im_start>",
            "frame_start_token_id=<frame_start>",
            "frame_end_token_id=<frame_end>",
        ),
        config={
            "adapter_config": MOLMO_HEADS | {"hidden_size": 16, "text_hidden_size": 32, "vision_feature_layer": [-1]}
        },
    ),
    "minicpmv4_6": minicpm_like("MiniCPMV4_6"),
    "minicpmv4_7": minicpm_like(
        "MiniCPMV4_7",
        image_start_id="<image_start>",
        image_end_id="<image_end>",
        slice_start_id="<slice_start>",
        slice_end_id="<slice_end>",
        newline_id="\n",
    ),
    "minicpm_ocr": minicpm_like("MiniCPMOcr", "MiniCPMOcr"),
    "perception_lm": Recipe(
        "PerceptionLM",
        ("PerceptionLM", {"tile_size": 112, "max_num_tiles": 6}),
        text("llama"),
        timm_tower(
            "vit_pe_lang_large_patch14_448",
            img_size=[112, 112],
            depth=1,
            embed_dim=32,
            num_heads=2,
            init_values=1e-9,
        ),
        named=IMAGE_AND_VIDEO,
        ids=IMAGE_AND_VIDEO_IDS,
        config={"projector_pooling_ratio": 2},
        processor={"patch_size": 14},
    ),
    "mistral3": Recipe(
        "Mistral3",
        PIXTRAL_IMAGES,
        text("mistral", sliding_window=None, head_dim=16),
        PIXTRAL_TOWER,
        tokens=["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        ids=("image_token_index=[IMG]",),
        config={"spatial_merge_size": 2},
        processor={"patch_size": 14, "spatial_merge_size": 2},
        processor_prefix="Pixtral",
    ),
    "pixtral": Recipe(  # Pixtral 12B, whose model type is `llava`
        "Llava",
        PIXTRAL_IMAGES,
        text("mistral", sliding_window=None, head_dim=16),
        PIXTRAL_TOWER,
        tokens=["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        ids=("image_token_index=[IMG]",),
        config={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        processor={"patch_size": 14, "spatial_merge_size": 1},
        processor_prefix="Pixtral",
    ),
    "lighton_ocr": Recipe(  # the sides are multiples of a patch, not of a cell of two by two
        "LightOnOcr",
        PIXTRAL_IMAGES,
        text("qwen3", head_dim=16),
        PIXTRAL_TOWER,
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "mllama": Recipe(  # layers 1 and 3 look at the image, through cross-attention
        "Mllama",
        ("Mllama", {"size": square(112)}),
        text(
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        tower(
            None,
            112,
            14,
            num_attention_heads=None,
            num_global_layers=1,
            attention_heads=2,
            vision_output_dim=32,
            intermediate_layers_indices=[0],
        ),
        named={"image_token": "<|image|>"},
        tokens=["<|python_tag|>"],
        ids=("image_token_index",),
    ),
    "florence2": Recipe(
        "Florence2",
        (
            "CLIP",
            {"size": square(768), "do_center_crop": False, "crop_size": square(768), "image_seq_length": 577},
        ),
        {
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
        },
        {
            "embed_dim": [8, 8, 16, 16],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
            "drop_path_rate": 0.0,
        },
        named=IMAGE,
    ),
    "fuyu": Recipe(
        "Fuyu",
        ("Fuyu", {"size": {"height": 270, "width": 480}}),
        text("persimmon"),
        tokens=["<0x04>"],
        ids=("image_token_id=|SPEAKER|",),
        model_class="FuyuForCausalLM",
        adapt_tokenizer=fuyu_tokenizer,
    ),
    "inkling_mm_model": Recipe(
        "Inkling",
        ("Inkling", {}),
        text(**INKLING_TEXT, n_shared_experts=1),
        {"patch_size": 40, "num_hidden_layers": 4},
        named={"image_token": "<patch>", "audio_token": "<sound>"},
        tokens=["<|content_image|>", "<|content_audio_input|>"],
        ids=(
            *("image_token_id", "audio_token_id", "image_bos_token_id=<|content_image|>"),
            "audio_bos_token_id=<|content_audio_input|>",
        ),
        config={"audio_config": {"n_mel_bins": 8, "mel_vocab_size": 4}},
        sound=("InklingFeatureExtractor", {}),
    ),
    "inkling2": Recipe(
        "Inkling2",
        ("Inkling2", {}),
        text(**INKLING_TEXT, unpadded_vocab_size=VOCABULARY),
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_hidden_dim": 16,
            "text_hidden_size": 32,
        },
        named={"image_token": "<patch>"},
    ),
    "got_ocr2": got_like("GotOcr2", 8),
    "pp_chart2table": got_like("PPChart2Table", 16, chart_template),
    "unlimited_ocr": Recipe(
        "UnlimitedOcr",
        ("UnlimitedOcr", {"size": square(768), "tile_size": 384, "max_patches": 4}),
        text(
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_shared_experts=1,
            sliding_window=8,
            **ROUTED_EXPERTS,
        ),
        {
            "sam_config": sam_tower(768, 16, downsample_channels=[8, 16]),
            "encoder_config": tower(None, 192, 16),
        },
        named=IMAGE,
    ),
}
