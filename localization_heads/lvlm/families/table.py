"""The table of model families: what follows from the `model_type` in a checkpoint's configuration.

Each family is a row: where its image tokens lie in the image, and default options for checkpoints that have no file in
`config/model/`. A family that is built like another shares that one's row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from localization_heads.errors import UsageError
from localization_heads.lvlm.families.geometry import Layout, ProcessedImage, View, image_token_id
from localization_heads.lvlm.families.tiled_views import (
    anyres,
    cohere,
    gemma3,
    idefics3,
    internvl,
    lfm2,
    llama4,
    minicpm,
    mllama,
    molmo2,
    ovis2,
    perception,
    unlimited_ocr,
)
from localization_heads.lvlm.families.views import (
    deepseek,
    fastvlm,
    florence2,
    fuyu,
    gemma4,
    got_ocr2,
    inkling,
    kimi,
    llava,
    pixtral,
    qwen,
    unknown,
    whole_square,
)

log = logging.getLogger(__name__)

Defaults = Mapping[str, Any]
"""Options of `ModelSpec` by name."""

_VICUNA_VOCABULARY = 32_100
"""Upper bound for the vocabulary of Vicuna (Llama 2's) with the tokens that LLaVA adds."""


@dataclass(frozen=True)
class Family:
    """What checkpoints of one `model_type` have in common.

    Args:
        views: computes where the image tokens lie, from the processor's output for one image.
        defaults: options for checkpoints of this family, or a function from the configuration to them.
        why_not_shared: why an image cannot be encoded once for all expressions; None if it can.
        adds_image_itself: whether the processor puts the image before the text, so that prompts have no placeholder.
        one_image_per_batch: whether the processor cannot batch images that differ in their number of tiles.
        writes_bos: whether the processor adds the BOS token to prompts without one.
    """

    views: Callable[[ProcessedImage], list[View]]
    defaults: Defaults | Callable[[Any], Defaults] = field(default_factory=lambda: {"conv_mode": "chat"})
    why_not_shared: str | None = None
    adds_image_itself: bool = False
    one_image_per_batch: bool = False
    writes_bos: bool = False


def _chat(native_box: str) -> Defaults:
    """The model's own chat template, and the format in which it writes boxes (`answers.box_formats`)."""
    return {"conv_mode": "chat", "native_box": native_box}


def _llava_defaults(config: Any) -> Defaults:
    """LLaVA-1.5 and similar models were trained on images padded to squares, though their saved processor crops."""
    pad = {"pad_to_square": True} if config.vision_config.model_type == "clip_vision_model" else {}
    return {**_llava_prompt(config), **pad}


def _llava_prompt(config: Any) -> Defaults:
    """The paper's prompt for Vicuna, the chat template for LLaVA-1.6's other language models."""
    text = config.get_text_config()
    is_vicuna = text.model_type == "llama" and text.vocab_size <= _VICUNA_VOCABULARY
    return {"conv_mode": "referseg" if is_vicuna else "chat"}


def _paligemma_defaults(config: Any) -> Defaults:
    """Gemma 2, in PaliGemma 2, soft-caps its logits, which only eager attention supports."""
    eager = {"attn_implementation": "eager"} if config.get_text_config().model_type == "gemma2" else {}
    return {"conv_mode": "plain", "native_box": "paligemma", **eager}


FAMILIES = {
    "aya_vision": Family(cohere),
    "deepseek_vl": Family(deepseek, {"conv_mode": "referseg"}),
    "florence2": Family(
        florence2,
        {"conv_mode": "plain", "native_box": "florence2"},
        why_not_shared="its encoder reads image and expression together",
        adds_image_itself=True,
    ),
    "gemma3": Family(gemma3),
    "gemma3n": Family(whole_square),
    "gemma4": Family(gemma4),
    "glm4v": Family(qwen, _chat("glm")),
    "idefics3": Family(idefics3),
    "internvl": Family(internvl, _chat("internvl")),
    "janus": Family(deepseek),
    "kimi_k25": Family(kimi),
    "lfm2_vl": Family(lfm2),
    "llama4": Family(llama4),
    "llava": Family(llava, _llava_defaults),
    "llava_next": Family(anyres, _llava_prompt),
    "llava_onevision": Family(anyres),
    "mistral3": Family(pixtral),
    "mllama": Family(mllama, writes_bos=True),
    "ovis2": Family(ovis2),
    "paligemma": Family(
        whole_square,
        _paligemma_defaults,
        why_not_shared="its image tokens attend to the expression (a bidirectional prefix)",
    ),
    "qwen2_vl": Family(qwen, _chat("qwen2")),
    "qwen2_5_vl": Family(qwen, _chat("qwen2_5")),
    "qwen3_vl": Family(qwen, _chat("qwen3")),
    "vipllava": Family(llava, {"conv_mode": "referseg"}),
}
"""The verified families, by `model_type`."""

_CONVOLUTION = "its layers convolve keys and values with those of the tokens before them"

# Added later; many share a row of the table above.
FAMILIES |= {
    "cohere2_vision": FAMILIES["aya_vision"],
    "cohere_compass": Family(qwen),
    "cosmos3_edge": Family(qwen),
    "cosmos3_omni": FAMILIES["qwen3_vl"],
    "deepseek_vl_hybrid": FAMILIES["deepseek_vl"],
    "ernie4_5_vl_moe": Family(qwen),
    "exaone4_5": Family(qwen),
    "fast_vlm": Family(fastvlm, {"conv_mode": "chat", "pad_to_square": True}),
    "fuyu": Family(fuyu, {"conv_mode": "plain"}, adds_image_itself=True),
    "gemma4_unified": FAMILIES["gemma4"],
    "glm46v": FAMILIES["glm4v"],
    "glm4v_moe": FAMILIES["glm4v"],
    "glm_ocr": Family(qwen),
    "glmga": FAMILIES["glm4v"],
    "got_ocr2": Family(got_ocr2, {"conv_mode": "plain"}),
    "granite_docling": FAMILIES["idefics3"],
    "hyperclovax_vision_v2": Family(qwen),
    "inkling2": Family(inkling, why_not_shared=_CONVOLUTION),
    "inkling_mm_model": Family(inkling, why_not_shared=_CONVOLUTION),
    "lfm3_vl": Family(qwen),
    "lighton_ocr": FAMILIES["mistral3"],
    "llava_next_video": FAMILIES["llava_next"],
    "minicpm_ocr": Family(minicpm),
    "minicpmv4_6": Family(minicpm),
    "minicpmv4_7": Family(minicpm),
    "molmo2": Family(molmo2),
    "muse_glimmer": Family(qwen),
    "muse_spark": Family(qwen),
    "paddleocr_vl": Family(qwen),
    "perception_lm": Family(perception, one_image_per_batch=True),
    "pp_chart2table": Family(got_ocr2),
    "qianfan_ocr": Family(internvl),
    "qwen2_5_omni_thinker": FAMILIES["qwen2_5_vl"],
    "qwen3_omni_moe_thinker": FAMILIES["qwen3_vl"],
    "qwen3_5": FAMILIES["qwen3_vl"],
    "qwen3_5_moe": FAMILIES["qwen3_vl"],
    "qwen3_vl_moe": FAMILIES["qwen3_vl"],
    "smolvlm": FAMILIES["idefics3"],
    "unlimited_ocr": Family(
        unlimited_ocr,
        {"conv_mode": "plain"},
        why_not_shared="its layers forget what follows the prompt that they were first given",
    ),
    "video_llama_3": Family(qwen),
    "video_llava": Family(llava, {"conv_mode": "referseg"}),
}

SEVERAL_IMAGES = {
    *("gemma3", "idefics3", "internvl", "llama4", "llava_onevision", "mistral3", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "smolvlm"),
}
"""Model types that take several images in one prompt: they were trained on such prompts, and the positions of each
image's tokens are verified (`tests/test_together.py`)."""

_NO_GRID = "its resampler mixes all patches into a few learned queries, so that no image token has a place"
_NO_LAYERS = "its language model is not built of layers whose attention can be captured"
_RESAMPLERS = (
    *("aria", "blip-2", "idefics", "idefics2", "instructblip", "instructblipvideo"),
    *("kosmos-2", "kosmos-2.5"),
)
REFUSED = dict.fromkeys(_RESAMPLERS, _NO_GRID)
"""Model types that cannot be used, and why."""

REFUSED |= dict.fromkeys(("blip", "git", "pi0", "pix2struct", "udop", "vision-encoder-decoder"), _NO_LAYERS)
_SPARSE = "each token attends to chosen keys only, and padding changes the choice"
REFUSED |= dict.fromkeys(("dots3_note", "glm5_next", "hy_v4_vl", "minimax_m3_vl", "qwen4_exp"), _SPARSE)
_VQ = "its images are codes of a vocabulary when the language model reads them: no token can be traced to its pixels"
REFUSED |= dict.fromkeys(("apertus1p5", "chameleon", "emu3"), _VQ)
REFUSED |= {
    "deepseek_ocr2": _NO_GRID,
    "diffusion_gemma": "it refines whole blocks of text, so that no token comes just before the answer",
    "evolla": "it reads proteins, and no images",
    "hunyuan_vl": "it numbers the images of a batch, so that a sample's attention depends on the others",
    "inkling2_loop": "its layers run several times, and the passes have attention of their own",
    "granite4_vision": "windows of learned queries mix its patches, and their features enter layer by layer",
    "mistral4": "it reads text, and no images",
    "mistral_large4": "each token attends to chosen keys only, by a scale that changes with padding",
    "nemotron_h_omni": "its attention layers are mixers among others, which the capture does not find",
    "pp_formulanet": "its processor takes an image and no text",
    "shieldgemma2": "its processor asks about its own policies, whatever the prompt says",
    "step3p7": "its layers differ in their number of heads",
    "t5gemma2": "its decoder attends to its own tokens and to the encoder's in one softmax",
}


def family_of(config: Any) -> Family:
    """Return the family of a checkpoint; for an unlisted one, a row that assumes only a grid of image tokens."""
    return FAMILIES.get(config.model_type) or Family(unknown, {})


def family_defaults(config: Any) -> Defaults:
    """Return the options that follow from a checkpoint's configuration; empty for an unlisted family."""
    defaults = family_of(config).defaults
    return defaults(config) if callable(defaults) else defaults


def views_of(image: ProcessedImage) -> list[View]:
    """Return the views of one image: where its tokens lie, in each rendering of it that the model gets.

    Views without tokens are left out: the tiles of a very elongated image may be nothing but padding.

    Raises:
        UsageError: the image tokens form no grid, or their number does not match the family's geometry.
    """
    return [view for view in family_of(image.config).views(image) if view.index.size]


def check_several(config: Any, name: str) -> None:
    """Raise UsageError, naming the families that can, if this one does not take several images in one prompt."""
    if config.model_type not in SEVERAL_IMAGES:
        supported = ", ".join(sorted(SEVERAL_IMAGES))
        raise UsageError(f"{name} (model type '{config.model_type}') takes one image in a prompt; several: {supported}")


def layout_of_first(pair: ProcessedImage) -> Layout:
    """Return the token layout of the first of two equal images in one prompt.

    A processor may treat one of several images differently from a single one (LLaVA-OneVision's does), so the layout
    is read from a prompt with two equal images: each has half of the image tokens, and everything that the prompt
    says about the first comes before the second.
    """
    half = pair.tokens.size // 2
    ids = pair.inputs["input_ids"][:, : pair.tokens[half]]
    first = replace(pair, inputs={**pair.inputs, "input_ids": ids})
    views = [replace(view, index=np.searchsorted(first.tokens, view.index)) for view in views_of(first)]
    return Layout(half, views)


def check_family(config: Any) -> None:
    """Refuse a family that cannot be used, and warn about an unverified one, before any weights are downloaded.

    Raises:
        UsageError: the family is refused, or has no image token.
    """
    name = config.model_type
    if name in REFUSED:
        raise UsageError(f"model type '{name}' cannot be used: {REFUSED[name]}")
    if name not in FAMILIES:
        image_token_id(config)  # raises if there is none
        log.warning(
            "model type '%s' is not among the verified families: its image tokens are assumed to be one grid over the "
            "whole image, which nobody has checked",
            name,
        )
