"""Every way from a map to a box and a mask, on the synthetic benchmark: `python -m benchmarks.boxes [scenes]`.

The model sees each scene once; the tables are Markdown, as docs/grounding.md shows them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from tqdm import tqdm

from localization_heads import load_model
from localization_heads.attention import AttentionMaps, Box
from localization_heads.evaluation.metrics import box_iou, mask_overlap
from localization_heads.grounder import make_segmenter
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions, SegmenterOptions
from localization_heads.scenes.scene import TEST_SEEDS, scene_samples
from localization_heads.segmentation.segmenter import GRABCUT, refine

SCENES = 300
SIZE = 256  # pixels

BOXES: tuple[Mapping[str, Any], ...] = (
    {},
    {"component": "all"},
    {"kernel_size": 9, "component": "all"},
    {"sigma": 0.0},
    {"binarise": "otsu"},
    {"binarise": "otsu", "component": "all"},
    {"binarise": "top_mass", "top_mass": 0.5},
    {"binarise": "top_mass", "top_mass": 0.7},
    {"binarise": "top_mass", "top_mass": 0.9},
    *(
        {"binarise": method, "upsample": 4, "interpolation": interpolation, **smoothing}
        for method in ("mean", "otsu")
        for interpolation in ("nearest", "bilinear")
        for smoothing in ({}, {"kernel_size": 25, "sigma": 4.0})
    ),
)

MASKS = tuple((kind, binarise) for binarise in ("mean", "otsu") for kind in ("none", "grabcut"))


class Seen(NamedTuple):
    """A scene as the model saw it, with the truth."""

    image: Image.Image
    maps: AttentionMaps
    box: Box
    mask: NDArray[np.bool_]


def look(count: int) -> tuple[list[Seen], tuple[Head, ...]]:
    """The maps of `count` test scenes, and the known heads of the embedded model."""
    lvlm = load_model()
    last_layer = max(head.layer for head in lvlm.known_heads)
    seen = []
    for scene, expression in tqdm(
        scene_samples(count, size=SIZE, seeds=TEST_SEEDS), total=count, disable=None
    ):
        image, target = Image.fromarray(scene.image), scene.objects[expression.object_index]
        maps = lvlm.attend(image, expression.text, last_layer=last_layer)
        seen.append(Seen(image, maps, target.box, target.mask))
    return seen, lvlm.known_heads


def box_row(seen: Sequence[Seen], heads: Sequence[Head], options: Mapping[str, Any]) -> list[str]:
    ious = np.array([float(box_iou(ground(one, heads, options).box, one.box)) for one in seen])
    named = ", ".join(f"`{name}={value}`" for name, value in options.items()) or "the paper's"
    return [named, *(f"{value:.3f}" for value in ((ious >= 0.5).mean(), (ious >= 0.75).mean(), ious.mean()))]


def mask_row(seen: Sequence[Seen], heads: Sequence[Head], kind: str, binarise: str) -> list[str]:
    segmenter = make_segmenter(GRABCUT if kind == "grabcut" else SegmenterOptions("none"))
    overlaps, of_map, of_mask = [], [], []
    for one in seen:
        grounding = ground(one, heads, {"binarise": binarise})
        refined = refine(grounding, one.image, segmenter, box_from="mask")
        overlaps.append(mask_overlap(refined.mask, one.mask))
        of_map.append(float(box_iou(grounding.box, one.box)))
        of_mask.append(float(box_iou(refined.box, one.box)))
    shared, union = np.array(overlaps).T
    accuracies = (np.mean(np.array(ious) >= 0.5) for ious in (of_map, of_mask))
    numbers = (np.mean(shared / union), shared.sum() / union.sum(), *accuracies)
    return [f"`segmenter={kind}`", f"`{binarise}`", *(f"{number:.3f}" for number in numbers)]


def ground(one: Seen, heads: Sequence[Head], options: Mapping[str, Any]) -> Grounding:
    return ground_maps(one.maps, heads, GroundingOptions(**options))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(count: int) -> None:
    seen, heads = look(count)
    boxes = [box_row(seen, heads, options) for options in tqdm(BOXES, disable=None)]
    masks = [mask_row(seen, heads, *choice) for choice in tqdm(MASKS, disable=None)]
    say = Console(soft_wrap=True).print
    names = " ".join(map(str, heads))
    say(f"{count} test scenes of {SIZE} x {SIZE} pixels, heads {names}\n", highlight=False)
    say(table(["grounding", "Acc@0.5", "Acc@0.75", "mean IoU"], boxes) + "\n", markup=False, highlight=False)
    header = ["mask", "binarise", "gIoU", "cIoU", "Acc@0.5 of the map's box", "of the mask's box"]
    say(table(header, masks), markup=False, highlight=False)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
