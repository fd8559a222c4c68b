"""A fair try at a family that nobody has described: one even grid over the whole image, or a refusal.

A number of tokens alone does not say what grid they make: 144 are 12 x 12 of a picture squeezed into a square, and
9 x 16 of a picture at its own aspect. So everything that the processor says about the picture is asked, and a square
is taken only where nothing contradicts it.
"""

from __future__ import annotations

import math
import re

import numpy as np

from localization_heads.errors import UsageError
from localization_heads.lvlm.geometry import EncodedImage, Size, View, even_view, grid, square, whole_box

_GRID = "image_grid_thw"
_SIZES = re.compile(r"sizes?$|shapes?$|grid|_hws?$|_thw$")
"""Processor outputs that list sizes: image_sizes, spatial_shapes, image_grid_hws, tgt_sizes, ..."""


def unknown(image: EncodedImage) -> list[View]:
    """One unbroken run of image tokens over the whole image: the grid that the processor names, or else a square.

    Raises:
        UsageError: the tokens make no grid, or what the processor says contradicts the one that they would make.
    """
    tokens = image.tokens
    if tokens.size == 0 or int(tokens[-1] - tokens[0]) + 1 != tokens.size:
        raise _refusal(image, "do not follow each other in one run")
    if _GRID in image.inputs:
        rows, columns = _named_grid(image)
        return [even_view("whole", grid(tokens, rows, columns), whole_box(image.image_size))]
    if math.isqrt(tokens.size) ** 2 != tokens.size:
        raise _refusal(image, "are no square number")
    if contradiction := _against_square(image):
        raise _refusal(image, f"would make a square grid, but {contradiction}")
    return [even_view("whole", square(tokens), whole_box(image.image_size))]


def _refusal(image: EncodedImage, why: str) -> UsageError:
    return UsageError(
        f"model type '{image.config.model_type}' is not known here, and its {image.tokens.size} image tokens {why}: "
        "their places cannot be told (docs/models.md lists the known families, docs/add-a-family.md how to add one)"
    )


def _named_grid(image: EncodedImage) -> Size:
    """Rows and columns from `image_grid_thw`, in patches, merged `m x m`: m is what the number of tokens leaves."""
    named = _numbers(image, _GRID)
    if len(named) != 3:
        raise _refusal(image, f"come with an {_GRID} that does not give this picture three numbers")
    frames, rows, columns = named
    merge = math.isqrt(max(0, rows * columns) // image.tokens.size)
    own = getattr(getattr(image.processor, "image_processor", None), "merge_size", merge)
    fits = merge > 0 and merge == own and rows % merge == columns % merge == 0
    if frames != 1 or not fits or rows // merge * (columns // merge) != image.tokens.size:
        raise _refusal(image, f"do not fit {_GRID}, which says {frames} x {rows} x {columns} patches")
    return rows // merge, columns // merge


def _against_square(image: EncodedImage) -> str | None:
    """What speaks against a square grid over the whole picture, or None."""
    for name in sorted(image.inputs):
        if not _SIZES.search(name) or name.startswith("video"):
            continue
        sizes = _numbers(image, name)
        if len(sizes) != 2:
            return f"{name} does not give this picture one height and width"
        if sizes[0] != sizes[1]:
            return f"{name} says {sizes[0]} x {sizes[1]}"
    shown = _pixel_sizes(image)
    if len(shown) > 1:
        return f"the picture is shown in {len(shown)} parts"
    if shown:
        (H, W) = shown[0]
        return None if H == W else f"the picture is shown as {W} x {H} pixels"
    W, H = image.image_size
    if natural := _natural_grid(image.tokens.size, W, H):
        rows, columns = natural
        return f"a picture of {W} x {H} pixels kept at its aspect has as many, {rows} rows of {columns}"
    return None


def _numbers(image: EncodedImage, name: str) -> list[int]:
    """This sample's entry of a list of sizes, flattened; empty if it has none of its own."""
    values = image.inputs[name]
    if not hasattr(values, "__len__") or len(values) != len(image.inputs["input_ids"]):
        return []
    entry = values[image.sample]
    try:
        return [int(n) for n in np.ravel(entry.tolist() if hasattr(entry, "tolist") else entry)]
    except (TypeError, ValueError):  # ragged, or no numbers
        return []


def _pixel_sizes(image: EncodedImage) -> list[Size]:
    """`(H, W)` of each rendering of this picture that the model gets; none if they come as a list of patches.

    `pixel_values` are `[B, C, H, W]`, or `[B, n, C, H, W]` with empty ones where a picture has fewer than others. Of
    `[n, C, H, W]` with more than one a picture, all are taken: which are this one's is not said.
    """
    pixels = image.inputs.get("pixel_values")
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    if pixels is None or len(shape) not in (4, 5) or shape[-3] not in (1, 3):
        return []
    own = pixels[image.sample] if len(pixels) == len(image.inputs["input_ids"]) else pixels
    parts = own.reshape(-1, *shape[-3:])
    return [(shape[-2], shape[-1]) for part in parts if len(parts) == 1 or bool((part != 0).any())]


def _natural_grid(num_tokens: int, W: int, H: int) -> Size | None:
    """`(rows, columns)`, not equal, of as many square cells as cover a picture of W x H, sides rounded; None if none.

    >>> _natural_grid(144, 512, 288), _natural_grid(144, 500, 500), _natural_grid(576, 640, 480)
    ((9, 16), None, None)
    """
    for rows in range(1, num_tokens + 1):
        columns, rest = divmod(num_tokens, rows)
        # Some size of a cell gives both numbers, each within half a cell of the picture's side.
        fits = (
            rest == 0 and (rows - 0.5) * W <= (columns + 0.5) * H and (columns - 0.5) * H <= (rows + 0.5) * W
        )
        if fits and rows != columns:
            return rows, columns
    return None
