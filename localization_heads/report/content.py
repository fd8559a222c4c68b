"""The content of a report: its heads and its samples, a few kilobytes each.

A sample is stored as a thumbnail, its maps with one byte per cell, and its masks as outlines. The page's script colours
and scales the maps when they are shown. All sizes are bounded: a thousand samples stay below 20 MB, whatever their
images and grids.
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
"""Heads selected less often are left out of the scatter plot and its correlation (paper, Sec. 4.4, Fig. 6b)."""
MAX_BYTES = 8_000
"""Largest size of a thumbnail, before base64."""
ATTEMPTS = ((224, 72), (224, 50), (160, 50), (112, 40), (80, 30), (56, 20))
"""Longest side in pixels and quality of the thumbnail, tried in turn until it is small enough."""
MAX_CELLS = 32
"""Largest number of cells along a side of a map; finer maps are averaged down."""
OUTLINE_SIDE = 320
"""Longer side of the mask, in pixels, at which outlines are traced."""
TOLERANCE = 1.2
"""Tolerance of the Douglas-Peucker simplification of outlines, in pixels of that resolution."""
MAX_POINTS = 400
MAX_BOXES = 100
"""Largest number of predicted boxes on a card, and of true boxes."""


@dataclass(frozen=True)
class TinyMap:
    """A map for the page: `rows x columns` bytes in base64, 255 at the maximum inside the image."""

    rows: int
    columns: int
    cells: str


def thumbnail(image: Image.Image) -> str:
    """The image as a small WebP (JPEG if Pillow lacks WebP) in a `data:` URL."""
    return embedded(image, "webp" if features.check("webp") else "jpeg", ATTEMPTS, MAX_BYTES)


def embedded(image: Image.Image, kind: str, attempts: Sequence[tuple[int, int]], max_bytes: int) -> str:
    """The image in a `data:` URL: the first of `attempts` with at most `max_bytes`, else the last one.

    Args:
        kind: image format, such as "jpeg".
        attempts: longest side in pixels and quality, from large to small.
    """
    rgb, content = image.convert("RGB"), b""
    for side, quality in attempts:
        scale, buffer = min(1.0, side / max(rgb.size)), BytesIO()
        size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
        rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=2).save(buffer, kind, quality=quality)
        if len(content := buffer.getvalue()) <= max_bytes:
            break
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def tiny_map(values: NDArray[np.floating], image_box: Box, image_size: tuple[int, int]) -> TinyMap:
    """Encode a map `[h, w]` as bytes, scaled by its maximum inside the image; cells in the padding are ignored."""
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
    """The outline of a mask `[H, W]` as an SVG path in pixels of the image; "" for an empty mask."""
    import cv2

    height, width = mask.shape
    resized = _resize_mask(mask)
    scale = np.array([width / resized.shape[1], height / resized.shape[0]])
    contours, _ = cv2.findContours(resized, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    simplified = [cv2.approxPolyDP(contour, TOLERANCE, closed=True)[:, 0] for contour in contours]
    paths: list[str] = []
    num_points = 0
    for contour in sorted((contour for contour in simplified if len(contour) > 2), key=len, reverse=True):
        num_points += len(contour)
        if paths and num_points > MAX_POINTS:
            break
        # OpenCV's contours run through the centres of pixels; here they run along the edge of the image.
        last = np.array(resized.shape[::-1]) - 1
        points = np.where(contour == 0, 0, np.where(contour == last, contour + 1, contour + 0.5))
        paths.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (points * scale).tolist()) + "Z")
    return "".join(paths)


def _resize_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The mask as 0 and 1 at about `OUTLINE_SIDE` pixels: downscaled by majority, or its pixels repeated."""
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
    """A sample of the gallery.

    Args:
        image_size: `(W, H)` of the image; boxes, outlines and `image_box` are in its pixels.
        image: `data:` URL of the thumbnail, "" if the image cannot be opened.
        boxes: predicted boxes, the best first.
        truths: true boxes.
        mask: outline of the predicted masks as an SVG path, "" for none.
        truth_mask: outline of the true mask.
        heads: the heads that made the box.
        maps: the maps of the first of them, in the same order.
        combined: the sum of the smoothed maps of all of them; None if the maps are not available.
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
    """Chooses at most `limit` cards: one half the first samples of the data set, one half the worst of the others.

    The choice does not depend on the order in which samples are offered. A card is made only if it has a place at that
    moment, which saves most of the thumbnails of a large data set.
    """

    def __init__(self, limit: int) -> None:
        self._max_first, self._max_worst = limit - limit // 2, limit // 2
        # Heaps of (-place, badness, card), the last sample on top, and (badness, -place, card), the best one on top.
        self._first: list[tuple[int, float, Card]] = []
        self._worst: list[tuple[float, int, Card]] = []

    def offer(self, place: int, badness: float, make: Callable[[], Card]) -> Card | None:
        """Make and keep the card of a sample if there is room for it; of equally bad samples the earlier one stays.

        Args:
            place: the sample's position in the data set, unique to it.

        Returns:
            The card, or None if there is no room. Such a sample has no place in a gallery of more samples either.
        """
        if len(self._first) < self._max_first:
            heapq.heappush(self._first, (-place, badness, card := make()))
            return card
        if self._first and place < -self._first[0][0]:
            card = make()
            last, last_badness, last_card = heapq.heapreplace(self._first, (-place, badness, card))
            self._offer_worst(-last, last_badness, lambda: last_card)
            return card
        return self._offer_worst(place, badness, make)

    def _offer_worst(self, place: int, badness: float, make: Callable[[], Card]) -> Card | None:
        if len(self._worst) < self._max_worst:
            heapq.heappush(self._worst, (badness, -place, card := make()))
            return card
        if self._worst and (badness, -place) > self._worst[0][:2]:
            heapq.heapreplace(self._worst, (badness, -place, card := make()))
            return card
        return None

    @property
    def cards(self) -> list[Card]:
        """The cards in the order of the data set."""
        cards = [(-place, card) for place, _, card in self._first]
        cards += [(-place, card) for _, place, card in self._worst]
        return [card for _, card in sorted(cards, key=lambda entry: entry[0])]


@dataclass(frozen=True)
class HeadFacts:
    """What a report shows of a model's heads.

    Args:
        shape: `(layers, heads)` of the model; `ranking` may list fewer heads, since heads.json lists only those kept.
        used: the localization heads, which made the boxes or would make them.
        bottom_row: share of samples in which the head's whole bottom row is positive, `[layer, head]`.
        iou: mean IoU of the boxes of each head by itself, `[layer, head]`, NaN where it was not measured.
        iou_samples: number of samples behind `iou`.
        origin: a sentence on where the ranking comes from; "" if the run made it.
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
        """Selection frequency and IoU of the heads that have an IoU and are selected often enough."""
        if self.iou is None:
            return []
        return [
            (head.selection_frequency, float(self.iou[head.address]))
            for head in self.ranking.heads
            if head.selection_frequency >= LEAST_FREQUENCY and math.isfinite(self.iou[head.address])
        ]

    @property
    def correlation(self) -> tuple[float, float] | None:
        """Spearman's rho and its two-sided p-value over the heads of `scatter`; None if undefined."""
        frequency, iou = np.array(self.scatter, dtype=np.float64).reshape(-1, 2).T
        return spearman(frequency, iou)


@dataclass(frozen=True)
class Report:
    """Everything that `report.html` shows.

    Args:
        facts: model, data, output and versions, as (name, value).
        options: every option of the run, as (name, value).
        num_entries: selected lines of the data set, including those that failed.
        no_heads: a sentence on why `heads` is missing; `no_scatter` and `no_cards` alike.
        num_grounded: samples that were grounded; the gallery may show fewer.
        ious: IoUs of the grounded samples with a true box.
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
