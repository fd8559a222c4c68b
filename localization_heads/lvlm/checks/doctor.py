"""`examine`: checks how a model's attention is captured, on one image and one expression (`stage=doctor`)."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.ready import ready_list
from localization_heads.lvlm.families.geometry import View
from localization_heads.lvlm.families.table import FAMILIES
from localization_heads.lvlm.forward.capture import Query, crop_to_prompt, decoder_layers
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.query_tokens import expression_tokens

MAX_COMPARED_PARAMETERS = 1_000_000_000
"""Largest model whose captured rows are compared with eager attention by default."""
TOLERANCE = {torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 0.05  # rounding in 16 bits or less


class Piece(NamedTuple):
    """A part of the prompt. `kind` is text, image (a run of image tokens) or query (query tokens)."""

    text: str
    kind: str


@dataclass(frozen=True)
class Check:
    """Captured rows compared with eager attention. `difference` is None if they were not; `note` says why."""

    difference: float | None
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Examination:
    """What `stage=doctor` reports.

    Args:
        facts: names and values, in the order of printing.
        pieces: the prompt, with its image and query tokens marked.
        query: the query tokens, in words.
        views: empty if they could not be determined; `problem` says why.
        unplaced: number of image tokens that are in no view (newlines, pooled tokens); None for cross-attention.
        problem: why there are no views.
        check: captured rows compared with eager attention.
    """

    facts: list[tuple[str, str]]
    pieces: list[Piece]
    query: str
    views: list[View]
    unplaced: int | None
    problem: str | None
    check: Check

    @property
    def is_well(self) -> bool:
        return self.problem is None and self.check.passed


def examine(lvlm: LVLM, image: Image.Image, expression: str, check: bool | None = None) -> Examination:
    """Report a model's layers, prompt and geometry, and compare captured rows with eager attention.

    Args:
        check: whether to compare with eager attention; None does so for models of up to a billion parameters.

    Raises:
        UsageError: an unusable expression.
    """
    prompt = lvlm.located_prompt(expression)
    inputs = lvlm.model_inputs([image], [prompt.text])
    query = lvlm.query([prompt], inputs)
    ids = inputs["input_ids"][0].tolist()
    views, problem = _views(lvlm, inputs, image)
    return Examination(
        facts=[*_model_facts(lvlm), *_prompt_facts(lvlm, ids)],
        pieces=list(_pieces(lvlm, ids, query)),
        query=_describe_query(lvlm, query, len(ids)),
        views=views,
        unplaced=None if lvlm.uses_cross_attention or not views else _unplaced(lvlm, ids, views),
        problem=problem,
        check=_check_capture(lvlm, inputs, query, check),
    )


def _model_facts(lvlm: LVLM) -> Iterator[tuple[str, str]]:
    model, config = lvlm.model, lvlm.model.config
    family = "verified" if config.model_type in FAMILIES else "NOT verified: one grid over the whole image"
    decoder = type(decoder_layers(model)[0]).__name__
    text_config = config.get_text_config()
    seen = "all" if len(lvlm.attention_modules) == lvlm.num_layers else ranges(sorted(lvlm.attention_modules))
    across = ", through cross-attention" if lvlm.uses_cross_attention else ""
    yield "model", lvlm.name
    yield "family", f"{config.model_type} ({family})"
    yield "class", f"{type(model).__name__}; its decoder's layers are {decoder}"
    yield "weights", f"{lvlm.num_parameters:,} in {str(model.dtype).removeprefix('torch.')} on {lvlm.device}"
    yield (
        "layers",
        f"{lvlm.num_layers} (0 to {lvlm.num_layers - 1}); with heads that see the image: {seen}{across}",
    )
    yield (
        "heads",
        f"{lvlm.num_heads} a layer, on {getattr(text_config, 'num_key_value_heads', None) or lvlm.num_heads} keys",
    )
    yield "attention", str(text_config._attn_implementation or config._attn_implementation)
    yield "fingerprint", f"{lvlm.fingerprint} (of these weights, wherever they lie)"
    yield "known heads", " ".join(map(str, lvlm.known_heads)) or "none published"
    for name in lvlm.spec.lists:
        yield "ready list", str(ready_list(name))
    for note in lvlm.notes:
        yield "note", note


def _prompt_facts(lvlm: LVLM, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    positions = [position for position, id in enumerate(ids) if id == lvlm.image_token_id]
    image_token = lvlm.processor.tokenizer.convert_ids_to_tokens(lvlm.image_token_id)
    yield "image token", f"{image_token} (id {lvlm.image_token_id})"
    yield "in a prompt", lvlm.image_text or "nothing: the processor puts the image before the text"
    yield (
        "image tokens",
        f"{len(positions)} of {len(ids)} tokens, at {ranges(positions)}" if positions else "none",
    )
    yield "prompt", f"conv_mode={lvlm.conv_mode}{'' if lvlm.image_comes_first else ', IMAGE AFTER THE TEXT'}"


def _describe_query(lvlm: LVLM, query: Query, length: int) -> str:
    kind = f"query_token={lvlm.query_token}"
    if query.step:
        return f"{kind}: the first token of the answer, which follows the prompt"
    if query.answer_tokens:
        also = "" if lvlm.reads_only_answer else f"token {length - 1} of 0-{length - 1}, and "
        return f"{kind}: {also}up to {query.answer_tokens} tokens of the answer, which follows the prompt"
    if lvlm.model.config.is_encoder_decoder:
        return f"{kind}: the decoder's first token; the prompt is read by the encoder"
    return f"{kind}: token {ranges(_positions(query, length))} of 0-{length - 1}"


def _positions(query: Query, length: int) -> list[int]:
    """The query positions of the only sample."""
    return [length - 1] if query.positions is None else query.positions[0].tolist()


def _pieces(lvlm: LVLM, ids: Sequence[int], query: Query) -> Iterator[Piece]:
    """The tokenized prompt as text, with runs of image tokens counted and query tokens marked."""
    outside = query.step or lvlm.reads_only_answer or lvlm.model.config.is_encoder_decoder
    query_positions = set() if outside else set(_positions(query, len(ids)))
    tokenizer = lvlm.processor.tokenizer

    def kind(position: int) -> str:
        if position in query_positions:
            return "query"
        return "image" if ids[position] == lvlm.image_token_id else "text"

    for name, group in groupby(range(len(ids)), kind):
        run = [ids[position] for position in group]
        if name == "image":
            yield Piece(f"{tokenizer.convert_ids_to_tokens(run[0])} x {len(run)}", name)
        else:
            yield Piece(tokenizer.decode(run, clean_up_tokenization_spaces=False), name)
    if query.step:
        yield Piece("(first token of the answer)", "query")
    elif query.answer_tokens:
        yield Piece("(tokens of the answer)", "query")


def expression_pieces(lvlm: LVLM, image: Image.Image, expression: str) -> tuple[list[str], list[str], list[str]]:
    """The prompt's tokens as text, without image tokens: before the expression, its own, and after it.

    Raises:
        UsageError: an unusable expression, or one whose tokens cannot be found in the prompt.
    """
    prompt, tokenizer = lvlm.located_prompt(expression), lvlm.processor.tokenizer
    ids = lvlm.model_inputs([image], [prompt.text])["input_ids"][0].tolist()
    span = expression_tokens(tokenizer, prompt, ids, lvlm.dropped_token)

    def texts(ids: Sequence[int]) -> list[str]:
        tokens = (str(tokenizer.convert_ids_to_tokens(id)) for id in ids if id != lvlm.image_token_id)
        return [token for token in tokens if token]

    return texts(ids[: span[0]]), texts(ids[span[0] : span[-1] + 1]), texts(ids[span[-1] + 1 :])


def _views(lvlm: LVLM, inputs: dict[str, Any], image: Image.Image) -> tuple[list[View], str | None]:
    try:
        return lvlm.views_in(inputs, 0, image), None
    except UsageError as error:
        return [], str(error)


def _unplaced(lvlm: LVLM, ids: Sequence[int], views: Sequence[View]) -> int:
    placed = {int(key) for view in views for key in view.index.flat}
    return sum(id == lvlm.image_token_id for position, id in enumerate(ids) if position not in placed)


def _check_capture(lvlm: LVLM, inputs: dict[str, Any], query: Query, compare: bool | None) -> Check:
    if query.answer_tokens:  # the first of the answer's tokens represents them all
        query = Query(step=1)
    if compare is None:
        compare = lvlm.num_parameters <= MAX_COMPARED_PARAMETERS
    try:
        return compare_with_eager(lvlm, inputs, query) if compare else _capture_only(lvlm, inputs, query)
    except (WorkError, UsageError, RuntimeError, ValueError) as error:
        return Check(None, False, f"failed: {' '.join(str(error).split())[:300]}")


def _capture_only(lvlm: LVLM, inputs: dict[str, Any], query: Query) -> Check:
    """Whether every layer was captured: one that bypasses the attention interface of transformers stays zero."""
    rows = lvlm.capture_rows(inputs, query, None)[0]  # (layer, head, key)
    silent = [layer for layer in sorted(lvlm.attention_modules) if not rows[layer].any()]
    if silent:
        return Check(None, False, f"no attention was seen in layers {ranges(silent)}")
    return Check(None, True, "every layer was seen; not compared with eager attention (doctor.check=true does so)")


Inputs = dict[tuple[int, int], dict[str, Tensor]]
"""The tensor arguments of attention modules by name, for each (layer, call)."""


def compare_with_eager(lvlm: LVLM, inputs: dict[str, Any], query: Query) -> Check:
    """The largest difference in a batch between captured rows and those that eager attention returns.

    Each layer's eager attention gets the same inputs as the layer had when its row was captured. So rounding errors of
    earlier layers do not accumulate, and one tolerance holds at every depth.
    """
    recorded: Inputs = {}

    def record(layer: int, call: int, arguments: inspect.BoundArguments) -> None:
        recorded[layer, call] = dict(_hidden_states(arguments.arguments))

    with _attention_hooks(lvlm, record):
        captured = torch.stack(lvlm.capture_rows(inputs, query, None))  # (B, layer, H, K)
    expected = eager_rows(lvlm, inputs, query, recorded)
    length = captured.shape[-1]
    if not lvlm.uses_cross_attention:
        expected = {layer: crop_to_prompt(row, length, query.step) for layer, row in expected.items()}
    gaps = {layer: (captured[:, layer] - row).abs().max().item() for layer, row in expected.items()}
    limit = TOLERANCE.get(lvlm.model.dtype, LOW_PRECISION_TOLERANCE)
    wrong = [layer for layer, gap in sorted(gaps.items()) if not gap <= limit]  # also if it is NaN
    note = f"limit {limit:g} in {str(lvlm.model.dtype).removeprefix('torch.')}"
    if wrong:
        note += f"; exceeded in layers {ranges(wrong)}"
    return Check(max(gaps.values()), not wrong, note)


def eager_rows(lvlm: LVLM, inputs: dict[str, Any], query: Query, recorded: Inputs) -> dict[int, Tensor]:
    """The query rows (B, H, K) by layer of the weights that the attention modules return under eager attention.

    Args:
        recorded: hidden states that replace those of this pass.
    """
    rows: dict[int, Tensor] = {}

    def replace(layer: int, call: int, arguments: inspect.BoundArguments) -> None:
        arguments.arguments.update(recorded.get((layer, call), {}))

    def keep(layer: int, call: int, output: Any) -> None:
        if call == query.step:
            rows[layer] = _mean_row(output[1].float().cpu(), query)

    with torch.inference_mode(), eager_attention(lvlm.model), _attention_hooks(lvlm, replace, keep):
        lvlm.run(inputs, query)
    return rows


@contextmanager
def _attention_hooks(
    lvlm: LVLM,
    before: Callable[[int, int, inspect.BoundArguments], None],
    after: Callable[[int, int, Any], None] | None = None,
) -> Iterator[None]:
    """Call `before(layer, call, arguments)`, which may modify them, and `after(layer, call, output)` at each layer."""
    calls: Counter[int] = Counter()

    def enter(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        before(layer, calls[layer], bound)
        calls[layer] += 1
        return bound.args, bound.kwargs

    with ExitStack() as hooks:
        for layer, module in lvlm.attention_modules.items():
            handle = module.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: enter(layer, module, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(
                    lambda _m, _i, output, layer=layer: after(layer, calls[layer] - 1, output)
                )
                hooks.callback(handle.remove)
        yield


def _hidden_states(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The hidden states among a module's arguments, without the mask, whose form depends on the kernel."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
            yield name, value


def _mean_row(weights: Tensor, query: Query) -> Tensor:
    """(B, H, Q, K) -> (B, H, K): a straightforward reference implementation, sample by sample."""
    if query.positions is None:
        return weights[:, :, -1]
    shares = torch.ones(query.positions.shape) if query.weights is None else query.weights
    rows = [
        (weights[b][:, positions] * shares[b][:, None]).sum(1)  # (H, n, K) -> (H, K)
        for b, positions in enumerate(query.positions.tolist())
    ]
    return torch.stack(rows)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Run every part of the model with eager attention during the `with` block."""
    before = {
        id(module.config): (module.config, module.config._attn_implementation)
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, with consecutive ones as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(parts if len(parts) <= 8 else [*parts[:4], f"... ({len(parts)} runs)", *parts[-2:]])
