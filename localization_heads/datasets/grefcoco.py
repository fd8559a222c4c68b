"""gRefCOCO: `grefs(unc).json` with COCO's `instances.json` beside it, and the images of COCO's train2014.

As RefCOCO's references, but `ann_id` is a number or a list, and a reference to nothing has `[-1]` and `no_target`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.data.masks import union_of
from localization_heads.datasets.files import read_list
from localization_heads.datasets.refcoco import (
    SPLITS,
    coco_record,
    find_coco_image,
    read_instances,
    reference_entries,
    segmentation,
)
from localization_heads.datasets.reference import (
    BadText,
    Entry,
    Record,
    Source,
    box_from_xywh,
    check_box_inside,
    coco_image,
    declared_size,
    is_number,
)
from localization_heads.errors import BadLineError

MOST_TARGETS = 1000


class GRefCoco(Source):
    kind = "grefs(unc).json with instances.json"
    protocol = "grefcoco"

    def __init__(self, refs: Path, images: Path) -> None:
        super().__init__([refs, refs.with_name("instances.json")])
        self.images = images
        self._refs: list[Any] = []

    def rows(self) -> list[Any]:
        self._refs = read_list(self.files[0])
        return self._refs

    def row_split(self, ref: object) -> str | None:
        split = ref.get("split") if isinstance(ref, dict) else None
        return split if split in SPLITS else None

    def entries(self, row: int, ref: object) -> list[Entry | BadText]:
        if not isinstance(ref, dict) or ref.get("split") not in SPLITS:
            raise BadLineError("a reference is not an object with a known split")
        targets_of(ref)
        return reference_entries(row, ref["split"], ref)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[list[Any], Any]]]:
        """The annotations of each row's targets, None for one that is not there, and the entry of its image."""
        refs = [self._refs[row] for row in rows]
        images, annotations = read_instances(self.files[1], {id for ref in refs for id in targets_of(ref)})
        for row, ref in zip(rows, refs, strict=True):
            yield row, ([annotations.get(id) for id in targets_of(ref)], images.get(ref["image_id"]))

    def record(self, row: int, found: tuple[list[Any], Any]) -> Record:
        ref, (annotations, image) = self._refs[row], found
        if image is None or None in annotations:
            raise BadLineError("instances.json has not all of its annotations, or not its image")
        if any(annotation.get("image_id") != ref["image_id"] for annotation in annotations):
            raise BadLineError("an annotation of its in instances.json is of another image")
        file = find_coco_image(self.images, coco_image(ref["image_id"]))
        more = {"ref_id": ref["ref_id"]}
        if len(annotations) == 1:
            return coco_record(row, file, image, annotations[0], more)
        size = declared_size(image.get("height"), image.get("width"))
        boxes = tuple(box_from_xywh(annotation.get("bbox")) for annotation in annotations)
        for box in boxes:
            check_box_inside(box, size)
        masks = [segmentation(annotation.get("segmentation")) for annotation in annotations]
        known = [mask for mask in masks if mask is not None]
        mask = (
            union_of(known) if boxes and len(known) == len(boxes) else None
        )  # of some alone it is not the truth
        return Record(row, file, size, mask=mask, boxes=boxes, absent=not boxes, more=more)


def targets_of(ref: Mapping[str, Any]) -> list[int]:
    """The ids of the annotations that a reference means; none for `-1` and `[-1]`. BadLineError for anything else.

    >>> targets_of({"ann_id": 7}), targets_of({"ann_id": [7, 8]}), targets_of({"ann_id": [-1], "no_target": True})
    ([7], [7, 8], [])
    """
    value = ref.get("ann_id")
    ids: list[Any] = value if isinstance(value, list) else [value]
    nothing = ids == [-1]
    if not nothing and not (0 < len(ids) <= MOST_TARGETS and all(is_number(id) for id in ids)):
        raise BadLineError("ann_id must be a number, a list of numbers, or [-1] for no target")
    if isinstance(ref.get("no_target"), bool) and ref["no_target"] != nothing:
        raise BadLineError("no_target contradicts ann_id")
    return [] if nothing else list(dict.fromkeys(ids))
