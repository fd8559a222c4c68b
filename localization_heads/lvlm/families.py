"""Where each model family puts its image tokens: one function per family, from an encoded image to `View`s.

A family that has no function gets one even grid over the whole image, or is refused. The number of tokens alone does
not determine the grid: 144 are 12 x 12 of an image squeezed into a square, and 9 x 16 of an image at its own aspect
ratio. So everything that the processor reports about the image is consulted, and a square is assumed only if nothing
contradicts it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.lvlm.geometry import (
    ProcessedImage,
    Size,
    View,
    canvas_box,
    cropped_box,
    even_view,
    fitted_size,
    grid,
    image_token_id,
    mosaic,
    padded_box,
    patches_of,
    seen_box,
    square,
    tile_edges,
    upscaling_limit,
    whole_box,
)
from localization_heads.lvlm.tiled_families import anyres, cohere, idefics3, internvl, lfm2, llama4, ovis2

log = logging.getLogger(__name__)

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
        return [even_view("whole", grid(tokens, rows, columns), whole_box(image.image_size))]
    if math.isqrt(tokens.size) ** 2 != tokens.size:
        raise _refusal(image, "are no square number")
    if contradiction := _against_square(image):
        raise _refusal(image, f"would make a square grid, but {contradiction}")
    return [even_view("whole", square(tokens), whole_box(image.image_size))]


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


Family = Callable[[ProcessedImage], list[View]]
Positions = NDArray[np.intp]

_NO_GRID = "its resampler mixes all patches into a few learned queries, so that no image token has a place"
REFUSED = {
    "aria": _NO_GRID,
    "blip-2": _NO_GRID,
    "idefics": _NO_GRID,
    "idefics2": _NO_GRID,
    "instructblip": _NO_GRID,
    "kosmos-2": _NO_GRID,
    "kosmos-2.5": _NO_GRID,
}
"""Model types without a grid of image tokens, and why."""

ADDS_IMAGE_ITSELF = {"florence2"}
"""Model types whose processor puts the image before the text: their prompts name none."""

NOT_SHARED = {
    "florence2": "its encoder reads image and expression together",
    "paligemma": "its image tokens attend to the expression (a bidirectional prefix)",
}
"""Model types that cannot encode an image once for all expressions, and why."""


def views_of(image: ProcessedImage) -> list[View]:
    """The views of one image: where its tokens lie, in every rendering of it that the model gets.

    Views without tokens are left out: the tiles of an image much longer than wide may be nothing but padding.

    Raises:
        UsageError: the family has no grid of image tokens, or the token count is not what its geometry says.
    """
    views = FAMILIES.get(image.config.model_type, unknown)(image)
    return [view for view in views if view.index.size]


def check_family(config: Any) -> None:
    """Before any weights are fetched: refuse a family without a grid, warn of one that nobody has verified.

    Raises:
        UsageError: the family is refused, or has no image tokens to find.
    """
    name = config.model_type
    if name in REFUSED:
        raise UsageError(f"model type '{name}' cannot be used: {REFUSED[name]}")
    if name not in FAMILIES:
        image_token_id(config)
        log.warning(
            "model type '%s' is not among the verified families: its image tokens are taken for one grid over the "
            "whole image, which nobody has checked",
            name,
        )


def llava(image: ProcessedImage) -> list[View]:
    """LLaVA-1.5 and its kin: a square grid over an image that is padded to a square, cropped, or squeezed.

    Pixtral 12B is a LLaVA by name with a tower for images of any size.
    """
    if getattr(image.config.vision_config, "model_type", "") == "pixtral":
        return pixtral(image)
    ip, size = image.image_processor, image.image_size
    box = cropped_box(ip, padded_box(size) if getattr(ip, "do_pad", False) else whole_box(size))
    return [even_view("whole", index := square(image.tokens), seen_box(image.config, index, box))]


def whole_square(image: ProcessedImage) -> list[View]:
    """PaliGemma, Gemma 3n: a square grid over the image, squeezed into a square."""
    index = square(image.tokens)
    return [even_view("whole", index, seen_box(image.config, index, whole_box(image.image_size)))]


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
    index = square(image.tokens)
    return [even_view("whole", index, seen_box(image.config, index, box))]


def qwen(image: ProcessedImage) -> list[View]:
    """Qwen-VL from 2 on, GLM-4V: the image at nearly its own size, patches merged `merge x merge`."""
    return [even_view("whole", _merged_grid(image), whole_box(image.image_size))]


def _merged_grid(image: ProcessedImage) -> Positions:
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
    return [even_view("whole", index, canvas_box((W, H), resized, canvas))]


def pixtral(image: ProcessedImage) -> list[View]:
    """Pixtral, Mistral 3: the image at nearly its own size; the tokens that break lines have other ids."""
    height, width = image.row("image_sizes")  # after resizing, in pixels
    cell = image.config.vision_config.patch_size * getattr(image.config, "spatial_merge_size", 1)
    return [
        even_view("whole", grid(image.tokens, height // cell, width // cell), whole_box(image.image_size))
    ]


def gemma3(image: ProcessedImage) -> list[View]:
    """Gemma 3: the image squeezed into a square; with pan and scan, crops along its longer side as well."""
    (W, H), each = image.image_size, image.config.mm_tokens_per_image
    whole, rest = image.tokens[:each], image.tokens[each:]
    views = [even_view("whole", square(whole), whole_box(image.image_size))]
    if rest.size:
        crops, cells = rest.size // each, math.isqrt(each)
        rows, columns = (1, crops) if W >= H else (crops, 1)
        index = mosaic(rest, rows, columns)
        views.append(View("tiles", index, _crop_edges(W, columns, cells), _crop_edges(H, rows, cells)))
    return views


def _crop_edges(length: int, crops: int, cells: int) -> NDArray[np.float64]:
    """Crops are rounded up to whole pixels, so that the last one is narrower."""
    size = math.ceil(length / crops)
    borders = np.minimum(np.arange(crops + 1) * size, length)
    return np.interp(np.arange(crops * cells + 1) / cells, np.arange(crops + 1), borders)


def gemma4(image: ProcessedImage) -> list[View]:
    """Gemma 4: the image at its own aspect; `image_position_ids` number its patches before pooling."""
    columns, rows = (int(n) + 1 for n in image.inputs["image_position_ids"][image.sample].amax(0))
    pool = image.config.vision_config.pooling_kernel_size
    index = grid(image.tokens, rows // pool, columns // pool)
    return [even_view("whole", index, whole_box(image.image_size))]


def mllama(image: ProcessedImage) -> list[View]:
    """Llama 3.2 Vision: the keys are those of cross-attention, tile after tile, a class token before each."""
    vision, tile = image.config.vision_config, image.image_processor.size["height"]
    rows, columns = vision.supported_aspect_ratios[image.row("aspect_ratio_ids")[0] - 1]
    cells, covered = patches_of(vision)
    keys = np.arange(rows * columns * (cells * cells + 1)).reshape(rows * columns, -1)[:, 1:]
    canvas = columns * tile, rows * tile
    limit = upscaling_limit(image.image_size, tile, canvas)
    x0, y0, x1, y1 = canvas_box(image.image_size, fitted_size(image.image_size, limit), (tile, tile))
    x_edges, y_edges = tile_edges(columns, cells, covered), tile_edges(rows, cells, covered)
    index = mosaic(keys.reshape(-1), rows, columns)
    return [View("whole", index, x_edges * (x1 - x0) + x0, y_edges * (y1 - y0) + y0)]


def florence2(image: ProcessedImage) -> list[View]:
    """Florence-2: the keys are the encoder's; the first image token is the mean of the others.

    Its four strided convolutions centre a token 15.5 of 768 pixels left of and above the middle of its 32, so the
    cells' borders are moved by as much, but for the outermost.
    """
    view = even_view("whole", square(image.tokens[1:]), whole_box(image.image_size))
    shift = 15.5 / image.image_processor.size["height"]
    for edges, length in zip((view.x_edges, view.y_edges), image.image_size, strict=True):
        edges[1:-1] -= shift * length
    return [view]


FAMILIES: dict[str, Family] = {
    "aya_vision": cohere,
    "cohere2_vision": cohere,
    "deepseek_vl": deepseek,
    "deepseek_vl_hybrid": deepseek,
    "florence2": florence2,
    "gemma3": gemma3,
    "gemma3n": whole_square,
    "gemma4": gemma4,
    "glm4v": qwen,
    "idefics3": idefics3,
    "internvl": internvl,
    "janus": deepseek,
    "kimi_k25": kimi,
    "lfm2_vl": lfm2,
    "llama4": llama4,
    "llava": llava,
    "llava_next": anyres,
    "llava_onevision": anyres,
    "mistral3": pixtral,
    "mllama": mllama,
    "ovis2": ovis2,
    "paligemma": whole_square,
    "qwen2_5_vl": qwen,
    "qwen2_vl": qwen,
    "qwen3_5": qwen,
    "qwen3_vl": qwen,
    "smolvlm": idefics3,
    "vipllava": llava,
}
"""The verified families, by `model_type`."""
