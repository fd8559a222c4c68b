"""Capture the query tokens' attention while the model runs its own fast attention.

transformers looks its attention functions up in one registry at every call. We wrap the registered functions in
place (counted, under a lock, undone with the last capture); a wrapper acts only if a recorder is active in the
current context *and* the calling module belongs to that recorder. So no configuration changes, nested captures
and other threads do not meet, and the vision tower is never touched.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from localization_heads.errors import WorkError
from localization_heads.lvlm.row import Query, query_row

AttentionFunction = Callable[..., Any]
LAST = Query()

_recorder: ContextVar[Recorder | None] = ContextVar("attention_recorder", default=None)
_lock = threading.Lock()
_open_captures = 0
_originals: dict[str, AttentionFunction] = {}


class StopForward(BaseException):
    """Raised inside the forward pass once the deepest wanted layer has been seen.

    A signal, not an error: no `except Exception` on the way may swallow it.
    """


class Recorder:
    """Rows by layer, filled in while the model runs.

    Args:
        modules: the attention module of each LM layer, by layer index.
        stop_after: the layer after whose row the forward pass is abandoned (early exit), or None.
        query: the query positions of each sample; by default the last one, at prefill. None records nothing: the
            forward pass only ends early.
    """

    def __init__(
        self, modules: dict[int, nn.Module], stop_after: int | None = None, query: Query | None = LAST
    ) -> None:
        self.layer_of = {id(module): layer for layer, module in modules.items()}
        self.stop_after = stop_after
        self.query = query
        self.rows: dict[int, Tensor] = {}  # layer -> (B, H, K) fp32
        self._calls: Counter[int] = Counter()

    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]
    ) -> None:
        """Record the row of one layer, in the one call that is wanted (the others are decoding steps)."""
        layer = self.layer_of.get(id(module))
        if layer is None:
            return
        call, self._calls[layer] = self._calls[layer], self._calls[layer] + 1
        if self.query is not None:
            if call != self.query.step:
                return
            self.rows[layer] = query_row(module, query, key, mask, self.query, **extras)
        if layer == self.stop_after:
            raise StopForward


@contextmanager
def capture(
    modules: dict[int, nn.Module], stop_after: int | None = None, query: Query | None = LAST
) -> Iterator[Recorder]:
    """Record the attention of each sample's query positions in every given module during the `with` block.

    >>> with capture(lvlm.attention_modules) as recorder:          # doctest: +SKIP
    ...     lvlm.model(**inputs)
    >>> recorder.rows[14].shape                                    # doctest: +SKIP
    torch.Size([1, 32, 640])
    """
    recorder = Recorder(modules, stop_after, query)
    _install()
    token = _recorder.set(recorder)
    try:
        yield recorder
    except StopForward:
        pass
    finally:
        _recorder.reset(token)
        _uninstall()


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """The attention module of every LM layer whose heads can look at the image, by layer index.

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


def looks_across(model: Any) -> bool:
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
        recorder = _recorder.get()
        if recorder is not None:
            recorder.see(module, query, key, attention_mask, kw)
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
