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
        more = {"source_id": cells["id"], **short_fields(cells, "ori_category_id", "is_rewrite")}
        return Record(row, file, box=box_from_xywh(cells["bbox"]), more=more)
