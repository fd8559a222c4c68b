"""What every benchmark comes down to: records (an object in a picture) and the expressions that refer to them.

A source is read in two steps, so that a thousand expressions out of a hundred thousand cost no more than that:
`index` lists every expression without its picture and mask, `records` then reads the rows that were chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from localization_heads.attention import Box, misses_picture
from localization_heads.data.jsonl import BadEntry, BadLineError
from localization_heads.data.masks import MaskSource
from localization_heads.data.samples import check_box

MAX_TEXT = 2000
"""Longest expression, in characters."""


class Entry(NamedTuple):
    """One expression of a benchmark.

    Args:
        id: a file name, unique in its split.
        picture: the picture's name in every data set that shows it, such as `coco:581857`.
        row: which record of the source it refers to.
    """

    id: str
    split: str
    picture: str
    text: str
    row: int


@dataclass(frozen=True)
class Index:
    """Every expression of a source in the order of its files, and the rows that hold none that can be used."""

    entries: list[Entry]
    bad: list[BadEntry]


@dataclass(frozen=True)
class Record:
    """The object that a row's expressions refer to.

    Args:
        image: the picture's file, or its bytes where they are inside the source.
        size: `(W, H)` in pixels as the source says, None where it does not.
        box: xyxy in pixels, None where the source has none.
        mask: as `read_mask` takes it.
        ignore: pixels that do not count when masks are scored.
        more: further fields of the lines that are written.
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
    """A benchmark as it was found on the disk.

    Args:
        kind: what it is, in words.
        variant: "" for the standard splits, else what tells these apart (`google`, `lmms`).
        files: all that decides what is written, pictures apart.
        notes: what a user must know of this source.
    """

    kind: str
    variant: str
    files: list[Path]
    notes: list[str]

    def index(self) -> Index:
        """Raises UsageError where the source as a whole cannot be read."""
        ...

    def records(self, rows: Sequence[int]) -> Iterator[Record | BadRecord]:
        """These rows, which ascend."""
        ...


def coco_picture(image_id: object) -> str:
    """The name of a COCO picture, from its number. BadLineError for anything that is no such number."""
    if not is_number(image_id) or image_id >= 10**12:  # type: ignore[operator]
        raise BadLineError("image_id must be a whole number")
    return f"coco:{image_id}"


def coco_picture_of(file_name: object) -> str | None:
    """The picture of a COCO 2014 file name, also of one that ends with an annotation's number; else None.

    >>> coco_picture_of("COCO_train2014_000000581857_16.jpg")
    'coco:581857'
    """
    pattern = r"COCO_(?:train|val)2014_(\d{12})(?:_\d{1,12})?\.\w{3,4}"
    match = re.fullmatch(pattern, file_name) if isinstance(file_name, str) else None
    return f"coco:{int(match[1])}" if match else None


COCO_FOLDERS = ("", "train2014", "images/train2014", "train2017", "val2017")


def find_coco_image(folder: Path, picture: str) -> Path:
    """The file of a COCO picture in `folder` or the subfolder it is unpacked into; the first name if there is none.

    All pictures of RefCOCO, RefCOCO+ and RefCOCOg are of train2014; COCO 2017 holds the same ones under shorter
    names, spread over train2017 and val2017.
    """
    number = int(picture.removeprefix("coco:"))
    names = (f"COCO_train2014_{number:012d}.jpg", f"{number:012d}.jpg")
    places = [folder / sub / name for name in names for sub in COCO_FOLDERS]
    return next((place for place in places if place.is_file()), places[0])


def is_number(value: object) -> bool:
    """A whole number from 0 on, of at most 18 digits; ids are."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18


def expression(value: object) -> str:
    """An expression on one line, spaces at its ends removed. BadLineError for one that is empty or none."""
    if not isinstance(value, str):
        raise BadLineError("an expression is not text")
    text = " ".join(value.split())
    if not text:
        raise BadLineError("an expression is empty")
    if len(text) > MAX_TEXT or not text.isprintable():
        raise BadLineError("an expression is endless or not printable")
    return text


def box_from_xywh(value: object) -> Box:
    """COCO's `[x, y, width, height]` as xyxy. BadLineError for anything that is no box of pixels.

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


def check_inside(box: Box, size: tuple[int, int]) -> None:
    """BadLineError if the box lies outside its picture of `(W, H)` pixels: one of the two is of another one."""
    if misses_picture(box, size):
        raise BadLineError(f"the box lies outside the picture, which is {size[0]} x {size[1]} pixels")


def picture_size(height: object, width: object) -> tuple[int, int]:
    """`(W, H)`, checked to be whole numbers from 1 on. Raises BadLineError."""
    if not is_number(height) or not is_number(width) or not height or not width:
        raise BadLineError("the picture's height and width must be whole numbers of pixels")
    return int(width), int(height)  # type: ignore[call-overload]
