"""Images in the forms that Python code holds them (arrays, tensors, bytes, open files, `data:` and `file:` addresses),
and prompts with several images (`Together`).
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

MAX_IMAGES = 32
"""Images in one prompt."""
MAX_TOTAL_PIXELS = 4 * MAX_PIXELS
"""Of all images in one prompt, which are in memory together."""
ACCEPTED_KINDS = (
    "a path, an address, a PIL image, an array [H, W, 3] of uint8, a tensor [3, H, W], bytes or an open file"
)


@dataclass(frozen=True, eq=False)
class Together:
    """Several images for one prompt, in this order. (A plain list of images means one prompt for each.)

    Args:
        images: 2 to `MAX_IMAGES` images, each in any form that `as_source` accepts.

    Raises:
        ImageError: not a list, or of another length.
    """

    images: Sequence[ImageSource]

    def __post_init__(self) -> None:
        if not isinstance(self.images, list | tuple):
            raise ImageError("images of one prompt", "give a list of two or more")
        object.__setattr__(self, "images", tuple(self.images))
        if not 2 <= len(self.images) <= MAX_IMAGES:
            raise ImageError("images of one prompt", f"{len(self.images)} given, but it must be 2 to {MAX_IMAGES}")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageSource]:
        return iter(self.images)

    def __str__(self) -> str:
        return " + ".join(source_name(image) for image in self.images)


class LoadedImages(Together):
    """`Together`, with every image decoded."""

    images: tuple[Image.Image, ...]


PromptImages = Image.Image | LoadedImages
"""The decoded image, or images, of one prompt."""


def source_name(source: ImageSource) -> str:
    """The path, or the address without secrets; "" for an image in memory."""
    return "" if isinstance(source, Image.Image) else str(source)


def source_key(source: ImageSource | Together) -> str:
    """The paths and full addresses of a prompt's images, to compare and never to store; "" if any is in memory."""
    if isinstance(source, Together):
        keys = [source_key(image) for image in source]
        return "\0".join(keys) if all(keys) else ""
    return source.url if isinstance(source, Address) else source_name(source)


def load_prompt_images(source: ImageSource | Together) -> PromptImages:
    """`load_image`, for one image or several. Also raises ImageError if several exceed `MAX_TOTAL_PIXELS`."""
    if not isinstance(source, Together):
        return load_image(source)
    images: list[Image.Image] = []
    pixels = 0
    for image in source:
        images.append(load_image(image))
        pixels += images[-1].width * images[-1].height
        if pixels > MAX_TOTAL_PIXELS:
            limit = f"the limit of {MAX_TOTAL_PIXELS / 1e6:.4g} MP for the images of one prompt"
            raise ImageError(source_name(image) or "images of one prompt", f"with those before it, over {limit}")
    return LoadedImages(images)


def map_images(images: PromptImages, transform: Callable[[Image.Image], Image.Image]) -> PromptImages:
    """Apply `transform` to every image."""
    transformed = [transform(image) for image in images_of(images)]
    return LoadedImages(transformed) if isinstance(images, Together) else transformed[0]


def images_of(images: PromptImages | Together) -> tuple[Image.Image, ...]:
    """The images of a prompt as a tuple. ArgumentError if one of them is not decoded."""
    listed = images.images if isinstance(images, Together) else (images,)
    decoded = tuple(image for image in listed if isinstance(image, Image.Image))
    if len(decoded) < len(listed):
        raise ArgumentError("image: a model takes PIL images; ground and ground_all take paths and addresses as well")
    return decoded


def image_at(images: PromptImages | Together, index: int | None) -> Image.Image:
    """The image at `index`, from 0. None stands for the only image, and is an ArgumentError if there are several."""
    decoded = images_of(images)
    if index is None and len(decoded) > 1:
        raise ArgumentError(f"image: this takes a single image, and the prompt has {len(decoded)}")
    return decoded[index or 0]


def num_images(source: ImageSource | Together) -> int:
    """The number of images in a prompt."""
    return len(source) if isinstance(source, Together) else 1


def num_pixels(source: Together) -> int:
    """The total number of pixels, from the images' headers."""
    return sum(math.prod(image_size(image)) for image in source)


def as_sources(image: Any) -> ImageSource | Together:
    """`as_source`, applied to one image or to each image of a `Together`."""
    return Together([as_source(one) for one in image]) if isinstance(image, Together) else as_source(image)


def as_source(image: AnyImage) -> ImageSource:
    """Convert to something `load_image` accepts: paths, addresses and PIL images are kept, anything else is decoded.

    Args:
        image: also an array `[H, W]` or `[H, W, 1 | 3 | 4]` of uint8; a tensor `[1 | 3 | 4, H, W]` of uint8, or floats
            from 0 to 1; the bytes of an image file, or such a file opened in binary mode (at most 32 MB); the text
            of a `file:` or `data:` address.

    Raises:
        ImageError: `image` is something else, or is invalid.

    >>> as_source(np.zeros((2, 3, 3), dtype=np.uint8)).size
    (3, 2)
    """
    value: Any = image
    if isinstance(value, Image.Image | Path | Address):
        return value
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, os.PathLike):
        return Path(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image("the bytes", bytes(value))[1]
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if hasattr(value, "is_floating_point"):
        return _from_array(_channels_last(value))
    if hasattr(value, "read"):
        return _from_file(value)
    raise ImageError("image", f"{shown(type(value).__name__)} is not an image: give {ACCEPTED_KINDS}")


def _from_text(text: str) -> ImageSource:
    scheme = text[:5].lower()
    if scheme == "data:":
        return decode_image("the data: address", _decode_data_url(text))[1]
    if scheme != "file:":
        return image_source(text)
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ImageError(text, f"not a file: address ({error})") from None
    if parts.netloc not in ("", "localhost"):
        raise ImageError(text, "a file: address on another machine: write file:///path")
    return Path(url2pathname(parts.path))


def _decode_data_url(text: str) -> bytes:
    """Decode the payload of a `data:` address (RFC 2397)."""
    header, comma, payload = text.partition(",")
    if not comma:
        raise ImageError("the data: address", "it has no comma before its data")
    if len(payload) > 2 * MAX_BYTES:
        raise ImageError("the data: address", f"larger than the limit of {MAX_BYTES >> 20} MB")
    content = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return b64decode(content, validate=True)
    except binascii.Error as error:
        raise ImageError("the data: address", f"not base64 ({error})") from None


def _from_file(file: Any) -> Image.Image:
    name = str(getattr(file, "name", "the file"))
    content = file.read(MAX_BYTES + 1)
    if isinstance(content, str):
        raise ImageError(name, "opened as text: open it in binary mode, open(path, 'rb')")
    return decode_image(name, content)[1]


def _channels_last(tensor: Any) -> NDArray[Any]:
    """A tensor `[C, H, W]` or `[H, W]` as an array `[H, W, C]` or `[H, W]`; floats from 0 to 1 become uint8."""
    values: NDArray[Any] = tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
    if values.ndim == 3 and values.shape[0] not in (1, 3, 4):
        raise ImageError("the tensor", f"of shape {list(values.shape)}: an image is [3, H, W]")
    if values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.dtype.kind != "f":
        return values
    if not (values.size and values.min() >= 0 and values.max() <= 1):
        raise ImageError("the tensor", "floats must lie between 0 and 1 (before a model's normalisation)")
    return np.round(255 * values).astype(np.uint8)


def _from_array(values: NDArray[Any]) -> Image.Image:
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
