"""Masks: COCO run lengths, polygons and PNG files to bool `(H, W)`, and back to run lengths.

Run lengths are parsed here and not by pycocotools, whose C code trusts them: a hostile string could write
beyond its buffer. Everything is checked against the image's size before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.images import MAX_PIXELS, open_raster, strips
from localization_heads.errors import UsageError

MaskSource = Mapping[str, Any] | Sequence[Any] | Path | NDArray[np.bool_]
"""Run lengths `{"size": [H, W], "counts": ...}`, polygons, the path of a PNG, or the mask itself; or a list of these,
at least one of them no polygons, for all that is in any of them (`union_of`)."""

MAX_MASKS = 100
"""Of the objects of one expression."""
MAX_POLYGONS = 10_000
MAX_POLYGON_LENGTH = 1_000_000
"""Pixels of outline: bounds the memory of the rasteriser, which takes about 100 bytes for each."""


class MaskError(UsageError):
    """The mask is invalid, or not of the size of its image. The message is one line."""


def read_mask(source: MaskSource, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask as bool `(H, W)` for an image of `size` `(W, H)` pixels. MaskError where it does not fit.

    >>> read_mask({"size": [2, 2], "counts": [1, 2, 1]}, (2, 2)).tolist()
    [[False, True], [True, False]]
    >>> int(read_mask([[0, 0, 2, 0, 2, 1, 0, 1]], (3, 2)).sum())
    2
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise MaskError(f"a mask of {width} x {height} pixels is over the limit")
    if isinstance(source, np.ndarray):
        mask = source.astype(bool)
    elif isinstance(source, Path):
        mask = _read_png(source, size)
    elif isinstance(source, Mapping):
        mask = _decode_runs(source)
    elif _are_several(source):
        mask = np.zeros((height, width), dtype=bool)
        for one in source:
            mask |= read_mask(one, size)
    else:
        return _fill_polygons(flat_polygons(source), width, height)
    _check_size(mask.shape[::-1], size)
    return mask


def union_of(sources: Sequence[MaskSource]) -> MaskSource:
    """One mask of what is in any of several: their polygons together, beside the others. MaskError for too many.

    >>> union_of([[[0, 0, 2, 0, 2, 2]], [[4, 4, 6, 4, 6, 6]]])
    [[0.0, 0.0, 2.0, 0.0, 2.0, 2.0], [4.0, 4.0, 6.0, 4.0, 6.0, 6.0]]
    """
    if not 0 < len(sources) <= MAX_MASKS:
        raise MaskError(f"{len(sources)} masks: from 1 to {MAX_MASKS} of the objects of one expression")
    others = [one for one in sources if _are_several([one])]
    polygons = [polygon for one in sources if not _are_several([one]) for polygon in flat_polygons(one)]
    return [*others, polygons] if others and polygons else others or polygons


def _are_several(source: Sequence[Any]) -> bool:
    """Whether it is a list of masks, and not one of polygons."""
    return isinstance(source, list | tuple) and any(
        isinstance(one, Mapping | Path | np.ndarray) for one in source
    )


def _check_size(found: tuple[int, ...], size: tuple[int, int]) -> None:
    if found != tuple(size):
        shape = " x ".join(str(n) for n in found)
        raise MaskError(f"the mask is {shape} pixels, its image {size[0]} x {size[1]}")


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO run lengths of a bool `(H, W)` mask, counts as text: `{"size": [H, W], "counts": "..."}`.

    >>> encode_mask(np.array([[False, True], [True, False]]))
    {'size': [2, 2], 'counts': '121'}
    """
    from pycocotools import mask as coco

    return _as_text(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def encode_source(source: MaskSource, size: tuple[int, int]) -> dict[str, Any]:
    """COCO run lengths, as from `encode_mask`, of any mask that `read_mask` accepts. Polygons are not decoded."""
    if isinstance(source, np.ndarray | Path | Mapping) or _are_several(source):
        return encode_mask(read_mask(source, size))
    if size[0] * size[1] > MAX_PIXELS:
        raise MaskError(f"a mask of {size[0]} x {size[1]} pixels is over the limit")
    return _as_text(_polygon_runs(flat_polygons(source), *size))


def _as_text(runs: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": [int(n) for n in runs["size"]], "counts": runs["counts"].decode("ascii")}


def _decode_runs(runs: Mapping[str, Any]) -> NDArray[np.bool_]:
    height, width = run_size(runs)
    counts = runs.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("latin1")
    if isinstance(counts, str):
        counts = _parse_counts(counts, height * width)
    elif not isinstance(counts, list) or not all(type(n) is int for n in counts):
        raise MaskError("the mask's 'counts' must be text or a list of whole numbers")
    if any(n < 0 for n in counts) or sum(counts) != height * width:
        raise MaskError(f"the mask's 'counts' do not add up to its size {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def run_size(runs: Mapping[str, Any]) -> tuple[int, int]:
    """`(H, W)` of COCO run lengths, checked."""
    size = runs.get("size")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise MaskError("the mask's 'size' must be [height, width]")
    if size[0] * size[1] > MAX_PIXELS:
        raise MaskError(f"the mask's 'size' {size[0]} x {size[1]} is over the limit")
    return size[0], size[1]


def _parse_counts(text: str, total: int) -> list[int]:
    """Decompress COCO's text: groups of 5 bits from `chr(48)` on, from the third on differences two back."""
    counts: list[int] = []
    value = shift = 0
    for char in text:
        code = ord(char) - 48
        if not 0 <= code < 64 or shift > 60:
            raise MaskError("the mask's 'counts' are not COCO run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # more groups follow
            continue
        if code & 16:  # the sign
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value <= total:
            raise MaskError("the mask's 'counts' are not COCO run lengths of its size")
        counts.append(value)
        value = shift = 0
    if shift:
        raise MaskError("the mask's 'counts' are cut short")
    return counts


def flat_polygons(source: object) -> list[list[float]]:
    """Polygons as COCO writes them, `[[x, y, x, y, ...], ...]`.

    Also accepts one polygon without the outer list, and points as pairs `[[x, y], ...]`. Raises MaskError.
    """
    if not isinstance(source, list | tuple) or not source:
        raise MaskError("the mask must be run lengths, polygons or the path of a PNG")
    if not isinstance(source[0], list | tuple) or all(_is_point(item) for item in source):
        source = [source]
    if len(source) > MAX_POLYGONS:
        raise MaskError(f"the mask has more than {MAX_POLYGONS} polygons")
    return [_flat_polygon(polygon) for polygon in source]


def _is_point(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[0], list | tuple)


def _flat_polygon(polygon: object) -> list[float]:
    if not isinstance(polygon, list | tuple):
        raise MaskError("a polygon of the mask is not a list of numbers")
    flat = [x for point in polygon for x in point] if all(_is_point(p) for p in polygon) else list(polygon)
    if len(flat) < 6 or len(flat) % 2:
        raise MaskError("a polygon of the mask needs three points or more, as [x, y, x, y, ...]")
    for value in flat:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_PIXELS:
            raise MaskError("a polygon of the mask holds something that is no coordinate")
    return [float(value) for value in flat]


def _fill_polygons(polygons: list[list[float]], width: int, height: int) -> NDArray[np.bool_]:
    from pycocotools import mask as coco

    return np.asarray(coco.decode(_polygon_runs(polygons, width, height))).view(bool)


def _polygon_runs(polygons: list[list[float]], width: int, height: int) -> dict[str, Any]:
    """COCO run lengths of the union of polygons."""
    from pycocotools import mask as coco

    # What lies outside the image cannot be in the mask; the margin keeps the slope of the outline about right.
    margin = 2 * max(width, height)
    outline = 0.0
    clipped = []
    for polygon in polygons:
        points = np.clip(np.array(polygon).reshape(-1, 2), -margin, margin)
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
        clipped.append(points.ravel().tolist())
    if not math.isfinite(outline) or outline > MAX_POLYGON_LENGTH:
        raise MaskError("the polygons of the mask are too long")
    runs: list[dict[str, Any]] = coco.frPyObjects(clipped, height, width)
    while len(runs) > 1:  # in pairs: one after the other is quadratic
        runs = [coco.merge(runs[first : first + 2]) for first in range(0, len(runs), 2)]
    return runs[0]


def _read_png(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A PNG as a mask: whatever is not 0 (not black, not index 0 of a palette) belongs to it; alpha does not count.

    Its size is checked before it is decoded, so that it takes no more memory than its image.
    """
    with open_raster(path, formats=("PNG",)) as image:
        _check_size(image.size, size)
        mask = np.zeros(size[::-1], bool)
        for rows, strip in strips(image):
            values = np.asarray(strip)
            if image.mode in ("LA", "RGBA", "PA"):
                values = values[..., :-1]
            mask[rows] = values.any(axis=2) if values.ndim == 3 else values != 0
    return mask
