"""Checks of a checkpoint's files before its weights are read.

Broken files, and sizes in the configuration that the weights cannot have, are refused with one line that says what to
do. A checkpoint's configuration is untrusted input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError, WorkError, first_line
from localization_heads.lvlm.checkpoints.spec import CONVERTED

FACTS = "localization_heads.json"
"""A file beside a checkpoint with facts about it for this tool."""
MAX_JSON = 256 << 20
"""Bytes of one JSON file of a checkpoint; the largest tokenizers have some 40 MB."""
MAX_FACTS = 1 << 20
MAX_COUNT = 10_000
"""Layers, or experts of a layer."""
MAX_WEIGHTS = 1 << 42
"""In one kind of matrix of a model whose weights are not here yet."""

_POINTER = b"version https://git-lfs"
_ORIGINAL = re.compile(r"Llava\w*ForCausalLM")
_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "depths",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Weights:
    """The weights on the disk.

    Args:
        num_bytes: of all their files.
        largest_number: the largest in the names of tensors, which number the layers; None where unreadable.
    """

    num_bytes: int
    largest_number: int | None


def check_files(folder: Path, shown: str) -> None:
    """Refuse a folder whose files are not what their names say.

    Args:
        shown: option and value, which the messages begin with.

    Raises:
        UsageError: a JSON file too large for one, or an index of weights that leads out of the folder.
        WorkError: a pointer of Git LFS where a file should be.
    """
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        if size < 1024 and _head(file).startswith(_POINTER):
            raise WorkError(
                f"{shown}: {file.name} is a Git LFS pointer and not the file itself{_missing(file)}; "
                "run 'git lfs install && git lfs pull' in the folder"
            )
        if file.suffix == ".json" and size > MAX_JSON:
            raise UsageError(
                f"{shown}: {file.name} has {size >> 20:,} MB: too large for a file of a checkpoint"
            )
        if file.name.endswith(".index.json"):
            _check_index(file, shown)


def _head(file: Path) -> bytes:
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(1024)
    return b""


def _missing(pointer: Path) -> str:
    size = re.search(rb"^size (\d{1,18})$", _head(pointer), re.MULTILINE)
    return f" ({int(size[1]) / 1e6:,.1f} MB that were not fetched)" if size else ""


def _check_index(file: Path, shown: str) -> None:
    try:
        shards = json.loads(file.read_bytes())["weight_map"].values()
        names = {name for name in shards if isinstance(name, str)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return  # transformers says what is wrong with it
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
            raise UsageError(f"{shown}: {file.name} names weights outside the folder: {name[:100]}")


def raw_config(source: str, **options: Any) -> dict[str, Any]:
    """`config.json` as it is written, before any class makes something of it.

    Args:
        source: a folder or a hub id.
        options: of `from_pretrained`.

    Raises:
        ValueError: it holds something else than settings by name.
    """
    from transformers import PreTrainedConfig

    written = PreTrainedConfig.get_config_dict(source, **options)[0]
    if not isinstance(written, dict):
        raise ValueError("config.json does not hold settings by name")
    return written


def check_original(config: Mapping[str, Any], shown: str) -> None:
    """Raises UsageError for a checkpoint in the format of the LLaVA repository, and names the converted one."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    found = next((name for name in names if isinstance(name, str) and _ORIGINAL.fullmatch(name)), None)
    if found is None:
        return
    twin = _twin(config, shown)
    known = (
        f"its converted twin is {twin}: model.name={twin}"
        if twin
        else "take the one converted for it (llava-hf)"
    )
    raise UsageError(
        f"{shown}: it is in the original LLaVA format ({found}), which transformers cannot read; {known}"
    )


def _twin(config: Mapping[str, Any], shown: str) -> str | None:
    """By its name, else by what its configuration says of version, language model and size."""
    names = f"{shown} {config.get('_name_or_path')}".lower()
    for original, twin in CONVERTED.items():
        if original.partition("/")[2] in names:
            return twin
    size = {4096: "7b", 5120: "13b", 7168: "34b"}.get(_count(config.get("hidden_size")), "of another size")
    is_next, is_mistral = (
        config.get("image_aspect_ratio") == "anyres",
        "mistral" in str(config["architectures"]).lower(),
    )
    base = "" if not is_next or size == "34b" else "mistral-" if is_mistral else "vicuna-"
    return CONVERTED.get(f"liuhaotian/llava-v{'1.6' if is_next else '1.5'}-{base}{size}")


def check_counts(config: Mapping[str, Any], shown: str) -> None:
    """Raises UsageError for more layers or experts than any model has: configurations make lists of them."""
    for name, count in _numbers(config, (*_LAYERS, *_EXPERTS)):
        if count > MAX_COUNT:
            raise UsageError(f"{shown}: config.json asks for {name}={count:,}: no model has that many")


def num_bytes(folder: Path | None) -> int:
    """Bytes of the weights in a folder; 0 where it is not known."""
    return sum(file.stat().st_size for file in _weight_files(folder))


def _weight_files(folder: Path | None) -> list[Path]:
    inside = folder.iterdir() if folder else ()
    return [path for path in inside if path.suffix in (".safetensors", ".bin") and path.is_file()]


def weights_in(folder: Path | None) -> Weights | None:
    """The weights of a folder; None where there are none."""
    files = _weight_files(folder)
    return Weights(num_bytes(folder), _largest_number(files)) if files else None


def _largest_number(files: Sequence[Path]) -> int | None:
    from safetensors import SafetensorError, safe_open

    largest = 0
    for file in files:
        if file.suffix != ".safetensors":
            return None
        try:
            with safe_open(file, "pt") as opened:
                parts = (part for name in opened.keys() for part in name.split("."))  # noqa: SIM118
                largest = max([largest, *(int(part) for part in parts if part.isdecimal() and len(part) < 9)])
        except (OSError, SafetensorError):
            return None  # transformers says what is wrong with it
    return largest


def check_size(config: Mapping[str, Any], weights: Weights | None, shown: str) -> None:
    """Refuse a model much larger than its weights before it is built: transformers would make up what is missing.

    Args:
        config: the whole configuration, defaults included.
        weights: None where they are not here yet.

    Raises:
        UsageError: more than twice the layers that there are weights for, or matrices that cannot be among them.
    """
    if weights is not None and weights.largest_number is not None:
        layers = weights.largest_number + 1
        for name, count in _numbers(config, _LAYERS):
            if count > 2 * layers:
                raise UsageError(
                    f"{shown}: config.json asks for {name}={count:,}, and its weights are those of {layers} layers: "
                    "one of the two belongs to another model"
                )
    # The fewest bits in use, 2 for a weight, make 4 weights a byte.
    limit = MAX_WEIGHTS if weights is None else 8 * weights.num_bytes + (1 << 24)
    for prefix, part in _parts(config):
        least = _least_weights(part)
        if least > limit:
            held = "" if weights is None else f", and its weights have {weights.num_bytes / 1e6:,.0f} MB"
            where = f"the sizes under {prefix.rstrip('.')}" if prefix else "its sizes"
            raise UsageError(f"{shown}: config.json asks for {least:.1e} weights ({where}){held}")


def _least_weights(part: Mapping[str, Any]) -> int:
    """What no model does without: the embedding, or all layers' queries or feed-forward matrices."""
    width = _largest(part, _WIDTHS)
    layers = max(1, _largest(part, _LAYERS))
    heads = _largest(part, ("num_attention_heads",)) * _largest(part, ("head_dim",))
    return width * max(
        _largest(part, ("vocab_size",)), layers * _largest(part, ("intermediate_size",)), layers * heads
    )


def _largest(part: Mapping[str, Any], names: Sequence[str]) -> int:
    return max(_count(part.get(name)) for name in names)


def _numbers(config: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The counts under these names, with their paths; of a list, each."""
    for prefix, part in _parts(config):
        for name in names:
            value = part.get(name)
            values = value if isinstance(value, list) else [value]
            yield from ((prefix + name, _count(number)) for number in values)


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and those inside it, with the path of each."""
    waiting = [("", config)]
    while waiting:
        prefix, part = waiting.pop()
        yield prefix, part
        for name, value in part.items():
            if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
                waiting.append((f"{prefix}{name}.", value))


def _count(value: Any) -> int:
    """A number as it can be multiplied and shown, 0 for anything else."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return min(max(value, 0), 1 << 60) if is_number else 0


def system_sentence(folder: Path) -> str | None:
    """The system sentence that the checkpoint's own facts file names; None where there is none.

    Raises:
        UsageError: the file is not what it should be; names it.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_FACTS:
            raise ValueError(f"it has more than {MAX_FACTS >> 20} MB")
        facts = json.loads(path.read_bytes())
        system = facts.get("system") if isinstance(facts, dict) else facts
        if not isinstance(facts, dict) or not isinstance(system, str | None):
            raise ValueError('it should read {"system": "a sentence"}')
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {first_line(error)}; mend or delete it") from None
    return system
