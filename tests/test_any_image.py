"""Images from arrays, tensors, bytes and files: all give the same pixels; anything else is a one-line error."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localization_heads.data.address import Address, ImageError
from localization_heads.data.images import load_image
from localization_heads.data.sources import as_source

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def opened(name: str) -> BytesIO:
    file = BytesIO(png())
    file.name = name
    return file


TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)
SAME = {
    "array": PIXELS,
    "array in Fortran order": np.asfortranarray(PIXELS),
    "array with alpha": np.dstack([PIXELS, np.full((5, 7), 255, np.uint8)]),
    "tensor": TENSOR,
    "tensor of floats": (TENSOR / 255).requires_grad_(),
    "tensor in half precision": (TENSOR / 255).half(),
    "PIL": Image.fromarray(PIXELS),
    "bytes": png(),
    "bytearray": bytearray(png()),
    "memoryview": memoryview(png()),
    "file": opened("cat.png"),
    "data address": "data:image/png;base64," + b64encode(png()).decode(),
    "data address, escaped": "data:image/png;base64," + b64encode(png()).decode().replace("=", "%3D"),
    "data address, not base64": "data:," + "".join(f"%{byte:02x}" for byte in png()),
}


@pytest.mark.parametrize("name", SAME)
def test_all_forms_give_the_same_pixels(name: str) -> None:
    assert np.array_equal(load_image(as_source(SAME[name])), PIXELS)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_images_of_every_shape(shape: tuple[int, ...]) -> None:
    grey = np.arange(35, dtype=np.uint8).reshape(shape)
    for image in (grey, torch.from_numpy(grey.reshape(1, 5, 7))):
        assert np.array_equal(np.array(load_image(as_source(image)))[..., 2], grey.reshape(5, 7))


def test_paths_and_addresses_are_not_read_at_once(tmp_path: Path) -> None:
    """A `file:` address becomes a path, with its escapes decoded."""
    file = tmp_path / "a cat.png"
    assert as_source(file) == file
    assert as_source(str(file)) == str(file)
    assert as_source(file.as_uri()) == file
    assert as_source(f"file://localhost{tmp_path}/a%20cat.png") == file
    assert as_source("https://example.org/cat.png") == Address("https://example.org/cat.png")
    with file.open("wb") as written:
        written.write(png())
    with file.open("rb") as read:
        assert np.array_equal(as_source(read), PIXELS)


REFUSED = {
    "an array of floats": (PIXELS / 255, "of float64: an image has uint8"),
    "channels first": (PIXELS.transpose(2, 0, 1), r"channels come first: array.transpose\(1, 2, 0\)"),
    "a batch": (PIXELS[None], "give a list of images"),
    "two channels": (PIXELS[..., :2], r"\[5, 7, 2\]: an image is \[H, W, 3\]"),
    "an empty array": (PIXELS[:0], r"\[0, 7, 3\]: an image is"),
    "a normalised tensor": (TENSOR / 255 - 0.5, "floats must lie between 0 and 1"),
    "a tensor of NaN": (TENSOR * torch.nan, "floats must lie between 0 and 1"),
    "channels last": (torch.from_numpy(PIXELS), r"of shape \[5, 7, 3\]: an image is \[3, H, W\]"),
    "bytes of no image": (b"no image", "the bytes: "),
    "no bytes": (b"", "the bytes: the file is empty"),
    "text": (StringIO("x"), "open it in binary mode"),
    "a broken file": (BytesIO(png()[:40]), "the file: "),
    "data without a comma": ("data:image/png", "no comma"),
    "data that is no base64": ("data:image/png;base64,####", "not base64"),
    "another machine's file": ("file://server/cat.png", "another machine"),
    "a number": (3, "'int' is not an image: give a path"),
    "nothing": (None, "'NoneType' is not an image"),
    "a list": ([PIXELS], "'list' is not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_a_one_line_error(name: str) -> None:
    value, said = REFUSED[name]
    with pytest.raises(ImageError, match=said) as caught:
        as_source(value)
    assert "\n" not in str(caught.value)


def test_too_many_bytes_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    from localization_heads.data import images, sources

    for module in (sources, images):
        monkeypatch.setattr(module, "MAX_BYTES", 100)
    for value in (b"x" * 101, BytesIO(b"x" * 500), "data:," + "x" * 201):
        with pytest.raises(ImageError, match="larger than the limit"):
            as_source(value)
