"""Flickr30k Entities: `Sentences/<image>.txt`, `Annotations/<image>.xml`, and `train.txt`, `val.txt`, `test.txt`.

Sentences mark their phrases: `[/EN#283585/people A girl]`. The XML assigns boxes to these numbers, or marks them as
`scene` or `nobndbox`. Every phrase with a box is an expression. Box coordinates count from 1 in the XML, so 1 is
subtracted from all four, as in the data set's own reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from localization_heads.attention import Box
from localization_heads.data.lines import check_box
from localization_heads.datasets.base import (
    BadExpression,
    IndexEntry,
    InMemorySource,
    Record,
    find_image_folders,
    find_named_image,
    make_entry,
)
from localization_heads.errors import BadLineError, UsageError, first_line

SPLITS = ("train", "val", "test")
MAX_BYTES = 1 << 20
"""For the sentences, and for the XML, of one image."""
MAX_LIST_BYTES = 4 << 20
_PHRASE = re.compile(r"\[/EN#(\d{1,18})/(\S{1,200}) ([^\]]{1,2000})\]")


class Phrase(NamedTuple):
    """A phrase that has a box, or, with `error` set, an image whose phrases cannot be read.

    Args:
        number: index of the phrase among all phrases of its image.
        chain: id of the object (coreference chain) that the phrase refers to.
        types: types of the object, such as `people` or `clothing/bodyparts`.
    """

    split: str
    image: str
    number: int
    chain: str
    types: str
    text: str
    error: str = ""


class Flickr30kEntities(InMemorySource):
    """Flickr30k Entities, one row per phrase."""

    kind = "Sentences and Annotations"
    protocol = "flickr30k"

    def __init__(self, root: Path, lists: Mapping[str, Path], images: Path | None) -> None:
        super().__init__(list(lists.values()))
        self.root, self.lists = root, dict(lists)
        self.folders = find_image_folders(images, root, "flickr30k-images", "flickr30k_images", "images")

    def row_name(self, row: int) -> str:
        return str(self.loaded[row].image)

    def load_rows(self) -> Iterator[Phrase]:
        for split, path in self.lists.items():
            for image in _read_text(path, MAX_LIST_BYTES).split():
                yield from self._phrases(split, image[:100])

    def _phrases(self, split: str, image: str) -> list[Phrase]:
        """The phrases of an image that have a box, or a single `Phrase` with the error if its files cannot be read."""
        try:
            if not image.isalnum():
                raise BadLineError("the name of an image in the list is not a number")
            phrases = _PHRASE.findall(_read_text(self.root / "Sentences" / f"{image}.txt", MAX_BYTES))
            boxes = read_boxes(self.root / "Annotations" / f"{image}.xml")
        except (UsageError, BadLineError) as error:
            return [Phrase(split, image, 0, "", "", "", str(error))]
        return [
            Phrase(split, image, number, chain, types, text)
            for number, (chain, types, text) in enumerate(phrases)
            if chain in boxes
        ]

    def row_split(self, phrase: Phrase) -> str:
        return phrase.split

    def row_entries(self, row: int, phrase: Phrase) -> list[IndexEntry | BadExpression]:
        if phrase.error:
            raise BadLineError(phrase.error)
        id = f"{phrase.image}_phrase{phrase.number}"
        return [make_entry(id, phrase.split, f"flickr30k:{phrase.image}", phrase.text, row)]

    def make_record(self, row: int, phrase: Phrase) -> Record:
        boxes_by_chain = read_boxes(self.root / "Annotations" / f"{phrase.image}.xml")
        boxes = tuple(map(check_box, boxes_by_chain[phrase.chain]))
        file = find_named_image(self.folders, f"{phrase.image}.jpg")
        extra: dict[str, Any] = {"phrase_type": phrase.types.split("/")[0], "chain": phrase.chain}
        if len(boxes) == 1:
            return Record(row, file, box=boxes[0], extra=extra)
        return Record(row, file, boxes=boxes, extra=extra)


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        if path.stat().st_size > max_bytes:
            raise UsageError(f"{path}: far too large")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes (xyxy, from 0) by chain id. UsageError if the file cannot be read, or declares XML entities."""
    text = _read_text(path, MAX_BYTES)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UsageError(f"{path}: an XML file with a DOCTYPE or entities is not read")
    boxes: dict[str, list[Box]] = {}
    try:
        for element in ElementTree.fromstring(text).iter("object"):
            bndbox = element.find("bndbox")
            if bndbox is not None:
                x0, y0, x1, y1 = (float(bndbox.findtext(name) or "") - 1 for name in ("xmin", "ymin", "xmax", "ymax"))
                for name in element.findall("name"):
                    boxes.setdefault((name.text or "").strip(), []).append((x0, y0, x1, y1))
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {first_line(error, 100)}") from error
    return boxes
