"""Encode once, ask many: an image that the model has encoded, and the expressions that are then asked about it.

The image comes before the expression in the prompt, and attention is causal. So everything that the model computes
for the tokens up to the image's last, and for the few of the template after it, is the same for every expression: it
is computed once, and each expression costs a few tokens more. Families in which this does not hold
(`Family.not_shared`) answer the same questions one prompt at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from localization_heads.attention import AttentionMaps
from localization_heads.lvlm.capture import Query, capture
from localization_heads.lvlm.failures import memory_errors, misfit_errors
from localization_heads.lvlm.geometry import View
from localization_heads.lvlm.prefix import (
    Prefix,
    first_tokens,
    last_tokens,
    recording_cache,
    spatial_positions,
)
from localization_heads.lvlm.prompts import Prompt, shared_start
from localization_heads.lvlm.query_tokens import continued

if TYPE_CHECKING:
    from localization_heads.lvlm.loaded import LoadedModel

STAND_INS = ("it", "the dog", "2")
"""Expressions that begin differently: the prefix that their prompts have in common comes before any expression."""


Answer = Callable[[int | None], list[AttentionMaps]]
"""The model's share of the work on some pairs: from the last layer that is needed (None for all) to their maps."""


def apart(lvlm: LoadedModel, images: Sequence[Image.Image], expressions: Sequence[str]) -> Answer:
    """Pairs whose prompts run in one batch, padded to one length, sharing nothing. The host's share is done here."""
    prompts = [lvlm.located_prompt(expression) for expression in expressions]
    different = {id(image): image for image in images}
    seen = {key: lvlm.seen(image) for key, image in different.items()}
    pairs = [(seen[id(image)], image.size) for image in images]
    inputs = lvlm.processed([image for image, _ in pairs], [prompt.text for prompt in prompts])
    query = lvlm.query(prompts, inputs)

    @memory_errors()
    def answer(last_layer: int | None) -> list[AttentionMaps]:
        rows = lvlm.query_rows(lvlm.on_device(inputs), query, last_layer)
        return [
            lvlm.maps(row, lvlm.views_in(inputs, n, image), image, expression, prompt.text).of_size(size)
            for n, (row, (image, size), expression, prompt) in enumerate(
                zip(rows, pairs, expressions, prompts, strict=True)
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
    """An image that the model has encoded, up to the last token before the expression. Made by `LVLM.encode_image`.

    `attend` may be called from several threads: the encoding is never changed.
    """

    def __init__(self, lvlm: LoadedModel, image: Image.Image) -> None:
        self.lvlm = lvlm
        self.image = lvlm.seen(image)
        self._size = image.size
        self._processor = copy(lvlm.processor)
        self._processor.image_processor = _Once(lvlm.processor.image_processor)
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._first = self._read(lvlm.located_prompt(STAND_INS[0]))  # raises if the image cannot be used
        self.shares = lvlm.why_not_shared is None and self._shared_tokens > self._last_image_token
        """Whether the expressions share the image's encoding; if not, each prompt is run by itself."""

    @property
    def num_bytes(self) -> int:
        """Memory that this image takes: pixels, processed pixels, keys and values."""
        pixels = self.image.width * self.image.height * len(self.image.getbands())
        tensors = (value for value in self._first.values() if isinstance(value, Tensor))
        kept = self._prefix.num_bytes if self._prefix else 0
        return pixels + sum(tensor.nbytes for tensor in tensors) + kept

    def attend(self, expressions: Sequence[str], *, last_layer: int | None = None) -> list[AttentionMaps]:
        """The attention maps of every head for each expression, as `LVLM.attend` gives them for this image.

        Args:
            last_layer: stop after this layer; the maps of later layers stay zero. If the image was encoded to
                a lower layer before, it is encoded again.
        """
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
        prefix = self.encode(last_layer)
        start = min(self._common(prefix, question) for question in questions) if prefix else -1
        if (
            prefix is None
            or start <= self._last_image_token
            or (start < len(prefix.ids) and not prefix.can_be_cut)
        ):
            asked = [question.expression for question in questions]
            found = apart(self.lvlm, [self.image] * len(asked), asked)(last_layer)
        else:
            rows = self._rows(questions, prefix, start, last_layer)
            found = [
                self.lvlm.maps(row, self._views, self.image, question.expression, question.prompt.text)
                for row, question in zip(rows, questions, strict=True)
            ]
        return [maps.of_size(self._size) for maps in found]

    @memory_errors()
    def encode(self, last_layer: int | None = None) -> Prefix | None:
        """Read the image down to that layer, if that was not done yet. None if nothing can be shared."""
        if not self.shares:
            return None
        depth = max(self.lvlm.attention_modules) if last_layer is None else last_layer
        with self._lock:
            if self._prefix is None or self._prefix.depth < depth:
                self._prefix = self._computed(depth)
            return self._prefix

    def _rows(
        self, questions: Sequence[Question], prefix: Prefix, start: int, last_layer: int | None
    ) -> list[Tensor]:
        """Per question `[layer, head, key]`, the keys of the prefix first."""
        lvlm = self.lvlm
        inputs = last_tokens([question.inputs for question in questions], start)
        longest = max((question.inputs for question in questions), key=lambda one: one["input_ids"].shape[1])
        if (positions := spatial_positions(lvlm.model, longest)) is not None:
            inputs["position_ids"] = positions[..., start:].expand(-1, len(questions), -1)
        inputs = {name: value.to(lvlm.model.device) for name, value in inputs.items()}
        query = continued([(one.query, len(one.ids)) for one in questions], start)
        cache = prefix.cache(len(questions), start)
        return lvlm.query_rows({**inputs, "past_key_values": cache, "use_cache": True}, query, last_layer)

    def _common(self, prefix: Prefix, question: Question) -> int:
        """How many of the prefix's tokens a question can go on from; its query tokens are never among them."""
        return min(shared_start(prefix.ids, question.ids), question.first_query)

    def _read(self, prompt: Prompt) -> dict[str, Any]:
        """The processor's output; the image itself is processed only once."""
        return dict(self.lvlm.processed([self.image], [prompt.text], self._processor))

    @cached_property
    def _shared_tokens(self) -> int:
        """How many tokens all prompts have in common."""
        first = self._first["input_ids"][0].tolist()
        others = (self._read(self.lvlm.located_prompt(words)) for words in STAND_INS[1:])
        return min(shared_start(first, other["input_ids"][0].tolist()) for other in others)

    @cached_property
    def _last_image_token(self) -> int:
        ids = self._first["input_ids"][0]
        places = (ids == self.lvlm.image_token_id).nonzero()
        return int(places[-1]) if len(places) else len(ids)

    @cached_property
    def _views(self) -> list[View]:
        return self.lvlm.views_in(self._first, 0, self.image)

    def _computed(self, depth: int) -> Prefix:
        lvlm, length = self.lvlm, self._shared_tokens
        inputs = first_tokens(self._first, length)
        if (positions := spatial_positions(lvlm.model, self._first)) is not None:
            inputs["position_ids"] = positions[..., :length]
        inputs = lvlm.on_device(inputs)
        cache = recording_cache(lvlm.model.config)
        with misfit_errors(lvlm.name), torch.inference_mode(), capture(lvlm.attention_modules, depth, None):
            lvlm.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        recurrent = any(cache.is_linear)
        ids = self._first["input_ids"][0, :length].tolist()
        return Prefix(ids, list(cache.layers), depth, can_be_cut=not recurrent and not lvlm.looks_across)


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
