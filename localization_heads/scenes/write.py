"""Write the synthetic benchmark to disk: `stage=scenes`, and `data=scenes` if it does not exist yet.

Steering heads is tested on other scenes, written here too: two objects and an expression that fits both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from localization_heads.attention import Box
from localization_heads.cells import tight_box
from localization_heads.data.masks import encode_mask
from localization_heads.options.stage_groups import ScenesOptions
from localization_heads.scenes.expressions import (
    Expression,
    GeneralizedExpression,
    draw_absent_expression,
    draw_expression,
    draw_plural_expression,
)
from localization_heads.scenes.scene import (
    SMALL,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    iterate_scenes,
    moving_scene,
    render_scene,
)
from localization_heads.store.files import RunLock, write_bytes

SPLITS = {"train": TRAIN_SEEDS, "validation": VALIDATION_SEEDS, "test": TEST_SEEDS}


def write_scenes(options: ScenesOptions) -> Path:
    """Render the benchmark, unless it exists, and return its data file."""
    folder = scenes_folder(options)
    data_file = folder / "scenes.jsonl"
    with RunLock(folder):
        if not data_file.is_file():  # written last, so its presence means that the benchmark is complete
            _write_benchmark(options, folder, data_file)
    return data_file


def scenes_folder(options: ScenesOptions) -> Path:
    """The folder of a benchmark, named after everything that determines it."""
    parts = (
        options.split,
        options.style or "mixed",
        options.seed,
        options.count,
        options.size if options.height is None else f"{options.size}x{options.height}",
        *([f"smallest{options.smallest:g}"] if options.smallest != SMALL[0] else []),
        *([f"absent{options.absent:g}"] if options.absent else []),
        *(["targets"] if options.targets == "all" else []),
        *([f"frames{options.frames}"] if options.frames > 1 else []),
    )
    return Path(options.folder) / "-".join(map(str, parts))


def _write_benchmark(options: ScenesOptions, folder: Path, data_file: Path) -> None:
    if options.frames > 1:
        return _write_lines(data_file, _video_entries(options, folder))
    samples = islice(_draw_samples(options), options.count)
    progress = tqdm(samples, total=options.count, desc="scenes", unit="scene", disable=None)
    entries = (
        write_scene(folder, number, scene, expression, options.height)
        for number, (scene, expression) in enumerate(progress)
    )
    _write_lines(data_file, entries)


def _write_lines(data_file: Path, entries: Iterable[dict[str, Any]]) -> None:
    write_bytes(data_file, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _video_entries(options: ScenesOptions, folder: Path) -> Iterator[dict[str, Any]]:
    """Write scenes as videos and yield an entry per frame. A scene has one expression, and its name as `picture`."""
    start = SPLITS[options.split].start + options.seed * 2**20
    written = 0
    for seed in range(start, start + 2**20):
        if written == options.count:
            return
        frames = moving_scene(seed, options.frames, size=options.size, style=options.style, smallest=options.smallest)
        first = next(frames)
        if not first.expressions:
            continue
        expression = draw_expression(first.expressions, Random(seed + 1))
        name = f"scene_{written:05d}"
        for number, scene in enumerate(chain([first], frames)):
            entry = write_scene(folder, f"{name}_f{number:03d}", scene, expression)
            yield {**entry, "picture": name}
        written += 1


def _draw_samples(options: ScenesOptions) -> Iterator[tuple[Scene, Expression | GeneralizedExpression]]:
    """Yield scenes with one expression each; with default options, those of `scene_samples`."""
    seeds = SPLITS[options.split]
    for scene, seed in iterate_scenes(options.seed, options.style, options.size, seeds, smallest=options.smallest):
        if Random(seed + 2).random() < options.absent:
            yield scene, draw_absent_expression(scene.things, Random(seed + 3))
        elif options.targets == "all" and (plural := draw_plural_expression(scene.things, Random(seed + 4))):
            yield scene, plural
        elif options.targets == "one" and scene.expressions:
            yield scene, draw_expression(scene.expressions, Random(seed + 1))


def write_scene(
    folder: Path,
    number: int | str,
    scene: Scene,
    expression: Expression | GeneralizedExpression,
    height: int | None = None,
) -> dict[str, Any]:
    """Write a scene's image, and return its entry for the data file with the ground truth.

    Args:
        number: of the scene, or the id of its entry.
        height: crop the image to this many rows, which include the target; None keeps all rows.
    """
    id = number if isinstance(number, str) else f"scene_{number:05d}"
    targets = [scene.objects[index] for index in expression.targets]
    target_box = enclosing_box([target.box for target in targets]) or (0.0, 0.0, 1.0, 1.0)
    rows = crop_rows(target_box, scene.image.shape[0], height, seed=number if isinstance(number, int) else 0)
    _save_image(folder, id, scene.image[rows])
    entry: dict[str, Any] = {"id": id, "prompt": expression.text, "image_path": f"{id}.png"}
    if not targets:
        return {**entry, "bbox": None, "absent": True, "kind": expression.kind}
    if isinstance(expression, GeneralizedExpression):
        masks = [target.mask[rows] for target in targets]
        boxes = [list(box) for mask in masks if (box := tight_box(mask))]  # some may be outside the crop
        return {**entry, "bboxes": boxes, "mask": encode_mask(np.any(masks, axis=0)), "kind": expression.kind}
    x0, y0, x1, y1 = targets[0].box
    return {
        **entry,
        "bbox": [x0, max(y0, rows.start) - rows.start, x1, min(y1, rows.stop) - rows.start],
        "mask": encode_mask(targets[0].mask[rows]),
        "kind": expression.kind,
        "answer": expression.answer,
    }


def _save_image(folder: Path, id: str, pixels: np.ndarray) -> None:
    image = BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    write_bytes(folder / f"{id}.png", image.getvalue())


def enclosing_box(boxes: Sequence[Box]) -> Box | None:
    """The smallest box that contains all boxes; None if there are none."""
    if not boxes:
        return None
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def crop_rows(box: Box, size: int, height: int | None, seed: int = 0) -> slice:
    """Choose `height` of `size` rows at random so that they contain the box, or its middle if the box is taller.

    >>> crop_rows((0, 10, 9, 60), 100, 50), crop_rows((0, 0, 9, 100), 100, 50), crop_rows((0, 0, 9, 9), 100, None)
    (slice(10, 60, None), slice(25, 75, None), slice(0, 100, None))
    """
    if height is None:
        return slice(0, size)
    first, last = max(0, math.ceil(box[3]) - height), min(math.floor(box[1]), size - height)
    top = Random(seed).randint(first, last) if first <= last else round((box[1] + box[3] - height) / 2)
    return slice(top, top + height)


AMBIGUOUS_EXPRESSION = "the thing"
"""Fits both objects; the embedded model answers it by describing one of them."""


def write_scene_pairs(options: ScenesOptions) -> Path:
    """Render scenes of two objects for steering, unless they exist, and return their data file."""
    folder = scenes_folder(options).with_name(f"{scenes_folder(options).name}-pairs")
    data_file = folder / "pairs.jsonl"
    with RunLock(folder):
        if not data_file.is_file():  # written last, so its presence means that the benchmark is complete
            numbered = enumerate(islice(two_object_scenes(options), options.count))
            _write_lines(data_file, (_write_pair(folder, number, scene) for number, scene in numbered))
    return data_file


def two_object_scenes(options: ScenesOptions) -> Iterator[Scene]:
    """Yield scenes with two objects of different names, without end; set, split, style and size as in the options."""
    start = SPLITS[options.split].start + options.seed * 2**20
    for seed in count(start):
        scene = render_scene(
            seed,
            size=options.size,
            style=options.style,
            num_objects=2,
            repeats=0.0,
            smallest=options.smallest,
        )
        if len({thing.name for thing in scene.objects}) == 2:
            yield scene


def _write_pair(folder: Path, number: int, scene: Scene) -> dict[str, Any]:
    id = f"pair_{number:05d}"
    _save_image(folder, id, scene.image)
    regions = [{"bbox": list(thing.box), "answer": thing.name} for thing in scene.objects]
    return {"id": id, "prompt": AMBIGUOUS_EXPRESSION, "image_path": f"{id}.png", "regions": regions}
