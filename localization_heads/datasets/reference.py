"""What all benchmarks share: records (objects in images), the expressions that refer to them, and the files they name.

A source is read in two steps, so that drawing a thousand expressions out of a hundred thousand costs no more than
those: `index` lists every expression without its image and mask, `records` then reads only the chosen rows.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from localization_heads.attention import Box, is_outside_image
from localization_heads.data.lines import check_box
from localization_heads.data.masks import MaskSource
from localization_heads.errors import BadEntry, BadLineError, UsageError, shown
from localization_heads.store.files import read_json

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


class BadText(NamedTuple):
    """An expression of a row that cannot be used. The others of the row can.

    Args:
        id: its name, as that of an `Entry`.
    """

    id: str
    reason: str


class Bad(NamedTuple):
    """What cannot be used: a row, or an expression of one.

    Args:
        line, id, reason: as of a `BadEntry`.
        split: None where it is unknown.
    """

    line: int
    id: str
    reason: str
    split: str | None


@dataclass(frozen=True)
class Index:
    """Every expression of a source in the order of its files, and what cannot be used: whole rows, or expressions."""

    entries: list[Entry]
    bad: list[Bad]

    def bad_of(self, split: str) -> list[BadEntry]:
        """What cannot be used of a split, and what may belong to it: the rows whose split is unknown."""
        return [BadEntry(*bad[:3]) for bad in self.bad if bad.split in (None, split)]


@dataclass(frozen=True)
class Record:
    """The object that a row's expressions refer to.

    Args:
        image: the image's file, or its bytes where they are inside the source.
        size: `(W, H)` in pixels according to the source; None if it does not say.
        box: xyxy in pixels, None where the source has none.
        mask: as `read_mask` takes it; of several objects, their masks.
        ignore: pixels that are left out when masks are scored.
        more: further fields of the JSON line.
        boxes: of an expression that refers to several objects; then `box` is None.
        absent: the expressions refer to nothing in the image.
    """

    row: int
    image: Path | bytes
    size: tuple[int, int] | None = None
    box: Box | None = None
    mask: MaskSource | None = field(default=None, repr=False)
    ignore: MaskSource | None = field(default=None, repr=False)
    more: dict[str, Any] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()
    absent: bool = False


class BadRecord(NamedTuple):
    """A row that cannot be used, and why."""

    row: int
    reason: str


class Source(ABC):
    """A benchmark on disk, in one of its published forms: `kind`, in words.

    Args:
        files: every file that decides the output, except images.

    Attributes:
        variant: "" for the standard splits, else the name of others (`google`, `lmms`).
        protocol: how its expressions are asked and scored, by name; "" where the option `protocol` decides.
        notes: remarks for the user on this source.
    """

    kind: str
    variant = ""
    protocol = ""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.notes: list[str] = []

    def index(self) -> Index:
        """Raises UsageError where the source as a whole cannot be read."""
        entries: list[Entry] = []
        bad: list[Bad] = []
        for row, values in enumerate(self.rows()):
            split = self.row_split(values)
            try:
                found = self.entries(row, values)
            except (BadLineError, UsageError) as error:
                bad.append(Bad(row + 1, self.name(row), str(error), split))
                continue
            entries += [one for one in found if isinstance(one, Entry)]
            lost = [one for one in found if isinstance(one, BadText)]
            bad += [Bad(row + 1, one.id, one.reason, split) for one in lost]
        return Index(entries, bad)

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        """The records of these rows, in ascending order."""
        for row, values in self.read(rows):
            try:
                yield self.record(row, values)
            except (BadLineError, UsageError) as error:
                yield BadRecord(row, str(error))

    def name(self, row: int) -> str:
        """What a row is called in messages, besides its number."""
        return ""

    @abstractmethod
    def rows(self) -> Iterable[Any]:
        """Of every row what `entries` takes."""

    def row_split(self, values: Any) -> str | None:
        """The split that a row belongs to, which need not be usable; None where it cannot be told."""
        return None

    @abstractmethod
    def entries(self, row: int, values: Any) -> list[Entry | BadText]:
        """The expressions of a row, good ones and bad ones.

        Raises BadLineError or UsageError where the row as a whole is of no use.
        """

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterable[tuple[int, Any]]:
        """Of these rows what `record` takes."""

    @abstractmethod
    def record(self, row: int, values: Any) -> Record:
        """The object of a row. Raises BadLineError or UsageError."""


class HeldSource(Source):
    """A benchmark whose rows are all read at first, and held in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self.held: list[Any] = []

    @abstractmethod
    def load(self) -> Iterable[Any]:
        """Every row."""

    def rows(self) -> list[Any]:
        self.held = list(self.load())
        return self.held

    def read(self, rows: Sequence[int]) -> Iterable[tuple[int, Any]]:
        return ((row, self.held[row]) for row in rows)


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


def entry_or_bad(id: str, split: str, picture: str, text: object, row: int) -> Entry | BadText:
    """The entry of an expression, or why its text is of no use."""
    try:
        return Entry(id, split, picture, expression(text), row)
    except BadLineError as error:
        return BadText(id, str(error))


def box_from_xywh(value: object) -> Box:
    """COCO's `[x, y, width, height]` as xyxy. BadLineError for anything but a box in pixels.

    >>> box_from_xywh([10, 20, 30, 40.5])
    (10.0, 20.0, 40.0, 60.5)
    """
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise BadLineError("the box does not have four numbers")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value):
        raise BadLineError("the box holds something that is no number")
    x, y, width, height = value
    return check_box([x, y, x + width, y + height])


def check_box_inside(box: Box, size: tuple[int, int]) -> None:
    """BadLineError if the box lies outside its image of `(W, H)` pixels: they cannot belong together."""
    if is_outside_image(box, size):
        raise BadLineError(f"the box lies outside the image, which is {size[0]} x {size[1]} pixels")


def declared_size(height: object, width: object) -> tuple[int, int]:
    """`(W, H)`, checked to be whole numbers from 1 on. Raises BadLineError."""
    if not is_number(height) or not is_number(width) or not height or not width:
        raise BadLineError("the image's height and width must be whole numbers of pixels")
    return int(width), int(height)  # type: ignore[call-overload]


MAX_JSON_BYTES = 256 << 20


def named_image(folders: Sequence[Path], name: object) -> Path:
    """The image of that name in the first folder that has it; in the first folder if none has.

    Raises BadLineError for a name that leads out of the folders.
    """
    if not isinstance(name, str) or not name or len(name) > 400 or not name.isprintable():
        raise BadLineError("the image's file name is missing, or no name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadLineError(f"the image {shown(name)} lies outside the data set")
    places = [folder / part for folder in folders for part in dict.fromkeys((str(path), path.name))]
    return next((place for place in places if place.is_file()), places[0])


def image_folders(images: Path | None, beside: Path, *names: str) -> list[Path]:
    """`images=` and the usual folders in it, or else those beside the annotations. UsageError where there is none."""
    root = images or beside
    if images is not None and not images.is_dir():
        raise UsageError(f"images={images}: no such folder")
    found = [folder for name in names if (folder := root / name).is_dir()]
    if images is None and not found:
        usual = " or ".join(str(beside / name) for name in names)
        raise UsageError(
            f"images= is missing: name the folder of the images (unpacked), or have it as {usual}"
        )
    return [*([images] if images else []), *found]


def read_list(path: Path) -> list[Any]:
    """A JSON list. UsageError for anything else."""
    data = read_json(path, MAX_JSON_BYTES)
    if not isinstance(data, list):
        raise UsageError(f"{path}: it must hold a list of entries")
    return data


def short_fields(entry: dict[str, Any], *names: str) -> dict[str, str | int | float | bool]:
    """Those of some fields that hold a number, or a text of at most 200 characters."""
    found = {name: entry.get(name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (isinstance(value, str) and len(value) <= 200)
        or (isinstance(value, int | float) and abs(value) < 10**18)  # false for NaN
    }
