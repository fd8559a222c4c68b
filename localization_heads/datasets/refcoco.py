"""RefCOCO, RefCOCO+ and RefCOCOg: the REFER pickles, and the parquet of jxu124 and of lmms-lab; and gRefCOCO.

The pickles (`refs(unc).p` with `instances.json`) are the original form. gRefCOCO is `grefs(unc).json` with COCO's
`instances.json` beside it, and the images of COCO's train2014: as RefCOCO's references, but `ann_id` is a number or a
list, and a reference to nothing has `[-1]` and `no_target`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.lines import check_box
from localization_heads.data.masks import MaskSource, merge_masks
from localization_heads.datasets.base import (
    BadText,
    Entry,
    HeldSource,
    Record,
    box_from_xywh,
    check_box_inside,
    coco_image,
    coco_image_of,
    declared_size,
    entry_or_bad,
    is_number,
    read_list,
)
from localization_heads.datasets.parquet import ParquetSource, image_cell, split_of
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import parse_json, read_json
from localization_heads.store.pickle_parts import Limits
from localization_heads.store.safe_pickle import load_pickle

if TYPE_CHECKING:
    import pyarrow as pa

LIMITS = Limits(instructions=12_000_000, depth=6, kind="a refs file")
"""RefCOCOg, the longest, takes about 6 million instructions."""
MAX_JSON_BYTES = 2 << 30
MAX_CELL = 64 << 20
"""Bytes of JSON in one cell."""
SPLITS = ("train", "val", "test", "testA", "testB")

COCO_FOLDERS = ("", "train2014", "images/train2014", "train2017", "val2017")


def find_coco_image(folder: Path, image: str) -> Path:
    """The file of a COCO image in `folder` or the subfolder it is unpacked into; the first name if there is none.

    All images of RefCOCO, RefCOCO+ and RefCOCOg are of train2014; COCO 2017 holds the same ones under shorter
    names, spread over train2017 and val2017.
    """
    number = int(image.removeprefix("coco:"))
    names = (f"COCO_train2014_{number:012d}.jpg", f"{number:012d}.jpg")
    places = [folder / sub / name for name in names for sub in COCO_FOLDERS]
    return next((place for place in places if place.is_file()), places[0])


class References(HeldSource):
    """References to objects of COCO's images, with `instances.json` beside their file, and the folder of the images."""

    def __init__(self, refs: Path, images: Path) -> None:
        super().__init__([refs, refs.with_name("instances.json")])
        self.images = images

    def row_split(self, ref: object) -> str | None:
        split = ref.get("split") if isinstance(ref, dict) else None
        return split if split in SPLITS else None


class ReferPickles(References):
    """One partition (unc, umd or google) of a data set, with its annotations and the folder of its images."""

    def __init__(self, refs: Path, images: Path, *, standard: str) -> None:
        super().__init__(refs, images)
        partition = refs.name.removeprefix("refs(").removesuffix(").p")
        self.kind = f"{refs.name} with instances.json"
        self.variant = "" if partition == standard else partition
        if self.variant:
            self.notes.append(f"{refs.name} is not the partition that papers report (refs({standard}).p)")
        if partition == "google":
            self.notes.append("the google partition splits objects, not images: val shows images of train")

    def load(self) -> list[Any]:
        refs = load_pickle(self.files[0], LIMITS)
        if not isinstance(refs, list):
            raise UsageError(f"{self.files[0]}: it must hold a list of references")
        return refs

    def entries(self, row: int, ref: object) -> list[Entry | BadText]:
        if not isinstance(ref, dict):
            raise BadLineError("a reference is not a dict")
        if ref.get("split") not in SPLITS:
            raise BadLineError(f"the split {str(ref.get('split'))[:20]!r} is unknown")
        return reference_entries(row, ref["split"], ref)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """The annotation of each row, and the entry of its image; None for one that is not there."""
        refs = [self.held[row] for row in rows]
        wanted = {ref["ann_id"] for ref in refs if is_number(ref.get("ann_id"))}
        images, annotations = read_instances(self.files[1], wanted)
        for row, ref in zip(rows, refs, strict=True):
            annotation = annotations.get(ref["ann_id"]) if is_number(ref.get("ann_id")) else None
            yield row, (annotation, images.get(ref["image_id"]))

    def record(self, row: int, found: tuple[Any, Any]) -> Record:
        ref, (annotation, image) = self.held[row], found
        if annotation is None or image is None:
            missing = "annotation" if annotation is None else "image"
            raise BadLineError(f"instances.json has no such {missing} ({ref.get('ann_id')!r})"[:120])
        if annotation.get("image_id") != ref["image_id"]:
            raise BadLineError("its annotation in instances.json is of another image")
        file = find_coco_image(self.images, coco_image(ref["image_id"]))
        return coco_record(row, file, image, annotation, {"ref_id": ref["ref_id"]})


def reference_entries(row: int, split: str, ref: Mapping[str, Any]) -> list[Entry | BadText]:
    """The expressions of one reference. `sent` is the cleaned text that evaluations use, `raw` what was typed."""
    sentences = ref.get("sentences")
    if not is_number(ref.get("ref_id")) or not isinstance(sentences, list) or not sentences:
        raise BadLineError("a reference needs a ref_id and sentences")
    image = coco_image(ref.get("image_id"))
    name = f"ref{ref['ref_id']}"
    entries: list[Entry | BadText] = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not is_number(sentence.get("sent_id")):
            entries.append(BadText(f"{name}_number{number}", "a sentence needs a sent_id"))
            continue
        text = sentence.get("sent") or sentence.get("raw")
        entries.append(entry_or_bad(f"{name}_sent{sentence['sent_id']}", split, image, text, row))
    return entries


def coco_record(
    row: int, file: Path, image: Mapping[str, Any], annotation: Mapping[str, Any], more: dict[str, Any]
) -> Record:
    """A record from COCO's own entries of an image and an annotation. Raises BadLineError."""
    size = declared_size(image.get("height"), image.get("width"))
    box = box_from_xywh(annotation.get("bbox"))
    check_box_inside(box, size)
    if is_number(annotation.get("id")):
        more = {**more, "ann_id": annotation["id"]}
    return Record(row, file, size, box, segmentation(annotation.get("segmentation")), more=more)


def segmentation(value: object) -> MaskSource | None:
    """Polygons, or the run lengths of a crowd; None where there is nothing. Its content is checked when it is read."""
    if value is None or value == []:
        return None
    if not isinstance(value, list | dict):
        raise BadLineError("the segmentation is neither polygons nor run lengths")
    return value


def read_instances(path: Path, wanted: set[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Images and the wanted annotations by id; of the others nothing is kept while the file is read."""

    def keep(entry: dict[str, Any]) -> dict[str, Any] | None:
        unwanted = "segmentation" in entry and "bbox" in entry and entry.get("id") not in wanted
        return None if unwanted else entry

    data = read_json(path, MAX_JSON_BYTES, object_hook=keep)
    if not isinstance(data, dict) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations")
    ):
        raise UsageError(f"{path}: it must hold 'images' and 'annotations', as COCO's files do")
    return _by_id(data["images"]), _by_id(data["annotations"])


def _by_id(entries: Sequence[object]) -> dict[int, Any]:
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and is_number(entry.get("id"))}


class JxuParquet(ParquetSource):
    """`jxu124/refcoco*`, with the folder of COCO's images."""

    kind = "parquet of jxu124"
    index_columns = ("ref_id", "image_id", "sentences")
    record_columns = ("ref_id", "image_id", "raw_anns", "raw_image_info", "bbox")

    def __init__(self, files: Sequence[Path], images: Path, dataset: str) -> None:
        super().__init__(files)
        self.images = images
        self.has_testa = dataset != "refcocog"

    def split(self, file: Path) -> str:
        split = split_of(file)
        return "testA" if split == "test" and self.has_testa else split

    def entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[Entry | BadText]:
        split, cells = values
        return reference_entries(row, split, cells)

    def record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        annotation = _json_cell(cells["raw_anns"], "raw_anns")
        image = _json_cell(cells["raw_image_info"], "raw_image_info")
        file = find_coco_image(self.images, coco_image(cells["image_id"]))
        found = coco_record(row, file, image, annotation, {"ref_id": cells["ref_id"]})
        _check_same(check_box(cells["bbox"]), found.box)
        return found


def _json_cell(value: object, name: str) -> dict[str, Any]:
    """The object in a column of JSON texts. BadLineError, naming the column, for anything else."""
    if not isinstance(value, str) or len(value) > MAX_CELL:
        raise BadLineError(f"{name} is not text")
    try:
        parsed = parse_json(value.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise BadLineError(f"{name}: {error}") from error
    if not isinstance(parsed, dict):
        raise BadLineError(f"{name} is not a JSON object")
    return parsed


def _check_same(column: Sequence[float], annotation: Sequence[float] | None) -> None:
    """The two boxes of a row say the same if the column is xyxy, as it should be."""
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

    def entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[Entry | BadText]:
        split, cells = values
        answers = cells["answer"]
        if not isinstance(answers, list) or not answers:
            raise BadLineError("answer must be the list of its expressions")
        image = coco_image_of(cells["file_name"])
        if image is None:
            raise BadLineError("file_name is none of COCO's")
        return [entry_or_bad(f"row{row}_sent{n}", split, image, text, row) for n, text in enumerate(answers)]

    def record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.to_pylist()[0]
        polygon = cells["segmentation"]
        return Record(
            row,
            image_cell(cells["image"]),
            box=box_from_xywh(cells["bbox"]),
            mask=[polygon] if isinstance(polygon, list) and polygon else None,
            more={"file_name": cells["file_name"]},
        )


MOST_TARGETS = 1000


class GRefCoco(References):
    kind = "grefs(unc).json with instances.json"
    protocol = "grefcoco"

    def load(self) -> list[Any]:
        return read_list(self.files[0])

    def entries(self, row: int, ref: object) -> list[Entry | BadText]:
        if not isinstance(ref, dict) or ref.get("split") not in SPLITS:
            raise BadLineError("a reference is not an object with a known split")
        targets_of(ref)
        return reference_entries(row, ref["split"], ref)

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, tuple[list[Any], Any]]]:
        """The annotations of each row's targets, None for one that is not there, and the entry of its image."""
        refs = [self.held[row] for row in rows]
        images, annotations = read_instances(self.files[1], {id for ref in refs for id in targets_of(ref)})
        for row, ref in zip(rows, refs, strict=True):
            yield row, ([annotations.get(id) for id in targets_of(ref)], images.get(ref["image_id"]))

    def record(self, row: int, found: tuple[list[Any], Any]) -> Record:
        ref, (annotations, image) = self.held[row], found
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
        whole = boxes and len(known) == len(boxes)  # of some alone it is not the truth
        mask = merge_masks(known) if whole else None
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
