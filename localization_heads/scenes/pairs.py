"""Scenes of two objects with an expression that does not say which is meant, for heads that are steered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import Image

from localization_heads.options.surroundings import ScenesOptions
from localization_heads.scenes.scene import Scene, render_scene
from localization_heads.scenes.write import SPLITS, scenes_folder
from localization_heads.store.files import RunLock, write_bytes

QUESTION = "the thing"
"""An expression that fits both, which the embedded model answers by describing one of them."""


def pairs(options: ScenesOptions) -> Path:
    """Render the scenes and write their data file; returns that file. What is there already is kept."""
    folder = scenes_folder(options).with_name(f"{scenes_folder(options).name}-pairs")
    data_file = folder / "pairs.jsonl"
    with RunLock(folder):
        if not data_file.is_file():  # written last, so that its presence means that all is there
            lines = [
                _write(folder, number, scene)
                for number, scene in enumerate(islice(two_objects(options), options.count))
            ]
            write_bytes(data_file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return data_file


def two_objects(options: ScenesOptions) -> Iterator[Scene]:
    """Scenes with two objects of different names, endless; the set, split, style and size are those of the options."""
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


def _write(folder: Path, number: int, scene: Scene) -> dict[str, Any]:
    id = f"pair_{number:05d}"
    image = BytesIO()
    Image.fromarray(scene.image).save(image, "PNG")
    write_bytes(folder / f"{id}.png", image.getvalue())
    regions = [{"bbox": list(thing.box), "answer": thing.name} for thing in scene.objects]
    return {"id": id, "prompt": QUESTION, "image_path": f"{id}.png", "regions": regions}
