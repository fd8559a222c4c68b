"""`Trace`: where heads looked while the model wrote each word of its answer; the words of an answer and its tokens.

Which tokens spell which characters, and where a span of text lies. Holds arrays and plain values only.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.errors import UsageError, shown
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.surroundings import Step

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""
_WORD = re.compile(r"\S+")

Place = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Spelled:
    """An answer as text, and where each of its tokens lies in it.

    Args:
        text: the answer.
        places: of each token; empty, as `(3, 3)`, of one that writes nothing, such as a control token. Tokens that
            are parts of one character share it.
    """

    text: str
    places: tuple[Place, ...]

    def tokens_of(self, start: int, stop: int) -> range:
        """The tokens that spell the characters from `start` to before `stop`; an empty range for none.

        >>> Spelled("a dog", ((0, 1), (1, 3), (3, 5))).tokens_of(2, 5)
        range(1, 3)
        """
        inside = [n for n, (a, b) in enumerate(self.places) if a < stop and b > start and a < b]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text, and the tokens from `start` to before `stop` that spell it."""

    text: str
    start: int
    stop: int


def spelled(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], silent: Sequence[int] = ()
) -> Spelled:
    """The text of token ids, and where each lies in it.

    A tokenizer decodes a token otherwise alone than among others (spaces, halves of a character), so that longer and
    longer beginnings of the answer are decoded.

    Args:
        decode: of the tokenizer.
        silent: ids that are left out of the text.

    >>> spelled(lambda ids: "".join("ab"[i] for i in ids), [0, 2, 1], silent=[2])
    Spelled(text='ab', places=((0, 1), (1, 1), (1, 2)))
    """
    heard = [token for token in ids if token not in silent]
    text = decode(heard) if heard else ""
    ends: list[int] = []
    read: list[int] = []
    for token in ids:
        if token not in silent:
            read.append(token)
            ends.append(max(_agreed(decode(read), text), ends[-1] if ends else 0))
        else:
            ends.append(ends[-1] if ends else 0)
    if heard:
        last = max(n for n, token in enumerate(ids) if token not in silent)
        ends[last:] = [len(text)] * (len(ends) - last)
    return Spelled(text, tuple(_places(ids, ends, silent)))


def silent_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens that begin, end, part and fill texts. Other special tokens may be the answer itself (a box)."""
    kinds = ("bos", "eos", "pad", "cls", "sep", "mask")
    ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds)
    return tuple(token for token in ids if token is not None)


def _agreed(beginning: str, text: str) -> int:
    """How many characters of `text` a beginning of it has, without a character that is not finished."""
    beginning = beginning.rstrip(_UNFINISHED)
    pairs = zip(beginning, text, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(beginning), len(text)))


def _places(ids: Sequence[int], ends: Sequence[int], silent: Sequence[int]) -> Iterator[Place]:
    start = 0
    for n, (token, end) in enumerate(zip(ids, ends, strict=True)):
        if end == start and token not in silent:  # a part of the character that a later token finishes
            yield start, next((later for later in ends[n:] if later > start), start)
        else:
            yield start, end
        start = end


def words_of(answer: Spelled) -> tuple[Word, ...]:
    """The words of an answer, sub-word tokens joined: what stands between spaces.

    Tokens of the marks around a word are not its own: a comma belongs to what follows. Beside letters of scripts that
    are written without spaces, each token is a word.

    >>> words_of(Spelled("two penguins", ((0, 3), (3, 7), (7, 12))))
    (Word(text='two', start=0, stop=1), Word(text='penguins', start=1, stop=3))
    """
    found = []
    for match in _WORD.finditer(answer.text):
        cuts = sorted({match.start(), match.end(), *_cuts(answer, match.start(), match.end())})
        for start, stop in itertools.pairwise(cuts):
            if tokens := answer.tokens_of(*_core(answer.text, start, stop)):
                found.append(Word(answer.text[start:stop], tokens.start, tokens.stop))
    return tuple(found)


def _core(text: str, start: int, stop: int) -> Place:
    """The word without the marks around it; all of a word that consists of marks."""
    inside = [n for n in range(start, stop) if text[n].isalnum()]
    return (inside[0], inside[-1] + 1) if inside else (start, stop)


def _cuts(answer: Spelled, start: int, stop: int) -> Iterator[int]:
    """Places inside a run of letters where a token ends beside a letter of a script without spaces."""
    for _, end in answer.places:
        if start < end < stop and any(map(_is_spaceless, answer.text[end - 1 : end + 1])):
            yield end


def _is_spaceless(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and unicodedata.category(character) == "Lo" and not "\uac00" <= character <= "\ud7a3"


def group_tokens(answer: Spelled, pattern: str) -> list[int]:
    """The tokens that spell any group of the first match of a regular expression; none where nothing matches.

    >>> group_tokens(Spelled("x 1, 2", ((0, 2), (2, 3), (3, 5), (5, 6))), r"(\\d), (\\d)")
    [1, 3]
    """
    match = re.search(pattern, answer.text)
    groups = range(1, match.re.groups + 1) if match else ()
    return sorted({token for group in groups if match for token in answer.tokens_of(*match.span(group))})


def span_tokens(answer: Spelled, span: str) -> range:
    """The tokens that spell the first occurrence of `span`, whatever its capitals and spaces.

    A span that stands in the answer as whole words is preferred to one inside a word.

    Raises:
        UsageError: shows the answer where it does not hold the span.

    >>> span_tokens(Spelled("the dog", ((0, 3), (3, 7))), "Dog")
    range(1, 2)
    """
    words = r"\s+".join(re.escape(word) for word in span.split())
    for pattern in (rf"(?<!\w){words}(?!\w)", words):
        match = re.search(pattern, answer.text, re.IGNORECASE) if words else None
        if match and (tokens := answer.tokens_of(*match.span())):
            return tokens
    raise UsageError(
        f"answer_span={shown(span)}: the answer is {shown(answer.text, 200)}, which does not hold it"
    )


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
