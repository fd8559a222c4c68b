"""Make `examples/`: scenes that the embedded model grounds well, and four photographs from scikit-image.

    python -m training.make_examples        (needs scikit-image)

The scenes are *chosen* to show the tool at work: for each kind of expression, the first two validation scenes that the
model grounds with an IoU of 0.5 or more. The model's accuracy is measured on all held-out scenes, in
docs/embedded-model.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from skimage import data as photographs

import localization_heads as lh
from localization_heads.cells import box_iou
from localization_heads.heads.head import Head
from localization_heads.scenes.scene import VALIDATION_SEEDS, Expression, Scene, render_scene

FOLDER = Path(__file__).parents[1] / "examples"
SIDE = 384  # pixels
KINDS = ("name", "place", "size", "colour", "kind", "property", "relation")
PER_KIND = 2
NUM_RANKING_SCENES = 60

# file name, function of scikit-image, query, box drawn by eye (xyxy, pixels)
PHOTOGRAPHS = (
    ("cat", "chelsea", "What is in this image?", [0, 0, 402, 300]),
    ("coffee", "coffee", "the cup", [172, 17, 412, 312]),
    ("astronaut", "astronaut", "the rocket", [353, 3, 471, 285]),
    ("launch", "rocket", "the rocket", [304, 125, 340, 408]),
)
SAMPLES = (
    ("sample_1", "object which has whiskers.", "cat"),
    ("sample_2", "object which has fur.", "cat"),
    ("sample_3", "the red thing.", "coffee"),
)


def main() -> None:
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    photograph_entries = [_photograph(number, *row) for number, row in enumerate(PHOTOGRAPHS, start=1)]
    scenes = enumerate(_well_grounded_scenes(), start=len(photograph_entries) + 1)
    scene_entries = [_scene(number, scene, expression) for number, (scene, expression) in scenes]
    entries = scene_entries + photograph_entries  # the scenes, which the model is good at, come first
    used = {Path(entry["image_path"]).name for entry in entries}
    for stale in {image.name for image in (FOLDER / "images").iterdir()} - used:
        (FOLDER / "images" / stale).unlink()
    _write("localization_data.jsonl", entries)
    _write("visualization_data.jsonl", [_view(5), _view(9, layer=4, head=4), _view(13)])
    _write("sample_data.jsonl", [_entry(id, prompt, f"{name}.jpg") for id, prompt, name in SAMPLES])


def _photograph(number: int, name: str, source: str, query: str, box: list[int]) -> dict[str, Any]:
    Image.fromarray(getattr(photographs, source)()).save(FOLDER / "images" / f"{name}.jpg", quality=90)
    return _entry(f"example_{number}", query, f"{name}.jpg") | {"bbox": box}


def _scene(number: int, scene: Scene, expression: Expression) -> dict[str, Any]:
    target = scene.objects[expression.object_index]
    name = f"{target.name}_{number}.png"
    Image.fromarray(scene.image).save(FOLDER / "images" / name, optimize=True)
    return _entry(f"example_{number}", expression.text, name) | {"bbox": [round(x) for x in target.box]}


def _entry(id: str, prompt: str, image: str) -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "image_path": f"examples/images/{image}"}


def _view(number: int, **head: int) -> dict[str, Any]:
    """The entry of an attention file that `make run` writes."""
    id = f"example_{number}"
    return {"id": id, "attention_file": f"outputs/localization_heads/tiny/attention/{id}.pkl", **head}


def _well_grounded_scenes() -> list[tuple[Scene, Expression]]:
    """The first `PER_KIND` well-grounded scenes of each kind of expression, in the order of their seeds."""
    lvlm = lh.load_model()
    heads = lvlm.known_heads or _ranked_heads(lvlm)
    chosen: list[tuple[Scene, Expression]] = []
    missing = Counter(dict.fromkeys(KINDS, PER_KIND))
    for seed in VALIDATION_SEEDS[NUM_RANKING_SCENES:]:
        if not missing.total():
            break
        scene = render_scene(seed, size=SIDE)
        expressions = [e for e in scene.expressions if missing[e.kind]]
        if expressions and _is_good(lvlm, heads, scene, expression := Random(seed).choice(expressions)):
            missing[expression.kind] -= 1
            chosen.append((scene, expression))
    return chosen


def _ranked_heads(lvlm: Any) -> list[Head]:
    """The top 3 heads of the label-free ranking, for a model whose heads are not known yet."""
    scenes = [render_scene(seed) for seed in VALIDATION_SEEDS[:NUM_RANKING_SCENES]]
    samples = [lh.Sample(Image.fromarray(s.image), s.expressions[0].text) for s in scenes if s.expressions]
    return lh.find_heads(lvlm, samples).top(3)


def _is_good(lvlm: Any, heads: Any, scene: Scene, expression: Expression) -> bool:
    box = lh.ground(lvlm, Image.fromarray(scene.image), expression.text, heads).box
    return bool(box_iou(box, scene.objects[expression.object_index].box) >= 0.5)


def _write(name: str, entries: list[dict[str, Any]]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
