"""`Trace`: where heads look while a model writes each word of its answer; and which tokens spell which words.

Holds arrays and plain values only.
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
from localization_heads.options.stage_groups import Step

_REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""
_WORD = re.compile(r"\S+")

CharSpan = tuple[int, int]
"""Index of the first character, and of the one after the last."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The attention of chosen heads over the image in every decoding step of an answer.

    An answer of N tokens has N + 1 rows. Row 0 is that of the last prompt token, whose step writes token 0; row n is
    that of the step that reads token n - 1 and writes token n. The step of the last row only reads.

    Args:
        query: the question.
        spelled: the answer, and the characters that each of its tokens spells.
        token_ids: of the answer, without the one that ends it.
        heads: whose maps were kept.
        rows: float32 `[N + 1, k, h, w]`, or `[N + 1, 1, h, w]` if only their mean was kept. Softmax weights, not
            renormalised over the image.
        masses: float32 `[N + 1, k]`, the attention of each head on all image tokens.
        image_box: the region of the image that the grid covers, in pixels.
        image_size: `(W, H)`.
        step: which row belongs to a token: that of the step that `writes` it, or that `reads` it.
        options: how maps become a box.
        every: the maps of all heads, float32 `[N + 1, layer, head, h, w]`, if they were kept.
    """

    query: str
    spelled: TokenizedText
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
        """The text of each token: empty for a control token, and the same for all parts of one character."""
        return tuple(self.answer[start:stop] for start, stop in self.spelled.places)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The answer's words, with their sub-word tokens joined."""
        return split_words(self.spelled)

    @property
    def maps(self) -> NDArray[np.float32]:
        """The maps of each token, `[N, k, h, w]`: a view of `rows`."""
        return self._of_tokens(self.rows)

    @property
    def every_of_tokens(self) -> NDArray[np.float32] | None:
        """The maps of all heads for each token, `[N, layer, head, h, w]`: a view of `every`. None if not kept."""
        return None if self.every is None else self._of_tokens(self.every)

    def masses_of(self, start: int, stop: int) -> NDArray[np.float32]:
        """Each head's attention to the image, averaged over the tokens `start` to `stop` (exclusive): `[k]`."""
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
        """The box of each word; None if its map has no positive cell."""
        return tuple(found.box if found.cells.any() else None for found in self.groundings)

    def ground(self, start: int = 0, stop: int | None = None) -> Grounding:
        """Map and box from the mean map of the tokens `start` to `stop` (exclusive); by default of all tokens.

        Raises:
            ValueError: the range holds no token.
        """
        chosen = self.maps[start:stop]
        if not len(chosen):
            raise ValueError(f"the answer has {len(self.token_ids)} tokens, and none from {start} to {stop}")
        mean = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
        maps = AttentionMaps(mean[None], self.image_box, self.image_size)
        found = ground_maps(maps, [Head(0, n) for n in range(len(mean))], self.options)
        return replace(found, heads=self.heads)

    def ground_span(self, span: str) -> Grounding:
        """`ground` for the tokens that spell a part of the answer. UsageError if the answer does not contain it."""
        tokens = tokens_of_span(self.spelled, span)
        return self.ground(tokens.start, tokens.stop)

    def _of_tokens(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows[:-1] if self.step == "writes" else rows[1:]


@dataclass(frozen=True)
class TokenizedText:
    """A text, and which of its characters each token spells.

    Args:
        text: the decoded text.
        places: the characters of each token; an empty span such as `(3, 3)` for a token that spells nothing, such as a
            control token. Tokens that are parts of one character share its span.
    """

    text: str
    places: tuple[CharSpan, ...]

    def tokens_of(self, start: int, stop: int) -> range:
        """The tokens that overlap the characters `start` to `stop` (exclusive); an empty range if there are none.

        >>> TokenizedText("a dog", ((0, 1), (1, 3), (3, 5))).tokens_of(2, 5)
        range(1, 3)
        """
        inside = [n for n, (a, b) in enumerate(self.places) if a < stop and b > start and a < b]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text, and the tokens `start` to `stop` (exclusive) that spell it."""

    text: str
    start: int
    stop: int


def align_tokens(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], skipped: Sequence[int] = ()
) -> TokenizedText:
    """Decode token ids, and find the characters that each of them spells.

    A token decodes differently alone than among others (leading spaces, parts of a character), so ever longer prefixes
    of the answer are decoded.

    Args:
        decode: the tokenizer's method.
        skipped: ids that spell nothing.

    >>> align_tokens(lambda ids: "".join("ab"[i] for i in ids), [0, 2, 1], skipped=[2])
    TokenizedText(text='ab', places=((0, 1), (1, 1), (1, 2)))
    """
    spelling = [token for token in ids if token not in skipped]
    text = decode(spelling) if spelling else ""
    ends: list[int] = []
    prefix: list[int] = []
    for token in ids:
        end = ends[-1] if ends else 0
        if token not in skipped:
            prefix.append(token)
            end = max(_agreement(decode(prefix), text), end)
        ends.append(end)
    if spelling:
        last = max(n for n, token in enumerate(ids) if token not in skipped)
        ends[last:] = [len(text)] * (len(ends) - last)
    return TokenizedText(text, tuple(_char_spans(ids, ends, skipped)))


def control_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS, padding and the like. Other special tokens may be part of the answer (a box)."""
    kinds = ("bos", "eos", "pad", "cls", "sep", "mask")
    ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds)
    return tuple(token for token in ids if token is not None)


def _agreement(prefix: str, text: str) -> int:
    """How many leading characters of `text` a decoded prefix has, without an incomplete last character."""
    prefix = prefix.rstrip(_REPLACEMENT)
    pairs = zip(prefix, text, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(text)))


def _char_spans(ids: Sequence[int], ends: Sequence[int], skipped: Sequence[int]) -> Iterator[CharSpan]:
    start = 0
    for n, (token, end) in enumerate(zip(ids, ends, strict=True)):
        if end == start and token not in skipped:  # part of a character that a later token completes
            yield start, next((later for later in ends[n:] if later > start), start)
        else:
            yield start, end
        start = end


def split_words(answer: TokenizedText) -> tuple[Word, ...]:
    """The words of an answer, split at whitespace, with their sub-word tokens joined.

    Tokens that spell only the punctuation around a word are left out. In scripts written without spaces, each token is
    a word.

    >>> split_words(TokenizedText("two penguins", ((0, 3), (3, 7), (7, 12))))
    (Word(text='two', start=0, stop=1), Word(text='penguins', start=1, stop=3))
    """
    words = []
    for match in _WORD.finditer(answer.text):
        cuts = sorted({match.start(), match.end(), *_spaceless_cuts(answer, match.start(), match.end())})
        for start, stop in itertools.pairwise(cuts):
            if tokens := answer.tokens_of(*_strip_punctuation(answer.text, start, stop)):
                words.append(Word(answer.text[start:stop], tokens.start, tokens.stop))
    return tuple(words)


def _strip_punctuation(text: str, start: int, stop: int) -> CharSpan:
    """The span without leading and trailing punctuation; the whole span if it is nothing else."""
    inside = [n for n in range(start, stop) if text[n].isalnum()]
    return (inside[0], inside[-1] + 1) if inside else (start, stop)


def _spaceless_cuts(answer: TokenizedText, start: int, stop: int) -> Iterator[int]:
    """Ends of tokens inside a run of characters that touch a letter of a script without spaces."""
    for _, end in answer.places:
        if start < end < stop and any(map(_is_spaceless, answer.text[end - 1 : end + 1])):
            yield end


def _is_spaceless(character: str) -> bool:
    """Whether a letter is wide and not Hangul, which does separate words with spaces."""
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and unicodedata.category(character) == "Lo" and not "\uac00" <= character <= "\ud7a3"


def tokens_of_match(answer: TokenizedText, pattern: str) -> list[int]:
    """The tokens that spell the groups of a regular expression's first match; empty if nothing matches.

    >>> tokens_of_match(TokenizedText("x 1, 2", ((0, 2), (2, 3), (3, 5), (5, 6))), r"(\\d), (\\d)")
    [1, 3]
    """
    if (match := re.search(pattern, answer.text)) is None:
        return []
    groups = range(1, match.re.groups + 1)
    return sorted({token for group in groups for token in answer.tokens_of(*match.span(group))})


def tokens_of_span(answer: TokenizedText, span: str) -> range:
    """The tokens that spell the first occurrence of `span`, ignoring case and differences in whitespace.

    An occurrence as whole words is preferred to one inside a word.

    Raises:
        UsageError: the answer, which the message quotes, does not contain the span.

    >>> tokens_of_span(TokenizedText("the dog", ((0, 3), (3, 7))), "Dog")
    range(1, 2)
    """
    words = r"\s+".join(re.escape(word) for word in span.split())
    for pattern in (rf"(?<!\w){words}(?!\w)", words):
        match = re.search(pattern, answer.text, re.IGNORECASE) if words else None
        if match and (tokens := answer.tokens_of(*match.span())):
            return tokens
    raise UsageError(f"answer_span={shown(span)}: the answer is {shown(answer.text, 200)}, which does not hold it")
