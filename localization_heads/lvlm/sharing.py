"""Encode once, ask many: an image whose KV cache is shared by all expressions that are asked about it.

The image comes before the expression in the prompt, and attention is causal. So the keys and values of everything up to
the expression (system sentence, image, and the template's tokens after it) are the same for every expression: they are
computed once, and each expression adds only a few tokens. Families in which this does not hold
(`Family.why_not_shared`) run every prompt on its own.
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
from localization_heads.lvlm.answers.answering import (
    GeneratedAnswer,
    PromptLogprobs,
    YesNoTokens,
    logits_to_keep,
    prompt_logprobs,
)
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
    from localization_heads.lvlm.attention_model import AttentionModel

STAND_INS = ("it", "the dog", "2")
"""Expressions with different first tokens: what their prompts have in common ends before the expression."""

ComputeMaps = Callable[[int | None], list[AttentionMaps]]
"""Runs the model on a prepared batch, up to the given layer (None for all), and returns the maps of each pair."""


class PreparedPrompt(NamedTuple):
    """An expression in its prompt, as the processor's output for one image, unpadded, on the CPU."""

    expression: str
    prompt: Prompt
    inputs: dict[str, Any]
    query: Query

    @property
    def ids(self) -> list[int]:
        return list(self.inputs["input_ids"][0].tolist())

    @property
    def first_query(self) -> int:
        """Index of the first token whose attention is captured."""
        return len(self.ids) - 1 if self.query.positions is None else int(self.query.positions.min())


class EncodedImage:
    """The image, or images, of a prompt, with the shared part of their KV cache. Made by `LVLM.encode_image`.

    `attend` may be called from several threads.
    """

    def __init__(self, lvlm: AttentionModel, image: PromptImages) -> None:
        self.lvlm = lvlm = lvlm.with_num_images(len(images_of(image)))
        self.image = map_images(image, lvlm.image_for_processor)
        self._processor = copy(lvlm.processor)
        self._processor.image_processor = _RunOnce(lvlm.processor.image_processor)
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._prefix_changes: tuple[Change, ...] = ()  # the changes under which the prefix was computed
        self._first_inputs = self._process(lvlm.located_prompt(STAND_INS[0]))  # raises for an unusable image

    @property
    def shares(self) -> bool:
        """Whether the expressions share the image's encoding; if not, each prompt is run by itself."""
        return self.lvlm.why_not_shared is None and self._prefix_length > self._last_image_token

    @property
    def num_bytes(self) -> int:
        """Memory that this image takes: pixels, processed pixels, keys and values."""
        pixels = sum(image.width * image.height * len(image.getbands()) for image in images_of(self.image))
        tensors = (value for value in self._first_inputs.values() if isinstance(value, Tensor))
        cached = self._prefix.num_bytes if self._prefix else 0
        return pixels + sum(tensor.nbytes for tensor in tensors) + cached

    def attend(self, expressions: Sequence[str], *, last_layer: int | None = None) -> list[AttentionMaps]:
        """The attention maps of every head for each expression, as `LVLM.attend` gives them for this image.

        Args:
            last_layer: stop after this layer; the maps of later layers stay zero. An image that was encoded only up to
                a lower layer is encoded again.
        """

        def attend_verbatim(texts: Sequence[str]) -> list[AttentionMaps]:
            return self.attend_prepared([self.prepare(text) for text in texts], last_layer)

        if paraphrases := self.lvlm.paraphrases:
            return [average_paraphrases(attend_verbatim(paraphrase(text, paraphrases)), text) for text in expressions]
        return attend_verbatim(expressions)

    def prepare(self, expression: str) -> PreparedPrompt:
        """The CPU part of `attend`, which may run ahead in another thread."""
        prompt = self.lvlm.located_prompt(expression)
        inputs = self._process(prompt)
        return PreparedPrompt(expression, prompt, inputs, self.lvlm.query([prompt], inputs))

    @memory_errors()
    def attend_prepared(self, prompts: Sequence[PreparedPrompt], last_layer: int | None = None) -> list[AttentionMaps]:
        """The model's part of `attend`, with each expression worded as it was prepared."""
        if not prompts:
            return []
        answers = prompts[0].query.answer_tokens is not None
        prefix, start = self._shared_prefix(prompts, last_layer, generates=answers)
        if prefix is None:
            expressions = [prompt.expression for prompt in prompts]
            return prepare_unshared(self.lvlm, [self.image] * len(prompts), expressions)(last_layer)
        if answers:
            return _by_length(prompts, lambda group: self._maps(group, prefix, start, last_layer))
        return self._maps(prompts, prefix, start, last_layer)

    @memory_errors()
    def generate(
        self, texts: Sequence[str], max_tokens: int = 0, yes_no: YesNoTokens | None = None
    ) -> list[GeneratedAnswer]:
        """The model's answer to each text in its prompt; with `max_tokens=0` only its first token's log-probability.

        Args:
            yes_no: compare these alternatives for the first token (`GeneratedAnswer.yes_logit`).
        """
        prompts = [self.prepare(text) for text in texts]
        prefix, start = self._shared_prefix(prompts, None, generates=True, answer_tokens=max_tokens)

        def run(group: Sequence[PreparedPrompt]) -> list[GeneratedAnswer]:
            lvlm, recorder = self.lvlm, self.lvlm.answer_recorder(yes_no)
            if prefix is None:
                inputs = self._whole_inputs(group)
            else:
                inputs = self._suffix_inputs(group, prefix, start, generates=True)
            with mismatch_errors(lvlm.name), torch.inference_mode():
                lvlm.run(inputs, Query(answer_tokens=max_tokens), recorder)
            return recorder.answers(lvlm.processor.tokenizer, max_tokens)

        return run(prompts) if prefix is None else _by_length(prompts, run)

    @memory_errors()
    def logprobs(self, texts: Sequence[str]) -> list[PromptLogprobs]:
        """Log-probabilities of each text in its prompt and of the token after it, in one forward pass.

        The text's own is None if the prompts share no prefix, as attention may then not be causal.
        """
        prompts = [self.prepare(text) for text in texts]
        prefix, start = self._shared_prefix(prompts, None, generates=True)

        def run(group: Sequence[PreparedPrompt]) -> list[PromptLogprobs]:
            lvlm, length = self.lvlm, len(group[0].ids)
            spans: list[range | None] = [None] * len(group)
            if prefix is None:
                inputs = self._whole_inputs(group)
                inputs.pop("labels", None)  # PaliGemma's processor writes some
            else:
                spans = [lvlm.expression_span(prompt.prompt, prompt.ids) for prompt in group]
                inputs = self._suffix_inputs(group, prefix, start, generates=True)
            kept = max(length - span.start if span else 1 for span in spans)
            with mismatch_errors(lvlm.name), torch.inference_mode():
                logits = lvlm.model(**inputs, **logits_to_keep(lvlm.model, kept)).logits
            ids = [prompt.ids for prompt in group]
            return [prompt_logprobs(*sample) for sample in zip(logits, ids, spans, strict=True)]

        return _by_length(prompts, run)

    @memory_errors()
    def encode(self, last_layer: int | None = None) -> Prefix | None:
        """Compute the shared prefix up to that layer unless that was done before. None if nothing can be shared."""
        if not self.shares:
            return None
        depth = max(self.lvlm.attention_modules) if last_layer is None else last_layer
        with self._lock:
            changes = tuple(self.lvlm.changes)
            if self._prefix is None or self._prefix.depth < depth or self._prefix_changes != changes:
                self._prefix, self._prefix_changes = self._compute_prefix(depth), changes
            return self._prefix

    def _compute_prefix(self, depth: int) -> Prefix:
        lvlm, length = self.lvlm, self._prefix_length
        inputs = take_prefix(self._first_inputs, length)
        if (positions := rotary_positions(lvlm.model, self._first_inputs)) is not None:
            inputs["position_ids"] = positions[..., :length]
        inputs = lvlm.on_device(inputs)
        cache = recording_cache(lvlm.model.config)
        with mismatch_errors(lvlm.name), torch.inference_mode(), capture(lvlm.attention_modules, depth, None):
            lvlm.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        recurrent = any(cache.is_linear)
        ids = self._first_inputs["input_ids"][0, :length].tolist()
        can_be_cut = not recurrent and not lvlm.uses_cross_attention
        return Prefix(ids, list(cache.layers), depth, can_be_cut=can_be_cut)

    def _shared_prefix(
        self,
        prompts: Sequence[PreparedPrompt],
        last_layer: int | None,
        *,
        generates: bool,
        answer_tokens: int = 0,
    ) -> tuple[Prefix | None, int]:
        """The prefix, and how many of its tokens all prompts share; None if they cannot share it.

        Args:
            generates: the model generates after the prompts, or reads them up to the LM head: that takes all layers.
            answer_tokens: length of an answer that is generated without capturing its attention.
        """
        longest = max((len(one.ids) + (one.query.answer_tokens or answer_tokens) for one in prompts), default=0)
        if not prompts or longest > max_shareable_length(self.lvlm.model.config):
            return None, 0
        prefix = self.encode(None if generates else last_layer)
        if prefix is None or (generates and not prefix.can_be_cut):
            return None, 0
        # A query token is never part of the shared prefix: its attention has to be captured.
        start = min(min(common_prefix_length(prefix.ids, prompt.ids), prompt.first_query) for prompt in prompts)
        if start <= self._last_image_token or (start < len(prefix.ids) and not prefix.can_be_cut):
            return None, 0
        return prefix, start

    def _maps(
        self, prompts: Sequence[PreparedPrompt], prefix: Prefix, start: int, last_layer: int | None
    ) -> list[AttentionMaps]:
        """The maps of prompts that share the first `start` tokens of the prefix."""
        query = batch_queries([(prompt.query, len(prompt.ids)) for prompt in prompts], start)

        def make_inputs() -> dict[str, Any]:
            return self._suffix_inputs(prompts, prefix, start, generates=query.answer_tokens is not None)

        expressions = [prompt.expression for prompt in prompts]
        samples = self.lvlm.read_attention(make_inputs, query, expressions, last_layer)
        return [
            self.lvlm.maps(sample, self._views, self.image, prompt.expression, prompt.prompt.text)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]

    def _suffix_inputs(
        self, prompts: Sequence[PreparedPrompt], prefix: Prefix, start: int, *, generates: bool
    ) -> dict[str, Any]:
        """The model inputs for what follows the prefix. If the model generates, all prompts must be equally long."""
        lvlm = self.lvlm
        inputs = batch_suffixes([prompt.inputs for prompt in prompts], start)
        longest = max((prompt.inputs for prompt in prompts), key=lambda one: one["input_ids"].shape[1])
        if (positions := rotary_positions(lvlm.model, longest)) is not None:
            inputs["position_ids"] = positions[..., start:].expand(-1, len(prompts), -1)
        inputs = {name: value.to(lvlm.device) for name, value in inputs.items()}
        cache = prefix.cache(len(prompts), start, grows=generates)
        return {**inputs, "past_key_values": cache, "use_cache": True}

    def _whole_inputs(self, prompts: Sequence[PreparedPrompt]) -> dict[str, Any]:
        """The model inputs of complete prompts, padded to one length."""
        return self.lvlm.model_inputs([self.image] * len(prompts), [one.prompt.text for one in prompts])

    def _process(self, prompt: Prompt) -> dict[str, Any]:
        """The processor's output for a prompt; the image itself is processed only once."""
        return dict(self.lvlm.run_processor([self.image], [prompt.text], self._processor))

    @cached_property
    def _prefix_length(self) -> int:
        """Number of tokens that all prompts about this image have in common."""
        first = self._first_inputs["input_ids"][0].tolist()
        others = (self._process(self.lvlm.located_prompt(words)) for words in STAND_INS[1:])
        return min(common_prefix_length(first, other["input_ids"][0].tolist()) for other in others)

    @cached_property
    def _last_image_token(self) -> int:
        """Index of the last image token; the prompt's length if it has none (cross-attention)."""
        ids = self._first_inputs["input_ids"][0]
        indices = (ids == self.lvlm.image_token_id).nonzero()
        return int(indices[-1]) if len(indices) else len(ids)

    @cached_property
    def _views(self) -> list[list[View]]:
        return self.lvlm.views_of_images(self._first_inputs, 0, self.image)


def prepare_unshared(lvlm: AttentionModel, images: Sequence[PromptImages], expressions: Sequence[str]) -> ComputeMaps:
    """Prepare a batch of independent prompts, padded to one length. The CPU part runs now, the model's part later."""
    prompts = [lvlm.located_prompt(expression) for expression in expressions]
    unique = {id(image): image for image in images}
    resized = {key: map_images(image, lvlm.image_for_processor) for key, image in unique.items()}
    shown = [resized[id(image)] for image in images]
    inputs = lvlm.run_processor(shown, [prompt.text for prompt in prompts])
    query = lvlm.query(prompts, inputs)

    @memory_errors()
    def compute(last_layer: int | None) -> list[AttentionMaps]:
        samples = lvlm.read_attention(lambda: lvlm.on_device(inputs), query, expressions, last_layer)
        rows = enumerate(zip(samples, shown, expressions, prompts, strict=True))
        return [
            lvlm.maps(sample, lvlm.views_of_images(inputs, n, image), image, expression, prompt.text)
            for n, (sample, image, expression, prompt) in rows
        ]

    return compute


T = TypeVar("T")


def _by_length(prompts: Sequence[PreparedPrompt], run: Callable[[Sequence[PreparedPrompt]], list[T]]) -> list[T]:
    """Run each group of equally long prompts, and return the results in the prompts' order.

    Without padding, the tokens of an answer follow the prompt's in every sample.
    """
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt.ids), []).append(index)
    results: dict[int, T] = {}
    for indices in groups.values():
        results |= zip(indices, run([prompts[index] for index in indices]), strict=True)
    return [results[index] for index in range(len(prompts))]


class _RunOnce:
    """An image processor that processes its one image once and then returns copies of that result."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._result: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._result is None:
            self._result = self._image_processor(*arguments, **options)
        return copy(self._result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)
