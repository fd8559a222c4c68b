"""The attention of a few query positions over all keys, exactly as the model's own attention would compute it.

One row costs about a millisecond per layer. The full `T x T` matrix, which `output_attentions=True` materialises, costs
gigabytes and rules out the fast kernels. The arithmetic is fp32 for every dtype of the model.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from localization_heads.errors import WorkError

_MASKED = torch.finfo(torch.float32).min
COPIED = 256 << 20
"""Bytes of keys that a GPU holds in fp32 at a time."""


class Query(NamedTuple):
    """Which query positions of a batch are recorded, and when. The default is the last prompt token's.

    Args:
        positions: (B, n) indices into the padded prompt; None for the last one.
        weights: (B, n), the weight of each position's row; those of a sample sum to one. None where n is 1.
        step: which call of each layer is recorded: 0 the prefill, 1 the first decoding step.
        past: number of tokens read before, whose keys come first; positions count from there.
        answer_tokens: None generates nothing. Otherwise the model generates an answer, and the rows of up to this many
            of its tokens are averaged; 0 only generates the first token.
    """

    positions: Tensor | None = None
    weights: Tensor | None = None
    step: int = 0
    past: int = 0
    answer_tokens: int | None = None

    def on(self, device: torch.device) -> Query:
        """The same with positions and weights there, so that no layer waits for them."""
        places, weights = (one if one is None else one.to(device) for one in (self.positions, self.weights))
        return self._replace(positions=places, weights=weights)


def query_row(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, wanted: Query, **extras: Any
) -> Tensor:
    """The weighted mean of the wanted rows, fp32 (B, H, K). Arguments as for `attention_rows`."""
    rows = attention_rows(module, query, key, mask, positions=wanted.positions, past=wanted.past, **extras)
    if wanted.weights is None:
        return rows[:, :, 0]
    return torch.einsum("bhnk,bn->bhk", rows, wanted.weights.to(rows))


def attention_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    positions: Tensor | None = None,
    past: int = 0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Softmax rows of chosen query positions.

    The arguments are those that transformers hands to every attention function: `query` (B, H, Q, D), `key`
    (B, Hkv, K, D) and a mask that is 4-D boolean (sdpa), 4-D additive (eager), 2-D padding (flash) or absent.
    Logit soft-capping, attention sinks (`s_aux` of heads, `sinks` of queries) and position biases are honoured.

    Args:
        positions: which queries, (B, n) indices into Q, each sample its own; None for the last one.
        past: keys of earlier calls, which all queries see.

    Returns:
        fp32 (B, H, n, K); sums to one over K (to less where the model has sinks).
    """
    logits = _scores(_pick(query, positions), key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if position_bias is not None:
        logits = logits + _pick(position_bias, positions)[..., : logits.shape[-1]].float()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None and mask.dim() == 4:
        logits = _apply_mask(logits, _pick(mask, positions)[..., : logits.shape[-1]])
    else:
        own = _key_of_query(query.shape[2], logits.shape[-1], positions, past=past, causal=causal)
        visible = _visible_keys(logits, own, mask, window=sliding_window if causal else None)
        if visible is not None:
            logits = logits.masked_fill(~visible, _MASKED)
    sink = s_aux if sinks is None else _pick(sinks, positions)
    if sink is None:
        return torch.softmax(logits, -1)
    sink = (sink.reshape(1, -1, 1, 1) if sink.dim() == 1 else sink).float().expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


def _pick(rows: Tensor, positions: Tensor | None) -> Tensor:
    """The rows (B, H, Q, X) of the wanted queries: (B, H, n, X). B and H may be 1, for all alike."""
    if positions is None:
        return rows[:, :, -1:]
    B, n = positions.shape
    index = positions.to(rows.device)[:, None, :, None].expand(B, rows.shape[1], n, rows.shape[3])
    return rows.expand(B, -1, -1, -1).gather(2, index)


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled dot products with every key: (B, H, n, K). Grouped queries share their key."""
    B, H, n, D = query.shape
    groups = key.shape[1]
    shared = query.float().reshape(B, groups, H // groups * n, D)
    step = _heads_at_once(key)
    rows = [
        shared[:, g : g + step] @ key[:, g : g + step].float().transpose(-1, -2)
        for g in range(0, groups, step)
    ]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).view(B, H, n, -1) * scaling


def _heads_at_once(key: Tensor) -> int:
    """KV heads whose keys are copied to fp32 together: one on a CPU, whose cache it fits; on a GPU few calls count."""
    one_head = 4 * key[:, :1].numel()
    return 1 if key.device.type == "cpu" else max(1, COPIED // max(1, one_head))


def _apply_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """`mask`: (B, H, n, K) boolean (true: seen) or additive."""
    return logits.masked_fill(~mask, _MASKED) if mask.dtype == torch.bool else logits + mask.float()


def _key_of_query(
    num_queries: int, num_keys: int, positions: Tensor | None, *, past: int, causal: bool
) -> Tensor | int:
    """(B, n) or one for all: the last key that each query may see when the kernel gets no explicit mask."""
    if not causal or num_queries == 1:  # a decode step is aligned at the end of the keys
        return num_keys - 1
    # A prefill into a longer, still empty static cache is aligned at its start.
    return past + (num_queries - 1 if positions is None else positions)


def _visible_keys(
    logits: Tensor, last: Tensor | int, padding: Tensor | None, *, window: int | None
) -> Tensor | None:
    """(B or 1, 1, n or 1, K) boolean; None where all are. `padding`: the (B, K) mask that flash attention gets."""
    num_keys = logits.shape[-1]
    if isinstance(last, int):  # nothing is copied to the device, which would wait for it
        if last >= num_keys - 1 and padding is None and (window is None or window >= num_keys):
            return None
    else:
        last = last.to(logits.device)[..., None]  # (B, n, 1)
    position = torch.arange(num_keys, device=logits.device)[None, None]
    visible = position <= last
    if window is not None:
        visible = visible & (position > last - window)
    if padding is not None:
        visible = visible & padding[:, None, -num_keys:].bool()
    return visible[:, None]


AttentionFunction = Callable[..., Any]
LAST_TOKEN = Query()

MaskChange = Callable[[nn.Module, Tensor, Tensor, Any, Mapping[str, Any]], Any]
"""A new attention mask from a module, its `query`, `key` and mask, and the other arguments of its attention."""
_masks: dict[nn.Module, list[MaskChange]] = {}

_recorder: ContextVar[Recorder | None] = ContextVar("attention_recorder", default=None)
_lock = threading.Lock()
_open_captures = 0
_originals: dict[str, AttentionFunction] = {}


class StopForward(BaseException):
    """Raised inside the forward pass once the deepest wanted layer has been seen.

    A signal, not an error: no `except Exception` on the way may swallow it.
    """


class Recorder:
    """The captured rows by layer, filled in while the model runs.

    Args:
        modules: the attention module of each LM layer, by layer index.
        stop_after: the last layer that is needed: once its row is captured, the forward pass ends (early exit). None
            runs all.
        query: the query positions of each sample; by default the last one, at prefill. None records nothing: the
            forward pass only ends early.
        num_tokens: of the prompt, to which the rows of the answer's tokens are cut; None leaves their keys as they
            are (cross-attention).
    """

    def __init__(
        self,
        modules: dict[int, nn.Module],
        stop_after: int | None = None,
        query: Query | None = LAST_TOKEN,
        num_tokens: int | None = None,
    ) -> None:
        self.layer_of = {id(module): layer for layer, module in modules.items()}
        self.stop_after = stop_after
        self.query = query
        self.num_tokens = num_tokens
        self.rows: dict[int, Tensor] = {}  # layer -> (B, H, K) fp32
        self.unfinished: Tensor | None = None  # (B,) which samples still answer, kept by who generates
        self.counted: Tensor | None = None  # bool (B, n), which tokens of the answer count; None for all
        self._sums: dict[int, Tensor] = {}  # layer -> (B, H, T) fp32, over the answer's tokens
        self._counts: dict[int, Tensor] = {}  # layer -> (B,), how many those were
        self._calls: Counter[int] = Counter()

    @property
    def answer_means(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, the mean row of the answer's tokens (B, H, T), and how many there were (B,): 0 makes zeros."""
        pairs = {layer: (sums, self._counts[layer]) for layer, sums in self._sums.items()}
        return {layer: (sums / n.clamp(min=1)[:, None, None], n) for layer, (sums, n) in pairs.items()}

    def on_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]
    ) -> None:
        """One call of an attention module: counted, and recorded where it is that of a layer."""
        layer = self.layer_of.get(id(module))
        if layer is None:
            return
        call, self._calls[layer] = self._calls[layer], self._calls[layer] + 1
        self.record(layer, call, lambda where: query_row(module, query, key, mask, where, **extras))

    def record(self, layer: int, call: int, row_of: Callable[[Query], Tensor]) -> None:
        """Keep the row of one layer, in the calls that are wanted (all but the first are decoding steps).

        Args:
            call: how often the layer was called before.
            row_of: computes the row of a query position, (B, H, K).
        """
        if self.query is None:
            if layer == self.stop_after:
                raise StopForward
            return
        last = self.query.answer_tokens or self.query.step
        if self.stop_after is None or layer <= self.stop_after:
            if call == self.query.step:
                self.rows[layer] = row_of(self.query)
            elif self.query.answer_tokens and call <= last:
                self._add(layer, call, row_of(LAST_TOKEN))
        if layer == self.stop_after and call == last and self.query.answer_tokens != 0:
            raise StopForward

    def _add(self, layer: int, call: int, row: Tensor) -> None:
        """Of a token of the answer, where the sample has not ended it."""
        if self.num_tokens is not None:
            row = crop_to_prompt(row, self.num_tokens, call)
        live = torch.ones(len(row), dtype=torch.bool) if self.unfinished is None else self.unfinished
        if self.counted is not None:
            live = live & self.counted[:, call - 1].to(live.device)
        live = live.to(row.device)
        row = torch.where(live[:, None, None], row, 0.0)
        if layer in self._sums:
            self._sums[layer] += row
            self._counts[layer] += live
        else:
            self._sums[layer], self._counts[layer] = row, live.long()


def crop_to_prompt(row: Tensor, num_tokens: int, step: int) -> Tensor:
    """(B, H, T) of the prompt's tokens from a row (B, H, K) over the keys of the step-th call.

    A decoding step has the answer's keys as well, and where a layer's cache has a sliding window, only the last
    keys: the attention of those that fell out is zero.
    """
    if step == 0:
        return row
    return nn.functional.pad(row, (max(0, num_tokens + step - row.shape[-1]), 0))[..., :num_tokens]


@contextmanager
def capture(
    modules: dict[int, nn.Module],
    stop_after: int | None = None,
    query: Query | None = LAST_TOKEN,
    num_tokens: int | None = None,
) -> Iterator[Recorder]:
    """Record the attention of each sample's query positions in every given module during the `with` block.

    >>> with capture(lvlm.attention_modules) as recorder:          # doctest: +SKIP
    ...     lvlm.model(**inputs)
    >>> recorder.rows[14].shape                                    # doctest: +SKIP
    torch.Size([1, 32, 640])
    """
    with recording(recorder := Recorder(modules, stop_after, query, num_tokens)):
        yield recorder


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """The recorder sees every attention that is computed during the `with` block."""
    _install()
    token = _recorder.set(recorder)
    try:
        yield
    except StopForward:
        pass
    finally:
        _recorder.reset(token)
        _uninstall()


@contextmanager
def changed_masks(changes: Mapping[nn.Module, MaskChange]) -> Iterator[None]:
    """Give the attention of each module another mask during the `with` block; what is captured is with that mask."""
    _install()
    with ExitStack() as stack:
        stack.callback(_uninstall)
        for module, change in changes.items():
            _masks.setdefault(module, []).append(change)
            stack.callback(_forget, module, change)
        yield


def _forget(module: nn.Module, change: MaskChange) -> None:
    _masks[module].remove(change)
    if not _masks[module]:
        del _masks[module]


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """The attention module of every LM layer whose heads can attend to the image, by layer index.

    Hybrid models have layers without attention heads: they have no entry. Where the image is seen through
    cross-attention (Llama 3.2 Vision, Florence-2), only the layers that have it do, and it is their module.
    """
    layers = decoder_layers(model)
    modules = _cross_attention(layers) or _named(layers, "self_attn")
    if not modules:
        raise WorkError(f"{type(model).__name__}: no layer of its language model has attention heads")
    return modules


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of the language model; an encoder-decoder's are its decoder's."""
    decoder = model.get_decoder()
    for part in (decoder, getattr(decoder, "decoder", None), getattr(decoder, "model", None)):
        layers: Sequence[nn.Module] | None = getattr(part, "layers", None)
        if layers is not None:
            return layers
    raise WorkError(
        f"{type(model).__name__}: its language model has no `layers`; this architecture is not supported"
    )


def uses_cross_attention(model: Any) -> bool:
    """Whether the image is seen through cross-attention, whose keys are not the prompt's tokens."""
    return bool(_cross_attention(decoder_layers(model)))


def _cross_attention(layers: Sequence[nn.Module]) -> dict[int, nn.Module]:
    return _named(layers, "cross_attn") or _named(layers, "encoder_attn")  # Llama 3.2 Vision; BART


def _named(layers: Sequence[nn.Module], name: str) -> dict[int, nn.Module]:
    found = {index: getattr(layer, name, None) for index, layer in enumerate(layers)}
    return {index: module for index, module in found.items() if module is not None}


def _wrap(registered: AttentionFunction | None) -> AttentionFunction:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,  # some call it by this name
        *args: Any,
        **kw: Any,
    ) -> Any:
        original = registered or _eager_function(module)
        for change in _masks.get(module, ()):
            attention_mask = change(module, query, key, attention_mask, kw)
        recorder = _recorder.get()
        if recorder is not None:
            recorder.on_attention(module, query, key, attention_mask, kw)
        return original(module, query, key, value, attention_mask, *args, **kw)

    return attention


def _eager_function(module: nn.Module) -> AttentionFunction:
    """Eager attention is not in the registry: every modelling file has its own."""
    eager: AttentionFunction = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _install() -> None:
    global _open_captures
    with _lock:
        if _open_captures == 0:
            registry = AttentionInterface._global_mapping
            _originals.update(registry)
            registry.update({name: _wrap(function) for name, function in _originals.items()})
            registry["eager"] = _wrap(None)
        _open_captures += 1


def _uninstall() -> None:
    global _open_captures
    with _lock:
        _open_captures -= 1
        if _open_captures == 0:
            AttentionInterface._global_mapping.pop("eager", None)
            AttentionInterface._global_mapping.update(_originals)
            _originals.clear()
