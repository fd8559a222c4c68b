"""What a model says when it is asked: its answer is generated greedily, and what is said is heard on the way.

Which tokens a sample's answer has, and how sure the model was of the first, is read from the scores that it gives the
next token. Nothing of that changes what is generated.
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


class Said(NamedTuple):
    """What a model says to one prompt.

    Args:
        text: its answer, without the token that ends it.
        logprob: log-probability of the first token that it generates, in nats; 0 is certain.
        odds: log-odds of one set of first tokens against another, in nats; None where none was asked for.
    """

    text: str
    logprob: float
    odds: float | None = None


class Weighed(NamedTuple):
    """How likely a model holds a prompt, in nats.

    Args:
        expression: log-probability of the expression's tokens after its first, and of the one after them (its full
            stop); None where its tokens cannot be told from the others.
        first_token: that of the likeliest token after the prompt.
    """

    expression: float | None
    first_token: float


class Sides(NamedTuple):
    """Ids of tokens, those that speak for something and those against it."""

    pro: Sequence[int]
    con: Sequence[int]


class Hearing(LogitsProcessor):
    """Hears the answers of a batch while they are generated, and tells the recorder which have not ended yet.

    Args:
        ends: ids of the tokens that end an answer.
        sides: what the first token is weighed between.
        wanted: bool (B, n), the tokens whose rows the recorder averages; None for all.
    """

    def __init__(self, ends: Sequence[int], sides: Sides | None = None, wanted: Tensor | None = None) -> None:
        self.ends = torch.tensor(list(ends), dtype=torch.long)
        self.sides, self.wanted = sides, wanted
        self.recorder: Recorder | None = None
        self.live: Tensor | None = None  # (B,)
        self.logprob: Tensor | None = None  # (B,) of the first token
        self.odds: Tensor | None = None  # (B,)
        self.rows: list[Tensor | None] = []  # a sample's mean row of its answer [layer, head, key], or none
        self._tokens: list[Tensor] = []

    def __call__(self, _: Any, scores: Tensor) -> Tensor:
        """Take note of the scores (B, V) of the next token, and hand them on as they are."""
        chosen = scores.argmax(-1)
        if self.live is None:
            logs = torch.log_softmax(scores.float(), -1)
            self.logprob = logs.gather(1, chosen[:, None])[:, 0]
            if self.sides is not None:
                pro, con = (logs[:, list(ids)].logsumexp(-1) for ids in self.sides)
                self.odds = pro - con
            self.live = torch.ones_like(chosen, dtype=torch.bool)
        self.live = self.live & ~torch.isin(chosen, self.ends.to(chosen.device))
        self._tokens.append(torch.where(self.live, chosen, -1))
        if self.recorder is not None:
            self.recorder.unfinished = self.live
        return scores

    def said(self, tokenizer: Any, most: int | None = None) -> list[Said]:
        """What each sample said, of `most` tokens at most."""
        assert self.logprob is not None
        tokens = self.tokens(most)
        odds = [None] * len(tokens) if self.odds is None else self.odds.tolist()
        return [
            Said(_text(tokenizer, row), logprob, odd)
            for row, logprob, odd in zip(tokens, self.logprob.tolist(), odds, strict=True)
        ]

    def tokens(self, most: int | None = None) -> list[list[int]]:
        """Ids of the tokens of each sample's answer, `most` at most, without the one that ends it."""
        rows = torch.stack(self._tokens, 1).tolist() if self._tokens else []
        return [[token for token in row if token >= 0][:most] for row in rows]


def weighed(logits: Tensor, ids: Sequence[int], span: range | None) -> Weighed:
    """Of one prompt.

    Args:
        logits: (n, V) after each of the prompt's last n tokens; from the expression's first on, at least.
        ids: all tokens of the prompt.
        span: the places in `ids` of the expression's tokens.

    >>> even = torch.zeros(3, 4)
    >>> [round(x, 2) for x in weighed(even, [9, 1, 2, 3], range(1, 3))]
    [-2.77, -1.39]
    """
    logs = torch.log_softmax(logits.float(), -1)
    if span is None:
        return Weighed(None, float(logs[-1].max()))
    places = range(span.start + 1, min(span.stop + 1, len(ids)))
    own = [logs[place - 1 - len(ids), ids[place]] for place in places]
    return Weighed(float(sum(own)), float(logs[-1].max()))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) if ids else ""


def end_tokens(model: Any) -> tuple[int, ...]:
    """The ids at which the model's own generation ends."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


def generate(
    model: Any, inputs: Mapping[str, Any], num_tokens: int, hearing: Hearing, pad: int | None
) -> None:
    """Greedy generation of up to so many tokens, after prompts padded on the left."""
    # Janus' own `generate` chooses between text and images, and drops the processors of logits.
    kind = GenerationMixin if model.config.model_type == "janus" else type(model)
    kind.generate(
        model,
        **inputs,
        max_new_tokens=num_tokens,
        **GREEDY,
        repetition_penalty=1.0,
        pad_token_id=pad,
        use_cache=True,
        logits_processor=LogitsProcessorList([hearing]),
    )


def go_on(model: Any, inputs: Mapping[str, Any], num_tokens: int, hearing: Hearing) -> None:
    """The same after a prefix that is in the cache already (`past_key_values`), of prompts of one length."""
    given = dict(inputs)
    positions = given.get("position_ids")
    only_last = keeping(model, 1)
    for number in range(num_tokens):
        scores = model(**given, **only_last).logits[:, -1].to(torch.float32, copy=True)
        chosen = hearing(None, scores).argmax(-1)
        if number + 1 == num_tokens or hearing.live is None or not hearing.live.any():
            return
        given = {"input_ids": chosen[:, None], "past_key_values": given["past_key_values"], "use_cache": True}
        if positions is not None:
            positions = positions[..., -1:] + 1
            given["position_ids"] = positions


def keeping(model: Any, num_tokens: int) -> dict[str, int]:
    """The argument that has a model give the scores after its last tokens alone, where it takes one."""
    return {"logits_to_keep": num_tokens} if "logits_to_keep" in signature(model.forward).parameters else {}


def spellings(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of single tokens that spell a word: with a small or a capital letter, with or without a space before it.

    Empty where the tokenizer has no token of its own for any of them.
    """
    unknown = tokenizer.unk_token_id
    ids: dict[int, None] = {}
    for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) == 1 and found[0] != unknown:
            ids[int(found[0])] = None
    return tuple(ids)
