"""The versions of torch, transformers and accelerate that a model needs, checked before any of them is imported.

With another version, an import fails somewhere inside, with a name that says nothing to whom it happens.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from typing import NamedTuple

from localization_heads.errors import WorkError


class Range(NamedTuple):
    """The versions from `first` on, and below `end` if there is one."""

    first: str
    end: str | None = None

    @property
    def requirement(self) -> str:
        """As pip takes it, after the name of the package."""
        return f">={self.first}" + (f",<{self.end}" if self.end else "")

    def holds(self, version: str) -> bool:
        """Whether a version lies within. One that cannot be read is taken to.

        >>> Range("5.23", "6").holds("5.23.0.dev0"), Range("5.23", "6").holds("4.57.1")
        (True, False)
        """
        number = _numbers(version)
        below = self.end is None or number < _numbers(self.end)
        return not number or (_numbers(self.first) <= number and below)


NEEDED = {"torch": Range("2.6"), "transformers": Range("5.23", "6"), "accelerate": Range("1.2.1")}
"""What pyproject.toml says of them."""


DEMO = Range("6.17")
"""Of gradio, which is an extra."""


@cache
def check_versions() -> None:
    """Raises WorkError, which names the version that is here and the one that is needed."""
    for name, needed in NEEDED.items():
        check_version(name, needed)


def check_version(name: str, needed: Range) -> None:
    """Raises WorkError where a package is missing or its version is another."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise WorkError(f"{name} is missing: pip install '{name}{needed.requirement}'") from None
    if not needed.holds(found):
        end = f" and older than {needed.end}" if needed.end else ""
        raise WorkError(
            f"{name} {found} is installed, and this needs {needed.first} or newer{end}: "
            f"pip install '{name}{needed.requirement}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, three at least.

    >>> _numbers("2.13.0+cpu"), _numbers("5.23"), _numbers("main")
    ((2, 13, 0), (5, 23, 0), ())
    """
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    numbers = tuple(int(part) for part in found[0].split(".")) if found else ()
    return numbers + (0,) * (3 - len(numbers)) if numbers else ()
