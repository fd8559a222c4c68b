"""Flickr30k Entities: `Sentences/<image>.txt`, `Annotations/<image>.xml`, and `train.txt`, `val.txt`, `test.txt`.

A sentence marks its phrases: `[/EN#283585/people A girl]`. The XML gives boxes to these numbers, counted from 1, or
calls them `scene` or `nobndbox`. Every phrase with a box is an expression; 1 is taken off all four numbers, as the
set's own reader does.
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
    BadText,
    Entry,
    HeldSource,
    Record,
    entry_or_bad,
    image_folders,
    named_image,
)
from localization_heads.errors import BadLineError, UsageError, one_line

SPLITS = ("train", "val", "test")
MAX_BYTES = 1 << 20
"""Of the sentences, or of the XML, of one image."""
MAX_LIST = 4 << 20
_PHRASE = re.compile(r"\[/EN#(\d{1,18})/(\S{1,200}) ([^\]]{1,2000})\]")


class Phrase(NamedTuple):
    """A phrase of an image. `number` counts the image's phrases; `error` is why the image has none that can be used."""

    split: str
    image: str
    number: int
    chain: str
    types: str
    text: str
    error: str = ""


class Flickr30kEntities(HeldSource):
    kind = "Sentences and Annotations"
    protocol = "flickr30k"

    def __init__(self, root: Path, lists: Mapping[str, Path], images: Path | None) -> None:
        super().__init__(list(lists.values()))
        self.root, self.lists = root, dict(lists)
        self.folders = image_folders(images, root, "flickr30k-images", "flickr30k_images", "images")

    def name(self, row: int) -> str:
        return str(self.held[row].image)

    def load(self) -> Iterator[Phrase]:
        for split, path in self.lists.items():
            for image in _text(path, MAX_LIST).split():
                yield from self._phrases(split, image[:100])

    def _phrases(self, split: str, image: str) -> list[Phrase]:
        """Those with a box; one with the reason where the image's files cannot be read."""
        try:
            if not image.isalnum():
                raise BadLineError("the name of an image in the list is no number")
            marked = _PHRASE.findall(_text(self.root / "Sentences" / f"{image}.txt", MAX_BYTES))
            boxes = read_boxes(self.root / "Annotations" / f"{image}.xml")
        except (UsageError, BadLineError) as error:
            return [Phrase(split, image, 0, "", "", "", str(error))]
        return [
            Phrase(split, image, number, chain, types, text)
            for number, (chain, types, text) in enumerate(marked)
            if chain in boxes
        ]

    def row_split(self, values: Phrase) -> str:
        return values.split

    def entries(self, row: int, values: Phrase) -> list[Entry | BadText]:
        if values.error:
            raise BadLineError(values.error)
        id = f"{values.image}_phrase{values.number}"
        return [entry_or_bad(id, values.split, f"flickr30k:{values.image}", values.text, row)]

    def record(self, row: int, found: Phrase) -> Record:
        known = read_boxes(self.root / "Annotations" / f"{found.image}.xml")
        boxes = tuple(map(check_box, known[found.chain]))
        file = named_image(self.folders, f"{found.image}.jpg")
        more: dict[str, Any] = {"phrase_type": found.types.split("/")[0], "chain": found.chain}
        if len(boxes) == 1:
            return Record(row, file, box=boxes[0], more=more)
        return Record(row, file, boxes=boxes, more=more)


def _text(path: Path, most: int) -> str:
    try:
        if path.stat().st_size > most:
            raise UsageError(f"{path}: far too large")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes of each number, from 0: xyxy. UsageError for a file that cannot be read; entities are refused."""
    content = _text(path, MAX_BYTES)
    if "<!DOCTYPE" in content or "<!ENTITY" in content:
        raise UsageError(f"{path}: an XML file with declarations of its own is not read")
    boxes: dict[str, list[Box]] = {}
    try:
        for thing in ElementTree.fromstring(content).iter("object"):
            found = thing.find("bndbox")
            if found is not None:
                x0, y0, x1, y1 = (
                    float(found.findtext(name) or "") - 1 for name in ("xmin", "ymin", "xmax", "ymax")
                )
                for name in thing.findall("name"):
                    boxes.setdefault((name.text or "").strip(), []).append((x0, y0, x1, y1))
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    return boxes
