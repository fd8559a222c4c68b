"""What the pages of a parquet file claim to unpack to, read before arrow reserves the memory for them.

The header of a page, a Thrift struct in compact protocol, stands before its bytes. What arrow could read differently,
such as numbers that overflow, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

USUAL_HEADER = 1 << 10
LONGEST_HEADER = 1 << 20
"""Bytes of a header with its statistics."""
SLACK = 100
"""Bytes after a column chunk that arrow reads too, if the file says that an old parquet-mr wrote it (PARQUET-816)."""

_UNPACKED, _PACKED = 2, 3
"""Fields of a header: the size of the page unpacked, and as it is stored."""
_DEEPEST = 8
_LAST_FIELD = 0x7FFF


class UnreadablePageError(ValueError):
    """There is no page header where one should be, or it is longer than `LONGEST_HEADER`."""


def unpacked_sizes(file: BinaryIO, start: int, length: int) -> Iterator[int]:
    """The bytes that each page of a column chunk claims to unpack to.

    Args:
        start: where the first page of the chunk begins.
        length: bytes of the chunk. A page in the `SLACK` behind it counts if there is one.

    Raises:
        UnreadablePageError: no header can be read where a page of the chunk begins.
    """
    end = start + length
    while start < end + SLACK:
        try:
            header, unpacked, packed = _read_header(file, start)
        except UnreadablePageError:
            if start < end:
                raise
            return
        yield unpacked
        start += header + packed


def _read_header(file: BinaryIO, start: int) -> tuple[int, int, int]:
    """Bytes of the header at `start`, of its page unpacked, and of its page as stored."""
    for most in (USUAL_HEADER, LONGEST_HEADER):
        file.seek(start)
        header = _Header(file.read(most))
        try:
            numbers = header.numbers()
        except IndexError:
            continue
        unpacked, packed = numbers.get(_UNPACKED, -1), numbers.get(_PACKED, -1)
        if 0 <= unpacked < 1 << 31 and 0 <= packed < 1 << 31:
            return header.place, unpacked, packed
        break
    raise UnreadablePageError("a page without a readable header")


class _Header:
    """A Thrift struct in compact protocol, of the kinds of fields that page headers have. IndexError if it is cut."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def numbers(self, depth: int = 0) -> dict[int, int]:
        """The 32-bit numbers of the struct at `place`, by field; whatever else it holds is skipped."""
        numbers: dict[int, int] = {}
        field = 0
        while kind := (byte := self._byte()) & 15:  # 0 ends the struct
            field += byte >> 4
            if not byte >> 4 or field > _LAST_FIELD or depth > _DEEPEST:
                raise UnreadablePageError("a page header in an unknown form")
            if kind == 5:
                value = self._varint()
                numbers[field] = (value >> 1) ^ -(value & 1)
            elif kind in (4, 6):
                self._varint()
            elif kind == 8:
                length = self._varint()
                self.place += length
            elif kind == 12:
                self.numbers(depth + 1)
            elif kind not in (1, 2):  # true and false have no bytes of their own
                raise UnreadablePageError("a page header in an unknown form")
        return numbers

    def _byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise UnreadablePageError("a page header in an unknown form")
