"""What a report holds: its heads and its samples, each of them in a few kilobytes.

A sample is a small image, its maps a byte a cell, its masks as outlines. Maps are not baked into images: the page
colours and scales the bytes when they are looked at. The sizes are bounded, so that a thousand samples stay below
20 MB whatever their images and grids.
"""

from __future__ import annotations

import heapq
import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from localization_heads.attention import Box
from localization_heads.cells import visible_cells, visible_edges
from localization_heads.errors import BadEntry
from localization_heads.evaluation.metrics import spearman
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking

LEAST_FREQUENCY = 0.01
"""Heads that are selected less often take no part in the scatter and its correlation (paper, Sec. 4.4, Fig. 6b)."""
MAX_BYTES = 8_000
"""A thumbnail is no larger, before base64."""
ATTEMPTS = ((224, 72), (224, 50), (160, 50), (112, 40), (80, 30), (56, 20))
"""Longest side in pixels and quality, tried in turn until the thumbnail is small enough."""
MAX_CELLS = 32
"""Cells of a map along either side; finer maps are averaged down to this."""
OUTLINE_SIDE = 320
"""Resolution at which outlines are traced, in pixels along the longer side."""
TOLERANCE = 1.2
"""How far, in pixels of that resolution, a point that is left out may lie from the line (Douglas and Peucker)."""
MAX_POINTS = 400
MAX_BOXES = 100
"""Predicted ones on a card, and as many true ones."""


@dataclass(frozen=True)
class TinyMap:
    """A map as the page gets it: `rows x columns` bytes in base64, 255 its maximum inside the image."""

    rows: int
    columns: int
    cells: str


def thumbnail(image: Image.Image) -> str:
    """The image as a small WebP (or JPEG, where Pillow has no WebP) in a `data:` address."""
    return embedded(image, "webp" if features.check("webp") else "jpeg", ATTEMPTS, MAX_BYTES)


def embedded(image: Image.Image, kind: str, attempts: Sequence[tuple[int, int]], max_bytes: int) -> str:
    """The image in a `data:` address, encoded again and again until it has at most `max_bytes`, or for the last time.

    Args:
        attempts: longest side in pixels and quality.
    """
    opened, content = image.convert("RGB"), b""
    for side, quality in attempts:
        shrink, buffer = min(1.0, side / max(opened.size)), BytesIO()
        size = max(1, round(opened.width * shrink)), max(1, round(opened.height * shrink))
        small = opened.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
        small.save(buffer, kind, quality=quality)
        if len(content := buffer.getvalue()) <= max_bytes:
            break
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def tiny_map(values: NDArray[np.floating], image_box: Box, image_size: tuple[int, int]) -> TinyMap:
    """The cells `[h, w]` as bytes, from 0 to their maximum inside the image (cells in the padding are not seen)."""
    height, width = values.shape
    size = min(width, MAX_CELLS), min(height, MAX_CELLS)
    cells = np.nan_to_num(np.asarray(values, dtype=np.float32), posinf=0)
    if size != (width, height):
        cells = np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BOX))  # mean over an area
    columns, rows = visible_edges(image_box, image_size, cells.shape)
    top = float(cells[visible_cells(columns, rows)].max(initial=0.0)) or 1.0
    content = np.rint(255 * np.clip(cells / top, 0, 1)).astype(np.uint8)
    return TinyMap(content.shape[0], content.shape[1], b64encode(content.tobytes()).decode())


def outline(mask: NDArray[np.bool_]) -> str:
    """The outline of a mask `[H, W]` as the path of an SVG, in pixels of the image; "" for an empty mask."""
    import cv2

    height, width = mask.shape
    fine = _resized(mask)
    scale = np.array([width / fine.shape[1], height / fine.shape[0]])
    contours, _ = cv2.findContours(fine, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    loops = [cv2.approxPolyDP(contour, TOLERANCE, closed=True)[:, 0] for contour in contours]
    drawn: list[str] = []
    points = 0
    for loop in sorted((loop for loop in loops if len(loop) > 2), key=len, reverse=True):
        points += len(loop)
        if drawn and points > MAX_POINTS:
            break
        # Contours run through the centres of pixels; at the image's edge they run along it.
        edges = np.where(loop == 0, 0, np.where(loop == np.array(fine.shape[::-1]) - 1, loop + 1, loop + 0.5))
        drawn.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (edges * scale).tolist()) + "Z")
    return "".join(drawn)


def _resized(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """0 and 1 at about `OUTLINE_SIDE` pixels: a larger mask by majority, a smaller one repeated."""
    longer = max(mask.shape)
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    if longer > OUTLINE_SIDE:
        size = [max(1, round(side * OUTLINE_SIDE / longer)) for side in grey.size]
        grey = grey.resize((size[0], size[1]), Image.Resampling.BOX)
    else:
        repeats = OUTLINE_SIDE // longer
        grey = grey.resize((grey.width * repeats, grey.height * repeats), Image.Resampling.NEAREST)
    return (np.asarray(grey) >= 128).astype(np.uint8)


@dataclass(frozen=True)
class Card:
    """One sample of the gallery, all of it small.

    Args:
        image_size: `(W, H)` of the image; boxes, outlines and `image_box` are in its pixels.
        image: `data:` address of the thumbnail, "" where the image cannot be opened.
        boxes: the predicted ones, the best first.
        mask: outline of the predicted masks as an SVG path, "" for none.
        truth_mask: the same of the true mask.
        heads: whose maps were added; `maps` holds the first of theirs, in this order.
        combined: the sum of the smoothed maps of all heads; None where the maps are not at hand.
        image_box: the region that the maps cover.
    """

    id: str
    expression: str
    image_size: tuple[int, int]
    image: str
    boxes: tuple[Box, ...] = ()
    truths: tuple[Box, ...] = ()
    mask: str = ""
    truth_mask: str = ""
    score: float | None = None
    iou: float | None = None
    heads: tuple[Head, ...] = ()
    maps: tuple[TinyMap, ...] = ()
    combined: TinyMap | None = None
    image_box: Box = (0.0, 0.0, 1.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "heads": [list(head) for head in self.heads]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Card:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        known = {
            "image_size": tuple(data["image_size"]),
            "heads": tuple(Head(*head) for head in data["heads"]),
            "maps": tuple(TinyMap(**one) for one in data["maps"]),
            "combined": None if data["combined"] is None else TinyMap(**data["combined"]),
            "image_box": tuple(data["image_box"]),
            "boxes": tuple(tuple(box) for box in data["boxes"]),
            "truths": tuple(tuple(box) for box in data["truths"]),
        }
        return cls(**{**data, **known})


class Gallery:
    """At most `limit` cards: half of them the first of the data set, half the worst of the others.

    Which they are does not depend on the order in which samples are offered. A card is made only if it has a place
    at that moment, so a hundred thousand samples do not cost as many thumbnails.
    """

    def __init__(self, limit: int) -> None:
        self._places = limit - limit // 2, limit // 2
        # Heaps of (-place, badness, card), the last one on top, and of (badness, -place, card), the best one on top.
        self._first: list[tuple[int, float, Card]] = []
        self._worst: list[tuple[float, int, Card]] = []

    def offer(self, place: int, badness: float, make: Callable[[], Card]) -> Card | None:
        """Take the card of a sample if there is room for it; of equally bad ones the earlier stays.

        Args:
            place: where the sample stands in its data set; no two share one.

        Returns:
            The card, None where there is no room: then there is none in a gallery of more samples either.
        """
        if len(self._first) < self._places[0]:
            heapq.heappush(self._first, (-place, badness, card := make()))
            return card
        if self._first and place < -self._first[0][0]:
            last, its_badness, other = heapq.heapreplace(self._first, (-place, badness, card := make()))
            self._offer_worst(-last, its_badness, lambda: other)
            return card
        return self._offer_worst(place, badness, make)

    def _offer_worst(self, place: int, badness: float, make: Callable[[], Card]) -> Card | None:
        if len(self._worst) < self._places[1]:
            heapq.heappush(self._worst, (badness, -place, card := make()))
            return card
        if self._worst and (badness, -place) > self._worst[0][:2]:
            heapq.heapreplace(self._worst, (badness, -place, card := make()))
            return card
        return None

    @property
    def cards(self) -> list[Card]:
        """In the order of the data set."""
        places = [(-place, card) for place, _, card in self._first]
        places += [(-place, card) for _, place, card in self._worst]
        return [card for _, card in sorted(places, key=lambda entry: entry[0])]


@dataclass(frozen=True)
class HeadFacts:
    """The heads of a model and what is known of each.

    Args:
        shape: `(layers, heads)` of the model; `ranking` may list fewer (a heads.json lists those kept).
        used: the heads that made the boxes, or would: the localization heads.
        bottom_row: share of the samples whose map has a whole positive bottom row, `[layer, head]`.
        iou: mean IoU of each head alone, `[layer, head]`, NaN where it was not measured; over `iou_samples`.
        origin: where the ranking is from, unless the run has just found it: a sentence.
    """

    ranking: HeadRanking
    shape: tuple[int, int]
    used: Sequence[Head] = ()
    bottom_row: NDArray[np.float64] | None = None
    iou: NDArray[np.float64] | None = None
    iou_samples: int = 0
    origin: str = ""

    @property
    def scatter(self) -> list[tuple[float, float]]:
        """Selection frequency and IoU of the heads that are selected often enough and measured."""
        if self.iou is None:
            return []
        return [
            (head.selection_frequency, float(self.iou[head.address]))
            for head in self.ranking.heads
            if head.selection_frequency >= LEAST_FREQUENCY and math.isfinite(self.iou[head.address])
        ]

    @property
    def correlation(self) -> tuple[float, float] | None:
        """Spearman's rho and its two-sided p over the heads of the scatter; None where it is undefined."""
        frequency, iou = np.array(self.scatter, dtype=np.float64).reshape(-1, 2).T
        return spearman(frequency, iou)


@dataclass(frozen=True)
class Report:
    """Everything that one `report.html` shows; where a part is missing a sentence says why.

    Args:
        facts: model, data, output and versions, as (name, value).
        options: every option of the run, as (name, value).
        num_entries: lines of the data set that were to be used, failures included.
        num_grounded: samples that got a box; the gallery may show fewer.
        ious: of every one of them whose true box is known.
    """

    stage: str
    model: str
    date: str
    facts: Sequence[tuple[str, str]]
    options: Sequence[tuple[str, str]]
    num_entries: int
    heads: HeadFacts | None = None
    no_heads: str = ""
    no_scatter: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    cards: Sequence[Card] = ()
    no_cards: str = ""
    num_grounded: int = 0
    ious: Sequence[float] = ()
    failures: Sequence[BadEntry] = ()
