"""Which tokens are query tokens: the values of `query_token`, and where an expression lies among the tokens.

The paper takes the last token of the prompt, the full stop of the expression. A chat template ends with tokens that
are the same for every expression; there, a token of the expression or of the answer may attend to the object better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from localization_heads.errors import UsageError
from localization_heads.lvlm.forward.capture import Query
from localization_heads.lvlm.forward.prefix import SEQUENCES
from localization_heads.lvlm.text.prompts import Prompt
from localization_heads.options.groups import QueryToken

_LONGEST = 1024  # tokens at the end of a prompt among which an expression is looked for by decoding


def find_query(
    kind: QueryToken,
    prompts: Sequence[Prompt],
    inputs: Mapping[str, Any],
    tokenizer: Any,
    dropped_token: int | None = None,
) -> Query:
    """The query positions of a batch.

    Args:
        kind: `last` (the paper's: the last prompt token), `expression_end` (the last token of the expression,
            without its full stop), `expression_mean` (all its tokens, averaged) or `answer_first` (the first
            token that the model answers). Those that read the whole answer are `last`, with `Query.answers`.
        inputs: what the processor made of the prompts, padded on either side.
        dropped_token: an id that was deleted from them.

    Raises:
        UsageError: the expression's tokens cannot be found among the others.
    """
    if kind == "last":
        return _last(inputs.get("attention_mask"))
    if kind == "answer_first":
        return Query(step=1)
    ids = inputs["input_ids"].tolist()
    spans = [
        expression_tokens(tokenizer, prompt, row, dropped_token)
        for prompt, row in zip(prompts, ids, strict=True)
    ]
    if kind == "expression_end":
        return Query(torch.tensor([[span[-1]] for span in spans]))
    return _mean(spans)


def _last(attention_mask: Tensor | None) -> Query:
    """The end of the batch; where it was padded on the right, each sample's own last token."""
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return Query()
    T = attention_mask.shape[1]
    last = T - 1 - attention_mask.flip(1).long().argmax(1)  # (B,)
    return Query(last[:, None])


def _mean(spans: Sequence[range]) -> Query:
    """All positions of each span with equal weight; shorter spans repeat their last with weight 0."""
    n = max(len(span) for span in spans)
    positions = torch.tensor([[*span, *[span[-1]] * (n - len(span))] for span in spans])
    lengths = torch.tensor([[float(len(span))] for span in spans])
    return Query(positions, (torch.arange(n) < lengths) / lengths)


def batch_queries(queries: Sequence[tuple[Query, int]], past: int) -> Query:
    """The queries of single prompts, each with its number of tokens, as a batch of what follows `past` shared tokens.

    >>> batch_queries([(Query(), 9), (Query(torch.tensor([[7]])), 10)], past=6)[:2]
    (tensor([[2],
            [1]]), None)
    """
    places = [[length - 1] if q.positions is None else q.positions[0].tolist() for q, length in queries]
    shares = [[1.0] if q.weights is None else q.weights[0].tolist() for q, _ in queries]
    n = max(len(row) for row in places)
    positions = torch.tensor([row + row[-1:] * (n - len(row)) for row in places])
    weights = torch.tensor([row + [0.0] * (n - len(row)) for row in shares])
    answers = queries[0][0].answers
    if answers is not None:  # of prompts of one length, by their last token
        return Query(past=past, answers=answers)
    return Query(positions - past, weights if n > 1 else None, past=past)


def expression_tokens(
    tokenizer: Any, prompt: Prompt, ids: Sequence[int], dropped_token: int | None = None
) -> range:
    """Indices into `ids` of the tokens that spell the expression, its closing full stop left out.

    The processor puts hundreds of image tokens into the text, so the prompt's own tokens are looked up in `ids`
    from the end. A token that reaches over the edge of the expression (the space before it) counts as part of it, but
    for a last one that holds nothing of it but marks: where a closing quote and the full stop are one token, the
    expression ends before it. So `expression_end` is never the stop that the paper's query token is.
    """
    span = _by_offsets(tokenizer, prompt, ids, dropped_token) or _by_decoding(tokenizer, prompt, ids)
    if span is None:
        raise UsageError(
            f"query_token: the tokens of '{prompt.expression}' cannot be told from the rest of this model's prompt; "
            "use query_token=last"
        )
    return span


def _by_offsets(
    tokenizer: Any, prompt: Prompt, ids: Sequence[int], dropped_token: int | None
) -> range | None:
    """Ask a fast tokenizer which tokens the expression's characters went into, and find those in `ids`."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    coded = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
    tokens = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
    kept = [(token, place) for token, place in tokens if token != dropped_token]
    inside = [
        index
        for index, (_, (start, end)) in enumerate(kept)
        if start < end and start < prompt.end and end > prompt.start
    ]
    if not inside:
        return None
    if len(inside) > 1 and _only_marks(prompt, *kept[inside[-1]][1]):
        inside.pop()
    first, count = inside[0], inside[-1] - inside[0] + 1
    own = [token for token, _ in kept]
    expected = len(ids) - (len(own) - first)  # but for padding on the right, and what the processor adds
    # to the prompt's end, which is not to be confused; or alone, where the processor changes the end
    for wanted in (own[first:], own[first : first + count]):
        if (at := _find(wanted, ids, near=expected)) is not None:
            return range(at, at + count)
    return None


def _only_marks(prompt: Prompt, start: int, end: int) -> bool:
    """Whether a token, by its place in the prompt, leaves the expression and has neither letters nor digits of it."""
    return end > prompt.end and not any(char.isalnum() for char in prompt.text[start : prompt.end])


def _find(wanted: Sequence[int], ids: Sequence[int], near: int) -> int | None:
    """Where the occurrence of `wanted` in `ids` begins that is nearest to an index.

    >>> _find([5, 6], [5, 6, 7, 5, 6, 8, 5, 6], near=4)
    3
    """
    n, wanted, ids = len(wanted), list(wanted), list(ids)
    found = [at for at in range(len(ids) - n + 1) if ids[at : at + n] == wanted]
    return min(found, key=lambda at: abs(at - near), default=None)


def _by_decoding(tokenizer: Any, prompt: Prompt, ids: Sequence[int]) -> range | None:
    """Decode more and more of the end of `ids` until the expression shows: for tokenizers without offsets."""

    def spelled(first: int, end: int) -> str:
        return _squeezed(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False))

    T, expression, rest = len(ids), _squeezed(prompt.expression), _squeezed(prompt.text[prompt.start :])
    backwards = range(T - 1, max(-1, T - 1 - _LONGEST), -1)
    first = next((first for first in backwards if rest in spelled(first, T)), T)
    end = next((end for end in range(first + 1, T + 1) if expression in spelled(first, end)), None)
    if end is None:
        return None
    over = not spelled(first, end).endswith(expression)
    held = spelled(first, end - 1)  # all of the expression but marks, which melt with what follows
    if over and end - first > 1 and len(words := _without_marks(expression)) > 0 and words in held:
        end -= 1
    return range(first, end)


def _without_marks(text: str) -> str:
    """A text up to its last letter or digit.

    >>> _without_marks('the "dog"')
    'the "dog'
    """
    while text and not text[-1].isalnum():
        text = text[:-1]
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())


_LONE_SPACE = "▁"


def lone_space_id(tokenizer: Any) -> int | None:
    """The id of the lone space (29871 in LLaMA's vocabulary); None for a tokenizer that has none."""
    found = tokenizer.get_vocab().get(_LONE_SPACE)
    return None if found is None else int(found)


def remove_token(inputs: Mapping[str, Any], token: int, *, side: str, pad: int) -> dict[str, Any]:
    """A processor's output without a token: `[B, T, ...]`, padded anew on that side, to `[B, T - n, ...]`.

    Args:
        token: the id that is removed.
        side: `left` or `right`, where shorter prompts are padded.
        pad: the id that fills them up.

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
    # Removed tokens join the padding: a stable sort moves them to that side and keeps the order of the rest.
    order = torch.argsort(kept.int(), dim=1, stable=True, descending=side == "right")
    order = order[:, -length:] if side == "left" else order[:, :length]
    kept = kept.gather(1, order)
    found = dict(inputs)
    for name in (name for name in SEQUENCES if name in inputs):
        rows: Tensor = inputs[name]
        trailing = (1,) * (rows.dim() - 2)
        index = order.reshape(*order.shape, *trailing).expand(-1, -1, *rows.shape[2:])
        rest = ~kept.reshape(*kept.shape, *trailing)
        found[name] = rows.gather(1, index).masked_fill(rest, pad if name == "input_ids" else 0)
    return found
