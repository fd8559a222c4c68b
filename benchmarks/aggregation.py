"""How the model is asked and its heads are added up, side by side: `python -m benchmarks.aggregation [scenes]`.

On the three sets of test scenes of `benchmarks.boxes`. The read-out is `sharp` before the mask refines its box, and in
the last row after it. Heads are ranked without labels on validation scenes. The table is Markdown, as docs/readouts.md
shows it.
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

from benchmarks.boxes import MAP, SETS, SHARP, SIZE, Drawn, Seen, ahead, drawn, ious, say_table
from localization_heads import Sample, find_heads, load_model
from localization_heads.heads.head import Head
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, ExtraPrompts
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import Contrast
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples

SCENES = 500
RANKED_ON = 1000  # validation scenes, of the model's own size
OWN_SIZE = 192
MORE = 7  # heads that are weighted by their agreement, where the others are three
TEMPLATES = ("the {}", "a {}", "{}")


def of_other_objects(shown: Drawn) -> list[str]:
    """An expression for each object that is not asked for."""
    first = {one.object_index: one.text for one in reversed(shown.scene.expressions)}
    return [text for index, text in sorted(first.items()) if index != shown.expression.object_index]


def any_others(shown: Drawn) -> list[str]:
    """Four of the scene's other expressions, whatever they refer to."""
    texts = sorted({one.text for one in shown.scene.expressions} - {shown.expression.text})
    return Random(shown.expression.text).sample(texts, min(4, len(texts)))


@dataclass(frozen=True)
class Way:
    """One way of asking: whose attention is read, and what else is asked about the image."""

    query_token: str = "last"
    contrast: Contrast = "none"
    siblings: Callable[[Drawn], list[str]] | None = None  # None: what the model lists
    paraphrases: tuple[str, ...] | None = None

    def extra_prompts(self, shown: Drawn, heads: Sequence[Head]) -> tuple[ExtraPrompts, list[str]]:
        """What is asked beside the expression. A scene without the siblings that are wanted is not contrasted."""
        siblings = self.siblings(shown) if self.siblings else []
        if self.contrast == "none" or (self.siblings and not siblings):
            return NO_EXTRA_PROMPTS, []
        return ExtraPrompts(self.contrast, heads=tuple(heads)), siblings


LAST, ANSWERED, LISTED = Way(), Way("last_and_answer"), Way("last_and_answer", "siblings")
CONSENSUS = {"combine": "consensus"}
ROWS: dict[str, tuple[Way, int, Mapping[str, Any]]] = {
    "sum of three heads, last prompt token": (LAST, 3, {}),
    "consensus of seven heads": (LAST, MORE, CONSENSUS),
    "`query_token=answer_mean`": (Way("answer_mean"), 3, {}),
    "`query_token=last_and_answer`": (ANSWERED, 3, {}),
    "consensus, `last_and_answer`": (ANSWERED, MORE, CONSENSUS),
    "siblings, an expression of each *other* object": (Way("last", "siblings", of_other_objects), 3, {}),
    "siblings, any four other expressions": (Way("last", "siblings", any_others), 3, {}),
    "background query": (Way("last", "background"), 3, {}),
    'paraphrases "the {}", "a {}", "{}"': (Way(paraphrases=TEMPLATES), 3, {}),
    "consensus, `last_and_answer`, listed names as siblings": (LISTED, MORE, CONSENSUS),
    "the last row, refined": (LISTED, MORE, {**CONSENSUS, "box_from": SHARP["box_from"]}),
}
"""The way of asking, how many heads, and what differs from `sharp` before the mask. The first is what the others are
compared with."""


def rank(lvlm: LVLM) -> tuple[Head, ...]:
    """The heads that the paper's recipe ranks first on validation scenes, without labels."""
    scenes = scene_samples(RANKED_ON, size=OWN_SIZE, seeds=VALIDATION_SEEDS)
    samples = [Sample(Image.fromarray(scene.image), expression.text) for scene, expression in scenes]
    return tuple(find_heads(lvlm, samples).top(MORE))


def look(lvlm: LVLM, way: Way, shown: Sequence[Drawn], heads: Sequence[Head]) -> Iterator[Seen]:
    """The scenes as the model sees them, asked in one way."""
    last_layer = max(head.layer for head in heads)
    for one in tqdm(shown, disable=None):
        extra_prompts, siblings = way.extra_prompts(one, heads)
        maps = lvlm.attend(
            one.image,
            one.expression.text,
            last_layer=last_layer,
            extra_prompts=extra_prompts,
            siblings=siblings,
        )
        yield Seen(one.image, maps, one.box)


def measure(lvlms: Mapping[Way, LVLM], shown: Sequence[Drawn], heads: Sequence[Head]) -> Iterator[str]:
    """A cell for each row, each way of asking asked once for the rows that follow one another."""
    way, seen, reference = None, [], None
    for asked, count, options in ROWS.values():
        if asked != way:
            way, seen = asked, list(look(lvlms[asked], asked, shown, heads))
        found = ious(seen, heads[:count], {**MAP, "contrast": asked.contrast, **options})
        reference = found if reference is None else reference
        yield cell(found, reference)


def cell(found: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
    """Acc@0.5 and mean IoU, and how far mean IoU is ahead of the reference."""
    numbers = f"{(found >= 0.5).mean():.3f} {found.mean():.3f}"
    return numbers if found is reference else f"{numbers} ({ahead(found, reference)})"


def main(count: int) -> None:
    ways = dict.fromkeys(way for way, _, _ in ROWS.values())
    lvlms = {way: load_model(query_token=way.query_token, paraphrases=way.paraphrases) for way in ways}
    heads = rank(lvlms[LAST])
    table = [[name] for name in ROWS]
    for style, height in SETS.values():
        shown = list(drawn(count, style, height))
        for row, value in zip(table, measure(lvlms, shown, heads), strict=True):
            row.append(value)
    about = (
        f"{count} test scenes a set, {SIZE} pixels wide, the first of heads {' '.join(map(str, heads))}. Each cell: "
        "Acc@0.5, mean IoU, and how many points mean IoU is ahead of the first row's, with its paired 95 % interval."
    )
    say_table(about, ["aggregation", *SETS], table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SCENES)
