"""Capture of the attention of a few query positions over all keys, equal to what the model itself computes.

transformers' attention functions are wrapped while a capture is open, and compute the wanted rows of the attention
matrix in addition, in fp32 for every dtype of the model. A row costs about a millisecond per layer. The full `T x T`
matrix, which `output_attentions=True` materialises, takes gigabytes and rules out the fast kernels.
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
MAX_FP32_KEY_BYTES = 256 << 20
"""Size of the keys that are converted to fp32 at a time on a GPU."""


class Query(NamedTuple):
    """Which query positions of a batch are captured, and when. The default is the last prompt token.

    Args:
        positions: (B, n) indices into the padded prompt; None for its last position.
        weights: (B, n) weights for the mean of the rows, which sum to one for each sample; None if n is 1.
        step: which call of each layer is captured: 0 is the prefill, 1 the first decoding step.
        past: number of cached tokens, whose keys come first; positions count from the first uncached token.
        answer_tokens: None generates nothing. Otherwise the model generates an answer, and the rows of up to this many
            of its tokens are averaged; 0 only generates the first token.
    """

    positions: Tensor | None = None
    weights: Tensor | None = None
    step: int = 0
    past: int = 0
    answer_tokens: int | None = None

    def on(self, device: torch.device) -> Query:
        """Move positions and weights to a device once, so that no layer has to wait for a copy."""
        positions, weights = (None if t is None else t.to(device) for t in (self.positions, self.weights))
        return self._replace(positions=positions, weights=weights)


def query_row(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, which: Query, **extras: Any
) -> Tensor:
    """Weighted mean of the captured rows, fp32 (B, H, K). Arguments as for `attention_rows`."""
    rows = attention_rows(module, query, key, mask, positions=which.positions, past=which.past, **extras)
    if which.weights is None:
        return rows[:, :, 0]
    return torch.einsum("bhnk,bn->bhk", rows, which.weights.to(rows))


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
    """Compute the softmax rows of chosen query positions.

    The arguments are those that transformers passes to every attention function: `query` (B, H, Q, D), `key`
    (B, Hkv, K, D) and a mask that is 4-D boolean (sdpa), 4-D additive (eager), 2-D padding (flash) or absent.
    Logit soft-capping, attention sinks (`s_aux` per head, `sinks` per query) and position biases are applied.

    Args:
        positions: (B, n) indices into Q, for each sample its own; None for the last query.
        past: number of cached keys, which all queries can see.

    Returns:
        fp32 (B, H, n, K); each row sums to one (to less if the model has attention sinks).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = _scaled_scores(_select(query, positions), key, scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if position_bias is not None:
        logits = logits + _select(position_bias, positions)[..., : logits.shape[-1]].float()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None and mask.dim() == 4:
        logits = _apply_mask(logits, _select(mask, positions)[..., : logits.shape[-1]])
    else:
        last = _last_visible_key(query.shape[2], logits.shape[-1], positions, past=past, causal=causal)
        visible = _visible_keys(logits, last, mask, window=sliding_window if causal else None)
        if visible is not None:
            logits = logits.masked_fill(~visible, _MASKED)
    sink = s_aux if sinks is None else _select(sinks, positions)
    if sink is None:
        return torch.softmax(logits, -1)
    sink = (sink.reshape(1, -1, 1, 1) if sink.dim() == 1 else sink).float().expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


def _select(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Select the rows of the query positions: (B, H, Q, X) to (B, H, n, X). B and H may be 1, to broadcast."""
    if positions is None:
        return rows[:, :, -1:]
    B, n = positions.shape
    index = positions.to(rows.device)[:, None, :, None].expand(B, rows.shape[1], n, rows.shape[3])
    return rows.expand(B, -1, -1, -1).gather(2, index)


def _scaled_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled dot products with every key: (B, H, n, K). Query heads of a group share a key head."""
    B, H, n, D = query.shape
    groups = key.shape[1]
    grouped = query.float().reshape(B, groups, H // groups * n, D)
    step = _kv_heads_at_once(key)
    rows = [grouped[:, g : g + step] @ key[:, g : g + step].float().transpose(-1, -2) for g in range(0, groups, step)]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).view(B, H, n, -1) * scaling


def _kv_heads_at_once(key: Tensor) -> int:
    """Number of key heads to convert to fp32 together.

    One on a CPU, so that the copy fits in its cache; on a GPU as many as memory allows, for few kernel launches.
    """
    bytes_per_head = 4 * key[:, :1].numel()
    return 1 if key.device.type == "cpu" else max(1, MAX_FP32_KEY_BYTES // max(1, bytes_per_head))


def _apply_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """`mask`: (B, H, n, K), boolean (True is visible) or additive."""
    return logits.masked_fill(~mask, _MASKED) if mask.dtype == torch.bool else logits + mask.float()


def _last_visible_key(
    num_queries: int, num_keys: int, positions: Tensor | None, *, past: int, causal: bool
) -> Tensor | int:
    """Last key that each query sees if the kernel gets no explicit mask: (B, n), or one for all."""
    if not causal or num_queries == 1:  # a decoding step is aligned with the end of the keys
        return num_keys - 1
    # A prefill into a longer static cache is aligned with its start.
    return past + (num_queries - 1 if positions is None else positions)


def _visible_keys(logits: Tensor, last: Tensor | int, padding: Tensor | None, *, window: int | None) -> Tensor | None:
    """Boolean (B or 1, 1, n or 1, K); None if all keys are visible. `padding`: flash attention's (B, K) mask."""
    num_keys = logits.shape[-1]
    if isinstance(last, int):  # stays on the host: a copy to the device would synchronise
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
"""Makes a new attention mask from a module, its `query`, `key` and mask, and its other keyword arguments."""
_mask_changes: dict[nn.Module, list[MaskChange]] = {}

_recorder: ContextVar[Recorder | None] = ContextVar("attention_recorder", default=None)
_lock = threading.Lock()
_open_captures = 0
_originals: dict[str, AttentionFunction] = {}


class StopForward(BaseException):
    """Ends the forward pass after the deepest layer that is needed.

    Not an error, hence a BaseException, which no `except Exception` on the way swallows.
    """


class Recorder:
    """Collects the captured rows of each layer while the model runs.

    Args:
        modules: the attention module of each LM layer, by layer index.
        stop_after: the last layer that is needed, after which the forward pass ends (early exit); None runs all.
        query: the query positions of each sample; by default the last one, at prefill. None captures nothing, and only
            ends the forward pass early.
        num_tokens: length of the prompt, to whose keys the rows of answer tokens are cropped; None keeps all keys
            (cross-attention).
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
        self.unfinished: Tensor | None = None  # bool (B,), answers without an end token so far; set by the generator
        self.token_mask: Tensor | None = None  # bool (B, n), answer tokens to average over; None for all
        self._sums: dict[int, Tensor] = {}  # layer -> (B, H, T) fp32, over the answer's tokens
        self._counts: dict[int, Tensor] = {}  # layer -> (B,), number of tokens in the sum
        self._calls: Counter[int] = Counter()

    @property
    def answer_means(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, the mean row over the answer's tokens (B, H, T), zero if there are none, and their number (B,)."""
        return {
            layer: (sums / self._counts[layer].clamp(min=1)[:, None, None], self._counts[layer])
            for layer, sums in self._sums.items()
        }

    def on_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]
    ) -> None:
        """Handle one call of an attention module; modules other than those of the layers are ignored."""
        layer = self.layer_of.get(id(module))
        if layer is None:
            return
        call, self._calls[layer] = self._calls[layer], self._calls[layer] + 1
        self.record(layer, call, lambda where: query_row(module, query, key, mask, where, **extras))

    def record(self, layer: int, call: int, row_of: Callable[[Query], Tensor]) -> None:
        """Capture the row of one layer if this call is to be captured.

        Args:
            call: index of the layer's call: 0 is the prefill, the others are decoding steps.
            row_of: computes the row of a query, (B, H, K).
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
                self._accumulate(layer, call, row_of(LAST_TOKEN))
        if layer == self.stop_after and call == last and self.query.answer_tokens != 0:
            raise StopForward

    def _accumulate(self, layer: int, call: int, row: Tensor) -> None:
        """Add the row of an answer token, in the samples whose answer it belongs to."""
        if self.num_tokens is not None:
            row = crop_to_prompt(row, self.num_tokens, call)
        counted = torch.ones(len(row), dtype=torch.bool) if self.unfinished is None else self.unfinished
        if self.token_mask is not None:
            counted = counted & self.token_mask[:, call - 1].to(counted.device)
        counted = counted.to(row.device)
        row = torch.where(counted[:, None, None], row, 0.0)
        if layer in self._sums:
            self._sums[layer] += row
            self._counts[layer] += counted
        else:
            self._sums[layer], self._counts[layer] = row, counted.long()


def crop_to_prompt(row: Tensor, num_tokens: int, step: int) -> Tensor:
    """Crop a row (B, H, K) over the keys of decoding step `step` to the prompt's tokens: (B, H, T).

    A decoding step also has the keys of the answer so far. A layer with a sliding window has dropped the first keys,
    whose attention is zero.
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
    """Capture the attention of each sample's query positions in every given module during the `with` block.

    >>> with capture(lvlm.attention_modules) as recorder:          # doctest: +SKIP
    ...     lvlm.model(**inputs)
    >>> recorder.rows[14].shape                                    # doctest: +SKIP
    torch.Size([1, 32, 640])
    """
    with recording(recorder := Recorder(modules, stop_after, query, num_tokens)):
        yield recorder


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Pass every attention call during the `with` block to the recorder. Threads do not see each other's recorder."""
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
    """Change the attention mask of modules during the `with` block, for the model and for what is captured."""
    _install()
    with ExitStack() as stack:
        stack.callback(_uninstall)
        for module, change in changes.items():
            _mask_changes.setdefault(module, []).append(change)
            stack.callback(_remove_mask_change, module, change)
        yield


def _remove_mask_change(module: nn.Module, change: MaskChange) -> None:
    _mask_changes[module].remove(change)
    if not _mask_changes[module]:
        del _mask_changes[module]


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """Return the attention module of every LM layer whose heads can attend to the image, by layer index.

    Layers without attention heads, in hybrid models, are left out. In models that see the image through
    cross-attention (Llama 3.2 Vision, Florence-2), only the layers with cross-attention are included, with that module.
    """
    layers = decoder_layers(model)
    modules = _cross_attention(layers) or _submodules(layers, "self_attn")
    if not modules:
        raise WorkError(f"{type(model).__name__}: no layer of its language model has attention heads")
    return modules


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Return the layers of the language model or, of an encoder-decoder, of its decoder."""
    decoder = model.get_decoder()
    for part in (decoder, getattr(decoder, "decoder", None), getattr(decoder, "model", None)):
        layers: Sequence[nn.Module] | None = getattr(part, "layers", None)
        if layers is not None:
            return layers
    raise WorkError(f"{type(model).__name__}: its language model has no `layers`; this architecture is not supported")


def uses_cross_attention(model: Any) -> bool:
    """Whether the image is seen through cross-attention, whose keys are not the prompt's tokens."""
    return bool(_cross_attention(decoder_layers(model)))


def _cross_attention(layers: Sequence[nn.Module]) -> dict[int, nn.Module]:
    return _submodules(layers, "cross_attn") or _submodules(layers, "encoder_attn")  # Llama 3.2 Vision; BART


def _submodules(layers: Sequence[nn.Module], name: str) -> dict[int, nn.Module]:
    modules = {index: getattr(layer, name, None) for index, layer in enumerate(layers)}
    return {index: module for index, module in modules.items() if module is not None}


def _wrap(registered: AttentionFunction | None) -> AttentionFunction:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,  # named as in transformers: some pass it by keyword
        *args: Any,
        **kw: Any,
    ) -> Any:
        original = registered or _eager_function(module)
        for change in _mask_changes.get(module, ()):
            attention_mask = change(module, query, key, attention_mask, kw)
        recorder = _recorder.get()
        if recorder is not None:
            recorder.on_attention(module, query, key, attention_mask, kw)
        return original(module, query, key, value, attention_mask, *args, **kw)

    return attention


def _eager_function(module: nn.Module) -> AttentionFunction:
    """Return the eager attention of the module's own modelling file: it is not in transformers' registry."""
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
