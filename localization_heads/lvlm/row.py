"""The attention of one query position over all keys, exactly as the model's own attention would compute it.

One row costs a millisecond a layer; the full `T x T` map that `output_attentions=True` materialises costs the
fast kernels, and gigabytes. The arithmetic is fp32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MASKED = torch.finfo(torch.float32).min


def attention_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Softmax row of the **last** query position.

    The arguments are those that transformers hands to every attention function: `query` (B, H, Q, D), `key`
    (B, Hkv, K, D) and a mask that is 4-D boolean (sdpa), 4-D additive (eager), 2-D padding (flash) or absent.
    Logit soft-capping, attention sinks (`s_aux`) and position biases are honoured.

    Returns:
        fp32 (B, H, K); sums to one over K (to less where the model has sinks).
    """
    logits = _scores(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if position_bias is not None:
        logits = logits + position_bias[..., -1, : logits.shape[-1]].float()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    logits = _apply_mask(logits, mask, query.shape[2], causal=causal, window=sliding_window)
    if s_aux is None:
        return torch.softmax(logits, -1)
    sink = s_aux.float().reshape(1, -1, 1).expand(*logits.shape[:2], 1)
    return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled dot products of the last query with every key: (B, H, K). Grouped queries share their key."""
    B, H, _, D = query.shape
    groups = key.shape[1]
    last = query[:, :, -1].float().view(B, groups, H // groups, D)  # (B, Hkv, H/Hkv, D)
    # One KV head at a time: the fp32 copy of a long key cache stays small and in cache.
    rows = [last[:, g] @ key[:, g].float().transpose(-1, -2) for g in range(groups)]
    return torch.cat(rows, 1) * scaling  # (B, H, K)


def _apply_mask(
    logits: Tensor, mask: Tensor | None, num_queries: int, *, causal: bool, window: int | None
) -> Tensor:
    if mask is not None and mask.dim() == 4:
        row = mask[:, :, -1, : logits.shape[-1]]
        return logits.masked_fill(~row, _MASKED) if row.dtype == torch.bool else logits + row.float()
    visible = _visible_keys(logits.shape[-1], num_queries, causal=causal, window=window, device=logits.device)
    if mask is not None:  # flash attention hands over the (B, K) padding mask
        visible = visible & mask[:, None, -logits.shape[-1] :].bool()
    return logits.masked_fill(~visible, _MASKED)


def _visible_keys(
    num_keys: int, num_queries: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """(1, 1, K) boolean: the keys that the last query may see when the kernel gets no explicit mask."""
    position = torch.arange(num_keys, device=device)
    # A prefill into a longer, still empty static cache is aligned at its start; a decode step at its end.
    last = num_queries - 1 if causal and num_queries > 1 else num_keys - 1
    visible = position <= last
    if window is not None and causal:
        visible = visible & (position > last - window)
    return visible[None, None]
