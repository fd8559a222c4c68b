"""Boxes over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from localization_heads.attention import Box


def smoothed(boxes: Iterable[Box | None], weight: float) -> Iterator[Box | None]:
    """Exponential smoothing of each edge: `weight` of the box before, the rest of the new one.

    Only frames that came before have a say, so that it also works on a stream. Where there is no box, there is none,
    and the next one starts anew.

    Args:
        boxes: of one object, frame by frame, xyxy in pixels.
        weight: from 0 (the boxes as they are) to below 1.

    >>> list(smoothed([(0, 0, 8, 8), (4, 0, 12, 8), None, (4, 0, 12, 8)], 0.5))
    [(0.0, 0.0, 8.0, 8.0), (2.0, 0.0, 10.0, 8.0), None, (4.0, 0.0, 12.0, 8.0)]
    """
    before: Box | None = None
    for box in boxes:
        if box is not None and before is not None:
            x0, y0, x1, y1 = (weight * old + (1 - weight) * new for old, new in zip(before, box, strict=True))
            before = x0, y0, x1, y1
        elif box is None:
            before = None
        else:
            x0, y0, x1, y1 = map(float, box)
            before = x0, y0, x1, y1
        yield before
