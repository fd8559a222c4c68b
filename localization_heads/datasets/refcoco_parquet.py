"""RefCOCO, RefCOCO+ and RefCOCOg as parquet (jxu124, lmms-lab), and how parquet files are read within bounds.

pyarrow is imported only when a file is opened. Whatever a file claims about itself is checked before memory is taken.
Texts and bytes stay dictionary-coded until their total size is known: a cell of a megabyte can stand in a thousand
rows and be stored once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.datasets.parquet_pages import UnreadablePageError, unpacked_sizes
from localization_heads.datasets.reference import (
    BadRecord,
    Entry,
    Index,
    Record,
    box_from_xywh,
    box_from_xyxy,
    coco_image,
    coco_image_of,
    coco_record,
    expression,
    find_coco_image,
    is_number,
    sentence_ids,
)
from localization_heads.errors import BadEntry, BadLineError, UsageError
from localization_heads.store.files import parse_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


MAX_ROWS = 10_000_000
MAX_GROUP_PIXELS = 1 << 31
"""Of the masks in one row group: a hundred images of twenty million pixels."""

VALUE = 50
"""Approximate bytes of a Python value: the object, and its place in a list or dict."""

MAX_CELL = 64 << 20
"""Bytes of JSON in one cell."""

BATCH = 16
_SPLITS = {
    "validation": "val",
    "val": "val",
    "train": "train",
    "testA": "testA",
    "testB": "testB",
    "test": "test",
}


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
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{path}: not a parquet file that can be read ({reason})") from error


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


def json_cell(value: object, name: str) -> dict[str, Any]:
    """The object in a column of JSON texts. BadLineError, naming the column, for anything else."""
    if not isinstance(value, str) or len(value) > MAX_CELL:
        raise BadLineError(f"{name} is not text")
    try:
        parsed = parse_json(value.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise BadLineError(f"{name}: {error}") from error
    if not isinstance(parsed, dict):
        raise BadLineError(f"{name} is not a JSON object")
    return parsed


def image_cell(value: object) -> bytes:
    """The bytes in a column of images, which is `{"bytes", "path"}`. Raises BadLineError."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise BadLineError("the image's bytes are not in the file")
    return content


JXU_COLUMNS = frozenset(("ref_id", "image_id", "sentences", "raw_anns", "raw_image_info", "bbox"))
LMMS_COLUMNS = frozenset(("image", "answer", "bbox", "segmentation", "file_name"))


_LMMS_VAL = {"refcoco": "8,811 rows, UNC's has 3,811", "refcocog": "7,573 rows, UMD's has 2,573"}


class ParquetSource:
    """Rows of several files, counted through in the order of the files' names."""

    kind: str
    variant = ""
    index_columns: tuple[str, ...]
    record_columns: tuple[str, ...]
    batch_size = BATCH

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = sorted(files)
        self.notes: list[str] = []

    def index(self) -> Index:
        entries: list[Entry] = []
        bad: list[BadEntry] = []
        number = 0
        for file in self.files:
            split = self.split(file)
            for values in read_columns(file, self.index_columns):
                try:
                    entries += self.entries(values, number, split)
                except BadLineError as error:
                    bad.append(BadEntry(number + 1, "", str(error)))
                number += 1
        return Index(entries, bad)

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        first = 0
        for file in self.files:
            end = first + num_rows(file)
            here = [row - first for row in rows if first <= row < end]
            read = read_rows(file, self.record_columns, here, self.batch_size) if here else ()
            for row, batch in read:
                try:
                    yield self.record(first + row, batch)
                except BadLineError as error:
                    yield BadRecord(first + row, str(error))
            first = end

    def split(self, file: Path) -> str:
        return split_of(file)

    def entries(self, values: dict[str, Any], row: int, split: str) -> list[Entry]:
        raise NotImplementedError

    def record(self, row: int, batch: Any) -> Record:
        raise NotImplementedError


class JxuParquet(ParquetSource):
    """`jxu124/refcoco*`, with the folder of COCO's images."""

    kind = "parquet of jxu124"
    index_columns = ("ref_id", "image_id", "sentences")
    record_columns = ("ref_id", "image_id", "raw_anns", "raw_image_info", "bbox")

    def __init__(self, files: Sequence[Path], images: Path, dataset: str) -> None:
        super().__init__(files)
        self.images = images
        self.has_testa = dataset != "refcocog"

    def split(self, file: Path) -> str:
        split = split_of(file)
        return "testA" if split == "test" and self.has_testa else split

    def entries(self, values: dict[str, Any], row: int, split: str) -> list[Entry]:
        sentences = values["sentences"]
        if not is_number(values["ref_id"]) or not isinstance(sentences, list) or not sentences:
            raise BadLineError("a reference needs a ref_id and sentences")
        image = coco_image(values["image_id"])
        return [Entry(id, split, image, text, row) for id, text in sentence_ids(values["ref_id"], sentences)]

    def record(self, row: int, batch: Any) -> Record:
        values = batch.to_pylist()[0]
        annotation = json_cell(values["raw_anns"], "raw_anns")
        image = json_cell(values["raw_image_info"], "raw_image_info")
        file = find_coco_image(self.images, coco_image(values["image_id"]))
        found = coco_record(row, file, image, annotation, {"ref_id": values["ref_id"]})
        _check_same(box_from_xyxy(values["bbox"]), found.box)
        return found


def _check_same(column: Sequence[float], annotation: Sequence[float] | None) -> None:
    """The two boxes of a row say the same if the column is xyxy, as it should be."""
    if annotation is None or max(abs(a - b) for a, b in zip(column, annotation, strict=True)) > 1:
        raise BadLineError("the columns bbox (xyxy) and raw_anns.bbox (xywh) are not the same box")


class LmmsParquet(ParquetSource):
    """`lmms-lab/RefCOCO*`, with the images inside."""

    kind = "parquet of lmms-lab"
    variant = "lmms"
    index_columns = ("answer", "file_name")
    record_columns = ("image", "bbox", "segmentation", "file_name")

    def __init__(self, files: Sequence[Path], dataset: str) -> None:
        super().__init__(files)
        self.notes.append("lmms-lab's masks are one polygon each: objects in several parts are not whole")
        if note := _LMMS_VAL.get(dataset):
            self.notes.append(f"lmms-lab's val is not the val of papers ({note}): the numbers do not compare")

    def entries(self, values: dict[str, Any], row: int, split: str) -> list[Entry]:
        answers = values["answer"]
        if not isinstance(answers, list) or not answers:
            raise BadLineError("answer must be the list of its expressions")
        image = coco_image_of(values["file_name"])
        if image is None:
            raise BadLineError("file_name is none of COCO's")
        return [
            Entry(f"row{row}_sent{n}", split, image, expression(text), row) for n, text in enumerate(answers)
        ]

    def record(self, row: int, batch: Any) -> Record:
        values = batch.to_pylist()[0]
        polygon = values["segmentation"]
        return Record(
            row,
            image_cell(values["image"]),
            box=box_from_xywh(values["bbox"]),
            mask=[polygon] if isinstance(polygon, list) and polygon else None,
            more={"file_name": values["file_name"]},
        )
