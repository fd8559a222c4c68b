"""Recent referring expression comprehension (REC) benchmarks in their published formats.

Ref-L4: `ref-l4-val.parquet` and `ref-l4-test.parquet` of `JierunChen/Ref-L4`, with `images.tar.gz` unpacked. Columns:
`id`, `caption`, `bbox` (xywh in pixels), `file_name`, `ori_category_id`, `is_rewrite`, and others.

GroundingME: Parquet of `lirang04/GroundingME`, including the images. Columns: `image`, `description`, `bbox` (x0, y0,
x1, y1 in pixels; null if the description matches nothing), `height`, `width`, `subtask_l1` (Discriminative, Spatial,
Limited or Rejection), `subtask_l2`, and others.

FineCops-Ref: `<split>_expression_all_coco_format.json`, GQA's images, and edited images in `final_neg_images`. COCO's
format with one entry in `images` per expression: `id`, `file_name`, `height`, `width`, `caption`. Its entry in
`annotations` (by `image_id`) has `bbox` (xywh), `level` and, for negatives, `negative_type`, `negative_level`,
`negative_cate` (text or image) and `positive_id`, the `id` of the sample that it was derived from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.lines import check_box
from localization_heads.datasets.base import (
    MAX_JSON_BYTES,
    BadExpression,
    IndexEntry,
    InMemorySource,
    Record,
    box_from_xywh,
    coco_picture_from_name,
    declared_size,
    find_image_folders,
    find_named_image,
    is_natural_number,
    make_entry,
    short_fields,
)
from localization_heads.datasets.parquet import ParquetSource, image_bytes, split_from_path
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
"""COCO category id -> the Objects365 category id that Ref-L4 merges it with in its per-class means."""


def ref_l4_category(name: object) -> str | None:
    """The category of a row in Ref-L4's per-class means, from its `ori_category_id`; None if there is none.

    >>> ref_l4_category("refcoco_2"), ref_l4_category("refcoco_37"), ref_l4_category("o365_47")
    ('o365_47', 'refcoco_37', 'o365_47')
    """
    if not isinstance(name, str):
        return None
    number = _OBJECTS365.get(name.removeprefix("refcoco_")) if name.startswith("refcoco_") else None
    return name if number is None else f"o365_{number}"


class RefL4Parquet(ParquetSource):
    """Ref-L4; its images are separate files."""

    kind = "parquet of JierunChen"
    protocol = "ref-l4"
    index_columns = ("caption", "file_name")
    record_columns = ("id", "bbox", "file_name", "ori_category_id", "is_rewrite")

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        super().__init__(files)
        self.folders = find_image_folders(images, self.files[0].parent, "images", "train2014", "o365")
        self.notes.append("Ref-L4's licence is non-commercial (CC BY-NC 4.0)")

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        name = cells["file_name"]
        if not isinstance(name, str):
            raise BadLineError("the image's file name is missing or invalid")
        picture = coco_picture_from_name(Path(name).name) or f"objects365:{Path(name).stem[:100]}"
        return [make_entry(f"row{row}", split, picture, cells["caption"], row)]

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        file = find_named_image(self.folders, cells["file_name"])
        cells["category"] = ref_l4_category(cells["ori_category_id"])
        extra = {"source_id": cells["id"], **short_fields(cells, "ori_category_id", "category", "is_rewrite")}
        return Record(row, file, box=box_from_xywh(cells["bbox"]), extra=extra)


class GroundingMeParquet(ParquetSource):
    """GroundingME; images are in the Parquet files."""

    kind = "parquet of lirang04"
    protocol = "groundingme"
    index_columns = ("description",)
    record_columns = ("image", "bbox", "height", "width", "subtask_l1", "subtask_l2")
    batch_size = 1  # images of up to 50 megapixels

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        return [make_entry(f"row{row}", split, f"groundingme:{row}", cells["description"], row)]

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        absent = cells["subtask_l1"] == "Rejection"
        box = None if absent else check_box(cells["bbox"])
        size = declared_size(cells["height"], cells["width"])
        extra = dict(short_fields(cells, "subtask_l1", "subtask_l2"))
        return Record(row, image_bytes(cells["image"]), size, box, extra=extra, absent=absent)


FIELDS = ("level", "negative_type", "negative_level", "negative_cate", "positive_id", "tuple_type")


class FineCopsRef(InMemorySource):
    """FineCops-Ref: one JSON file in COCO's format per split."""

    kind = "JSON in COCO's form"
    protocol = "finecops-ref"

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        super().__init__(sorted(files))
        default_folders = ("images", "gqa", "final_neg_images", "neg_images", "gqa/images")
        self.folders = find_image_folders(images, self.files[0].parent, *default_folders)

    def load_rows(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield the split, the `images` entry and the `annotations` entry of every expression."""
        return chain.from_iterable(map(_read_split, self.files))

    def row_split(self, values: tuple[str, Any, Any]) -> str:
        return values[0]

    def row_entries(self, row: int, values: tuple[str, Any, Any]) -> list[IndexEntry | BadExpression]:
        split, image, _ = values
        if not isinstance(image, dict) or not is_natural_number(image.get("id")):
            raise BadLineError("an entry of 'images' has no id")
        picture = f"gqa:{Path(str(image.get('file_name'))[:200]).stem}"
        return [make_entry(f"image{image['id']}", split, picture, image.get("caption"), row)]

    def make_record(self, row: int, values: tuple[str, Any, Any]) -> Record:
        _, image, annotation = values
        if annotation is None:
            raise BadLineError("it has no annotation")
        size = declared_size(image.get("height"), image.get("width"))
        file = find_named_image(self.folders, image.get("file_name"))
        absent = any(annotation.get(name) is not None for name in ("negative_type", "negative_cate"))
        box = None if absent else box_from_xywh(annotation.get("bbox"))
        extra = {"source_id": image["id"], **short_fields(annotation, *FIELDS)}
        return Record(row, file, size, box, extra=extra, absent=absent)


def _read_split(file: Path) -> Iterator[tuple[str, Any, Any]]:
    data = read_json(file, MAX_JSON_BYTES)
    images, annotations = (data.get(name) if isinstance(data, dict) else None for name in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UsageError(f"{file}: it must hold 'images' and 'annotations', as COCO's files do")
    valid = [
        annotation
        for annotation in annotations
        if isinstance(annotation, dict) and is_natural_number(annotation.get("image_id"))
    ]
    by_image = {annotation["image_id"]: annotation for annotation in valid}
    split = split_from_path(file)
    for image in images:
        id = image.get("id") if isinstance(image, dict) else None
        yield split, image, by_image.get(id) if is_natural_number(id) else None
