"""Read from an image's header, before any decoder runs: its orientation, and how costly it would be to decode.

Pillow reads every value that a directory of tags (EXIF, TIFF) points at, and libjpeg decodes every scan of a
progressive JPEG. A few bytes in a file can so cost gigabytes or hours; they are counted first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from io import SEEK_END, BytesIO
from typing import BinaryIO, Literal, NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import MARKER

ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
MAX_SCANS = 100
"""Of a JPEG; libtiff has the same limit, encoders write about ten."""
MAX_JPEG_BYTES = 256 << 20
MAX_POINTED_AT = 1 << 20
"""Bytes that the tags of an image may hold together, beyond four times its size: regions may overlap, but not much."""

Order = Literal["little", "big"]
_TIFF = tuple(first + rest for first in (b"II", b"MM") for rest in (b"*\0", b"\0*", b"+\0", b"\0+"))
"""Beginnings that Pillow takes for those of a TIFF, right ones and wrong ones."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_DIRECTORIES = (0x8769, 0x8825, 0xA005)
"""Tags that point at further directories which Pillow reads: EXIF, GPS, interoperability."""
_SEGMENT = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


class Tag(NamedTuple):
    """An entry of a directory: its number, the bytes that it holds, and its value if that is one whole number."""

    number: int
    size: int
    value: int | None


def orientation(image: Image.Image) -> int:
    """How the camera was turned, 1 to 8 as in EXIF, for the formats that leave it to the reader; 1 for none.

    Taken from the part of a file before its pixels, as browsers do, so that it is the same before and after decoding.
    Of a TIFF Pillow turns the pixels itself.
    """
    exif = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(exif, bytes):
        return 1
    found = next((tag.value for tag in _tags(_without_marks(exif)) if tag.number == ORIENTATION), None)
    return found if found is not None and 1 <= found <= 8 else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """`(W, H)` of a file's image once it stands upright, from its header."""
    if image.format != "TIFF":
        return image.size[::-1] if orientation(image) in SIDEWAYS else image.size
    tags = image.tag_v2  # type: ignore[attr-defined]  # what `size` is before decoding differs between Pillows
    size = int(tags.get(256, 0)), int(tags.get(257, 0))
    return size[::-1] if tags.get(ORIENTATION) in SIDEWAYS else size


def tag_problem(file: BinaryIO) -> str | None:
    """Why the tags of a JPEG or TIFF must not be read, None if they can. The file is left at its beginning."""
    size = file.seek(0, SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start in _TIFF:
        pointed_at = _pointed_at(file, size)
    elif start.startswith(b"\xff\xd8\xff"):
        parts = _tag_parts(file)
        file.seek(0)
        size = max(map(len, parts), default=0)
        pointed_at = sum(min(tag.size, len(part)) for part in parts for tag in _tags(part))
    else:
        return None
    return "its tags hold more than the file" if pointed_at > 4 * size + MAX_POINTED_AT else None


def scan_problem(file: BinaryIO) -> str | None:
    """Why a JPEG would take too long to decode, None if it does not. The file is left where it was."""
    place = file.tell()
    size = file.seek(0, SEEK_END)
    file.seek(0)
    content = file.read() if size <= MAX_JPEG_BYTES else b""
    file.seek(place)
    if size > MAX_JPEG_BYTES:
        return f"a JPEG larger than the limit of {MAX_JPEG_BYTES >> 20} MB"
    return f"a JPEG of more than {MAX_SCANS} scans" if _has_many_scans(content) else None


def _has_many_scans(content: bytes) -> bool:
    scans, place = 0, 2
    while scans <= MAX_SCANS and (found := _SEGMENT.search(content, place)):
        kind, place = found[1][0], found.end()
        if kind == 0xD9:  # the end of the image, whatever follows
            return False
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):
            place += int.from_bytes(content[place : place + 2])
    return scans > MAX_SCANS


def _tag_parts(file: BinaryIO) -> list[bytes]:
    """The directories in a JPEG's header, EXIF and that of several images, put together as Pillow does."""
    exif, several = b"", b""
    for kind, content in _segments(file):
        if kind == 0xFFE1 and content.startswith(b"Exif\0\0"):
            exif += content[6:]
        elif kind == 0xFFE2 and content.startswith(b"MPF\0"):
            several = content[4:]
    return [_without_marks(exif), several]


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The segments before the first scan, found as Pillow finds them, so that none that it reads is missed."""
    byte = file.read(1)
    while byte:
        if byte != b"\xff":
            byte = file.read(1)
            continue
        kind = 0xFF00 | (file.read(1) or b"\0")[0]
        if kind == 0xFFFF:
            continue
        if kind != 0xFF00:
            if kind not in MARKER or kind == 0xFFDA:
                return
            if MARKER[kind][2] is not None:
                length = int.from_bytes(file.read(2))
                yield kind, file.read(max(length - 2, 0))
        byte = file.read(1)


def _without_marks(exif: bytes) -> bytes:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _pointed_at(file: BinaryIO, size: int) -> int:
    """Bytes that the tags of a TIFF's first image hold, with those of the directories that they name."""
    order, big = _layout(file.read(4))
    if big:
        file.seek(8)
    total, directories = 0, [int.from_bytes(file.read(8 if big else 4), order)]
    for place in directories:  # grows, by the few that are named
        for tag in _directory(file, place, order, big):
            total += min(tag.size, size)
            if tag.number in _DIRECTORIES and tag.value is not None and len(directories) < 8:
                directories.append(tag.value)
    file.seek(0)
    return total


def _tags(content: bytes) -> Iterator[Tag]:
    """The first directory of EXIF's bytes; none where they are garbage."""
    if content[:4] not in _TIFF or len(content) < 8:
        return
    order, _ = _layout(content)
    place = int.from_bytes(content[4:8], order)
    yield from _directory(BytesIO(content), place, order, False)


def _layout(start: bytes) -> tuple[Order, bool]:
    """Byte order, and whether places take eight bytes (BigTIFF), as Pillow tells them."""
    return "little" if start.startswith(b"II") else "big", start[2] == ord("+")


def _directory(file: BinaryIO, place: int, order: Order, big: bool) -> Iterator[Tag]:
    """The entries of the directory at `place`, as far as the file has them."""
    entry = struct.Struct((">" if order == "big" else "<") + ("HHQ8s" if big else "HHL4s"))
    try:
        file.seek(place)
        count = int.from_bytes(file.read(8 if big else 2), order)
        entries = file.read(min(count * entry.size, 1 << 30))
    except (OSError, ValueError, OverflowError):  # a place that no file has
        return
    for start in range(0, len(entries) - entry.size + 1, entry.size):
        number, kind, length, content = entry.unpack_from(entries, start)
        width = _TYPE_BYTES.get(kind, 0)
        value = int.from_bytes(content[:width], order)
        single = length == 1 and kind in (1, 3, 4, 13, 16) and width <= len(content)
        yield Tag(number, length * width, value if single else None)
