"""What is said about a picture that cannot be used."""

from __future__ import annotations

from pathlib import Path

from localization_heads.data.address import Address, without_secrets
from localization_heads.errors import UsageError


class ImageError(UsageError):
    """A picture that cannot be used. The message is one line and starts with `path`.

    Args:
        path: the file or address as the user knows it.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path | Address, reason: str) -> None:
        super().__init__(f"{shown_name(path)}: {reason}")
        self.path = without_secrets(str(path))
        self.reason = reason


def shown_name(name: str | Path | Address) -> str:
    """The name of a picture for people: an address without its secrets, on one line and not endless."""
    name = without_secrets(str(name))
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-100:]}"
    return "".join(char if char.isprintable() else "?" for char in name)
