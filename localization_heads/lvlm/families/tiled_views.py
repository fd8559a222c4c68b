"""Families that cut an image into tiles, usually in addition to the image as a whole: one function each, to `View`s."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.errors import UsageError
from localization_heads.lvlm.families.geometry import (
    ProcessedImage,
    Size,
    View,
    canvas_box,
    covered_view,
    even_view,
    fitted_size,
    grid,
    mosaic,
    padded_box,
    patches_of,
    square,
    tile_edges,
    upscaling_limit,
    whole_box,
    whole_view,
)
from localization_heads.lvlm.families.views import shifted


def anyres(image: ProcessedImage) -> list[View]:
    """LLaVA-NeXT, LLaVA-OneVision: the image squeezed into a square, then tiles over its letterboxed enlargement.

    The grid of the tiles' tokens is cropped to the image's aspect and downsampled if it is too large; each of its rows
    ends with a newline token.
    """
    from transformers.image_processing_utils import select_best_resolution

    config, (W, H) = image.config, image.image_size
    n, covered = patches_of(config.vision_config)
    base, rest = square(image.tokens[: n * n]), image.tokens[n * n :]
    if rest.size == 1:  # LLaVA-OneVision, several images: no tiles, and each image padded to a square
        return [covered_view(image, base, padded_box((W, H)))]
    canvas_h, canvas_w = select_best_resolution((H, W), config.image_grid_pinpoints)
    tile = image.config.vision_config.image_size
    x_edges, y_edges = tile_edges(canvas_w // tile, n, covered), tile_edges(canvas_h // tile, n, covered)
    resized = fitted_size((W, H), (canvas_w, canvas_h), math.ceil)
    offset = (canvas_w - resized[0]) // 2, (canvas_h - resized[1]) // 2
    x0, y0, x1, y1 = canvas_box((W, H), resized, (tile, tile), offset)  # of the first tile
    x_edges, y_edges = unpadded(x_edges * (x1 - x0) + x0, y_edges * (y1 - y0) + y0, (W, H))
    rows, columns = _downsampled(config, len(y_edges) - 1, len(x_edges) - 1, n)
    index = grid(rest, rows, columns + 1)[:, :-1]
    return [
        covered_view(image, base),
        View("tiles", index, _resampled(x_edges, columns), _resampled(y_edges, rows)),
    ]


def unpadded(
    x_edges: NDArray[np.float64], y_edges: NDArray[np.float64], image_size: Size
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Remove the rows or columns of the letterbox bars: transformers' `unpad_image`, applied to edges."""
    (W, H), columns, rows = image_size, len(x_edges) - 1, len(y_edges) - 1
    if columns / rows < W / H:
        bar = (rows - int(round(H * (columns / W), 7))) // 2
        return x_edges, y_edges[bar : rows - bar + 1]
    bar = (columns - int(round(W * (rows / H), 7))) // 2
    return x_edges[bar : columns - bar + 1], y_edges


def _downsampled(config: Any, rows: int, columns: int, n: int) -> Size:
    """Return the grid after LLaVA-OneVision's downsampling, if it has more cells than the tiles of `anyres_max_9`."""
    limit = re.fullmatch(r"anyres_max_(\d+)", getattr(config, "vision_aspect_ratio", None) or "")
    ratio = math.sqrt(rows * columns / (int(limit[1]) * n * n)) if limit else 0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _resampled(edges: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    return np.interp(np.linspace(0, len(edges) - 1, cells + 1), np.arange(len(edges)), edges)


def tiled(
    image: ProcessedImage, rows: int, columns: int, cells: int, *, box: Box | None = None, first: bool = False
) -> list[View]:
    """Return the views of tiles of `cells x cells` tokens over `box` and of a thumbnail of the whole image.

    Args:
        first: the thumbnail comes before the tiles, not after them.

    Raises:
        UsageError: the number of image tokens does not match.
    """
    box = box or whole_box(image.image_size)
    tokens, per_tile, tiles = image.tokens, cells * cells, rows * columns
    if tiles == 1 and tokens.size == per_tile:
        return [whole_view(image, square(tokens), box)]
    if tokens.size == tiles * per_tile:  # the thumbnail is switched off
        return [even_view("tiles", mosaic(tokens, rows, columns), box)]
    if first:
        thumbnail, rest = tokens[:per_tile], tokens[per_tile:]
    else:
        thumbnail, rest = tokens[-per_tile:], tokens[:-per_tile]
    if rest.size != tiles * per_tile:
        raise UsageError(
            f"{tokens.size} image tokens where {rows} x {columns} tiles of {per_tile} and a thumbnail are expected: "
            "the processor does not fit the model"
        )
    return [whole_view(image, square(thumbnail)), even_view("tiles", mosaic(rest, rows, columns), box)]


def internvl(image: ProcessedImage) -> list[View]:
    """InternVL: squeezed onto the canvas of 448-pixel tiles with the nearest aspect; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    return tiled(image, rows, columns, math.isqrt(image.config.image_seq_length))


def cohere(image: ProcessedImage) -> list[View]:
    """Aya Vision, Command A Vision: InternVL's canvas, patches merged by `downsample_factor`; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    patches, _ = patches_of(image.config.vision_config)
    return tiled(image, rows, columns, patches // image.config.downsample_factor)


def _optimal_canvas(image: ProcessedImage) -> Size:
    """Recompute `(rows, columns)` of tiles with the image processor's own function: its output lacks them."""
    ip, (W, H) = image.image_processor, image.image_size
    optimal = sys.modules[type(ip).__module__].get_optimal_tiled_canvas
    columns, rows = optimal((H, W), (ip.size["height"], ip.size["width"]), ip.min_patches, ip.max_patches)
    return rows, columns


def perception(image: ProcessedImage) -> list[View]:
    """Perception LM: thumbnail first, then the image squeezed onto the canvas of tiles that fits it best."""
    ip, (W, H) = image.image_processor, image.image_size
    columns, rows = 1, 1
    if ip.vision_input_type == "thumb+tile" and ip.max_num_tiles > 1:
        fit, closest = ip._fit_image_to_canvas, ip._find_closest_aspect_ratio
        columns, rows = fit(W, H, ip.tile_size) or closest(W, H, ip.tile_size)
    cells = ip.tile_size // image.processor.patch_size // image.processor.pooling_ratio
    return tiled(image, rows, columns, cells, first=True)


def unlimited_ocr(image: ProcessedImage) -> list[View]:
    """Unlimited-OCR: tiles over the squeezed image, then the whole image padded to a square; a token ends each row.

    Two strided convolutions centre a token 1.5 patches left of and above the middle of its 4 x 4.
    """
    ip, (W, H), views, tokens = image.image_processor, image.image_size, [], image.tokens
    cell = image.processor.patch_size * image.processor.downsample_ratio
    if image.inputs["num_local_patches"][image.sample]:
        columns, rows = image.inputs["patches_grid"][image.sample]
        n = -(-ip.tile_size // cell)
        size = rows * n * (columns * n + 1)
        index, tokens = grid(tokens[:size], rows * n, columns * n + 1)[:, :-1], tokens[size:]
        views.append(shifted(even_view("tiles", index, whole_box((W, H))), 1.5 / 4, n))
    side = max(ip.size["height"], ip.size["width"])
    scale = side / max(W, H)
    resized = round(W * scale), round(H * scale)
    if not ip.crop_to_patches and side <= ip.maximum_pad_value:
        resized = side, side
    offset = (side - resized[0]) // 2, (side - resized[1]) // 2
    n = -(-side // cell)
    index = grid(tokens[:-1], n, n + 1)[:, :-1]
    box = canvas_box((W, H), resized, (side, side), offset)
    return [shifted(whole_view(image, index, box), 1.5 / 4), *views]


def ovis2(image: ProcessedImage) -> list[View]:
    """Ovis2: thumbnail first; `<IMG_COL>` and `<IMG_ROW>` separate the tiles."""
    words = image.words()
    rows = words.count("<IMG_ROW>") + 1
    columns = words.count("<IMG_COL>") // rows + 1
    return tiled(image, rows, columns, math.isqrt(image.processor.image_seq_length), first=True)


def idefics3(image: ProcessedImage) -> list[View]:
    """Idefics 3, SmolVLM: `<row_R_col_C>` before each tile; the thumbnail last."""
    rows, columns = _numbered_tiles(image, r"<row_(\d+)_col_(\d+)>")
    return tiled(image, rows, columns, math.isqrt(image.processor.image_seq_len))


def _numbered_tiles(image: ProcessedImage, pattern: str) -> Size:
    """Return the highest row and column in the prompt's tile tokens; one tile if there are none."""
    matches = [re.fullmatch(pattern, word) for word in image.words()]
    tiles = [(int(match[1]), int(match[2])) for match in matches if match]
    return max((row for row, _ in tiles), default=1), max((column for _, column in tiles), default=1)


def molmo2(image: ProcessedImage) -> list[View]:
    """Molmo 2: the squeezed image, then the same at a higher resolution in overlapping crops, without their margins.

    Patches are pooled two by two; if their number is odd, the last cell of a row or column is half as large.
    """
    ip, (W, H) = image.image_processor, image.image_size
    geometry = sys.modules[type(ip).__module__].compute_crop_geometry
    side, patch = ip.size["height"], ip.patch_size
    options = {"max_crops": ip.max_crops, "overlap_margins": ip.overlap_margins}
    *_, height, width = geometry(H, W, **options, crop_size=side, patch_size=patch)
    views, tokens = [], image.tokens
    for name, h, w in (("whole", side, side), ("tiles", height, width)):
        x_edges, y_edges = (
            np.minimum(np.arange(-(-n // pool) + 1) * pool, n) / n * length
            for n, pool, length in ((w // patch, ip.pooling_size[1], W), (h // patch, ip.pooling_size[0], H))
        )
        rows, columns = len(y_edges) - 1, len(x_edges) - 1
        views.append(View(name, tokens[: rows * columns].reshape(rows, columns), x_edges, y_edges))
        tokens = tokens[rows * columns :]
    return views


def minicpm(image: ProcessedImage) -> list[View]:
    """MiniCPM-V: the image in one piece, then tiles, not necessarily square, over the squeezed image."""
    ip, size = image.image_processor, image.image_size[::-1]
    limits = {"scale_resolution": ip.scale_resolution, "patch_size": ip.patch_size}
    mode = {**limits, "downsample_mode": ip.downsample_mode}
    tiles = ip.get_sliced_grid(size, ip.max_slice_nums, ip.scale_resolution) if ip.slice_mode else None
    cell = ip.patch_size * math.isqrt(image.processor.image_token_divisor)
    height, width = ip.find_best_resize(size, **mode, allow_upscale=tiles is None)
    rows, columns = height // cell, width // cell
    views = [whole_view(image, grid(image.tokens[: rows * columns], rows, columns))]
    if tiles:
        height, width = ip.get_refine_size(size, tiles, **mode, allow_upscale=True)
        down, across = height // tiles[0] // cell, width // tiles[1] // cell
        rest = grid(image.tokens[rows * columns :], tiles[0] * tiles[1], down * across)
        index = rest.reshape(*tiles, down, across).transpose(0, 2, 1, 3).reshape(tiles[0] * down, -1)
        views.append(even_view("tiles", index, whole_box(image.image_size)))
    return views


def lfm2(image: ProcessedImage) -> list[View]:
    """LFM2-VL: square tiles over the squeezed image, then a thumbnail at the image's aspect."""
    ip, (W, H) = image.image_processor, image.image_size
    names = ("downsample_factor", "min_image_tokens", "max_image_tokens", "encoder_patch_size")
    width, height = ip.smart_resize(height=H, width=W, **{name: getattr(ip, name) for name in names})
    cell = ip.encoder_patch_size * ip.downsample_factor
    rows, columns = _numbered_tiles(image, r"<\|img_row_(\d+)_col_(\d+)\|>")
    tiles = rows * columns * (ip.tile_size // cell) ** 2 if rows * columns > 1 else 0  # their tokens
    views = []
    if image.tokens.size > tiles:
        views.append(whole_view(image, grid(image.tokens[tiles:], height // cell, width // cell)))
    if tiles:
        index = mosaic(image.tokens[:tiles], rows, columns)
        views.append(even_view("tiles", index, whole_box((W, H))))
    return views


def llama4(image: ProcessedImage) -> list[View]:
    """Llama 4: aspect kept, padded to whole tiles at the right and bottom; separators between tiles, thumbnail last."""
    words = image.words()
    rows = max(1, words.count("<|tile_y_separator|>"))
    columns = words.count("<|tile_x_separator|>") // rows + 1
    ip, vision = image.image_processor, image.config.vision_config
    cells = int(patches_of(vision)[0] * vision.pixel_shuffle_ratio)
    canvas = columns * ip.size["width"], rows * ip.size["height"]
    limit = canvas if ip.resize_to_max_canvas else upscaling_limit(image.image_size, ip.size["height"], canvas)
    box = canvas_box(image.image_size, fitted_size(image.image_size, limit), canvas)
    return tiled(image, rows, columns, cells, box=box)


def gemma3(image: ProcessedImage) -> list[View]:
    """Gemma 3: the image squeezed into a square; with pan and scan, crops along its longer side as well."""
    (W, H), per_view = image.image_size, image.config.mm_tokens_per_image
    whole, rest = image.tokens[:per_view], image.tokens[per_view:]
    views = [whole_view(image, square(whole))]
    if rest.size:
        crops, cells = rest.size // per_view, math.isqrt(per_view)
        rows, columns = (1, crops) if W >= H else (crops, 1)
        index = mosaic(rest, rows, columns)
        views.append(View("tiles", index, _crop_edges(W, columns, cells), _crop_edges(H, rows, cells)))
    return views


def _crop_edges(length: int, crops: int, cells: int) -> NDArray[np.float64]:
    """Return cell edges along one axis. Crops are rounded up to whole pixels, so the last one may be narrower."""
    size = math.ceil(length / crops)
    borders = np.minimum(np.arange(crops + 1) * size, length)
    return np.interp(np.arange(crops * cells + 1) / cells, np.arange(crops + 1), borders)


def mllama(image: ProcessedImage) -> list[View]:
    """Llama 3.2 Vision: the keys are those of cross-attention, tile by tile, each after its class token."""
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
