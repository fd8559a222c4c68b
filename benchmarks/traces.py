"""Whether the map of a generated word lies on the object that the word names: `python -m benchmarks.traces [scenes]`.

The embedded model lists what it sees in test scenes of the synthetic benchmark. For each word that names exactly one of
the scene's objects, its map's peak and box are compared with that object. The step that writes a word is compared with
the step that reads it, and with two controls: the map of the question, and the map of another such word.
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

from benchmarks.boxes import SIZE, print_table
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


class NamedObject(NamedTuple):
    """An object that a word of the answer names: the maps to compare, by row of the table, and its true box."""

    maps: dict[str, Grounding | None]
    box: Box


def named_objects(writes: Trace, reads: Trace, scene: Scene) -> Iterator[NamedObject]:
    """The objects named by the words of an answer that name exactly one object of the scene."""
    names = [scene_object.name for scene_object in scene.objects]
    answer = [(word, word.text.strip(",.").lower()) for word in writes.words]
    words = [(word, name) for word, name in answer if names.count(name) == 1]
    for number, (word, name) in enumerate(words):
        following = words[number + 1 :] + words[:number]
        other = next((other for other, other_name in following if other_name != name), None)
        maps = {
            WRITES: writes.ground(word.start, word.stop),
            READS: reads.ground(word.start, word.stop),
            ASKED: writes.ground(0, 1),
            OTHER: None if other is None else writes.ground(other.start, other.stop),
        }
        yield NamedObject(maps, scene.objects[names.index(name)].box)


def trace_scenes(lvlm: LVLM, count: int, style: str | None) -> Iterator[NamedObject]:
    """The objects that the model names in `count` test scenes of a style."""
    scenes = islice(iterate_scenes(0, style, SIZE, TEST_SEEDS), count)
    for scene, _ in tqdm(scenes, total=count, disable=None):
        image = Image.fromarray(scene.image)
        writes = lvlm.trace(image, QUESTION, max_new_tokens=24)
        yield from named_objects(writes, replace(writes, step="reads"), scene)


def format_cell(pairs: list[tuple[Grounding, Box]]) -> str:
    """Pointing accuracy and Acc@0.5 with their 95 % intervals, and mean IoU, of groundings and true boxes."""
    hits = np.array([_contains(box, grounding.point) for grounding, box in pairs], dtype=float)
    ious = np.array([float(box_iou(grounding.box, box)) for grounding, box in pairs])
    return f"{_with_interval(hits)}, {_with_interval((ious >= 0.5).astype(float))}, {ious.mean():.3f}"


def _contains(box: Box, point: tuple[float, float]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def _with_interval(values: NDArray[np.float64]) -> str:
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main(count: int) -> None:
    lvlm = load_model()
    named = {name: list(trace_scenes(lvlm, count, style)) for name, style in SETS.items()}
    rows = []
    for row in (WRITES, READS, ASKED, OTHER):
        pairs = ([(one.maps[row], one.box) for one in objects if one.maps[row]] for objects in named.values())
        rows.append([row, *map(format_cell, pairs)])
    numbers = " and ".join(f"{len(objects)} words ({name})" for name, objects in named.items())
    caption = (
        f'{count} test scenes a set, {SIZE} pixels wide, asked "{QUESTION}": {numbers} name exactly one object. Heads '
        f"{' '.join(map(str, lvlm.known_heads))}. Each cell: pointing and Acc@0.5 with 95 % intervals, mean IoU."
    )
    print_table(caption, ["whose map", *SETS], rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
