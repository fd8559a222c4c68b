"""The exceptions of the package, and helpers that make untrusted text safe to print.

A run fails in one of two ways: wrong use (`UsageError`, exit status 2) or failed work (`WorkError`, exit status 1).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, get_args


def shown(value: object, limit: int = 40) -> str:
    """A short repr of a user's value for a message: ASCII, on one line, truncated before it is formatted.

    >>> shown("caf\xe9" * 1000, 8), shown([1, [2.5, None]]), shown(10**9000)
    ("'caf\\\\xe9caf~'", '[1, [2.5, None]]', 'a huge number')
    """
    if isinstance(value, str):
        return ascii(value if len(value) <= limit else value[: limit - 1] + "~")
    formatter = Repr()
    formatter.maxlevel, formatter.maxstring, formatter.maxother, formatter.maxlong = 3, limit, limit, limit
    try:
        text = formatter.repr(value)
    except ValueError:  # an int of thousands of digits, which Python refuses to format
        return "a huge number"
    return " ".join(text[: 2 * limit].encode("ascii", "backslashreplace").decode().split())


class UsageError(Exception):
    """The request is wrong: a bad option, a missing file, a broken data set. Exit status 2.

    The message is one line that names the option, file or line at fault and says how to fix it.
    """

    exit_status = 2


class ArgumentError(UsageError, ValueError):
    """A wrong argument of a Python call; the message names the argument."""


def check_choice(name: str, value: object, kinds: Any) -> None:
    """Raise ArgumentError if `value` is none of the choices of the `Literal` type `kinds`."""
    if value not in get_args(kinds):
        raise ArgumentError(f"{name}={shown(value)}: choose one of {', '.join(get_args(kinds))}")


class WorkError(Exception):
    """The request is valid but the work failed: no memory, no network, a broken checkpoint. Exit status 1."""

    exit_status = 1


class OutOfMemoryError(WorkError):
    """The batch does not fit into memory; a smaller one may."""


class NotFiniteError(WorkError, ValueError):
    """Attention, or a map computed from it, holds NaN or infinite values. Other samples may still be usable."""

    def __init__(self, what: str = "the model's attention") -> None:
        super().__init__(
            f"{what} is not finite (NaN or infinite values: its numbers overflow); "
            "load the model with model.dtype=bfloat16 or model.dtype=float32"
        )


class NothingDoneError(WorkError):
    """No entry of a data set could be used.

    Args:
        failures: every entry with the reason why it failed, in the order of the file.
    """

    def __init__(self, what: str, failures: Sequence[BadEntry]) -> None:
        super().__init__(f"{what}; the first: {failures[0]}")
        self.failures = failures


class NoHeadError(UsageError):
    """No head passes the criteria on this sample, so it cannot be grounded."""


@dataclass(frozen=True)
class BadEntry:
    """An entry of a data set that cannot be used, for the summary at the end of a run.

    Args:
        line: line number, from 1; 0 for an entry that is not a line of a file.
        id: the entry's id, or "" if it is unknown.
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
    """A line of a data set cannot be used; the message says why."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of another library's error, truncated; its class name if the message is empty.

    >>> first_line(ValueError("bad  magic number\\nTraceback ...")), first_line(KeyError())
    ('bad magic number', 'KeyError')
    """
    lines = str(error)[:2000].strip().splitlines()
    return " ".join(lines[0].split())[:limit] if lines else type(error).__name__


def printable(text: object, limit: int | None = None) -> str:
    """`text` with control characters (escape sequences, bidirectional overrides) replaced, cut to `limit` characters.

    Newlines and tabs are kept without a limit and become spaces with one.

    >>> printable("the\\x1b[2J dog"), printable("the dog on the left", 8)
    ('the�[2J dog', 'the dog…')
    """
    text = str(text)
    if limit is not None:
        text = " ".join(text.split())
        text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return "".join(_printable_char(char) for char in text)


def _printable_char(char: str) -> str:
    if char.isprintable() or char in "\n\t":
        return char
    return " " if unicodedata.category(char) == "Zs" else "�"
