"""Decode masks (COCO RLE, polygons, PNG files) to bool `(H, W)`, and encode them as COCO RLE.

RLE is parsed here rather than by pycocotools, whose C code trusts its input: a hostile string could write past its
buffer. Everything is checked against the image's size before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.images import MAX_PIXELS, iterate_strips, open_raster
from localization_heads.errors import UsageError

MaskSource = Mapping[str, Any] | Sequence[Any] | Path | NDArray[np.bool_]
"""COCO RLE `{"size": [H, W], "counts": ...}`, polygons, the path of a PNG, or a bool array; or, for their union, a list
of such masks (`merge_masks`), at least one of which is not polygons."""

MAX_MASKS = 100
"""For one expression."""
MAX_POLYGONS = 10_000
MAX_POLYGON_LENGTH = 1_000_000
"""Pixels of outline in all. Bounds the memory of the rasteriser, about 100 bytes a pixel."""


class MaskError(UsageError):
    """A mask is invalid, or its size differs from its image's. The message is one line."""


def read_mask(source: MaskSource, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a mask to bool `(H, W)`, for an image of `size` `(W, H)`. MaskError if it is invalid or of another size.

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
        mask = _decode_rle(source)
    elif _is_mask_list(source):
        mask = np.zeros((height, width), dtype=bool)
        for item in source:
            mask |= read_mask(item, size)
    else:
        return _fill_polygons(flatten_polygons(source), width, height)
    _check_size(mask.shape[::-1], size)
    return mask


def merge_masks(sources: Sequence[MaskSource]) -> MaskSource:
    """The union of several masks, not yet decoded. MaskError if there are none or more than `MAX_MASKS`.

    >>> merge_masks([[[0, 0, 2, 0, 2, 2]], [[4, 4, 6, 4, 6, 6]]])
    [[0.0, 0.0, 2.0, 0.0, 2.0, 2.0], [4.0, 4.0, 6.0, 4.0, 6.0, 6.0]]
    """
    if not 0 < len(sources) <= MAX_MASKS:
        raise MaskError(f"{len(sources)} masks: an expression has 1 to {MAX_MASKS}")
    others = [item for item in sources if _is_mask_list([item])]
    polygons = [polygon for item in sources if not _is_mask_list([item]) for polygon in flatten_polygons(item)]
    return [*others, polygons] if others and polygons else others or polygons


def _is_mask_list(source: Sequence[Any]) -> bool:
    """Whether a list holds masks rather than polygons."""
    return isinstance(source, list | tuple) and any(isinstance(item, Mapping | Path | np.ndarray) for item in source)


def _check_size(actual: tuple[int, ...], size: tuple[int, int]) -> None:
    if actual != tuple(size):
        shape = " x ".join(str(n) for n in actual)
        raise MaskError(f"the mask is {shape} pixels, its image {size[0]} x {size[1]}")


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a bool `(H, W)` mask as COCO RLE with its counts as text: `{"size": [H, W], "counts": "..."}`.

    >>> encode_mask(np.array([[False, True], [True, False]]))
    {'size': [2, 2], 'counts': '121'}
    """
    from pycocotools import mask as coco

    return _rle_to_json(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def encode_mask_source(source: MaskSource, size: tuple[int, int]) -> dict[str, Any]:
    """`encode_mask` for any mask that `read_mask` accepts. Polygons become RLE without an array in between."""
    if isinstance(source, np.ndarray | Path | Mapping) or _is_mask_list(source):
        return encode_mask(read_mask(source, size))
    if size[0] * size[1] > MAX_PIXELS:
        raise MaskError(f"a mask of {size[0]} x {size[1]} pixels is over the limit")
    return _rle_to_json(_polygons_to_rle(flatten_polygons(source), *size))


def _rle_to_json(rle: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    height, width = rle_size(rle)
    counts = rle.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("latin1")
    if isinstance(counts, str):
        counts = _decompress_counts(counts, height * width)
    elif not isinstance(counts, list) or not all(type(n) is int for n in counts):
        raise MaskError("the mask's 'counts' must be text or a list of whole numbers")
    if any(n < 0 for n in counts) or sum(counts) != height * width:
        raise MaskError(f"the mask's 'counts' do not add up to its size {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def rle_size(rle: Mapping[str, Any]) -> tuple[int, int]:
    """The validated `(H, W)` of a COCO RLE."""
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise MaskError("the mask's 'size' must be [height, width]")
    if size[0] * size[1] > MAX_PIXELS:
        raise MaskError(f"the mask's 'size' {size[0]} x {size[1]} is over the limit")
    return size[0], size[1]


def _decompress_counts(text: str, total: int) -> list[int]:
    """Decompress COCO's counts: 5 bits per character, offset by 48; from the fourth on, as differences two back."""
    counts: list[int] = []
    value = shift = 0
    for char in text:
        code = ord(char) - 48
        if not 0 <= code < 64 or shift > 60:
            raise MaskError("the mask's 'counts' are not COCO run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # the number continues
            continue
        if code & 16:  # sign bit
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


def flatten_polygons(source: object) -> list[list[float]]:
    """Validated polygons in COCO's form, `[[x, y, x, y, ...], ...]`. MaskError if they are invalid.

    A single polygon without the outer list and points as pairs `[[x, y], ...]` are accepted too.
    """
    if not isinstance(source, list | tuple) or not source:
        raise MaskError("the mask must be COCO RLE, polygons or the path of a PNG")
    if not isinstance(source[0], list | tuple) or all(_is_point(item) for item in source):
        source = [source]
    if len(source) > MAX_POLYGONS:
        raise MaskError(f"the mask has more than {MAX_POLYGONS} polygons")
    return [_flatten_polygon(polygon) for polygon in source]


def _is_point(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[0], list | tuple)


def _flatten_polygon(polygon: object) -> list[float]:
    if not isinstance(polygon, list | tuple):
        raise MaskError("a polygon of the mask is not a list of numbers")
    coordinates = [x for point in polygon for x in point] if all(_is_point(p) for p in polygon) else list(polygon)
    if len(coordinates) < 6 or len(coordinates) % 2:
        raise MaskError("a polygon of the mask needs three points or more, as [x, y, x, y, ...]")
    for value in coordinates:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_PIXELS:
            raise MaskError("a polygon of the mask holds something that is not a coordinate")
    return [float(value) for value in coordinates]


def _fill_polygons(polygons: list[list[float]], width: int, height: int) -> NDArray[np.bool_]:
    from pycocotools import mask as coco

    return np.asarray(coco.decode(_polygons_to_rle(polygons, width, height))).view(bool)


def _polygons_to_rle(polygons: list[list[float]], width: int, height: int) -> dict[str, Any]:
    """COCO RLE of the union of polygons, counts as bytes."""
    from pycocotools import mask as coco

    # Points far outside the image are clipped to bound the work; the margin keeps the slope of edges about right.
    margin = 2 * max(width, height)
    outline = 0.0
    clipped = []
    for polygon in polygons:
        points = np.clip(np.array(polygon).reshape(-1, 2), -margin, margin)
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
        clipped.append(points.ravel().tolist())
    if not math.isfinite(outline) or outline > MAX_POLYGON_LENGTH:
        raise MaskError("the polygons of the mask are too long")
    rle: list[dict[str, Any]] = coco.frPyObjects(clipped, height, width)
    while len(rle) > 1:  # merged in pairs: merging one by one is quadratic
        rle = [coco.merge(rle[first : first + 2]) for first in range(0, len(rle), 2)]
    return rle[0]


def _read_png(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a PNG mask: every nonzero pixel (not black, not palette index 0) is foreground; alpha is ignored.

    Its size is checked before it is decoded, so it takes no more memory than its image.
    """
    with open_raster(path, formats=("PNG",)) as image:
        _check_size(image.size, size)
        mask = np.zeros(size[::-1], bool)
        for rows, strip in iterate_strips(image):
            values = np.asarray(strip)
            if image.mode in ("LA", "RGBA", "PA"):
                values = values[..., :-1]
            mask[rows] = values.any(axis=2) if values.ndim == 3 else values != 0
    return mask
