"""The samples that a report shows: all of a small run; of a large one the first, and the worst of the others."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from localization_heads.attention import Box
from localization_heads.heads.head import Head
from localization_heads.report.thumbnails import TinyMap


@dataclass(frozen=True)
class Card:
    """One sample of the gallery, all of it small.

    Args:
        image_size: `(W, H)` of the picture; boxes, outlines and `image_box` are in its pixels.
        picture: `data:` address of the thumbnail, "" where the picture cannot be opened.
        mask, truth_mask: outlines as SVG paths, "" for none.
        heads: whose maps were added; `maps` holds the first of theirs, in this order.
        combined: the sum of the smoothed maps of all heads; None where the maps are not at hand.
        image_box: the region that the maps cover.
    """

    id: str
    expression: str
    image_size: tuple[int, int]
    picture: str
    box: Box | None = None
    truth: Box | None = None
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
            "box": None if data["box"] is None else tuple(data["box"]),
            "truth": None if data["truth"] is None else tuple(data["truth"]),
        }
        return cls(**{**data, **known})


class Gallery:
    """At most `limit` cards: half of them the first of the data set, half the worst of the others.

    Which they are does not depend on the order in which samples are offered. A card is made only if it has a place
    at that moment, so a hundred thousand samples do not cost as many thumbnails.
    """

    def __init__(self, limit: int) -> None:
        self._places = limit - limit // 2, limit // 2
        self._first: list[
            tuple[int, float, Card]
        ] = []  # heap of (-place, badness, card): the last one on top
        self._worst: list[
            tuple[float, int, Card]
        ] = []  # heap of (badness, -place, card): the best one on top

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
