"""What is known about a checkpoint before it is loaded: the files of `config/model/`, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head

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
    system: str | None = None
    heads: tuple[Head, ...] = field(default=())

    @property
    def folder(self) -> str:
        """Name of this model's folder under `output_dir`."""
        return self.label or folder_name(self.name)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelSpec:
        """From a composed `model` group. Raises UsageError on unknown keys and wrong heads."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(f"model.{min(unknown)} is no option of a model; see config/model/tiny.yaml")
        heads = tuple(Head.parse(str(head)) for head in values.get("heads") or ())
        return cls(**{**values, "heads": heads})


def folder_name(name: str) -> str:
    """A safe folder name for a Hugging Face id or a local folder.

    >>> folder_name("org/some-model"), folder_name("/data/models/mine/")
    ('org--some-model', 'mine')
    """
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    text = Path(name).expanduser().resolve().name if local else name.replace("/", "--")
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")
    return safe or "model"


@cache
def known_specs() -> dict[str, ModelSpec]:
    """Every file of `config/model/`, by its stem (`tiny`, `llava`, ...)."""
    from omegaconf import OmegaConf  # a Hydra dependency; not needed to import the package

    folder = files("localization_heads") / "config" / "model"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            values = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
            assert isinstance(values, dict)
            found[file.name.removesuffix(".yaml")] = ModelSpec.from_mapping(values)  # type: ignore[arg-type]
    return found


def find_spec(name: str) -> ModelSpec:
    """The spec of a config's stem, of a checkpoint's name, or a bare one for a checkpoint that nobody described."""
    name = CONVERTED.get(name, name)
    known = known_specs()
    if name in known:
        return known[name]
    for spec in known.values():
        if spec.name == name:
            return spec
    return ModelSpec(name=name)


def compose_spec(values: Mapping[str, Any], choice: str) -> ModelSpec:
    """The spec that `model=CHOICE model.key=value ...` asks for.

    When `model.name` names another checkpoint than the chosen file, the file's facts (heads, padding, system
    sentence) are about the wrong model: take those of the named one and keep only what the user overrode.
    """
    asked, chosen = ModelSpec.from_mapping(values), known_specs()[choice]
    if asked.name == chosen.name:
        return asked
    overrides = {f.name: getattr(asked, f.name) for f in fields(ModelSpec) if f.name != "name"}
    overrides = {key: value for key, value in overrides.items() if value != getattr(chosen, key)}
    return replace(find_spec(asked.name), **overrides)
