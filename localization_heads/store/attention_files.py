"""Read and write attention files (`load_attention`, `save_attention`), and the analysis stored next to each.

There are two formats with the same content: `.pkl` (plain types and numpy arrays, for users' scripts) and
`.safetensors`. The published code's formats are supported as well:

- June 2025: a bare tensor `[L, H, 1, P*P]` (or, for reading, a tensor per layer), and `<stem>_metadata.pkl`;
- August 2025: `{"attn": tensor, "meta": {...}}` (for reading, also gzipped), and `<stem>_meta.pkl`.

The published code pads each image to a square, centred, without recording it; `image_box` is reconstructed from that.
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localization_heads.attention import AttentionMaps, Box
from localization_heads.errors import UsageError, shown
from localization_heads.store.files import parse_json, write_bytes
from localization_heads.store.paths import attention_stem, side_path
from localization_heads.store.pickle_parts import PickleRefusedError
from localization_heads.store.safe_pickle import MAX_FILE_BYTES, check_file, load_pickle, loads_pickle

VERSION = 1
MAX_SIDE = 1_000_000
MAX_WEIGHT = 1.01
"""Softmax weights are at most 1, plus rounding in half precision."""
_GZIP_LIMIT = 4, 32 << 20
"""A gzipped file may unpack to this multiple of its size plus this many bytes. Attention compresses about twofold."""
MOST_ASKED = 20
"""Maximum number of entries in `asked`."""
_TEXTS = ("image_file", "query", "prompt", "model", "id")


class _MalformedError(Exception):
    """The content is not that of an attention file; the message says why."""


def save_attention(maps: AttentionMaps, path: str | Path, format: str = "pkl") -> None:
    """Write `maps` atomically, in the format of the suffix (`.pkl` or `.safetensors`).

    Args:
        format: `published` or `published_august` write a `.pkl` that the published code reads (`_save_published`).
    """
    path = Path(path)
    _check_maps(maps.attention)
    if format in _METADATA_SUFFIXES:
        return _save_published(maps, path, format)
    attention = np.ascontiguousarray(maps.attention, dtype=np.float32)
    fields: dict[str, Any] = {
        "grid": [int(n) for n in maps.grid],
        "image_size": [int(n) for n in maps.image_size],
        "image_box": [float(x) for x in maps.image_box],
        **{name: str(getattr(maps, name)) for name in _TEXTS},
    }
    if maps.asked:
        fields["asked"] = {name: value for name, value in maps.asked.items() if value is not None}
    if path.suffix == ".pkl":
        content = {"version": VERSION, "attention": attention, **fields}
        write_bytes(path, pickle.dumps(content, protocol=4))
        _remove_other_metadata(path, None)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save

        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        write_bytes(path, save({"attention": attention}, {"version": str(VERSION), **metadata}))
    else:
        raise UsageError(f"{path}: an attention file ends in .pkl or .safetensors")


_METADATA_SUFFIXES = {"published": "_metadata.pkl", "published_august": "_meta.pkl"}
"""The published formats, and the suffix of the metadata file beside each."""


def _save_published(maps: AttentionMaps, path: Path, format: str) -> None:
    """Write a pickle of a torch tensor `[L, H, 1, P*P]` and its metadata.

    The published code assumes a square grid over the image padded to a square, and reads only `image_file`, `query`,
    `image_size` and `patch_size` (P). UsageError for maps that it would therefore misplace.
    """
    import torch

    (rows, columns), square = maps.grid, _padded_square(*maps.image_size)
    if rows != columns:
        raise UsageError(
            f"attention_format={format} supports only square grids, and this one is {columns} x {rows}: write pkl"
        )
    if max(abs(a - b) for a, b in zip(maps.image_box, square, strict=True)) > 1:
        covered = " ".join(f"{edge:.0f}" for edge in maps.image_box)
        raise UsageError(
            f"attention_format={format} assumes images padded to a square, and these maps cover {covered} of "
            f"{maps.image_size[0]} x {maps.image_size[1]} pixels: write pkl"
        )
    tensor = torch.from_numpy(np.array(maps.attention, dtype=np.float32)).flatten(2).unsqueeze(2)
    metadata: dict[str, Any] = {
        **{name: str(getattr(maps, name)) for name in _TEXTS},
        "image_size": maps.image_size,
        "model_name": maps.model,
        "vis_len": rows * columns,
        "patch_size": rows,
        "num_layers": maps.num_layers,
        "num_heads": maps.num_heads,
    }
    content = tensor if format == "published" else {"attn": tensor, "meta": metadata}
    write_bytes(path, pickle.dumps(content, protocol=4))
    write_bytes(side_path(path, _METADATA_SUFFIXES[format]), pickle.dumps(metadata, protocol=4))
    _remove_other_metadata(path, _METADATA_SUFFIXES[format])


def _remove_other_metadata(path: Path, kept: str | None) -> None:
    """Delete the metadata of other formats. This comes last: until then `is_in_format` reports an incomplete file."""
    for other in set(_METADATA_SUFFIXES.values()) - {kept}:
        side_path(path, other).unlink(missing_ok=True)


def is_in_format(path: Path, format: str) -> bool:
    """Whether a `.pkl` has exactly the metadata file that this format requires; True for other files."""
    if path.suffix != ".pkl":
        return True
    present = {suffix for suffix in _METADATA_SUFFIXES.values() if side_path(path, suffix).is_file()}
    required = {_METADATA_SUFFIXES[format]} if format in _METADATA_SUFFIXES else set()
    return present == required


def load_attention(path: str | Path) -> AttentionMaps:
    """Read an attention file of this tool or of the published code. UsageError, naming the file, if it is neither.

    The maps are checked: float32 `[layer, head, grid_h, grid_w]`, finite, not negative.
    """
    path = Path(path)
    content = _READERS.get(path.suffix, load_pickle)(path)
    try:
        if isinstance(content, dict) and "attention" in content:
            return _parse_content(content)
        return _parse_published(content, path)
    except _MalformedError as error:
        raise UsageError(f"{path}: {error}") from error


def _check_maps(attention: np.ndarray) -> None:
    if attention.ndim != 4 or 0 in attention.shape:
        raise _MalformedError(f"attention must be [layer, head, grid_h, grid_w], not {list(attention.shape)}")
    if attention.dtype.kind != "f":
        raise _MalformedError(f"attention must be floating point, not {attention.dtype}")
    low, high = attention.min(), attention.max()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _MalformedError("attention holds values that are not numbers (NaN or infinity)")
    if low < 0:
        raise _MalformedError("attention holds negative values")
    if high > MAX_WEIGHT:
        raise _MalformedError("attention holds values above 1, which no softmax gives")


def _parse_content(content: dict[Any, Any]) -> AttentionMaps:
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise _MalformedError(f"version {shown(version)} of the attention file is unknown: this tool reads {VERSION}")
    attention = content["attention"]
    if not isinstance(attention, np.ndarray):
        raise _MalformedError("'attention' is not an array")
    _check_maps(attention)
    if _parse_numbers(content, "grid", 2) != list(attention.shape[2:]):
        raise _MalformedError(f"'grid' does not fit the maps, which are {attention.shape[2]} x {attention.shape[3]}")
    texts: dict[str, Any] = {name: _parse_text(content, name) for name in _TEXTS}
    return AttentionMaps(
        attention=np.array(attention, dtype=np.float32, order="C"),
        image_box=_parse_box(content),
        image_size=_parse_size(_parse_numbers(content, "image_size", 2)),
        asked=_parse_asked(content),
        **texts,
    )


def _parse_numbers(content: Mapping[Any, Any], name: str, count: int) -> list[Any]:
    values = content.get(name)
    if not isinstance(values, list | tuple) or len(values) != count:
        raise _MalformedError(f"'{name}' must be a list of {count} numbers, not {shown(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SIDE:
            raise _MalformedError(f"'{name}' must be a list of {count} numbers, not {shown(values)}")
    return list(values)


def _parse_size(values: Sequence[Any]) -> tuple[int, int]:
    if any(value != int(value) or value < 1 for value in values):
        raise _MalformedError(f"'image_size' must be two whole numbers of pixels, not {shown(values)}")
    return int(values[0]), int(values[1])


def _parse_box(content: Mapping[Any, Any]) -> Box:
    x0, y0, x1, y1 = (float(value) for value in _parse_numbers(content, "image_box", 4))
    if x1 <= x0 or y1 <= y0:
        raise _MalformedError(f"'image_box' is empty: {shown(content['image_box'])}")
    return x0, y0, x1, y1


def _parse_text(content: Mapping[Any, Any], name: str) -> str:
    value = content.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _MalformedError(f"'{name}' must be text, not {shown(value)}")
    return value


def _parse_asked(content: Mapping[Any, Any]) -> dict[str, str | None] | None:
    """The validated `asked`; None for files of earlier versions, which lack it."""
    values = content.get("asked") or {}
    short = isinstance(values, dict) and len(values) <= MOST_ASKED
    if not short or not all(isinstance(text, str) for item in values.items() for text in item):
        raise _MalformedError(f"'asked' must be a few texts by name, not {shown(values)}")
    return dict(values) or None


def _parse_published(content: Any, path: Path) -> AttentionMaps:
    """Parse the published code's formats; the metadata is in the file or beside it."""
    metadata = _published_metadata(content, path)
    tensor = content["attn"] if isinstance(content, dict) and "attn" in content else content
    attention = _square_maps(_stack_layers(tensor), metadata.get("patch_size"))
    _check_maps(attention)
    if metadata.get("image_size") is not None:
        size = _parse_size(_parse_numbers(metadata, "image_size", 2))
        image_box = _padded_square(*size)
    else:  # the image is unknown; the grid stands in for it, one pixel per cell
        size = (attention.shape[3], attention.shape[2])
        image_box = (0.0, 0.0, float(size[0]), float(size[1]))
    return AttentionMaps(
        attention=attention,
        image_box=image_box,
        image_size=size,
        image_file=_parse_text(metadata, "image_file"),
        query=_parse_text(metadata, "query"),
        prompt=_parse_text(metadata, "prompt"),
        model=_parse_text(metadata, "model"),
        id=attention_stem(path),
    )


def _published_metadata(content: Any, path: Path) -> dict[Any, Any]:
    """The published code's metadata, from the file itself or from the one beside it; empty if there is none."""
    if isinstance(content, dict) and content.get("meta"):
        origin, metadata = "'meta'", content["meta"]
    else:
        companions = (side_path(path, suffix) for suffix in ("_metadata.pkl", "_meta.pkl"))
        file = next((file for file in companions if file.is_file()), None)
        origin, metadata = (f"{file.name} beside it", load_pickle(file)) if file else ("", {})
    if not isinstance(metadata, dict):
        raise _MalformedError(f"{origin} is not a dict of image_file, query and image_size")
    return metadata


def _stack_layers(content: Any) -> np.ndarray:
    """Copy an array, or a list or dict of arrays per layer, into one float32 array."""
    if isinstance(content, np.ndarray):
        return np.array(content, dtype=np.float32, order="C")
    if isinstance(content, dict) and content and all(type(key) is int for key in content):
        content = [content[layer] for layer in sorted(content)]
    layers = content if isinstance(content, list | tuple) else []
    if not layers or not all(isinstance(layer, np.ndarray) for layer in layers):
        raise _MalformedError(
            "not an attention file: it holds neither 'attention' nor 'attn' nor a tensor [L, H, 1, P*P]"
        )
    if len({layer.shape for layer in layers}) != 1:
        raise _MalformedError("the layers differ in shape")
    if any(layer.dtype.kind != "f" for layer in layers):
        raise _MalformedError("attention must be floating point")
    has_batch_axis = all(layer.ndim == 4 and layer.shape[0] == 1 for layer in layers)  # [1, H, 1, P*P]
    join = np.concatenate if has_batch_axis else np.stack
    return join(layers, dtype=np.float32, casting="same_kind")  # without an intermediate copy in another dtype


def _square_maps(attention: np.ndarray, patch_size: Any = None) -> np.ndarray:
    """Reshape `[L, H, 1, P*P]` or `[L, H, P*P]` to `[L, H, P, P]`; maps that are already 2-D are kept.

    Args:
        patch_size: P according to the metadata, if it says so.
    """
    if attention.ndim == 4 and attention.shape[2] > 1:
        _check_one_query(attention)
        return attention
    if attention.ndim == 4:
        attention = attention[:, :, 0]
    if attention.ndim != 3:
        raise _MalformedError(f"attention must be [L, H, 1, P*P], not {list(attention.shape)}")
    side = math.isqrt(attention.shape[2])
    if side * side != attention.shape[2]:
        raise _MalformedError(f"{attention.shape[2]} image tokens are not a square grid [L, H, 1, P*P]")
    if patch_size is not None and patch_size != side:
        raise _MalformedError(
            f"'patch_size' is {shown(patch_size)}, and {attention.shape[2]} image tokens are {side} x {side}"
        )
    return attention.reshape(*attention.shape[:2], side, side)


def _check_one_query(attention: np.ndarray) -> None:
    """Reject full attention matrices: one query's weights sum to at most 1 over the image, those of T queries to T."""
    if attention.dtype.kind != "f":
        return  # reported by `_check_maps`
    largest = float(attention.sum(axis=(2, 3), dtype=np.float64).max(initial=0))
    if largest > MAX_WEIGHT:
        raise _MalformedError(
            f"full attention [L, H, T, T] of {attention.shape[2]} query tokens (a head's weights sum to {largest:.4g}, "
            "over an image they sum to at most 1): save the last token's row over the image tokens, [L, H, 1, P*P]"
        )


def _padded_square(width: int, height: int) -> Box:
    """The square that has the image at its centre, as in the published code's `expand2square`."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return float(-left), float(-top), float(side - left), float(side - top)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The content of a `.safetensors` file as the dict that a `.pkl` holds."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if "attention" not in list(file.keys()):
                raise UsageError(f"{path}: not an attention file: it holds no tensor 'attention'")
            content: dict[str, Any] = {name: metadata.get(name, "") for name in _TEXTS}
            for name in ("version", "grid", "image_size", "image_box", "asked"):
                content[name] = parse_json(metadata.get(name, "null").encode())
            return {**content, "attention": file.get_tensor("attention")}
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({shown(str(error))})") from error


def _read_gzip(path: Path) -> Any:
    """The value in a gzipped pickle. Decompression stops at a limit, which protects against decompression bombs."""
    try:
        check_file(path)
        factor, extra_bytes = _GZIP_LIMIT
        limit = min(factor * path.stat().st_size + extra_bytes, MAX_FILE_BYTES)
        with gzip.open(path) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UsageError(f"{path}: unpacks to more than {limit >> 20} MB, far more than attention does")
        return loads_pickle(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: not a readable gzip file ({shown(str(error))})") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except PickleRefusedError as error:
        raise UsageError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UsageError(f"{path}: not enough memory to read it") from error


_READERS = {".safetensors": _read_safetensors, ".gz": _read_gzip}


def save_analysis(heads: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Pickle a list of dicts, one per head, as plain types, in the order given."""
    write_bytes(path, pickle.dumps(_to_plain(list(heads)), protocol=4))


def _to_plain(value: Any) -> Any:
    """Convert numpy scalars to Python numbers, so that the pickle can be read without numpy."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_to_plain(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def load_analysis(path: str | Path) -> list[dict[str, Any]]:
    """Read an analysis, ours or the published code's. UsageError if it is not a list of dicts with layer and head."""
    heads: list[dict[str, Any]] = load_pickle(path)
    named = isinstance(heads, list) and all(
        isinstance(head, dict) and type(head.get("layer")) is int and type(head.get("head")) is int for head in heads
    )
    if not named:
        raise UsageError(f"{path}: not an analysis: a list of dicts with 'layer' and 'head'")
    return heads
