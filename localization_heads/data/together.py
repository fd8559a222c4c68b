"""`Together`: several images that one prompt shows the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from localization_heads.data.address import Address, ImageError, is_address
from localization_heads.data.images import ImageSource, image_size, load_image

MOST = 32
"""Images in one prompt."""


@dataclass(frozen=True, eq=False)
class Together:
    """Several images that one prompt shows the model, in this order; a list of images means one prompt for each.

    Args:
        images: two or more, at most `MOST`, each named as one alone would be (`data.any_image`).

    Raises:
        ImageError: another number of them.
    """

    images: Sequence[ImageSource]

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        if not 2 <= len(self.images) <= MOST:
            raise ImageError("images together", f"{len(self.images)} of them: give 2 to {MOST}")

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
    """`load_image`, of one or of several."""
    return Opened([load_image(one) for one in source]) if isinstance(source, Together) else load_image(source)


def mapped(shown: Shown, change: Callable[[Image.Image], Image.Image]) -> Shown:
    """The same with every image changed."""
    return Opened([change(one) for one in shown.images]) if isinstance(shown, Opened) else change(shown)


def each_image(shown: Shown) -> tuple[Image.Image, ...]:
    """Every image of a prompt."""
    return shown.images if isinstance(shown, Opened) else (shown,)


def image_at(shown: Shown, index: int | None) -> Image.Image:
    """The image at that place, counted from 0; the only one, where there are not several."""
    return each_image(shown)[index or 0]


def num_images(source: ImageSource | Together) -> int:
    """That a prompt shows."""
    return len(source) if isinstance(source, Together) else 1


def num_pixels(source: ImageSource | Together) -> int:
    """Of all images, from their headers; an address, which is not fetched for this, counts as none."""
    images = source.images if isinstance(source, Together) else (source,)
    sizes = [image_size(one) for one in images if not is_address(one)]
    return sum(width * height for width, height in sizes)
