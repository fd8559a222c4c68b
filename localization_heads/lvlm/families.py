"""How each model family turns a picture into tokens: one small function a family, from an encoded image to views.

The facts come from the families' processors and modelling code in transformers 5.23; `tests/test_families.py`
checks them against the pixels. Grids and tiles are row-major throughout.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.errors import UsageError
from localization_heads.lvlm.geometry import (
    EncodedImage,
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
    square,
    tile_edges,
    whole_box,
)

log = logging.getLogger(__name__)

Family = Callable[[EncodedImage], list[View]]
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


def views_of(image: EncodedImage) -> list[View]:
    """Where one image's tokens lie, in every rendering of the picture that the model gets.

    Raises:
        UsageError: the family has no grid of image tokens, or the token count is not what its geometry says.
    """
    return FAMILIES.get(image.config.model_type, unknown)(image)


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
            "model type '%s' is not among the verified families: its image tokens are taken for a square grid over "
            "the whole image, which nobody has checked",
            name,
        )


def unknown(image: EncodedImage) -> list[View]:
    """A fair try: one unbroken run of image tokens, as many as a square grid has, over the whole image."""
    tokens = image.tokens
    run = tokens.size > 0 and int(tokens[-1] - tokens[0]) + 1 == tokens.size
    if not run or math.isqrt(tokens.size) ** 2 != tokens.size:
        raise UsageError(
            f"model type '{image.config.model_type}' is not known here (known: {', '.join(sorted(FAMILIES))}), and "
            f"its {tokens.size} image tokens are no single square grid: their places cannot be told"
        )
    return [even_view("whole", square(tokens), whole_box(image.image_size))]


def llava(image: EncodedImage) -> list[View]:
    """LLaVA-1.5 and its kin: a square grid over a picture that is padded to a square, cropped, or squeezed.

    Pixtral 12B is a LLaVA by name with a tower for pictures of any size.
    """
    if getattr(image.config.vision_config, "model_type", "") == "pixtral":
        return pixtral(image)
    ip, size = image.image_processor, image.image_size
    box = cropped_box(ip, padded_box(size) if getattr(ip, "do_pad", False) else whole_box(size))
    return [even_view("whole", index := square(image.tokens), _seen(image.config, index, box))]


def _seen(config: Any, index: Positions, box: Box) -> Box:
    """`box` less the strip at its right and bottom that a patch size leaves over which does not divide it."""
    vision = config.vision_config
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        return box
    patches, covered = patches_of(vision)
    if covered == 1 or patches != index.shape[0]:
        return box
    return box[0], box[1], box[0] + covered * (box[2] - box[0]), box[1] + covered * (box[3] - box[1])


def whole_square(image: EncodedImage) -> list[View]:
    """PaliGemma, Gemma 3n: a square grid over the picture, squeezed into a square."""
    index = square(image.tokens)
    return [even_view("whole", index, _seen(image.config, index, whole_box(image.image_size)))]


def deepseek(image: EncodedImage) -> list[View]:
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
    return [even_view("whole", index, _seen(image.config, index, box))]


def qwen(image: EncodedImage) -> list[View]:
    """Qwen-VL from 2 on, GLM-4V: the picture at nearly its own size, patches merged `merge x merge`."""
    return [even_view("whole", _merged_grid(image), whole_box(image.image_size))]


def _merged_grid(image: EncodedImage) -> Positions:
    _, rows, columns = image.row("image_grid_thw")  # in patches, before merging
    merge = image.image_processor.merge_size
    return grid(image.tokens, rows // merge, columns // merge)


def kimi(image: EncodedImage) -> list[View]:
    """Kimi K2.5: shrunk if too large, then padded to whole cells on the right and below."""
    ip, (W, H) = image.image_processor, image.image_size
    index, patch, most = _merged_grid(image), ip.patch_size, ip.size["max_height"] * ip.patch_size
    patches = max(1, H // patch) * max(1, W // patch)
    scale = min(1.0, math.sqrt(ip.max_patches / patches), most / H, most / W)
    resized = min(max(1, int(W * scale)), most), min(max(1, int(H * scale)), most)
    cell = patch * ip.merge_size
    canvas = index.shape[1] * cell, index.shape[0] * cell
    return [even_view("whole", index, canvas_box((W, H), resized, canvas))]


def pixtral(image: EncodedImage) -> list[View]:
    """Pixtral, Mistral 3: the picture at nearly its own size; the tokens that break lines have other ids."""
    height, width = image.row("image_sizes")  # after resizing, in pixels
    cell = image.config.vision_config.patch_size * getattr(image.config, "spatial_merge_size", 1)
    return [
        even_view("whole", grid(image.tokens, height // cell, width // cell), whole_box(image.image_size))
    ]


def gemma3(image: EncodedImage) -> list[View]:
    """Gemma 3: the picture squeezed into a square; with pan and scan, crops along its longer side as well."""
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


def gemma4(image: EncodedImage) -> list[View]:
    """Gemma 4: the picture at its own aspect; `image_position_ids` number its patches before pooling."""
    columns, rows = (int(n) + 1 for n in image.inputs["image_position_ids"][image.sample].amax(0))
    pool = image.config.vision_config.pooling_kernel_size
    index = grid(image.tokens, rows // pool, columns // pool)
    return [even_view("whole", index, whole_box(image.image_size))]


def anyres(image: EncodedImage) -> list[View]:
    """LLaVA-NeXT, LLaVA-OneVision: the picture squeezed into a square, then tiles over its letterboxed enlargement.

    The tiles' tokens are unpadded to the picture's aspect, shrunk where they are too many, and each of their rows
    ends with a newline token.
    """
    from transformers.image_processing_utils import select_best_resolution

    config, (W, H) = image.config, image.image_size
    n, covered = patches_of(config.vision_config)
    base, rest = square(image.tokens[: n * n]), image.tokens[n * n :]
    canvas_h, canvas_w = select_best_resolution([H, W], config.image_grid_pinpoints)
    tile = image.config.vision_config.image_size
    x_edges, y_edges = tile_edges(canvas_w // tile, n, covered), tile_edges(canvas_h // tile, n, covered)
    resized = letterboxed_size((W, H), (canvas_w, canvas_h))
    offset = (canvas_w - resized[0]) // 2, (canvas_h - resized[1]) // 2
    x0, y0, x1, y1 = canvas_box((W, H), resized, (tile, tile), offset)  # of the first tile
    x_edges, y_edges = unpadded(x_edges * (x1 - x0) + x0, y_edges * (y1 - y0) + y0, (W, H))
    rows, columns = _shrunk(config, len(y_edges) - 1, len(x_edges) - 1, n)
    index = grid(rest, rows, columns + 1)[:, :-1]
    return [
        even_view("whole", base, _seen(config, base, whole_box((W, H)))),
        View("tiles", index, _resampled(x_edges, columns), _resampled(y_edges, rows)),
    ]


def letterboxed_size(image_size: Size, canvas: Size) -> Size:
    """The largest size of the picture's aspect on a canvas, rounded up (LLaVA-NeXT)."""
    (W, H), (w, h) = image_size, canvas
    if w / W < h / H:
        return w, min(math.ceil(H * (w / W)), h)
    return min(math.ceil(W * (h / H)), w), h


def unpadded(
    x_edges: NDArray[np.float64], y_edges: NDArray[np.float64], image_size: Size
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cut off the rows or columns of a letterbox's bars: `unpad_image` of transformers, on edges."""
    (W, H), columns, rows = image_size, len(x_edges) - 1, len(y_edges) - 1
    if W / H > columns / rows:
        bar = (rows - int(round(H * (columns / W), 7))) // 2
        return x_edges, y_edges[bar : rows - bar + 1]
    bar = (columns - int(round(W * (rows / H), 7))) // 2
    return x_edges[bar : columns - bar + 1], y_edges


def _shrunk(config: Any, rows: int, columns: int, n: int) -> Size:
    """LLaVA-OneVision resamples a grid of more cells than `anyres_max_9` tiles have."""
    limit = re.fullmatch(r"anyres_max_(\d+)", getattr(config, "vision_aspect_ratio", None) or "")
    ratio = math.sqrt(rows * columns / (int(limit[1]) * n * n)) if limit else 0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _resampled(edges: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    return np.interp(np.linspace(0, len(edges) - 1, cells + 1), np.arange(len(edges)), edges)


def tiled(
    image: EncodedImage, rows: int, columns: int, cells: int, *, box: Box | None = None, first: bool = False
) -> list[View]:
    """Tiles of `cells x cells` tokens over `box`, and a thumbnail of the whole picture before or after them."""
    whole, box = whole_box(image.image_size), box or whole_box(image.image_size)
    tokens, each, tiles = image.tokens, cells * cells, rows * columns
    if tiles == 1 and tokens.size == each:
        return [even_view("whole", square(tokens), box)]
    if tokens.size == tiles * each:  # the thumbnail is switched off
        return [even_view("tiles", mosaic(tokens, rows, columns), box)]
    thumbnail, rest = (tokens[:each], tokens[each:]) if first else (tokens[-each:], tokens[:-each])
    if rest.size != tiles * each:
        raise UsageError(
            f"{tokens.size} image tokens where {rows} x {columns} tiles of {each} and a thumbnail are expected: "
            "the processor does not fit the model"
        )
    return [
        even_view("whole", square(thumbnail), whole),
        even_view("tiles", mosaic(rest, rows, columns), box),
    ]


def internvl(image: EncodedImage) -> list[View]:
    """InternVL: the canvas of 448-pixel tiles with the nearest aspect, squeezed; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    return tiled(image, rows, columns, math.isqrt(image.config.image_seq_length))


def cohere(image: EncodedImage) -> list[View]:
    """Aya Vision, Command A Vision: InternVL's canvas, patches merged by `downsample_factor`; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    return tiled(
        image, rows, columns, patches_of(image.config.vision_config)[0] // image.config.downsample_factor
    )


def _optimal_canvas(image: EncodedImage) -> Size:
    """`(rows, columns)` of tiles, from the image processor's own function: its output does not keep them."""
    ip, (W, H) = image.image_processor, image.image_size
    optimal = sys.modules[type(ip).__module__].get_optimal_tiled_canvas
    columns, rows = optimal((H, W), (ip.size["height"], ip.size["width"]), ip.min_patches, ip.max_patches)
    return rows, columns


def ovis2(image: EncodedImage) -> list[View]:
    """Ovis2: thumbnail first; `<IMG_COL>` and `<IMG_ROW>` stand between the tiles."""
    words = image.words()
    rows = words.count("<IMG_ROW>") + 1
    return tiled(
        image,
        rows,
        words.count("<IMG_COL>") // rows + 1,
        math.isqrt(image.processor.image_seq_length),
        first=True,
    )


def idefics3(image: EncodedImage) -> list[View]:
    """Idefics 3, SmolVLM: `<row_R_col_C>` before each tile; the thumbnail last."""
    rows, columns = _numbered_tiles(image, r"<row_(\d+)_col_(\d+)>")
    return tiled(image, rows, columns, math.isqrt(image.processor.image_seq_len))


def _numbered_tiles(image: EncodedImage, pattern: str) -> Size:
    """The highest row and column that the prompt's tile tokens name; one tile if there are none."""
    found = [re.fullmatch(pattern, word) for word in image.words()]
    places = [(int(place[1]), int(place[2])) for place in found if place]
    return max((row for row, _ in places), default=1), max((column for _, column in places), default=1)


def lfm2(image: EncodedImage) -> list[View]:
    """LFM2-VL: square tiles over the squeezed picture, then a thumbnail of its own aspect."""
    ip, (W, H) = image.image_processor, image.image_size
    names = ("downsample_factor", "min_image_tokens", "max_image_tokens", "encoder_patch_size")
    width, height = ip.smart_resize(height=H, width=W, **{name: getattr(ip, name) for name in names})
    cell, whole = ip.encoder_patch_size * ip.downsample_factor, whole_box(image.image_size)
    rows, columns = _numbered_tiles(image, r"<\|img_row_(\d+)_col_(\d+)\|>")
    tiles = rows * columns * (ip.tile_size // cell) ** 2 if rows * columns > 1 else 0
    views = []
    if image.tokens.size > tiles:
        index = grid(image.tokens[tiles:], height // cell, width // cell)
        views.append(even_view("whole", index, whole))
    if tiles:
        views.append(even_view("tiles", mosaic(image.tokens[:tiles], rows, columns), whole))
    return views


def llama4(image: EncodedImage) -> list[View]:
    """Llama 4: aspect kept, padded right and below to whole tiles; separators between the tiles, thumbnail last."""
    words = image.words()
    rows = max(1, words.count("<|tile_y_separator|>"))
    columns = words.count("<|tile_x_separator|>") // rows + 1
    ip, vision = image.image_processor, image.config.vision_config
    cells = int(patches_of(vision)[0] * vision.pixel_shuffle_ratio)
    canvas = columns * ip.size["width"], rows * ip.size["height"]
    limit = (
        canvas if ip.resize_to_max_canvas else _upscaling_limit(image.image_size, ip.size["height"], canvas)
    )
    box = canvas_box(image.image_size, fitted_size(image.image_size, limit), canvas)
    return tiled(image, rows, columns, cells, box=box)


def _upscaling_limit(image_size: Size, tile: int, canvas: Size) -> Size:
    """Pictures are enlarged to one tile at most, and shrunk to the canvas."""
    (W, H), (w, h) = image_size, canvas
    return min(max(W, tile), w), min(max(H, tile), h)


def mllama(image: EncodedImage) -> list[View]:
    """Llama 3.2 Vision: the keys are those of cross-attention, tile after tile, a class token before each."""
    vision, tile = image.config.vision_config, image.image_processor.size["height"]
    rows, columns = vision.supported_aspect_ratios[image.row("aspect_ratio_ids")[0] - 1]
    cells, covered = patches_of(vision)
    keys = np.arange(rows * columns * (cells * cells + 1)).reshape(rows * columns, -1)[:, 1:]
    canvas = columns * tile, rows * tile
    limit = _upscaling_limit(image.image_size, tile, canvas)
    x0, y0, x1, y1 = canvas_box(image.image_size, fitted_size(image.image_size, limit), (tile, tile))
    x_edges, y_edges = tile_edges(columns, cells, covered), tile_edges(rows, cells, covered)
    index = mosaic(keys.reshape(-1), rows, columns)
    return [View("whole", index, x_edges * (x1 - x0) + x0, y_edges * (y1 - y0) + y0)]


def florence2(image: EncodedImage) -> list[View]:
    """Florence-2: the keys are the encoder's; the first image token is the mean of the others."""
    return [even_view("whole", square(image.tokens[1:]), whole_box(image.image_size))]


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
