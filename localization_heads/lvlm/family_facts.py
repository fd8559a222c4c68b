"""What a checkpoint needs because of its family, told from its configuration: for folders, and kin of known models.

The files of `config/model/` describe checkpoints by name. A copy in a folder, or a sister that nobody described, has
another name; what follows from its `model_type` is here, in one table. What the user or a file says comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Facts = dict[str, Any]
"""Options of a model (`config/model/base.yaml`) by name."""

_VICUNA = 32_100
"""Entries of Llama 2's vocabulary, on which Vicuna is built, with those that LLaVA adds."""


def _llava(config: Any) -> Facts:
    """LLaVA-1.5 and what is built like it: CLIP's processor crops, but the model was trained on padded squares."""
    tower = config.vision_config.model_type
    if tower == "pixtral":
        return {"conv_mode": "chat"}
    return {**_prompt_of(config), **({"pad_to_square": True} if tower == "clip_vision_model" else {})}


def _prompt_of(config: Any) -> Facts:
    """The paper's prompt for Vicuna, the chat template for the others: LLaVA-1.6 has language models of both kinds."""
    text = config.get_text_config()
    vicuna = text.model_type == "llama" and text.vocab_size <= _VICUNA
    return {"conv_mode": "referseg" if vicuna else "chat"}


def _paligemma(config: Any) -> Facts:
    eager = config.get_text_config().model_type == "gemma2"  # its soft-capped logits need it
    return {
        "conv_mode": "plain",
        "native_box": "paligemma",
        **({"attn_implementation": "eager"} if eager else {}),
    }


_CHAT: Facts = {"conv_mode": "chat"}
_REFERSEG: Facts = {"conv_mode": "referseg"}

FACTS: dict[str, Facts | Callable[[Any], Facts]] = {
    "aya_vision": _CHAT,
    "cohere2_vision": _CHAT,
    "deepseek_vl": _REFERSEG,
    "deepseek_vl_hybrid": _REFERSEG,
    "florence2": {"conv_mode": "plain", "native_box": "florence2"},
    "gemma3": _CHAT,
    "gemma3n": _CHAT,
    "gemma4": _CHAT,
    "glm4v": {"conv_mode": "chat", "native_box": "glm"},
    "idefics3": _CHAT,
    "internvl": {"conv_mode": "chat", "native_box": "internvl"},
    "janus": _CHAT,
    "kimi_k25": _CHAT,
    "lfm2_vl": _CHAT,
    "llama4": _CHAT,
    "llava": _llava,
    "llava_next": _prompt_of,
    "llava_onevision": _CHAT,
    "mistral3": _CHAT,
    "mllama": _CHAT,
    "ovis2": _CHAT,
    "paligemma": _paligemma,
    "qwen2_5_vl": {"conv_mode": "chat", "native_box": "qwen2_5"},
    "qwen2_vl": {"conv_mode": "chat", "native_box": "qwen2"},
    "qwen3_5": {"conv_mode": "chat", "native_box": "qwen3"},
    "qwen3_vl": {"conv_mode": "chat", "native_box": "qwen3"},
    "smolvlm": _CHAT,
    "vipllava": _REFERSEG,
}
"""By `model_type`. Mixtures of experts (`qwen3_vl_moe`) are asked as their family is."""


class Shape(NamedTuple):
    """What tells checkpoints of one family apart in their configurations."""

    model_type: str
    layers: int
    heads: int
    width: int
    vision_width: int
    image_size: int
    patch_size: int


SHAPES = {
    "llava": Shape("llava", 32, 32, 4096, 1024, 336, 14),
    "llava-13b": Shape("llava", 40, 40, 5120, 1024, 336, 14),
    "tiny": Shape("llava", 6, 8, 128, 128, 192, 8),
}
"""Of the checkpoints whose heads are known, by their file in `config/model/`: more is known of them than the family."""


def family_facts(config: Any) -> Facts:
    """The options that follow from a checkpoint's configuration; empty for a family that nobody described."""
    found = FACTS.get(config.model_type) or FACTS.get(config.model_type.removesuffix("_moe"), {})
    return dict(found(config) if callable(found) else found)


def looks_like(config: Any) -> str | None:
    """The file of `config/model/` whose checkpoint has this shape, if it is one with known heads."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    sizes = [
        *(getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")),
        *(getattr(vision, name, None) for name in ("hidden_size", "image_size", "patch_size")),
    ]
    return next((stem for stem, shape in SHAPES.items() if [config.model_type, *sizes] == list(shape)), None)
