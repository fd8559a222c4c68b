"""What the page knows: the picture, the expressions and their maps, and which heads are on.

The model runs in `ask` alone. Everything that a slider or a click changes is `Asked.answers` again, on maps that are
there already.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.data.images import load_image
from localization_heads.data.masks import encode_mask
from localization_heads.data.scenes import VALIDATION_SEEDS, scene_samples
from localization_heads.errors import UsageError
from localization_heads.grounding.maps import Grounding, GroundingOptions, ground_maps
from localization_heads.heads.analysis import greedy_heads
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head
from localization_heads.stages.run import Run, check_heads

MAX_EXPRESSIONS = 6
_one_at_a_time = threading.Lock()  # the model; visitors of the page take turns


@dataclass(frozen=True, eq=False)
class Asked:
    """One picture, the expressions asked about it, and where every head looked.

    Args:
        maps: one for each expression.
        ranked: every head that could be chosen, the likeliest first: what the slider k counts down.
        sums: mean attention sum over the expressions, `[layer, head]`.
    """

    image: Image.Image
    expressions: tuple[str, ...]
    maps: tuple[AttentionMaps, ...]
    ranked: tuple[Head, ...]
    sums: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        layers, heads = self.sums.shape
        return layers, heads

    def answers(self, heads: Sequence[Head], options: GroundingOptions) -> list[Grounding]:
        """A box, a mask and a map for each expression. UsageError if no head is on, or one that is not there."""
        if not heads:
            raise UsageError("switch at least one head on")
        check_heads(heads, *self.shape)
        return [ground_maps(maps, list(heads), options) for maps in self.maps]


def ask(run: Run, image: Image.Image | None, text: str) -> Asked:
    """Run the model on a picture and on expressions, one a line or with semicolons between.

    Raises:
        UsageError: there is no picture, no expression, or one that cannot be used.
    """
    if image is None:
        raise UsageError("choose a picture first")
    picture, expressions = load_image(image), split_expressions(text)
    with _one_at_a_time:
        maps = tuple(run.lvlm.attend(picture, expression) for expression in expressions)
    statistics = [head_statistics(m.attention, run.criteria) for m in maps]
    run.check_named_heads()
    first = list(run.named_heads or ())
    others = greedy_heads(statistics[0], run.criteria, statistics[0].attention_sum.size)
    ranked = tuple(dict.fromkeys([*first, *others]))
    if not ranked:
        raise UsageError("no head looks at this picture: none passes criterion 1")
    return Asked(picture, expressions, maps, ranked, np.mean([s.attention_sum for s in statistics], axis=0))


def split_expressions(text: str) -> tuple[str, ...]:
    """The expressions in a text, each once. UsageError for none, or for more than the page has colours for.

    >>> split_expressions("the dog; the cat\\n the dog ")
    ('the dog', 'the cat')
    """
    parts = [" ".join(part.split()) for part in text.replace(";", "\n").splitlines()]
    expressions = tuple(dict.fromkeys(part for part in parts if part))
    if not expressions:
        raise UsageError("type what to look for, such as: the dog")
    if len(expressions) > MAX_EXPRESSIONS:
        raise UsageError(f"at most {MAX_EXPRESSIONS} expressions at a time, not {len(expressions)}")
    return expressions


def parse_heads(text: str) -> list[Head]:
    """Heads from `L2H0 L3H1` or `2-0, 3-1`, each once. UsageError for anything else."""
    try:
        return list(dict.fromkeys(Head.parse(name) for name in text.replace(",", " ").split()))
    except ValueError as error:
        raise UsageError(str(error)) from None


def toggled(heads: Sequence[Head], head: Head) -> list[Head]:
    """The heads with that one switched."""
    return [h for h in heads if h != head] if head in heads else [*heads, head]


def as_json(asked: Asked, groundings: Sequence[Grounding]) -> list[dict[str, Any]]:
    """What the download holds: the keys of predictions.jsonl, with the expression."""
    return [
        {
            "expression": expression,
            "bbox": [round(float(x), 2) for x in found.box],
            "score": round(float(found.score), 4),
            "mask": encode_mask(found.mask),
            "heads": [[head.layer, head.head] for head in found.heads],
        }
        for expression, found in zip(asked.expressions, groundings, strict=True)
    ]


def example_pictures(count: int = 6, size: int = 384) -> list[tuple[Image.Image, str]]:
    """Synthetic scenes with an expression that fits; they need no file and no network."""
    return [
        (Image.fromarray(scene.image), expression.text)
        for scene, expression in scene_samples(count, size=size, seeds=VALIDATION_SEEDS)
    ]
