"""JSON from untrusted files: finite numbers only, bounded depth, and memory in proportion to the text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from localization_heads.errors import UsageError, shown

_COSTS = {b"[": 64, b"{": 64, b":": 32, b",": 8}
"""Bytes that parsing makes of a character, at the least: `[],` is three of text and seventy in memory."""


def read_json(path: Path, limit: int, encodings: Sequence[str] = ("utf-8",), **options: Any) -> Any:
    """The value in a JSON file of at most `limit` bytes, in the first encoding that fits. UsageError, naming it."""
    try:
        if path.stat().st_size > limit:
            raise UsageError(f"{path}: larger than the limit of {limit >> 20} MB")
        return parse_json(path.read_bytes(), encodings, **options)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON file that can be read ({error})") from error


def parse_json(content: bytes, encodings: Sequence[str] = ("utf-8",), **options: Any) -> Any:
    """The value of a JSON text, in the first encoding that fits; `options` are those of `json.loads`.

    Raises:
        ValueError: in one short line, for invalid JSON, for NaN and numbers beyond a float's range, and for values
            nested too deeply or needing far more memory than their text.
    """
    if sum(cost * content.count(char) for char, cost in _COSTS.items()) > 8 * len(content) + (64 << 20):
        raise ValueError("not usable JSON: far more lists and objects than text")
    try:
        text = _decoded(content, encodings)
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite, **options)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not usable JSON: {str(error)[:80]}") from error


def _decoded(content: bytes, encodings: Sequence[str]) -> str:
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"not {encodings[0].upper()} text")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)[1:-1]} is too large a number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
