"""Read the JSON lines of a data file, and validate the boxes, extra fields and expected answers in them.

Lines are read one at a time, of bounded length. An invalid line is reported and skipped; the rest of the file is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from localization_heads.attention import Box
from localization_heads.errors import BadEntry, BadLineError, UsageError
from localization_heads.store import files
from localization_heads.store.files import parse_json

MAX_LINE_BYTES = 1 << 20


def read_objects(path: Path, option: str = "data_file") -> Iterator[tuple[int, dict[str, Any] | BadLineError]]:
    """Yield `(line number, object)` for each non-blank line, or `(line number, BadLineError)` if it is invalid.

    Raises UsageError if the file cannot be read or is clearly something else: a JSON value that spans lines, a JSON
    array, a Git LFS pointer. A line over 1 MB is skipped without being loaded into memory.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{option}={path} is a folder: name a .jsonl file in it")
        if not path.is_file():
            raise UsageError(f"{option}={path}: no such file")
        with path.open("rb") as file:
            number = 0
            _reject_other_formats(f"{option}={path}", path, file)
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield number, BadLineError(f"the line is longer than {MAX_LINE_BYTES >> 20} MB")
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if line:
                    yield number, _parse_line(line)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}={path}: {getattr(error, 'strerror', None) or error}") from error


def _reject_other_formats(label: str, path: Path, file: BinaryIO) -> None:
    """UsageError for a file that is clearly not JSON lines. The file position is back at the start afterwards."""
    beginning = file.read(4096)
    file.seek(0)
    if files.is_lfs_pointer(beginning):
        raise UsageError(f"{label} {files.LFS_POINTER_MESSAGE}")
    beginning = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    # [1, 2] may be one bad line among good ones; an array of objects, or an opening bracket alone, cannot.
    array = re.match(rb"\[\s*(\{|\n|\Z)", beginning)
    if array or re.match(rb"\{\s*\n\s*[\"}]", beginning):
        target = path.with_name(f"{path.stem}-lines.jsonl")
        kind, query = ("a JSON array", ".[]") if array else ("JSON over several lines", ".")
        raise UsageError(
            f"{label} is {kind}, not JSON lines (one object on each line): "
            f"`jq -c '{query}' {path} > {target}` makes them"
        )


def _parse_line(line: bytes) -> dict[str, Any] | BadLineError:
    try:
        value = parse_json(line)
    except ValueError as error:
        return BadLineError(str(error))
    if not isinstance(value, dict):
        return BadLineError('not a JSON object: write {"id": ..., "prompt": ..., "image_path": ...} on each line')
    return value


MAX_COORDINATE = 10_000_000


def check_box(value: object) -> Box:
    """A finite box `[x0, y0, x1, y1]` (list, tuple, array, tensor) as floats. BadLineError unless x0 < x1 and y0 < y1.

    >>> import numpy as np
    >>> check_box([0, 0, 10, 5.5]), check_box(np.array([1, 2, 3, 4]))
    ((0.0, 0.0, 10.0, 5.5), (1.0, 2.0, 3.0, 4.0))
    """
    numbers = _to_python(value)
    if not isinstance(numbers, list | tuple):
        raise BadLineError("'bbox' must be four numbers [x0, y0, x1, y1]")
    if len(numbers) != 4:
        raise BadLineError(f"'bbox' has length {len(numbers)}: it must be four numbers [x0, y0, x1, y1]")
    for number in map(_to_python, numbers):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) <= MAX_COORDINATE:  # written so that NaN fails too
            raise BadLineError(f"'bbox' must hold four numbers in pixels, not {_format_value(number)}")
    x0, y0, x1, y1 = (float(number) for number in numbers)
    for name, start, end in (("x", x0, x1), ("y", y0, y1)):
        if end <= start:
            problem = "is empty" if end == start else "has its corners swapped"
            raise BadLineError(
                f"'bbox' {problem}: {name}1 = {end:g} is not above {name}0 = {start:g}; it must be [x0, y0, x1, y1]"
                " (of [x, y, width, height], write [x, y, x + width, y + height])"
            )
    return x0, y0, x1, y1


def _to_python(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python lists and numbers; anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _format_value(value: object) -> str:
    """A value for an error message; a long one is replaced by its type, a huge integer by words."""
    if isinstance(value, int) and abs(value) > MAX_COORDINATE:
        return "a huge number"
    if isinstance(value, str | float | int | None) and len(str(value)) < 40:
        return repr(value)
    return type(value).__name__


Fact = str | int | float | bool
MAX_FACTS = 20
MAX_FACT_LENGTH = 200
"""In characters."""
_NAMED_FIELDS = {
    *("id", "prompt", "image_path", "bbox", "bboxes", "mask", "masks", "ignore", "picture", "absent"),
    *("attention_file", "layer"),
}


def extract_facts(entry: Mapping[str, Any]) -> dict[str, Fact]:
    """The extra fields of a line: short scalars that `Sample` has no field for, at most `MAX_FACTS`.

    >>> extract_facts({"id": "a", "protocol": "unc", "ref_id": 3, "tokens": [1, 2], "bbox": None})
    {'protocol': 'unc', 'ref_id': 3}
    """
    facts: dict[str, Fact] = {}
    for name, value in entry.items():
        if len(facts) < MAX_FACTS and name not in _NAMED_FIELDS and len(name) <= MAX_FACT_LENGTH and _is_fact(value):
            facts[name] = value
    return facts


def _is_fact(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_FACT_LENGTH
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**18


MAX_ANSWER_LENGTH = 400
"""In characters."""
MAX_REGIONS = 16


@dataclass(frozen=True)
class Region:
    """A box of an image (xyxy, pixels) and the expected answer about it."""

    box: Box
    answer: str


@dataclass(frozen=True)
class ExpectedAnswers:
    """Expected answers in a data file, by line number, and the lines on which they are invalid."""

    answers: Mapping[int, str]
    regions: Mapping[int, tuple[Region, ...]]
    bad: tuple[BadEntry, ...]


def read_expected_answers(data_file: str | Path) -> ExpectedAnswers:
    """Read `"answer": "red"` and `"regions": [{"bbox": [...], "answer": "dog"}, ...]` from the lines that have them.

    Raises:
        UsageError: the file cannot be read.
    """
    answers: dict[int, str] = {}
    regions: dict[int, tuple[Region, ...]] = {}
    bad = []
    for line, entry in read_objects(Path(data_file)):
        if isinstance(entry, BadLineError):
            continue  # reported by `load_samples`
        try:
            if entry.get("answer") is not None:
                answers[line] = _parse_answer(entry["answer"], "'answer'")
            if entry.get("regions") is not None:
                regions[line] = _parse_regions(entry["regions"])
        except BadLineError as error:
            bad.append(BadEntry(line, str(entry.get("id", "")), str(error)))
    return ExpectedAnswers(answers, regions, tuple(bad))


def _parse_answer(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_ANSWER_LENGTH:
        raise BadLineError(f"{name} must be text of at most {MAX_ANSWER_LENGTH} characters")
    return value


def _parse_regions(value: Any) -> tuple[Region, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_REGIONS:
        raise BadLineError(f"'regions' must be a list of 2 to {MAX_REGIONS} regions")
    regions = []
    for number, region in enumerate(value, start=1):
        if not isinstance(region, dict):
            raise BadLineError(f'\'regions\', number {number}: write {{"bbox": [...], "answer": ...}}')
        try:
            regions.append(Region(check_box(region.get("bbox")), _parse_answer(region.get("answer"), "'answer'")))
        except BadLineError as error:
            raise BadLineError(f"'regions', number {number}: {error}") from error
    return tuple(regions)


def contains_answer(generated: str, answer: str) -> bool:
    """Whether the words of `answer` occur in generated text as a contiguous run; case and punctuation are ignored.

    >>> contains_answer("The dog is red.", "red"), contains_answer("reddish", "red")
    (True, False)
    >>> contains_answer("small red dog", "red small dog")
    False
    """
    words, expected = _words(generated), _words(answer)
    last = len(words) - len(expected)
    return bool(expected) and any(words[start : start + len(expected)] == expected for start in range(last + 1))


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() else " " for char in text.lower()).split()
