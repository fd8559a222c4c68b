"""Captures the attention of every decoding step of an answer, for `Trace`.

The row of a step is that of the last token it reads (`capture.query_row`). Only the chosen heads' attention to the
image tokens is kept, so memory grows with the answer but not with the model's layers and heads. Layers without a chosen
head are not captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import Box, rescale_box
from localization_heads.errors import NotFiniteError, UsageError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import Trace, align_tokens, control_token_ids
from localization_heads.lvlm.families.geometry import View, read_maps
from localization_heads.lvlm.forward.capture import (
    LAST_TOKEN,
    Query,
    Recorder,
    StopForward,
    crop_to_prompt,
    recording,
)
from localization_heads.lvlm.forward.failures import memory_errors, mismatch_errors
from localization_heads.options.groups import GroundingOptions, ViewChoice
from localization_heads.options.stage_groups import MAX_TRACE_TOKENS, TraceOptions

if TYPE_CHECKING:
    from localization_heads.lvlm.attention_model import AttentionModel

MAX_BYTES = 4 << 30
"""Limit on the memory of all heads' maps (`trace.keep=all`)."""


@memory_errors()
def trace_answer(
    lvlm: AttentionModel,
    image: Image.Image,
    query: str,
    heads: Sequence[Head],
    *,
    max_new_tokens: int,
    options: TraceOptions,
    grounding: GroundingOptions,
) -> Trace:
    """Let the model answer a query greedily, and keep where heads look in every step.

    Args:
        image: RGB image of any size.
        heads: at least one of the model's.
        max_new_tokens: length of the longest answer, in tokens.

    Raises:
        UsageError: too many tokens or maps; `combine=consensus` without the single heads' maps; an unusable query.
        WorkError: the attention of a step was not captured.
        NotFiniteError: NaN or infinite attention.
    """
    _check_options(max_new_tokens, options, grounding)
    seen, prompt = lvlm.image_for_processor(image), lvlm.prompt(query)
    inputs = lvlm.model_inputs([seen], [prompt])
    reader = ImageReader(lvlm.views_in(inputs, 0, seen), seen.size, lvlm.view)
    kept_heads = _heads_by_layer(lvlm, heads, every_head=options.keep == "all")
    _check_memory(reader, sum(map(len, kept_heads.values())), max_new_tokens)
    modules = {layer: lvlm.attention_modules[layer] for layer in kept_heads}
    num_tokens = None if lvlm.uses_cross_attention else inputs["input_ids"].shape[1]
    attention = StepRecorder(modules, kept_heads, reader, max_new_tokens, num_tokens)
    answer = lvlm.answer_recorder()
    with mismatch_errors(lvlm.name), torch.inference_mode(), recording(attention):
        lvlm.run(inputs, Query(answer_tokens=max_new_tokens), answer)
    (ids,) = answer.token_ids(max_new_tokens)
    steps = attention.steps[: len(ids) + 1]
    if len(steps) <= len(ids) or any(len(step) < len(kept_heads) for step in steps):
        raise WorkError(f"{lvlm.name}: the attention of its decoding steps was not seen; use query_token=last")
    rows = np.stack([_pick_heads(step, kept_heads, heads) for step in steps])
    if not np.isfinite(rows).all():
        raise NotFiniteError
    assert attention.box is not None
    tokenizer = lvlm.processor.tokenizer
    return Trace(
        query=query,
        spelled=align_tokens(tokenizer.decode, ids, control_token_ids(tokenizer)),
        token_ids=tuple(ids),
        heads=tuple(heads),
        rows=rows.mean(axis=1, keepdims=True) if options.keep == "mean" else rows,
        masses=rows.sum(axis=(2, 3)),
        image_box=rescale_box(attention.box, seen.size, image.size),
        image_size=image.size,
        step=options.step,
        options=grounding,
        prompt=prompt,
        model=lvlm.name,
        every=_stack_layers(lvlm, steps) if options.keep == "all" else None,
    )


def _check_options(max_new_tokens: int, options: TraceOptions, grounding: GroundingOptions) -> None:
    if not 1 <= max_new_tokens <= MAX_TRACE_TOKENS:
        raise UsageError(f"max_new_tokens={max_new_tokens}: give a trace 1 to {MAX_TRACE_TOKENS} tokens")
    if options.keep == "mean" and grounding.combine == "consensus":
        raise UsageError(
            "trace.keep=mean: grounding.combine=consensus needs the maps of single heads; write trace.keep=heads"
        )


def _heads_by_layer(lvlm: AttentionModel, heads: Sequence[Head], *, every_head: bool) -> dict[int, list[int]]:
    """The heads to keep, by layer, both in ascending order. UsageError for one that the model does not have."""
    if not heads:
        raise UsageError("heads=[] names no head to trace")
    chosen: dict[int, set[int]] = {}
    for layer, number in heads:
        if not (0 <= layer < lvlm.num_layers and 0 <= number < lvlm.num_heads):
            raise UsageError(
                f"heads: there is no {Head(layer, number)}; the layers are 0 to {lvlm.num_layers - 1} and the heads 0 "
                f"to {lvlm.num_heads - 1}"
            )
        if layer not in lvlm.attention_modules:
            raise UsageError(f"heads: layer {layer} of {lvlm.name} has no heads that see the image")
        chosen.setdefault(layer, set()).add(number)
    if every_head:
        chosen = {layer: set(range(lvlm.num_heads)) for layer in lvlm.attention_modules}
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def _check_memory(reader: ImageReader, num_heads: int, max_new_tokens: int) -> None:
    """Raises UsageError, before the model runs, if the maps would take more than `MAX_BYTES`."""
    num_keys = max(int(view.index.max()) for view in reader.views) + 1
    maps, _ = read_maps(np.zeros(num_keys, np.float32), *reader)
    needed = 4 * maps.size * num_heads * (max_new_tokens + 1)
    if needed > MAX_BYTES:
        raise UsageError(
            f"trace.keep=all: the maps of {num_heads} heads for {max_new_tokens} tokens take {needed >> 20} MB, more "
            f"than {MAX_BYTES >> 20}; lower max_new_tokens, or write trace.keep=heads"
        )


class ImageReader(NamedTuple):
    """Reads image maps from attention rows: the views' token grids, the image's size, and which views to combine."""

    views: Sequence[View]
    size: tuple[int, int]
    choice: ViewChoice

    def maps(self, row: Tensor) -> tuple[NDArray[np.float32], Box]:
        """Maps `[..., h, w]` from a row `[..., key]`, and the region of the image that they cover."""
        return read_maps(row.float().cpu().numpy(), self.views, self.size, self.choice)


class StepRecorder(Recorder):
    """Keeps the chosen heads' attention to the image at every call of their layers.

    Args:
        modules: attention modules by layer.
        heads: the heads to keep, by layer.
        reader: for the image of the only sample.
        last_call: the forward pass stops after this call of the last layer.
        num_tokens: length of the prompt; None for cross-attention, whose keys are not the prompt's tokens.
    """

    def __init__(
        self,
        modules: dict[int, nn.Module],
        heads: dict[int, list[int]],
        reader: ImageReader,
        last_call: int,
        num_tokens: int | None,
    ) -> None:
        super().__init__(modules, max(modules), LAST_TOKEN, num_tokens)
        self.heads, self.reader, self.last_call = heads, reader, last_call
        self.box: Box | None = None
        self.steps: list[dict[int, NDArray[np.float32]]] = []  # call -> layer -> [head, h, w]

    def record(self, layer: int, call: int, row_of: Callable[[Query], Tensor]) -> None:
        row = row_of(LAST_TOKEN)  # (1, H, K)
        if self.num_tokens is not None:
            row = crop_to_prompt(row, self.num_tokens, call)
        if call == len(self.steps):
            self.steps.append({})
        self.steps[call][layer], self.box = self.reader.maps(row[0, self.heads[layer]])
        if layer == self.stop_after and call == self.last_call:
            raise StopForward


def _pick_heads(
    step: dict[int, NDArray[np.float32]], kept_heads: dict[int, list[int]], heads: Sequence[Head]
) -> NDArray[np.float32]:
    """`[k, h, w]` of one step, in the order of `heads`."""
    return np.stack([step[layer][kept_heads[layer].index(number)] for layer, number in heads])


def _stack_layers(lvlm: AttentionModel, steps: Sequence[dict[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """`[N + 1, layer, head, h, w]`; layers that do not see the image stay zero. Empties the steps to save memory."""
    shape = next(iter(steps[0].values())).shape
    stacked = np.zeros((len(steps), lvlm.num_layers, *shape), np.float32)
    for target, step in zip(stacked, steps, strict=True):
        for layer in list(step):
            target[layer] = step.pop(layer)
    return stacked
