"""Greedy generation, and what is recorded of it: each sample's tokens and the log-probabilities of the first one.

An `AnswerRecorder` reads the scores of the next token as a logits processor. It never changes what is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from localization_heads.lvlm.forward.capture import Recorder

GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1}


class GeneratedAnswer(NamedTuple):
    """A model's answer to one prompt.

    Args:
        text: without the token that ends it.
        first_logprob: log-probability of the first generated token, in nats.
        yes_logit: log-odds of yes against no as the first token, in nats; None if they were not compared.
    """

    text: str
    first_logprob: float
    yes_logit: float | None = None


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a prompt, in nats.

    Args:
        expression: of the expression's tokens after its first, and of the token that follows them (the full stop);
            None if the expression's tokens cannot be found in the prompt.
        next_token: of the likeliest token after the prompt.
    """

    expression: float | None
    next_token: float


class YesNoTokens(NamedTuple):
    """Ids of the tokens that mean yes, and of those that mean no."""

    yes: Sequence[int]
    no: Sequence[int]


class AnswerRecorder(LogitsProcessor):
    """Records the answers of a batch, and tells the attention recorder which samples are unfinished.

    Args:
        eos_token_ids: the tokens that end an answer.
        yes_no: the alternatives that are compared for the first token.
        token_mask: bool (B, n), the answer tokens whose attention rows are averaged; None for all.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        yes_no: YesNoTokens | None = None,
        token_mask: Tensor | None = None,
    ) -> None:
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.long)
        self.yes_no, self.token_mask = yes_no, token_mask
        self.attention: Recorder | None = None
        self.unfinished: Tensor | None = None  # bool (B,)
        self.first_logprobs: Tensor | None = None  # (B,)
        self.yes_logits: Tensor | None = None  # (B,)
        self.mean_rows: list[Tensor | None] = []  # per sample [layer, head, key]; None for an empty answer
        self._tokens: list[Tensor] = []

    def __call__(self, _: Any, scores: Tensor) -> Tensor:
        """Record the next token's scores (B, V), and return them unchanged."""
        chosen = scores.argmax(-1)
        if self.unfinished is None:
            logprobs = torch.log_softmax(scores.float(), -1)
            self.first_logprobs = logprobs.gather(1, chosen[:, None])[:, 0]
            if self.yes_no is not None:
                yes, no = (logprobs[:, list(ids)].logsumexp(-1) for ids in self.yes_no)
                self.yes_logits = yes - no
            self.unfinished = torch.ones_like(chosen, dtype=torch.bool)
        self.unfinished = self.unfinished & ~torch.isin(chosen, self.eos_token_ids.to(chosen.device))
        self._tokens.append(torch.where(self.unfinished, chosen, -1))
        if self.attention is not None:
            self.attention.unfinished = self.unfinished
        return scores

    def answers(self, tokenizer: Any, max_tokens: int | None = None) -> list[GeneratedAnswer]:
        """Each sample's answer, cut after `max_tokens`."""
        assert self.first_logprobs is not None
        tokens = self.token_ids(max_tokens)
        yes_logits = [None] * len(tokens) if self.yes_logits is None else self.yes_logits.tolist()
        return [
            GeneratedAnswer(_decode(tokenizer, ids), logprob, yes_logit)
            for ids, logprob, yes_logit in zip(tokens, self.first_logprobs.tolist(), yes_logits, strict=True)
        ]

    def token_ids(self, max_tokens: int | None = None) -> list[list[int]]:
        """Token ids of each sample's answer, without the one that ends it, cut after `max_tokens`."""
        rows = torch.stack(self._tokens, 1).tolist() if self._tokens else []
        return [[token for token in row if token >= 0][:max_tokens] for row in rows]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) if ids else ""


def generate(model: Any, inputs: Mapping[str, Any], num_tokens: int, recorder: AnswerRecorder, pad: int | None) -> None:
    """Generate at most `num_tokens` tokens greedily, after left-padded prompts."""
    # Janus overrides `generate` to choose between text and images, and its version drops logits processors.
    kind = GenerationMixin if model.config.model_type == "janus" else type(model)
    kind.generate(
        model,
        **inputs,
        max_new_tokens=num_tokens,
        **GREEDY,
        repetition_penalty=1.0,
        pad_token_id=pad,
        use_cache=True,
        logits_processor=LogitsProcessorList([recorder]),
    )


def generate_from_cache(model: Any, inputs: Mapping[str, Any], num_tokens: int, recorder: AnswerRecorder) -> None:
    """`generate` for prompts of equal length whose prefix is already in the KV cache (`past_key_values`)."""
    step: dict[str, Any] = dict(inputs)
    positions = inputs.get("position_ids")
    only_last = logits_to_keep(model, 1)
    for number in range(num_tokens):
        scores = model(**step, **only_last).logits[:, -1].to(torch.float32, copy=True)
        chosen = recorder(None, scores).argmax(-1)
        if number + 1 == num_tokens or recorder.unfinished is None or not recorder.unfinished.any():
            return
        step = {"input_ids": chosen[:, None], "past_key_values": step["past_key_values"], "use_cache": True}
        if positions is not None:
            positions = positions[..., -1:] + 1
            step["position_ids"] = positions


def logits_to_keep(model: Any, num_tokens: int) -> dict[str, int]:
    """The keyword argument that limits the LM head to the last tokens; empty if the model does not take it."""
    return {"logits_to_keep": num_tokens} if "logits_to_keep" in signature(model.forward).parameters else {}


def prompt_logprobs(logits: Tensor, ids: Sequence[int], span: range | None) -> PromptLogprobs:
    """The log-probabilities of one prompt.

    Args:
        logits: (n, V) at the last n tokens of the prompt, which include the whole expression.
        ids: all tokens of the prompt.
        span: indices into `ids` of the expression's tokens.

    >>> even = torch.zeros(3, 4)
    >>> [round(x, 2) for x in prompt_logprobs(even, [9, 1, 2, 3], range(1, 3))]
    [-2.77, -1.39]
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    next_token = float(logprobs[-1].max())
    if span is None:
        return PromptLogprobs(None, next_token)
    predicted = range(span.start + 1, min(span.stop + 1, len(ids)))
    # The logits at token i - 1 predict token i; they are indexed from the end of the prompt.
    return PromptLogprobs(float(sum(logprobs[i - 1 - len(ids), ids[i]] for i in predicted)), next_token)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The tokens at which the model's generation ends."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def word_token_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of the single tokens that spell a word, capitalized or not, with or without a leading space.

    Empty if every spelling takes several tokens, or is unknown to the tokenizer.
    """
    unknown = tokenizer.unk_token_id
    ids: dict[int, None] = {}
    for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) == 1 and found[0] != unknown:
            ids[int(found[0])] = None
    return tuple(ids)
