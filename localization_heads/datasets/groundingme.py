"""GroundingME: parquet of `lirang04/GroundingME` with the images inside.

Columns: `image`, `description`, `bbox` (x0, y0, x1, y1 in pixels; null where the description fits nothing), `height`,
`width`, `subtask_l1` (Discriminative, Spatial, Limited or Rejection), `subtask_l2`, and others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localization_heads.data.boxes import check_box
from localization_heads.datasets.files import short_fields
from localization_heads.datasets.parquet import ParquetSource, image_cell
from localization_heads.datasets.reference import BadText, Entry, Record, declared_size, entry_or_bad

if TYPE_CHECKING:
    import pyarrow as pa


class GroundingMeParquet(ParquetSource):
    kind = "parquet of lirang04"
    protocol = "groundingme"
    index_columns = ("description",)
    record_columns = ("image", "bbox", "height", "width", "subtask_l1", "subtask_l2")
    batch_size = 1  # images of up to 50 megapixels

    def entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[Entry | BadText]:
        split, cells = values
        return [entry_or_bad(f"row{row}", split, f"groundingme:{row}", cells["description"], row)]

    def record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        absent = cells["subtask_l1"] == "Rejection"
        box = None if absent else check_box(cells["bbox"])
        size = declared_size(cells["height"], cells["width"])
        more = dict(short_fields(cells, "subtask_l1", "subtask_l2"))
        return Record(row, image_cell(cells["image"]), size, box, more=more, absent=absent)
