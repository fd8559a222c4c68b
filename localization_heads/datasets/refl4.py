"""Ref-L4: `ref-l4-val.parquet` and `ref-l4-test.parquet` of `JierunChen/Ref-L4`, with `images.tar.gz` unpacked.

Columns: `id`, `caption`, `bbox` (xywh in pixels), `file_name`, `ori_category_id`, `is_rewrite`, and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.datasets.files import image_folders, named_image, short_fields
from localization_heads.datasets.parquet import ParquetSource
from localization_heads.datasets.reference import (
    BadText,
    Entry,
    Record,
    box_from_xywh,
    coco_image_of,
    entry_or_bad,
)
from localization_heads.errors import BadLineError

if TYPE_CHECKING:
    import pyarrow as pa


_OBJECTS365 = {
    "1": 1, "2": 47, "3": 6, "4": 59, "5": 115, "6": 56, "7": 117, "8": 66, "9": 22, "10": 41, "11": 177,
    "13": 128, "14": 250, "15": 25, "16": 56, "17": 140, "18": 93, "19": 79, "20": 100, "21": 97, "22": 145,
    "23": 296, "24": 179, "25": 181, "27": 39, "28": 40, "31": 13, "32": 44, "33": 194, "34": 220, "35": 119,
    "36": 174, "38": 155, "39": 138, "40": 114, "41": 146, "42": 147, "43": 205, "44": 9, "46": 36, "47": 11,
    "48": 89, "49": 85, "50": 94, "51": 26, "52": 113, "53": 83, "54": 266, "55": 104, "56": 142, "57": 153,
    "58": 235, "59": 144, "60": 151, "61": 98, "62": 3, "63": 51, "64": 26, "65": 76, "67": 98, "70": 154,
    "72": 37, "73": 74, "74": 116, "75": 133, "76": 107, "77": 62, "78": 164, "79": 135, "80": 278, "81": 82,
    "82": 134, "84": 19, "85": 95, "86": 31, "87": 170, "88": 70, "89": 328, "90": 227,
}  # fmt: skip
"""Ref-L4 counts the category of COCO with the first number as that of Objects365 with the second in its class means."""


def category_of(name: object) -> str | None:
    """The category that Ref-L4's class means count a row in, from its `ori_category_id`; None where it has none.

    >>> category_of("refcoco_2"), category_of("refcoco_37"), category_of("o365_47")
    ('o365_47', 'refcoco_37', 'o365_47')
    """
    if not isinstance(name, str):
        return None
    number = _OBJECTS365.get(name.removeprefix("refcoco_")) if name.startswith("refcoco_") else None
    return name if number is None else f"o365_{number}"


class RefL4Parquet(ParquetSource):
    kind = "parquet of JierunChen"
    protocol = "ref-l4"
    index_columns = ("caption", "file_name")
    record_columns = ("id", "bbox", "file_name", "ori_category_id", "is_rewrite")

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        super().__init__(files)
        self.folders = image_folders(images, self.files[0].parent, "images", "train2014", "o365")
        self.notes.append("Ref-L4's licence is non-commercial (CC BY-NC 4.0)")

    def entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[Entry | BadText]:
        split, cells = values
        name = cells["file_name"]
        if not isinstance(name, str):
            raise BadLineError("the image's file name is missing, or no name")
        picture = coco_image_of(Path(name).name) or f"objects365:{Path(name).stem[:100]}"
        return [entry_or_bad(f"row{row}", split, picture, cells["caption"], row)]

    def record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        file = named_image(self.folders, cells["file_name"])
        cells["category"] = category_of(cells["ori_category_id"])
        more = {"source_id": cells["id"], **short_fields(cells, "ori_category_id", "category", "is_rewrite")}
        return Record(row, file, box=box_from_xywh(cells["bbox"]), more=more)
