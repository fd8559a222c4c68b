"""Newer benchmarks of boxes (REC), in their published forms: Ref-L4, GroundingME, FineCops-Ref.

Ref-L4: `ref-l4-val.parquet` and `ref-l4-test.parquet` of `JierunChen/Ref-L4`, with `images.tar.gz` unpacked. Columns:
`id`, `caption`, `bbox` (xywh in pixels), `file_name`, `ori_category_id`, `is_rewrite`, and others.

GroundingME: parquet of `lirang04/GroundingME` with the images inside. Columns: `image`, `description`, `bbox` (x0, y0,
x1, y1 in pixels; null where the description fits nothing), `height`, `width`, `subtask_l1` (Discriminative, Spatial,
Limited or Rejection), `subtask_l2`, and others.

FineCops-Ref: `<split>_expression_all_coco_format.json`, images of GQA, and edited ones in `final_neg_images`. COCO's
form with one entry of `images` for each expression: `id`, `file_name`, `height`, `width`, `caption`. Its entry of
`annotations` (by `image_id`) has `bbox` (xywh), `level`, and of negatives `negative_type`, `negative_level`,
`negative_cate` (text or image), and `positive_id`, the `id` of what it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.lines import check_box
from localization_heads.datasets.base import (
    MAX_JSON_BYTES,
    BadText,
    Entry,
    HeldSource,
    Record,
    box_from_xywh,
    coco_image_of,
    declared_size,
    entry_or_bad,
    image_folders,
    is_number,
    named_image,
    short_fields,
)
from localization_heads.datasets.parquet import ParquetSource, image_cell, split_of
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import read_json

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


FIELDS = ("level", "negative_type", "negative_level", "negative_cate", "positive_id", "tuple_type")


class FineCopsRef(HeldSource):
    """Files in COCO's form, one for each split."""

    kind = "JSON in COCO's form"
    protocol = "finecops-ref"

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        super().__init__(sorted(files))
        usual = ("images", "gqa", "final_neg_images", "neg_images", "gqa/images")
        self.folders = image_folders(images, self.files[0].parent, *usual)

    def load(self) -> Iterator[tuple[str, Any, Any]]:
        """The split, the entry of `images` and that of `annotations` of every expression."""
        return chain.from_iterable(map(_read, self.files))

    def row_split(self, values: tuple[str, Any, Any]) -> str:
        return values[0]

    def entries(self, row: int, values: tuple[str, Any, Any]) -> list[Entry | BadText]:
        split, image, _ = values
        if not isinstance(image, dict) or not is_number(image.get("id")):
            raise BadLineError("an entry of 'images' has no id")
        picture = f"gqa:{Path(str(image.get('file_name'))[:200]).stem}"
        return [entry_or_bad(f"image{image['id']}", split, picture, image.get("caption"), row)]

    def record(self, row: int, found: tuple[str, Any, Any]) -> Record:
        _, image, annotation = found
        if annotation is None:
            raise BadLineError("it has no annotation")
        size = declared_size(image.get("height"), image.get("width"))
        file = named_image(self.folders, image.get("file_name"))
        absent = any(annotation.get(name) is not None for name in ("negative_type", "negative_cate"))
        box = None if absent else box_from_xywh(annotation.get("bbox"))
        more = {"source_id": image["id"], **short_fields(annotation, *FIELDS)}
        return Record(row, file, size, box, more=more, absent=absent)


def _read(file: Path) -> Iterator[tuple[str, Any, Any]]:
    data = read_json(file, MAX_JSON_BYTES)
    images, annotations = (
        data.get(name) if isinstance(data, dict) else None for name in ("images", "annotations")
    )
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UsageError(f"{file}: it must hold 'images' and 'annotations', as COCO's files do")
    known = [one for one in annotations if isinstance(one, dict) and is_number(one.get("image_id"))]
    by_image = {one["image_id"]: one for one in known}
    split = split_of(file)
    for image in images:
        id = image.get("id") if isinstance(image, dict) else None
        yield split, image, by_image.get(id) if is_number(id) else None
