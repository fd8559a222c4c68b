"""FineCops-Ref: `<split>_expression_all_coco_format.json`, images of GQA, and edited ones in `final_neg_images`.

COCO's form with one entry of `images` for each expression: `id`, `file_name`, `height`, `width`, `caption`. Its entry
of `annotations` (by `image_id`) has `bbox` (xywh), `level`, and of negatives `negative_type`, `negative_level`,
`negative_cate` (text or image), and `positive_id`, the `id` of what it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localization_heads.datasets.files import MAX_JSON_BYTES, image_folders, named_image, short_fields
from localization_heads.datasets.parquet import split_of
from localization_heads.datasets.reference import (
    BadText,
    Entry,
    Record,
    Source,
    box_from_xywh,
    declared_size,
    entry_or_bad,
    is_number,
)
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import read_json

FIELDS = ("level", "negative_type", "negative_level", "negative_cate", "positive_id", "tuple_type")


class FineCopsRef(Source):
    """Files in COCO's form, one for each split."""

    kind = "JSON in COCO's form"
    protocol = "finecops-ref"

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        super().__init__(sorted(files))
        usual = ("images", "gqa", "final_neg_images", "neg_images", "gqa/images")
        self.folders = image_folders(images, self.files[0].parent, *usual)
        self._rows: list[tuple[str, Any, Any]] = []

    def rows(self) -> list[tuple[str, Any, Any]]:
        """The split, the entry of `images` and that of `annotations` of every expression."""
        self._rows = [row for file in self.files for row in _read(file)]
        return self._rows

    def row_split(self, values: tuple[str, Any, Any]) -> str:
        return values[0]

    def entries(self, row: int, values: tuple[str, Any, Any]) -> list[Entry | BadText]:
        split, image, _ = values
        if not isinstance(image, dict) or not is_number(image.get("id")):
            raise BadLineError("an entry of 'images' has no id")
        picture = f"gqa:{Path(str(image.get('file_name'))[:200]).stem}"
        return [entry_or_bad(f"image{image['id']}", split, picture, image.get("caption"), row)]

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[str, Any, Any]]]:
        return ((row, self._rows[row]) for row in rows)

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
    parts = [data.get(name) if isinstance(data, dict) else None for name in ("images", "annotations")]
    images, annotations = parts
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UsageError(f"{file}: it must hold 'images' and 'annotations', as COCO's files do")
    known = [one for one in annotations if isinstance(one, dict) and is_number(one.get("image_id"))]
    by_image = {one["image_id"]: one for one in known}
    split = split_of(file)
    for image in images:
        id = image.get("id") if isinstance(image, dict) else None
        yield split, image, by_image.get(id) if is_number(id) else None
