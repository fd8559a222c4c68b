"""What a second look gains: `python -m benchmarks.second_look [scenes]`.

Test scenes of the synthetic benchmark are grounded with and without `zoom=true`: in known styles, in the held-out
style, and with objects of little more than half the size. The table is Markdown, as docs/readouts.md shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.boxes import MAP, SHARP, SIZE, Drawn, ahead, drawn, say_table
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
"""Art style and the smallest object, by name."""
ROWS = {"`grounding=sharp box_from=map`": MAP, "`grounding=sharp`": SHARP}


def ious(
    lvlm: LVLM, scenes: Sequence[Drawn], options: GroundingOptions, *, zoom: bool
) -> NDArray[np.float64]:
    """IoU of each scene's box with the true one."""
    images, texts = [one.image for one in scenes], [one.expression.text for one in scenes]
    segmenter = None if options.box_from == "map" else "grabcut"
    found = ground(lvlm, images, texts, options=options, segmenter=segmenter, zoom=zoom)
    return np.array([float(box_iou(one.box, scene.box)) for one, scene in zip(found, scenes, strict=True)])


def cell(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Mean IoU of the first look and of both, and how far these are ahead."""
    return f"{first.mean():.3f}, {second.mean():.3f} ({ahead(second, first)})"


def main(count: int) -> None:
    lvlm = load_model()
    table = [[name] for name in ROWS]
    for style, smallest in SETS.values():
        scenes = list(drawn(count, style, smallest=smallest))
        for row, options in zip(table, ROWS.values(), strict=True):
            looks = [ious(lvlm, scenes, GroundingOptions(**options), zoom=zoom) for zoom in (False, True)]
            row.append(cell(*looks))
    about = (
        f"{count} test scenes a set, {SIZE} pixels wide. Each cell: mean IoU with one look and with two, and how many "
        "points the second gains, with its paired 95 % interval."
    )
    say_table(about, ["read-out", *SETS], table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
