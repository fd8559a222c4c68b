"""What a model should answer to the entries of a data file, where they say it: `answer`, or `regions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.attention import Box
from localization_heads.data.boxes import check_box
from localization_heads.data.lines import read_objects
from localization_heads.errors import BadEntry, BadLineError

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
class Expected:
    """What the entries of a data file expect, by line; and the lines that say it wrongly."""

    answers: Mapping[int, str]
    regions: Mapping[int, tuple[Region, ...]]
    bad: tuple[BadEntry, ...]


def expected_answers(data_file: str | Path) -> Expected:
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
    return Expected(answers, regions, tuple(bad))


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


def says(said: str, answer: str) -> bool:
    """Whether a model said what is expected: its words, one after the other; capitals and marks do not count.

    >>> says("The dog is red.", "red"), says("reddish", "red"), says("small red dog", "red small dog")
    (True, False, False)
    """
    heard, wanted = _words(said), _words(answer)
    last = len(heard) - len(wanted)
    return bool(wanted) and any(heard[start : start + len(wanted)] == wanted for start in range(last + 1))


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
