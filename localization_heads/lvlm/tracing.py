"""The attention of every step of an answer: captured while the model writes, and reduced at once to what is kept.

The rows are computed as everywhere (`capture.query_row`): those of the last token that each step reads. Of a step,
only the chosen heads' attention over the image tokens is kept, or its mean, so that memory does not grow with the
model's layers and heads but with the answer alone. Layers without a chosen head are not captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import Box, rescale_box
from localization_heads.errors import NotFiniteError, UsageError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import Trace, silent_tokens, spelled
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
from localization_heads.options.surroundings import MOST_TOKENS, TraceOptions

if TYPE_CHECKING:
    from localization_heads.lvlm.loaded import LoadedModel

MOST_BYTES = 4 << 30
"""Of the maps of all heads (`keep=all`)."""


class OnImage(NamedTuple):
    """Where the image is among the keys, and which of its views are read."""

    views: Sequence[View]
    size: tuple[int, int]
    choice: ViewChoice

    def maps(self, row: Tensor) -> tuple[NDArray[np.float32], Box]:
        """Maps `[..., h, w]` of a row `[..., key]`, and the region that they cover."""
        return read_maps(row.float().cpu().numpy(), self.views, self.size, self.choice)


class StepRecorder(Recorder):
    """Keeps, of every call of each wanted layer, the chosen heads' attention over the image.

    Args:
        modules: the attention modules of the layers that are kept.
        wanted: by layer, the heads that are kept.
        image: of the only sample.
        last: the call after which nothing is needed any more.
        num_tokens: of the prompt; None where its keys are not the prompt's tokens (cross-attention).
    """

    def __init__(
        self,
        modules: dict[int, nn.Module],
        wanted: dict[int, list[int]],
        image: OnImage,
        last: int,
        num_tokens: int | None,
    ) -> None:
        super().__init__(modules, max(modules), LAST_TOKEN, num_tokens)
        self.heads, self.image, self.last = wanted, image, last
        self.box: Box | None = None
        self.steps: list[dict[int, NDArray[np.float32]]] = []  # call -> layer -> [head, h, w]

    def record(self, layer: int, call: int, row_of: Callable[[Query], Tensor]) -> None:
        row = row_of(LAST_TOKEN)  # (1, H, K)
        if self.num_tokens is not None:
            row = crop_to_prompt(row, self.num_tokens, call)
        if call == len(self.steps):
            self.steps.append({})
        self.steps[call][layer], self.box = self.image.maps(row[0, self.heads[layer]])
        if layer == self.stop_after and call == self.last:
            raise StopForward


@memory_errors()
def traced(
    lvlm: LoadedModel,
    image: Image.Image,
    query: str,
    heads: Sequence[Head],
    *,
    max_new_tokens: int,
    options: TraceOptions,
    grounding: GroundingOptions,
) -> Trace:
    """Have the model answer a query greedily, and keep where heads look in every step.

    Args:
        image: RGB image of any size.
        heads: at least one of the model's.
        max_new_tokens: length of the longest answer, in tokens.

    Raises:
        UsageError: more tokens or maps than can be kept; `combine=consensus` without the single heads' maps; a query
            that cannot be used.
        WorkError: the attention of a step was not seen.
        NotFiniteError: NaN or infinite attention.
    """
    _check(max_new_tokens, options, grounding)
    seen, prompt = lvlm.image_for_processor(image), lvlm.prompt(query)
    inputs = lvlm.model_inputs([seen], [prompt])
    on_image = OnImage(lvlm.views_in(inputs, 0, seen), seen.size, lvlm.view)
    wanted = _by_layer(lvlm, heads, options.keep == "all")
    _check_bytes(on_image, inputs, sum(map(len, wanted.values())), max_new_tokens)
    modules = {layer: lvlm.attention_modules[layer] for layer in wanted}
    across = lvlm.uses_cross_attention
    recorder = StepRecorder(
        modules, wanted, on_image, max_new_tokens, None if across else inputs["input_ids"].shape[1]
    )
    hearing = lvlm.hearing()
    with mismatch_errors(lvlm.name), torch.inference_mode(), recording(recorder):
        lvlm.run(inputs, Query(answers=max_new_tokens), hearing)
    (ids,) = hearing.tokens(max_new_tokens)
    steps = recorder.steps[: len(ids) + 1]
    if len(steps) <= len(ids) or any(len(step) < len(wanted) for step in steps):
        raise WorkError(
            f"{lvlm.name}: the attention of its decoding steps was not seen; use query_token=last"
        )
    kept = np.stack([_chosen(step, wanted, heads) for step in steps])
    if not np.isfinite(kept).all():
        raise NotFiniteError
    assert recorder.box is not None
    tokenizer = lvlm.processor.tokenizer
    return Trace(
        query=query,
        spelled=spelled(tokenizer.decode, ids, silent_tokens(tokenizer)),
        token_ids=tuple(ids),
        heads=tuple(heads),
        rows=kept.mean(axis=1, keepdims=True) if options.keep == "mean" else kept,
        masses=kept.sum(axis=(2, 3)),
        image_box=rescale_box(recorder.box, seen.size, image.size),
        image_size=image.size,
        step=options.step,
        options=grounding,
        prompt=prompt,
        model=lvlm.name,
        every=_every(lvlm, steps) if options.keep == "all" else None,
    )


def _check(max_new_tokens: int, options: TraceOptions, grounding: GroundingOptions) -> None:
    if not 1 <= max_new_tokens <= MOST_TOKENS:
        raise UsageError(f"max_new_tokens={max_new_tokens}: give a trace 1 to {MOST_TOKENS} tokens")
    if options.keep == "mean" and grounding.combine == "consensus":
        raise UsageError(
            "trace.keep=mean: grounding.combine=consensus needs the maps of single heads; write trace.keep=heads"
        )


def _check_bytes(image: OnImage, inputs: Any, num_heads: int, max_new_tokens: int) -> None:
    """Before the model runs."""
    cells = read_maps(np.zeros(max(int(view.index.max()) for view in image.views) + 1, np.float32), *image)[
        0
    ].size
    needed = 4 * cells * num_heads * (max_new_tokens + 1)
    if needed > MOST_BYTES:
        raise UsageError(
            f"trace.keep=all: the maps of {num_heads} heads for {max_new_tokens} tokens take {needed >> 20} MB, more "
            f"than {MOST_BYTES >> 20}; lower max_new_tokens, or write trace.keep=heads"
        )


def _by_layer(lvlm: LoadedModel, heads: Sequence[Head], every: bool) -> dict[int, list[int]]:
    """The heads that are kept, by layer, from the first layer on."""
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
    if every:
        chosen = {layer: set(range(lvlm.num_heads)) for layer in lvlm.attention_modules}
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def _chosen(
    step: dict[int, NDArray[np.float32]], wanted: dict[int, list[int]], heads: Sequence[Head]
) -> NDArray[np.float32]:
    """`[k, h, w]` of a step, in the order of the heads."""
    return np.stack([step[layer][wanted[layer].index(number)] for layer, number in heads])


def _every(lvlm: LoadedModel, steps: Sequence[dict[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """`[N + 1, layer, head, h, w]`; layers that do not see the image stay zero."""
    shape = next(iter(steps[0].values())).shape
    full = np.zeros((len(steps), lvlm.num_layers, *shape), np.float32)
    for place, step in zip(full, steps, strict=True):
        for layer in list(step):
            place[layer] = step.pop(layer)  # never twice in memory
    return full
