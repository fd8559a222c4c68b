"""Read an image's orientation from its header, and estimate there what decoding would cost, before any decoder runs.

Pillow reads every value that a tag directory (EXIF, TIFF) points to, and libjpeg decodes every scan of a progressive
JPEG. A few bytes in a hostile file can therefore cost gigabytes or hours, so tags and scans are counted first.
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
SWAPPED_SIDES = (5, 6, 7, 8)
"""EXIF orientations in which width and height are swapped."""
MAX_SCANS = 100
"""In a JPEG. libtiff has the same limit; encoders write about ten."""
MAX_JPEG_BYTES = 256 << 20
MAX_EXTRA_TAG_BYTES = 1 << 20
"""Tags may hold four times the file's size plus this many bytes: their regions may overlap, but not much."""

ByteOrder = Literal["little", "big"]
_TIFF_SIGNATURES = tuple(first + rest for first in (b"II", b"MM") for rest in (b"*\0", b"\0*", b"+\0", b"\0+"))
"""All signatures that Pillow accepts as TIFF, including invalid ones."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_SUBDIRECTORY_TAGS = (0x8769, 0x8825, 0xA005)
"""Tags that point to further directories that Pillow reads: EXIF, GPS, interoperability."""
_MARKER_PATTERN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


class Tag(NamedTuple):
    """A directory entry: its tag number, the size of its value in bytes, and the value if it is a single integer."""

    number: int
    size: int
    value: int | None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is none, and for TIFF, where Pillow applies it itself.

    It is read from the part of the file before the pixels, as browsers do, so it is the same before and after decoding.
    """
    exif = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(exif, bytes):
        return 1
    value = next((tag.value for tag in _exif_tags(_strip_exif_prefix(exif)) if tag.number == ORIENTATION), None)
    return value if value is not None and 1 <= value <= 8 else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """`(W, H)` of the upright image, from the header of an opened file."""
    if image.format != "TIFF":
        return image.size[::-1] if orientation(image) in SWAPPED_SIDES else image.size
    tags = image.tag_v2  # type: ignore[attr-defined]  # `image.size` before decoding depends on the Pillow version
    size = int(tags.get(256, 0)), int(tags.get(257, 0))
    return size[::-1] if tags.get(ORIENTATION) in SWAPPED_SIDES else size


def tag_problem(file: BinaryIO) -> str | None:
    """Why the tags of a JPEG or TIFF must not be read, or None. Leaves the file position at the start."""
    size = file.seek(0, SEEK_END)
    file.seek(0)
    signature = file.read(4)
    file.seek(0)
    if signature in _TIFF_SIGNATURES:
        tag_bytes = _tiff_tag_bytes(file, size)
    elif signature.startswith(b"\xff\xd8\xff"):
        blocks = _jpeg_tag_blocks(file)
        file.seek(0)
        size = max(map(len, blocks), default=0)
        tag_bytes = sum(min(tag.size, len(block)) for block in blocks for tag in _exif_tags(block))
    else:
        return None
    return "its tags hold more than the file" if tag_bytes > 4 * size + MAX_EXTRA_TAG_BYTES else None


def scan_problem(file: BinaryIO) -> str | None:
    """Why a JPEG would take too long to decode, or None. Restores the file position."""
    offset = file.tell()
    size = file.seek(0, SEEK_END)
    file.seek(0)
    content = file.read() if size <= MAX_JPEG_BYTES else b""
    file.seek(offset)
    if size > MAX_JPEG_BYTES:
        return f"a JPEG larger than the limit of {MAX_JPEG_BYTES >> 20} MB"
    return f"a JPEG of more than {MAX_SCANS} scans" if _has_many_scans(content) else None


def _has_many_scans(content: bytes) -> bool:
    scans, offset = 0, 2
    while scans <= MAX_SCANS and (match := _MARKER_PATTERN.search(content, offset)):
        marker, offset = match[1][0], match.end()
        if marker == 0xD9:  # end of image; anything after it is ignored
            return False
        scans += marker == 0xDA  # start of scan
        if marker not in (0x01, 0xD8):  # markers without a segment
            offset += int.from_bytes(content[offset : offset + 2])
    return scans > MAX_SCANS


def _jpeg_tag_blocks(file: BinaryIO) -> list[bytes]:
    """The EXIF and multi-picture (MPF) blocks in a JPEG's header, assembled as Pillow does."""
    exif, multi_picture = b"", b""
    for marker, content in _header_segments(file):
        if marker == 0xFFE1 and content.startswith(b"Exif\0\0"):
            exif += content[6:]
        elif marker == 0xFFE2 and content.startswith(b"MPF\0"):
            multi_picture = content[4:]
    return [_strip_exif_prefix(exif), multi_picture]


def _header_segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of the segments before the first scan, parsed exactly as Pillow parses them."""
    byte = file.read(1)
    while byte:
        if byte != b"\xff":
            byte = file.read(1)
            continue
        marker = 0xFF00 | (file.read(1) or b"\0")[0]
        if marker == 0xFFFF:
            continue
        if marker != 0xFF00:
            if marker not in MARKER or marker == 0xFFDA:
                return
            if MARKER[marker][2] is not None:
                length = int.from_bytes(file.read(2))
                yield marker, file.read(max(length - 2, 0))
        byte = file.read(1)


def _strip_exif_prefix(exif: bytes) -> bytes:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _tiff_tag_bytes(file: BinaryIO, size: int) -> int:
    """Total bytes held by the tags of a TIFF's first image, including its subdirectories."""
    order, is_bigtiff = _byte_order(file.read(4))
    if is_bigtiff:
        file.seek(8)
    total, directories = 0, [int.from_bytes(file.read(8 if is_bigtiff else 4), order)]
    for offset in directories:  # grows while it is iterated, up to 8 subdirectories
        for tag in _read_directory(file, offset, order, is_bigtiff):
            total += min(tag.size, size)
            if tag.number in _SUBDIRECTORY_TAGS and tag.value is not None and len(directories) < 8:
                directories.append(tag.value)
    file.seek(0)
    return total


def _exif_tags(content: bytes) -> Iterator[Tag]:
    """The entries of the first directory in an EXIF block; none if it is malformed."""
    if content[:4] not in _TIFF_SIGNATURES or len(content) < 8:
        return
    order, _ = _byte_order(content)
    offset = int.from_bytes(content[4:8], order)
    yield from _read_directory(BytesIO(content), offset, order, False)


def _byte_order(signature: bytes) -> tuple[ByteOrder, bool]:
    """The byte order, and whether offsets have eight bytes (BigTIFF), decided as in Pillow."""
    return "little" if signature.startswith(b"II") else "big", signature[2] == ord("+")


def _read_directory(file: BinaryIO, offset: int, order: ByteOrder, is_bigtiff: bool) -> Iterator[Tag]:
    """The entries of the directory at `offset`, as many as the file contains."""
    entry = struct.Struct((">" if order == "big" else "<") + ("HHQ8s" if is_bigtiff else "HHL4s"))
    try:
        file.seek(offset)
        count = int.from_bytes(file.read(8 if is_bigtiff else 2), order)
        entries = file.read(min(count * entry.size, 1 << 30))
    except (OSError, ValueError, OverflowError):  # an impossible offset
        return
    for start in range(0, len(entries) - entry.size + 1, entry.size):
        number, value_type, count, content = entry.unpack_from(entries, start)
        width = _TYPE_BYTES.get(value_type, 0)
        value = int.from_bytes(content[:width], order)
        is_single_integer = count == 1 and value_type in (1, 3, 4, 13, 16) and width <= len(content)
        yield Tag(number, count * width, value if is_single_integer else None)
