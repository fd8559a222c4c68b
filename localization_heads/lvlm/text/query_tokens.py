"""Which tokens are query tokens (`query_token`), and which tokens of a prompt spell the expression.

The paper takes the last prompt token, the full stop of the expression. A chat template ends with tokens that are the
same for every expression; there, a token of the expression or of the answer may attend to the object better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from localization_heads.errors import UsageError
from localization_heads.lvlm.forward.capture import Query
from localization_heads.lvlm.forward.prefix import TOKEN_INPUTS
from localization_heads.lvlm.text.prompts import Prompt
from localization_heads.options.groups import QueryToken

_MAX_DECODED = 1024
"""Tokens at the end of a prompt in which the expression is searched by decoding."""
_LONE_SPACE = "▁"


def find_query(
    kind: QueryToken,
    prompts: Sequence[Prompt],
    inputs: Mapping[str, Any],
    tokenizer: Any,
    dropped_token: int | None = None,
) -> Query:
    """Return the query positions of a batch.

    Args:
        kind: `last` (the paper's: the last prompt token), `expression_end` (the last token of the expression,
            without its full stop), `expression_mean` (the mean over its tokens) or `answer_first` (the first token of
            the answer). The kinds that read the whole answer are passed as `last`, with `Query.answer_tokens` set.
        inputs: the processor's output for the prompts, padded on either side.
        dropped_token: an id that was deleted from the inputs.

    Raises:
        UsageError: the expression's tokens cannot be found in the prompt.
    """
    if kind == "last":
        return _last_token(inputs.get("attention_mask"))
    if kind == "answer_first":
        return Query(step=1)
    ids = inputs["input_ids"].tolist()
    spans = [expression_tokens(tokenizer, prompt, row, dropped_token) for prompt, row in zip(prompts, ids, strict=True)]
    if kind == "expression_end":
        return Query(torch.tensor([[span[-1]] for span in spans]))
    return _mean_over(spans)


def _last_token(attention_mask: Tensor | None) -> Query:
    """The last position of the batch or, if it is padded on the right, each sample's own last token."""
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return Query()
    T = attention_mask.shape[1]
    last = T - 1 - attention_mask.flip(1).long().argmax(1)  # (B,)
    return Query(last[:, None])


def _mean_over(spans: Sequence[range]) -> Query:
    """Each span's positions with equal weights; shorter spans are padded with their last position at weight 0."""
    n = max(len(span) for span in spans)
    positions = torch.tensor([[*span, *[span[-1]] * (n - len(span))] for span in spans])
    lengths = torch.tensor([[float(len(span))] for span in spans])
    return Query(positions, (torch.arange(n) < lengths) / lengths)


def batch_queries(queries: Sequence[tuple[Query, int]], past: int) -> Query:
    """Combine the queries of single prompts into one for a batch of their suffixes after `past` shared tokens.

    Args:
        queries: each with its prompt's number of tokens.

    >>> batch_queries([(Query(), 9), (Query(torch.tensor([[7]])), 10)], past=6)[:2]
    (tensor([[2],
            [1]]), None)
    """
    answer_tokens = queries[0][0].answer_tokens
    if answer_tokens is not None:  # these prompts are of equal length, and their query is the last token
        return Query(past=past, answer_tokens=answer_tokens)
    positions = [[length - 1] if q.positions is None else q.positions[0].tolist() for q, length in queries]
    weights = [[1.0] if q.weights is None else q.weights[0].tolist() for q, _ in queries]
    n = max(len(row) for row in positions)
    padded_positions = torch.tensor([row + row[-1:] * (n - len(row)) for row in positions])
    padded_weights = torch.tensor([row + [0.0] * (n - len(row)) for row in weights])
    return Query(padded_positions - past, padded_weights if n > 1 else None, past=past)


def expression_tokens(tokenizer: Any, prompt: Prompt, ids: Sequence[int], dropped_token: int | None = None) -> range:
    """Return the indices into `ids` of the tokens that spell the expression, without its closing full stop.

    A token that extends beyond the expression (with the space before it) counts as part of it. The exception is a last
    token that shares only punctuation with it: where a closing quote and the full stop are one token, the expression
    ends before that token. So `expression_end` is never the full stop, which is the paper's query token.

    Raises:
        UsageError: the tokens cannot be found.
    """
    span = _by_offsets(tokenizer, prompt, ids, dropped_token) or _by_decoding(tokenizer, prompt, ids)
    if span is None:
        raise UsageError(
            f"query_token: the tokens of '{prompt.expression}' cannot be found in this model's prompt; "
            "use query_token=last"
        )
    return span


def _by_offsets(tokenizer: Any, prompt: Prompt, ids: Sequence[int], dropped_token: int | None) -> range | None:
    """Find the expression by a fast tokenizer's character offsets.

    Image tokens shift all positions in `ids`, so the expression's tokens are searched there, nearest to where they are
    expected from the end.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    kept = [(token, offsets) for token, offsets in pairs if token != dropped_token]
    inside = [
        index
        for index, (_, (start, end)) in enumerate(kept)
        if start < end and start < prompt.end and end > prompt.start
    ]
    if not inside:
        return None
    if len(inside) > 1 and _shares_only_punctuation(prompt, *kept[inside[-1]][1]):
        inside.pop()
    first, count = inside[0], inside[-1] - inside[0] + 1
    tokens = [token for token, _ in kept]
    expected = len(ids) - (len(tokens) - first)  # approximately: without right padding and added tokens
    # Search with the rest of the prompt, which is unambiguous, or without it, in case the processor changes the end.
    for pattern in (tokens[first:], tokens[first : first + count]):
        if (start := _find_nearest(pattern, ids, expected)) is not None:
            return range(start, start + count)
    return None


def _shares_only_punctuation(prompt: Prompt, start: int, end: int) -> bool:
    """Whether the token at these offsets ends after the expression, and has none of its letters and digits."""
    return end > prompt.end and not any(char.isalnum() for char in prompt.text[start : prompt.end])


def _find_nearest(pattern: Sequence[int], ids: Sequence[int], expected: int) -> int | None:
    """Return the start of the occurrence of a pattern that is nearest to an index; None if there is none.

    >>> _find_nearest([5, 6], [5, 6, 7, 5, 6, 8, 5, 6], expected=4)
    3
    """
    n, pattern, ids = len(pattern), list(pattern), list(ids)
    starts = [start for start in range(len(ids) - n + 1) if ids[start : start + n] == pattern]
    return min(starts, key=lambda start: abs(start - expected), default=None)


def _by_decoding(tokenizer: Any, prompt: Prompt, ids: Sequence[int]) -> range | None:
    """Find the expression without offsets: decode ever longer ends of `ids` until it appears in the text."""

    def decoded(first: int, end: int) -> str:
        return _without_spaces(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False))

    T, expression = len(ids), _without_spaces(prompt.expression)
    rest = _without_spaces(prompt.text[prompt.start :])
    backwards = range(T - 1, max(-1, T - 1 - _MAX_DECODED), -1)
    first = next((first for first in backwards if rest in decoded(first, T)), T)
    end = next((end for end in range(first + 1, T + 1) if expression in decoded(first, end)), None)
    if end is None:
        return None
    words = _up_to_last_alphanumeric(expression)
    extends_beyond = not decoded(first, end).endswith(expression)
    if extends_beyond and end - first > 1 and words and words in decoded(first, end - 1):
        end -= 1  # the last token shares only punctuation with the expression
    return range(first, end)


def _up_to_last_alphanumeric(text: str) -> str:
    """Strip everything after the last letter or digit.

    >>> _up_to_last_alphanumeric('the "dog"')
    'the "dog'
    """
    while text and not text[-1].isalnum():
        text = text[:-1]
    return text


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def lone_space_id(tokenizer: Any) -> int | None:
    """Return the id of SentencePiece's lone space (29871 in LLaMA's vocabulary); None if the tokenizer has none."""
    token_id = tokenizer.get_vocab().get(_LONE_SPACE)
    return None if token_id is None else int(token_id)


def remove_token(inputs: Mapping[str, Any], token: int, *, side: str, pad: int) -> dict[str, Any]:
    """Remove a token from a processor's output and pad again: `[B, T, ...]` to `[B, T - n, ...]`.

    Args:
        token: the id to remove.
        side: `left` or `right`, where shorter prompts are padded.
        pad: the id to pad with.

    >>> inputs = {"input_ids": torch.tensor([[1, 7, 2, 3], [1, 4, 7, 7]])}
    >>> remove_token(inputs, 7, side="left", pad=0)["input_ids"].tolist()
    [[1, 2, 3], [0, 1, 4]]
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    kept = ids != token
    if mask is not None:
        kept = kept & mask.bool()
    length = int(kept.sum(1).max())
    # Removed tokens become padding: a stable sort moves them to that side and keeps the order of the rest.
    order = torch.argsort(kept.int(), dim=1, stable=True, descending=side == "right")
    order = order[:, -length:] if side == "left" else order[:, :length]
    kept = kept.gather(1, order)
    shortened = dict(inputs)
    for name in (name for name in TOKEN_INPUTS if name in inputs):
        rows: Tensor = inputs[name]
        trailing = (1,) * (rows.dim() - 2)
        index = order.reshape(*order.shape, *trailing).expand(-1, -1, *rows.shape[2:])
        padding = ~kept.reshape(*kept.shape, *trailing)
        shortened[name] = rows.gather(1, index).masked_fill(padding, pad if name == "input_ids" else 0)
    return shortened
