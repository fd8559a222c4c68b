"""Expressions with no target or several: certain by plain words, in the data file, and the same scenes as without."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from localization_heads.data.masks import read_mask
from localization_heads.options.surroundings import ScenesOptions
from localization_heads.scenes import write
from localization_heads.scenes.expressions import Thing
from localization_heads.scenes.scene import render_scene, scene_samples
from localization_heads.scenes.targets import absent, plural

DOG = Thing("dog", "red", "small", (0.2, 0.5), frozenset({"red"}))
CAT = Thing("cat", "blue", "small", (0.8, 0.5), frozenset({"blue"}))
OTHER_DOG = Thing("dog", "plain", "big", (0.5, 0.9), frozenset({"orange", "gray"}))


def texts_of(things: list[Thing], draws: int = 400) -> set[str]:
    found = {absent(things, Random(seed)) for seed in range(draws)}
    return {one.text.removeprefix("the ") for one in found if one.kind != "name"}


def test_absent_by_hand() -> None:
    texts = texts_of([DOG, CAT])
    assert {
        "right dog", "dog on the right", "left cat", "dog right of the cat", "cat left of the dog",
    } <= texts  # fmt: skip
    assert "blue dog" in texts and "red cat" in texts
    assert not {"left dog", "right cat", "red dog", "blue cat", "dog left of the cat", "top dog"} & texts


def test_what_may_be_so_is_not_absent() -> None:
    """Two dogs: one of them is the right one, wherever it is; a plain one may be of any of its colours."""
    texts = texts_of([DOG, CAT, OTHER_DOG])
    assert not [
        text for text in texts if text in ("right dog", "orange dog", "gray dog", "dog right of the cat")
    ]
    assert "blue dog" in texts


@pytest.mark.parametrize("seed", range(60))
def test_names_that_are_absent_are_not_there(seed: int) -> None:
    things = render_scene(2**41 + seed, size=32).things
    found = absent(things, Random(seed))
    said = found.text.removeprefix("the ").split()
    if found.kind == "name":
        assert not any(thing.name in said for thing in things)
    elif found.kind == "colour":
        assert not any(thing.name == said[1] and said[0] in thing.colours for thing in things)
    assert found.targets == ()


def test_plurals_by_hand() -> None:
    texts = {
        found.text: found.targets
        for seed in range(200)
        if (found := plural([DOG, CAT, OTHER_DOG], Random(seed)))
    }
    assert texts == {"the dogs": (0, 2), "the animals": (0, 1, 2)}
    assert plural([DOG, Thing("bus", "blue", "big", (0.8, 0.5), frozenset({"blue"}))], Random(0)) is None


def test_a_colour_that_might_fit_another_has_no_plural() -> None:
    red = [DOG, Thing("bus", "red", "big", (0.8, 0.5), frozenset({"red"}))]
    assert (
        plural(red, Random(0)) == plural(red, Random(1)) and plural(red, Random(0)).text == "the red things"
    )
    maybe = Thing("key", "plain", "small", (0.5, 0.1), frozenset({"red"}))
    assert plural([*red, maybe], Random(0)) is None


def test_smaller_objects() -> None:
    def width(smallest: float) -> float:
        scenes = (scene for scene, _ in scene_samples(30, smallest=smallest))
        return float(np.mean([scene.objects[0].box[2] - scene.objects[0].box[0] for scene in scenes]))

    usual, small = width(0.26), width(0.13)
    assert 0.4 < small / usual < 0.62


def lines(tmp_path: Path, **options: object) -> list[dict]:
    chosen = ScenesOptions(count=24, size=64, folder=str(tmp_path), **options)
    folder = write.scenes_folder(chosen)
    folder.mkdir(parents=True)
    write._write(chosen, folder, folder / "scenes.jsonl")
    return [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]


def test_absent_lines(tmp_path: Path) -> None:
    usual, mixed = lines(tmp_path), lines(tmp_path, absent=0.4)
    absents = [line for line in mixed if line.get("absent")]
    assert 4 <= len(absents) <= 16
    assert all(line["bbox"] is None and "mask" not in line for line in absents)
    first = next(number for number, line in enumerate(mixed) if line.get("absent"))
    assert mixed[:first] == usual[:first]  # the scenes and their other expressions are the same


def test_plural_lines(tmp_path: Path) -> None:
    for height in (None, 48):
        for line in lines(tmp_path / str(height), targets="all", height=height):
            boxes = np.array(line["bboxes"])
            mask = read_mask(line["mask"], (64, height or 64))
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            rows, columns = np.nonzero(mask)
            assert columns.min() == boxes[:, 0].min() and columns.max() + 1 == boxes[:, 2].max()
            assert rows.min() == boxes[:, 1].min() and rows.max() + 1 == boxes[:, 3].max()
