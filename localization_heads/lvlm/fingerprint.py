"""A model is identified by its content, so that results of other weights are never taken for its results.

The fingerprint is computed from the loaded model, not from files: a hub checkpoint, a folder, one file or many shards
give the same fingerprint if the numbers are the same, and so does a copied or touched file; an update on the hub does
not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

WHOLE = 256 << 20
"""Bytes of weights up to which every one is read (0.2 s)."""
RUNS, RUN = 64, 64
"""Of each tensor of a larger model, `RUNS` runs of `RUN` values are read, evenly spread over it.

Training, merging and quantizing change nearly every value of the tensors that they touch, so 4,096 values of every
tensor show it, in well under a second where reading a 7B model takes ten. A single value that was changed by hand
somewhere in gigabytes goes unnoticed.
"""
_OF_ITS_PLACE = {"name_or_path", "transformers_version"}


def fingerprint(model: Any, processor: Any) -> str:
    """Sixteen hexadecimal digits that change with anything in the checkpoint that decides the maps.

    That is the weights, the configurations of model and processor, and the chat template.
    """
    settings = {
        "config": model.config.to_dict(),
        "processor": processor.to_dict(),
        "chat_template": getattr(processor, "chat_template", None),
    }
    digest = sha256(json.dumps(_plain(settings), sort_keys=True).encode())
    size = sum(parameter.nbytes for parameter in model.parameters())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor, whole=size <= WHOLE))
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """The JSON values in a configuration, without where it lies and what wrote it."""
    if isinstance(value, Mapping):
        kept = {str(key): _plain(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if not key.startswith("_") and key not in _OF_ITS_PLACE}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint holds: parameters, and the buffers that are saved (quantized weights are)."""
    for path, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        own = [name for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None]
        with _present(module, own):
            for name in own:
                yield f"{path}.{name}", getattr(module, name).data


def _present(module: nn.Module, names: list[str]) -> Any:
    """Weights that a `device_map` keeps in main memory or on disk are brought here while they are read."""
    if not any(getattr(module, name).is_meta for name in names):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, "cpu")


def _bytes(tensor: Tensor, *, whole: bool) -> bytes:
    flat = tensor.reshape(-1)
    if not whole and flat.numel() > RUNS * RUN:
        starts = torch.linspace(0, flat.numel() - RUN, RUNS, dtype=torch.float64).long()
        flat = flat[(starts[:, None] + torch.arange(RUN)).reshape(-1).to(flat.device)]
    return bytes(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
