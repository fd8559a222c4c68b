"""Where each image token lies in the original picture: one small function a model family.

A family function gets (config, image processor, number of image tokens, image size) and returns the `Grid` of
its tokens. Everything that the processor did to the picture, padding, resizing, cropping, is undone exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from localization_heads.attention import Box
from localization_heads.errors import UsageError


class Grid(NamedTuple):
    """Row-major grid of image tokens and the part of the picture that it covers.

    `image_box` is in pixels of the original image: beyond it where the processor padded, inside it where it
    cropped. The cells are equal in size.
    """

    height: int
    width: int
    image_box: Box


def grid_of(config: Any, image_processor: Any, num_tokens: int, image_size: tuple[int, int]) -> Grid:
    """The grid of one image's tokens.

    Args:
        image_size: `(W, H)` of the original image in pixels.

    Raises:
        UsageError: the family is unknown, or its token count is not what its geometry says.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(
            f"model type '{config.model_type}' has no verified image geometry yet (known: {known}); "
            "choose another model with model= or model.name="
        )
    return family(image_processor, num_tokens, image_size)


def square(image_processor: Any, num_tokens: int, image_size: tuple[int, int]) -> Grid:
    """LLaVA-1.5 and its kin: a square grid over a picture that is padded to a square, cropped, or squeezed."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UsageError(
            f"{num_tokens} image tokens do not make a square grid: the processor does not fit the model"
        )
    box = padded_box(image_size) if getattr(image_processor, "do_pad", False) else whole_box(image_size)
    return Grid(side, side, cropped_box(image_processor, box))


def whole_box(image_size: tuple[int, int]) -> Box:
    """The picture itself."""
    return 0.0, 0.0, float(image_size[0]), float(image_size[1])


def padded_box(image_size: tuple[int, int]) -> Box:
    """The square that LLaVA pads a picture to: the original lies in its middle, rounded down to a pixel."""
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


def resized_size(image_processor: Any, width: int, height: int) -> tuple[int, int]:
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


FAMILIES: dict[str, Callable[[Any, int, tuple[int, int]], Grid]] = {
    "llava": square,
    "vipllava": square,
}
