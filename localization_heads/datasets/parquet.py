"""Parquet files within bounds, and benchmarks that come as such files.

pyarrow is imported only when a file is opened. Whatever a file claims about itself, in its footer and in the headers of
its pages, is checked before arrow reserves memory for it. Texts and bytes stay dictionary-coded until their total size
is known: a cell of a megabyte can stand in a thousand rows and be stored once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from localization_heads.datasets.base import Source
from localization_heads.errors import BadLineError, UsageError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_ROWS = 10_000_000
MAX_GROUP_PIXELS = 1 << 31
"""Of the masks in one row group: a hundred images of twenty million pixels."""

VALUE = 50
"""Approximate bytes of a Python value: the object, and its place in a list or dict."""

USUAL_HEADER = 1 << 10
LONGEST_HEADER = 1 << 20
"""Bytes of a header with its statistics."""
SLACK = 100
"""Bytes after a column chunk that arrow reads too, if the file says that an old parquet-mr wrote it (PARQUET-816)."""

_UNPACKED, _PACKED = 2, 3
"""Fields of a header: the size of the page unpacked, and as it is stored."""
_DEEPEST = 8
_LAST_FIELD = 0x7FFF


BATCH = 16
_SPLITS = {"validation": "val", **{name: name for name in ("val", "train", "testA", "testB", "test")}}


@contextmanager
def opened(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """A parquet file whose row groups are within bounds. UsageError, naming it, for anything else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        coded = [
            leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and _top(leaf.path) in columns
        ]
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=coded) as file:
            _check_bounds(path, file, columns)
            yield file
    except (pa.ArrowException, OSError, MemoryError, UnreadablePageError) as error:
        raise UsageError(f"{path}: not a parquet file that can be read ({one_line(error)})") from error


def column_names(path: Path) -> list[str]:
    """The columns at the top level."""
    with opened(path, ()) as file:
        return list(file.schema_arrow.names)


def num_rows(path: Path) -> int:
    with opened(path, ()) as file:
        return int(file.metadata.num_rows)


def num_values(path: Path, column: str) -> int:
    """How many values a column of nested lists holds in all."""
    with opened(path, (column,)) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(chunk.num_values for chunk in chunks if _top(chunk.path_in_schema) == column)


def _top(path_in_schema: str) -> str:
    """The column at the top level that a column of the file belongs to."""
    return path_in_schema.split(".")[0]


def _allowance(path: Path) -> int:
    """Bytes that reading a file may take."""
    return 8 * path.stat().st_size + (64 << 20)


def _check_bounds(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> None:
    metadata = file.metadata
    if metadata.num_rows > MAX_ROWS:
        raise UsageError(f"{path}: more than {MAX_ROWS} rows")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if _top(chunk.path_in_schema) in columns]
        if any(chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" for chunk in chunks):
            raise UsageError(f"{path}: a column is of an unknown type")
        if any(min(chunk.num_values, chunk.total_uncompressed_size) < 0 for chunk in chunks):
            raise UsageError(f"{path}: row group {number} has sizes below 0")
        pixels = sum(chunk.num_values for chunk in chunks if chunk.physical_type == "BOOLEAN")
        values = sum(chunk.num_values for chunk in chunks if chunk.physical_type != "BOOLEAN")
        built = sum(chunk.total_uncompressed_size for chunk in chunks) + 16 * values
        if max(built, _claimed_by_pages(path, chunks)) > _allowance(path) or pixels > MAX_GROUP_PIXELS:
            raise UsageError(f"{path}: row group {number} holds far more than the file")


def _claimed_by_pages(path: Path, chunks: Sequence[pq.ColumnChunkMetaData]) -> int:
    """Bytes that the pages of some column chunks say they unpack to, which may be more than the footer says."""
    claimed = 0
    with path.open("rb") as file:
        for chunk in chunks:
            if not chunk.num_values:  # arrow reads no page of it
                continue
            start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
            claimed += sum(unpacked_sizes(file, start, chunk.total_compressed_size))
    return claimed


def _unfolded(array: Any) -> int:
    """Approximate bytes of an arrow array as Python values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    own = VALUE * len(array)
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return own + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return own + sum(map(_unfolded, array.flatten()))
    if pa.types.is_boolean(array.type):
        return len(array)  # pixels: they never become Python's
    if pa.types.is_nested(array.type):
        return own + _unfolded(array.flatten())
    return own


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every row of some small columns, as plain values."""
    with opened(path, columns) as file:
        left = _allowance(path)
        for number in range(file.metadata.num_row_groups):
            for batch in _batches(file, number, columns, 4096):
                left -= _unfolded(batch.to_struct_array())
                if left < 0:
                    raise UsageError(f"{path}: its rows hold far more than the file")
                yield from batch.to_pylist()


def _batches(
    file: pq.ParquetFile, row_group: int, columns: Sequence[str], batch_size: int
) -> Iterator[pa.RecordBatch]:
    """The rows of one row group: arrow has no dictionary-coded texts in lists that span two."""
    yield from file.iter_batches(batch_size, row_groups=[row_group], columns=list(columns))


def read_rows(
    path: Path, columns: Sequence[str], rows: Sequence[int], batch_size: int = BATCH
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """These rows, which ascend, each as a batch of one; row groups that hold none of them are not read."""
    with opened(path, columns) as file:
        first, wanted = 0, iter(rows)
        row = next(wanted, None)
        for number in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(number).num_rows
            at = first
            if row is not None and row < end:
                for batch in _batches(file, number, columns, batch_size):
                    if _unfolded(batch.to_struct_array()) > _allowance(path):
                        raise UsageError(f"{path}: its rows hold far more than the file")
                    while row is not None and row < at + batch.num_rows:
                        yield row, batch.slice(row - at, 1)
                        row = next(wanted, None)
                    at += batch.num_rows
                    if row is None or row >= end:
                        break
            first = end


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


class ParquetSource(Source):
    """Rows of several files, counted through in the order of the files' names."""

    index_columns: tuple[str, ...]
    record_columns: tuple[str, ...]
    batch_size = BATCH

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(sorted(files))

    @classmethod
    def columns(cls) -> set[str]:
        """The columns by which such a file is recognised."""
        return {*cls.index_columns, *cls.record_columns}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The split and the index columns of every row."""
        for file in self.files:
            split = self.split(file)
            for values in read_columns(file, self.index_columns):
                yield split, values

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The record columns of these rows, each as a batch of one."""
        first = 0
        for file in self.files:
            end = first + num_rows(file)
            here = [row - first for row in rows if first <= row < end]
            for row, batch in read_rows(file, self.record_columns, here, self.batch_size) if here else ():
                yield first + row, batch
            first = end

    def row_split(self, values: tuple[str, dict[str, Any]]) -> str:
        return values[0]

    def split(self, file: Path) -> str:
        return split_of(file)


def split_of(path: Path) -> str:
    """The split from a file's name or from its folder's, as Hugging Face names them.

    >>> split_of(Path("data/validation-00000-of-00001.parquet")), split_of(Path("default/testA/0000.parquet"))
    ('val', 'testA')
    """
    for name in (path.name, path.parent.name):
        found = {_SPLITS[word] for word in re.split(r"[^A-Za-z]+", name) if word in _SPLITS}
        if len(found) == 1:
            return found.pop()
        if found:
            break
    raise UsageError(f"{path}: its name does not tell its split; name it as in val-00000-of-00001.parquet")


def image_cell(value: object) -> bytes:
    """The bytes in a column of images, which is `{"bytes", "path"}`. Raises BadLineError."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise BadLineError("the image's bytes are not in the file")
    return content
