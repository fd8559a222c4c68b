"""ScreenSpot, ScreenSpot-v2 and ScreenSpot-Pro: a screenshot, an instruction, and the box of the element it refers to.

JSON of v1 (njucckevin/SeeClick: `screenspot_{mobile,desktop,web}.json`) and v2 (OS-Copilot/ScreenSpot-v2: the same
with `_v2`): a list of `img_filename`, `bbox` (x, y, width, height in pixels), `instruction`, `data_type`,
`data_source`. Pro (likaixin/ScreenSpot-Pro: `annotations/*.json`): `bbox` is x0, y0, x1, y1 in pixels; also `img_size`
[width, height], `ui_type`, `group`, `application`, `platform`, `id`. Parquet of v1 and v2
(rootsautomation/ScreenSpot): `bbox` is x0, y0, x1, y1 from 0 to 1, and the images are included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.images import decode_image
from localization_heads.data.lines import check_box
from localization_heads.datasets.base import (
    BadExpression,
    IndexEntry,
    InMemorySource,
    Record,
    box_from_xywh,
    declared_size,
    find_image_folders,
    find_named_image,
    make_entry,
    read_json_list,
    short_fields,
)
from localization_heads.datasets.parquet import ParquetSource, image_bytes
from localization_heads.errors import BadLineError

if TYPE_CHECKING:
    import pyarrow as pa

PLATFORMS = ("mobile", "desktop", "web")
FIELDS = ("data_type", "data_source", "ui_type", "group", "application", "platform")


class ScreenSpotJson(InMemorySource):
    """The JSON formats.

    Args:
        pro: ScreenSpot-Pro, whose boxes are x0, y0, x1, y1.
    """

    protocol = "screenspot"

    def __init__(self, files: Sequence[Path], images: Path | None, *, pro: bool) -> None:
        super().__init__(sorted(files))
        self.pro = pro
        self.kind = "JSON of ScreenSpot-Pro" if pro else "JSON of ScreenSpot"
        root = self.files[0].parent.parent if pro else self.files[0].parent
        self.folders = find_image_folders(images, root, "images", "screenspotv2_image", "screenspot_imgs")

    def load_rows(self) -> Iterator[tuple[Path, Any]]:
        return ((file, entry) for file in self.files for entry in read_json_list(file))

    def row_split(self, values: object) -> str:
        return "test"

    def row_entries(self, row: int, values: tuple[Path, Any]) -> list[IndexEntry | BadExpression]:
        _, entry = values
        if not isinstance(entry, dict) or not isinstance(entry.get("img_filename"), str):
            raise BadLineError("an entry is not an object with an img_filename")
        picture = f"screenspot:{entry['img_filename'][:200]}"
        return [make_entry(f"row{row}", "test", picture, entry.get("instruction"), row)]

    def make_record(self, row: int, values: tuple[Path, Any]) -> Record:
        file, entry = values
        box = check_box(entry.get("bbox")) if self.pro else box_from_xywh(entry.get("bbox"))
        size = None
        if (declared := entry.get("img_size")) is not None:
            if not isinstance(declared, list) or len(declared) != 2:
                raise BadLineError("img_size must be [width, height]")
            size = declared_size(declared[1], declared[0])
        platform = next((name for name in PLATFORMS if name in file.stem), None)
        extra = ({"platform": platform} if platform and not self.pro else {}) | short_fields(entry, *FIELDS)
        if isinstance(entry.get("id"), str):
            extra["source_id"] = entry["id"][:200]
        return Record(row, find_named_image(self.folders, entry["img_filename"]), size, box, extra=extra)


class ScreenSpotParquet(ParquetSource):
    """The Parquet format, with boxes from 0 to 1 and the images included."""

    kind = "parquet of ScreenSpot"
    variant = "parquet"
    protocol = "screenspot"
    index_columns = ("instruction",)
    record_columns = ("image", "bbox", "data_type", "data_source")

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        return [make_entry(f"row{row}", split, f"screenspot-parquet:{row}", cells["instruction"], row)]

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        content = image_bytes(cells["image"])
        width, height = decode_image(f"the image of row {row + 1}", content)[1].size
        x0, y0, x1, y1 = check_box(cells["bbox"])
        if not (x0 >= 0 and y0 >= 0 and x1 <= 1 and y1 <= 1):
            raise BadLineError("the box of a parquet row must be x0, y0, x1, y1 from 0 to 1")
        box = (x0 * width, y0 * height, x1 * width, y1 * height)
        return Record(row, content, box=box, extra=dict(short_fields(cells, "data_type", "data_source")))
