"""Where image tokens lie in the original image: the arithmetic that all families share.

Processors pad, resize, crop and tile an image before the vision tower cuts it into patches. Each function here undoes
one of those steps exactly, in floats, so that the edges of cells are in pixels of the original image. `views` and
`tiled_views` combine them for each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.cells import interval_overlaps
from localization_heads.errors import UsageError
from localization_heads.options.groups import ViewChoice

MAX_PREPARED_PIXELS = 400_000_000
"""Largest image, in pixels, that padding or resizing may produce: 1.2 GB."""

Size = tuple[int, int]
"""`(W, H)` in pixels."""
Edges = NDArray[np.float64]
"""Borders of a grid's columns `[w + 1]` or rows `[h + 1]`, increasing, in pixels of the original image."""


@dataclass(frozen=True, eq=False)
class View:
    """One grid of image tokens over one rendering of the image: the image as a whole, or its tiles side by side.

    Args:
        name: `whole` (the image in one piece) or `tiles` (at a higher resolution).
        index: `[h, w]` positions of the cells' tokens in the key sequence.
        x_edges: `[w + 1]` borders of the columns in pixels of the original image, outside it where the processor
            padded.
        y_edges: `[h + 1]` borders of the rows.
    """

    name: str
    index: NDArray[np.intp]
    x_edges: Edges
    y_edges: Edges

    @property
    def box(self) -> Box:
        """The region that the grid covers."""
        x, y = self.x_edges, self.y_edges
        return float(x[0]), float(y[0]), float(x[-1]), float(y[-1])

    @property
    def is_uniform(self) -> bool:
        """Whether all cells are equal in size."""
        return all(np.allclose(np.diff(e), (e[-1] - e[0]) / (len(e) - 1)) for e in (self.x_edges, self.y_edges))


class Layout(NamedTuple):
    """The token layout of one image: its number of tokens, and views whose `index` counts them from 0."""

    num_tokens: int
    views: list[View]


def check_shape(config: Any, image_processor: Any, image_size: tuple[int, int]) -> None:
    """Refuse an image so elongated that padding it to a square, or resizing it, would exhaust memory.

    Raises:
        UsageError: names the image's size.
    """
    if config.model_type not in ("fast_vlm", "llava", "vipllava"):
        return  # the other processors limit the size themselves
    if image_processor.size.get("longest_edge"):
        return  # so does Pixtral's, whose model type is `llava`
    box = padded_box(image_size) if getattr(image_processor, "do_pad", False) else whole_box(image_size)
    padded = round(box[2] - box[0]), round(box[3] - box[1])
    resized = resized_size(image_processor, *padded)
    if max(padded[0] * padded[1], resized[0] * resized[1]) > MAX_PREPARED_PIXELS:
        W, H = image_size
        raise UsageError(f"the image is {W} x {H} pixels: too long and thin for this model; cut it")


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One sample of a batch: the size of its image, and the processor's output for it.

    Args:
        config: the model's configuration.
        processor: the processor that encoded the batch.
        inputs: the processor's output for the whole batch, one image per sample.
        sample: its index in the batch.
        image_size: `(W, H)` of the original image in pixels.
    """

    config: Any
    processor: Any
    inputs: Mapping[str, Any]
    sample: int
    image_size: Size

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the prompt, padding included."""
        return list(self.inputs["input_ids"][self.sample].tolist())

    @cached_property
    def tokens(self) -> NDArray[np.intp]:
        """Positions of the image tokens in the prompt, padding included."""
        return np.flatnonzero(np.asarray(self.ids) == image_token_id(self.config))

    def row(self, name: str) -> list[Any]:
        """This sample's entry in an output of the processor that has one per image."""
        return list(self.inputs[name][self.sample].tolist())

    def words(self) -> list[str]:
        """The prompt's tokens as text, in which some families encode the rows and columns of tiles."""
        return list(self.processor.tokenizer.convert_ids_to_tokens(self.ids))


def split_views(tokens: NDArray[np.intp], layouts: Sequence[Layout]) -> list[list[View]]:
    """Return the views of each image in a prompt with several.

    Args:
        tokens: positions of the tokens of all images in the prompt.

    Raises:
        UsageError: their number does not match the layouts.
    """
    expected = sum(layout.num_tokens for layout in layouts)
    if tokens.size != expected:
        raise UsageError(
            f"{tokens.size} image tokens where the {len(layouts)} images have {expected}: "
            "the processor does not fit the model"
        )
    starts = np.cumsum([0, *(layout.num_tokens for layout in layouts)])
    return [
        [replace(view, index=tokens[start + view.index]) for view in layout.views]
        for start, layout in zip(starts, layouts, strict=False)
    ]


def image_token_id(config: Any) -> int:
    """Return the id of the tokens that image features replace, from the config: some processors name another token."""
    for part in (config, getattr(config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    raise UsageError(f"model type '{config.model_type}' has no image token in its prompt: its geometry is unknown")


def grid(positions: NDArray[np.intp], height: int, width: int) -> NDArray[np.intp]:
    """Reshape positions `[h * w]` to `[h, w]`. UsageError if their number does not match."""
    if positions.size != height * width:
        raise UsageError(
            f"{positions.size} image tokens where {height} x {width} are expected: the processor does not fit the model"
        )
    return positions.reshape(height, width)


def square(positions: NDArray[np.intp]) -> NDArray[np.intp]:
    """Reshape positions `[n * n]` to `[n, n]`. UsageError if their number is not a square."""
    side = math.isqrt(positions.size)
    if side == 0 or side * side != positions.size:
        raise UsageError(
            f"{positions.size} image tokens do not make a square grid: the processor does not fit the model"
        )
    return positions.reshape(side, side)


def mosaic(positions: NDArray[np.intp], rows: int, columns: int) -> NDArray[np.intp]:
    """Arrange the tokens of square tiles, stored tile by tile, as one grid of `rows x columns` tiles."""
    side = math.isqrt(max(1, positions.size // (rows * columns)))
    tiles = grid(positions, rows * columns, side * side).reshape(rows, columns, side, side)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def even_view(name: str, index: NDArray[np.intp], box: Box) -> View:
    """Return a view with equal cells over a region."""
    h, w = index.shape
    return View(name, index, np.linspace(box[0], box[2], w + 1), np.linspace(box[1], box[3], h + 1))


def whole_view(image: ProcessedImage, index: NDArray[np.intp], box: Box | None = None) -> View:
    """Return a view `whole` with equal cells over `box`, by default the image itself."""
    return even_view("whole", index, box or whole_box(image.image_size))


def tile_edges(tiles: int, cells: int, covered: float = 1.0) -> Edges:
    """Return the borders `[tiles * cells + 1]` of the cells of adjacent tiles, in units of a tile.

    Args:
        cells: number of cells along one tile.
        covered: fraction of a tile that its patches cover. If the patch size does not divide the tile's side, no token
            sees the rest (6 of 384 pixels with patches of 14), which is split between the adjacent cells.

    >>> tile_edges(2, 2, covered=0.8).round(6).tolist()
    [0.0, 0.4, 0.9, 1.4, 1.8]
    """
    step = np.arange(tiles * cells + 1)
    edges = step // cells + step % cells / cells * covered
    edges[cells::cells] -= (1 - covered) / 2
    edges[-1] = tiles - 1 + covered
    return edges


def whole_box(image_size: Size) -> Box:
    """Return the region of the image itself."""
    return 0.0, 0.0, float(image_size[0]), float(image_size[1])


def canvas_box(image_size: Size, resized: Size, canvas: Size, offset: Size = (0, 0)) -> Box:
    """Return the region of the original image that a canvas shows, onto which the resized image was pasted.

    Args:
        resized: size of the image after resizing.
        canvas: size of the vision tower's input, larger than the image where it was padded.
        offset: position of the image's top left corner on the canvas, negative where it was cropped.
    """
    (W, H), (x, y) = image_size, offset
    pixel_w, pixel_h = W / resized[0], H / resized[1]  # original pixels in one resized pixel
    return -x * pixel_w, -y * pixel_h, (canvas[0] - x) * pixel_w, (canvas[1] - y) * pixel_h


def fitted_size(image_size: Size, limit: Size, rounded: Callable[[float], int] = math.floor) -> Size:
    """Return the largest size within a limit that keeps the aspect ratio; the side below its limit is `rounded`."""
    (W, H), (w, h) = image_size, limit
    if w / W < h / H:
        return w, max(1, min(rounded(H * (w / W)), h))
    return max(1, min(rounded(W * (h / H)), w)), h


def upscaling_limit(image_size: Size, tile: int, canvas: Size) -> Size:
    """Return the limit for `fitted_size` of processors that enlarge to one tile at most, and shrink to the canvas."""
    (W, H), (w, h) = image_size, canvas
    return min(max(W, tile), w), min(max(H, tile), h)


def padded_box(image_size: Size) -> Box:
    """Return the square to which LLaVA pads an image, centred up to rounding down to a pixel."""
    W, H = image_size
    side = max(W, H)
    left, top = (side - W) // 2, (side - H) // 2
    return -float(left), -float(top), float(side - left), float(side - top)


def cropped_box(image_processor: Any, box: Box) -> Box:
    """Return the part of `box` that remains after resizing and the centre crop."""
    if not getattr(image_processor, "do_center_crop", False):
        return box
    crop = image_processor.crop_size
    resized_w, resized_h = resized_size(image_processor, round(box[2] - box[0]), round(box[3] - box[1]))
    x0, x1 = _crop_axis(box[0], box[2], resized_w, crop["width"])
    y0, y1 = _crop_axis(box[1], box[3], resized_h, crop["height"])
    return x0, y0, x1, y1


def resized_size(image_processor: Any, width: int, height: int) -> Size:
    """Return `(W, H)` after the processor's resizing: to a fixed size, or to a shortest edge with the aspect kept."""
    size = image_processor.size
    if not getattr(image_processor, "do_resize", True):
        return width, height
    if (edge := size.get("shortest_edge")) is None:
        return size["width"], size["height"]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _crop_axis(start: float, end: float, resized: int, crop: int) -> tuple[float, float]:
    """Undo a centre crop along one axis. transformers zero-pads a side that is shorter than the crop."""
    first = (resized - crop) // 2 if resized >= crop else -math.ceil((crop - resized) / 2)
    pixel = (end - start) / resized  # original pixels in one resized pixel
    return start + first * pixel, start + (first + crop) * pixel


def patches_of(vision_config: Any) -> tuple[int, float]:
    """Return the patches along a side of the vision tower's square input, and the fraction of it that they cover."""
    side, patch = first_of(vision_config.image_size), first_of(vision_config.patch_size)
    return side // patch, side // patch * patch / side


def covered_view(image: ProcessedImage, index: NDArray[np.intp], box: Box | None = None) -> View:
    """Like `whole_view`, without the strip at the right and bottom of `box` that no whole patch covers."""
    box = box or whole_box(image.image_size)
    vision = image.config.vision_config
    if hasattr(vision, "image_size") and hasattr(vision, "patch_size"):
        patches, covered = patches_of(vision)
        if covered != 1 and patches == index.shape[0]:
            x0, y0, x1, y1 = box
            box = x0, y0, x0 + covered * (x1 - x0), y0 + covered * (y1 - y0)
    return whole_view(image, index, box)


def first_of(value: Any) -> Any:
    """Return the side of a square, which configurations give as a number or as `[h, w]`."""
    return value[0] if isinstance(value, list | tuple) and value else value


def read_maps(
    row: NDArray[np.float32], views: Sequence[View], image_size: Size, choice: ViewChoice = "combined"
) -> tuple[NDArray[np.float32], Box]:
    """Return maps `[..., h, w]` with equal cells, and the region that they cover in pixels of the original image.

    A single view with equal cells is used as it is, padding included. Otherwise the attention of all views is
    distributed over one grid on the image.

    Args:
        row: attention over the keys, `[..., key]`.
        choice: `combined`, or the name of one view.
    """
    views = choose_views(views, choice)
    if len(views) == 1 and views[0].is_uniform:
        return np.take(row, views[0].index, axis=-1).astype(np.float32, copy=False), views[0].box
    box = whole_box(image_size)
    h, w = common_grid(views, image_size)
    x_edges, y_edges = np.linspace(box[0], box[2], w + 1), np.linspace(box[1], box[3], h + 1)
    maps = np.zeros((*row.shape[:-1], h, w))
    for view in views:
        attention = np.take(row, view.index, axis=-1)  # six times as fast as indexing
        maps += overlap_fractions(view.y_edges, y_edges) @ attention @ overlap_fractions(view.x_edges, x_edges).T
    return maps.astype(np.float32), box


def choose_views(views: Sequence[View], choice: ViewChoice) -> Sequence[View]:
    """Return the views of that name, or all if there are none: a small image has only the view `whole`."""
    named = [view for view in views if view.name == choice]
    return named if choice != "combined" and named else views


def common_grid(views: Sequence[View], image_size: Size) -> Size:
    """Return `(h, w)` for equal cells over the image that are about as small as those of the finest view."""
    cell_w = min(float(np.median(np.diff(view.x_edges))) for view in views)
    cell_h = min(float(np.median(np.diff(view.y_edges))) for view in views)
    return max(1, round(image_size[1] / cell_h)), max(1, round(image_size[0] / cell_w))


def overlap_fractions(source: Edges, target: Edges) -> NDArray[np.float64]:
    """`[target cell, source cell]`: the fraction of each source interval that lies in each target interval.

    >>> overlap_fractions(np.array([-1.0, 1.0, 2.0]), np.array([0.0, 1.5, 3.0])).tolist()
    [[0.5, 0.5], [0.0, 0.5]]
    """
    return np.asarray(interval_overlaps(target, source) / np.diff(source))
