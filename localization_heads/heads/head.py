"""`Head`: the address of one attention head, and its text form `14-24` (the paper's L14 H24)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from localization_heads.errors import UsageError, shown

_MAX_LENGTH = 40
_ADDRESS = re.compile(r"[Ll]?(\d{1,9})(?:\s*[-,:]\s*[Hh]?|\s+[Hh]?|[Hh])(\d{1,9})")


class Head(NamedTuple):
    """Layer and head of the language model, both counted from 0, as in the paper (Sec. 4)."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `14-24`, `L14H24` or `L14 H24`.

        >>> Head.parse("14-24") == Head.parse("L14 H24") == Head(14, 24)
        True
        """
        match = _ADDRESS.fullmatch(text.strip()) if len(text) <= _MAX_LENGTH else None
        if not match:
            raise ValueError(f"{shown(text)} names no head: write LAYER-HEAD, such as 14-24")
        return cls(int(match[1]), int(match[2]))


def find_duplicate(heads: Iterable[Head]) -> Head | None:
    """The first head that appears a second time; None if all are different.

    >>> find_duplicate([Head(1, 2), Head(3, 4), Head(1, 2)])
    Head(layer=1, head=2)
    """
    seen: set[Head] = set()
    for head in heads:
        if head in seen:
            return head
        seen.add(head)
    return None


def check_heads(heads: Iterable[Head], num_layers: int, num_heads: int, option: str = "heads") -> None:
    """UsageError, naming the option, for a head that a model of that shape does not have."""
    for head in heads:
        if not (0 <= head.layer < num_layers and 0 <= head.head < num_heads):
            raise UsageError(
                f"{option}: there is no {head}; the layers are 0 to {num_layers - 1} and the heads 0 to {num_heads - 1}"
            )
