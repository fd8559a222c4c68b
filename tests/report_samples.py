"""Reports of made-up runs, as large and as hostile as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from localization_heads.errors import BadEntry
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.options.groups import CriteriaOptions
from localization_heads.report.content import Card, HeadFacts, Report, outline, thumbnail, tiny_map

HOSTILE = "</script><script>boom=1</script><img src=x onerror='boom=1'>\" onload=\"boom=1 <!-- \u2028 \ud800 \x00 ]]>"


def made_ranking(layers: int = 6, heads: int = 8, exclude: int = 2, seed: int = 0, model: str = "made") -> HeadRanking:
    """Half of the heads considered are kept, in a random order; every value differs from the next."""
    random = np.random.default_rng(seed)
    sums = random.permutation(layers * heads).reshape(layers, heads) / (layers * heads)
    tau = float(np.median(sums[exclude:]))
    ranked = [
        RankedHead(
            layer=layer,
            head=head,
            selection_frequency=round(float(random.random()), 4) if kept else 0.0,
            selection_frequency_std=0.05 if kept else 0.0,
            attention_sum=float(sums[layer, head]),
            spatial_entropy=None if (layer, head) == (0, 0) else round(float(2 * random.random()), 4),
            kept=kept,
        )
        for layer, head in np.ndindex(layers, heads)
        for kept in [bool(layer >= exclude and sums[layer, head] >= tau)]
    ]
    ranked.sort(key=lambda one: (not one.kept, -one.selection_frequency))
    options = CriteriaOptions(exclude_layers=exclude)
    return HeadRanking(tuple(ranked), tau, 10, 300, 5, options, model, "bootstrap")


def made_card(number: int, expression: str = "", *, grid: int = 24, size: tuple[int, int] = (640, 480)) -> Card:
    """An image of noise, which compresses worst, with maps of noise, a box, masks and truth."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    rows, columns = np.mgrid[: size[1], : size[0]]
    mask = np.hypot(columns - size[0] / 2, rows - size[1] / 2) < min(size) / 3
    box = (size[0] * 0.2, size[1] * 0.2, size[0] * 0.7, size[1] * 0.8)
    maps = [tiny_map(random.random((grid, grid)), (0, -80, 640, 560), size) for _ in range(4)]
    return Card(
        id=f"made_{number}",
        expression=expression or f"the thing number {number}",
        image_size=size,
        image=thumbnail(image),
        boxes=(box,),
        truths=((100.0, 100.0, 400.0, 400.0),),
        mask=outline(mask),
        truth_mask=outline(~mask),
        score=(number * 37 % 100) / 100,
        iou=(number * 61 % 100) / 100,
        heads=(Head(2, 0), Head(3, 1), Head(4, 2)),
        maps=tuple(maps[:3]),
        combined=maps[3],
        image_box=(0, -80, 640, 560),
    )


def made_report(cards: Sequence[Card] = (), **changes: Any) -> Report:
    ranking = made_ranking()
    shape = (6, 8)
    random = np.random.default_rng(1)
    heads = HeadFacts(ranking, shape, ranking.top(3), random.random(shape), random.random(shape), 20)
    fields: dict[str, Any] = {
        "stage": "batch",
        "model": "made",
        "date": "2026-01-02 03:04 UTC",
        "facts": [("model", "made"), ("torch", "2.13.0")],
        "options": [("stage", "batch"), ("k", "3")],
        "num_entries": len(cards) + 1,
        "heads": heads,
        "cards": cards,
        "no_cards": "" if cards else "No samples: report_samples=0.",
        "num_grounded": len(cards),
        "ious": [card.iou for card in cards if card.iou is not None],
        "failures": [BadEntry(7, "broken", "broken.png: no such file")],
    }
    return Report(**{**fields, **changes})
