"""RefCOCO, RefCOCO+ and RefCOCOg, as REFER pickles or as Parquet of jxu124 or lmms-lab; and gRefCOCO.

The pickles (`refs(unc).p` with `instances.json`) are the original format. gRefCOCO is `grefs(unc).json` with COCO's
`instances.json` beside it and the images of COCO's train2014. Its references are like RefCOCO's, except that `ann_id`
is a number or a list, and a reference to nothing has `[-1]` and `no_target`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.lines import check_box
from localization_heads.data.masks import MaskSource, merge_masks
from localization_heads.datasets.base import (
    BadExpression,
    IndexEntry,
    InMemorySource,
    Record,
    box_from_xywh,
    check_box_inside,
    coco_picture,
    coco_picture_from_name,
    declared_size,
    is_natural_number,
    make_entry,
    read_json_list,
)
from localization_heads.datasets.parquet import ParquetSource, image_bytes, split_from_path
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import parse_json, read_json
from localization_heads.store.pickle_parts import Limits
from localization_heads.store.safe_pickle import load_pickle

if TYPE_CHECKING:
    import pyarrow as pa

LIMITS = Limits(instructions=12_000_000, depth=6, kind="a refs file")
"""RefCOCOg, the largest, takes about 6 million instructions."""
MAX_JSON_BYTES = 2 << 30
MAX_CELL = 64 << 20
"""Characters of JSON in one cell."""
SPLITS = ("train", "val", "test", "testA", "testB")

COCO_FOLDERS = ("", "train2014", "images/train2014", "train2017", "val2017")


def find_coco_image(folder: Path, image: str) -> Path:
    """The file of a COCO image in `folder` or a usual subfolder; the first candidate if none exists.

    All images of RefCOCO, RefCOCO+ and RefCOCOg are from train2014. COCO 2017 has the same images under shorter names,
    split between train2017 and val2017.
    """
    number = int(image.removeprefix("coco:"))
    names = (f"COCO_train2014_{number:012d}.jpg", f"{number:012d}.jpg")
    candidates = [folder / sub / name for name in names for sub in COCO_FOLDERS]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


class CocoReferences(InMemorySource):
    """References to objects in COCO images, with `instances.json` beside their file, and the folder of the images."""

    def __init__(self, refs: Path, images: Path) -> None:
        super().__init__([refs, refs.with_name("instances.json")])
        self.images = images

    def row_split(self, ref: object) -> str | None:
        split = ref.get("split") if isinstance(ref, dict) else None
        return split if split in SPLITS else None


class ReferPickles(CocoReferences):
    """One partition (unc, umd or google) of RefCOCO, RefCOCO+ or RefCOCOg as REFER pickles."""

    def __init__(self, refs: Path, images: Path, *, standard: str) -> None:
        super().__init__(refs, images)
        partition = refs.name.removeprefix("refs(").removesuffix(").p")
        self.kind = f"{refs.name} with instances.json"
        self.variant = "" if partition == standard else partition
        if self.variant:
            self.notes.append(f"{refs.name} is not the partition that papers report (refs({standard}).p)")
        if partition == "google":
            self.notes.append("the google partition splits objects, not images: val shows images of train")

    def load_rows(self) -> list[Any]:
        refs = load_pickle(self.files[0], LIMITS)
        if not isinstance(refs, list):
            raise UsageError(f"{self.files[0]}: it must hold a list of references")
        return refs

    def row_entries(self, row: int, ref: object) -> list[IndexEntry | BadExpression]:
        if not isinstance(ref, dict):
            raise BadLineError("a reference is not a dict")
        if ref.get("split") not in SPLITS:
            raise BadLineError(f"the split {str(ref.get('split'))[:20]!r} is unknown")
        return reference_entries(row, ref["split"], ref)

    def read_rows(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """Yield the annotation and the image entry of each row, None where missing."""
        refs = [self.loaded[row] for row in rows]
        annotation_ids = {ref["ann_id"] for ref in refs if is_natural_number(ref.get("ann_id"))}
        images, annotations = read_instances(self.files[1], annotation_ids)
        for row, ref in zip(rows, refs, strict=True):
            annotation = annotations.get(ref["ann_id"]) if is_natural_number(ref.get("ann_id")) else None
            yield row, (annotation, images.get(ref["image_id"]))

    def make_record(self, row: int, values: tuple[Any, Any]) -> Record:
        ref, (annotation, image) = self.loaded[row], values
        if annotation is None or image is None:
            missing = "annotation" if annotation is None else "image"
            raise BadLineError(f"instances.json has no such {missing} ({ref.get('ann_id')!r})"[:120])
        if annotation.get("image_id") != ref["image_id"]:
            raise BadLineError("its annotation in instances.json is of another image")
        file = find_coco_image(self.images, coco_picture(ref["image_id"]))
        return coco_record(row, file, image, annotation, {"ref_id": ref["ref_id"]})


def reference_entries(row: int, split: str, ref: Mapping[str, Any]) -> list[IndexEntry | BadExpression]:
    """The expressions of a reference. `sent` is the cleaned text used in evaluations, `raw` the text as typed."""
    sentences = ref.get("sentences")
    if not is_natural_number(ref.get("ref_id")) or not isinstance(sentences, list) or not sentences:
        raise BadLineError("a reference needs a ref_id and sentences")
    image = coco_picture(ref.get("image_id"))
    name = f"ref{ref['ref_id']}"
    entries: list[IndexEntry | BadExpression] = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not is_natural_number(sentence.get("sent_id")):
            entries.append(BadExpression(f"{name}_number{number}", "a sentence needs a sent_id"))
            continue
        text = sentence.get("sent") or sentence.get("raw")
        entries.append(make_entry(f"{name}_sent{sentence['sent_id']}", split, image, text, row))
    return entries


def coco_record(
    row: int, file: Path, image: Mapping[str, Any], annotation: Mapping[str, Any], extra: dict[str, Any]
) -> Record:
    """A record from COCO's entries for an image and an annotation. Raises BadLineError."""
    size = declared_size(image.get("height"), image.get("width"))
    box = box_from_xywh(annotation.get("bbox"))
    check_box_inside(box, size)
    if is_natural_number(annotation.get("id")):
        extra = {**extra, "ann_id": annotation["id"]}
    return Record(row, file, size, box, parse_segmentation(annotation.get("segmentation")), extra=extra)


def parse_segmentation(value: object) -> MaskSource | None:
    """Polygons, or RLE for a crowd; None if empty. The content is checked when the mask is decoded."""
    if value is None or value == []:
        return None
    if not isinstance(value, list | dict):
        raise BadLineError("the segmentation is neither polygons nor RLE")
    return value


def read_instances(path: Path, annotation_ids: set[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Images and the requested annotations, by id. Other annotations are dropped while parsing, to save memory."""

    def keep(entry: dict[str, Any]) -> dict[str, Any] | None:
        unwanted = "segmentation" in entry and "bbox" in entry and entry.get("id") not in annotation_ids
        return None if unwanted else entry

    data = read_json(path, MAX_JSON_BYTES, object_hook=keep)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise UsageError(f"{path}: it must hold 'images' and 'annotations', as COCO's files do")
    return _index_by_id(data["images"]), _index_by_id(data["annotations"])


def _index_by_id(entries: Sequence[object]) -> dict[int, Any]:
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and is_natural_number(entry.get("id"))}


class JxuParquet(ParquetSource):
    """`jxu124/refcoco*`, with the folder of COCO's images."""

    kind = "parquet of jxu124"
    index_columns = ("ref_id", "image_id", "sentences")
    record_columns = ("ref_id", "image_id", "raw_anns", "raw_image_info", "bbox")

    def __init__(self, files: Sequence[Path], images: Path, dataset: str) -> None:
        super().__init__(files)
        self.images = images
        self.has_testa = dataset != "refcocog"

    def file_split(self, file: Path) -> str:
        split = split_from_path(file)
        return "testA" if split == "test" and self.has_testa else split

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        return reference_entries(row, split, cells)

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        annotation = _parse_json_cell(cells["raw_anns"], "raw_anns")
        image = _parse_json_cell(cells["raw_image_info"], "raw_image_info")
        file = find_coco_image(self.images, coco_picture(cells["image_id"]))
        record = coco_record(row, file, image, annotation, {"ref_id": cells["ref_id"]})
        _check_same_box(check_box(cells["bbox"]), record.box)
        return record


def _parse_json_cell(value: object, name: str) -> dict[str, Any]:
    """Parse the JSON object in a cell. BadLineError, naming the column, if it is invalid."""
    if not isinstance(value, str) or len(value) > MAX_CELL:
        raise BadLineError(f"{name} is not text")
    try:
        parsed = parse_json(value.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise BadLineError(f"{name}: {error}") from error
    if not isinstance(parsed, dict):
        raise BadLineError(f"{name} is not a JSON object")
    return parsed


def _check_same_box(column: Sequence[float], annotation: Sequence[float] | None) -> None:
    """BadLineError if a row's two boxes differ, which happens if the column is not xyxy."""
    if annotation is None or max(abs(a - b) for a, b in zip(column, annotation, strict=True)) > 1:
        raise BadLineError("the columns bbox (xyxy) and raw_anns.bbox (xywh) are not the same box")


_LMMS_VAL = {"refcoco": "8,811 rows, UNC's has 3,811", "refcocog": "7,573 rows, UMD's has 2,573"}


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

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        answers = cells["answer"]
        if not isinstance(answers, list) or not answers:
            raise BadLineError("answer must be the list of its expressions")
        image = coco_picture_from_name(cells["file_name"])
        if image is None:
            raise BadLineError("file_name is none of COCO's")
        return [make_entry(f"row{row}_sent{n}", split, image, text, row) for n, text in enumerate(answers)]

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        polygon = cells["segmentation"]
        return Record(
            row,
            image_bytes(cells["image"]),
            box=box_from_xywh(cells["bbox"]),
            mask=[polygon] if isinstance(polygon, list) and polygon else None,
            extra={"file_name": cells["file_name"]},
        )


MAX_TARGETS = 1000


class GRefCoco(CocoReferences):
    """gRefCOCO, whose expressions refer to any number of objects, or to none."""

    kind = "grefs(unc).json with instances.json"
    protocol = "grefcoco"

    def load_rows(self) -> list[Any]:
        return read_json_list(self.files[0])

    def row_entries(self, row: int, ref: object) -> list[IndexEntry | BadExpression]:
        if not isinstance(ref, dict) or ref.get("split") not in SPLITS:
            raise BadLineError("a reference is not an object with a known split")
        target_ids(ref)  # raises if they are invalid
        return reference_entries(row, ref["split"], ref)

    def read_rows(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[list[Any], Any]]]:
        """Yield the annotations of each row's targets and its image entry, None where missing."""
        refs = [self.loaded[row] for row in rows]
        images, annotations = read_instances(self.files[1], {id for ref in refs for id in target_ids(ref)})
        for row, ref in zip(rows, refs, strict=True):
            yield row, ([annotations.get(id) for id in target_ids(ref)], images.get(ref["image_id"]))

    def make_record(self, row: int, values: tuple[list[Any], Any]) -> Record:
        ref, (annotations, image) = self.loaded[row], values
        if image is None or None in annotations:
            raise BadLineError("instances.json lacks its image or one of its annotations")
        if any(annotation.get("image_id") != ref["image_id"] for annotation in annotations):
            raise BadLineError("one of its annotations in instances.json is of another image")
        file = find_coco_image(self.images, coco_picture(ref["image_id"]))
        extra = {"ref_id": ref["ref_id"]}
        if len(annotations) == 1:
            return coco_record(row, file, image, annotations[0], extra)
        size = declared_size(image.get("height"), image.get("width"))
        boxes = tuple(box_from_xywh(annotation.get("bbox")) for annotation in annotations)
        for box in boxes:
            check_box_inside(box, size)
        masks = [parse_segmentation(annotation.get("segmentation")) for annotation in annotations]
        present = [mask for mask in masks if mask is not None]
        is_complete = boxes and len(present) == len(boxes)  # a union of only some would be wrong
        mask = merge_masks(present) if is_complete else None
        return Record(row, file, size, mask=mask, boxes=boxes, absent=not boxes, extra=extra)


def target_ids(ref: Mapping[str, Any]) -> list[int]:
    """The annotation ids of a reference's targets; empty for `-1` and `[-1]`. BadLineError if they are invalid.

    >>> target_ids({"ann_id": 7}), target_ids({"ann_id": [7, 8]}), target_ids({"ann_id": [-1], "no_target": True})
    ([7], [7, 8], [])
    """
    value = ref.get("ann_id")
    ids: list[Any] = value if isinstance(value, list) else [value]
    no_target = ids == [-1]
    if not no_target and not (0 < len(ids) <= MAX_TARGETS and all(is_natural_number(id) for id in ids)):
        raise BadLineError("ann_id must be a number, a list of numbers, or [-1] for no target")
    if isinstance(ref.get("no_target"), bool) and ref["no_target"] != no_target:
        raise BadLineError("no_target contradicts ann_id")
    return [] if no_target else list(dict.fromkeys(ids))
