"""Heads switched off: what they write is left out of the model while a `with` block runs.

A head writes its slice of the input of its layer's output projection. That slice is set to zero, or to its mean over
the prompt's tokens, by a hook in front of the projection: nothing else of the model is touched. What follows from it
is what the head does: the answers, boxes and maps that change were made with its help.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from localization_heads.data.sources import PromptImages
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.lvlm.forward.changes import resolve_heads
from localization_heads.lvlm.loaded import LoadedModel

How = Literal["zero", "mean"]
PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "proj")
"""What the families call the output projection of an attention module."""
_WHOLE_PROMPT = "heads are switched off to their mean over the whole prompt"


class SwitchedOff:
    """The change that `switch_off` makes.

    Args:
        columns: by layer, the columns of its projection's input that the heads write, `[heads, head_dim]`.
    """

    def __init__(self, columns: Mapping[int, Tensor], how: How) -> None:
        self.columns = columns
        self.why_not_shared = _WHOLE_PROMPT if how == "mean" else None
        self._how = how
        self._seen: Tensor | None = None  # (B, T), the tokens that are no padding
        self._means: dict[int, Tensor] = {}  # layer -> (B, 1, columns)

    def on_inputs(self, lvlm: Any, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """Nothing depends on the image."""

    def begin(self, _: nn.Module, __: Any, named: Mapping[str, Any]) -> None:
        """Before a forward pass: which of its tokens are padding."""
        mask = named.get("attention_mask")
        self._seen = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def hook(self, layer: int) -> Any:
        """The hook in front of that layer's projection."""

        def without_heads(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            values: Tensor = inputs[0].clone()
            columns = self.columns[layer].flatten().to(values.device)
            values[..., columns] = 0.0 if self._how == "zero" else self._mean(layer, values[..., columns])
            return (values, *inputs[1:])

        return without_heads

    def _mean(self, layer: int, values: Tensor) -> Tensor:
        """(B, 1, n) of values (B, T, n). A token of the answer, which comes alone, gets the mean over the prompt."""
        batch, length = values.shape[:2]
        known = self._means.get(layer)
        if length == 1 and known is not None and len(known) == batch:
            return known
        seen = self._seen
        if seen is None or seen.shape != (batch, length):
            seen = torch.ones(batch, length, dtype=torch.bool, device=values.device)
        weights = seen.to(values.device, torch.float32)[..., None]
        total = (values.float() * weights).sum(1, keepdim=True)
        self._means[layer] = (total / weights.sum(1, keepdim=True)).to(values.dtype)
        return self._means[layer]


@contextmanager
def switch_off(
    lvlm: LoadedModel, heads: Iterable[Head | tuple[int, int]], how: How = "zero"
) -> Iterator[None]:
    """Switch heads of the language model off while the block runs, for everything that the model is asked.

    >>> with lh.switch_off(lvlm, ranking.top(3)):          # doctest: +SKIP
    ...     lh.ground(lvlm, image, "the dog")

    The model itself is changed, so for other threads that use it, too. Blocks may be nested: their heads add up.
    Images that were encoded before are encoded anew inside, and anew after it.

    Args:
        heads: layer and head, counted from 0. None at all changes nothing, to the last bit.
        how: what the heads write instead: `zero`, or `mean`, the mean of what each writes over all tokens of the
            prompt, padding left out; the answer's tokens get that of the prompt. With `mean`, every prompt is read
            as a whole.

    Raises:
        UsageError: the model does not have a head, or it is not known which part of its output projection is whose.
    """
    if how not in get_args(How):
        raise UsageError(f"switch_off: how={how!r}: choose zero or mean")
    chosen = resolve_heads(heads, lvlm, "switch_off")
    if not chosen:
        yield
        return
    if how == "mean" and lvlm.model.config.is_encoder_decoder:
        raise UsageError(
            f'switch_off: how="mean": the prompt of the decoder of {lvlm.name} is a single token; write how="zero"'
        )
    layers = sorted({head.layer for head in chosen})
    projections = {layer: output_projection(lvlm, layer) for layer in layers}
    columns = {
        layer: head_columns(lvlm, layer, [head.head for head in chosen if head.layer == layer])
        for layer in layers
    }
    change = SwitchedOff(columns, how)
    with ExitStack() as stack:
        for layer, projection in projections.items():
            stack.callback(projection.register_forward_pre_hook(change.hook(layer)).remove)
        if how == "mean":
            begin = lvlm.model.base_model.register_forward_pre_hook(change.begin, with_kwargs=True)
            stack.callback(begin.remove)
        lvlm.changes.append(change)
        stack.callback(lvlm.changes.remove, change)
        yield


def output_projection(lvlm: LoadedModel, layer: int) -> nn.Module:
    """The module that makes what a layer's attention writes from what its heads have read.

    Raises:
        UsageError: there is none of a known name, or several.
    """
    module = lvlm.attention_modules[layer]
    parts = (getattr(module, name, None) for name in PROJECTIONS)
    found = [part for part in parts if isinstance(part, nn.Module)]
    if len(found) != 1:
        raise UsageError(
            f"{lvlm.name}: layer {layer}: {type(module).__name__} has {len(found) or 'no'} output projections of a "
            f"known name ({', '.join(PROJECTIONS)}): which part of it is a head's is not known"
        )
    return found[0]


def head_columns(lvlm: LoadedModel, layer: int, heads: Sequence[int]) -> Tensor:
    """`[heads, head_dim]` columns of the projection's input that these heads write; heads lie one after the other.

    Raises:
        UsageError: its width is not that of the heads.
    """
    module, projection = lvlm.attention_modules[layer], output_projection(lvlm, layer)
    width = getattr(projection, "in_features", None)
    each = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
    if not isinstance(width, int) or width % lvlm.num_heads or (each and each * lvlm.num_heads != width):
        known = f"{lvlm.num_heads} heads" + (f" of {each}" if each else "")
        raise UsageError(
            f"{lvlm.name}: layer {layer}: the output projection takes {width or 'an unknown number of'} values, and "
            f"there are {known}: it is fused in an unknown way, and no head can be told apart in it"
        )
    size = width // lvlm.num_heads
    return torch.tensor(list(heads))[:, None] * size + torch.arange(size)
