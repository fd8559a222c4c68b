"""What a second look at the cropped image gains: `python -m benchmarks.second_look [scenes]`.

Grounds test scenes of the synthetic benchmark with and without `zoom=true`: in known styles, in the held-out style, and
with objects of little more than half the size. Prints the Markdown table of docs/readouts.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.boxes import MAP, SHARP, SIZE, CroppedScene, draw_scenes, format_difference, print_table
from localization_heads import GroundingOptions, ground, load_model
from localization_heads.cells import box_iou
from localization_heads.lvlm.model import LVLM
from localization_heads.scenes.artwork import HELD_OUT_STYLE
from localization_heads.scenes.scene import SMALL

SCENES = 200
SMALLER = 0.16
SETS: dict[str, tuple[str | None, float]] = {
    "known styles": (None, SMALL[0]),
    "held-out style": (HELD_OUT_STYLE, SMALL[0]),
    f"small objects (`scenes.smallest={SMALLER}`)": (None, SMALLER),
}
"""Art style and smallest object (`scenes.smallest`) of each set, by name."""
ROWS = {"`grounding=sharp box_from=map`": MAP, "`grounding=sharp`": SHARP}


def ground_ious(
    lvlm: LVLM, scenes: Sequence[CroppedScene], options: GroundingOptions, *, zoom: bool
) -> NDArray[np.float64]:
    """IoU of each scene's box with the true one."""
    images, texts = [scene.image for scene in scenes], [scene.expression.text for scene in scenes]
    segmenter = None if options.box_from == "map" else "grabcut"
    located = ground(lvlm, images, texts, options=options, segmenter=segmenter, zoom=zoom)
    pairs = zip(located, scenes, strict=True)
    return np.array([float(box_iou(found.box, scene.box)) for found, scene in pairs])


def format_cell(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Mean IoU with one look and with two, and their difference."""
    return f"{first.mean():.3f}, {second.mean():.3f} ({format_difference(second, first)})"


def main(count: int) -> None:
    lvlm = load_model()
    table = [[name] for name in ROWS]
    for style, smallest in SETS.values():
        scenes = list(draw_scenes(count, style, smallest=smallest))
        for row, options in zip(table, ROWS.values(), strict=True):
            looks = [ground_ious(lvlm, scenes, GroundingOptions(**options), zoom=zoom) for zoom in (False, True)]
            row.append(format_cell(*looks))
    caption = (
        f"{count} test scenes a set, {SIZE} pixels wide. Each cell: mean IoU with one look and with two, and how many "
        "points the second gains, with its paired 95 % interval."
    )
    print_table(caption, ["read-out", *SETS], table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
