"""The read-outs compared, from maps to boxes: `python -m benchmarks.boxes [scenes]`.

Three sets of test scenes of the synthetic benchmark are used: known styles, the held-out style, and 4:3 images, which
the processor pads. The model runs once per scene. Prints the Markdown table of docs/readouts.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from tqdm import tqdm

from localization_heads import load_model
from localization_heads.attention import AttentionMaps, Box
from localization_heads.cells import box_iou
from localization_heads.evaluation.metrics import bootstrap_interval
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.lvlm.model import LVLM
from localization_heads.options.compose import load_preset
from localization_heads.options.groups import GroundingOptions
from localization_heads.scenes.artwork import HELD_OUT_STYLE
from localization_heads.scenes.expressions import Expression
from localization_heads.scenes.scene import SMALL, TEST_SEEDS, Scene, scene_samples
from localization_heads.scenes.write import crop_rows
from localization_heads.segmentation.grabcut import GrabCut
from localization_heads.segmentation.segmenter import refine

SCENES = 300
SIZE = 256  # pixels
SETS: dict[str, tuple[str | None, int | None]] = {
    "known styles": (None, None),
    "held-out style": (HELD_OUT_STYLE, None),
    "4:3, padded": (None, 192),
}
"""Art style and height in pixels (None: square) of each set, by name."""

SHARP = load_preset("grounding", "sharp")
MAP = {**SHARP, "box_from": "map"}
PLAIN = {"sigma": 0.0, "means": 1.5, "component": "largest_mass"}
ROWS: dict[str, Mapping[str, Any]] = {
    "`grounding=paper`": {},
    "`grounding=published`": {**load_preset("grounding", "published"), "ignore_padding": False},
    "`sigma=0`": {"sigma": 0.0},
    "`sigma=0 means=1.5`": {"sigma": 0.0, "means": 1.5},
    "`sigma=0 means=1.5 component=largest_mass`": PLAIN,
    "`binarise=otsu`": {"binarise": "otsu"},
    "`binarise=top_mass`": {"binarise": "top_mass"},
    "`upsample=4`": {"upsample": 4},
    "`box_from=mask`": {"box_from": "mask"},
    "`grounding=sharp box_from=map`": MAP,
    "... `component=containing_peak`": {**MAP, "component": "containing_peak"},
    "... `edges=interpolated`": {**MAP, "edges": "interpolated"},
    "... `trim=false`": {**MAP, "trim": False},
    "... `peak_limit=null`": {**MAP, "peak_limit": None},
    "... `large=null`": {**MAP, "large": None},
    "... `box_from=mask`": {**SHARP, "box_from": "mask"},
    "`grounding=sharp`": SHARP,
}
"""Grounding options of each read-out, by name; all are compared with the first, the paper's."""


class CroppedScene(NamedTuple):
    """A scene cropped in height around the object of its expression, with the true box."""

    image: Image.Image
    box: Box
    scene: Scene
    expression: Expression


class AttendedScene(NamedTuple):
    """An image, its attention maps and the true box."""

    image: Image.Image
    maps: AttentionMaps
    box: Box


def draw_scenes(
    count: int, style: str | None, height: int | None = None, smallest: float = SMALL[0]
) -> Iterator[CroppedScene]:
    """`count` test scenes of a style, cropped to `height` rows around the object.

    Args:
        smallest: the smallest allowed longer side of an object, as a share of the image's side.
    """
    scenes = scene_samples(count, size=SIZE, style=style, seeds=TEST_SEEDS, smallest=smallest)
    for number, (scene, expression) in enumerate(scenes):
        x0, y0, x1, y1 = scene.objects[expression.object_index].box
        rows = crop_rows((x0, y0, x1, y1), SIZE, height, seed=number)
        image = Image.fromarray(scene.image[rows])
        box = (x0, max(y0, rows.start) - rows.start, x1, min(y1, rows.stop) - rows.start)
        yield CroppedScene(image, box, scene, expression)


def attend_scenes(lvlm: LVLM, count: int, style: str | None, height: int | None) -> Iterator[AttendedScene]:
    """`count` test scenes with their attention maps, up to the deepest known head."""
    last_layer = max(head.layer for head in lvlm.known_heads)
    for scene in tqdm(draw_scenes(count, style, height), total=count, disable=None):
        maps = lvlm.attend(scene.image, scene.expression.text, last_layer=last_layer)
        yield AttendedScene(scene.image, maps, scene.box)


def box_ious(scenes: Sequence[AttendedScene], heads: Sequence[Head], options: Mapping[str, Any]) -> NDArray[np.float64]:
    """IoU of each scene's box with the true one."""
    grounding_options = GroundingOptions(**options)
    box_from = grounding_options.box_from
    segmenter = None if box_from == "map" else GrabCut()
    ious = []
    for scene in scenes:
        grounding = ground_maps(scene.maps, heads, grounding_options)
        box = refine(grounding, scene.image, segmenter, box_from=box_from).box
        ious.append(float(box_iou(box, scene.box)))
    return np.array(ious)


def format_difference(values: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """The mean difference from the reference in points, with its paired 95 % interval."""
    points = 100.0 * (values - reference)
    low, high = bootstrap_interval(points)
    return f"{points.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def format_cell(ious: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """Acc@0.5, Acc@0.75 and mean IoU, and the difference in Acc@0.5 from the reference."""
    numbers = f"{(ious >= 0.5).mean():.3f} {(ious >= 0.75).mean():.3f} {ious.mean():.3f}"
    if ious is reference:
        return numbers
    return f"{numbers} ({format_difference((ious >= 0.5).astype(float), (reference >= 0.5).astype(float))})"


def compare_readouts(count: int, lvlm: LVLM) -> list[list[str]]:
    """One row per read-out: its name, and a cell per set of scenes."""
    table = [[name] for name in ROWS]
    for style, height in SETS.values():
        scenes = list(attend_scenes(lvlm, count, style, height))
        ious = [box_ious(scenes, lvlm.known_heads, options) for options in tqdm(ROWS.values(), disable=None)]
        for row, values in zip(table, ious, strict=True):
            row.append(format_cell(values, ious[0]))
    return table


def print_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a caption and a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    Console(soft_wrap=True).print(f"{caption}\n\n{table}", markup=False, highlight=False)


def main(count: int) -> None:
    lvlm = load_model()
    rows = compare_readouts(count, lvlm)
    names = " ".join(map(str, lvlm.known_heads))
    caption = (
        f"{count} test scenes a set, {SIZE} pixels wide, heads {names}. Each cell: Acc@0.5, Acc@0.75, mean IoU, and "
        "how many points Acc@0.5 is ahead of the paper's, with its paired 95 % interval."
    )
    print_table(caption, ["read-out", *SETS], rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
