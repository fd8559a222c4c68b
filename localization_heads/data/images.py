"""Images from users to upright RGB: `load_image`, and its checks of format, size and cost before anything is decoded.

Only formats on an allow-list are opened. Decoders print nothing themselves: an image is either read or refused with
an `ImageError`, whose message is one line.
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
from localization_heads.errors import UsageError, one_line
from localization_heads.store import files
from localization_heads.store.paths import local_path

_lock = threading.Lock()
_entries: list[tuple[object, int]] = []
"""The filter that is in force, with the number of threads that want it."""


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence Pillow's warnings while the block runs, in any number of threads, and libtiff's from then on.

    `warnings.catch_warnings` restores the filters that it found, so with two overlapping threads one would re-enable
    the other's warnings, or leave all warnings of the process off. Instead, one filter for Pillow is added, and removed
    by the last thread.
    """
    _quiet_libtiff()
    with _lock:
        if not _entries:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _entries.append((warnings.filters[0], 0))
        entry, users = _entries.pop()
        _entries.append((entry, users + 1))
    try:
        yield
    finally:
        with _lock:
            entry, users = _entries.pop()
            if users > 1:
                _entries.append((entry, users - 1))
            else:
                with suppress(ValueError):  # somebody has put other filters in their place
                    warnings.filters.remove(entry)  # type: ignore[attr-defined]


@cache
def _quiet_libtiff() -> None:
    """libtiff writes to the standard error output itself, past Python, unless its handlers are taken away."""
    with suppress(OSError, AttributeError):  # a Pillow that hides its libtiff, as on Windows
        library = ctypes.CDLL(_imaging.__file__)  # which finds the libtiff that Pillow was linked to
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)


MAX_PIXELS = 64_000_000
MAX_SLOW_PIXELS = 4_000_000
"""Of images that are decoded in Python."""
MAX_SLOW_BYTES = 64 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
MAX_FILES = 100_000
"""Of a folder that is named in place of an image."""

ImageSource = Image.Image | str | Path | Address
"""What an image is named by: itself, a path, or an http(s) address."""
MAX_MODEL_PIXELS = 24_000_000
"""Pixels: no model uses more than 16,777,216, and processors take five times the memory of their input."""
STRIP = 1_000_000
"""Pixels that are processed at a time."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def load_image(source: ImageSource, *, base: str | Path | None = None) -> Image.Image:
    """The image, upright, as a PIL image in mode RGB, fully decoded.

    Args:
        source: a path (`~` is the home folder), an http(s) address, or an image (converted, and under the same pixel
            limit). An address that may lead into a private network is an `Address` that says so.
        base: a folder in which a relative path is tried when the working directory does not have it.

    Raises ImageError; for an address also DownloadError (a WorkError) when the network fails.
    """
    if isinstance(source, Image.Image):
        _check_pixels("image", source.size)
        with quiet_decoders():
            return _decoded("image", source)
    if is_address(source):
        address = source if isinstance(source, Address) else Address(str(source))
        with _opened(address, BytesIO(download(address)), FORMATS) as image:
            return _decoded(address, image)
    path = find_file(source, base)  # type: ignore[arg-type]
    with open_raster(path) as image:
        return _decoded(path, image)


def downscale_for_model(image: Image.Image) -> Image.Image:
    """The image as a model gets it: above `MAX_MODEL_PIXELS` pixels it is reduced by a factor of 2 (or 3, 4, ...)."""
    width, height = image.size
    factor = math.ceil(math.sqrt(width * height / MAX_MODEL_PIXELS))
    return image.reduce(factor) if factor > 1 else image


def image_size(source: ImageSource) -> tuple[int, int]:
    """`(W, H)` of the image that `load_image` would return, from a file's header. Raises as `load_image` does."""
    if isinstance(source, Image.Image) or is_address(source):
        return load_image(source).size
    with open_raster(find_file(source)) as image:  # type: ignore[arg-type]
        return upright_size(image)


def probe_image(source: str | Path, most_pixels: int) -> tuple[tuple[int, int], Image.Image | None]:
    """`image_size` and, of an image of at most so many pixels, `load_image`, from a file that is opened once.

    The image is None as well where its pixels cannot be read: `load_image` says why.
    """
    path = find_file(source)
    with open_raster(path) as image:
        size = upright_size(image)
        with suppress(UsageError):
            return size, _decoded(path, image) if size[0] * size[1] <= most_pixels else None
        return size, None


def decode_image(name: str, content: bytes) -> tuple[str, Image.Image]:
    """The image in the bytes of a file as `load_image` gives it, and its format (one of FORMATS).

    Raises ImageError, naming `name`.
    """
    if len(content) > MAX_BYTES:
        raise ImageError(name, f"larger than the limit of {MAX_BYTES >> 20} MB")
    with _opened(name, BytesIO(content), FORMATS) as image:
        return str(image.format), _decoded(name, image)


def find_file(source: str | Path, base: str | Path | None = None) -> Path:
    """The path against the working directory, or else against `base`; `~` is the home folder.

    Raises ImageError if neither is a file.
    """
    path = local_path(source)
    places = [path] if base is None or path.is_absolute() else [path, Path(base) / path]
    for place in places:
        reason = _unreadable(place)
        if reason is None:
            return place
        if reason != "no such file":
            raise ImageError(place, reason)
    also = f" (nor in {base})" if len(places) > 1 else ""
    raise ImageError(source, "no such file" + also)


def list_image_files(pattern: str) -> list[Path] | None:
    """The image files that a folder holds or a pattern such as `pics/*.jpg` means, by name; None for one file's name
    and for an address.

    What is no image by its ending is passed over in a folder; a pattern means what it says.

    Raises ImageError where there is none, or more than `MAX_FILES`.
    """
    path = local_path(pattern)
    if is_address(pattern):
        return None
    if path.is_dir():
        found = (file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    elif not path.exists() and glob.has_magic(str(path)):
        found = (Path(file) for file in glob.iglob(str(path), recursive=True))  # noqa: PTH207  (absolute ones too)
    else:
        return None
    files = sorted(islice((file for file in found if file.is_file()), MAX_FILES + 1))
    if not files:
        raise ImageError(pattern, "no image file there")
    if len(files) > MAX_FILES:
        raise ImageError(pattern, f"more than {MAX_FILES:,} files; write a data file")
    return files


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
        return "is a folder, not an image"
    return None if stat.S_ISREG(mode) else "not a plain file"


@contextmanager
def open_raster(path: Path, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file without decoding it, its size checked. ImageError if it is none of `formats`."""
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
def _opened(name: str | Path | Address, file: BinaryIO, formats: Sequence[str]) -> Iterator[Image.Image]:
    try:
        _check_beginning(name, file)
        with quiet_decoders():
            image = _open_header(name, file, formats)
            _check_pixels(name, image.size)
            _check_effort(name, file, image)
            yield image
    except (UsageError, KeyboardInterrupt):
        raise
    except MemoryError as error:
        raise ImageError(name, "not enough memory to decode it") from error
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({one_line(error)})") from error


def _check_beginning(name: str | Path | Address, file: BinaryIO) -> None:
    beginning = file.read(64)
    if not beginning:
        raise ImageError(name, "the file is empty")
    if files.is_pointer(beginning):
        raise ImageError(name, files.IS_POINTER)
    if problem := tag_problem(file):
        raise ImageError(name, f"broken ({problem})")


def _open_header(name: str | Path | Address, file: BinaryIO, formats: Sequence[str]) -> Image.Image:
    try:
        return Image.open(file, formats=list(formats))
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not an image in a known format ({', '.join(formats)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _check_pixels(name, _bomb_size(file, formats))
        raise


def _bomb_size(file: BinaryIO, formats: Sequence[str]) -> tuple[int, int]:
    """The size in a header that `Image.open` refuses to show."""
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
        raise ImageError(
            name, f"{width} x {height} = {megapixels:.4g} MP, over the limit of {limit / 1e6:.4g} MP"
        )


def _check_effort(name: str | Path | Address, file: BinaryIO, image: Image.Image) -> None:
    """What takes minutes to decode is refused, where pixels alone do not tell."""
    if any(tile[0] in Image.DECODERS for tile in image.tile):  # type: ignore[attr-defined]
        _check_pixels(name, image.size, MAX_SLOW_PIXELS)
        place = file.tell()
        size = file.seek(0, SEEK_END)
        file.seek(place)
        if size > MAX_SLOW_BYTES:
            limit = f"{MAX_SLOW_BYTES >> 20} MB for a {image.format} that is decoded slowly"
            raise ImageError(name, f"larger than the limit of {limit}")


def _decoded(name: str | Path | Address, image: Image.Image) -> Image.Image:
    """The pixels of an opened image, upright and RGB."""
    try:
        turn = orientation(image)
        if image.format in ("JPEG", "MPO") and (problem := _scan_problem(image)):
            raise ImageError(name, problem)
        image.load()
        rgb = _to_rgb(image)
        if turn in _UPRIGHT:
            return rgb.transpose(_UPRIGHT[turn])
        return rgb.copy() if rgb is image else rgb  # what is handed in stays the caller's
    except (UsageError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on garbage
        raise ImageError(name, f"broken or cut short ({one_line(error)})") from error


def _scan_problem(image: Image.Image) -> str | None:
    """Of a file that is not decoded yet."""
    file = getattr(image, "fp", None)
    return scan_problem(file) if file is not None and image.tile else None  # type: ignore[attr-defined]


def strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The rows of an image a few at a time: what is made of all at once may take many times its memory."""
    width, height = image.size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Other modes are converted a strip at a time."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    white = _white_of(image)
    found = Image.new("RGB", image.size)
    for rows, strip in strips(image):
        found.paste(_strip_to_rgb(strip, white), (0, rows.start))
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
    """The value that is white in an image of 16 bits, 32 bits or floats; 255 in the others.

    16-bit images run to 65535. Wider types do not say their range: it is the smallest of 1 (floats only),
    255 and 65535 that holds every value, or else the largest value.
    """
    if not _is_wide(image):
        return 255.0
    if image.mode.startswith("I;16"):
        return 65535.0
    top = max(float(_finite(np.asarray(strip)).max(initial=0.0)) for _, strip in strips(image))
    return next(
        (limit for limit in ((1.0,) if image.mode == "F" else ()) + (255.0, 65535.0) if top <= limit), top
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _to_bytes(values: np.ndarray, white: float) -> np.ndarray:
    """One channel of wide values `(H, W)` as uint8, black to white."""
    return (_finite(values).clip(0, white) * (255.0 / white) + 0.5).astype(np.uint8)
