"""Where image tokens lie in the original image: the arithmetic that all families share.

Processors pad, resize, crop and tile an image before the vision tower cuts it into patches. Each function here undoes
one of those steps exactly, in floats, so that the edges of cells come out in pixels of the original image.
`families.py` says which steps each family takes.
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
"""Largest image, in pixels, that padding or resizing may make on the way: 1.2 GB."""

Size = tuple[int, int]
"""`(W, H)` in pixels."""
Edges = NDArray[np.float64]
"""Borders of a grid's columns `[w + 1]` or rows `[h + 1]`, rising, in pixels of the original image."""


@dataclass(frozen=True, eq=False)
class View:
    """One grid of image tokens over one rendering of the image: the whole of it, or its tiles side by side.

    Args:
        name: `whole` (the image in one piece) or `tiles` (the same at a higher resolution).
        index: `[h, w]` positions of the cells' tokens in the key sequence, row by row.
        x_edges: `[w + 1]` borders of the columns in pixels of the original image: outside it where the
            processor padded.
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
        return all(
            np.allclose(np.diff(e), (e[-1] - e[0]) / (len(e) - 1)) for e in (self.x_edges, self.y_edges)
        )


class Layout(NamedTuple):
    """Where an image's tokens lie among its own: their number, and views whose `index` counts them from 0."""

    num_tokens: int
    views: list[View]


def check_shape(config: Any, image_processor: Any, image_size: tuple[int, int]) -> None:
    """Refuse an image so elongated that padding it to a square, or resizing it, would fill the memory.

    Raises:
        UsageError: names its size.
    """
    if config.model_type not in (
        "fast_vlm",
        "llava",
        "vipllava",
    ):  # the others bound the pixels they resize to
        return
    if image_processor.size.get("longest_edge"):  # so does Pixtral, a LLaVA by name
        return
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
        """Token ids of the padded prompt."""
        return list(self.inputs["input_ids"][self.sample].tolist())

    @cached_property
    def tokens(self) -> NDArray[np.intp]:
        """Positions of the image tokens in the prompt, padding included."""
        return np.flatnonzero(np.asarray(self.ids) == image_token_id(self.config))

    def row(self, name: str) -> list[Any]:
        """This sample's entry of a processor output that has one for each image."""
        return list(self.inputs[name][self.sample].tolist())

    def words(self) -> list[str]:
        """The prompt's tokens as text: families write rows and columns of their tiles into it."""
        return list(self.processor.tokenizer.convert_ids_to_tokens(self.ids))


def split_views(tokens: NDArray[np.intp], layouts: Sequence[Layout]) -> list[list[View]]:
    """The views of each image of a prompt, in its order.

    Args:
        tokens: positions of all images' tokens in the prompt.

    Raises:
        UsageError: they are more or fewer than the layouts have.
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
    """The id that an image's features replace. Asked of the config: some processors name another token."""
    for part in (config, getattr(config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    raise UsageError(
        f"model type '{config.model_type}' has no image token in its prompt: its geometry is unknown"
    )


def grid(positions: NDArray[np.intp], height: int, width: int) -> NDArray[np.intp]:
    """Positions `[h * w]` as `[h, w]`. Raises UsageError if they are more or fewer."""
    if positions.size != height * width:
        raise UsageError(
            f"{positions.size} image tokens where {height} x {width} are expected: "
            "the processor does not fit the model"
        )
    return positions.reshape(height, width)


def square(positions: NDArray[np.intp]) -> NDArray[np.intp]:
    """Positions `[n * n]` as `[n, n]`. Raises UsageError if that is not possible."""
    side = math.isqrt(positions.size)
    if side == 0 or side * side != positions.size:
        raise UsageError(
            f"{positions.size} image tokens do not make a square grid: the processor does not fit the model"
        )
    return positions.reshape(side, side)


def mosaic(positions: NDArray[np.intp], rows: int, columns: int) -> NDArray[np.intp]:
    """Tile after tile, row-major inside each, as one grid of `rows x columns` square tiles."""
    side = math.isqrt(max(1, positions.size // (rows * columns)))
    tiles = grid(positions, rows * columns, side * side).reshape(rows, columns, side, side)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def even_view(name: str, index: NDArray[np.intp], box: Box) -> View:
    """A grid of equal cells over a region."""
    h, w = index.shape
    return View(name, index, np.linspace(box[0], box[2], w + 1), np.linspace(box[1], box[3], h + 1))


def whole_view(image: ProcessedImage, index: NDArray[np.intp], box: Box | None = None) -> View:
    """The image in one piece, in equal cells over `box`: by default, over the image itself."""
    return even_view("whole", index, box or whole_box(image.image_size))


def tile_edges(tiles: int, cells: int, covered: float = 1.0) -> Edges:
    """Borders `[tiles * cells + 1]` of the cells of tiles in a row, in tiles.

    Args:
        cells: in one tile.
        covered: share of a tile that its patches cover. A patch size that does not divide the tile's leaves a
            strip that no token sees (6 of 384 pixels with patches of 14): its neighbours share it.

    >>> tile_edges(2, 2, covered=0.8).round(6).tolist()
    [0.0, 0.4, 0.9, 1.4, 1.8]
    """
    step = np.arange(tiles * cells + 1)
    edges = step // cells + step % cells / cells * covered
    edges[cells::cells] -= (1 - covered) / 2
    edges[-1] = tiles - 1 + covered
    return edges


def whole_box(image_size: Size) -> Box:
    """The image itself."""
    return 0.0, 0.0, float(image_size[0]), float(image_size[1])


def canvas_box(image_size: Size, resized: Size, canvas: Size, offset: Size = (0, 0)) -> Box:
    """The region of the original that a canvas shows, on which the resized image was laid.

    Args:
        resized: size of the image after resizing.
        canvas: what the vision tower gets; larger than the image where it was padded.
        offset: where on the canvas the image's top left corner lies; negative where it was cropped.
    """
    (W, H), (x, y) = image_size, offset
    pixel_w, pixel_h = W / resized[0], H / resized[1]  # original pixels in one resized pixel
    return -x * pixel_w, -y * pixel_h, (canvas[0] - x) * pixel_w, (canvas[1] - y) * pixel_h


def fitted_size(image_size: Size, limit: Size, rounded: Callable[[float], int] = math.floor) -> Size:
    """The largest size of the image's aspect within a limit; the side that does not reach it is `rounded`."""
    (W, H), (w, h) = image_size, limit
    if w / W < h / H:
        return w, max(1, min(rounded(H * (w / W)), h))
    return max(1, min(rounded(W * (h / H)), w)), h


def upscaling_limit(image_size: Size, tile: int, canvas: Size) -> Size:
    """Images are enlarged to one tile at most, and shrunk to the canvas."""
    (W, H), (w, h) = image_size, canvas
    return min(max(W, tile), w), min(max(H, tile), h)


def padded_box(image_size: Size) -> Box:
    """The square that LLaVA pads an image to: the original lies in its middle, rounded down to a pixel."""
    W, H = image_size
    side = max(W, H)
    left, top = (side - W) // 2, (side - H) // 2
    return -float(left), -float(top), float(side - left), float(side - top)


def cropped_box(image_processor: Any, box: Box) -> Box:
    """The part of `box` that is left after resizing it and cutting out the centre."""
    if not getattr(image_processor, "do_center_crop", False):
        return box
    crop = image_processor.crop_size
    resized_w, resized_h = resized_size(image_processor, round(box[2] - box[0]), round(box[3] - box[1]))
    x0, x1 = _crop_axis(box[0], box[2], resized_w, crop["width"])
    y0, y1 = _crop_axis(box[1], box[3], resized_h, crop["height"])
    return x0, y0, x1, y1


def resized_size(image_processor: Any, width: int, height: int) -> Size:
    """`(W, H)` after the processor's resizing: a fixed size, or the shortest edge with the aspect kept."""
    size = image_processor.size
    if not getattr(image_processor, "do_resize", True):
        return width, height
    if (edge := size.get("shortest_edge")) is None:
        return size["width"], size["height"]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _crop_axis(start: float, end: float, resized: int, crop: int) -> tuple[float, float]:
    """Undo a centre crop along one axis. A side shorter than the crop is zero-padded by transformers."""
    first = (resized - crop) // 2 if resized >= crop else -math.ceil((crop - resized) / 2)
    pixel = (end - start) / resized  # original pixels in one resized pixel
    return start + first * pixel, start + (first + crop) * pixel


def patches_of(vision_config: Any) -> tuple[int, float]:
    """Patches along a side of the vision tower's square input, and the share of that side that they cover."""
    side, patch = first_of(vision_config.image_size), first_of(vision_config.patch_size)
    return side // patch, side // patch * patch / side


def seen_view(image: ProcessedImage, index: NDArray[np.intp], box: Box | None = None) -> View:
    """The image in one piece, less the strip at the right and bottom of `box` that no whole patch covers."""
    return whole_view(
        image, index, _seen_box(image.config.vision_config, index, box or whole_box(image.image_size))
    )


def _seen_box(vision: Any, index: NDArray[np.intp], box: Box) -> Box:
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        return box
    patches, covered = patches_of(vision)
    if covered == 1 or patches != index.shape[0]:
        return box
    return box[0], box[1], box[0] + covered * (box[2] - box[0]), box[1] + covered * (box[3] - box[1])


def first_of(value: Any) -> Any:
    """Configurations write a square's side as a number or as `[h, w]`."""
    return value[0] if isinstance(value, list | tuple) and value else value


def read_maps(
    row: NDArray[np.float32], views: Sequence[View], image_size: Size, choice: ViewChoice = "combined"
) -> tuple[NDArray[np.float32], Box]:
    """Maps `[..., h, w]` of equal cells, and the region that they cover in pixels of the original image.

    A single view of equal cells is taken as it is, padding included; anything else is gathered on the image.

    Args:
        row: attention over the keys, `[..., key]`.
        choice: `combined`, or the name of one view.
    """
    views = choose(views, choice)
    if len(views) == 1 and views[0].is_uniform:
        return np.take(row, views[0].index, axis=-1).astype(np.float32, copy=False), views[0].box
    box = whole_box(image_size)
    h, w = common_grid(views, image_size)
    x_edges, y_edges = np.linspace(box[0], box[2], w + 1), np.linspace(box[1], box[3], h + 1)
    maps = np.zeros((*row.shape[:-1], h, w))
    for view in views:
        seen = np.take(row, view.index, axis=-1)  # six times as fast as indexing
        maps += shares(view.y_edges, y_edges) @ seen @ shares(view.x_edges, x_edges).T
    return maps.astype(np.float32), box


def choose(views: Sequence[View], choice: ViewChoice) -> Sequence[View]:
    """The views of that name. An image too small for tiles has only the whole, which then stands for both."""
    named = [view for view in views if view.name == choice]
    return named if choice != "combined" and named else views


def common_grid(views: Sequence[View], image_size: Size) -> Size:
    """`(h, w)` of equal cells over the image that are about as fine as the finest view's."""
    cell_w = min(float(np.median(np.diff(view.x_edges))) for view in views)
    cell_h = min(float(np.median(np.diff(view.y_edges))) for view in views)
    return max(1, round(image_size[1] / cell_h)), max(1, round(image_size[0] / cell_w))


def shares(source: Edges, target: Edges) -> NDArray[np.float64]:
    """`[target cell, source cell]`: the share of each source interval that lies in each target interval.

    >>> shares(np.array([-1.0, 1.0, 2.0]), np.array([0.0, 1.5, 3.0])).tolist()
    [[0.5, 0.5], [0.0, 0.5]]
    """
    return np.asarray(interval_overlaps(target, source) / np.diff(source))
