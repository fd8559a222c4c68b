"""Checks of a checkpoint's files before its weights are read.

A checkpoint is untrusted input. Broken files, and configurations whose sizes cannot belong to the weights, are refused
with a one-line error that says what to do.
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

FACTS_FILE = "localization_heads.json"
"""Optional file in a checkpoint folder with settings for this tool."""
MAX_FACTS_BYTES = 1 << 20
MAX_JSON_BYTES = 256 << 20
"""For any JSON file of a checkpoint; the largest tokenizers have about 40 MB."""
MAX_COUNT = 10_000
"""Upper bound for the number of layers, and of experts per layer."""
MAX_NUM_WEIGHTS = 1 << 42
"""Upper bound for one kind of matrix, for a model whose weights are not downloaded yet."""

_LFS_POINTER = b"version https://git-lfs"
_ORIGINAL_LLAVA = re.compile(r"Llava\w*ForCausalLM")
_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "depths",
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Weights:
    """Weight files on disk.

    Args:
        num_bytes: total size of the files.
        max_index: the largest number in any tensor name, normally that of the last layer; None if the files
            cannot be read.
    """

    num_bytes: int
    max_index: int | None


def check_files(folder: Path, option: str) -> None:
    """Check that the files of a checkpoint folder are what their names say.

    Args:
        option: the option and its value (`model.name=...`), with which error messages begin.

    Raises:
        UsageError: a JSON file is too large, or an index of weights points outside the folder.
        WorkError: a file is a Git LFS pointer.
    """
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        size = file.stat().st_size
        if size < 1024 and (pointer := _read_start(file)).startswith(_LFS_POINTER):
            raise WorkError(
                f"{option}: {file.name} is a Git LFS pointer and not the file itself{_missing_size(pointer)}; "
                "run 'git lfs install && git lfs pull' in the folder"
            )
        if file.suffix == ".json" and size > MAX_JSON_BYTES:
            raise UsageError(f"{option}: {file.name} has {size >> 20:,} MB: too large for a file of a checkpoint")
        if file.name.endswith(".index.json"):
            _check_index(file, option)


def _read_start(file: Path) -> bytes:
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(1024)
    return b""


def _missing_size(pointer: bytes) -> str:
    size = re.search(rb"^size (\d{1,18})$", pointer, re.MULTILINE)
    return f" ({int(size[1]) / 1e6:,.1f} MB that were not fetched)" if size else ""


def _check_index(file: Path, option: str) -> None:
    try:
        shards = json.loads(file.read_bytes())["weight_map"].values()
        names = {name for name in shards if isinstance(name, str)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return  # transformers reports a malformed index
    for name in sorted(names):
        if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
            raise UsageError(f"{option}: {file.name} names weights outside the folder: {name[:100]}")


def raw_config(source: str, **options: Any) -> dict[str, Any]:
    """Return `config.json` as written, before any configuration class interprets it.

    Args:
        source: a folder or a hub id.
        options: passed on to transformers, as for `from_pretrained`.

    Raises:
        ValueError: it is not a JSON object.
    """
    from transformers import PreTrainedConfig

    config = PreTrainedConfig.get_config_dict(source, **options)[0]
    if not isinstance(config, dict):
        raise ValueError("config.json does not hold settings by name")
    return config


def check_not_original_llava(config: Mapping[str, Any], option: str) -> None:
    """Raise UsageError for a checkpoint in the format of the LLaVA repository; name the converted checkpoint."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    original = next((name for name in names if isinstance(name, str) and _ORIGINAL_LLAVA.fullmatch(name)), None)
    if original is None:
        return
    converted = _converted_checkpoint(config, option)
    advice = (
        f"the same weights, converted, are {converted}: model.name={converted}"
        if converted
        else "use a converted checkpoint (llava-hf)"
    )
    raise UsageError(
        f"{option}: it is in the original LLaVA format ({original}), which transformers cannot read; {advice}"
    )


def _converted_checkpoint(config: Mapping[str, Any], option: str) -> str | None:
    """Find the hub id of the converted weights, by name or else by LLaVA version, language model and size."""
    names = f"{option} {config.get('_name_or_path')}".lower()
    for original, converted in CONVERTED.items():
        if original.partition("/")[2] in names:
            return converted
    size = {4096: "7b", 5120: "13b", 7168: "34b"}.get(_as_count(config.get("hidden_size")), "unknown")
    if config.get("image_aspect_ratio") != "anyres":
        return CONVERTED.get(f"liuhaotian/llava-v1.5-{size}")
    is_mistral = "mistral" in str(config["architectures"]).lower()
    base = "" if size == "34b" else "mistral-" if is_mistral else "vicuna-"
    return CONVERTED.get(f"liuhaotian/llava-v1.6-{base}{size}")


def check_counts(config: Mapping[str, Any], option: str) -> None:
    """Raise UsageError for more layers or experts than any model has.

    Configuration classes build lists of that length, so this check comes before them.
    """
    for name, count in _named_counts(config, (*_LAYER_COUNTS, *_EXPERT_COUNTS)):
        if count > MAX_COUNT:
            raise UsageError(f"{option}: config.json asks for {name}={count:,}: no model has that many")


def num_weight_bytes(folder: Path | None) -> int:
    """Return the size of the weight files in a folder; 0 without a folder."""
    return sum(file.stat().st_size for file in _weight_files(folder))


def weights_in(folder: Path | None) -> Weights | None:
    """Describe the weight files of a folder; None if there are none."""
    files = _weight_files(folder)
    return Weights(num_weight_bytes(folder), _max_index(files)) if files else None


def _weight_files(folder: Path | None) -> list[Path]:
    paths = folder.iterdir() if folder else ()
    return [path for path in paths if path.suffix in (".safetensors", ".bin") and path.is_file()]


def _max_index(files: Sequence[Path]) -> int | None:
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
            return None  # transformers reports a broken file
    return largest


def check_size(config: Mapping[str, Any], weights: Weights | None, option: str) -> None:
    """Refuse a configuration much larger than its weights, before the model is built.

    transformers would allocate the whole model and fill what is missing with random numbers.

    Args:
        config: the full configuration, including defaults.
        weights: None if they are not downloaded yet.

    Raises:
        UsageError: the configuration has more than twice the layers of the weights, or matrices too large for them.
    """
    if weights is not None and weights.max_index is not None:
        num_layers = weights.max_index + 1
        for name, count in _named_counts(config, _LAYER_COUNTS):
            if count > 2 * num_layers:
                raise UsageError(
                    f"{option}: config.json asks for {name}={count:,}, and its weights are those of {num_layers} "
                    "layers: one of the two belongs to another model"
                )
    # Quantized weights have at least 2 bits: 4 weights per byte, with a margin of two.
    limit = MAX_NUM_WEIGHTS if weights is None else 8 * weights.num_bytes + (1 << 24)
    for prefix, part in _nested_configs(config):
        num_weights = _min_num_weights(part)
        if num_weights > limit:
            held = "" if weights is None else f", and its weights have {weights.num_bytes / 1e6:,.0f} MB"
            where = f"the sizes under {prefix.rstrip('.')}" if prefix else "its sizes"
            raise UsageError(f"{option}: config.json asks for {num_weights:.1e} weights ({where}){held}")


def _min_num_weights(config: Mapping[str, Any]) -> int:
    """A lower bound: the largest of the embedding, all feed-forward matrices and all query projections."""
    width = _max_value(config, _WIDTHS)
    num_layers = max(1, _max_value(config, _LAYER_COUNTS))
    query_width = _max_value(config, ("num_attention_heads",)) * _max_value(config, ("head_dim",))
    return width * max(
        _max_value(config, ("vocab_size",)),
        num_layers * _max_value(config, ("intermediate_size",)),
        num_layers * query_width,
    )


def _max_value(config: Mapping[str, Any], names: Sequence[str]) -> int:
    return max(_as_count(config.get(name)) for name in names)


def _named_counts(config: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the values under these names at any depth, with their dotted paths; lists yield each of their values."""
    for prefix, part in _nested_configs(config):
        for name in names:
            value = part.get(name)
            values = value if isinstance(value, list) else [value]
            yield from ((prefix + name, _as_count(number)) for number in values)


def _nested_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and all configurations nested in it, each with its dotted path."""
    pending = [("", config)]
    while pending:
        prefix, part = pending.pop()
        yield prefix, part
        for name, value in part.items():
            if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
                pending.append((f"{prefix}{name}.", value))


def _as_count(value: Any) -> int:
    """Clamp an untrusted value to a range that can be multiplied and printed; 0 for anything but an integer."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return min(max(value, 0), 1 << 60) if is_number else 0


def system_sentence(folder: Path) -> str | None:
    """Return the system sentence from the checkpoint's `FACTS_FILE`; None if there is none.

    Raises:
        UsageError: the file is malformed.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_FACTS_BYTES:
            raise ValueError(f"it has more than {MAX_FACTS_BYTES >> 20} MB")
        facts = json.loads(path.read_bytes())
        system = facts.get("system") if isinstance(facts, dict) else facts
        if not isinstance(facts, dict) or not isinstance(system, str | None):
            raise ValueError('it should read {"system": "a sentence"}')
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {first_line(error)}; fix or delete it") from None
    return system
