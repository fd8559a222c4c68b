"""What is said about a picture that cannot be used, and what tells an address from a path."""

from __future__ import annotations

from pathlib import Path

from localization_heads.errors import UsageError


class ImageError(UsageError):
    """A picture that cannot be used. The message is one line and starts with `path`.

    Args:
        path: the file or address as the user knows it.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{_printable(str(path))}: {reason}")
        self.path = str(path)
        self.reason = reason


def is_address(source: object) -> bool:
    """Whether `source` is an http(s) address and not a path."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def _printable(name: str) -> str:
    """A name from a data set as part of a message: on one line and not endless."""
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-100:]}"
    return "".join(char if char.isprintable() else "?" for char in name)
