"""The page of a trace: the words of an answer, and where the heads looked when each word was generated.

Like `report.html` it is self-contained, uses the same style and escapes every text. Maps take one byte per cell, the
image is a JPEG of bounded size, and only the first heads have maps of their own.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import Box
from localization_heads.grounding.ground import Grounding
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.report.content import TinyMap, embedded, tiny_map
from localization_heads.report.page import asset, environment, policy_of

MAX_BYTES = 300_000
"""Largest size of the image, before base64."""
ATTEMPTS = ((960, 85), (960, 70), (720, 70), (512, 60), (320, 50))
"""Longest side in pixels and quality of the image, tried in turn until it is small enough."""
MAX_HEADS = 8
"""Heads with maps of their own; attention sums are shown for all heads."""
MAX_MAPS = 2000
"""Largest number of maps of single heads in a page; a longer answer has only the combined maps."""
MAX_CELLS = 4096
"""Largest grid of layers by heads that is shown."""


class Part(NamedTuple):
    """What is shown for a word, or for the whole answer.

    Attributes:
        text: the word, "" for the whole answer.
        box: None if no cell is positive.
        masses: each head's attention sum on the image.
        maps: the combined map, then those of single heads.
        grid: the attention sums of all heads, `[layer, head]`; None if they were not kept.
    """

    text: str
    box: Box | None
    score: float
    masses: list[float]
    maps: list[TinyMap]
    grid: NDArray[np.float32] | None


def render_trace(trace: Trace, image: Image.Image | None, digest: str = "") -> str:
    """The HTML of the page. No text of the trace can become markup or script.

    Args:
        image: the image that was asked about; None shows the maps on grey.
        digest: a digest of what the page was made from, stored in it.
    """
    style, script = asset("report.css") + asset("trace.css"), asset("common.js") + asset("trace.js")
    parts = list(_parts(trace))
    return (
        environment()
        .get_template("trace.html")
        .render(
            trace=trace,
            parts=parts,
            heads=[str(head) for head in trace.heads],
            picture="" if image is None else embedded(image, "jpeg", ATTEMPTS, MAX_BYTES),
            data=_data(trace, parts),
            digest=digest,
            policy=policy_of(style, script),
            style=style,
            script=script,
        )
    )


def _parts(trace: Trace) -> Iterator[Part]:
    """The whole answer, unless it is empty, then each word."""
    if trace.token_ids:
        yield _part(trace, "", 0, len(trace.token_ids), trace.ground())
    for word, grounding in zip(trace.words, trace.groundings, strict=True):
        yield _part(trace, word.text, word.start, word.stop, grounding)


def _part(trace: Trace, text: str, start: int, stop: int, grounding: Grounding) -> Part:
    maps = [grounding.combined]
    own = trace.maps[start:stop, :MAX_HEADS]
    if trace.maps.shape[1] == len(trace.heads) > 1 and own.shape[1] * len(trace.words) <= MAX_MAPS:
        maps += list(own.mean(axis=0))
    all_heads = trace.every_of_tokens
    return Part(
        text,
        grounding.box if grounding.cells.any() else None,
        grounding.score,
        [float(mass) for mass in trace.masses_of(start, stop)],
        [tiny_map(one, trace.image_box, trace.image_size) for one in maps],
        None if all_heads is None else all_heads[start:stop].mean(axis=0).sum(axis=(2, 3)),
    )


def _data(trace: Trace, parts: list[Part]) -> dict[str, Any]:
    """The data of the page's script, as JSON values."""
    return {
        "region": [round(edge, 2) for edge in trace.image_box],
        "size": list(trace.image_size),
        "parts": [
            {
                "box": None if part.box is None else [round(edge, 1) for edge in part.box],
                "score": round(part.score, 3),
                "masses": [round(mass, 4) for mass in part.masses],
                "maps": [one.__dict__ for one in part.maps],
                "grid": None if part.grid is None or part.grid.size > MAX_CELLS else _grid(part.grid),
            }
            for part in parts
        ],
    }


def _grid(masses: NDArray[np.float32]) -> dict[str, Any]:
    """Attention sums `[layer, head]` encoded as bytes, 255 at the largest."""
    top = float(masses.max()) or 1.0
    cells = np.rint(255 * np.clip(masses / top, 0, 1)).astype(np.uint8)
    layers, heads = masses.shape
    return {
        "rows": layers,
        "columns": heads,
        "cells": b64encode(cells.tobytes()).decode(),
        "top": round(top, 3),
    }
