"""`switch_off`: ablates heads of the language model while a `with` block runs.

A head's output is its slice of the input of the layer's output projection. A hook in front of the projection sets that
slice to zero, or to its mean over the prompt's tokens (mean ablation); the rest of the model is not touched.
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
from localization_heads.lvlm.attention_model import AttentionModel
from localization_heads.lvlm.forward.changes import validate_heads

How = Literal["zero", "mean"]
PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "proj")
"""What the families call the output projection of an attention module."""
_WHY_NOT_SHARED = "heads are switched off to their mean over the whole prompt"


@contextmanager
def switch_off(lvlm: AttentionModel, heads: Iterable[Head | tuple[int, int]], how: How = "zero") -> Iterator[None]:
    """Switch heads of the language model off while the block runs, for everything that the model is asked.

    >>> with lh.switch_off(lvlm, ranking.top(3)):          # doctest: +SKIP
    ...     lh.ground(lvlm, image, "the dog")

    The model itself is changed, also for other threads that use it. Blocks may be nested: their heads add up.
    Encoded images are encoded again inside the block, and again after it.

    Args:
        heads: layer and head, counted from 0. Without heads, results are bit-identical.
        how: what replaces a head's output: `zero`, or `mean`, its mean over all tokens of the prompt except padding,
            which the answer's tokens get too. With `mean`, no prompt shares an image's encoding.

    Raises:
        UsageError: the model does not have a head, or its output projection has an unknown layout.
    """
    if how not in get_args(How):
        raise UsageError(f"switch_off: how={how!r}: choose zero or mean")
    chosen = validate_heads(heads, lvlm, "switch_off")
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
        layer: head_columns(lvlm, layer, [head.head for head in chosen if head.layer == layer]) for layer in layers
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


class SwitchedOff:
    """The change of a model that `switch_off` makes.

    Args:
        columns: by layer, the columns of the output projection's input that the heads write, `[heads, head_dim]`.
    """

    def __init__(self, columns: Mapping[int, Tensor], how: How) -> None:
        self.columns = columns
        self.why_not_shared = _WHY_NOT_SHARED if how == "mean" else None
        self._how = how
        self._not_padding: Tensor | None = None  # bool (B, T)
        self._means: dict[int, Tensor] = {}  # layer -> (B, 1, columns)

    def on_inputs(self, lvlm: Any, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """The ablation does not depend on the image."""

    def begin(self, _: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        """Before a forward pass: remember which of its tokens are padding. A pre-forward hook."""
        mask = kwargs.get("attention_mask")
        self._not_padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def hook(self, layer: int) -> Any:
        """The hook in front of that layer's output projection."""

        def ablate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            values: Tensor = inputs[0].clone()
            columns = self.columns[layer].flatten().to(values.device)
            values[..., columns] = 0.0 if self._how == "zero" else self._mean(layer, values[..., columns])
            return (values, *inputs[1:])

        return ablate

    def _mean(self, layer: int, values: Tensor) -> Tensor:
        """(B, 1, n), the mean of values (B, T, n) over the prompt. Decoding steps reuse the mean of the prefill."""
        batch, length = values.shape[:2]
        cached = self._means.get(layer)
        if length == 1 and cached is not None and len(cached) == batch:
            return cached
        not_padding = self._not_padding
        if not_padding is None or not_padding.shape != (batch, length):
            not_padding = torch.ones(batch, length, dtype=torch.bool, device=values.device)
        weights = not_padding.to(values.device, torch.float32)[..., None]
        total = (values.float() * weights).sum(1, keepdim=True)
        self._means[layer] = (total / weights.sum(1, keepdim=True)).to(values.dtype)
        return self._means[layer]


def output_projection(lvlm: AttentionModel, layer: int) -> nn.Module:
    """The output projection of a layer's attention module.

    Raises:
        UsageError: the module has none of a known name, or several.
    """
    module = lvlm.attention_modules[layer]
    candidates = (getattr(module, name, None) for name in PROJECTIONS)
    projections = [candidate for candidate in candidates if isinstance(candidate, nn.Module)]
    if len(projections) != 1:
        raise UsageError(
            f"{lvlm.name}: layer {layer}: {type(module).__name__} has {len(projections) or 'no'} output projections of "
            f"a known name ({', '.join(PROJECTIONS)}), so a head's output cannot be located in it"
        )
    return projections[0]


def head_columns(lvlm: AttentionModel, layer: int, heads: Sequence[int]) -> Tensor:
    """The columns of the output projection's input that these heads write, `[heads, head_dim]`.

    Raises:
        UsageError: the projection is not as wide as all heads together.
    """
    module, projection = lvlm.attention_modules[layer], output_projection(lvlm, layer)
    width = getattr(projection, "in_features", None)
    head_dim = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
    if not isinstance(width, int) or width % lvlm.num_heads or (head_dim and head_dim * lvlm.num_heads != width):
        expected = f"{lvlm.num_heads} heads" + (f" of {head_dim}" if head_dim else "")
        raise UsageError(
            f"{lvlm.name}: layer {layer}: the output projection takes {width or 'an unknown number of'} values, but "
            f"there are {expected}, so a head's output cannot be located in it"
        )
    head_dim = width // lvlm.num_heads
    return torch.tensor(list(heads))[:, None] * head_dim + torch.arange(head_dim)
