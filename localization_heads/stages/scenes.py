"""The synthetic benchmark on disk: `stage=scenes` writes it, `data=scenes` uses it (and writes it if need be)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from localization_heads.data.masks import encode_mask
from localization_heads.data.scenes import (
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Expression,
    Scene,
    scene_samples,
)
from localization_heads.stages.run import Run
from localization_heads.store.atomic import write_bytes
from localization_heads.store.lock import RunLock

SPLITS = {"train": TRAIN_SEEDS, "validation": VALIDATION_SEEDS, "test": TEST_SEEDS}


def scenes(run: Run) -> Path:
    """Render the benchmark and write its data file; returns that file. What is there already is kept."""
    options = run["scenes"]
    folder = scenes_folder(options)
    data_file = folder / "scenes.jsonl"
    with RunLock(folder):
        if not data_file.is_file():  # written last, so that its presence means that all is there
            _write(options, folder, data_file)
    return data_file


def scenes_folder(options: Mapping[str, Any]) -> Path:
    """One folder a benchmark, named after everything that it depends on."""
    parts = (
        options["split"],
        options["style"] or "mixed",
        options["seed"],
        options["count"],
        options["size"],
    )
    return Path(options["folder"]) / "-".join(map(str, parts))


def _write(options: Mapping[str, Any], folder: Path, data_file: Path) -> None:
    samples = scene_samples(
        options["count"], options["seed"], options["style"], options["size"], SPLITS[options["split"]]
    )
    progress = tqdm(samples, total=options["count"], desc="scenes", unit="scene", disable=None)
    entries = [write_scene(folder, number, *sample) for number, sample in enumerate(progress)]
    write_bytes(data_file, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def write_scene(folder: Path, number: int, scene: Scene, expression: Expression) -> dict[str, Any]:
    """Write a scene's picture; returns the line of the data file, with true box and mask."""
    id = f"scene_{number:05d}"
    picture = BytesIO()
    Image.fromarray(scene.image).save(picture, "PNG")
    write_bytes(folder / f"{id}.png", picture.getvalue())
    target = scene.objects[expression.object_index]
    return {
        "id": id,
        "prompt": expression.text,
        "image_path": f"{id}.png",
        "bbox": list(target.box),
        "mask": encode_mask(target.mask),
        "kind": expression.kind,
        "answer": expression.answer,
    }
