"""What all benchmarks share, records (objects in images) and the expressions that refer to them; and the REFER pickles.

A source is read in two steps, so that drawing a thousand expressions out of a hundred thousand costs no more than
those: `index` lists every expression without its image and mask, `records` then reads only the chosen rows. The
pickles (`refs(unc).p` with `instances.json`) are the original form of RefCOCO, RefCOCO+ and RefCOCOg.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from localization_heads.attention import Box, misses_image
from localization_heads.data.masks import MaskSource
from localization_heads.data.samples import check_box
from localization_heads.errors import BadEntry, BadLineError, UsageError
from localization_heads.store.files import read_json
from localization_heads.store.pickle_parts import Limits
from localization_heads.store.safe_pickle import load_pickle

MAX_TEXT = 2000
"""Longest expression, in characters."""


class Entry(NamedTuple):
    """One expression of a benchmark.

    Args:
        id: a file name, unique in its split.
        picture: the image's name in every data set that shows it, such as `coco:581857`.
        row: which record of the source it refers to.
    """

    id: str
    split: str
    picture: str
    text: str
    row: int


@dataclass(frozen=True)
class Index:
    """Every expression of a source in the order of its files, and the rows without a usable one."""

    entries: list[Entry]
    bad: list[BadEntry]


@dataclass(frozen=True)
class Record:
    """The object that a row's expressions refer to.

    Args:
        image: the image's file, or its bytes where they are inside the source.
        size: `(W, H)` in pixels according to the source; None if it does not say.
        box: xyxy in pixels, None where the source has none.
        mask: as `read_mask` takes it.
        ignore: pixels that are left out when masks are scored.
        more: further fields of the JSON line.
    """

    row: int
    image: Path | bytes
    size: tuple[int, int] | None = None
    box: Box | None = None
    mask: MaskSource | None = field(default=None, repr=False)
    ignore: MaskSource | None = field(default=None, repr=False)
    more: dict[str, Any] = field(default_factory=dict)


class BadRecord(NamedTuple):
    """A row that cannot be used, and why."""

    row: int
    reason: str


class Source(Protocol):
    """A benchmark on disk, in one of its published forms.

    Args:
        kind: its form, in words.
        variant: "" for the standard splits, else the name of others (`google`, `lmms`).
        files: every file that decides the output, except images.
        notes: remarks for the user on this source.
    """

    kind: str
    variant: str
    files: list[Path]
    notes: list[str]

    def index(self) -> Index:
        """Raises UsageError where the source as a whole cannot be read."""
        ...

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        """The records of these rows, in ascending order."""
        ...


def coco_image(image_id: object) -> str:
    """The name of a COCO image, from its number. BadLineError for anything else."""
    if not is_number(image_id) or image_id >= 10**12:  # type: ignore[operator]
        raise BadLineError("image_id must be a whole number")
    return f"coco:{image_id}"


def coco_image_of(file_name: object) -> str | None:
    """The image of a COCO 2014 file name, which may end with an annotation's number; else None.

    >>> coco_image_of("COCO_train2014_000000581857_16.jpg")
    'coco:581857'
    """
    pattern = r"COCO_(?:train|val)2014_(\d{12})(?:_\d{1,12})?\.\w{3,4}"
    match = re.fullmatch(pattern, file_name) if isinstance(file_name, str) else None
    return f"coco:{int(match[1])}" if match else None


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


def is_number(value: object) -> bool:
    """A whole number from 0 on, of at most 18 digits; ids are."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18


def expression(value: object) -> str:
    """An expression on one line, without spaces at its ends. BadLineError for an empty one, or one that is not text."""
    if not isinstance(value, str):
        raise BadLineError("an expression is not text")
    text = " ".join(value.split())
    if not text:
        raise BadLineError("an expression is empty")
    if len(text) > MAX_TEXT or not text.isprintable():
        raise BadLineError("an expression is endless or not printable")
    return text


def box_from_xywh(value: object) -> Box:
    """COCO's `[x, y, width, height]` as xyxy. BadLineError for anything but a box in pixels.

    >>> box_from_xywh([10, 20, 30, 40.5])
    (10.0, 20.0, 40.0, 60.5)
    """
    x, y, width, height = _four_numbers(value)
    return check_box([x, y, x + width, y + height])


def box_from_xyxy(value: object) -> Box:
    """As `box_from_xywh`, for `[x0, y0, x1, y1]`."""
    return check_box(list(_four_numbers(value)))


def _four_numbers(value: object) -> tuple[float, float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise BadLineError("the box does not have four numbers")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value):
        raise BadLineError("the box holds something that is no number")
    x, y, z, w = (float(n) for n in value)
    return x, y, z, w


def check_box_inside(box: Box, size: tuple[int, int]) -> None:
    """BadLineError if the box lies outside its image of `(W, H)` pixels: they cannot belong together."""
    if misses_image(box, size):
        raise BadLineError(f"the box lies outside the image, which is {size[0]} x {size[1]} pixels")


def declared_size(height: object, width: object) -> tuple[int, int]:
    """`(W, H)`, checked to be whole numbers from 1 on. Raises BadLineError."""
    if not is_number(height) or not is_number(width) or not height or not width:
        raise BadLineError("the image's height and width must be whole numbers of pixels")
    return int(width), int(height)  # type: ignore[call-overload]


LIMITS = Limits(instructions=12_000_000, depth=6, kind="a refs file")
"""RefCOCOg, the longest, takes about 6 million instructions."""

MAX_JSON_BYTES = 2 << 30
SPLITS = ("train", "val", "test", "testA", "testB")


class ReferPickles:
    """One partition (unc, umd or google) of a data set, with its annotations and the folder of its images."""

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
            self.notes.append("the google partition splits objects, not images: val shows images of train")
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
            missing = "annotation" if annotation is None else "image"
            raise BadLineError(f"instances.json has no such {missing} ({ref.get('ann_id')!r})"[:120])
        if annotation.get("image_id") != ref["image_id"]:
            raise BadLineError("its annotation in instances.json is of another image")
        file = find_coco_image(self.images, coco_image(ref["image_id"]))
        return coco_record(row, file, image, annotation, {"ref_id": ref["ref_id"]})


def coco_record(
    row: int, file: Path, image: Mapping[str, Any], annotation: Mapping[str, Any], more: dict[str, Any]
) -> Record:
    """A record from COCO's own entries of an image and an annotation. Raises BadLineError."""
    size = declared_size(image.get("height"), image.get("width"))
    box = box_from_xywh(annotation.get("bbox"))
    check_box_inside(box, size)
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
    image = coco_image(ref.get("image_id"))
    return [Entry(id, ref["split"], image, text, row) for id, text in sentence_ids(ref["ref_id"], sentences)]


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
