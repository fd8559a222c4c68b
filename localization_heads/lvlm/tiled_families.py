"""Model families that cut an image into tiles and usually show the model the whole of it as well. See `families.py`."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.errors import UsageError
from localization_heads.lvlm.geometry import (
    ProcessedImage,
    Size,
    View,
    canvas_box,
    even_view,
    fitted_size,
    grid,
    mosaic,
    patches_of,
    seen_box,
    square,
    tile_edges,
    upscaling_limit,
    whole_box,
)


def anyres(image: ProcessedImage) -> list[View]:
    """LLaVA-NeXT, LLaVA-OneVision: the image squeezed into a square, then tiles over its letterboxed enlargement.

    The tiles' tokens are unpadded to the image's aspect, shrunk where they are too many, and each of their rows
    ends with a newline token.
    """
    from transformers.image_processing_utils import select_best_resolution

    config, (W, H) = image.config, image.image_size
    n, covered = patches_of(config.vision_config)
    base, rest = square(image.tokens[: n * n]), image.tokens[n * n :]
    canvas_h, canvas_w = select_best_resolution((H, W), config.image_grid_pinpoints)
    tile = image.config.vision_config.image_size
    x_edges, y_edges = tile_edges(canvas_w // tile, n, covered), tile_edges(canvas_h // tile, n, covered)
    resized = letterboxed_size((W, H), (canvas_w, canvas_h))
    offset = (canvas_w - resized[0]) // 2, (canvas_h - resized[1]) // 2
    x0, y0, x1, y1 = canvas_box((W, H), resized, (tile, tile), offset)  # of the first tile
    x_edges, y_edges = unpadded(x_edges * (x1 - x0) + x0, y_edges * (y1 - y0) + y0, (W, H))
    rows, columns = _shrunk(config, len(y_edges) - 1, len(x_edges) - 1, n)
    index = grid(rest, rows, columns + 1)[:, :-1]
    return [
        even_view("whole", base, seen_box(config, base, whole_box((W, H)))),
        View("tiles", index, _resampled(x_edges, columns), _resampled(y_edges, rows)),
    ]


def letterboxed_size(image_size: Size, canvas: Size) -> Size:
    """The largest size of the image's aspect on a canvas, rounded up (LLaVA-NeXT)."""
    (W, H), (w, h) = image_size, canvas
    if w / W < h / H:
        return w, min(math.ceil(H * (w / W)), h)
    return min(math.ceil(W * (h / H)), w), h


def unpadded(
    x_edges: NDArray[np.float64], y_edges: NDArray[np.float64], image_size: Size
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Remove the rows or columns of a letterbox's bars: transformers' `unpad_image`, applied to edges."""
    (W, H), columns, rows = image_size, len(x_edges) - 1, len(y_edges) - 1
    if columns / rows < W / H:
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
    image: ProcessedImage, rows: int, columns: int, cells: int, *, box: Box | None = None, first: bool = False
) -> list[View]:
    """Tiles of `cells x cells` tokens over `box`, and a thumbnail of the whole image before or after them."""
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


def internvl(image: ProcessedImage) -> list[View]:
    """InternVL: the canvas of 448-pixel tiles with the nearest aspect, squeezed; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    return tiled(image, rows, columns, math.isqrt(image.config.image_seq_length))


def cohere(image: ProcessedImage) -> list[View]:
    """Aya Vision, Command A Vision: InternVL's canvas, patches merged by `downsample_factor`; thumbnail last."""
    rows, columns = _optimal_canvas(image)
    return tiled(
        image, rows, columns, patches_of(image.config.vision_config)[0] // image.config.downsample_factor
    )


def _optimal_canvas(image: ProcessedImage) -> Size:
    """`(rows, columns)` of tiles, from the image processor's own function: its output does not keep them."""
    ip, (W, H) = image.image_processor, image.image_size
    optimal = sys.modules[type(ip).__module__].get_optimal_tiled_canvas
    columns, rows = optimal((H, W), (ip.size["height"], ip.size["width"]), ip.min_patches, ip.max_patches)
    return rows, columns


def ovis2(image: ProcessedImage) -> list[View]:
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


def idefics3(image: ProcessedImage) -> list[View]:
    """Idefics 3, SmolVLM: `<row_R_col_C>` before each tile; the thumbnail last."""
    rows, columns = _numbered_tiles(image, r"<row_(\d+)_col_(\d+)>")
    return tiled(image, rows, columns, math.isqrt(image.processor.image_seq_len))


def _numbered_tiles(image: ProcessedImage, pattern: str) -> Size:
    """The highest row and column that the prompt's tile tokens name; one tile if there are none."""
    found = [re.fullmatch(pattern, word) for word in image.words()]
    places = [(int(place[1]), int(place[2])) for place in found if place]
    return max((row for row, _ in places), default=1), max((column for _, column in places), default=1)


def lfm2(image: ProcessedImage) -> list[View]:
    """LFM2-VL: square tiles over the squeezed image, then a thumbnail of its own aspect."""
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


def llama4(image: ProcessedImage) -> list[View]:
    """Llama 4: aspect kept, padded right and below to whole tiles; separators between the tiles, thumbnail last."""
    words = image.words()
    rows = max(1, words.count("<|tile_y_separator|>"))
    columns = words.count("<|tile_x_separator|>") // rows + 1
    ip, vision = image.image_processor, image.config.vision_config
    cells = int(patches_of(vision)[0] * vision.pixel_shuffle_ratio)
    canvas = columns * ip.size["width"], rows * ip.size["height"]
    limit = (
        canvas if ip.resize_to_max_canvas else upscaling_limit(image.image_size, ip.size["height"], canvas)
    )
    box = canvas_box(image.image_size, fitted_size(image.image_size, limit), canvas)
    return tiled(image, rows, columns, cells, box=box)
