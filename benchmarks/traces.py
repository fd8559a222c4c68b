"""Whether the maps of an answer lie on what its words name: `python -m benchmarks.traces [scenes]`.

The embedded model lists what it sees in test scenes of the synthetic benchmark. Each word that names exactly one of the
scene's objects is measured: does its map's strongest cell, and its box, lie on that object? Beside the step that writes
a word stands the one that reads it, and two controls: the map of the question, and that of another such word.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.boxes import SIZE, say_table
from localization_heads import load_model
from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.evaluation.metrics import bootstrap_interval
from localization_heads.grounding.ground import Grounding
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.lvlm.model import LVLM
from localization_heads.scenes.artwork import HELD_OUT_STYLE
from localization_heads.scenes.scene import TEST_SEEDS, Scene, iterate_scenes

SCENES = 100
QUESTION = "what is in this image?"
SETS = {"known styles": None, "held-out style": HELD_OUT_STYLE}
WRITES = "the step that writes the word (`trace.step=writes`)"
READS = "the step that reads it (`trace.step=reads`)"
ASKED = "control: the question's last token"
OTHER = "control: the step that writes another named word"


class Named(NamedTuple):
    """A word that names one object, the maps that may show it, and where the object is."""

    maps: dict[str, Grounding | None]
    box: Box


def named_words(writes: Trace, reads: Trace, scene: Scene) -> Iterator[Named]:
    """The words of an answer that name exactly one object of the scene."""
    names = [thing.name for thing in scene.objects]
    heard = [(word, word.text.strip(",.").lower()) for word in writes.words]
    words = [(word, name) for word, name in heard if names.count(name) == 1]
    for number, (word, name) in enumerate(words):
        other = next((w for w, its in words[number + 1 :] + words[:number] if its != name), None)
        maps = {
            WRITES: writes.ground(word.start, word.stop),
            READS: reads.ground(word.start, word.stop),
            ASKED: writes.ground(0, 1),
            OTHER: None if other is None else writes.ground(other.start, other.stop),
        }
        yield Named(maps, scene.objects[names.index(name)].box)


def look(lvlm: LVLM, count: int, style: str | None) -> Iterator[Named]:
    """The named words of `count` test scenes of a style."""
    for scene, _ in tqdm(
        islice(iterate_scenes(0, style, SIZE, TEST_SEEDS), count), total=count, disable=None
    ):
        image = Image.fromarray(scene.image)
        found = lvlm.trace(image, QUESTION, max_new_tokens=24)
        yield from named_words(found, replace(found, step="reads"), scene)


def cell(found: list[tuple[Grounding, Box]]) -> str:
    """Pointing and Acc@0.5 with their 95 % intervals, and mean IoU."""
    points = np.array([_holds(box, grounding.point) for grounding, box in found], dtype=float)
    ious = np.array([float(box_iou(grounding.box, box)) for grounding, box in found])
    return f"{_with_bounds(points)}, {_with_bounds((ious >= 0.5).astype(float))}, {ious.mean():.3f}"


def _holds(box: Box, point: tuple[float, float]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def _with_bounds(values: NDArray[np.float64]) -> str:
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main(count: int) -> None:
    lvlm = load_model()
    seen = {name: list(look(lvlm, count, style)) for name, style in SETS.items()}
    rows = [
        [
            row,
            *(cell([(one.maps[row], one.box) for one in words if one.maps[row]]) for words in seen.values()),
        ]
        for row in (WRITES, READS, ASKED, OTHER)
    ]
    numbers = " and ".join(f"{len(words)} words ({name})" for name, words in seen.items())
    about = (
        f'{count} test scenes a set, {SIZE} pixels wide, asked "{QUESTION}": {numbers} name exactly one object. Heads '
        f"{' '.join(map(str, lvlm.known_heads))}. Each cell: pointing and Acc@0.5 with 95 % intervals, mean IoU."
    )
    say_table(about, ["whose map", *SETS], rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
