"""JSON lines from users to `Sample`s: an image, an expression, and the true box or mask where there is one.

A bad line costs only itself: it becomes a `BadLineError` with its number, and the others are read. Memory stays
bounded, whatever the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box, is_outside_image
from localization_heads.data.address import Address, ImageError, is_address, without_secrets
from localization_heads.data.images import ImageSource, find_file
from localization_heads.data.lines import Fact, check_box, facts_of, read_objects
from localization_heads.data.masks import (
    MAX_MASKS,
    MaskError,
    MaskSource,
    flat_polygons,
    read_mask,
    run_size,
    union_of,
)
from localization_heads.data.sources import Together, as_sources, key_of, name_of
from localization_heads.errors import BadEntry, BadLineError, UsageError, shown
from localization_heads.store.paths import attention_stem, check_id, claimed_names, local_path

_TRUTHS = ("bbox", "bboxes", "mask", "masks")
MULTI_IMAGE_ERROR = (
    "its prompt shows several images, which only stage=ground, batch and find take, without zoom=true"
)


@dataclass(frozen=True)
class Sample:
    """An image, an expression that refers to something in it, and the true box or mask where known.

    Args:
        image: an image as `data.sources` takes it: a path, an http(s) address (which becomes an `Address`), a PIL
            image, an array, a tensor, bytes, an open file; or several that one prompt shows (`Together`).
        bbox: xyxy in pixels of the image: a tuple, list, array or tensor of four numbers, which becomes a tuple.
        mask: run lengths, polygons, the path of a PNG or a bool array; `decode_mask` makes it pixels. Of several
            objects it is that of all of them.
        ignore: the same for pixels that are left out when masks are scored (ReasonSeg has them).
        picture: a name of the image that its other copies share (such as coco:581857), "" if it has none.
        line: its line number in the data file, from 1; 0 if it comes from elsewhere.
        boxes: the true boxes of an expression that refers to several objects, as `bbox`.
        absent: the expression refers to nothing in the image; then there is neither box nor mask.
        facts: further fields of its line that are short (`protocol`, and what a benchmark's own metric asks for).

    Raises UsageError for an invalid box, and for a box or a mask of what is absent.
    """

    image: ImageSource | Together
    expression: str
    id: str = ""
    bbox: Box | None = None
    mask: MaskSource | None = field(default=None, repr=False)
    line: int = 0
    ignore: MaskSource | None = field(default=None, repr=False)
    picture: str = ""
    boxes: tuple[Box, ...] = ()
    absent: bool = False
    facts: Mapping[str, Fact] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", as_sources(self.image))
        try:
            if self.bbox is not None:
                object.__setattr__(self, "bbox", check_box(self.bbox))
            object.__setattr__(self, "boxes", tuple(check_box(box) for box in self.boxes))
            if self.absent and self.has_truth:
                raise BadLineError("it is absent, and has a true box or mask: it can only be one of them")
            if isinstance(self.image, Together) and self.has_truth:
                raise BadLineError("a true box or mask is of one image, and its prompt shows several")
        except BadLineError as error:
            raise UsageError(f"{sample_name(self)}: {error}") from error

    @property
    def has_truth(self) -> bool:
        """Whether it says where the object is, or the objects are."""
        return self.bbox is not None or self.mask is not None or bool(self.boxes)

    @property
    def true_boxes(self) -> tuple[Box, ...]:
        """All true boxes that are given as boxes: `boxes`, or `bbox` alone."""
        return self.boxes or (() if self.bbox is None else (self.bbox,))

    @property
    def image_file(self) -> str:
        """The image's path, or its address without possible secrets; "" for an image in memory."""
        return str(self.image) if isinstance(self.image, Together) else name_of(self.image)

    @property
    def image_key(self) -> str:
        """The image's identity, its path or its whole address: never to be stored; "" for an image in memory."""
        return key_of(self.image)

    def at(self, index: int | None) -> Sample:
        """The same of one image of a prompt with several, counted from 0; without a number, as it is."""
        if index is None or not isinstance(self.image, Together):
            return self
        return replace(self, image=self.image.images[index])

    @property
    def single(self) -> ImageSource:
        """Its one image. UsageError where the prompt shows several."""
        if isinstance(self.image, Together):
            raise UsageError(f"{sample_name(self)}: {MULTI_IMAGE_ERROR}")
        return self.image


@dataclass(frozen=True)
class VisualizationEntry:
    """A line of `visualize_attention.py mode=batch`: whose maps to draw, and which head's (None: the best ones).

    Args:
        attention_file: as it was found, or as the line names it; it may be missing, or be in another model's folder.
            None if the line names none: then it is the file of that id in the finder's output folder.
    """

    id: str
    attention_file: Path | None = None
    layer: int | None = None
    head: int | None = None
    line: int = 0


Line = TypeVar("Line", Sample, VisualizationEntry)


@dataclass(frozen=True)
class SampleFile(Generic[Line]):
    """A data file: its good lines in file order, and the bad ones."""

    entries: list[Line]
    bad: list[BadEntry]

    @property
    def samples(self) -> list[Line]:
        """The entries of a data set, under their own name."""
        return self.entries


def load_samples(data_file: str | Path, *, allow_private_addresses: bool = False) -> SampleFile[Sample]:
    """Read a data set. Bad lines are in `.bad`; UsageError if the file is missing, unreadable or empty.

    Args:
        allow_private_addresses: whether the addresses in it may lead to this machine or into a private network.
    """
    ids = _Ids()

    def sample(entry: Mapping[str, Any], id: str, line: int, folder: Path) -> Sample:
        made = _sample(entry, id, line, folder, allow_private_addresses)
        ids.claim(id, line)
        return made

    return _load(local_path(data_file), sample)


def load_visualization_entries(data_file: str | Path) -> SampleFile[VisualizationEntry]:
    """Read the entries of a visualization batch, as `load_samples` reads samples. One id may come many times."""
    return _load(local_path(data_file), _visualization_entry)


def _load(path: Path, make: Callable[[Mapping[str, Any], str, int, Path], Line]) -> SampleFile[Line]:
    """The lines of a file as `make` reads them, from an object, its id, its line and the folder of the file."""
    entries: list[Line] = []
    bad: list[BadEntry] = []
    for line, entry in read_objects(path):
        id = ""
        try:
            if isinstance(entry, BadLineError):
                raise entry
            id = _id(entry, line)
            entries.append(make(entry, id, line, path.parent))
        except (BadLineError, ImageError, MaskError) as error:
            bad.append(BadEntry(line, id, str(error)))
    if not entries and not bad:
        raise UsageError(f"data_file={path} is empty: it needs a JSON object on each line")
    return SampleFile(entries, bad)


def decode_mask(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The sample's true mask, bool `(H, W)`, for its image of `size` `(W, H)`. UsageError, naming the line.

    >>> decode_mask(Sample("cat.jpg", "the cat", mask=[[0, 0, 2, 0, 2, 2, 0, 2]]), (3, 2)).tolist()
    [[True, True, False], [True, True, False]]
    """
    if sample.mask is None:
        raise UsageError(f"{sample_name(sample)}: it has no mask")
    return _decode(sample.mask, size, sample_name(sample))


def decode_ignored(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """The pixels that are left out of scores, bool `(H, W)`, or None. UsageError, naming the line."""
    return None if sample.ignore is None else _decode(sample.ignore, size, f"{sample_name(sample)}: ignore")


def _decode(mask: MaskSource, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    try:
        return read_mask(mask, size)
    except (MaskError, ImageError) as error:
        raise MaskError(f"{name}: {error}") from error


def check_inside(sample: Sample, size: tuple[int, int]) -> None:
    """Raises UsageError if the true box lies outside the image of `(W, H)`: they cannot belong together."""
    if any(is_outside_image(box, size) for box in sample.true_boxes):
        raise UsageError(
            f"{sample_name(sample)}: the true box lies outside the image, which is {size[0]} x {size[1]} pixels"
        )


def sample_name(sample: Sample) -> str:
    """A sample's name in messages: its line and id where it has them, else its expression."""
    return (
        f"line {sample.line} ({sample.id})"
        if sample.line
        else sample.id or f"sample {shown(str(sample.expression))}"
    )


class _Ids:
    """The ids of a data set so far, and the file names that they claim."""

    def __init__(self) -> None:
        self._claimed: dict[str, tuple[str, int]] = {}

    def claim(self, id: str, line: int) -> None:
        """Claim the id's files; BadLineError if another line has claimed one of them."""
        names = claimed_names(id)
        for name in names:
            if name in self._claimed:
                other, at = self._claimed[name]
                if other == id:
                    raise BadLineError(f"the id {shown(id)} is that of line {at} already")
                raise BadLineError(
                    f"the id {shown(id)} would write over the files of {shown(other)} on line {at}"
                )
        self._claimed.update(dict.fromkeys(names, (id, line)))


def _id(entry: Mapping[str, Any], line: int) -> str:
    """The entry's id, or `line_<number>` if it has none."""
    value = entry.get("id")
    if value is None:
        return f"line_{line}"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise BadLineError("'id' must be text or a number")
    try:
        return check_id(value)
    except ValueError as error:
        raise BadLineError(str(error)) from error


def _sample(entry: Mapping[str, Any], id: str, line: int, folder: Path, allow_private: bool) -> Sample:
    absent = entry.get("absent", False)
    if not isinstance(absent, bool):
        raise BadLineError("'absent' must be true or false")
    truths = [name for name in _TRUTHS if entry.get(name) is not None]
    if absent and truths:
        raise BadLineError(f"'absent' is true, and yet there is '{truths[0]}': remove one of them")
    return Sample(
        image=_images(entry, folder, allow_private),
        expression=_text(entry, "prompt", ("query", "expression")),
        id=id,
        bbox=check_box(entry["bbox"]) if entry.get("bbox") is not None else None,
        mask=_masks(entry, folder),
        line=line,
        ignore=_mask(entry["ignore"], folder) if entry.get("ignore") is not None else None,
        picture=_text(entry, "picture") if entry.get("picture") is not None else "",
        boxes=_boxes(entry["bboxes"]) if entry.get("bboxes") is not None else (),
        absent=absent,
        facts=facts_of(entry),
    )


def _boxes(value: object) -> tuple[Box, ...]:
    """The true boxes of one line. BadLineError for anything but a list of boxes."""
    if not isinstance(value, list) or not value:
        raise BadLineError(
            "'bboxes' must be a list of boxes [[x0, y0, x1, y1], ...]; without any, write absent: true"
        )
    boxes = []
    for number, box in enumerate(value, start=1):
        try:
            boxes.append(check_box(box))
        except BadLineError as error:
            raise BadLineError(f"'bboxes', number {number}: {error}") from error
    return tuple(boxes)


def _text(entry: Mapping[str, Any], name: str, likely: tuple[str, ...] = ()) -> str:
    value = entry.get(name)
    if value is None:
        meant = next((f" (it has '{other}')" for other in likely if other in entry), "")
        raise BadLineError(f"'{name}' is missing{meant}")
    if not isinstance(value, str):
        raise BadLineError(f"'{name}' must be text")
    if not value.strip():
        raise BadLineError(f"'{name}' is empty")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadLineError(f"'{name}' is not valid Unicode text")
    return value


def _images(entry: Mapping[str, Any], folder: Path, allow_private: bool) -> Address | Path | Together:
    """The image of a line, or those that its prompt shows together. Which of these a true box is in cannot be said."""
    names = entry.get("image_path")
    if not isinstance(names, list):
        return _image(_text(entry, "image_path", ("image", "image_file")), folder, allow_private)
    if truth := next((name for name in (*_TRUTHS, "ignore") if entry.get(name) is not None), None):
        raise BadLineError(f"'image_path' lists several images, and '{truth}' is of one: leave it out")
    return Together(
        [_image(_text({"image_path": name}, "image_path"), folder, allow_private) for name in names]
    )


def _image(value: str, folder: Path, allow_private: bool) -> Address | Path:
    return Address(value, allow_private) if is_address(value) else _file(value, folder)


def _file(value: str, folder: Path) -> Path:
    if "://" in value:
        raise BadLineError(f"{shown(without_secrets(value))} is neither a path nor an http(s) address")
    if "\0" in value:
        raise BadLineError("a path cannot hold a NUL character")
    return find_file(value, folder)


def _masks(entry: Mapping[str, Any], folder: Path) -> MaskSource | None:
    """The true mask: `mask`, or all of `masks` together."""
    one, several = entry.get("mask"), entry.get("masks")
    if several is None:
        return None if one is None else _mask(one, folder)
    if one is not None:
        raise BadLineError("it has 'mask' and 'masks': remove one of them")
    if not isinstance(several, list):
        raise BadLineError("'masks' must be a list, a mask for each object")
    return union_of([_mask(value, folder) for value in several[: MAX_MASKS + 1]])


def _mask(value: object, folder: Path) -> MaskSource:
    """The mask's form is checked here; its content when it is decoded."""
    if isinstance(value, str):
        return _file(value, folder)
    if isinstance(value, dict):
        run_size(value)
        if not isinstance(value.get("counts"), str | list):
            raise BadLineError("the mask's 'counts' must be text or a list of whole numbers")
        return value
    return flat_polygons(value)


def _visualization_entry(entry: Mapping[str, Any], id: str, line: int, folder: Path) -> VisualizationEntry:
    layer, head = _index(entry, "layer"), _index(entry, "head")
    if (layer is None) != (head is None):
        raise BadLineError("'layer' and 'head' go together: name both or none")
    named = entry.get("attention_file") is not None
    if not named and entry.get("id") is None:
        raise BadLineError("'attention_file' is missing")
    path = _attention_file(_text(entry, "attention_file"), folder) if named else None
    if path is not None and entry.get("id") is None:
        id = attention_stem(path)
    return VisualizationEntry(id, path, layer, head, line)


def _attention_file(value: str, folder: Path) -> Path:
    """Whether there is such a file, perhaps under another model, is seen when it is drawn."""
    try:
        return _file(value, folder)
    except ImageError as error:
        if not error.reason.startswith("no such file"):
            raise
        return local_path(value)


def _index(entry: Mapping[str, Any], name: str) -> int | None:
    value = entry.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 100_000):
        raise BadLineError(f"'{name}' must be a whole number from 0 on")
    return value
