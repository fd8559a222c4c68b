"""The base class of all benchmark readers (`Source`), its index entries and records, and helpers to parse annotations.

A source is read in two steps, so that sampling a thousand expressions from a hundred thousand is cheap: `index` lists
every expression without images and masks, and `records` then reads only the rows that were chosen.
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

MAX_EXPRESSION_LENGTH = 2000
"""In characters."""


class IndexEntry(NamedTuple):
    """One expression of a benchmark.

    Args:
        id: valid as a file name, and unique within the split.
        picture: a name for the image that is the same in every data set, such as `coco:581857`.
        row: index of the `Record` with the object that the expression refers to.
    """

    id: str
    split: str
    picture: str
    text: str
    row: int


class BadExpression(NamedTuple):
    """An unusable expression, with its id; the other expressions of its row remain usable."""

    id: str
    reason: str


class IndexFailure(NamedTuple):
    """A row, or one of its expressions, that cannot be used: a `BadEntry` with its split (None if unknown)."""

    line: int
    id: str
    reason: str
    split: str | None


@dataclass(frozen=True)
class Index:
    """All expressions of a source, in file order, and the rows and expressions that cannot be used."""

    entries: list[IndexEntry]
    failures: list[IndexFailure]

    def failures_of(self, split: str) -> list[BadEntry]:
        """The failures in a split, including those whose split is unknown."""
        return [BadEntry(*failure[:3]) for failure in self.failures if failure.split in (None, split)]


@dataclass(frozen=True)
class Record:
    """A row's image and ground truth: the object that its expressions refer to.

    Args:
        image: the image's file, or its bytes if they are stored in the source.
        size: `(W, H)` in pixels according to the source; None if it does not say.
        box: xyxy in pixels, or None.
        mask: in any form that `read_mask` accepts; for several objects, their union.
        ignore: pixels to leave out when masks are scored.
        extra: additional fields for the JSON line.
        boxes: the boxes if the expressions refer to several objects; `box` is then None.
        absent: the expressions refer to nothing in the image.
    """

    row: int
    image: Path | bytes
    size: tuple[int, int] | None = None
    box: Box | None = None
    mask: MaskSource | None = field(default=None, repr=False)
    ignore: MaskSource | None = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()
    absent: bool = False


class BadRecord(NamedTuple):
    """A row whose record cannot be used, and why."""

    row: int
    reason: str


class Source(ABC):
    """A benchmark on disk, in one of its published formats.

    Args:
        files: all files that determine the output, except images.

    Attributes:
        kind: the format, in words.
        variant: "" for the standard splits, else the name of the variant (`google`, `lmms`).
        protocol: the evaluation protocol; "" if the option `protocol` decides.
        notes: remarks about this source to show to the user.
    """

    kind: str
    variant = ""
    protocol = ""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.notes: list[str] = []

    def index(self) -> Index:
        """List all expressions. UsageError if the source as a whole cannot be read."""
        entries: list[IndexEntry] = []
        failures: list[IndexFailure] = []
        for row, values in enumerate(self.iterate_rows()):
            split = self.row_split(values)
            try:
                items = self.row_entries(row, values)
            except (BadLineError, UsageError) as error:
                failures.append(IndexFailure(row + 1, self.row_name(row), str(error), split))
                continue
            for item in items:
                if isinstance(item, IndexEntry):
                    entries.append(item)
                else:
                    failures.append(IndexFailure(row + 1, item.id, item.reason, split))
        return Index(entries, failures)

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        """Yield the records of some rows, given in ascending order."""
        for row, values in self.read_rows(rows):
            try:
                yield self.make_record(row, values)
            except (BadLineError, UsageError) as error:
                yield BadRecord(row, str(error))

    def row_name(self, row: int) -> str:
        """A name for a row in messages, in addition to its number."""
        return ""

    @abstractmethod
    def iterate_rows(self) -> Iterable[Any]:
        """Yield, for every row, the values that `row_entries` takes."""

    def row_split(self, values: Any) -> str | None:
        """The split of a row, even if the row is invalid; None if it is unknown."""
        return None

    @abstractmethod
    def row_entries(self, row: int, values: Any) -> list[IndexEntry | BadExpression]:
        """The expressions of a row, usable or not. BadLineError or UsageError if the whole row is unusable."""

    @abstractmethod
    def read_rows(self, rows: Sequence[int]) -> Iterable[tuple[int, Any]]:
        """Yield, for some rows, the row and the values that `make_record` takes."""

    @abstractmethod
    def make_record(self, row: int, values: Any) -> Record:
        """The image and ground truth of a row. Raises BadLineError or UsageError."""


class InMemorySource(Source):
    """A benchmark that is small enough to keep all rows in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self.loaded: list[Any] = []

    @abstractmethod
    def load_rows(self) -> Iterable[Any]:
        """Read every row."""

    def iterate_rows(self) -> list[Any]:
        self.loaded = list(self.load_rows())
        return self.loaded

    def read_rows(self, rows: Sequence[int]) -> Iterable[tuple[int, Any]]:
        return ((row, self.loaded[row]) for row in rows)


def coco_picture(image_id: object) -> str:
    """The `picture` name of a COCO image id. BadLineError if the id is invalid."""
    if not is_natural_number(image_id) or image_id >= 10**12:  # type: ignore[operator]
        raise BadLineError("image_id must be a whole number")
    return f"coco:{image_id}"


def coco_picture_from_name(file_name: object) -> str | None:
    """The `picture` name for a COCO 2014 file name, with or without an annotation number; None for other names.

    >>> coco_picture_from_name("COCO_train2014_000000581857_16.jpg")
    'coco:581857'
    """
    pattern = r"COCO_(?:train|val)2014_(\d{12})(?:_\d{1,12})?\.\w{3,4}"
    match = re.fullmatch(pattern, file_name) if isinstance(file_name, str) else None
    return f"coco:{int(match[1])}" if match else None


def is_natural_number(value: object) -> bool:
    """Whether a value is an integer, at least 0 and of at most 18 digits, as ids are."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18


def normalise_expression(value: object) -> str:
    """An expression with normalised whitespace. BadLineError if it is empty, too long, not printable or not text."""
    if not isinstance(value, str):
        raise BadLineError("an expression is not text")
    text = " ".join(value.split())
    if not text:
        raise BadLineError("an expression is empty")
    if len(text) > MAX_EXPRESSION_LENGTH or not text.isprintable():
        raise BadLineError("an expression is too long or not printable")
    return text


def make_entry(id: str, split: str, picture: str, text: object, row: int) -> IndexEntry | BadExpression:
    """The index entry of an expression, or a `BadExpression` if its text is invalid."""
    try:
        return IndexEntry(id, split, picture, normalise_expression(text), row)
    except BadLineError as error:
        return BadExpression(id, str(error))


def box_from_xywh(value: object) -> Box:
    """Convert COCO's `[x, y, width, height]` to xyxy. BadLineError if it is not a valid box in pixels.

    >>> box_from_xywh([10, 20, 30, 40.5])
    (10.0, 20.0, 40.0, 60.5)
    """
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise BadLineError("the box does not have four numbers")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value):
        raise BadLineError("the box holds something that is not a number")
    x, y, width, height = value
    return check_box([x, y, x + width, y + height])


def check_box_inside(box: Box, size: tuple[int, int]) -> None:
    """BadLineError if a box misses its image of `(W, H)` pixels: they cannot belong together."""
    if is_outside_image(box, size):
        raise BadLineError(f"the box lies outside the image, which is {size[0]} x {size[1]} pixels")


def declared_size(height: object, width: object) -> tuple[int, int]:
    """`(W, H)` from an annotation. BadLineError unless both are positive integers."""
    if not is_natural_number(height) or not is_natural_number(width) or not height or not width:
        raise BadLineError("the image's height and width must be whole numbers of pixels")
    return int(width), int(height)  # type: ignore[call-overload]


MAX_JSON_BYTES = 256 << 20


def find_named_image(folders: Sequence[Path], name: object) -> Path:
    """The path of an image in the first folder that contains it, or in the first folder if none does.

    Raises BadLineError for a name that points outside the folders.
    """
    if not isinstance(name, str) or not name or len(name) > 400 or not name.isprintable():
        raise BadLineError("the image's file name is missing or invalid")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadLineError(f"the image {shown(name)} lies outside the data set")
    candidates = [folder / part for folder in folders for part in dict.fromkeys((str(path), path.name))]
    return next((place for place in candidates if place.is_file()), candidates[0])


def find_image_folders(images: Path | None, annotation_folder: Path, *names: str) -> list[Path]:
    """`images=` and its usual subfolders, or else those beside the annotations. UsageError if none exists."""
    root = images or annotation_folder
    if images is not None and not images.is_dir():
        raise UsageError(f"images={images}: no such folder")
    folders = [folder for name in names if (folder := root / name).is_dir()]
    if images is None and not folders:
        usual = " or ".join(str(annotation_folder / name) for name in names)
        raise UsageError(f"images= is missing: name the folder of the (unpacked) images, or put it at {usual}")
    return [*([images] if images else []), *folders]


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON file that holds a list. UsageError if it does not."""
    data = read_json(path, MAX_JSON_BYTES)
    if not isinstance(data, list):
        raise UsageError(f"{path}: it must hold a list of entries")
    return data


def short_fields(entry: dict[str, Any], *names: str) -> dict[str, str | int | float | bool]:
    """The given fields whose values are numbers, or texts of at most 200 characters."""
    values = {name: entry.get(name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if (isinstance(value, str) and len(value) <= 200)
        or (isinstance(value, int | float) and abs(value) < 10**18)  # false for NaN
    }
