"""`Trace`: where heads looked while the model wrote each word of its answer. Holds arrays and plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.words import Spelled, Word, span_tokens, words_of
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.surroundings import Step


@dataclass(frozen=True, eq=False)
class Trace:
    """The attention of chosen heads over the image in every step of an answer.

    An answer of N tokens has N + 1 rows: row 0 is the last prompt token's, whose step writes the first token; row n
    is that of the step that reads token n - 1 and writes token n. The last row only reads.

    Args:
        query: what was asked.
        spelled: the answer, and where each token lies in it.
        token_ids: of the answer, without the token that ends it.
        heads: whose maps were kept.
        rows: float32 `[N + 1, k, h, w]`; `[N + 1, 1, h, w]`, their mean, where only that was kept. Softmax weights, not
            renormalised over the image.
        masses: float32 `[N + 1, k]`, the attention of each head on all image tokens.
        image_box: the region of the image that the grid covers, in pixels.
        image_size: `(W, H)`.
        step: which row belongs to a token: of the step that `writes` it, or that `reads` it.
        options: how maps become a box.
        every: the maps of all heads, float32 `[N + 1, layer, head, h, w]`, where they were kept.
    """

    query: str
    spelled: Spelled
    token_ids: tuple[int, ...]
    heads: tuple[Head, ...]
    rows: NDArray[np.float32] = field(repr=False)
    masses: NDArray[np.float32] = field(repr=False)
    image_box: Box
    image_size: tuple[int, int]
    step: Step = "writes"
    options: GroundingOptions = field(default_factory=GroundingOptions, repr=False)
    prompt: str = field(default="", repr=False)
    model: str = ""
    image_file: str = ""
    every: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def answer(self) -> str:
        return self.spelled.text

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each token: empty of one that writes nothing, the same of several that write one character."""
        return tuple(self.answer[start:stop] for start, stop in self.spelled.places)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The answer's words, sub-word tokens joined."""
        return words_of(self.spelled)

    @property
    def maps(self) -> NDArray[np.float32]:
        """A view of `rows`: those of each token, `[N, k, h, w]`."""
        return self._of_tokens(self.rows)

    @property
    def every_of_tokens(self) -> NDArray[np.float32] | None:
        """A view of `every`: the maps of all heads for each token, `[N, layer, head, h, w]`; None if not kept."""
        return None if self.every is None else self._of_tokens(self.every)

    def masses_of(self, start: int, stop: int) -> NDArray[np.float32]:
        """The attention of each head on the image, the mean over the tokens from `start` to before `stop`: `[k]`."""
        mean: NDArray[np.float32] = self._of_tokens(self.masses)[start:stop].mean(axis=0)
        return mean

    @cached_property
    def word_masses(self) -> NDArray[np.float32]:
        """`masses_of` each word: `[word, k]`."""
        means = [self.masses_of(word.start, word.stop) for word in self.words]
        return np.array(means, np.float32).reshape(len(self.words), len(self.heads))

    @cached_property
    def groundings(self) -> tuple[Grounding, ...]:
        """Map and box of each word."""
        return tuple(self.ground(word.start, word.stop) for word in self.words)

    @property
    def boxes(self) -> tuple[Box | None, ...]:
        """The box of each word; None where no cell stands out."""
        return tuple(found.box if found.cells.any() else None for found in self.groundings)

    def ground(self, start: int = 0, stop: int | None = None) -> Grounding:
        """Map and box of the tokens from `start` to before `stop`, of the mean of their maps; by default of all.

        Raises:
            ValueError: there is no such token.
        """
        chosen = self.maps[start:stop]
        if not len(chosen):
            raise ValueError(f"the answer has {len(self.token_ids)} tokens, and none from {start} to {stop}")
        mean = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
        maps = AttentionMaps(mean[None], self.image_box, self.image_size)
        found = ground_maps(maps, [Head(0, n) for n in range(len(mean))], self.options)
        return replace(found, heads=self.heads)

    def ground_span(self, span: str) -> Grounding:
        """`ground` of the tokens that spell a text of the answer. UsageError where the answer does not hold it."""
        tokens = span_tokens(self.spelled, span)
        return self.ground(tokens.start, tokens.stop)

    def _of_tokens(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows[:-1] if self.step == "writes" else rows[1:]
