"""Batches of pictures with expressions: made ready on the host, then run by the model.

The two halves may be in different threads: while the model runs one batch, the next one's pictures are resized and
its prompts tokenized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.lvlm.memory import memory_errors
from localization_heads.lvlm.prompts import Prompt
from localization_heads.lvlm.row import Query
from localization_heads.lvlm.sharing import EncodedPicture, Question

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM


@dataclass(frozen=True, eq=False)
class Apart:
    """Pairs whose prompts are run one beside the other, padded to one length.

    Args:
        images: as the model sees them.
        sizes: of the pictures themselves.
    """

    images: Sequence[Image.Image]
    sizes: Sequence[tuple[int, int]]
    expressions: Sequence[str]
    prompts: Sequence[Prompt]
    inputs: Mapping[str, Any]
    query: Query

    @memory_errors()
    def run(self, lvlm: LVLM, last_layer: int | None) -> list[AttentionMaps]:
        inputs = lvlm.on_device(self.inputs)
        rows = lvlm.query_rows(inputs, self.query, last_layer)
        samples = enumerate(zip(rows, self.images, self.sizes, self.expressions, self.prompts, strict=True))
        return [
            lvlm.maps(row, lvlm.views_in(self.inputs, n, image), image, expression, prompt.text).of_size(size)
            for n, (row, image, size, expression, prompt) in samples
        ]


@dataclass(frozen=True, eq=False)
class Shared:
    """Several expressions for one picture, which the model reads once."""

    picture: EncodedPicture
    questions: Sequence[Question]

    def run(self, _: LVLM, last_layer: int | None) -> list[AttentionMaps]:
        return self.picture.answer(self.questions, last_layer=last_layer)


@dataclass(frozen=True, eq=False)
class Batch:
    """Parts of a batch, each with the places that its results take."""

    parts: Sequence[tuple[Sequence[int], Apart | Shared]]

    def run(self, lvlm: LVLM, last_layer: int | None) -> list[AttentionMaps]:
        """The maps of all pairs, in the order in which they were given."""
        found: dict[int, AttentionMaps] = {}
        for places, part in self.parts:
            found |= zip(places, part.run(lvlm, last_layer), strict=True)
        return [found[place] for place in sorted(found)]


def apart(lvlm: LVLM, images: Sequence[Image.Image], expressions: Sequence[str]) -> Apart:
    """Prompts and pixels, and which tokens' attention is read."""
    prompts = [lvlm.located_prompt(expression) for expression in expressions]
    different = {id(image): image for image in images}
    seen = {key: lvlm.seen(image) for key, image in different.items()}
    shown = [seen[id(image)] for image in images]
    inputs = lvlm.processed(shown, [prompt.text for prompt in prompts])
    sizes = [image.size for image in images]
    return Apart(shown, sizes, expressions, prompts, inputs, lvlm.query(prompts, inputs))


def make_batch(lvlm: LVLM, images: Sequence[Image.Image], expressions: Sequence[str]) -> Batch:
    """A picture that is there several times, as one and the same object, is read once for all its expressions."""
    parts: list[tuple[Sequence[int], Apart | Shared]] = []
    alone = []
    for places in _by_picture(images):
        if len(places) == 1 or lvlm.why_not_shared:
            alone += places
            continue
        picture = EncodedPicture(lvlm, images[places[0]])
        parts.append((places, Shared(picture, [picture.question(expressions[place]) for place in places])))
    if alone:
        part = apart(lvlm, [images[place] for place in alone], [expressions[place] for place in alone])
        parts.append((alone, part))
    return Batch(parts)


def _by_picture(images: Sequence[Image.Image]) -> list[list[int]]:
    places: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(id(image), []).append(place)
    return list(places.values())
