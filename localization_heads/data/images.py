"""Pictures from anywhere, as RGB: `load_image`.

Notable choices: the camera's orientation (EXIF) is applied; transparent parts are laid on white; 16-bit
pictures are scaled to 8 bits; of an animation the first frame is taken. The number of pixels is checked in
the header, before anything is decoded, and only raster formats that cannot run anything are opened.
"""

from __future__ import annotations

import math
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from localization_heads.data.download import MAX_BYTES, download, shown_address
from localization_heads.data.image_error import ImageError, is_address
from localization_heads.errors import UsageError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LARGEST_SEEN = 24_000_000
"""Pixels: no model looks at more than 16,777,216, and processors take five times the memory of what they are given."""
STRIP = 1_000_000
"""Pixels that are converted to RGB at a time."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def load_image(source: Image.Image | str | Path, *, base: str | Path | None = None) -> Image.Image:
    """The picture as a PIL image of mode RGB, whole in memory.

    Args:
        source: a path, an http(s) address, or an image (converted, and under the same pixel limit).
        base: a folder in which a relative path is tried when the working directory does not have it.

    Raises ImageError; for an address also DownloadError (a WorkError) when the network fails.
    """
    if isinstance(source, Image.Image):
        _check_pixels("image", source.size)
        return _decoded("image", source)
    if is_address(source):
        address = str(source)
        with _opened(shown_address(address), BytesIO(download(address)), FORMATS) as image:
            return _decoded(shown_address(address), image)
    path = find_file(source, base)
    with open_raster(path) as image:
        return _decoded(path, image)


def as_seen(image: Image.Image) -> Image.Image:
    """The picture that a model is given: one of more than `LARGEST_SEEN` pixels is halved (or divided by 3, 4, ...)."""
    width, height = image.size
    factor = math.ceil(math.sqrt(width * height / LARGEST_SEEN))
    return image.reduce(factor) if factor > 1 else image


def image_size(source: Image.Image | str | Path) -> tuple[int, int]:
    """`(W, H)` of the picture that `load_image` gives, from the header of a file. Raises what `load_image` does."""
    if isinstance(source, Image.Image):
        return source.size
    if is_address(source):
        return load_image(source).size
    with open_raster(find_file(source)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        return image.size[::-1] if turned else image.size


def check_image(name: str, content: bytes) -> tuple[str, tuple[int, int]]:
    """Decode a picture in memory: its format (one of FORMATS) and its `(W, H)`. Raises ImageError, naming `name`."""
    if len(content) > MAX_BYTES:
        raise ImageError(name, f"larger than the limit of {MAX_BYTES >> 20} MB")
    with _opened(name, BytesIO(content), FORMATS) as image:
        return str(image.format), _decoded(name, image).size


def find_file(source: str | Path, base: str | Path | None = None) -> Path:
    """The path against the working directory, or else against `base`. ImageError if neither is a file."""
    path = Path(source)
    places = [path] if base is None or path.is_absolute() else [path, Path(base) / path]
    for place in places:
        reason = _unreadable(place)
        if reason is None:
            return place
        if reason != "no such file":
            raise ImageError(place, reason)
    also = f" (nor in {base})" if len(places) > 1 else ""
    raise ImageError(source, "no such file" + also)


def _unreadable(path: Path) -> str | None:
    """Why `path` cannot be opened as a file, None if it can. A pipe or a device would block or never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a NUL in the name
        return "not the name of a file"
    if stat.S_ISDIR(mode):
        return "is a folder, not a picture"
    return None if stat.S_ISREG(mode) else "not a plain file"


@contextmanager
def open_raster(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open a picture file without decoding it, its size checked. ImageError if it is none of `formats`."""
    reason = _unreadable(path)
    if reason is not None:
        raise ImageError(path, reason)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    with file, _opened(path, file, formats) as image:
        yield image


@contextmanager
def _opened(name: str | Path, file: object, formats: Sequence[str]) -> Iterator[Image.Image]:
    if not file.read(1):  # type: ignore[attr-defined]
        raise ImageError(name, "the file is empty")
    file.seek(0)  # type: ignore[attr-defined]
    try:
        image = _open_header(name, file, formats)
        _check_pixels(name, image.size)
        yield image
    except (UsageError, KeyboardInterrupt):
        raise
    except MemoryError as error:
        raise ImageError(name, "not enough memory to decode it") from error
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({_one_line(error)})") from error


def _open_header(name: str | Path, file: object, formats: Sequence[str]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limit, which names the size, is below Pillow's
            return Image.open(file, formats=formats)  # type: ignore[arg-type]
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not a picture in a known format ({', '.join(formats)})") from error
    except Image.DecompressionBombError:
        _check_pixels(name, _bomb_size(file, formats))
        raise


def _bomb_size(file: object, formats: Sequence[str]) -> tuple[int, int]:
    """The size in a header that `Image.open` refuses to show."""
    for format in formats:
        file.seek(0)  # type: ignore[attr-defined]
        try:
            return Image.OPEN[format][0](file, "").size  # type: ignore[arg-type]
        except Exception:  # not this format
            continue
    raise ValueError("no size")


def _check_pixels(name: str | Path, size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(name, "the picture has no pixels")
    if width * height > MAX_PIXELS:
        megapixels, limit = width * height / 1e6, MAX_PIXELS / 1e6
        raise ImageError(name, f"{width} x {height} = {megapixels:.4g} MP, over the limit of {limit:.4g} MP")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _decoded(name: str | Path, image: Image.Image) -> Image.Image:
    """The pixels of an opened picture, upright and RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd camera data and the like: the picture is read or refused
            image.load()
            return _to_rgb(_upright(image))
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({_one_line(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as the camera's orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a picture with broken camera data is still a picture
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Other modes are converted a strip at a time: what lies between may take many times the memory of RGB."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = _white_of(image)
    found = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        found.paste(_strip_to_rgb(strip, white), (0, top))
    return found


def _strip_to_rgb(image: Image.Image, white: float) -> Image.Image:
    if _is_wide(image):
        image = Image.fromarray(_to_bytes(np.asarray(image), white))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_wide(image: Image.Image) -> bool:
    """Whether its values do not fit into bytes."""
    return image.mode.startswith("I") or image.mode == "F"


def _white_of(image: Image.Image) -> float:
    """The value that is white in a picture of 16 bits, 32 bits or floats; 255 in the others.

    16-bit pictures run to 65535. Wider types do not say their range: it is the smallest of 1 (floats only),
    255 and 65535 that holds every value, or else the largest value.
    """
    if not _is_wide(image):
        return 255.0
    if image.mode.startswith("I;16"):
        return 65535.0
    rows = max(1, STRIP // image.width)
    strips = (
        np.asarray(image.crop((0, top, image.width, min(image.height, top + rows))))
        for top in range(0, image.height, rows)
    )
    top = max(float(_finite(strip).max(initial=0.0)) for strip in strips)
    return next(
        (limit for limit in ((1.0,) if image.mode == "F" else ()) + (255.0, 65535.0) if top <= limit), top
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _to_bytes(values: np.ndarray, white: float) -> np.ndarray:
    """One channel of wide values `(H, W)` as uint8, black to white."""
    return (_finite(values).clip(0, white) * (255.0 / white) + 0.5).astype(np.uint8)
