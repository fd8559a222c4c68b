"""`AttentionModel`: from a batch of model inputs to the attention rows of its query tokens, and to attention maps.

Where the attention of the answer's tokens is read too, they are generated greedily in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import starmap
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import AttentionMaps, join_images
from localization_heads.data.sources import LoadedImages, PromptImages, images_of
from localization_heads.errors import UsageError, WorkError, shown
from localization_heads.lvlm.answers.answering import (
    GREEDY,
    AnswerRecorder,
    GeneratedAnswer,
    YesNoTokens,
    eos_token_ids,
    generate,
    generate_from_cache,
)
from localization_heads.lvlm.answers.trace import (
    TokenizedText,
    align_tokens,
    control_token_ids,
    tokens_of_match,
    tokens_of_span,
)
from localization_heads.lvlm.families.geometry import Layout, ProcessedImage, View, read_maps, split_views
from localization_heads.lvlm.families.table import layout_of_first, views_of
from localization_heads.lvlm.forward.capture import Query, Recorder, capture, crop_to_prompt
from localization_heads.lvlm.forward.failures import memory_errors, mismatch_errors
from localization_heads.lvlm.forward.prefix import why_not_shared
from localization_heads.lvlm.model_with_processor import ModelWithProcessor
from localization_heads.lvlm.text.prompts import Prompt, strip_closing_marks
from localization_heads.lvlm.text.query_tokens import expression_tokens, find_query

LAYOUT_CACHE_SIZE = 1024
"""Image sizes whose token layout in a prompt of several images is cached."""


class SampleAttention(NamedTuple):
    """What the forward pass gives for one sample.

    Args:
        row: attention of the query token, `[layer, head, key]`.
        answer_row: mean attention of the answer's tokens, of the same shape.
        answer: None if the model was not asked to answer.
    """

    row: Tensor
    answer_row: Tensor | None = None
    answer: GeneratedAnswer | None = None


class AttentionModel(ModelWithProcessor):
    """A model with its processor whose attention can be read: from model inputs to rows and maps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._layout = lru_cache(LAYOUT_CACHE_SIZE)(self._compute_layout)  # shared by the copies that `prompted` makes
        self.video_settings: Callable[[], Mapping[str, Any]] = dict  # the checkpoint's own, if it has any
        if self.model.config.model_type == "llama4":
            self.model.language_model.register_forward_hook(_add_image_outputs)

    @property
    def why_not_shared(self) -> str | None:
        """Why the KV cache of an image cannot be shared by all its expressions; None if it can."""
        if self.query_token == "answer_first":
            return "the first token of the answer is generated separately for each prompt"
        if reason := next((change.why_not_shared for change in self.changes if change.why_not_shared), None):
            return reason
        if not self.image_comes_first:
            return "its template puts the image after the expression"
        return self._why_family_not_shared

    @cached_property
    def _why_family_not_shared(self) -> str | None:
        return why_not_shared(self.model.config)

    def query(self, prompts: Sequence[Prompt], inputs: Mapping[str, Any]) -> Query:
        """The query positions of a batch. An encoder-decoder's are its decoder's, which starts with its own token."""
        tokenizer = self.processor.tokenizer
        is_encoder_decoder = self.model.config.is_encoder_decoder
        if self.reads_answer:
            last = Query() if is_encoder_decoder else find_query("last", prompts, inputs, tokenizer)
            return last._replace(answer_tokens=self.max_answer_tokens)
        if not is_encoder_decoder:
            with self._tokenizing:
                return find_query(self.query_token, prompts, inputs, tokenizer, self.dropped_token)
        if self.query_token.startswith("expression"):
            raise UsageError(
                f"query_token={self.query_token}: {self.name} reads the expression in its encoder, whose attention "
                "is not captured; use query_token=last (the decoder's first token) or answer_first"
            )
        return Query(step=int(self.query_token == "answer_first"))

    def expression_span(self, prompt: Prompt, ids: Sequence[int]) -> range | None:
        """Indices of the expression's tokens in a tokenized prompt; None if they cannot be found."""
        try:
            with self._tokenizing:
                return expression_tokens(self.processor.tokenizer, prompt, ids, self.dropped_token)
        except UsageError:
            return None

    def answer_recorder(self, yes_no: YesNoTokens | None = None, token_mask: Tensor | None = None) -> AnswerRecorder:
        return AnswerRecorder(eos_token_ids(self.model), yes_no, token_mask)

    def read_attention(
        self,
        make_inputs: Callable[[], dict[str, Any]],
        query: Query,
        expressions: Sequence[str],
        last_layer: int | None,
    ) -> Iterator[SampleAttention]:
        """The attention of each sample of a batch, and its answer if `query` has the model generate one.

        With `query_token=answer_span` the answer is generated twice: which of its tokens spell the span is known only
        once it is complete, and keeping the rows of all tokens until then would take too much memory.

        Args:
            make_inputs: returns fresh model inputs for each pass, since generation extends their KV cache.
            expressions: of the samples.
        """
        if self.query_token == "answer_span":
            return self._read_span_attention(make_inputs, query, expressions, last_layer)
        recorder = self.answer_recorder()
        rows = self.capture_rows(make_inputs(), query, last_layer, recorder)
        if query.answer_tokens is None:
            return map(SampleAttention, rows)
        answers = recorder.answers(self.processor.tokenizer, query.answer_tokens)
        return starmap(SampleAttention, zip(rows, recorder.mean_rows or [None] * len(rows), answers, strict=True))

    def _read_span_attention(
        self,
        make_inputs: Callable[[], dict[str, Any]],
        query: Query,
        expressions: Sequence[str],
        last_layer: int | None,
    ) -> Iterator[SampleAttention]:
        first = self.answer_recorder()
        with memory_errors(), mismatch_errors(self.name), torch.inference_mode():
            self.run(make_inputs(), query, first)
        token_ids = first.token_ids(query.answer_tokens)
        mask = self._span_mask(token_ids, expressions)
        length = mask.shape[1]
        second = self.answer_recorder(token_mask=mask)
        rows = self.capture_rows(make_inputs(), query._replace(answer_tokens=length), last_layer, second)
        if second.token_ids(length) != [ids[:length] for ids in token_ids]:
            raise WorkError(f"{self.name} does not answer the same twice: use query_token=answer_mean")
        answers = first.answers(self.processor.tokenizer, query.answer_tokens)
        return starmap(SampleAttention, zip(rows, second.mean_rows, answers, strict=True))

    def _span_mask(self, token_ids: Sequence[Sequence[int]], expressions: Sequence[str]) -> Tensor:
        """Bool (B, n): which tokens of each answer spell the span. n ends with the last such token of the batch."""
        tokenizer = self.processor.tokenizer
        spans = [
            self.span_token_indices(align_tokens(tokenizer.decode, ids, control_token_ids(tokenizer)), expression)
            for ids, expression in zip(token_ids, expressions, strict=True)
        ]
        mask = torch.zeros(len(spans), 1 + max(map(max, spans)), dtype=torch.bool)
        for row, span in zip(mask, spans, strict=True):
            row[span] = True
        return mask

    def span_token_indices(self, answer: TokenizedText, expression: str) -> Sequence[int]:
        """Indices of the answer's tokens that `answer_span` selects. UsageError, with the answer, if there are none."""
        if self.box_format is None:
            return tokens_of_span(answer, str(self.answer_span).replace("{}", strip_closing_marks(expression)))
        if indices := tokens_of_match(answer, self.box_format.pattern):
            return indices
        raise UsageError(f"answer_span=box: the answer is {shown(answer.text, 200)}, which holds no box")

    def capture_rows(
        self,
        inputs: dict[str, Any],
        query: Query,
        last_layer: int | None,
        recorder: AnswerRecorder | None = None,
    ) -> list[Tensor]:
        """Attention rows `[layer, head, key]` per sample, fp32 on the CPU. Layers that do not see the image are zero.

        Args:
            recorder: receives the answers and the mean rows of their tokens. Required if `query.answer_tokens` is set.
        """
        stop = last_layer
        if stop is None and query.step == 0:
            stop = max(self.attention_modules)  # no later layer sees the image
        length = int(inputs["input_ids"].shape[1])
        query = query.on(self.device)
        num_tokens = None if self.uses_cross_attention else query.past + length
        with (
            memory_errors(),
            mismatch_errors(self.name),
            torch.inference_mode(),
            capture(self.attention_modules, stop, query, num_tokens) as attention,
        ):
            if recorder is not None and query.answer_tokens is not None:
                recorder.attention, attention.token_mask = attention, recorder.token_mask
            self.run(inputs, query, recorder)
        rows = {layer: attention.rows.pop(layer).cpu() for layer in list(attention.rows)}
        if not self.uses_cross_attention:
            rows = {layer: crop_to_prompt(row, length, query.step) for layer, row in rows.items()}
        if not rows:
            raise WorkError(f"{self.name}: no attention was seen; its attention implementation cannot be captured")
        if recorder is not None and query.answer_tokens is not None:
            recorder.mean_rows = self._mean_answer_rows(attention)
        return list(self._stack_layers(rows))

    def _stack_layers(self, rows: dict[int, Tensor]) -> Tensor:
        """(B, layer, H, T) from rows (B, H, T) by layer. Empties `rows`, so that they are never twice in memory."""
        batch, heads, tokens = next(iter(rows.values())).shape
        stacked = torch.zeros(batch, self.num_layers, heads, tokens)
        for layer in list(rows):
            stacked[:, layer] = rows.pop(layer)
        return stacked

    def _mean_answer_rows(self, attention: Recorder) -> list[Tensor | None]:
        """The mean row of each sample's answer tokens, `[layer, head, key]`; None for an empty answer."""
        if not (answers := attention.answer_means):
            return []
        counts = next(iter(answers.values()))[1].tolist()
        stacked = self._stack_layers({layer: mean.cpu() for layer, (mean, _) in answers.items()})
        return [row if count else None for row, count in zip(stacked, counts, strict=True)]

    def run(self, inputs: dict[str, Any], query: Query, recorder: AnswerRecorder | None = None) -> None:
        """Run the model as far as `query` needs: one prefill without LM head and KV cache, or greedy generation.

        Generation goes one token beyond those that are read: a token's attention is computed in the step that reads
        it and predicts the next one.
        """
        pad = self.processor.tokenizer.pad_token_id
        if query.answer_tokens is not None:
            assert recorder is not None
            num_tokens = query.answer_tokens + 1
            if "past_key_values" in inputs:
                generate_from_cache(self.model, inputs, num_tokens, recorder)
            else:
                generate(self.model, inputs, num_tokens, recorder, pad)
        elif query.step == 0:
            self.model.base_model(**{"use_cache": False, **inputs})
        else:
            length = query.step + 1
            self.model.generate(
                **inputs,
                max_new_tokens=length,
                min_new_tokens=length,
                **GREEDY,
                pad_token_id=pad,
                use_cache=True,
            )

    def maps(
        self,
        sample: SampleAttention,
        views: Sequence[Sequence[View]],
        shown: PromptImages,
        expression: str,
        prompt: str,
    ) -> AttentionMaps:
        """The attention maps of one sample.

        Args:
            views: of each image in the prompt.
        """
        row, answer_row, answer = sample
        if self.reads_only_answer and answer_row is not None:
            row, answer_row = answer_row, None

        def maps_of(image: Image.Image, views: Sequence[View]) -> AttentionMaps:
            maps, box = read_maps(row.numpy(), views, image.size, self.view)
            answer_maps = None if answer_row is None else read_maps(answer_row.numpy(), views, image.size, self.view)[0]
            return AttentionMaps(
                attention=maps,
                image_box=box,
                image_size=image.size,
                query=expression,
                prompt=prompt,
                model=self.name,
                asked=self.asked,
                answer=answer_maps,
                answer_text="" if answer is None else answer.text,
                answer_logprob=None if answer is None else answer.first_logprob,
            ).of_size(getattr(image, "original_size", image.size))

        each = [maps_of(image, own) for image, own in zip(images_of(shown), views, strict=True)]
        return join_images(each) if len(each) > 1 else each[0]

    def views_in(self, inputs: Mapping[str, Any], sample: int, image: Image.Image) -> list[View]:
        """The views (grids of image tokens) of one sample of a processed batch, which shows a single image."""
        return views_of(ProcessedImage(self.model.config, self.processor, inputs, sample, image.size))

    def views_of_images(self, inputs: Mapping[str, Any], sample: int, shown: PromptImages) -> list[list[View]]:
        """The views of each image of one sample of a processed batch."""
        if not isinstance(shown, LoadedImages):
            return [self.views_in(inputs, sample, shown)]
        sizes = [image.size for image in shown.images]
        tokens = ProcessedImage(self.model.config, self.processor, inputs, sample, sizes[0]).tokens
        return split_views(tokens, [self._layout(size) for size in sizes])

    def _compute_layout(self, size: tuple[int, int]) -> Layout:
        """The token layout of an image of that size in a prompt of several, read off the first of two blank ones."""
        blank = LoadedImages([Image.new("RGB", size)] * 2)
        twin = self.with_num_images(2)
        inputs = twin.run_processor([blank], [twin.prompt("it")])
        return layout_of_first(ProcessedImage(self.model.config, self.processor, inputs, 0, size))


def _add_image_outputs(_: nn.Module, __: Any, output: Any) -> None:
    """Llama 4 in transformers 5.24 reads this attribute of its language model's output, which does not have it."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None
