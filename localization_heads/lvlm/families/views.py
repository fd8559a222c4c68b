"""Families that show the model the image in one piece: one function each, from the processor's output to one `View`.

For a family without a function, `unknown` infers one even grid over the whole image, or refuses the image. The number
of tokens alone does not determine the grid: 144 may be 12 x 12 for an image squeezed into a square, or 9 x 16 for one
at its own aspect ratio. So `unknown` consults everything that the processor reports about the image, and assumes a
square only if nothing contradicts it.
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
    covered_view,
    cropped_box,
    grid,
    padded_box,
    square,
    whole_box,
    whole_view,
)


def llava(image: ProcessedImage) -> list[View]:
    """LLaVA-1.5 and models built like it: a square grid over an image that is padded to a square, cropped, or squeezed.

    Pixtral 12B has the model type `llava`, but a vision tower for images of any size.
    """
    if getattr(image.config.vision_config, "model_type", "") == "pixtral":
        return pixtral(image)
    ip, size = image.image_processor, image.image_size
    box = cropped_box(ip, padded_box(size) if getattr(ip, "do_pad", False) else whole_box(size))
    return [covered_view(image, square(image.tokens), box)]


def whole_square(image: ProcessedImage) -> list[View]:
    """PaliGemma, Gemma 3n: a square grid over the image, which is squeezed into a square."""
    return [covered_view(image, square(image.tokens))]


def deepseek(image: ProcessedImage) -> list[View]:
    """DeepSeek-VL, Janus: the longer side is resized to that of the square, the shorter one padded on both sides."""
    ip, (W, H) = image.image_processor, image.image_size
    if not getattr(ip, "do_pad", True):
        return whole_square(image)
    scale = ip.size["height"] / max(W, H)
    resized = max(round(W * scale), ip.min_size), max(round(H * scale), ip.min_size)
    side = max(resized)
    offset = (side - resized[0]) // 2, (side - resized[1]) // 2
    box = canvas_box((W, H), resized, (side, side), offset)
    return [covered_view(image, square(image.tokens), box)]


def qwen(image: ProcessedImage) -> list[View]:
    """Qwen2-VL and later, GLM-4V: the image at nearly its own size, with `merge x merge` patches per token."""
    return [whole_view(image, _merged_grid(image))]


def _merged_grid(image: ProcessedImage) -> NDArray[np.intp]:
    _, rows, columns = image.row("image_grid_thw")  # in patches, before merging
    merge = image.image_processor.merge_size
    return grid(image.tokens, rows // merge, columns // merge)


def kimi(image: ProcessedImage) -> list[View]:
    """Kimi K2.5: shrunk if too large, then padded to whole cells at the right and bottom."""
    ip, (W, H) = image.image_processor, image.image_size
    index, patch, most = _merged_grid(image), ip.patch_size, ip.size["max_height"] * ip.patch_size
    patches = max(1, H // patch) * max(1, W // patch)
    scale = min(1.0, math.sqrt(ip.max_patches / patches), most / H, most / W)
    resized = min(max(1, int(W * scale)), most), min(max(1, int(H * scale)), most)
    cell = patch * ip.merge_size
    canvas = index.shape[1] * cell, index.shape[0] * cell
    return [whole_view(image, index, canvas_box((W, H), resized, canvas))]


def pixtral(image: ProcessedImage) -> list[View]:
    """Pixtral, Mistral 3: the image at nearly its own size; line break tokens have ids of their own.

    If patches are merged and the sides are not multiples of a merged cell (LightOnOCR), no token covers the rest.
    """
    height, width = image.row("image_sizes")  # after resizing, in pixels
    cell = image.config.vision_config.patch_size * getattr(image.config, "spatial_merge_size", 1)
    rows, columns = height // cell, width // cell
    W, H = image.image_size
    box = (0.0, 0.0, W * columns * cell / width, H * rows * cell / height)
    return [whole_view(image, grid(image.tokens, rows, columns), box)]


def gemma4(image: ProcessedImage) -> list[View]:
    """Gemma 4: the image at its own aspect; `image_position_ids` number its patches before pooling."""
    columns, rows = (int(n) + 1 for n in image.inputs["image_position_ids"][image.sample].amax(0))
    unified = image.config.model_type == "gemma4_unified"
    pool = 1 if unified else image.config.vision_config.pooling_kernel_size
    index = grid(image.tokens, rows // pool, columns // pool)
    return [whole_view(image, index)]


def florence2(image: ProcessedImage) -> list[View]:
    """Florence-2: the keys are the encoder's; the first image token is the mean of the others.

    Its four strided convolutions centre a token 15.5 pixels left of and above the middle of its 32-pixel cell, so the
    inner borders are shifted by as much.
    """
    view = whole_view(image, square(image.tokens[1:]))
    return [shifted(view, 15.5 / 32)]


def got_ocr2(image: ProcessedImage) -> list[View]:
    """GOT-OCR 2: two strided convolutions centre a token 1.5 patches left of and above the middle of its 4 x 4."""
    return [shifted(whole_view(image, square(image.tokens)), 1.5 / 4)]


def fastvlm(image: ProcessedImage) -> list[View]:
    """FastVLM: as LLaVA; six strided convolutions centre a token 31.5 of its 64 pixels to the left and above."""
    (view,) = llava(image)
    return [shifted(view, 31.5 / 64)]


def shifted(view: View, fraction: float, cells: int | None = None) -> View:
    """Shift the inner borders left and up by a fraction of a cell, as strided convolutions shift their tokens.

    Args:
        cells: number of cells along a side of each tile, whose outer borders stay; by default the view is one tile.
    """
    for edges in (view.x_edges, view.y_edges):
        inner = np.arange(len(edges)) % (cells or len(edges) - 1) != 0
        edges[inner] -= fraction * (edges[-1] - edges[0]) / (len(edges) - 1)
    return view


def fuyu(image: ProcessedImage) -> list[View]:
    """Fuyu: shrunk if too large, then padded to whole patches at the right and bottom; a token ends each row."""
    ip, (W, H) = image.image_processor, image.image_size
    limit = ip.size["width"], ip.size["height"]
    scale = min(1.0, limit[0] / W, limit[1] / H)
    resized = int(W * scale), int(H * scale)
    patch = ip.patch_size["width"], ip.patch_size["height"]
    columns, rows = (-(-min(n, most) // side) for n, most, side in zip(resized, limit, patch, strict=True))
    box = canvas_box((W, H), resized, (columns * patch[0], rows * patch[1]))
    return [whole_view(image, grid(image.tokens, rows, columns), box)]


def inkling(image: ProcessedImage) -> list[View]:
    """Inkling: the image at its own size or enlarged, padded to whole patches at the right and bottom.

    Inkling 1 adds a column of padding even if the width is a whole number of patches.
    """
    ip, (W, H) = image.image_processor, image.image_size
    side, longest = ip.size["height"], max(W, H)
    target = longest * (getattr(ip, "rescale_image_frac", None) or 1)
    if cap := getattr(ip, "rescale_image_max_upscaled_long_edge", None):
        target = min(target, max(cap, longest))
    resized = math.floor(W * target / longest + 0.5), math.floor(H * target / longest + 0.5)
    rows = -(-resized[1] // side)
    index = grid(image.tokens, rows, image.tokens.size // rows)
    box = canvas_box((W, H), resized, (index.shape[1] * side, rows * side))
    return [whole_view(image, index, box)]


_GRID = "image_grid_thw"
_SIZES = re.compile(r"sizes?$|shapes?$|grid|_hws?$|_thw$")
"""Processor outputs that list sizes: image_sizes, spatial_shapes, image_grid_hws, tgt_sizes, ..."""


def unknown(image: ProcessedImage) -> list[View]:
    """A family without a function: contiguous image tokens as one grid, as the processor reports it or else a square.

    Raises:
        UsageError: the tokens form no grid, or the processor's output contradicts it.
    """
    tokens = image.tokens
    if tokens.size == 0 or int(tokens[-1] - tokens[0]) + 1 != tokens.size:
        raise _refusal(image, "do not follow each other in one run")
    if _GRID in image.inputs:
        rows, columns = _reported_grid(image)
        return [whole_view(image, grid(tokens, rows, columns))]
    if math.isqrt(tokens.size) ** 2 != tokens.size:
        raise _refusal(image, "are no square number")
    if contradiction := _contradiction_to_square(image):
        raise _refusal(image, f"would make a square grid, but {contradiction}")
    return [whole_view(image, square(tokens))]


def _refusal(image: ProcessedImage, why: str) -> UsageError:
    return UsageError(
        f"model type '{image.config.model_type}' is not known here, and its {image.tokens.size} image tokens {why}: "
        "their positions in the image are unknown (docs/models.md lists the known families, docs/add-a-family.md how "
        "to add one)"
    )


def _reported_grid(image: ProcessedImage) -> Size:
    """Return `(rows, columns)` from `image_grid_thw`, with the merge size inferred from the number of tokens."""
    numbers = _numbers(image, _GRID)
    if len(numbers) != 3:
        raise _refusal(image, f"come with an {_GRID} that does not give this image three numbers")
    frames, rows, columns = numbers  # in patches, before merging `merge x merge`
    merge = math.isqrt(max(0, rows * columns) // image.tokens.size)
    expected = getattr(getattr(image.processor, "image_processor", None), "merge_size", merge)
    divides = merge > 0 and merge == expected and rows % merge == columns % merge == 0
    if frames != 1 or not divides or rows // merge * (columns // merge) != image.tokens.size:
        raise _refusal(image, f"do not fit {_GRID}, which says {frames} x {rows} x {columns} patches")
    return rows // merge, columns // merge


def _contradiction_to_square(image: ProcessedImage) -> str | None:
    """Return what contradicts a square grid over the whole image, or None."""
    for name in sorted(image.inputs):
        if not _SIZES.search(name) or name.startswith("video"):
            continue
        sizes = _numbers(image, name)
        if len(sizes) != 2:
            return f"{name} does not give this image one height and width"
        if sizes[0] != sizes[1]:
            return f"{name} says {sizes[0]} x {sizes[1]}"
    sizes_shown = _pixel_sizes(image)
    if len(sizes_shown) > 1:
        return f"the image is shown in {len(sizes_shown)} parts"
    if sizes_shown:
        (H, W) = sizes_shown[0]
        return None if H == W else f"the image is shown as {W} x {H} pixels"
    W, H = image.image_size
    if natural := _natural_grid(image.tokens.size, W, H):
        rows, columns = natural
        return f"an image of {W} x {H} pixels kept at its aspect has as many, {rows} rows of {columns}"
    return None


def _numbers(image: ProcessedImage, name: str) -> list[int]:
    """Return this sample's entry in a list of sizes, flattened; empty if there is no entry per sample."""
    values = image.inputs[name]
    if not hasattr(values, "__len__") or len(values) != len(image.inputs["input_ids"]):
        return []
    entry = values[image.sample]
    try:
        return [int(n) for n in np.ravel(entry.tolist() if hasattr(entry, "tolist") else entry)]
    except (TypeError, ValueError):  # ragged, or not numbers
        return []


def _pixel_sizes(image: ProcessedImage) -> list[Size]:
    """Return `(H, W)` of each rendering of this image that the model gets; empty if it gets a list of patches.

    `pixel_values` are `[B, C, H, W]`, or `[B, n, C, H, W]` with zeros for images with fewer renderings than others. In
    `[n, C, H, W]` with several per image, it is unknown which belong to this image, and all are returned.
    """
    pixels = image.inputs.get("pixel_values")
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    if pixels is None or len(shape) not in (4, 5) or shape[-3] not in (1, 3):
        return []
    if len(pixels) == len(image.inputs["input_ids"]):
        pixels = pixels[image.sample]
    parts = pixels.reshape(-1, *shape[-3:])
    return [(shape[-2], shape[-1]) for part in parts if len(parts) == 1 or bool((part != 0).any())]


def _natural_grid(num_tokens: int, W: int, H: int) -> Size | None:
    """Return an unequal `(rows, columns)` with which square cells cover an image of W x H, up to rounding; else None.

    >>> _natural_grid(144, 512, 288), _natural_grid(144, 500, 500), _natural_grid(576, 640, 480)
    ((9, 16), None, None)
    """
    for rows in range(1, num_tokens + 1):
        columns, rest = divmod(num_tokens, rows)
        if rest or rows == columns:
            continue
        # For some cell size, both counts are within half a cell of the image's sides.
        if (rows - 0.5) * W <= (columns + 0.5) * H and (columns - 0.5) * H <= (rows + 0.5) * W:
            return rows, columns
    return None
