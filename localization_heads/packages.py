"""Version requirements of torch, transformers, accelerate and gradio, checked before any of them is imported.

With an unsupported version, an import would fail deep inside the library with an error that does not name the cause.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from typing import NamedTuple

from localization_heads.errors import WorkError


class VersionRange(NamedTuple):
    """Versions from `minimum` on and, if given, below `below`."""

    minimum: str
    below: str | None = None

    @property
    def specifier(self) -> str:
        """As pip takes it after a package's name."""
        return f">={self.minimum}" + (f",<{self.below}" if self.below else "")

    def contains(self, version: str) -> bool:
        """Whether a version is supported. One that cannot be parsed is assumed to be.

        >>> VersionRange("5.23", "6").contains("5.23.0.dev0"), VersionRange("5.23", "6").contains("4.57.1")
        (True, False)
        """
        release = _release(version)
        is_below = self.below is None or release < _release(self.below)
        return not release or (_release(self.minimum) <= release and is_below)


REQUIRED = {
    "torch": VersionRange("2.6"),
    "transformers": VersionRange("5.23", "6"),
    "accelerate": VersionRange("1.2.1"),
}
"""The same ranges as in pyproject.toml."""

GRADIO = VersionRange("6.17")
"""For the demo, an optional extra."""


@cache
def check_versions() -> None:
    """Raise WorkError if a required package is missing or has an unsupported version."""
    for name, required in REQUIRED.items():
        check_version(name, required)


def check_version(name: str, required: VersionRange) -> None:
    """Raise WorkError if a package is missing or its version is not `required`."""
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise WorkError(f"{name} is missing: pip install '{name}{required.specifier}'") from None
    if not required.contains(installed):
        below = f" and older than {required.below}" if required.below else ""
        raise WorkError(
            f"{name} {installed} is installed, and this needs {required.minimum} or newer{below}: "
            f"pip install '{name}{required.specifier}'"
        )


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, padded to three; empty if there are none.

    >>> _release("2.13.0+cpu"), _release("5.23"), _release("main")
    ((2, 13, 0), (5, 23, 0), ())
    """
    match = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    numbers = tuple(int(part) for part in match[0].split(".")) if match else ()
    return numbers + (0,) * (3 - len(numbers)) if numbers else ()
