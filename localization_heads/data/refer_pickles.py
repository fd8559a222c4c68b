"""`refs(unc).p`, `refs(umd).p` or `refs(google).p` with `instances.json`: RefCOCO as its authors hand it out.

The layout is that of https://github.com/lichengunc/refer (refer.py, class REFER): the pickle is a list of
`{"ref_id", "ann_id", "image_id", "category_id", "split", "file_name", "sent_ids", "sentences": [{"sent_id", "sent",
"raw", "tokens"}]}`; `instances.json` holds `images` (`id`, `width`, `height`) and `annotations` (`id`, `bbox` as
xywh, `segmentation`), joined by `ann_id`. The pickle's `file_name` ends with the annotation's number and names no
file; the picture is COCO's of `image_id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.data.jsonl import BadEntry, BadLineError
from localization_heads.data.masks import MaskSource
from localization_heads.data.reference import (
    BadRecord,
    Entry,
    Index,
    Record,
    box_from_xywh,
    check_inside,
    coco_picture,
    expression,
    find_coco_image,
    is_number,
    picture_size,
)
from localization_heads.errors import UsageError
from localization_heads.store.json_files import read_json
from localization_heads.store.pickle_budget import Limits
from localization_heads.store.safe_pickle import load_pickle

LIMITS = Limits(instructions=12_000_000, depth=6, kind="a refs file")
"""RefCOCOg, the longest, takes about 6 million instructions."""

MAX_JSON_BYTES = 2 << 30
SPLITS = ("train", "val", "test", "testA", "testB")


class ReferPickles:
    """One partition (unc, umd or google) of a data set, with its annotations and the folder of its pictures."""

    variant: str
    kind: str

    def __init__(self, refs: Path, images: Path, *, standard: str) -> None:
        partition = refs.name.removeprefix("refs(").removesuffix(").p")
        self.refs, self.instances, self.images = refs, refs.with_name("instances.json"), images
        self.kind = f"{refs.name} with instances.json"
        self.variant = "" if partition == standard else partition
        self.files = [self.refs, self.instances]
        self.notes = []
        if self.variant:
            self.notes.append(f"{refs.name} is not the partition that papers report (refs({standard}).p)")
        if partition == "google":
            self.notes.append(
                "the google partition splits objects, not pictures: val shows pictures of train"
            )
        self._rows: list[Any] = []

    def index(self) -> Index:
        rows = load_pickle(self.refs, LIMITS)
        if not isinstance(rows, list):
            raise UsageError(f"{self.refs}: it must hold a list of references")
        self._rows = rows
        entries: list[Entry] = []
        bad: list[BadEntry] = []
        for number, ref in enumerate(rows):
            try:
                entries += _entries(ref, number)
            except BadLineError as error:
                bad.append(BadEntry(number + 1, "", str(error)))
        return Index(entries, bad)

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        wanted = {self._rows[row]["ann_id"] for row in rows if is_number(self._rows[row].get("ann_id"))}
        images, annotations = _read_instances(self.instances, wanted)
        for row in rows:
            try:
                yield self._record(row, images, annotations)
            except BadLineError as error:
                yield BadRecord(row, str(error))

    def _record(self, row: int, images: Mapping[int, Any], annotations: Mapping[int, Any]) -> Record:
        ref = self._rows[row]
        annotation = annotations.get(ref["ann_id"]) if is_number(ref.get("ann_id")) else None
        image = images.get(ref["image_id"])
        if annotation is None or image is None:
            missing = "annotation" if annotation is None else "picture"
            raise BadLineError(f"instances.json has no such {missing} ({ref.get('ann_id')!r})"[:120])
        if annotation.get("image_id") != ref["image_id"]:
            raise BadLineError("its annotation in instances.json is of another picture")
        file = find_coco_image(self.images, coco_picture(ref["image_id"]))
        return coco_record(row, file, image, annotation, {"ref_id": ref["ref_id"]})


def coco_record(
    row: int, file: Path, image: Mapping[str, Any], annotation: Mapping[str, Any], more: dict[str, Any]
) -> Record:
    """A record from COCO's own entries of a picture and an annotation. Raises BadLineError."""
    size = picture_size(image.get("height"), image.get("width"))
    box = box_from_xywh(annotation.get("bbox"))
    check_inside(box, size)
    if is_number(annotation.get("id")):
        more = {**more, "ann_id": annotation["id"]}
    return Record(row, file, size, box, _segmentation(annotation.get("segmentation")), more=more)


def _segmentation(value: object) -> MaskSource | None:
    """Polygons, or the run lengths of a crowd; None where there is nothing. Its content is checked when it is read."""
    if value is None or value == []:
        return None
    if not isinstance(value, list | dict):
        raise BadLineError("the segmentation is neither polygons nor run lengths")
    return value


def _entries(ref: object, row: int) -> list[Entry]:
    """The expressions of one reference. `sent` is the cleaned text that evaluations use, `raw` what was typed."""
    if not isinstance(ref, dict):
        raise BadLineError("a reference is not a dict")
    sentences = ref.get("sentences")
    if not is_number(ref.get("ref_id")) or not isinstance(sentences, list) or not sentences:
        raise BadLineError("a reference needs a ref_id and sentences")
    if ref.get("split") not in SPLITS:
        raise BadLineError(f"the split {str(ref.get('split'))[:20]!r} is unknown")
    picture = coco_picture(ref.get("image_id"))
    return [
        Entry(id, ref["split"], picture, text, row) for id, text in sentence_ids(ref["ref_id"], sentences)
    ]


def sentence_ids(ref_id: int, sentences: Sequence[object]) -> Iterator[tuple[str, str]]:
    """The id `ref<ref_id>_sent<sent_id>` and the text of each sentence of a reference. Raises BadLineError."""
    for sentence in sentences:
        if not isinstance(sentence, dict) or not is_number(sentence.get("sent_id")):
            raise BadLineError("a sentence needs a sent_id")
        yield (
            f"ref{ref_id}_sent{sentence['sent_id']}",
            expression(sentence.get("sent") or sentence.get("raw")),
        )


def _read_instances(path: Path, wanted: set[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Pictures and the wanted annotations by id; of the others nothing is kept while the file is read."""

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
