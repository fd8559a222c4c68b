"""RefCOCO as parquet: `jxu124/refcoco`, `refcocoplus`, `refcocog`, and `lmms-lab/RefCOCO`, `RefCOCOplus`, `RefCOCOg`.

`jxu124/*` (https://huggingface.co/datasets/jxu124/refcoco): a row a reference of the UNC (UMD for RefCOCOg)
partition; `sentences` as in the refs pickle; `raw_anns` and `raw_image_info` are COCO's entries as JSON texts, so
`raw_anns.bbox` is xywh while the column `bbox` is xyxy. The split that it calls `test` is testA of RefCOCO and
RefCOCO+. No pictures inside.

`lmms-lab/*` (https://huggingface.co/datasets/lmms-lab/RefCOCO): a row a reference with its picture; `answer` is the
list of its expressions, `bbox` is xywh, `segmentation` one polygon as a flat list; `file_name` is that of the refs
pickle. `val` of RefCOCO has 8,811 rows and of RefCOCOg 7,573: UNC's 3,811 and UMD's 2,573 with another 5,000 each,
which is the size of the google partition's val (https://www.tensorflow.org/datasets/catalog/ref_coco).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localization_heads.data import parquet
from localization_heads.data.jsonl import BadEntry, BadLineError
from localization_heads.data.refer_pickles import coco_record, sentence_ids
from localization_heads.data.reference import (
    BadRecord,
    Entry,
    Index,
    Record,
    box_from_xywh,
    box_from_xyxy,
    coco_picture,
    coco_picture_of,
    expression,
    find_coco_image,
    is_number,
)

JXU_COLUMNS = frozenset(("ref_id", "image_id", "sentences", "raw_anns", "raw_image_info", "bbox"))
LMMS_COLUMNS = frozenset(("image", "answer", "bbox", "segmentation", "file_name"))


_LMMS_VAL = {"refcoco": "8,811 rows, UNC's has 3,811", "refcocog": "7,573 rows, UMD's has 2,573"}


class ParquetSource:
    """Rows of several files, counted through in the order of the files' names."""

    kind: str
    variant = ""
    index_columns: tuple[str, ...]
    record_columns: tuple[str, ...]
    batch_size = parquet.BATCH

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = sorted(files)
        self.notes: list[str] = []

    def index(self) -> Index:
        entries: list[Entry] = []
        bad: list[BadEntry] = []
        number = 0
        for file in self.files:
            split = self.split(file)
            for values in parquet.read_columns(file, self.index_columns):
                try:
                    entries += self.entries(values, number, split)
                except BadLineError as error:
                    bad.append(BadEntry(number + 1, "", str(error)))
                number += 1
        return Index(entries, bad)

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        first = 0
        for file in self.files:
            end = first + parquet.num_rows(file)
            here = [row - first for row in rows if first <= row < end]
            read = parquet.read_rows(file, self.record_columns, here, self.batch_size) if here else ()
            for row, batch in read:
                try:
                    yield self.record(first + row, batch)
                except BadLineError as error:
                    yield BadRecord(first + row, str(error))
            first = end

    def split(self, file: Path) -> str:
        return parquet.split_of(file)

    def entries(self, values: dict[str, Any], row: int, split: str) -> list[Entry]:
        raise NotImplementedError

    def record(self, row: int, batch: Any) -> Record:
        raise NotImplementedError


class JxuParquet(ParquetSource):
    """`jxu124/refcoco*`, with the folder of COCO's pictures."""

    kind = "parquet of jxu124"
    index_columns = ("ref_id", "image_id", "sentences")
    record_columns = ("ref_id", "image_id", "raw_anns", "raw_image_info", "bbox")

    def __init__(self, files: Sequence[Path], images: Path, dataset: str) -> None:
        super().__init__(files)
        self.images = images
        self.has_testa = dataset != "refcocog"

    def split(self, file: Path) -> str:
        split = parquet.split_of(file)
        return "testA" if split == "test" and self.has_testa else split

    def entries(self, values: dict[str, Any], row: int, split: str) -> list[Entry]:
        sentences = values["sentences"]
        if not is_number(values["ref_id"]) or not isinstance(sentences, list) or not sentences:
            raise BadLineError("a reference needs a ref_id and sentences")
        picture = coco_picture(values["image_id"])
        return [
            Entry(id, split, picture, text, row) for id, text in sentence_ids(values["ref_id"], sentences)
        ]

    def record(self, row: int, batch: Any) -> Record:
        values = batch.to_pylist()[0]
        annotation = parquet.json_cell(values["raw_anns"], "raw_anns")
        image = parquet.json_cell(values["raw_image_info"], "raw_image_info")
        file = find_coco_image(self.images, coco_picture(values["image_id"]))
        found = coco_record(row, file, image, annotation, {"ref_id": values["ref_id"]})
        _check_same(box_from_xyxy(values["bbox"]), found.box)
        return found


def _check_same(column: Sequence[float], annotation: Sequence[float] | None) -> None:
    """The two boxes of a row say the same if the column is xyxy, as it should be."""
    if annotation is None or max(abs(a - b) for a, b in zip(column, annotation, strict=True)) > 1:
        raise BadLineError("the columns bbox (xyxy) and raw_anns.bbox (xywh) are not the same box")


class LmmsParquet(ParquetSource):
    """`lmms-lab/RefCOCO*`, with the pictures inside."""

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
        picture = coco_picture_of(values["file_name"])
        if picture is None:
            raise BadLineError("file_name is none of COCO's")
        return [
            Entry(f"row{row}_sent{n}", split, picture, expression(text), row)
            for n, text in enumerate(answers)
        ]

    def record(self, row: int, batch: Any) -> Record:
        values = batch.to_pylist()[0]
        polygon = values["segmentation"]
        return Record(
            row,
            parquet.image_cell(values["image"]),
            box=box_from_xywh(values["bbox"]),
            mask=[polygon] if isinstance(polygon, list) and polygon else None,
            more={"file_name": values["file_name"]},
        )
