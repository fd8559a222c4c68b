"""Procedurally generated scenes with exact masks and boxes: the benchmark `data=scenes`.

A seed determines everything. Layout is relative to the image's sides, so a seed gives the same scene with the same
expressions at any size in pixels. The seeds of training, validation and test are disjoint. Boxes are xyxy floats in
pixels, half-open, tight around the visible mask; masks are bool (H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from random import Random

import numpy as np
from PIL import Image

from localization_heads.cells import tight_box
from localization_heads.scenes import artwork
from localization_heads.scenes.artwork import HELD_OUT_STYLE, NAMES, PALETTE, STYLES, VOCABULARY
from localization_heads.scenes.expressions import Expression, Thing, draw_expression, generate_expressions

__all__ = [
    "HELD_OUT_STYLE", "NAMES", "STYLES", "TEST_SEEDS", "TRAIN_SEEDS", "VALIDATION_SEEDS",
    "Expression", "Scene", "SceneObject", "render_scene", "scene_samples",
]  # fmt: skip

TRAIN_SEEDS = range(2**40)
VALIDATION_SEEDS = range(2**40, 2**41)
TEST_SEEDS = range(2**41, 2**42)
SMALL, BIG = (0.26, 0.36), (0.44, 0.62)  # longer side of an object, in sides of the image
COUNTS = {2: 0.25, 3: 0.33, 4: 0.24, 5: 0.11, 6: 0.07}  # objects per scene: share of scenes
PADDING = (122, 116, 104)  # the RGB colour that LLaVA's processor pads with
ROTATIONS = (-24, -12, 0, 0, 12, 24)  # degrees, in training
MAX_STEP = 0.04  # of an object from one frame to the next, in sides of the image
MAX_OVERLAP = 0.02  # of two boxes along each axis, in sides of the image


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene. `colour` is its tint or "plain"; `size_word` is "small" or "big"."""

    name: str
    kind: str
    colour: str
    size_word: str
    box: tuple[float, float, float, float]  # xyxy, pixels, half-open
    mask: np.ndarray  # bool (H, W): the visible pixels


@dataclass(frozen=True)
class Scene:
    """An image, its objects, all expressions that refer to exactly one of them, and their attributes."""

    image: np.ndarray  # uint8 (H, W, 3)
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]
    things: tuple[Thing, ...] = ()


@dataclass(frozen=True)
class _Placement:
    """An object before it is rendered; `box` is in sides of the image."""

    name: str
    style: str
    colour: str
    brightness: int
    mirrored: bool
    size_word: str
    box: tuple[float, float, float, float]

    def thing(self) -> Thing:
        x0, y0, x1, y1 = self.box
        plain = self.colour == "plain"
        colours = artwork.perceived_colours(self.style, self.name) if plain else frozenset({self.colour})
        return Thing(self.name, self.colour, self.size_word, ((x0 + x1) / 2, (y0 + y1) / 2), colours)


def render_scene(
    seed: int,
    *,
    size: int = 128,
    style: str | None = None,
    num_objects: int | None = None,
    span: float = 1.0,
    bars: tuple[float, float] = (0.0, 0.0),
    augment: bool = False,
    repeats: float = 0.4,
    smallest: float = SMALL[0],
) -> Scene:
    """Render the scene of a seed at `size` x `size` pixels.

    Args:
        style: None picks one of STYLES at random.
        num_objects: None picks 2 to 6 at random; there are fewer if they do not fit.
        span: below 1, the canvas is smaller by this factor while objects keep their size (for training).
        bars: widths of the bars at left and right, and at top and bottom, as shares of the image, in LLaVA's padding
            colour (for training: as if a non-square image had been padded).
        augment: also vary outlines, rotation, contrast, colour cast and grain (for training).
        repeats: share of scenes in which two or three objects have the same name.
        smallest: longer side of the smallest objects, in sides of the image; other sizes scale with it.

    >>> scene = render_scene(3, size=64)
    >>> scene.image.shape, len(scene.objects) >= 2
    ((64, 64, 3), True)
    """
    rng = Random(seed)
    style = style or rng.choice(STYLES)
    count = num_objects or rng.choices(list(COUNTS), list(COUNTS.values()))[0]
    placements = _place_objects(rng, style, count, span * SMALL[0] / smallest, bars, repeats)
    things = tuple(placement.thing() for placement in placements)
    expressions = generate_expressions(things, rng)
    image, masks = _render(rng, placements, size, augment)
    _paint_bars(image, bars)
    objects = tuple(_scene_object(p, mask) for p, mask in zip(placements, masks, strict=True))
    return Scene(image, objects, expressions, things)


def moving_scene(
    seed: int, num_frames: int, *, size: int = 128, style: str | None = None, smallest: float = SMALL[0]
) -> Iterator[Scene]:
    """Yield the frames of a video: objects of the seed's scene move in straight lines, and reverse before they collide.

    The first frame is `render_scene(seed)`. Expressions use only names, kinds, colours and sizes, so they stay true.
    """
    rng = Random(seed)
    style = style or rng.choice(STYLES)
    count = rng.choices(list(COUNTS), list(COUNTS.values()))[0]
    placements = _place_objects(rng, style, count, SMALL[0] / smallest, (0.0, 0.0), 0.4)
    things = tuple(placement.thing() for placement in placements)
    expressions = tuple(
        expression for expression in generate_expressions(things, rng) if expression.kind not in ("place", "relation")
    )
    motion_rng = Random(seed + 5)
    steps = [(motion_rng.uniform(-MAX_STEP, MAX_STEP), motion_rng.uniform(-MAX_STEP, MAX_STEP)) for _ in things]
    rng_state = rng.getstate()
    for _ in range(num_frames):
        rng.setstate(rng_state)  # so that the background is the same in every frame
        image, masks = _render(rng, placements, size, augment=False)
        objects = tuple(_scene_object(p, mask) for p, mask in zip(placements, masks, strict=True))
        yield Scene(image, objects, expressions, tuple(placement.thing() for placement in placements))
        _move_objects(placements, steps)


def _move_objects(placements: list[_Placement], steps: list[tuple[float, float]]) -> None:
    """Move every object by one step, in place; one that would leave the image or hit another reverses instead."""
    for index, (placement, step) in enumerate(zip(placements, steps, strict=True)):
        x0, y0, x1, y1 = placement.box
        box = (x0 + step[0], y0 + step[1], x1 + step[0], y1 + step[1])
        others = [other.box for other in placements if other is not placement]
        if min(box[:2]) < 0 or max(box[2:]) > 1 or any(_overlap(box, other) for other in others):
            steps[index] = (-step[0], -step[1])
        else:
            placements[index] = replace(placement, box=box)


def scene_samples(
    num_samples: int,
    seed: int = 0,
    style: str | None = None,
    size: int = 128,
    seeds: range = TEST_SEEDS,
    bars: tuple[float, float] = (0.0, 0.0),
    smallest: float = SMALL[0],
) -> Iterator[tuple[Scene, Expression]]:
    """Yield a fixed set of scenes, each with one expression.

    Args:
        seed: selects the set within the split.
        seeds: the split (TRAIN_SEEDS, VALIDATION_SEEDS or TEST_SEEDS).

    Other arguments are as in `render_scene`.
    """
    scenes = iterate_scenes(seed, style, size, seeds, bars, smallest)
    usable = ((scene, scene_seed) for scene, scene_seed in scenes if scene.expressions)
    for scene, scene_seed in islice(usable, num_samples):
        yield scene, draw_expression(scene.expressions, Random(scene_seed + 1))


def iterate_scenes(
    seed: int,
    style: str | None,
    size: int,
    seeds: range,
    bars: tuple[float, float] = (0.0, 0.0),
    smallest: float = SMALL[0],
) -> Iterator[tuple[Scene, int]]:
    """Yield the scenes of a set, each with its seed; arguments as in `scene_samples`."""
    start = seeds.start + seed * 2**20
    for scene_seed in range(start, start + 2**20):
        yield render_scene(scene_seed, size=size, style=style, bars=bars, smallest=smallest), scene_seed


def _place_objects(
    rng: Random, style: str, count: int, span: float, bars: tuple[float, float], repeats: float
) -> list[_Placement]:
    """Place up to `count` objects without collisions, and at least two (or `count` if it is smaller)."""
    while True:
        placements: list[_Placement] = []
        for name in _draw_object_names(rng, count, repeats):
            placement = _place_object(rng, name, style, count, span, bars, [p.box for p in placements])
            if placement:
                placements.append(placement)
        if len(placements) >= min(count, 2):
            return placements


def _draw_object_names(rng: Random, count: int, repeats: float) -> list[str]:
    names = rng.sample(NAMES, count)
    if count >= 2 and rng.random() < repeats:
        names[1] = names[0]
        if count >= 4 and rng.random() < 0.3:
            names[2] = names[0]
    rng.shuffle(names)
    return names


def _place_object(
    rng: Random,
    name: str,
    style: str,
    count: int,
    span: float,
    bars: tuple[float, float],
    occupied: list[tuple[float, float, float, float]],
) -> _Placement | None:
    """Try thirty positions for an object; None if it does not fit."""
    colour = rng.choice(list(PALETTE)) if rng.random() < 0.6 else "plain"
    brightness, mirrored = rng.randrange(5), rng.random() < 0.5
    shape = artwork.sprite_shape(style, name)
    size_word = rng.choice(("small", "big")) if count <= 4 else rng.choice(("small", "small", "big"))
    for attempt in range(30):
        if attempt == 20:
            size_word = "small"
        side = rng.uniform(*(SMALL if size_word == "small" else BIG)) / span
        width, height = side * shape[0], side * shape[1]
        if width > 1 - 2 * bars[0] or height > 1 - 2 * bars[1]:
            continue
        x, y = rng.uniform(bars[0], 1 - bars[0] - width), rng.uniform(bars[1], 1 - bars[1] - height)
        box = (x, y, x + width, y + height)
        if not any(_overlap(box, other) for other in occupied):
            return _Placement(name, style, colour, brightness, mirrored, size_word, box)
    return None


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > MAX_OVERLAP and min(a[3], b[3]) - max(a[1], b[1]) > MAX_OVERLAP


def _render(rng: Random, placements: list[_Placement], size: int, augment: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Render the image and the visible mask of every object; later objects occlude earlier ones."""
    outlined = augment and rng.random() < 0.4
    background = artwork.draw_background(rng, size)
    if rng.random() < 0.5:
        artwork.draw_clutter(rng, background)
    image = np.array(background)
    masks: list[np.ndarray] = []
    for placement in placements:
        angle = rng.choice(ROTATIONS) if augment else 0
        mask = _paste_object(image, placement, outlined, angle)
        for earlier in masks:
            earlier &= ~mask
        masks.append(mask)
    return (_augment(rng, image) if augment else image), masks


def _paint_bars(image: np.ndarray, bars: tuple[float, float]) -> None:
    """Fill the margins, in place, with LLaVA's padding colour."""
    across, down = (int(share * image.shape[0]) for share in bars)
    for window in (image[:, :across], image[:, image.shape[1] - across :]):
        window[:] = PADDING
    for window in (image[:down], image[image.shape[0] - down :]):
        window[:] = PADDING


def _paste_object(image: np.ndarray, placement: _Placement, outlined: bool, angle: int) -> np.ndarray:
    """Draw an object into the image, in place; returns its mask."""
    size = image.shape[0]
    x0, y0, x1, y1 = (edge * size for edge in placement.box)
    width, height = max(1, round(x1 - x0)), max(1, round(y1 - y0))
    left, top = min(round(x0), size - width), min(round(y0), size - height)
    pixels = artwork.sprite_pixels(placement.style, placement.name, width, height, outlined, angle)
    if placement.mirrored:
        pixels = pixels[:, ::-1]
    rgb, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if placement.colour != "plain":
        rgb = artwork.tint(rgb, placement.colour, placement.brightness)
    window = image[top : top + height, left : left + width]
    window[:] = (rgb * alpha + window * (255 - alpha) + 127) // 255
    mask = np.zeros((size, size), bool)
    mask[top : top + height, left : left + width] = alpha[..., 0] > 127
    return mask


def _augment(rng: Random, image: np.ndarray) -> np.ndarray:
    """Random contrast, brightness and colour cast, and sometimes posterisation, grain or blur (for training)."""
    table = (np.arange(256) - 128) * rng.uniform(0.7, 1.25) + 128 + rng.uniform(-20, 20)
    if rng.random() < 0.2:
        step = rng.choice((32, 48, 64))
        table = np.round(table / step) * step
    tables = [(table * rng.uniform(0.92, 1.08)).clip(0, 255).astype(np.uint8) for _ in range(3)]
    image = np.stack([row[image[..., channel]] for channel, row in enumerate(tables)], -1)
    if rng.random() < 0.2:
        image = _add_grain(rng, image)
    if rng.random() < 0.15:
        half = Image.fromarray(image).resize((image.shape[1] // 2,) * 2, Image.Resampling.BOX)
        image = np.array(half.resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    return image


@lru_cache
def _film_grain() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 8, (256, 256, 1)).astype(np.int16)


def _add_grain(rng: Random, image: np.ndarray) -> np.ndarray:
    """Add a random crop of a fixed noise pattern."""
    grain = np.tile(_film_grain(), (1 + image.shape[0] // 256, 1 + image.shape[1] // 256, 1))
    down, across = (rng.randint(0, grain.shape[i] - image.shape[i]) for i in range(2))
    crop = grain[down : down + image.shape[0], across : across + image.shape[1]]
    return np.asarray((image + crop).clip(0, 255), dtype=np.uint8)


def _scene_object(placement: _Placement, mask: np.ndarray) -> SceneObject:
    kind = VOCABULARY[placement.name][0]
    box = tight_box(mask)
    assert box is not None  # the layout keeps every object visible
    return SceneObject(placement.name, kind, placement.colour, placement.size_word, box, mask)
