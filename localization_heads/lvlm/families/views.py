"""Families that show the model the image in one piece: from the processor's output for it to its one `View`.

A family that has no function gets one even grid over the whole image, or is refused (`unknown`). The number of tokens
alone does not determine the grid: 144 are 12 x 12 of an image squeezed into a square, and 9 x 16 of an image at its
own aspect ratio. So everything that the processor reports about the image is consulted, and a square is assumed only
if nothing contradicts it.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.lvlm.families.geometry import (
    ProcessedImage,
    Size,
    View,
    canvas_box,
    cropped_box,
    grid,
    padded_box,
    seen_view,
    square,
    whole_box,
    whole_view,
)


def llava(image: ProcessedImage) -> list[View]:
    """LLaVA-1.5 and models built like it: a square grid over an image that is padded to a square, cropped, or squeezed.

    Pixtral 12B is a LLaVA by name with a tower for images of any size.
    """
    if getattr(image.config.vision_config, "model_type", "") == "pixtral":
        return pixtral(image)
    ip, size = image.image_processor, image.image_size
    box = cropped_box(ip, padded_box(size) if getattr(ip, "do_pad", False) else whole_box(size))
    return [seen_view(image, square(image.tokens), box)]


def whole_square(image: ProcessedImage) -> list[View]:
    """PaliGemma, Gemma 3n: a square grid over the image, squeezed into a square."""
    return [seen_view(image, square(image.tokens))]


def deepseek(image: ProcessedImage) -> list[View]:
    """DeepSeek-VL, Janus: the longer side is fitted to the square, the shorter one padded on both sides."""
    ip, (W, H) = image.image_processor, image.image_size
    if not getattr(ip, "do_pad", True):
        return whole_square(image)
    scale = ip.size["height"] / max(W, H)
    resized = max(round(W * scale), ip.min_size), max(round(H * scale), ip.min_size)
    side = max(resized)
    offset = (side - resized[0]) // 2, (side - resized[1]) // 2
    box = canvas_box((W, H), resized, (side, side), offset)
    return [seen_view(image, square(image.tokens), box)]


def qwen(image: ProcessedImage) -> list[View]:
    """Qwen-VL from 2 on, GLM-4V: the image at nearly its own size, patches merged `merge x merge`."""
    return [whole_view(image, _merged_grid(image))]


def _merged_grid(image: ProcessedImage) -> NDArray[np.intp]:
    _, rows, columns = image.row("image_grid_thw")  # in patches, before merging
    merge = image.image_processor.merge_size
    return grid(image.tokens, rows // merge, columns // merge)


def kimi(image: ProcessedImage) -> list[View]:
    """Kimi K2.5: shrunk if too large, then padded to whole cells on the right and below."""
    ip, (W, H) = image.image_processor, image.image_size
    index, patch, most = _merged_grid(image), ip.patch_size, ip.size["max_height"] * ip.patch_size
    patches = max(1, H // patch) * max(1, W // patch)
    scale = min(1.0, math.sqrt(ip.max_patches / patches), most / H, most / W)
    resized = min(max(1, int(W * scale)), most), min(max(1, int(H * scale)), most)
    cell = patch * ip.merge_size
    canvas = index.shape[1] * cell, index.shape[0] * cell
    return [whole_view(image, index, canvas_box((W, H), resized, canvas))]


def pixtral(image: ProcessedImage) -> list[View]:
    """Pixtral, Mistral 3: the image at nearly its own size; the tokens that break lines have other ids.

    Where patches are merged and the sides are no multiples of that (LightOnOCR), the rest belongs to no token.
    """
    height, width = image.row("image_sizes")  # after resizing, in pixels
    cell = image.config.vision_config.patch_size * getattr(image.config, "spatial_merge_size", 1)
    rows, columns = height // cell, width // cell
    W, H = image.image_size
    box = (0.0, 0.0, W * columns * cell / width, H * rows * cell / height)
    return [whole_view(image, grid(image.tokens, rows, columns), box)]


def gemma4(image: ProcessedImage) -> list[View]:
    """Gemma 4: the image at its own aspect; `image_position_ids` number its patches, before pooling if that is done."""
    columns, rows = (int(n) + 1 for n in image.inputs["image_position_ids"][image.sample].amax(0))
    unified = image.config.model_type == "gemma4_unified"
    pool = 1 if unified else image.config.vision_config.pooling_kernel_size
    index = grid(image.tokens, rows // pool, columns // pool)
    return [whole_view(image, index)]


def florence2(image: ProcessedImage) -> list[View]:
    """Florence-2: the keys are the encoder's; the first image token is the mean of the others.

    Its four strided convolutions centre a token 15.5 of 768 pixels left of and above the middle of its 32, so the
    borders between cells are moved by as much; the outermost stay.
    """
    view = whole_view(image, square(image.tokens[1:]))
    return [shifted(view, 15.5 / 32)]


def got_ocr2(image: ProcessedImage) -> list[View]:
    """GOT-OCR 2: two strided convolutions centre a token 1.5 patches left of and above the middle of its four."""
    return [shifted(whole_view(image, square(image.tokens)), 1.5 / 4)]


def fastvlm(image: ProcessedImage) -> list[View]:
    """FastVLM: LLaVA's square; six strided convolutions centre a token 31.5 of its 64 pixels left and above."""
    (view,) = llava(image)
    return [shifted(view, 31.5 / 64)]


def shifted(view: View, share: float, cells: int | None = None) -> View:
    """Borders between cells moved left and up by a share of a cell, as strided convolutions move their tokens.

    Args:
        cells: along a side of one tile, whose own borders stay; by default the view is one.
    """
    for edges in (view.x_edges, view.y_edges):
        inner = np.arange(len(edges)) % (cells or len(edges) - 1) != 0
        edges[inner] -= share * (edges[-1] - edges[0]) / (len(edges) - 1)
    return view


def fuyu(image: ProcessedImage) -> list[View]:
    """Fuyu: shrunk if too large, then padded right and below to whole patches; a token ends each row."""
    ip, (W, H) = image.image_processor, image.image_size
    limit = ip.size["width"], ip.size["height"]
    scale = min(1.0, limit[0] / W, limit[1] / H)
    resized = int(W * scale), int(H * scale)
    patch = ip.patch_size["width"], ip.patch_size["height"]
    columns, rows = (-(-min(n, most) // side) for n, most, side in zip(resized, limit, patch, strict=True))
    box = canvas_box((W, H), resized, (columns * patch[0], rows * patch[1]))
    return [whole_view(image, grid(image.tokens, rows, columns), box)]


def inkling(image: ProcessedImage) -> list[View]:
    """Inkling: the image at its own size, or enlarged, padded right and below to whole patches.

    Inkling 1 adds a column of padding where the width is a whole number of patches already.
    """
    ip, (W, H) = image.image_processor, image.image_size
    side, longest = ip.size["height"], max(W, H)
    wanted = longest * (getattr(ip, "rescale_image_frac", None) or 1)
    if cap := getattr(ip, "rescale_image_max_upscaled_long_edge", None):
        wanted = min(wanted, max(cap, longest))
    resized = math.floor(W * wanted / longest + 0.5), math.floor(H * wanted / longest + 0.5)
    rows = -(-resized[1] // side)
    index = grid(image.tokens, rows, image.tokens.size // rows)
    box = canvas_box((W, H), resized, (index.shape[1] * side, rows * side))
    return [whole_view(image, index, box)]


_GRID = "image_grid_thw"
_SIZES = re.compile(r"sizes?$|shapes?$|grid|_hws?$|_thw$")
"""Processor outputs that list sizes: image_sizes, spatial_shapes, image_grid_hws, tgt_sizes, ..."""


def unknown(image: ProcessedImage) -> list[View]:
    """A family without a function: contiguous image tokens as one grid, the one that the processor names or a square.

    Raises:
        UsageError: the tokens form no grid, or the processor's output contradicts the one that they would form.
    """
    tokens = image.tokens
    if tokens.size == 0 or int(tokens[-1] - tokens[0]) + 1 != tokens.size:
        raise _refusal(image, "do not follow each other in one run")
    if _GRID in image.inputs:
        rows, columns = _named_grid(image)
        return [whole_view(image, grid(tokens, rows, columns))]
    if math.isqrt(tokens.size) ** 2 != tokens.size:
        raise _refusal(image, "are no square number")
    if contradiction := _against_square(image):
        raise _refusal(image, f"would make a square grid, but {contradiction}")
    return [whole_view(image, square(tokens))]


def _refusal(image: ProcessedImage, why: str) -> UsageError:
    return UsageError(
        f"model type '{image.config.model_type}' is not known here, and its {image.tokens.size} image tokens {why}: "
        "their places cannot be told (docs/models.md lists the known families, docs/add-a-family.md how to add one)"
    )


def _named_grid(image: ProcessedImage) -> Size:
    """Rows and columns from `image_grid_thw`, in patches, merged `m x m`: m is what the number of tokens leaves."""
    named = _numbers(image, _GRID)
    if len(named) != 3:
        raise _refusal(image, f"come with an {_GRID} that does not give this image three numbers")
    frames, rows, columns = named
    merge = math.isqrt(max(0, rows * columns) // image.tokens.size)
    own = getattr(getattr(image.processor, "image_processor", None), "merge_size", merge)
    fits = merge > 0 and merge == own and rows % merge == columns % merge == 0
    if frames != 1 or not fits or rows // merge * (columns // merge) != image.tokens.size:
        raise _refusal(image, f"do not fit {_GRID}, which says {frames} x {rows} x {columns} patches")
    return rows // merge, columns // merge


def _against_square(image: ProcessedImage) -> str | None:
    """What speaks against a square grid over the whole image, or None."""
    for name in sorted(image.inputs):
        if not _SIZES.search(name) or name.startswith("video"):
            continue
        sizes = _numbers(image, name)
        if len(sizes) != 2:
            return f"{name} does not give this image one height and width"
        if sizes[0] != sizes[1]:
            return f"{name} says {sizes[0]} x {sizes[1]}"
    shown = _pixel_sizes(image)
    if len(shown) > 1:
        return f"the image is shown in {len(shown)} parts"
    if shown:
        (H, W) = shown[0]
        return None if H == W else f"the image is shown as {W} x {H} pixels"
    W, H = image.image_size
    if natural := _natural_grid(image.tokens.size, W, H):
        rows, columns = natural
        return f"an image of {W} x {H} pixels kept at its aspect has as many, {rows} rows of {columns}"
    return None


def _numbers(image: ProcessedImage, name: str) -> list[int]:
    """This sample's entry of a list of sizes, flattened; empty if it has none of its own."""
    values = image.inputs[name]
    if not hasattr(values, "__len__") or len(values) != len(image.inputs["input_ids"]):
        return []
    entry = values[image.sample]
    try:
        return [int(n) for n in np.ravel(entry.tolist() if hasattr(entry, "tolist") else entry)]
    except (TypeError, ValueError):  # ragged, or no numbers
        return []


def _pixel_sizes(image: ProcessedImage) -> list[Size]:
    """`(H, W)` of each rendering of this image that the model gets; none if they come as a list of patches.

    `pixel_values` are `[B, C, H, W]`, or `[B, n, C, H, W]` with empty ones where an image has fewer than others. Of
    `[n, C, H, W]` with more than one an image, all are taken: which are this one's is not said.
    """
    pixels = image.inputs.get("pixel_values")
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    if pixels is None or len(shape) not in (4, 5) or shape[-3] not in (1, 3):
        return []
    own = pixels[image.sample] if len(pixels) == len(image.inputs["input_ids"]) else pixels
    parts = own.reshape(-1, *shape[-3:])
    return [(shape[-2], shape[-1]) for part in parts if len(parts) == 1 or bool((part != 0).any())]


def _natural_grid(num_tokens: int, W: int, H: int) -> Size | None:
    """`(rows, columns)`, not equal, of as many square cells as cover an image of W x H, sides rounded; None if none.

    >>> _natural_grid(144, 512, 288), _natural_grid(144, 500, 500), _natural_grid(576, 640, 480)
    ((9, 16), None, None)
    """
    for rows in range(1, num_tokens + 1):
        columns, rest = divmod(num_tokens, rows)
        # Some size of a cell gives both numbers, each within half a cell of the image's side.
        fits = (
            rest == 0 and (rows - 0.5) * W <= (columns + 0.5) * H and (columns - 0.5) * H <= (rows + 0.5) * W
        )
        if fits and rows != columns:
            return rows, columns
    return None
