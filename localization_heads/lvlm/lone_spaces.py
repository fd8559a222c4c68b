"""The published code's tokens: SentencePiece's lone space, a token of its own, deleted wherever it stands.

SentencePiece puts a space before a text, and so before what follows the image; where no longer token begins with it
(before a newline, digits, emoji) the space is a token by itself. LLaVA reads it, the paper's published code filters it
out of the finished prompt (docs/method.md has an example).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localization_heads.lvlm.prefix import SEQUENCES

_LONE_SPACE = "▁"


def lone_space_id(tokenizer: Any) -> int | None:
    """The id of the lone space (29871 in LLaMA's vocabulary); None for a tokenizer that has none."""
    found = tokenizer.get_vocab().get(_LONE_SPACE)
    return None if found is None else int(found)


def without_token(inputs: Mapping[str, Any], token: int, *, side: str, pad: int) -> dict[str, Any]:
    """A processor's output without a token: `[B, T, ...]`, padded anew on that side, to `[B, T - n, ...]`.

    Args:
        token: the id that goes.
        side: `left` or `right`, where shorter prompts are padded.
        pad: the id that fills them up.

    >>> inputs = {"input_ids": torch.tensor([[1, 7, 2, 3], [1, 4, 7, 7]])}
    >>> without_token(inputs, 7, side="left", pad=0)["input_ids"].tolist()
    [[1, 2, 3], [0, 1, 4]]
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    kept = ids != token
    if mask is not None:
        kept = kept & mask.bool()
    length = int(kept.sum(1).max())
    # What goes joins the padding: a stable sort moves it to that side, and keeps the order of the rest.
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
