"""JSON lines to objects, one bounded line at a time: a bad line costs only itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from localization_heads.errors import BadLineError, UsageError
from localization_heads.store import files
from localization_heads.store.files import parse_json

MAX_LINE_BYTES = 1 << 20


def read_objects(
    path: Path, option: str = "data_file"
) -> Iterator[tuple[int, dict[str, Any] | BadLineError]]:
    """Yield `(line number, object)` of every line that is not blank, or a BadLineError in its place.

    Raises UsageError when the file cannot be read, or is plainly of another kind: one JSON value over many lines,
    a JSON array, a Git LFS pointer. A line over 1 MB is skipped without being held in memory.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{option}={path} is a folder: name a .jsonl file in it")
        if not path.is_file():
            raise UsageError(f"{option}={path}: no such file")
        with path.open("rb") as file:
            number = 0
            _check_beginning(f"{option}={path}", path, file)
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield number, BadLineError(f"the line is longer than {MAX_LINE_BYTES >> 20} MB")
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if line:
                    yield number, _parse(line)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}={path}: {getattr(error, 'strerror', None) or error}") from error


def _check_beginning(named: str, path: Path, file: BinaryIO) -> None:
    """UsageError for a file that is no JSON lines from its first character on. The file is left at its beginning."""
    beginning = file.read(4096)
    file.seek(0)
    if files.is_pointer(beginning):
        raise UsageError(f"{named} {files.IS_POINTER}")
    beginning = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    # A line like [1, 2] may be one bad line among good ones; an array of objects, or a bracket alone, is not.
    array = re.match(rb"\[\s*(\{|\n|\Z)", beginning)
    if array or re.match(rb"\{\s*\n\s*[\"}]", beginning):
        target = path.with_name(f"{path.stem}-lines.jsonl")
        what, query = ("a JSON array", ".[]") if array else ("JSON over several lines", ".")
        raise UsageError(
            f"{named} is {what}, not JSON lines (one object on each line): "
            f"`jq -c '{query}' {path} > {target}` makes them"
        )


def _parse(line: bytes) -> dict[str, Any] | BadLineError:
    try:
        value = parse_json(line)
    except ValueError as error:
        return BadLineError(str(error))
    if not isinstance(value, dict):
        return BadLineError(
            'not a JSON object: write {"id": ..., "prompt": ..., "image_path": ...} on each line'
        )
    return value
