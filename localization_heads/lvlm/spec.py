"""`ModelSpec`: a checkpoint and the facts about it, from `config/model/` or, failing that, from its family.

The files of `config/model/` describe checkpoints by name. A local copy, or a relative that has no file, goes by
another name; the settings that follow from its `model_type` are in one table here. What the user or a file says takes
precedence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.heads.record import FoundWith

Facts = dict[str, Any]
"""Options of a model (`config/model/base.yaml`) by name."""

_VICUNA = 32_100
"""Entries of Llama 2's vocabulary, on which Vicuna is built, with those that LLaVA adds."""


def _llava(config: Any) -> Facts:
    """LLaVA-1.5 and models built like it: CLIP's processor crops, but they were trained on padded squares."""
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
    """The sizes in a configuration that distinguish checkpoints of one family."""

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
"""The shapes of checkpoints with known heads, by their file in `config/model/`."""


def family_facts(config: Any) -> Facts:
    """The options that follow from a checkpoint's configuration; empty for a family that is not in the table."""
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


log = logging.getLogger(__name__)

BASE = "base"
"""The file of `config/model/` that holds every option; the others build on it."""
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


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and the facts about it; the fields are the keys of `config/model/*.yaml`, explained there."""

    name: str
    label: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None
    pad_to_square: bool | None = None
    conv_mode: str | None = None
    system: str | None = None
    heads: tuple[Head, ...] = field(default=())
    top_n: int = 10
    native_box: str | None = None

    @property
    def folder(self) -> str:
        """Name of this model's folder under `output_dir`."""
        return self.label or folder_name(self.name)

    @property
    def heads_found_with(self) -> FoundWith | None:
        """The settings that the published heads of `config/model/` were found with: those of the same file."""
        known = next((s for s in known_specs().values() if s.heads and s.heads == self.heads), None)
        return None if known is None else {"conv_mode": known.conv_mode, "query_token": "last"}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelSpec:
        """From a composed `model` group. Raises UsageError on unknown keys and wrong heads."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(f"model.{min(unknown)} is no option of a model; see config/model/{BASE}.yaml")
        return cls(**{**values, "heads": _published_heads(values.get("heads"))})


def _published_heads(names: Any) -> tuple[Head, ...]:
    try:
        return tuple(Head.parse(str(name)) for name in names or ())
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.heads={names}: write a list such as [14-24,14-13,14-26]") from error


def folder_name(name: str) -> str:
    """A safe folder name for a Hugging Face id or a local folder.

    Two local folders of one name get two: eight digits of the path's digest tell them apart.

    >>> folder_name("org/some-model"), folder_name("/data/models/mine/")
    ('org--some-model', 'mine-087ac83c')
    """
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    path = local_path(name).resolve()
    text = f"{path.name}-{sha256(str(path).encode()).hexdigest()[:8]}" if local else name.replace("/", "--")
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")
    return safe or "model"


def local_path(name: str) -> Path:
    """The path that a name would be, with `~` for a home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~someone who is not known here
        return Path(name)


@cache
def known_specs() -> dict[str, ModelSpec]:
    """Every file of `config/model/` but the base, by its stem (`tiny`, `llava`, ...)."""
    folder = files("localization_heads") / "config" / "model"
    stems = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    base = _read(BASE)
    return {stem: ModelSpec.from_mapping({**base, **_read(stem)}) for stem in stems if stem != BASE}


def _read(stem: str) -> dict[str, Any]:
    """The keys of one file, without Hydra's own."""
    from omegaconf import OmegaConf  # a Hydra dependency; not needed to import the package

    text = (files("localization_heads") / "config" / "model" / f"{stem}.yaml").read_text(encoding="utf-8")
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "defaults"}


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
            near = get_close_matches(like, known_specs(), 1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known_specs())}"
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


def compose_spec(values: Mapping[str, Any], choice: str, overrides: Sequence[str] | None = None) -> ModelSpec:
    """The spec that `model=CHOICE model.key=value ...` asks for.

    If `model.name` names another known checkpoint than the chosen file, the file's facts (heads, padding, system
    sentence) are about the wrong model: those of the named one are taken, with only the user's own options kept. But
    `model=llava model.name=/data/my-folder` (or an id without a file) states what the weights are, so the file's facts
    apply to them.

    Args:
        values: the composed group.
        overrides: what the user wrote on the command line; None takes every value that differs from the file's.
    """
    asked, chosen = ModelSpec.from_mapping(values), known_specs().get(choice, ModelSpec(name=""))
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
