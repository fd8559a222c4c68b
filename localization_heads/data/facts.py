"""The fields of a JSON line that this tool does not know itself: what a benchmark says of an entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Fact = str | int | float | bool
MOST_FACTS = 20
LONGEST_FACT = 200
"""Characters of a text that is kept."""
_KNOWN = frozenset(
    (
        "id",
        "prompt",
        "image_path",
        "bbox",
        "bboxes",
        "mask",
        "masks",
        "ignore",
        "picture",
        "absent",
        "attention_file",
        "layer",
    )
)


def facts_of(entry: Mapping[str, Any]) -> dict[str, Fact]:
    """The first short fields of a line beside those that `Sample` has by name; long ones and lists are left out.

    >>> facts_of({"id": "a", "protocol": "unc", "ref_id": 3, "tokens": [1, 2], "bbox": None})
    {'protocol': 'unc', 'ref_id': 3}
    """
    found: dict[str, Fact] = {}
    for name, value in entry.items():
        if len(found) < MOST_FACTS and name not in _KNOWN and len(name) <= LONGEST_FACT and _is_fact(value):
            found[name] = value
    return found


def _is_fact(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_FACT
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**18
