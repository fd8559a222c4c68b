"""The synthetic scenes: determinism, exact boxes, and expressions with one, several or no referents."""

import json
import subprocess
import sys
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from localization_heads.cells import tight_box
from localization_heads.data.masks import read_mask
from localization_heads.options.stage_groups import ScenesOptions
from localization_heads.scenes import artwork
from localization_heads.scenes.artwork import HELD_OUT_STYLE, NAMES, STYLES
from localization_heads.scenes.expressions import (
    RELATIONS,
    Phrase,
    Thing,
    draw_absent_expression,
    draw_plural_expression,
    find_referents,
)
from localization_heads.scenes.scene import (
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    render_scene,
    scene_samples,
)
from localization_heads.scenes.write import write_scenes

SEEDS = range(60)
FEATURES = {name: feature for name, (_, feature) in artwork.VOCABULARY.items()}
USED_FOR = {"eat": "food", "ride": "vehicle", "wear": "clothing", "play": "instrument"}


def digest(seed):
    scene = render_scene(seed)
    return sha256(scene.image.tobytes() + repr(scene.expressions).encode()).hexdigest()


def test_seed_determines_the_scene_across_processes():
    code = "from tests.test_scenes import digest; print(*(digest(seed) for seed in range(8)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [digest(seed) for seed in range(8)]
    assert len(set(output.split())) == 8


@pytest.mark.parametrize("style", [None, *STYLES, HELD_OUT_STYLE])
def test_every_style_has_a_sprite_for_every_name(style):
    for name in NAMES if style else ():
        pixels = artwork.sprite_pixels(style, name, 40, 40)
        assert pixels.shape == (40, 40, 4)
        assert (pixels[..., 3] > 127).mean() > 0.05
    assert render_scene(1, style=style).image.dtype == np.uint8


@pytest.mark.parametrize("size", [96, 128, 300])
def test_boxes_are_tight_around_disjoint_masks(size):
    for seed in SEEDS:
        scene = render_scene(seed, size=size)
        assert scene.image.shape == (size, size, 3)
        assert 2 <= len(scene.objects) <= 6
        assert sum(o.mask.astype(int) for o in scene.objects).max() == 1
        for o in scene.objects:
            rows, columns = np.nonzero(o.mask)
            assert o.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tight_box(o.mask)


def test_scene_is_the_same_at_any_size():
    for seed in SEEDS:
        small, large = render_scene(seed, size=128), render_scene(seed, size=512)
        assert small.expressions == large.expressions
        for a, b in zip(small.objects, large.objects, strict=True):
            assert (a.name, a.colour, a.size_word) == (b.name, b.colour, b.size_word)
            assert np.abs(np.array(a.box) * 4 - b.box).max() <= 10


def centre(o):
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def could_mean(text, o, scene):
    """A second implementation that parses the text: whether it could refer to the object `o`."""
    words = text.removeprefix("the ").split()
    if words[:2] == ["something", "to"]:
        return o.kind == USED_FOR[words[2]]
    for relation in RELATIONS:
        if f" {relation} the " in text:
            noun, other = text.removeprefix("the ").split(f" {relation} the ")
            (anchor,) = [a for a in scene.objects if a.name == other]
            (x, y), (u, v) = centre(o), centre(anchor)
            holds = {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]
            sideways = abs(y - v) > 2 * abs(x - u) if "of" in relation else abs(x - u) > 2 * abs(y - v)
            return o.name == noun and holds and not sideways
    if words[-2] in ("with", "has") if len(words) > 1 else False:
        return FEATURES[o.name] == words[-1] and words[0] in (o.kind, "thing", "object")
    noun = next(w for w in words if w in NAMES or w in ("thing", "object") or w in {a.kind for a in scene.objects})
    same = [a for a in scene.objects if noun in (a.name, a.kind, "thing", "object")]
    (word,) = {w for w in words if w not in (noun, "on", "at", "the")} or {None}
    if word in ("left", "right", "top", "bottom"):
        axis, best = word in ("top", "bottom"), min if word in ("left", "top") else max
        return o in same and centre(o)[axis] == best(centre(a)[axis] for a in same)
    return o in same and word in (None, o.size_word, o.colour)


def test_expressions_refer_to_exactly_their_object():
    for seed in SEEDS:
        scene = render_scene(seed, size=256)
        for e in scene.expressions:
            meant = [i for i, o in enumerate(scene.objects) if could_mean(e.text, o, scene)]
            assert meant == [e.object_index], (seed, e)
            o = scene.objects[e.object_index]
            assert set(e.answer.split()) == {o.colour, o.size_word, o.name}


def thing(name, x=0.5, y=0.5, colour="plain", size="big"):
    return Thing(name, colour, size, (x, y), frozenset({colour}))


@pytest.mark.parametrize(
    ("phrase", "meant"),
    [
        (Phrase(("name", "dog")), [0, 1]),
        (Phrase(("name", "dog"), ("place", "left")), [0]),
        (Phrase(("name", "dog"), ("place", "top")), [0, 1]),  # too close to call
        (Phrase(("name", "pizza"), ("place", "left")), []),  # the only one, which is not on the left
        (Phrase(("kind", "animal"), ("colour", "red")), [1]),
        (Phrase(("any", ""), ("colour", "red")), [1, 2]),
        (Phrase(("feature", "fur")), [0, 1]),
        (Phrase(("name", "dog"), ("relation", "left of", "pizza")), [0]),
        (Phrase(("name", "pizza"), ("relation", "below", "dog")), []),  # which dog?
    ],
)
def test_find_referents(phrase, meant):
    things = [thing("dog", 0.1, 0.50), thing("dog", 0.6, 0.52, "red"), thing("pizza", 0.6, 0.8, "red")]
    assert find_referents(phrase, things) == meant


def test_perceived_colours_of_untinted_sprites():
    assert "red" in artwork.perceived_colours("noto", "strawberry")
    assert "red" not in artwork.perceived_colours("noto", "panda")


def test_sample_sets_are_reproducible_and_splits_disjoint():
    first, again = ([e for _, e in scene_samples(20, seed=3)] for _ in range(2))
    assert first == again != [e for _, e in scene_samples(20, seed=4)]
    assert {e.kind for _, e in scene_samples(200)} >= {"name", "place", "colour", "size", "kind", "property"}
    assert TRAIN_SEEDS.stop <= VALIDATION_SEEDS.start
    assert VALIDATION_SEEDS.stop <= TEST_SEEDS.start
    assert next(islice(scene_samples(1, style=HELD_OUT_STYLE), 1))[0].expressions


@pytest.mark.parametrize("bars", [(0.2, 0.0), (0.0, 0.1)])
def test_bars_are_empty_and_have_the_padding_colour(bars):
    for seed in range(8):
        scene = render_scene(seed, size=100, bars=bars, augment=True)
        across, down = (int(100 * share) for share in bars)
        inner = np.zeros((100, 100), bool)
        inner[down : 100 - down, across : 100 - across] = True
        assert (scene.image[~inner] == (122, 116, 104)).all()
        assert not any((o.mask & ~inner).any() for o in scene.objects)


def test_style_may_be_the_path_of_an_atlas(tmp_path):
    """Names that the atlas lacks come from the first style."""
    sheet = Image.new("RGBA", (artwork.COLUMNS * artwork.CELL, 8 * artwork.CELL))
    sheet.paste((10, 20, 30, 255), (0, 0, artwork.CELL, artwork.CELL // 2))
    sheet.save(tmp_path / "plain.webp", lossless=True)
    style = str(tmp_path / "plain")
    assert artwork.sprite_shape(style, NAMES[0]) == (1.0, 0.5)
    assert (artwork.sprite_pixels(style, NAMES[0], 8, 4) == (10, 20, 30, 255)).all()
    borrowed = artwork.sprite_pixels(style, NAMES[1], 8, 8)
    assert (borrowed == artwork.sprite_pixels(artwork.STYLES[0], NAMES[1], 8, 8)).all()


def test_repeats_sets_the_share_of_scenes_with_equal_names():
    for share in (0.0, 1.0):
        scenes = [render_scene(seed, size=32, num_objects=2, repeats=share) for seed in range(40)]
        assert {len({o.name for o in scene.objects}) for scene in scenes} == {2 - share}


def test_smaller_canvas_keeps_the_object_size():
    scene = render_scene(5, size=64, num_objects=1, span=0.5, augment=True)
    (only,) = scene.objects
    assert max(only.box[2] - only.box[0], only.box[3] - only.box[1]) >= 0.25 * 128 - 2


# ---------------------------------------------------------------------------------- several targets, and none


DOG = Thing("dog", "red", "small", (0.2, 0.5), frozenset({"red"}))
CAT = Thing("cat", "blue", "small", (0.8, 0.5), frozenset({"blue"}))
OTHER_DOG = Thing("dog", "plain", "big", (0.5, 0.9), frozenset({"orange", "gray"}))


def texts_of(things: list[Thing], draws: int = 400) -> set[str]:
    found = {draw_absent_expression(things, Random(seed)) for seed in range(draws)}
    return {one.text.removeprefix("the ") for one in found if one.kind != "name"}


def test_absent_expressions_by_hand() -> None:
    texts = texts_of([DOG, CAT])
    assert {
        "right dog",
        "dog on the right",
        "left cat",
        "dog right of the cat",
        "cat left of the dog",
    } <= texts
    assert {"blue dog", "red cat"} <= texts
    assert not {"left dog", "right cat", "red dog", "blue cat", "dog left of the cat", "top dog"} & texts


def test_ambiguous_phrases_are_not_absent_expressions() -> None:
    """One of two dogs is always "the right dog", and an untinted dog may have any of its perceived colours."""
    texts = texts_of([DOG, CAT, OTHER_DOG])
    assert not texts & {"right dog", "orange dog", "gray dog", "dog right of the cat"}
    assert "blue dog" in texts


@pytest.mark.parametrize("seed", range(60))
def test_absent_expressions_match_no_object(seed: int) -> None:
    things = render_scene(2**41 + seed, size=32).things
    found = draw_absent_expression(things, Random(seed))
    words = found.text.removeprefix("the ").split()
    if found.kind == "name":
        assert not any(thing.name in words for thing in things)
    elif found.kind == "colour":
        assert not any(thing.name == words[1] and words[0] in thing.colours for thing in things)
    assert found.targets == ()


def test_plural_expressions_by_hand() -> None:
    texts = {
        found.text: found.targets
        for seed in range(200)
        if (found := draw_plural_expression([DOG, CAT, OTHER_DOG], Random(seed)))
    }
    assert texts == {"the dogs": (0, 2), "the animals": (0, 1, 2)}
    bus = Thing("bus", "blue", "big", (0.8, 0.5), frozenset({"blue"}))
    assert draw_plural_expression([DOG, bus], Random(0)) is None


def test_colour_that_might_describe_another_object_has_no_plural() -> None:
    red = [DOG, Thing("bus", "red", "big", (0.8, 0.5), frozenset({"red"}))]
    assert {draw_plural_expression(red, Random(seed)).text for seed in (0, 1)} == {"the red things"}
    maybe = Thing("key", "plain", "small", (0.5, 0.1), frozenset({"red"}))
    assert draw_plural_expression([*red, maybe], Random(0)) is None


def test_smallest_scales_all_objects() -> None:
    def width(smallest: float) -> float:
        scenes = (scene for scene, _ in scene_samples(30, smallest=smallest))
        return float(np.mean([scene.objects[0].box[2] - scene.objects[0].box[0] for scene in scenes]))

    usual, small = width(0.26), width(0.13)
    assert 0.4 < small / usual < 0.62


def lines(tmp_path: Path, **options: object) -> list[dict]:
    """The entries of a small benchmark."""
    data_file = write_scenes(ScenesOptions(count=24, size=64, folder=str(tmp_path), **options))
    return [json.loads(line) for line in data_file.read_text().splitlines()]


def test_benchmark_with_absent_expressions(tmp_path: Path) -> None:
    usual, mixed = lines(tmp_path), lines(tmp_path, absent=0.4)
    absents = [line for line in mixed if line.get("absent")]
    assert 4 <= len(absents) <= 16
    assert all(line["bbox"] is None and "mask" not in line for line in absents)
    first = next(number for number, line in enumerate(mixed) if line.get("absent"))
    assert mixed[:first] == usual[:first]  # scenes and other expressions are unchanged


def test_benchmark_with_plural_expressions(tmp_path: Path) -> None:
    for height in (None, 48):
        found = lines(tmp_path / str(height), targets="all", height=height)
        assert found
        for line in found:
            boxes = np.array(line["bboxes"])
            mask = read_mask(line["mask"], (64, height or 64))
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            rows, columns = np.nonzero(mask)
            assert columns.min() == boxes[:, 0].min() and columns.max() + 1 == boxes[:, 2].max()
            assert rows.min() == boxes[:, 1].min() and rows.max() + 1 == boxes[:, 3].max()
