"""Encode once, ask many: an image that the model has encoded, and the expressions that are then asked about it.

The image comes before the expression in the prompt, and attention is causal. So everything that the model computes
for the tokens up to the image's last, and for the few of the template after it, is the same for every expression: it
is computed once, and each expression costs a few tokens more. Families in which this does not hold
(`Family.why_not_shared`) answer the same questions one prompt at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from localization_heads.attention import AttentionMaps
from localization_heads.data.sources import PromptImages, images_of, map_images
from localization_heads.lvlm.answers.answering import Said, Sides, Weighed, keeping, weighed
from localization_heads.lvlm.families.geometry import View
from localization_heads.lvlm.forward.capture import Query, capture
from localization_heads.lvlm.forward.changes import Change
from localization_heads.lvlm.forward.failures import memory_errors, mismatch_errors
from localization_heads.lvlm.forward.prefix import (
    Prefix,
    batch_suffixes,
    max_shareable_length,
    recording_cache,
    rotary_positions,
    take_prefix,
)
from localization_heads.lvlm.text.prompts import Prompt, average_paraphrases, common_prefix_length, paraphrase
from localization_heads.lvlm.text.query_tokens import batch_queries

if TYPE_CHECKING:
    from localization_heads.lvlm.loaded import LoadedModel

STAND_INS = ("it", "the dog", "2")
"""Expressions that begin differently: the prefix that their prompts have in common comes before any expression."""


Answer = Callable[[int | None], list[AttentionMaps]]
"""The model's share of the work on some pairs: from the last layer that is needed (None for all) to their maps."""


def apart(lvlm: LoadedModel, images: Sequence[PromptImages], expressions: Sequence[str]) -> Answer:
    """Pairs whose prompts run in one batch, padded to one length, sharing nothing. The host's share is done here."""
    prompts = [lvlm.located_prompt(expression) for expression in expressions]
    different = {id(image): image for image in images}
    seen = {key: map_images(image, lvlm.image_for_processor) for key, image in different.items()}
    given = [seen[id(image)] for image in images]
    inputs = lvlm.run_processor(given, [prompt.text for prompt in prompts])
    query = lvlm.query(prompts, inputs)

    @memory_errors()
    def answer(last_layer: int | None) -> list[AttentionMaps]:
        found = lvlm.answered(lambda: lvlm.on_device(inputs), query, expressions, last_layer)
        return [
            lvlm.maps(one, lvlm.views_of_images(inputs, n, image), image, expression, prompt.text)
            for n, (image, expression, prompt, one) in enumerate(
                zip(given, expressions, prompts, found, strict=True)
            )
        ]

    return answer


class Question(NamedTuple):
    """An expression in its prompt, as the processor's output for this image, unpadded, on the CPU."""

    expression: str
    prompt: Prompt
    inputs: dict[str, Any]
    query: Query

    @property
    def ids(self) -> list[int]:
        return list(self.inputs["input_ids"][0].tolist())

    @property
    def first_query(self) -> int:
        """The first token whose attention is captured."""
        return len(self.ids) - 1 if self.query.positions is None else int(self.query.positions.min())


class EncodedImage:
    """What a prompt shows, encoded up to the last token before the expression. Made by `LVLM.encode_image`.

    `attend` may be called from several threads: the encoding is never changed.
    """

    def __init__(self, lvlm: LoadedModel, image: PromptImages) -> None:
        self.lvlm = lvlm = lvlm.with_num_images(len(images_of(image)))
        self.image = map_images(image, lvlm.image_for_processor)
        self._processor = copy(lvlm.processor)
        self._processor.image_processor = _Once(lvlm.processor.image_processor)
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._changed: tuple[Change, ...] = ()  # in force when it was computed
        self._first = self._read(lvlm.located_prompt(STAND_INS[0]))  # raises if the image cannot be used

    @property
    def shares(self) -> bool:
        """Whether the expressions share the image's encoding; if not, each prompt is run by itself."""
        return self.lvlm.why_not_shared is None and self._shared_tokens > self._last_image_token

    @property
    def num_bytes(self) -> int:
        """Memory that this image takes: pixels, processed pixels, keys and values."""
        pixels = sum(one.width * one.height * len(one.getbands()) for one in images_of(self.image))
        tensors = (value for value in self._first.values() if isinstance(value, Tensor))
        kept = self._prefix.num_bytes if self._prefix else 0
        return pixels + sum(tensor.nbytes for tensor in tensors) + kept

    def attend(self, expressions: Sequence[str], *, last_layer: int | None = None) -> list[AttentionMaps]:
        """The attention maps of every head for each expression, as `LVLM.attend` gives them for this image.

        Args:
            last_layer: stop after this layer; the maps of later layers stay zero. If the image was encoded to
                a lower layer before, it is encoded again.
        """
        if not self.lvlm.paraphrases:
            return self.attend_plainly(expressions, last_layer=last_layer)
        return [
            average_paraphrases(
                self.attend_plainly(paraphrase(expression, self.lvlm.paraphrases), last_layer=last_layer),
                expression,
            )
            for expression in expressions
        ]

    def attend_plainly(
        self, expressions: Sequence[str], *, last_layer: int | None = None
    ) -> list[AttentionMaps]:
        """`attend` with the expressions as they are, whatever paraphrases the model is asked with."""
        return self.answer([self.question(expression) for expression in expressions], last_layer)

    def question(self, expression: str) -> Question:
        """The host's share of `attend`, which may run ahead in another thread."""
        prompt = self.lvlm.located_prompt(expression)
        inputs = self._read(prompt)
        return Question(expression, prompt, inputs, self.lvlm.query([prompt], inputs))

    @memory_errors()
    def answer(self, questions: Sequence[Question], last_layer: int | None = None) -> list[AttentionMaps]:
        """The model's share of `attend`."""
        if not questions:
            return []
        answers = questions[0].query.answers is not None
        start, prefix = self._start(questions, last_layer, answers=answers)
        if prefix is None:
            asked = [question.expression for question in questions]
            return apart(self.lvlm, [self.image] * len(asked), asked)(last_layer)
        return _in_groups(
            questions, lambda group: self._maps(group, prefix, start, last_layer), by_length=answers
        )

    @memory_errors()
    def say(self, texts: Sequence[str], num_tokens: int = 0, sides: Sides | None = None) -> list[Said]:
        """What the model says to each text in its prompt, of `num_tokens` tokens at most: 0 only weighs the first.

        Args:
            sides: tokens that the first is weighed between.
        """
        questions = [self.question(text) for text in texts]
        start, prefix = self._start(questions, None, answers=True, more=num_tokens)

        def said(group: Sequence[Question]) -> list[Said]:
            lvlm, hearing = self.lvlm, self.lvlm.hearing(sides)
            if prefix is None:
                given = lvlm.model_inputs(
                    [self.image] * len(group), [question.prompt.text for question in group]
                )
            else:
                given = self._continuing(group, prefix, start, answers=True)
            with mismatch_errors(lvlm.name), torch.inference_mode():
                lvlm.run(given, Query(answers=num_tokens), hearing)
            return hearing.said(lvlm.processor.tokenizer, num_tokens)

        return _in_groups(questions, said, by_length=prefix is not None)

    @memory_errors()
    def weigh(self, texts: Sequence[str]) -> list[Weighed]:
        """How likely the model holds each text in its prompt and what it would say to it, in one forward pass.

        The former is known where the prompts share a prefix: elsewhere a token may see those after it.
        """
        questions = [self.question(text) for text in texts]
        start, prefix = self._start(questions, None, answers=True)

        def weigh_each(group: Sequence[Question]) -> list[Weighed]:
            lvlm, length = self.lvlm, len(group[0].ids)
            spans: list[range | None] = [None] * len(group)
            if prefix is None:
                given = lvlm.model_inputs(
                    [self.image] * len(group), [question.prompt.text for question in group]
                )
                given.pop("labels", None)  # PaliGemma's processor writes some
            else:
                spans = [lvlm.expression_span(one.prompt, one.ids) for one in group]
                given = self._continuing(group, prefix, start, answers=True)
            kept = max(length - span.start if span else 1 for span in spans)
            with mismatch_errors(lvlm.name), torch.inference_mode():
                logits = lvlm.model(**given, **keeping(lvlm.model, kept)).logits
            return [weighed(*one) for one in zip(logits, [one.ids for one in group], spans, strict=True)]

        return _in_groups(questions, weigh_each, by_length=True)

    def _start(
        self, questions: Sequence[Question], last_layer: int | None, *, answers: bool, more: int = 0
    ) -> tuple[int, Prefix | None]:
        """How many of the prefix's tokens the questions go on from, and the prefix; None if they share nothing.

        Args:
            more: tokens of an answer that follows, beside those that are captured.
        """
        longest = max((len(one.ids) + (one.query.answers or more) for one in questions), default=0)
        if not questions or longest > max_shareable_length(self.lvlm.model.config):
            return -1, None
        prefix = self.encode(None if answers else last_layer)
        if prefix is None or (answers and not prefix.can_be_cut):
            return -1, None
        start = min(self._common(prefix, question) for question in questions)
        if start <= self._last_image_token or (start < len(prefix.ids) and not prefix.can_be_cut):
            return -1, None
        return start, prefix

    @memory_errors()
    def encode(self, last_layer: int | None = None) -> Prefix | None:
        """Read the image down to that layer, if that was not done yet. None if nothing can be shared."""
        if not self.shares:
            return None
        depth = max(self.lvlm.attention_modules) if last_layer is None else last_layer
        with self._lock:
            changed = self.lvlm.changed
            if self._prefix is None or self._prefix.depth < depth or self._changed != changed:
                self._prefix, self._changed = self._computed(depth), changed
            return self._prefix

    def _maps(
        self, questions: Sequence[Question], prefix: Prefix, start: int, last_layer: int | None
    ) -> list[AttentionMaps]:
        """The maps of questions that go on from the prefix."""
        query = batch_queries([(one.query, len(one.ids)) for one in questions], start)

        def given() -> dict[str, Any]:
            return self._continuing(questions, prefix, start, answers=query.answers is not None)

        found = self.lvlm.answered(given, query, [one.expression for one in questions], last_layer)
        return [
            self.lvlm.maps(rows, self._views, self.image, one.expression, one.prompt.text)
            for one, rows in zip(questions, found, strict=True)
        ]

    def _continuing(
        self, questions: Sequence[Question], prefix: Prefix, start: int, *, answers: bool
    ) -> dict[str, Any]:
        """The model's inputs for what follows the prefix. With `answers`, all are of one length."""
        lvlm = self.lvlm
        inputs = batch_suffixes([question.inputs for question in questions], start)
        longest = max((question.inputs for question in questions), key=lambda one: one["input_ids"].shape[1])
        if (positions := rotary_positions(lvlm.model, longest)) is not None:
            inputs["position_ids"] = positions[..., start:].expand(-1, len(questions), -1)
        inputs = {name: value.to(lvlm.device) for name, value in inputs.items()}
        cache = prefix.cache(len(questions), start, grows=answers)
        return {**inputs, "past_key_values": cache, "use_cache": True}

    def _common(self, prefix: Prefix, question: Question) -> int:
        """How many of the prefix's tokens a question can go on from; its query tokens are never among them."""
        return min(common_prefix_length(prefix.ids, question.ids), question.first_query)

    def _read(self, prompt: Prompt) -> dict[str, Any]:
        """The processor's output; the image itself is processed only once."""
        return dict(self.lvlm.run_processor([self.image], [prompt.text], self._processor))

    @cached_property
    def _shared_tokens(self) -> int:
        """How many tokens all prompts have in common."""
        first = self._first["input_ids"][0].tolist()
        others = (self._read(self.lvlm.located_prompt(words)) for words in STAND_INS[1:])
        return min(common_prefix_length(first, other["input_ids"][0].tolist()) for other in others)

    @cached_property
    def _last_image_token(self) -> int:
        ids = self._first["input_ids"][0]
        places = (ids == self.lvlm.image_token_id).nonzero()
        return int(places[-1]) if len(places) else len(ids)

    @cached_property
    def _views(self) -> list[list[View]]:
        return self.lvlm.views_of_images(self._first, 0, self.image)

    def _computed(self, depth: int) -> Prefix:
        lvlm, length = self.lvlm, self._shared_tokens
        inputs = take_prefix(self._first, length)
        if (positions := rotary_positions(lvlm.model, self._first)) is not None:
            inputs["position_ids"] = positions[..., :length]
        inputs = lvlm.on_device(inputs)
        cache = recording_cache(lvlm.model.config)
        with mismatch_errors(lvlm.name), torch.inference_mode(), capture(lvlm.attention_modules, depth, None):
            lvlm.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        recurrent = any(cache.is_linear)
        ids = self._first["input_ids"][0, :length].tolist()
        return Prefix(
            ids, list(cache.layers), depth, can_be_cut=not recurrent and not lvlm.uses_cross_attention
        )


Made = TypeVar("Made")


def _in_groups(
    questions: Sequence[Question], work: Callable[[Sequence[Question]], list[Made]], *, by_length: bool
) -> list[Made]:
    """What `work` makes of the questions, in their order: of all together, or of those of one length.

    Without padding, the tokens of an answer follow the prompt's in every sample.
    """
    if not by_length:
        return work(questions)
    found: dict[int, Made] = {}
    lengths: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        lengths.setdefault(len(question.ids), []).append(place)
    for places in lengths.values():
        found |= zip(places, work([questions[place] for place in places]), strict=True)
    return [found[place] for place in sorted(found)]


class _Once:
    """An image processor that works once, and then hands out what it made of its one image."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._made: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._made is None:
            self._made = self._image_processor(*arguments, **options)
        return copy(self._made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)
