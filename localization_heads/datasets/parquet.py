"""Read untrusted Parquet files within memory limits; the base class of benchmarks that are distributed as Parquet.

The sizes that a file claims, in its footer and in its page headers, are checked before Arrow allocates memory for them.
Strings and bytes stay dictionary-encoded until their total size is known, since a megabyte that is stored once can be
the value of a thousand rows. pyarrow is imported only when a file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from localization_heads.datasets.base import Source
from localization_heads.errors import BadLineError, UsageError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_ROWS = 10_000_000
MAX_GROUP_PIXELS = 1 << 31
"""Mask pixels in a row group: a hundred images of twenty megapixels."""

PYTHON_VALUE_BYTES = 50
"""Approximate bytes of a Python object, including the reference to it in a list or dict."""

TYPICAL_HEADER_BYTES = 1 << 10
MAX_HEADER_BYTES = 1 << 20
"""Bytes of a page header, including its statistics."""
TRAILING_BYTES = 100
"""Bytes after a column chunk that Arrow also reads if the file claims to be from an old parquet-mr (PARQUET-816)."""

_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
"""Thrift field ids in a page header."""
_MAX_DEPTH = 8
_MAX_FIELD = 0x7FFF


BATCH_SIZE = 16
_SPLIT_NAMES = {"validation": "val", **{name: name for name in ("val", "train", "testA", "testB", "test")}}


@contextmanager
def open_parquet(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file after checking that its row groups are within limits. UsageError, naming it, if not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        leaf_columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        dictionary_columns = [
            leaf.path
            for leaf in leaf_columns
            if leaf.physical_type == "BYTE_ARRAY" and _top_level_column(leaf.path) in columns
        ]
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=dictionary_columns) as file:
            _check_bounds(path, file, columns)
            yield file
    except (pa.ArrowException, OSError, MemoryError, UnreadablePageError) as error:
        raise UsageError(f"{path}: not a parquet file that can be read ({first_line(error, 100)})") from error


def column_names(path: Path) -> list[str]:
    """The names of the top-level columns."""
    with open_parquet(path, ()) as file:
        return list(file.schema_arrow.names)


def count_rows(path: Path) -> int:
    with open_parquet(path, ()) as file:
        return int(file.metadata.num_rows)


def count_values(path: Path, column: str) -> int:
    """The number of values in a column of nested lists, at the innermost level."""
    with open_parquet(path, (column,)) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(chunk.num_values for chunk in chunks if _top_level_column(chunk.path_in_schema) == column)


def _top_level_column(path_in_schema: str) -> str:
    """The top-level column that a leaf column belongs to."""
    return path_in_schema.split(".")[0]


def _memory_limit(path: Path) -> int:
    """Bytes of memory that reading a file may use."""
    return 8 * path.stat().st_size + (64 << 20)


def _check_bounds(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> None:
    metadata = file.metadata
    if metadata.num_rows > MAX_ROWS:
        raise UsageError(f"{path}: more than {MAX_ROWS} rows")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if _top_level_column(chunk.path_in_schema) in columns]
        if any(chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" for chunk in chunks):
            raise UsageError(f"{path}: a column is of an unknown type")
        if any(min(chunk.num_values, chunk.total_uncompressed_size) < 0 for chunk in chunks):
            raise UsageError(f"{path}: row group {number} has sizes below 0")
        pixels = sum(chunk.num_values for chunk in chunks if chunk.physical_type == "BOOLEAN")
        values = sum(chunk.num_values for chunk in chunks if chunk.physical_type != "BOOLEAN")
        memory = sum(chunk.total_uncompressed_size for chunk in chunks) + 16 * values
        if max(memory, _declared_page_bytes(path, chunks)) > _memory_limit(path) or pixels > MAX_GROUP_PIXELS:
            raise UsageError(f"{path}: row group {number} holds far more than the file")


def _declared_page_bytes(path: Path, chunks: Sequence[pq.ColumnChunkMetaData]) -> int:
    """The total uncompressed size that the page headers declare, which may exceed what the footer declares."""
    total = 0
    with path.open("rb") as file:
        for chunk in chunks:
            if not chunk.num_values:  # Arrow reads no page of it
                continue
            start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
            total += sum(page_sizes(file, start, chunk.total_compressed_size))
    return total


def _python_bytes(array: Any) -> int:
    """Approximate bytes of an Arrow array once it is converted to Python objects."""
    import pyarrow as pa
    import pyarrow.compute as pc

    own_bytes = PYTHON_VALUE_BYTES * len(array)
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return own_bytes + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return own_bytes + sum(map(_python_bytes, array.flatten()))
    if pa.types.is_boolean(array.type):
        return len(array)  # mask pixels are never converted to Python objects
    if pa.types.is_nested(array.type):
        return own_bytes + _python_bytes(array.flatten())
    return own_bytes


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every row as a dict of Python values, for small columns."""
    with open_parquet(path, columns) as file:
        remaining = _memory_limit(path)
        for number in range(file.metadata.num_row_groups):
            for batch in _iterate_batches(file, number, columns, 4096):
                remaining -= _python_bytes(batch.to_struct_array())
                if remaining < 0:
                    raise UsageError(f"{path}: its rows hold far more than the file")
                yield from batch.to_pylist()


def _iterate_batches(
    file: pq.ParquetFile, row_group: int, columns: Sequence[str], batch_size: int
) -> Iterator[pa.RecordBatch]:
    """Batches of one row group, because Arrow does not support lists of dictionary-encoded strings across two."""
    yield from file.iter_batches(batch_size, row_groups=[row_group], columns=list(columns))


def read_row_batches(
    path: Path, columns: Sequence[str], rows: Sequence[int], batch_size: int = BATCH_SIZE
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield each of `rows`, in ascending order, as a batch of one row. Row groups without any of them are not read."""
    with open_parquet(path, columns) as file:
        first, requested = 0, iter(rows)
        row = next(requested, None)
        for number in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(number).num_rows
            batch_start = first
            if row is not None and row < end:
                for batch in _iterate_batches(file, number, columns, batch_size):
                    if _python_bytes(batch.to_struct_array()) > _memory_limit(path):
                        raise UsageError(f"{path}: its rows hold far more than the file")
                    while row is not None and row < batch_start + batch.num_rows:
                        yield row, batch.slice(row - batch_start, 1)
                        row = next(requested, None)
                    batch_start += batch.num_rows
                    if row is None or row >= end:
                        break
            first = end


class UnreadablePageError(ValueError):
    """There is no valid page header of at most `MAX_HEADER_BYTES` where one should be."""


def page_sizes(file: BinaryIO, start: int, length: int) -> Iterator[int]:
    """Yield the uncompressed size that each page header of a column chunk declares.

    Args:
        start: offset of the first page.
        length: bytes of the chunk. A page in the `TRAILING_BYTES` after it is included if there is one.

    Raises:
        UnreadablePageError: a page of the chunk has no valid header.
    """
    end = start + length
    while start < end + TRAILING_BYTES:
        try:
            header, uncompressed, compressed = _read_page_header(file, start)
        except UnreadablePageError:
            if start < end:
                raise
            return
        yield uncompressed
        start += header + compressed


def _read_page_header(file: BinaryIO, start: int) -> tuple[int, int, int]:
    """The size of the page header at `start`, and the page's uncompressed and compressed size."""
    for num_bytes in (TYPICAL_HEADER_BYTES, MAX_HEADER_BYTES):
        file.seek(start)
        header = _PageHeader(file.read(num_bytes))
        try:
            integers = header.integers()
        except IndexError:
            continue
        uncompressed, compressed = integers.get(_UNCOMPRESSED_SIZE, -1), integers.get(_COMPRESSED_SIZE, -1)
        if 0 <= uncompressed < 1 << 31 and 0 <= compressed < 1 << 31:
            return header.position, uncompressed, compressed
        break
    raise UnreadablePageError("a page without a readable header")


class _PageHeader:
    """Parser for a Thrift struct (compact protocol) with the field types of page headers. IndexError if truncated."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def integers(self, depth: int = 0) -> dict[int, int]:
        """The 32-bit integers of the struct at `position`, by field id; other fields are skipped."""
        integers: dict[int, int] = {}
        field = 0
        while field_type := (byte := self._byte()) & 15:  # 0 ends the struct
            field += byte >> 4
            if not byte >> 4 or field > _MAX_FIELD or depth > _MAX_DEPTH:
                raise UnreadablePageError("a page header in an unknown form")
            if field_type == 5:  # i32
                value = self._varint()
                integers[field] = (value >> 1) ^ -(value & 1)
            elif field_type in (4, 6):  # i16, i64
                self._varint()
            elif field_type == 8:  # binary
                length = self._varint()
                self.position += length
            elif field_type == 12:  # struct
                self.integers(depth + 1)
            elif field_type not in (1, 2):  # booleans are encoded in the field type
                raise UnreadablePageError("a page header in an unknown form")
        return integers

    def _byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise UnreadablePageError("a page header in an unknown form")


class ParquetSource(Source):
    """A benchmark in Parquet files; rows are numbered across the files, which are sorted by name."""

    index_columns: tuple[str, ...]
    record_columns: tuple[str, ...]
    batch_size = BATCH_SIZE

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(sorted(files))

    @classmethod
    def columns(cls) -> set[str]:
        """The columns by which the format is recognised."""
        return {*cls.index_columns, *cls.record_columns}

    def iterate_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the split and the index columns of every row."""
        for file in self.files:
            split = self.file_split(file)
            for values in read_columns(file, self.index_columns):
                yield split, values

    def read_rows(self, rows: Sequence[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the record columns of some rows, each as a batch of one row."""
        first = 0
        for file in self.files:
            end = first + count_rows(file)
            local_rows = [row - first for row in rows if first <= row < end]
            if local_rows:
                for row, batch in read_row_batches(file, self.record_columns, local_rows, self.batch_size):
                    yield first + row, batch
            first = end

    def row_split(self, values: tuple[str, dict[str, Any]]) -> str:
        return values[0]

    def file_split(self, file: Path) -> str:
        return split_from_path(file)


def split_from_path(path: Path) -> str:
    """The split according to the name of a file or of its folder, as on Hugging Face.

    >>> split_from_path(Path("data/validation-00000-of-00001.parquet"))
    'val'
    >>> split_from_path(Path("default/testA/0000.parquet"))
    'testA'
    """
    for name in (path.name, path.parent.name):
        splits = {_SPLIT_NAMES[word] for word in re.split(r"[^A-Za-z]+", name) if word in _SPLIT_NAMES}
        if len(splits) == 1:
            return splits.pop()
        if splits:  # ambiguous
            break
    raise UsageError(f"{path}: its name does not contain its split; rename it as in val-00000-of-00001.parquet")


def image_bytes(value: object) -> bytes:
    """The bytes in a cell of an image column, `{"bytes", "path"}`. Raises BadLineError."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise BadLineError("the image's bytes are not in the file")
    return content
