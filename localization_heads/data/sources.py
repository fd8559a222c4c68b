"""What a prompt shows, as code holds it: arrays, tensors, bytes, open files, `data:` and `file:` addresses; or several
images together (`Together`).
"""

from __future__ import annotations

import binascii
import math
import os
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.data.address import Address, ImageError, image_source
from localization_heads.data.images import MAX_PIXELS, ImageSource, decode_image, image_size, load_image
from localization_heads.data.network import MAX_BYTES
from localization_heads.errors import ArgumentError, shown

if TYPE_CHECKING:
    from torch import Tensor

    AnyImage = ImageSource | os.PathLike[str] | bytes | BinaryIO | NDArray[np.uint8] | Tensor

MOST = 32
"""Images in one prompt."""
MOST_PIXELS = 4 * MAX_PIXELS
"""Of all images of one prompt, which are decoded together."""


@dataclass(frozen=True, eq=False)
class Together:
    """Several images that one prompt shows the model, in this order; a list of images means one prompt for each.

    Args:
        images: two or more, at most `MOST`, each named as one alone would be (`as_source`).

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


class LoadedImages(Together):
    """The same, decoded."""

    images: tuple[Image.Image, ...]


PromptImages = Image.Image | LoadedImages
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


def load_prompt_images(source: ImageSource | Together) -> PromptImages:
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
    return LoadedImages(images)


def map_images(shown: PromptImages, change: Callable[[Image.Image], Image.Image]) -> PromptImages:
    """What is shown with every image changed."""
    changed = [change(one) for one in images_of(shown)]
    return LoadedImages(changed) if isinstance(shown, Together) else changed[0]


def images_of(shown: PromptImages | Together) -> tuple[Image.Image, ...]:
    """Every image of a prompt. ArgumentError for one that is not decoded."""
    images = shown.images if isinstance(shown, Together) else (shown,)
    decoded = tuple(one for one in images if isinstance(one, Image.Image))
    if len(decoded) < len(images):
        raise ArgumentError(
            "image: a model takes PIL images; ground and ground_all take paths and addresses as well"
        )
    return decoded


def image_at(shown: PromptImages | Together, index: int | None) -> Image.Image:
    """The image at that place, counted from 0; None takes the only one, and is an ArgumentError for several."""
    images = images_of(shown)
    if index is None and len(images) > 1:
        raise ArgumentError(f"image: this is asked about one image, and {len(images)} are shown together")
    return images[index or 0]


def num_images(source: ImageSource | Together) -> int:
    """How many images a prompt shows."""
    return len(source) if isinstance(source, Together) else 1


def num_pixels(source: Together) -> int:
    """How many pixels the images have together, from their headers."""
    return sum(math.prod(image_size(one)) for one in source)


KINDS = (
    "a path, an address, a PIL image, an array [H, W, 3] of uint8, a tensor [3, H, W], bytes or an open file"
)


def as_sources(image: Any) -> ImageSource | Together:
    """`as_source`, of one image or of each of those that one prompt shows together."""
    return Together([as_source(one) for one in image]) if isinstance(image, Together) else as_source(image)


def as_source(image: AnyImage) -> ImageSource:
    """An image that `load_image` reads: paths, addresses and PIL images as they are, anything else decoded.

    Args:
        image: also an array `[H, W]` or `[H, W, 1 | 3 | 4]` of uint8; a tensor `[1 | 3 | 4, H, W]` of uint8, or floats
            from 0 to 1; the bytes of an image file, or such a file opened in binary mode (at most 32 MB); the text
            of a `file:` or `data:` address.

    Raises:
        ImageError: anything else.

    >>> as_source(np.zeros((2, 3, 3), dtype=np.uint8)).size
    (3, 2)
    """
    value: Any = image
    if isinstance(value, Image.Image | Path | Address):
        return value
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, os.PathLike):
        return Path(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image("the bytes", bytes(value))[1]
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if hasattr(value, "is_floating_point"):
        return _of_array(_channels_last(value))
    if hasattr(value, "read"):
        return _of_file(value)
    raise ImageError("image", f"{shown(type(value).__name__)} is none: give {KINDS}")


def _of_text(text: str) -> ImageSource:
    scheme = text[:5].lower()
    if scheme == "data:":
        return decode_image("the data: address", _data(text))[1]
    if scheme != "file:":
        return image_source(text)
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ImageError(text, f"not a file: address ({error})") from None
    if parts.netloc not in ("", "localhost"):
        raise ImageError(text, "a file: address of another machine: write file:///path")
    return Path(url2pathname(parts.path))


def _data(text: str) -> bytes:
    """The bytes in a `data:` address (RFC 2397)."""
    head, comma, rest = text.partition(",")
    if not comma:
        raise ImageError("the data: address", "it has no comma before its data")
    if len(rest) > 2 * MAX_BYTES:
        raise ImageError("the data: address", f"larger than the limit of {MAX_BYTES >> 20} MB")
    content = unquote_to_bytes(rest)
    if not head.lower().endswith(";base64"):
        return content
    try:
        return b64decode(content, validate=True)
    except binascii.Error as error:
        raise ImageError("the data: address", f"not base64 ({error})") from None


def _of_file(file: Any) -> Image.Image:
    name = str(getattr(file, "name", "the file"))
    content = file.read(MAX_BYTES + 1)
    if isinstance(content, str):
        raise ImageError(name, "opened as text: open it in binary mode, open(path, 'rb')")
    return decode_image(name, content)[1]


def _channels_last(tensor: Any) -> NDArray[Any]:
    """A tensor `[C, H, W]`, or `[H, W]`, as an array `[H, W, C]`; floats from 0 to 1 become bytes."""
    values: NDArray[Any] = (
        tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
    )
    if values.ndim == 3 and values.shape[0] not in (1, 3, 4):
        raise ImageError("the tensor", f"of shape {list(values.shape)}: an image is [3, H, W]")
    if values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.dtype.kind != "f":
        return values
    if not (values.size and values.min() >= 0 and values.max() <= 1):
        raise ImageError("the tensor", "floats must lie between 0 and 1 (before a model's normalisation)")
    return np.round(255 * values).astype(np.uint8)


def _of_array(values: NDArray[Any]) -> Image.Image:
    if values.ndim == 4:
        raise ImageError("the array", f"of shape {list(values.shape)}: give a list of images, one array each")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ImageError("the array", f"of shape {list(values.shape)}: an image is [H, W, 3]")
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4):
        hint = "; its channels come first: array.transpose(1, 2, 0)" if values.shape[0] in (1, 3, 4) else ""
        raise ImageError("the array", f"of shape {list(values.shape)}: an image is [H, W, 3]{hint}")
    if values.dtype != np.uint8:
        raise ImageError(
            "the array",
            f"of {values.dtype}: an image has uint8 from 0 to 255 (convert with .astype('uint8'))",
        )
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2:] == (1,) else values))
