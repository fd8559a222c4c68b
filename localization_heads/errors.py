"""The two ways a run can go wrong, and the exit status of each."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, get_args


def shown(value: object, limit: int = 40) -> str:
    """A value that somebody wrote, for a message: quoted, in ASCII, on one line, and cut before it is formatted.

    >>> shown("caf\xe9" * 1000, 8), shown([1, [2.5, None]]), shown(10**9000)
    ("'caf\\\\xe9caf~'", '[1, [2.5, None]]', 'a huge number')
    """
    if isinstance(value, str):
        return ascii(value if len(value) <= limit else value[: limit - 1] + "~")
    short = Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, limit, limit, limit
    try:
        text = short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"
    return " ".join(text[: 2 * limit].encode("ascii", "backslashreplace").decode().split())


def one_line(error: BaseException, limit: int = 100) -> str:
    """What another library's error says, on one line and cut; its kind where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class UsageError(Exception):
    """The user asked for something that cannot be: a bad option, a missing file, a broken data set.

    The message is one line that names the option, file or line at fault and the way out. Exit status 2.
    """

    exit_status = 2


class ArgumentError(UsageError, ValueError):
    """A wrong argument of a Python call, whose message names it."""


def check_choice(name: str, value: object, kinds: Any) -> None:
    """ArgumentError for a value that is none of a `Literal`."""
    if value not in get_args(kinds):
        raise ArgumentError(f"{name}={shown(value)}: choose one of {', '.join(get_args(kinds))}")


class WorkError(Exception):
    """The request was sound but the work failed: no memory, no network, a broken checkpoint. Exit status 1."""

    exit_status = 1


class OutOfMemoryError(WorkError):
    """The batch does not fit into the memory; a smaller one may."""


class NotFiniteError(WorkError, ValueError):
    """Attention, or a map made of it, holds NaN or infinite values: the sample is unusable, the others are not."""

    def __init__(self, what: str = "the model's attention") -> None:
        super().__init__(
            f"{what} is not finite (NaN or infinite values: its numbers overflow); "
            "load the model with model.dtype=bfloat16 or model.dtype=float32"
        )


class NothingDoneError(WorkError):
    """No entry of a data set could be used.

    Args:
        failures: the reason of each, by line.
    """

    def __init__(self, what: str, failures: Sequence[BadEntry]) -> None:
        super().__init__(f"{what}; the first: {failures[0]}")
        self.failures = failures


class NoHeadError(UsageError):
    """No head passes the criteria in this sample, so none can ground it."""


@dataclass(frozen=True)
class BadEntry:
    """A line of a data set that cannot be used, for the summary at the end of a run.

    Args:
        line: its number, from 1; 0 of what is no line of a file.
        id: its id as far as it is known, else "".
        reason: one line for people.
    """

    line: int
    id: str
    reason: str

    def __str__(self) -> str:
        if not self.line:
            return f"{self.id}: {self.reason}"
        return f"line {self.line}" + (f" ({self.id})" if self.id else "") + f": {self.reason}"


class BadLineError(ValueError):
    """The line cannot be used; the message says why."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    lines = str(error)[:2000].strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def printable(text: object, limit: int | None = None) -> str:
    """`text` without what a terminal would obey (escapes, turned writing direction), cut to `limit` characters.

    Line ends and tabs stay where there is no limit, and become spaces where there is one.

    >>> printable("the\\x1b[2J dog"), printable("the dog on the left", 8)
    ('the�[2J dog', 'the dog…')
    """
    text = str(text)
    if limit is not None:
        text = " ".join(text.split())
        text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if char.isprintable() or char in "\n\t":
        return char
    return " " if unicodedata.category(char) == "Zs" else "�"
