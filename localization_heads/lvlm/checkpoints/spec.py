"""`ModelSpec`: a checkpoint and the facts about it, from the files of `config/model/`.

The files describe checkpoints by name. A local copy, or a checkpoint that has no file, gets what follows from its
`model_type` instead (`families.FAMILIES`). What the user or a file says takes precedence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.options.compose import choices_of, preset
from localization_heads.options.groups import ModelSpec
from localization_heads.options.kinds import did_you_mean

log = logging.getLogger(__name__)


SHAPES = {
    "llava": ("llava", 32, 32, 4096, 1024, 336, 14),
    "llava-13b": ("llava", 40, 40, 5120, 1024, 336, 14),
    "tiny": ("llava", 6, 8, 128, 128, 192, 8),
}
"""The shapes of checkpoints with known heads, by their file in `config/model/`.

That is what distinguishes checkpoints of one family: the `model_type`; layers, heads and width of the language model;
width, image size and patch size of the vision tower.
"""


def looks_like(config: Any) -> str | None:
    """The file of `config/model/` whose checkpoint has this shape, if it is one with known heads."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    sizes = [
        *(getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")),
        *(getattr(vision, name, None) for name in ("hidden_size", "image_size", "patch_size")),
    ]
    return next((stem for stem, shape in SHAPES.items() if shape == (config.model_type, *sizes)), None)


EMBEDDED = "embedded"
"""The `name` of the model inside this package."""

# The original checkpoints cannot be read by transformers; these are the same weights, converted.
CONVERTED = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "liuhaotian/llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
}


@cache
def known_specs() -> dict[str, ModelSpec]:
    """Every file of `config/model/`, by its stem (`tiny`, `llava`, ...)."""
    return {stem: ModelSpec.of(preset("model", stem), "model.") for stem in choices_of("model")}


def converted(name: str) -> str:
    """The name itself or, with a notice, that of the same weights converted for transformers."""
    if name in CONVERTED:
        log.warning("%s is in the original LLaVA format: taking its converted twin %s", name, CONVERTED[name])
    return CONVERTED.get(name, name)


def find_spec(name: str, like: str | None = None) -> ModelSpec:
    """The spec for a file's stem or for a checkpoint's name; a bare one for a checkpoint that no file describes.

    Args:
        like: a known model, by its stem or its checkpoint's name, whose facts are taken for `name`.

    Raises:
        UsageError: `like` is not a known model.
    """
    if like is not None:
        known = _known(converted(like))
        if known is None:
            hint = did_you_mean(like, known_specs()).strip() or f"choose one of {', '.join(known_specs())}"
            raise UsageError(f"like={like}: no such model is known; {hint}")
        return replace(known, name=name)
    name = converted(name)
    return _known(name) or ModelSpec(name=name)


def _known(name: str) -> ModelSpec | None:
    """The spec of a config's stem or of a checkpoint's name."""
    known = known_specs()
    return known.get(name) or next((spec for spec in known.values() if spec.name == name), None)


def with_family(spec: ModelSpec, facts: Mapping[str, Any]) -> ModelSpec:
    """The spec, with the facts of its family wherever neither user nor file says anything."""
    return replace(spec, **{name: value for name, value in facts.items() if getattr(spec, name) is None})


def compose_spec(asked: ModelSpec, choice: str, overrides: Sequence[str] | None = None) -> ModelSpec:
    """The spec that `model=CHOICE model.key=value ...` asks for.

    If `model.name` names another known checkpoint than the chosen file, the file's facts (heads, padding, system
    sentence) are about the wrong model: those of the named one are taken, with only the user's own options kept. But
    `model=llava model.name=/data/my-folder` (or an id without a file) states what the weights are, so the file's facts
    apply to them.

    Args:
        asked: the composed group.
        overrides: what the user wrote on the command line; None takes every value that differs from the file's.
    """
    chosen = known_specs().get(choice, ModelSpec())
    said_so = f"model={choice}" in (overrides or ()) and _known(CONVERTED.get(asked.name, asked.name)) is None
    if asked.name == chosen.name or said_so:
        return asked
    if overrides is None:
        given = {f.name for f in fields(ModelSpec) if getattr(asked, f.name) != getattr(chosen, f.name)}
    else:
        given = {
            text.partition("=")[0].removeprefix("model.") for text in overrides if text.startswith("model.")
        }
    kept = {f.name: getattr(asked, f.name) for f in fields(ModelSpec) if f.name in given - {"name"}}
    return replace(find_spec(asked.name), **kept)
