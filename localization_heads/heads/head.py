"""`Head`: the address of one attention head, and its text form `14-24` (the paper's L14 H24)."""

from __future__ import annotations

import re
from typing import NamedTuple


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
        match = re.fullmatch(r"\s*[Ll]?(\d+)\s*[-,:\s]?\s*[Hh]?(\d+)\s*", text)
        separated = re.search(r"\d\D+\d", text)
        if not match or not separated:
            raise ValueError(f"'{text}' names no head: write LAYER-HEAD, such as 14-24")
        return cls(int(match[1]), int(match[2]))
