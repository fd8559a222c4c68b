"""Read data files (JSON lines) as `Sample`s: an image, an expression, and the ground-truth box or mask if known.

An invalid line is recorded with its line number and skipped. Memory is bounded whatever the file contains.
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
from localization_heads.data.lines import Fact, check_box, extract_facts, read_objects
from localization_heads.data.masks import (
    MAX_MASKS,
    MaskError,
    MaskSource,
    flatten_polygons,
    merge_masks,
    read_mask,
    rle_size,
)
from localization_heads.data.sources import Together, as_sources, source_key, source_name
from localization_heads.errors import BadEntry, BadLineError, UsageError, shown
from localization_heads.store.paths import attention_stem, check_id, local_path, reserved_stems

_TRUTH_FIELDS = ("bbox", "bboxes", "mask", "masks")
MULTI_IMAGE_ERROR = "its prompt has several images; only stage=ground, batch and find take that, and without zoom=true"


@dataclass(frozen=True)
class Sample:
    """An image, an expression that refers to something in it, and the ground-truth box or mask where known.

    Args:
        image: whatever `data.sources.as_source` accepts: a path, an http(s) address (converted to an `Address`), a PIL
            image, an array, a tensor, bytes, an open file; or several images for one prompt (`Together`).
        bbox: ground truth, xyxy in pixels of the image: a tuple, list, array or tensor, converted to a tuple.
        mask: COCO RLE, polygons, the path of a PNG or a bool array; `decode_mask` rasterises it. For an expression that
            refers to several objects, their union.
        ignore: pixels to leave out when masks are scored, in the same forms (ReasonSeg has them).
        picture: a name for the image that is the same in every data set (such as coco:581857); "" if unknown.
        line: line number in the data file, from 1; 0 if the sample is not from a file.
        boxes: ground-truth boxes of an expression that refers to several objects, each as `bbox`.
        absent: the expression refers to nothing in the image; there is then no box and no mask.
        facts: short extra fields of the line (`protocol`, and what a benchmark's own metric needs).

    Raises:
        UsageError: a box is invalid, or there is a box or a mask although `absent` is true.
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
                raise BadLineError("it is marked absent but has a true box or mask: remove one of them")
            if isinstance(self.image, Together) and self.has_truth:
                raise BadLineError("it has a true box or mask, which belongs to one image, but its prompt has several")
        except BadLineError as error:
            raise UsageError(f"{sample_name(self)}: {error}") from error

    @property
    def has_truth(self) -> bool:
        """Whether there is a ground-truth box or mask."""
        return self.bbox is not None or self.mask is not None or bool(self.boxes)

    @property
    def true_boxes(self) -> tuple[Box, ...]:
        """The ground-truth boxes: `boxes`, or `bbox` alone; empty if only a mask is given."""
        return self.boxes or (() if self.bbox is None else (self.bbox,))

    @property
    def image_file(self) -> str:
        """The image's path, or its address without secrets; "" for an image in memory."""
        return str(self.image) if isinstance(self.image, Together) else source_name(self.image)

    @property
    def image_key(self) -> str:
        """The image's path or full address, for comparing and never for storing; "" for an image in memory."""
        return source_key(self.image)

    def at(self, index: int | None) -> Sample:
        """This sample with one image of a multi-image prompt, counted from 0; unchanged if `index` is None."""
        if index is None or not isinstance(self.image, Together):
            return self
        return replace(self, image=self.image.images[index])

    @property
    def single(self) -> ImageSource:
        """The image of a single-image prompt. UsageError if the prompt has several."""
        if isinstance(self.image, Together):
            raise UsageError(f"{sample_name(self)}: {MULTI_IMAGE_ERROR}")
        return self.image


@dataclass(frozen=True)
class VisualizationEntry:
    """A line of `visualize_attention.py mode=batch`: an attention file, and the head to draw (None: the best heads).

    Args:
        attention_file: the file if it was found, otherwise the path as written; it may be in another model's folder.
            None if the line names none: the file is then looked up by id in the finder's output folder.
    """

    id: str
    attention_file: Path | None = None
    layer: int | None = None
    head: int | None = None
    line: int = 0


EntryT = TypeVar("EntryT", Sample, VisualizationEntry)


@dataclass(frozen=True)
class SampleFile(Generic[EntryT]):
    """The valid entries of a data file, in file order, and the lines that could not be used."""

    entries: list[EntryT]
    bad: list[BadEntry]

    @property
    def samples(self) -> list[EntryT]:
        """The entries; an alias that reads better for a data set."""
        return self.entries


def load_samples(data_file: str | Path, *, allow_private_addresses: bool = False) -> SampleFile[Sample]:
    """Read a data set; invalid lines are in `.bad`. UsageError if the file is missing, unreadable or empty.

    Args:
        allow_private_addresses: whether image addresses may resolve to this machine or to a private network.
    """
    ids = _ClaimedIds()

    def parse(entry: Mapping[str, Any], id: str, line: int, folder: Path) -> Sample:
        sample = _parse_sample(entry, id, line, folder, allow_private_addresses)
        ids.claim(id, line)
        return sample

    return _load_entries(local_path(data_file), parse)


def load_visualization_entries(data_file: str | Path) -> SampleFile[VisualizationEntry]:
    """Read a visualization batch, as `load_samples` reads a data set. Ids may repeat."""
    return _load_entries(local_path(data_file), _parse_visualization_entry)


def _load_entries(path: Path, parse: Callable[[Mapping[str, Any], str, int, Path], EntryT]) -> SampleFile[EntryT]:
    """Parse every line of a file; `parse` takes the JSON object, its id, its line number and the file's folder."""
    entries: list[EntryT] = []
    bad: list[BadEntry] = []
    for line, entry in read_objects(path):
        id = ""
        try:
            if isinstance(entry, BadLineError):
                raise entry
            id = _parse_id(entry, line)
            entries.append(parse(entry, id, line, path.parent))
        except (BadLineError, ImageError, MaskError) as error:
            bad.append(BadEntry(line, id, str(error)))
    if not entries and not bad:
        raise UsageError(f"data_file={path} is empty: it needs a JSON object on each line")
    return SampleFile(entries, bad)


def decode_mask(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The sample's ground-truth mask, bool `(H, W)`, for its image of `size` `(W, H)`. UsageError, naming the line.

    >>> decode_mask(Sample("cat.jpg", "the cat", mask=[[0, 0, 2, 0, 2, 2, 0, 2]]), (3, 2)).tolist()
    [[True, True, False], [True, True, False]]
    """
    if sample.mask is None:
        raise UsageError(f"{sample_name(sample)}: it has no mask")
    return _decode_mask(sample.mask, size, sample_name(sample))


def decode_ignored(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """The pixels to leave out of mask scores, bool `(H, W)`, or None. UsageError, naming the line."""
    if sample.ignore is None:
        return None
    return _decode_mask(sample.ignore, size, f"{sample_name(sample)}: ignore")


def _decode_mask(mask: MaskSource, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    try:
        return read_mask(mask, size)
    except (MaskError, ImageError) as error:
        raise MaskError(f"{name}: {error}") from error


def check_inside(sample: Sample, size: tuple[int, int]) -> None:
    """Raise UsageError if a ground-truth box misses the image of `(W, H)`: they cannot belong together."""
    if any(is_outside_image(box, size) for box in sample.true_boxes):
        raise UsageError(
            f"{sample_name(sample)}: the true box lies outside the image, which is {size[0]} x {size[1]} pixels"
        )


def sample_name(sample: Sample) -> str:
    """A sample's name for messages: its line and id, or its id, or its expression."""
    if sample.line:
        return f"line {sample.line} ({sample.id})"
    return sample.id or f"sample {shown(str(sample.expression))}"


class _ClaimedIds:
    """The ids seen so far in a data set, and the file names that each of them takes."""

    def __init__(self) -> None:
        self._claimed: dict[str, tuple[str, int]] = {}

    def claim(self, id: str, line: int) -> None:
        """Reserve the file names of an id; BadLineError if another line has one of them."""
        names = reserved_stems(id)
        for name in names:
            if name in self._claimed:
                other, at = self._claimed[name]
                if other == id:
                    raise BadLineError(f"the id {shown(id)} is already used on line {at}")
                raise BadLineError(f"the id {shown(id)} would overwrite the files of {shown(other)} on line {at}")
        self._claimed.update(dict.fromkeys(names, (id, line)))


def _parse_id(entry: Mapping[str, Any], line: int) -> str:
    """The validated id, or `line_<number>` if there is none."""
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


def _parse_sample(entry: Mapping[str, Any], id: str, line: int, folder: Path, allow_private: bool) -> Sample:
    absent = entry.get("absent", False)
    if not isinstance(absent, bool):
        raise BadLineError("'absent' must be true or false")
    given = [name for name in _TRUTH_FIELDS if entry.get(name) is not None]
    if absent and given:
        raise BadLineError(f"'absent' is true but there is '{given[0]}': remove one of them")
    return Sample(
        image=_parse_images(entry, folder, allow_private),
        expression=_require_text(entry, "prompt", ("query", "expression")),
        id=id,
        bbox=check_box(entry["bbox"]) if entry.get("bbox") is not None else None,
        mask=_parse_masks(entry, folder),
        line=line,
        ignore=_parse_mask(entry["ignore"], folder) if entry.get("ignore") is not None else None,
        picture=_require_text(entry, "picture") if entry.get("picture") is not None else "",
        boxes=_parse_boxes(entry["bboxes"]) if entry.get("bboxes") is not None else (),
        absent=absent,
        facts=extract_facts(entry),
    )


def _parse_boxes(value: object) -> tuple[Box, ...]:
    """The boxes of an expression that refers to several objects."""
    if not isinstance(value, list) or not value:
        raise BadLineError(
            "'bboxes' must be a list of boxes [[x0, y0, x1, y1], ...]; if there are none, write absent: true"
        )
    boxes = []
    for number, box in enumerate(value, start=1):
        try:
            boxes.append(check_box(box))
        except BadLineError as error:
            raise BadLineError(f"'bboxes', number {number}: {error}") from error
    return tuple(boxes)


def _require_text(entry: Mapping[str, Any], name: str, alternatives: tuple[str, ...] = ()) -> str:
    value = entry.get(name)
    if value is None:
        hint = next((f" (it has '{other}')" for other in alternatives if other in entry), "")
        raise BadLineError(f"'{name}' is missing{hint}")
    if not isinstance(value, str):
        raise BadLineError(f"'{name}' must be text")
    if not value.strip():
        raise BadLineError(f"'{name}' is empty")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadLineError(f"'{name}' is not valid Unicode text")
    return value


def _parse_images(entry: Mapping[str, Any], folder: Path, allow_private: bool) -> Address | Path | Together:
    """The image of a line, or the images of a multi-image prompt, for which there can be no ground truth."""
    names = entry.get("image_path")
    if not isinstance(names, list):
        path = _require_text(entry, "image_path", ("image", "image_file"))
        return _parse_image(path, folder, allow_private)
    if field_name := next((name for name in (*_TRUTH_FIELDS, "ignore") if entry.get(name) is not None), None):
        raise BadLineError(f"'image_path' lists several images, but '{field_name}' belongs to one: leave it out")
    paths = (_require_text({"image_path": name}, "image_path") for name in names)
    return Together([_parse_image(path, folder, allow_private) for path in paths])


def _parse_image(value: str, folder: Path, allow_private: bool) -> Address | Path:
    return Address(value, allow_private) if is_address(value) else _parse_path(value, folder)


def _parse_path(value: str, folder: Path) -> Path:
    if "://" in value:
        raise BadLineError(f"{shown(without_secrets(value))} is neither a path nor an http(s) address")
    if "\0" in value:
        raise BadLineError("a path cannot hold a NUL character")
    return find_file(value, folder)


def _parse_masks(entry: Mapping[str, Any], folder: Path) -> MaskSource | None:
    """The ground-truth mask: `mask`, or the union of `masks`."""
    single, multiple = entry.get("mask"), entry.get("masks")
    if multiple is None:
        return None if single is None else _parse_mask(single, folder)
    if single is not None:
        raise BadLineError("it has 'mask' and 'masks': remove one of them")
    if not isinstance(multiple, list):
        raise BadLineError("'masks' must be a list with one mask for each object")
    return merge_masks([_parse_mask(value, folder) for value in multiple[: MAX_MASKS + 1]])


def _parse_mask(value: object, folder: Path) -> MaskSource:
    """Check the format of a mask. Its content is checked when it is decoded."""
    if isinstance(value, str):
        return _parse_path(value, folder)
    if isinstance(value, dict):
        rle_size(value)
        if not isinstance(value.get("counts"), str | list):
            raise BadLineError("the mask's 'counts' must be text or a list of whole numbers")
        return value
    return flatten_polygons(value)


def _parse_visualization_entry(entry: Mapping[str, Any], id: str, line: int, folder: Path) -> VisualizationEntry:
    layer, head = _parse_index(entry, "layer"), _parse_index(entry, "head")
    if (layer is None) != (head is None):
        raise BadLineError("'layer' and 'head' go together: give both or neither")
    has_file = entry.get("attention_file") is not None
    if not has_file and entry.get("id") is None:
        raise BadLineError("'attention_file' is missing")
    path = _parse_attention_file(_require_text(entry, "attention_file"), folder) if has_file else None
    if path is not None and entry.get("id") is None:
        id = attention_stem(path)
    return VisualizationEntry(id, path, layer, head, line)


def _parse_attention_file(value: str, folder: Path) -> Path:
    """The path of an attention file, which need not exist: it may be in another model's folder, found when drawn."""
    try:
        return _parse_path(value, folder)
    except ImageError as error:
        if not error.reason.startswith("no such file"):
            raise
        return local_path(value)


def _parse_index(entry: Mapping[str, Any], name: str) -> int | None:
    value = entry.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 100_000):
        raise BadLineError(f"'{name}' must be a whole number, 0 or more")
    return value
