"""Load untrusted images as upright RGB (`load_image`). Format, size and decoding cost are checked before decoding.

Only the formats in `FORMATS` are opened. Decoders' own warnings are silenced: an image either loads or is rejected
with a one-line `ImageError`.
"""

from __future__ import annotations

import ctypes
import glob
import math
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import SEEK_END, BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, _imaging

from localization_heads.data.address import Address, ImageError, is_address
from localization_heads.data.image_headers import orientation, scan_problem, tag_problem, upright_size
from localization_heads.data.network import MAX_BYTES, download
from localization_heads.errors import UsageError, first_line
from localization_heads.store import files
from localization_heads.store.paths import local_path

MAX_PIXELS = 64_000_000
MAX_SLOW_PIXELS = 4_000_000
"""For formats whose decoder is written in Python, which is slow."""
MAX_SLOW_BYTES = 64 << 20
"""For the same formats."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
MAX_FILES = 100_000
"""In a folder that is given in place of an image."""

ImageSource = Image.Image | str | Path | Address
"""An image, its path, or its http(s) address."""
MAX_MODEL_PIXELS = 24_000_000
"""No model uses more than 16,777,216 pixels, and processors need five times the memory of their input."""
STRIP_PIXELS = 1_000_000
"""Pixels that are converted at a time, to bound memory."""

_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by EXIF orientation."""


def load_image(source: ImageSource, *, base: str | Path | None = None) -> Image.Image:
    """The image, upright, as a PIL image in mode RGB, fully decoded.

    Args:
        source: a path (`~` is the home folder), an http(s) address, or an image, which is converted and has the same
            pixel limit. To reach a private network, pass an `Address` with `allow_private=True`.
        base: folder in which to look for a relative path that is not in the working directory.

    Raises ImageError; for an address also DownloadError (a WorkError) when the network fails.
    """
    if isinstance(source, Image.Image):
        _check_pixels("image", source.size)
        with quiet_decoders():
            return _decode_upright("image", source)
    if is_address(source):
        address = source if isinstance(source, Address) else Address(str(source))
        with _open_checked(address, BytesIO(download(address)), FORMATS) as image:
            return _decode_upright(address, image)
    path = find_file(source, base)  # type: ignore[arg-type]
    with open_raster(path) as image:
        return _decode_upright(path, image)


def downscale_for_model(image: Image.Image) -> Image.Image:
    """Reduce an image of more than `MAX_MODEL_PIXELS` pixels by an integer factor; leave others as they are."""
    width, height = image.size
    factor = math.ceil(math.sqrt(width * height / MAX_MODEL_PIXELS))
    return image.reduce(factor) if factor > 1 else image


def image_size(source: ImageSource) -> tuple[int, int]:
    """`(W, H)` of the image that `load_image` returns, from the header if it is a file. Raises as `load_image` does."""
    if isinstance(source, Image.Image) or is_address(source):
        return load_image(source).size
    with open_raster(find_file(source)) as image:  # type: ignore[arg-type]
        return upright_size(image)


def probe_image(source: str | Path, max_pixels: int) -> tuple[tuple[int, int], Image.Image | None]:
    """`image_size` and, for an image of at most `max_pixels`, `load_image`, opening the file only once.

    The image is None if it is larger or cannot be decoded; `load_image` then raises the reason.
    """
    path = find_file(source)
    with open_raster(path) as image:
        size = upright_size(image)
        with suppress(UsageError):
            return size, _decode_upright(path, image) if size[0] * size[1] <= max_pixels else None
        return size, None


def decode_image(name: str, content: bytes) -> tuple[str, Image.Image]:
    """The format (one of `FORMATS`) and the image, as `load_image` returns it, of a file's bytes.

    Raises ImageError, naming `name`.
    """
    if len(content) > MAX_BYTES:
        raise ImageError(name, f"larger than the limit of {MAX_BYTES >> 20} MB")
    with _open_checked(name, BytesIO(content), FORMATS) as image:
        return str(image.format), _decode_upright(name, image)


def find_file(source: str | Path, base: str | Path | None = None) -> Path:
    """Resolve a path against the working directory, then against `base`; `~` is the home folder.

    Raises ImageError if neither is a file.
    """
    path = local_path(source)
    candidates = [path] if base is None or path.is_absolute() else [path, Path(base) / path]
    for candidate in candidates:
        reason = _why_unreadable(candidate)
        if reason is None:
            return candidate
        if reason != "no such file":
            raise ImageError(candidate, reason)
    suffix = f" (nor in {base})" if len(candidates) > 1 else ""
    raise ImageError(source, "no such file" + suffix)


def list_image_files(pattern: str) -> list[Path] | None:
    """The image files in a folder, or that match a glob such as `pics/*.jpg`, sorted; None for a file or an address.

    In a folder, files without an image extension are skipped; a glob is taken literally.

    Raises ImageError if there are none, or more than `MAX_FILES`.
    """
    path = local_path(pattern)
    if is_address(pattern):
        return None
    if path.is_dir():
        paths = (file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
    elif not path.exists() and glob.has_magic(str(path)):
        paths = (Path(file) for file in glob.iglob(str(path), recursive=True))  # noqa: PTH207  (absolute ones too)
    else:
        return None
    files = sorted(islice((file for file in paths if file.is_file()), MAX_FILES + 1))
    if not files:
        raise ImageError(pattern, "no image file there")
    if len(files) > MAX_FILES:
        raise ImageError(pattern, f"more than {MAX_FILES:,} files; write a data file")
    return files


def _why_unreadable(path: Path) -> str | None:
    """Why `path` cannot be read as a file, or None. Pipes and devices are rejected: they may block or never end."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a NUL in the name
        return "not the name of a file"
    if stat.S_ISDIR(mode):
        return "is a folder, not an image"
    return None if stat.S_ISREG(mode) else "not a plain file"


@contextmanager
def open_raster(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file without decoding it, after all checks. ImageError if it is in none of `formats`."""
    reason = _why_unreadable(path)
    if reason is not None:
        raise ImageError(path, reason)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    with file, _open_checked(path, file, formats) as image:
        yield image


@contextmanager
def _open_checked(name: str | Path | Address, file: BinaryIO, formats: Sequence[str]) -> Iterator[Image.Image]:
    try:
        _check_file_start(name, file)
        with quiet_decoders():
            image = _open_header(name, file, formats)
            _check_pixels(name, image.size)
            _check_decoding_cost(name, file, image)
            yield image
    except (UsageError, KeyboardInterrupt):
        raise
    except MemoryError as error:
        raise ImageError(name, "not enough memory to decode it") from error
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({first_line(error, 100)})") from error


def _check_file_start(name: str | Path | Address, file: BinaryIO) -> None:
    beginning = file.read(64)
    if not beginning:
        raise ImageError(name, "the file is empty")
    if files.is_lfs_pointer(beginning):
        raise ImageError(name, files.LFS_POINTER_MESSAGE)
    if problem := tag_problem(file):
        raise ImageError(name, f"broken ({problem})")


def _open_header(name: str | Path | Address, file: BinaryIO, formats: Sequence[str]) -> Image.Image:
    try:
        return Image.open(file, formats=list(formats))
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not an image in a known format ({', '.join(formats)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _check_pixels(name, _declared_size(file, formats))
        raise


def _declared_size(file: BinaryIO, formats: Sequence[str]) -> tuple[int, int]:
    """The size in the header of a file that `Image.open` rejects as a decompression bomb."""
    for format in formats:
        file.seek(0)
        try:
            return Image.OPEN[format][0](file, "").size
        except Exception:  # not this format
            continue
    raise ValueError("no size")


def _check_pixels(name: str | Path | Address, size: tuple[int, int], limit: int | None = None) -> None:
    width, height = size
    limit = MAX_PIXELS if limit is None else limit
    if width < 1 or height < 1:
        raise ImageError(name, "the image has no pixels")
    if width * height > limit:
        megapixels = width * height / 1e6
        raise ImageError(name, f"{width} x {height} = {megapixels:.4g} MP, over the limit of {limit / 1e6:.4g} MP")


def _check_decoding_cost(name: str | Path | Address, file: BinaryIO, image: Image.Image) -> None:
    """Reject an image that would take minutes to decode in pure Python."""
    if any(tile[0] in Image.DECODERS for tile in image.tile):  # type: ignore[attr-defined]
        _check_pixels(name, image.size, MAX_SLOW_PIXELS)
        position = file.tell()
        size = file.seek(0, SEEK_END)
        file.seek(position)
        if size > MAX_SLOW_BYTES:
            limit = f"{MAX_SLOW_BYTES >> 20} MB for a {image.format} that is decoded slowly"
            raise ImageError(name, f"larger than the limit of {limit}")


def _decode_upright(name: str | Path | Address, image: Image.Image) -> Image.Image:
    """Decode an opened image as upright RGB."""
    try:
        exif_orientation = orientation(image)
        if image.format in ("JPEG", "MPO") and (problem := _jpeg_scan_problem(image)):
            raise ImageError(name, problem)
        image.load()
        rgb = _to_rgb(image)
        if exif_orientation in _TRANSPOSE_BY_ORIENTATION:
            return rgb.transpose(_TRANSPOSE_BY_ORIENTATION[exif_orientation])
        return rgb.copy() if rgb is image else rgb  # never return the caller's own image
    except (UsageError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({first_line(error, 100)})") from error


def _jpeg_scan_problem(image: Image.Image) -> str | None:
    """`scan_problem` of a JPEG that is not decoded yet."""
    file = getattr(image, "fp", None)
    return scan_problem(file) if file is not None and image.tile else None  # type: ignore[attr-defined]


def iterate_strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield an image a few rows at a time; converting it at once may take many times its memory."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = _white_level(image)
    rgb = Image.new("RGB", image.size)
    for rows, strip in iterate_strips(image):
        rgb.paste(_strip_to_rgb(strip, white), (0, rows.start))
    return rgb


def _strip_to_rgb(image: Image.Image, white: float) -> Image.Image:
    if _exceeds_8_bits(image):
        image = Image.fromarray(_to_8_bits(np.asarray(image), white))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _exceeds_8_bits(image: Image.Image) -> bool:
    """Whether pixel values are 16- or 32-bit integers, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def _white_level(image: Image.Image) -> float:
    """The pixel value that means white: 255, or 65535 for 16-bit images.

    32-bit integers and floats have no fixed range. For these it is the smallest of 1 (floats only), 255 and 65535 that
    no pixel exceeds, or else the largest pixel.
    """
    if not _exceeds_8_bits(image):
        return 255.0
    if image.mode.startswith("I;16"):
        return 65535.0
    maximum = max(float(_nonfinite_to_zero(np.asarray(strip)).max(initial=0.0)) for _, strip in iterate_strips(image))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in ranges if maximum <= white), maximum)


def _nonfinite_to_zero(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _to_8_bits(values: np.ndarray, white: float) -> np.ndarray:
    """Scale one channel `(H, W)` from 0..white to uint8."""
    return (_nonfinite_to_zero(values).clip(0, white) * (255.0 / white) + 0.5).astype(np.uint8)


_filter_lock = threading.Lock()
_active_filter: list[tuple[object, int]] = []
"""At most one item: the warning filter in force, and the number of threads that use it."""


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence Pillow's warnings while the block runs, in any number of threads; libtiff's are silenced for good.

    `warnings.catch_warnings` is not thread-safe: it restores the filters that it found, so of two overlapping threads
    one would re-enable the other's warnings, or leave them off for the whole process. Instead, one filter for Pillow is
    added by the first thread and removed by the last.
    """
    _quiet_libtiff()
    with _filter_lock:
        if not _active_filter:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _active_filter.append((warnings.filters[0], 0))
        entry, users = _active_filter.pop()
        _active_filter.append((entry, users + 1))
    try:
        yield
    finally:
        with _filter_lock:
            entry, users = _active_filter.pop()
            if users > 1:
                _active_filter.append((entry, users - 1))
            else:
                with suppress(ValueError):  # other code has replaced the filters
                    warnings.filters.remove(entry)  # type: ignore[attr-defined]


@cache
def _quiet_libtiff() -> None:
    """Remove libtiff's error handlers, which print to stderr from C."""
    with suppress(OSError, AttributeError):  # this Pillow does not expose its libtiff, as on Windows
        library = ctypes.CDLL(_imaging.__file__)  # resolves symbols in the libtiff that Pillow links to
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
