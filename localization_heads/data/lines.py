"""JSON lines of data files, one bounded line at a time, and what can stand in one: a box, further fields, an answer.

A bad line costs only itself.
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


MAX_COORDINATE = 10_000_000


def check_box(value: object) -> Box:
    """Four finite numbers `[x0, y0, x1, y1]` with x1 > x0 and y1 > y0, also an array or a tensor. Raises BadLineError.

    >>> import numpy as np
    >>> check_box([0, 0, 10, 5.5]), check_box(np.array([1, 2, 3, 4]))
    ((0.0, 0.0, 10.0, 5.5), (1.0, 2.0, 3.0, 4.0))
    """
    numbers = _plain(value)
    if not isinstance(numbers, list | tuple):
        raise BadLineError("'bbox' must be four numbers [x0, y0, x1, y1]")
    if len(numbers) != 4:
        raise BadLineError(f"'bbox' has length {len(numbers)}: it must be four numbers [x0, y0, x1, y1]")
    for number in map(_plain, numbers):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadLineError(f"'bbox' must hold four numbers of pixels, not {_brief(number)}")
        # A comparison that is false for NaN
        if not abs(number) <= MAX_COORDINATE:
            raise BadLineError(f"'bbox' must hold four numbers of pixels: {_brief(number)} is none")
    x0, y0, x1, y1 = (float(number) for number in numbers)
    for name, start, end in (("x", x0, x1), ("y", y0, y1)):
        if end <= start:
            what = "is empty" if end == start else "is turned around"
            raise BadLineError(
                f"'bbox' {what}: {name}1 = {end:g} is not above {name}0 = {start:g}; it must be [x0, y0, x1, y1]"
                " (of [x, y, width, height], write [x, y, x + width, y + height])"
            )
    return x0, y0, x1, y1


def _plain(value: Any) -> Any:
    """An array, a tensor or a number of theirs as what it holds; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(value: object) -> str:
    """Any value in a message. Its text is cut where it is long, and a number of many digits is not written out."""
    if isinstance(value, int) and abs(value) > MAX_COORDINATE:
        return "a number so large"
    return (
        repr(value)
        if isinstance(value, str | float | int | None) and len(str(value)) < 40
        else type(value).__name__
    )


Fact = str | int | float | bool
MOST_FACTS = 20
LONGEST_FACT = 200
"""Characters of a text that is kept."""
_KNOWN = {
    *("id", "prompt", "image_path", "bbox", "bboxes", "mask", "masks", "ignore", "picture", "absent"),
    *("attention_file", "layer"),
}


def facts_of(entry: Mapping[str, Any]) -> dict[str, Fact]:
    """The first short fields of a line beside those that `Sample` has by name; long ones and lists are left out.

    >>> facts_of({"id": "a", "protocol": "unc", "ref_id": 3, "tokens": [1, 2], "bbox": None})
    {'protocol': 'unc', 'ref_id': 3}
    """
    found: dict[str, Fact] = {}
    for name, value in entry.items():
        if len(found) < MOST_FACTS and name not in _KNOWN and len(name) <= LONGEST_FACT and _is_fact(value):
            found[name] = value
    return found


def _is_fact(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_FACT
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**18


LONGEST = 400
"""Letters of an answer."""
MOST_REGIONS = 16


@dataclass(frozen=True)
class Region:
    """A part of an image, and what is to be answered about it.

    Args:
        box: xyxy in pixels.
    """

    box: Box
    answer: str


@dataclass(frozen=True)
class ExpectedAnswers:
    """What the entries of a data file expect, by line; and the lines that say it wrongly."""

    answers: Mapping[int, str]
    regions: Mapping[int, tuple[Region, ...]]
    bad: tuple[BadEntry, ...]


def read_expected_answers(data_file: str | Path) -> ExpectedAnswers:
    """Read `"answer": "red"` and `"regions": [{"bbox": [...], "answer": "dog"}, ...]` of every line that has them.

    Raises:
        UsageError: the file cannot be read.
    """
    answers: dict[int, str] = {}
    regions: dict[int, tuple[Region, ...]] = {}
    bad = []
    for line, entry in read_objects(Path(data_file)):
        if isinstance(entry, BadLineError):
            continue  # reported by who reads the entries
        try:
            if entry.get("answer") is not None:
                answers[line] = _answer(entry["answer"], "'answer'")
            if entry.get("regions") is not None:
                regions[line] = _regions(entry["regions"])
        except BadLineError as error:
            bad.append(BadEntry(line, str(entry.get("id", "")), str(error)))
    return ExpectedAnswers(answers, regions, tuple(bad))


def _answer(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST:
        raise BadLineError(f"{name} must be a text of at most {LONGEST} letters")
    return value


def _regions(value: Any) -> tuple[Region, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_REGIONS:
        raise BadLineError(f"'regions' must be a list of 2 to {MOST_REGIONS} regions")
    found = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one, dict):
            raise BadLineError(f'\'regions\', number {number}: write {{"bbox": [...], "answer": ...}}')
        try:
            found.append(Region(check_box(one.get("bbox")), _answer(one.get("answer"), "'answer'")))
        except BadLineError as error:
            raise BadLineError(f"'regions', number {number}: {error}") from error
    return tuple(found)


def contains_answer(generated: str, answer: str) -> bool:
    """Whether the words of `answer` occur in generated text as a contiguous run; case and punctuation are ignored.

    >>> contains_answer("The dog is red.", "red"), contains_answer("reddish", "red")
    (True, False)
    >>> contains_answer("small red dog", "red small dog")
    False
    """
    words, expected = _words(generated), _words(answer)
    last = len(words) - len(expected)
    return bool(expected) and any(
        words[start : start + len(expected)] == expected for start in range(last + 1)
    )


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
