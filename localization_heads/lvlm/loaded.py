"""`LoadedModel`: a model with its processor, and its forward pass from prompts to rows of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import AttentionMaps, join_images
from localization_heads.data.sources import LoadedImages, PromptImages, images_of
from localization_heads.errors import UsageError, WorkError, shown
from localization_heads.lvlm.answers.answering import (
    GREEDY,
    Hearing,
    Said,
    Sides,
    end_tokens,
    generate,
    go_on,
)
from localization_heads.lvlm.answers.trace import Spelled, group_tokens, silent_tokens, span_tokens, spelled
from localization_heads.lvlm.families.geometry import Layout, ProcessedImage, View, read_maps, split_views
from localization_heads.lvlm.families.table import layout_of_first, views_of
from localization_heads.lvlm.forward.capture import Query, Recorder, capture, crop_to_prompt
from localization_heads.lvlm.forward.failures import memory_errors, mismatch_errors
from localization_heads.lvlm.forward.prefix import why_not_shared
from localization_heads.lvlm.prompted import PromptedModel
from localization_heads.lvlm.text.prompts import Prompt, strip_closing_marks
from localization_heads.lvlm.text.query_tokens import expression_tokens, find_query

LAYOUTS = 1024
"""Sizes of images whose places in a prompt with several are kept."""


class Answered(NamedTuple):
    """The row of a sample's query token `[layer, head, key]`, the mean row of its answer's, and what it says."""

    row: Tensor
    answer: Tensor | None = None
    said: Said | None = None


def _with_image_outputs(_: nn.Module, __: Any, output: Any) -> None:
    """Llama 4 in transformers 5.24 asks the output of its language model for these, which it has none of."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


class LoadedModel(PromptedModel):
    """A model that can be asked: from prompts to rows of attention, and to what it answers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._layout = lru_cache(LAYOUTS)(self._lay_out)  # shared by the copies that `prompted` makes
        self.video_settings: Callable[[], Mapping[str, Any]] = dict  # the checkpoint's own, where it has some
        if self.model.config.model_type == "llama4":
            self.model.language_model.register_forward_hook(_with_image_outputs)

    @property
    def why_not_shared(self) -> str | None:
        """Why an image cannot be encoded once for all its expressions; None if it can."""
        if self.query_token == "answer_first":
            return "the first token of the answer is generated anew for each prompt"
        if reason := next((change.why_not_shared for change in self.changes if change.why_not_shared), None):
            return reason
        if not self.image_comes_first:
            return "its template puts the image after the expression"
        return self._family_not_shared

    @cached_property
    def _family_not_shared(self) -> str | None:
        return why_not_shared(self.model.config)

    def query(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any]) -> Query:
        """The query positions; an encoder-decoder's are its decoder's, which starts with a token of its own."""
        if self.reads_answer:
            return self._last(prompts, inputs)._replace(answers=self.most_tokens)
        if not self.model.config.is_encoder_decoder:
            with self._tokenizing:
                return find_query(
                    self.query_token, prompts, inputs, self.processor.tokenizer, self.dropped_token
                )
        if self.query_token.startswith("expression"):
            raise UsageError(
                f"query_token={self.query_token}: {self.name} reads the expression in its encoder, whose attention "
                "is not captured; use query_token=last (the decoder's first token) or answer_first"
            )
        return Query(step=int(self.query_token == "answer_first"))

    def expression_span(self, prompt: Prompt, ids: Sequence[int]) -> range | None:
        """The places of an expression's tokens among those of its prompt; None where they cannot be told."""
        try:
            with self._tokenizing:
                return expression_tokens(self.processor.tokenizer, prompt, ids, self.dropped_token)
        except UsageError:
            return None

    def _last(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any]) -> Query:
        if self.model.config.is_encoder_decoder:
            return Query()
        return find_query("last", prompts, inputs, self.processor.tokenizer)

    def hearing(self, sides: Sides | None = None, wanted: Tensor | None = None) -> Hearing:
        """What hears a batch of answers (`capture_rows`)."""
        return Hearing(end_tokens(self.model), sides, wanted)

    def answered(
        self,
        given: Callable[[], dict[str, Any]],
        query: Query,
        expressions: Sequence[str],
        last_layer: int | None,
    ) -> Iterator[Answered]:
        """What `capture_rows` and `heard` give of each sample; of `answer_span`, the mean row of the span's tokens.

        Which tokens spell a span is known only when the answer is there, so it is generated a second time: memory
        holds one row a head, however long it is.

        Args:
            given: makes the model's inputs, anew for each time.
            expressions: of the samples.
        """
        hearing = self.hearing()
        if self.query_token != "answer_span":
            rows = self.capture_rows(given(), query, last_layer, hearing)
            heard = self.heard(hearing, query, len(rows))
            return (Answered(row, *one) for row, one in zip(rows, heard, strict=True))
        with memory_errors(), mismatch_errors(self.name), torch.inference_mode():
            self.run(given(), query, hearing)
        tokens = hearing.tokens(query.answers)
        wanted = self._wanted(tokens, expressions)
        again = self.hearing(wanted=wanted)
        rows = self.capture_rows(given(), query._replace(answers=wanted.shape[1]), last_layer, again)
        if again.tokens(wanted.shape[1]) != [row[: wanted.shape[1]] for row in tokens]:
            raise WorkError(f"{self.name} does not answer the same twice: use query_token=answer_mean")
        said = hearing.said(self.processor.tokenizer, query.answers)
        return (Answered(*one) for one in zip(rows, again.rows, said, strict=True))

    def _wanted(self, tokens: Sequence[Sequence[int]], expressions: Sequence[str]) -> Tensor:
        """Bool (B, n): which tokens of each sample's answer spell the span, up to the last of any sample."""
        places = [
            self.span_token_indices(
                spelled(self.processor.tokenizer.decode, ids, silent_tokens(self.processor.tokenizer)), text
            )
            for ids, text in zip(tokens, expressions, strict=True)
        ]
        wanted = torch.zeros(len(places), 1 + max(map(max, places)), dtype=torch.bool)
        for row, one in zip(wanted, places, strict=True):
            row[one] = True
        return wanted

    def span_token_indices(self, answer: Spelled, expression: str) -> Sequence[int]:
        """The tokens that `answer_span` means. UsageError, with the answer, where it holds no such span."""
        if self.box_format is None:
            return span_tokens(answer, str(self.answer_span).replace("{}", strip_closing_marks(expression)))
        if places := group_tokens(answer, self.box_format.pattern):
            return places
        raise UsageError(f"answer_span=box: the answer is {shown(answer.text, 200)}, which holds no box")

    def capture_rows(
        self, inputs: dict[str, Any], query: Query, last_layer: int | None, hearing: Hearing | None = None
    ) -> list[Tensor]:
        """Per sample `[layer, head, key]` fp32 on the CPU; layers that do not see the image stay zero.

        Args:
            hearing: hears the answers, and gets the mean rows of their tokens, where `query` has the model answer.
        """
        stop = last_layer
        if stop is None and query.step == 0:
            stop = max(self.attention_modules)  # layers after the last one that sees the image are not needed
        length = int(inputs["input_ids"].shape[1])
        query = query.on(self.device)
        num_tokens = None if self.uses_cross_attention else query.past + length
        with (
            memory_errors(),
            mismatch_errors(self.name),
            torch.inference_mode(),
            capture(self.attention_modules, stop, query, num_tokens) as recorder,
        ):
            self.run(inputs, query, self._told(hearing, query, recorder))
        rows = {layer: recorder.rows.pop(layer).cpu() for layer in list(recorder.rows)}
        if not self.uses_cross_attention:
            rows = {layer: crop_to_prompt(row, length, query.step) for layer, row in rows.items()}
        if not rows:
            raise WorkError(
                f"{self.name}: no attention was seen; its attention implementation cannot be captured"
            )
        if hearing is not None and query.answers is not None:
            hearing.rows = self._mean_rows(recorder)
        return list(self._stacked(rows))

    def _stacked(self, rows: dict[int, Tensor]) -> Tensor:
        """(B, layer, H, T) of rows (B, H, T) by layer, which are used up: they are never twice in memory."""
        batch, heads, tokens = next(iter(rows.values())).shape
        full = torch.zeros(batch, self.num_layers, heads, tokens)
        for layer in list(rows):
            full[:, layer] = rows.pop(layer)
        return full

    def _told(self, hearing: Hearing | None, query: Query, recorder: Recorder) -> Hearing | None:
        """The hearing that tells the recorder who still answers; one of its own where nobody listens."""
        if query.answers is None:
            return None
        told = hearing or self.hearing()
        told.recorder = recorder
        recorder.counted = told.wanted
        return told

    def _mean_rows(self, recorder: Recorder) -> list[Tensor | None]:
        """Per sample, the mean row of its answer's tokens, `[layer, head, key]`; None of one that answers nothing."""
        if not (answers := recorder.answers):
            return []
        counts = next(iter(answers.values()))[1].tolist()
        full = self._stacked({layer: mean.cpu() for layer, (mean, _) in answers.items()})
        return [row if count else None for row, count in zip(full, counts, strict=True)]

    def run(self, inputs: dict[str, Any], query: Query, hearing: Hearing | None = None) -> None:
        """One prefill without LM head and cache; or, for tokens of the answer, greedy generation of one more.

        One more, because a token's attention is computed when it is read, in the step that predicts the next.
        """
        if query.answers is not None:
            heard, num_tokens = hearing or self.hearing(), query.answers + 1
            if "past_key_values" in inputs:
                go_on(self.model, inputs, num_tokens, heard)
            else:
                generate(self.model, inputs, num_tokens, heard, self.processor.tokenizer.pad_token_id)
        elif query.step == 0:
            self.model.base_model(**{"use_cache": False, **inputs})
        else:
            self.model.generate(
                **inputs,
                max_new_tokens=query.step + 1,
                min_new_tokens=query.step + 1,
                **GREEDY,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                use_cache=True,
            )

    def heard(self, hearing: Hearing, query: Query, num: int) -> Iterator[tuple[Tensor | None, Said | None]]:
        """What each of so many samples answers, and the mean row of its tokens."""
        if query.answers is None:
            return iter([(None, None)] * num)
        said = hearing.said(self.processor.tokenizer, query.answers)
        return zip(hearing.rows or [None] * num, said, strict=True)

    def maps(
        self,
        found: Answered,
        views: Sequence[Sequence[View]],
        shown: PromptImages,
        expression: str,
        prompt: str,
    ) -> AttentionMaps:
        """The maps of one sample.

        Args:
            views: of each image that is shown.
        """
        row, answer, said = found
        if self.reads_answer_alone and answer is not None:
            row, answer = answer, None

        def maps_of(views: Sequence[View], image: Image.Image) -> AttentionMaps:
            maps, box = read_maps(row.numpy(), views, image.size, self.view)
            return AttentionMaps(
                attention=maps,
                image_box=box,
                image_size=image.size,
                query=expression,
                prompt=prompt,
                model=self.name,
                asked=self.asked,
                answer=None if answer is None else read_maps(answer.numpy(), views, image.size, self.view)[0],
                answer_text="" if said is None else said.text,
                answer_logprob=None if said is None else said.logprob,
            ).of_size(getattr(image, "original_size", image.size))

        each = [maps_of(own, image) for own, image in zip(views, images_of(shown), strict=True)]
        return join_images(each) if len(each) > 1 else each[0]

    def views_in(self, inputs: Mapping[str, Any], sample: int, image: Image.Image) -> list[View]:
        """The views of one sample of an encoded batch."""
        return views_of(ProcessedImage(self.model.config, self.processor, inputs, sample, image.size))

    def views_of_images(
        self, inputs: Mapping[str, Any], sample: int, shown: PromptImages
    ) -> list[list[View]]:
        """The views of each image of one sample of an encoded batch."""
        if not isinstance(shown, LoadedImages):
            return [self.views_in(inputs, sample, shown)]
        sizes = [image.size for image in shown.images]
        tokens = ProcessedImage(self.model.config, self.processor, inputs, sample, sizes[0]).tokens
        return split_views(tokens, [self._layout(size) for size in sizes])

    def _lay_out(self, size: tuple[int, int]) -> Layout:
        """The places of an image's tokens among several: of two that are equal, the first's."""
        blank = LoadedImages([Image.new("RGB", size)] * 2)
        twin = self.with_num_images(2)
        inputs = twin.run_processor([blank], [twin.prompt("it")])
        return layout_of_first(ProcessedImage(self.model.config, self.processor, inputs, 0, size))
