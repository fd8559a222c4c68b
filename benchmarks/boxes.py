"""From maps to boxes, every read-out side by side: `python -m benchmarks.boxes [scenes]`.

On three sets of test scenes of the synthetic benchmark: known styles, the held-out style, and images of 4:3, which the
processor pads. The model sees each scene once; the table is Markdown, as docs/readouts.md shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Art style and rows that are kept, by name."""

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
"""The paper's row first: the others are compared with it."""


class Drawn(NamedTuple):
    """A scene to be shown, cropped to so many rows around the object, with the truth."""

    image: Image.Image
    box: Box
    scene: Scene
    expression: Expression


class Seen(NamedTuple):
    """A scene as the model saw it, with the truth."""

    image: Image.Image
    maps: AttentionMaps
    box: Box


def drawn(
    count: int, style: str | None, height: int | None = None, smallest: float = SMALL[0]
) -> Iterator[Drawn]:
    """`count` test scenes of a style, cropped to so many rows around the object.

    Args:
        smallest: the least longer side of an object, as a share of the image's.
    """
    scenes = scene_samples(count, size=SIZE, style=style, seeds=TEST_SEEDS, smallest=smallest)
    for number, (scene, expression) in enumerate(scenes):
        x0, y0, x1, y1 = scene.objects[expression.object_index].box
        rows = crop_rows((x0, y0, x1, y1), SIZE, height, seed=number)
        image = Image.fromarray(scene.image[rows])
        box = (x0, max(y0, rows.start) - rows.start, x1, min(y1, rows.stop) - rows.start)
        yield Drawn(image, box, scene, expression)


def look(lvlm: LVLM, count: int, style: str | None, height: int | None) -> Iterator[Seen]:
    """The same as the model sees them."""
    last_layer = max(head.layer for head in lvlm.known_heads)
    for one in tqdm(drawn(count, style, height), total=count, disable=None):
        maps = lvlm.attend(one.image, one.expression.text, last_layer=last_layer)
        yield Seen(one.image, maps, one.box)


def ious(seen: Sequence[Seen], heads: Sequence[Head], options: Mapping[str, Any]) -> NDArray[np.float64]:
    """IoU of each scene's box with the true one."""
    chosen, grabcut = GroundingOptions(**options), GrabCut()
    segmenter = None if chosen.box_from == "map" else grabcut
    boxes = (
        refine(ground_maps(one.maps, heads, chosen), one.image, segmenter, box_from=chosen.box_from).box
        for one in seen
    )
    return np.array([float(box_iou(box, one.box)) for box, one in zip(boxes, seen, strict=True)])


def ahead(found: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """How many points the mean of the one is ahead of the other's, with its paired 95 % interval."""
    points = 100.0 * (found - reference)
    low, high = bootstrap_interval(points)
    return f"{points.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def cell(found: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """Acc@0.5, Acc@0.75 and mean IoU, and how far Acc@0.5 is ahead of the reference."""
    numbers = " ".join(
        f"{value:.3f}" for value in ((found >= 0.5).mean(), (found >= 0.75).mean(), found.mean())
    )
    if found is reference:
        return numbers
    return f"{numbers} ({ahead((found >= 0.5).astype(float), (reference >= 0.5).astype(float))})"


def compared(
    count: int, measure: Callable[[Sequence[Seen], Mapping[str, Any]], NDArray[np.float64]], lvlm: LVLM
) -> list[list[str]]:
    """A row of cells for each read-out, a cell for each set."""
    table = [[name] for name in ROWS]
    for style, height in SETS.values():
        seen = list(look(lvlm, count, style, height))
        found = [measure(seen, options) for options in tqdm(ROWS.values(), disable=None)]
        for row, values in zip(table, found, strict=True):
            row.append(cell(values, found[0]))
    return table


def say_table(about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print what a table is about, and the table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    Console(soft_wrap=True).print(f"{about}\n\n{table}", markup=False, highlight=False)


def main(count: int) -> None:
    lvlm = load_model()
    heads = lvlm.known_heads
    rows = compared(count, lambda seen, options: ious(seen, heads, options), lvlm)
    names = " ".join(map(str, heads))
    about = (
        f"{count} test scenes a set, {SIZE} pixels wide, heads {names}. Each cell: Acc@0.5, Acc@0.75, mean IoU, and "
        "how many points Acc@0.5 is ahead of the paper's, with its paired 95 % interval."
    )
    say_table(about, ["read-out", *SETS], rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
