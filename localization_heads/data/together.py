"""`Together`: several images that one prompt shows the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from localization_heads.data.address import Address, ImageError
from localization_heads.data.images import MAX_PIXELS, ImageSource, image_size, load_image
from localization_heads.errors import ArgumentError

MOST = 32
"""Images in one prompt."""
MOST_PIXELS = 4 * MAX_PIXELS
"""Of all images of one prompt, which are decoded together."""


@dataclass(frozen=True, eq=False)
class Together:
    """Several images that one prompt shows the model, in this order; a list of images means one prompt for each.

    Args:
        images: two or more, at most `MOST`, each named as one alone would be (`data.any_image`).

    Raises:
        ImageError: another number of them, or no list.
    """

    images: Sequence[ImageSource]

    def __post_init__(self) -> None:
        if not isinstance(self.images, list | tuple):
            raise ImageError("images of one prompt", "give a list of two or more")
        object.__setattr__(self, "images", tuple(self.images))
        if not 2 <= len(self.images) <= MOST:
            number = len(self.images)
            raise ImageError("images of one prompt", f"{number} given, which must be 2 to {MOST}")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageSource]:
        return iter(self.images)

    def __str__(self) -> str:
        return " + ".join(name_of(one) for one in self.images)


class Opened(Together):
    """The same, decoded."""

    images: tuple[Image.Image, ...]


Shown = Image.Image | Opened
"""What one prompt shows the model, decoded."""


def name_of(source: ImageSource) -> str:
    """Its path, or its address without possible secrets; "" for an image in memory."""
    return "" if isinstance(source, Image.Image) else str(source)


def key_of(source: ImageSource | Together) -> str:
    """The identity of what a prompt shows, with whole addresses: never to be stored; "" if one is in memory."""
    if isinstance(source, Together):
        keys = [key_of(one) for one in source]
        return "\0".join(keys) if all(keys) else ""
    return source.url if isinstance(source, Address) else name_of(source)


def load_shown(source: ImageSource | Together) -> Shown:
    """`load_image`, of one or of several. ImageError as well for more than `MOST_PIXELS` of several."""
    if not isinstance(source, Together):
        return load_image(source)
    images: list[Image.Image] = []
    pixels = 0
    for one in source:
        images.append(load_image(one))
        pixels += images[-1].width * images[-1].height
        if pixels > MOST_PIXELS:
            limit = f"the limit of {MOST_PIXELS / 1e6:.4g} MP for the images of one prompt"
            raise ImageError(name_of(one) or "images of one prompt", f"with those before it, over {limit}")
    return Opened(images)


def mapped(shown: Shown, change: Callable[[Image.Image], Image.Image]) -> Shown:
    """What is shown with every image changed."""
    changed = [change(one) for one in each_image(shown)]
    return Opened(changed) if isinstance(shown, Together) else changed[0]


def each_image(shown: Shown | Together) -> tuple[Image.Image, ...]:
    """Every image of a prompt. ArgumentError for one that is not decoded."""
    images = shown.images if isinstance(shown, Together) else (shown,)
    decoded = tuple(one for one in images if isinstance(one, Image.Image))
    if len(decoded) < len(images):
        raise ArgumentError(
            "image: a model takes PIL images; ground and ground_all take paths and addresses as well"
        )
    return decoded


def image_at(shown: Shown | Together, index: int | None) -> Image.Image:
    """The image at that place, counted from 0; None takes the only one, and is an ArgumentError for several."""
    images = each_image(shown)
    if index is None and len(images) > 1:
        raise ArgumentError(f"image: this is asked about one image, and {len(images)} are shown together")
    return images[index or 0]


def num_images(source: ImageSource | Together) -> int:
    """How many images a prompt shows."""
    return len(source) if isinstance(source, Together) else 1


def num_pixels(source: Together) -> int:
    """How many pixels the images have together, from their headers."""
    return sum(math.prod(image_size(one)) for one in source)
