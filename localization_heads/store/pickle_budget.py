"""Limits on what a pickle may build: one account of instructions and bytes, which every step of the reader charges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SLOT = 8
"""Bytes of a reference: in a list, on the stack or in the memo."""

ENTRY = 300
"""Bytes of one value's entry in a dict."""


@dataclass(frozen=True)
class Limits:
    """Limits for a pickle: number of instructions, and nesting of its values.

    Args:
        kind: the kind of file expected, for messages.
    """

    instructions: int = 1_000_000  # an analysis of 10,000 heads takes 250,000
    depth: int = 16
    kind: str = "an attention file"


ATTENTION = Limits()
"""For attention files and the files beside them."""


class PickleRefusedError(Exception):
    """The pickle is broken or asks for something outside the allow-list."""


class Budget:
    """The account of a file of `size` bytes: the instructions and built bytes that are left."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.bytes = 7 * size + (56 << 20)  # RefCOCO's refs, nearly all short texts, take 7 times their size
        self.instructions = limits.instructions
        self.kind = limits.kind

    def charge(self, count: int) -> None:
        """Charge `count` bytes before, or as, they are allocated."""
        self.bytes -= count
        if self.bytes < 0:
            raise PickleRefusedError(
                f"refused: it would build far more bytes than the file holds, which {self.kind} never does"
            )

    def step(self) -> None:
        self.instructions -= 1
        if self.instructions < 0:
            raise PickleRefusedError(f"refused: far more instructions than {self.kind} needs")


class Memo:
    """Values by number. Writers count from 0 or (Python 2) from 1: those lie in a list, any other in a dict."""

    def __init__(self) -> None:
        self._counted: list[Any] = []
        self._first: int | None = None
        self._strays: dict[int, Any] = {}

    @property
    def count(self) -> int:
        return len(self._counted) + len(self._strays)

    def put(self, index: int, value: Any) -> int:
        """Store a value; returns the bytes that this takes."""
        if self._first is None and index in (0, 1):
            self._first = index
        if self._first is not None and index == self._first + len(self._counted):
            self._counted.append(value)
            self._strays.pop(index, None)
            return SLOT
        self._strays[index] = value
        return ENTRY

    def get(self, index: int) -> Any:
        """Raises KeyError or IndexError for a number that was never stored."""
        if self._first is not None and index >= self._first and index not in self._strays:
            return self._counted[index - self._first]
        return self._strays[index]
