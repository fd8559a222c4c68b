"""Ways of prompting the model and of combining its heads compared: `python -m benchmarks.aggregation [scenes]`.

Uses the three sets of test scenes of `benchmarks.boxes`, and heads ranked without labels on validation scenes. The
read-out is `sharp` with the box of the map; the last row refines it with the mask. Prints the Markdown table of
docs/readouts.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.boxes import (
    MAP,
    SETS,
    SHARP,
    SIZE,
    AttendedScene,
    CroppedScene,
    box_ious,
    draw_scenes,
    format_difference,
    print_table,
)
from localization_heads import Sample, find_heads, load_model
from localization_heads.heads.head import Head
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, ExtraPrompts
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import Contrast
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples

SCENES = 500
RANKING_SCENES = 1000  # validation scenes
MODEL_SIZE = 192  # pixels, of the validation scenes: the model's own image size
NUM_CONSENSUS_HEADS = 7  # the other rows combine three heads
TEMPLATES = ("the {}", "a {}", "{}")


def expressions_of_other_objects(cropped: CroppedScene) -> list[str]:
    """The first expression of each object other than the target."""
    first = {expression.object_index: expression.text for expression in reversed(cropped.scene.expressions)}
    return [text for index, text in sorted(first.items()) if index != cropped.expression.object_index]


def any_other_expressions(cropped: CroppedScene) -> list[str]:
    """Up to four of the scene's other expressions, whatever they refer to."""
    texts = sorted({expression.text for expression in cropped.scene.expressions} - {cropped.expression.text})
    return Random(cropped.expression.text).sample(texts, min(4, len(texts)))


@dataclass(frozen=True)
class Prompting:
    """A way of prompting: the tokens whose attention is read, and further prompts about the image."""

    query_token: str = "last"
    contrast: Contrast = "none"
    siblings: Callable[[CroppedScene], list[str]] | None = None  # None: the objects that the model lists
    paraphrases: tuple[str, ...] | None = None

    def extra_prompts(self, cropped: CroppedScene, heads: Sequence[Head]) -> tuple[ExtraPrompts, list[str]]:
        """The prompts besides the expression, and the siblings; none if `siblings` finds none in the scene."""
        siblings = self.siblings(cropped) if self.siblings else []
        if self.contrast == "none" or (self.siblings and not siblings):
            return NO_EXTRA_PROMPTS, []
        return ExtraPrompts(self.contrast, heads=tuple(heads)), siblings


LAST_TOKEN = Prompting()
LAST_AND_ANSWER = Prompting("last_and_answer")
LISTED_SIBLINGS = Prompting("last_and_answer", "siblings")
CONSENSUS = {"combine": "consensus"}
ROWS: dict[str, tuple[Prompting, int, Mapping[str, Any]]] = {
    "sum of three heads, last prompt token": (LAST_TOKEN, 3, {}),
    "consensus of seven heads": (LAST_TOKEN, NUM_CONSENSUS_HEADS, CONSENSUS),
    "`query_token=answer_mean`": (Prompting("answer_mean"), 3, {}),
    "`query_token=last_and_answer`": (LAST_AND_ANSWER, 3, {}),
    "consensus, `last_and_answer`": (LAST_AND_ANSWER, NUM_CONSENSUS_HEADS, CONSENSUS),
    "siblings, an expression of each *other* object": (
        Prompting("last", "siblings", expressions_of_other_objects),
        3,
        {},
    ),
    "siblings, any four other expressions": (Prompting("last", "siblings", any_other_expressions), 3, {}),
    "background query": (Prompting("last", "background"), 3, {}),
    'paraphrases "the {}", "a {}", "{}"': (Prompting(paraphrases=TEMPLATES), 3, {}),
    "consensus, `last_and_answer`, listed names as siblings": (
        LISTED_SIBLINGS,
        NUM_CONSENSUS_HEADS,
        CONSENSUS,
    ),
    "the last row, refined": (
        LISTED_SIBLINGS,
        NUM_CONSENSUS_HEADS,
        {**CONSENSUS, "box_from": SHARP["box_from"]},
    ),
}
"""Each row's prompting, number of heads, and options that differ from `sharp` with the box of the map. All rows are
compared with the first."""


def rank_heads_without_labels(lvlm: LVLM) -> tuple[Head, ...]:
    """The best heads of the paper's label-free ranking on validation scenes."""
    scenes = scene_samples(RANKING_SCENES, size=MODEL_SIZE, seeds=VALIDATION_SEEDS)
    samples = [Sample(Image.fromarray(scene.image), expression.text) for scene, expression in scenes]
    return tuple(find_heads(lvlm, samples).top(NUM_CONSENSUS_HEADS))


def attend_scenes(
    lvlm: LVLM, prompting: Prompting, scenes: Sequence[CroppedScene], heads: Sequence[Head]
) -> Iterator[AttendedScene]:
    """The scenes with their attention maps, prompted in one way."""
    last_layer = max(head.layer for head in heads)
    for scene in tqdm(scenes, disable=None):
        extra_prompts, siblings = prompting.extra_prompts(scene, heads)
        maps = lvlm.attend(
            scene.image,
            scene.expression.text,
            last_layer=last_layer,
            extra_prompts=extra_prompts,
            siblings=siblings,
        )
        yield AttendedScene(scene.image, maps, scene.box)


def measure_rows(
    lvlms: Mapping[Prompting, LVLM], scenes: Sequence[CroppedScene], heads: Sequence[Head]
) -> Iterator[str]:
    """A cell for each row of the table; consecutive rows with the same prompting share its maps."""
    current, attended, reference = None, [], None
    for prompting, count, options in ROWS.values():
        if prompting != current:
            current, attended = prompting, list(attend_scenes(lvlms[prompting], prompting, scenes, heads))
        ious = box_ious(attended, heads[:count], {**MAP, "contrast": prompting.contrast, **options})
        reference = ious if reference is None else reference
        yield format_cell(ious, reference)


def format_cell(ious: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """Acc@0.5 and mean IoU, and the difference in mean IoU from the reference."""
    numbers = f"{(ious >= 0.5).mean():.3f} {ious.mean():.3f}"
    return numbers if ious is reference else f"{numbers} ({format_difference(ious, reference)})"


def main(count: int) -> None:
    promptings = dict.fromkeys(prompting for prompting, _, _ in ROWS.values())
    lvlms = {
        prompting: load_model(query_token=prompting.query_token, paraphrases=prompting.paraphrases)
        for prompting in promptings
    }
    heads = rank_heads_without_labels(lvlms[LAST_TOKEN])
    table = [[name] for name in ROWS]
    for style, height in SETS.values():
        scenes = list(draw_scenes(count, style, height))
        for row, cell in zip(table, measure_rows(lvlms, scenes, heads), strict=True):
            row.append(cell)
    caption = (
        f"{count} test scenes a set, {SIZE} pixels wide, the first of heads {' '.join(map(str, heads))}. Each cell: "
        "Acc@0.5, mean IoU, and how many points mean IoU is ahead of the first row's, with its paired 95 % interval."
    )
    print_table(caption, ["aggregation", *SETS], table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
