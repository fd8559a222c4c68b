"""Known checkpoints: the `ModelSpec` of each file in `config/model/`, and which of them applies to a name.

The files describe checkpoints by name. For a local copy, or a checkpoint without a file, the defaults of its family
apply (`families.table`). Options given by the user or by a file take precedence over these.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.options.compose import choices_of, load_preset
from localization_heads.options.declaration import did_you_mean
from localization_heads.options.groups import ModelSpec

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
"""The `name` of the model inside this package."""

KNOWN_SHAPES = {
    "llava": ("llava", 32, 32, 4096, 1024, 336, 14),
    "llava-13b": ("llava", 40, 40, 5120, 1024, 336, 14),
    "tiny": ("llava", 6, 8, 128, 128, 192, 8),
}
"""Shapes of the checkpoints with known heads, by the stem of their file in `config/model/`.

`model_type`; layers, heads and width of the language model; width, image size and patch size of the vision tower.
"""

CONVERTED = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "liuhaotian/llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "liuhaotian/llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "liuhaotian/llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "liuhaotian/llava-v1.6-34b": "llava-hf/llava-v1.6-34b-hf",
}
"""Original LLaVA checkpoints, which transformers cannot read, and the same weights converted for it."""


def find_known_shape(config: Any) -> str | None:
    """Return the key of `KNOWN_SHAPES` that a configuration matches, or None."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    shape = (
        config.model_type,
        *(getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")),
        *(getattr(vision, name, None) for name in ("hidden_size", "image_size", "patch_size")),
    )
    return next((stem for stem, known in KNOWN_SHAPES.items() if known == shape), None)


@cache
def known_specs() -> dict[str, ModelSpec]:
    """Return the spec in every file of `config/model/`, by the file's stem (`tiny`, `llava`, ...)."""
    return {stem: ModelSpec.of(load_preset("model", stem), "model.") for stem in choices_of("model")}


def resolve_converted(name: str) -> str:
    """Replace the name of an original LLaVA checkpoint by that of the converted weights, with a warning."""
    if name in CONVERTED:
        log.warning("%s is in the original LLaVA format: loading the converted %s", name, CONVERTED[name])
    return CONVERTED.get(name, name)


def find_spec(name: str, like: str | None = None) -> ModelSpec:
    """Return the spec for a file's stem or a checkpoint's name; one with only a name if no file describes it.

    Args:
        like: a known model, by its stem or its checkpoint's name, whose settings are applied to `name`.

    Raises:
        UsageError: `like` is not a known model.
    """
    if like is not None:
        known = _find_known(resolve_converted(like))
        if known is None:
            hint = did_you_mean(like, known_specs()).strip() or f"choose one of {', '.join(known_specs())}"
            raise UsageError(f"like={like}: no such model is known; {hint}")
        return replace(known, name=name)
    name = resolve_converted(name)
    return _find_known(name) or ModelSpec(name=name)


def _find_known(name: str) -> ModelSpec | None:
    specs = known_specs()
    return specs.get(name) or next((spec for spec in specs.values() if spec.name == name), None)


def with_family_defaults(spec: ModelSpec, defaults: Mapping[str, Any]) -> ModelSpec:
    """Return the spec with the defaults of its family for the options that neither user nor file has set."""
    return replace(spec, **{name: value for name, value in defaults.items() if getattr(spec, name) is None})


def compose_spec(composed: ModelSpec, choice: str, overrides: Sequence[str] | None = None) -> ModelSpec:
    """Return the spec that `model=CHOICE model.key=value ...` asks for.

    If `model.name` names a known checkpoint other than that of the chosen file, the file's settings (heads, padding,
    system sentence) describe the wrong model: the spec of the named one is used, with the options that the user has
    set. But `model=llava model.name=/data/my-folder` (or an id without a file) states what the weights are, so the
    file's settings apply to them.

    Args:
        composed: the option group as Hydra composes it.
        choice: the stem of the chosen file.
        overrides: the command line's; None treats every value that differs from the file's as set by the user.
    """
    chosen = known_specs().get(choice, ModelSpec())
    is_unknown = _find_known(CONVERTED.get(composed.name, composed.name)) is None
    if composed.name == chosen.name or (is_unknown and f"model={choice}" in (overrides or ())):
        return composed
    names = [field.name for field in fields(ModelSpec) if field.name != "name"]
    if overrides is None:
        user_set = {name for name in names if getattr(composed, name) != getattr(chosen, name)}
    else:
        user_set = {text.partition("=")[0].removeprefix("model.") for text in overrides if text.startswith("model.")}
    return replace(find_spec(composed.name), **{name: getattr(composed, name) for name in names if name in user_set})
