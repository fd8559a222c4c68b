"""A true box as somebody wrote it: four numbers, checked."""

from __future__ import annotations

from typing import Any

from localization_heads.attention import Box
from localization_heads.errors import BadLineError

MAX_COORDINATE = 10_000_000


def check_box(value: object) -> Box:
    """Four finite numbers `[x0, y0, x1, y1]` with x1 > x0 and y1 > y0, also an array or a tensor. Raises BadLineError.

    >>> import numpy as np
    >>> check_box([0, 0, 10, 5.5]), check_box(np.array([1, 2, 3, 4]))
    ((0.0, 0.0, 10.0, 5.5), (1.0, 2.0, 3.0, 4.0))
    """
    numbers = _plain(value)
    if not isinstance(numbers, list | tuple):
        raise BadLineError("'bbox' must be four numbers [x0, y0, x1, y1]")
    if len(numbers) != 4:
        raise BadLineError(f"'bbox' has length {len(numbers)}: it must be four numbers [x0, y0, x1, y1]")
    for number in map(_plain, numbers):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadLineError(f"'bbox' must hold four numbers of pixels, not {_brief(number)}")
        # A comparison that is false for NaN
        if not abs(number) <= MAX_COORDINATE:
            raise BadLineError(f"'bbox' must hold four numbers of pixels: {_brief(number)} is none")
    x0, y0, x1, y1 = (float(number) for number in numbers)
    for name, start, end in (("x", x0, x1), ("y", y0, y1)):
        if end <= start:
            what = "is empty" if end == start else "is turned around"
            raise BadLineError(
                f"'bbox' {what}: {name}1 = {end:g} is not above {name}0 = {start:g}; it must be [x0, y0, x1, y1]"
                " (of [x, y, width, height], write [x, y, x + width, y + height])"
            )
    return x0, y0, x1, y1


def _plain(value: Any) -> Any:
    """An array, a tensor or a number of theirs as what it holds; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(value: object) -> str:
    """Any value in a message. Its text is cut where it is long, and a number of many digits is not written out."""
    if isinstance(value, int) and abs(value) > MAX_COORDINATE:
        return "a number so large"
    return (
        repr(value)
        if isinstance(value, str | float | int | None) and len(str(value)) < 40
        else type(value).__name__
    )
