"""Identifies a model by its content, so that results are never reused for other weights.

The fingerprint is computed from the loaded model, not from its files: the same weights give the same fingerprint
whether they come from the hub or a folder, in one file or many shards, and an update on the hub changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

READ_WHOLE_BELOW = 256 << 20
"""Models up to this size in bytes are hashed completely (0.2 s)."""
NUM_RUNS, RUN_LENGTH = 64, 64
"""Of each tensor of a larger model, this many evenly spaced runs of consecutive values are hashed.

Training, merging and quantizing change nearly every value of the tensors that they touch, so 4,096 values per tensor
are enough, and take well under a second instead of the ten that a whole 7B model takes. A single value edited by hand
may go unnoticed.
"""
_IGNORED_SETTINGS = {"name_or_path", "transformers_version"}


def fingerprint(model: Any, processor: Any) -> str:
    """Sixteen hexadecimal digits of a hash of everything in a checkpoint that determines the maps.

    These are the weights, the configurations of model and processor, and the chat template.
    """
    settings = {
        "config": model.config.to_dict(),
        "processor": processor.to_dict(),
        "chat_template": getattr(processor, "chat_template", None),
    }
    digest = sha256(json.dumps(_json_values(settings), sort_keys=True).encode())
    size = sum(parameter.nbytes for parameter in model.parameters())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor, whole=size <= READ_WHOLE_BELOW))
    return digest.hexdigest()[:16]


def _json_values(value: Any) -> Any:
    """A configuration as JSON values, without where it is stored and what wrote it."""
    if isinstance(value, Mapping):
        values = {str(key): _json_values(item) for key, item in value.items()}
        return {key: item for key, item in values.items() if not key.startswith("_") and key not in _IGNORED_SETTINGS}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and persistent buffers (which hold quantized weights), with their names."""
    for path, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        own = [name for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None]
        with _loaded(module, own):
            for name in own:
                yield f"{path}.{name}", getattr(module, name).data


def _loaded(module: nn.Module, names: list[str]) -> Any:
    """A context in which weights that a `device_map` offloads to main memory or disk are on the CPU."""
    if not any(getattr(module, name).is_meta for name in names):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, "cpu")


def _bytes(tensor: Tensor, *, whole: bool) -> bytes:
    flat = tensor.reshape(-1)
    if not whole and flat.numel() > NUM_RUNS * RUN_LENGTH:
        starts = torch.linspace(0, flat.numel() - RUN_LENGTH, NUM_RUNS, dtype=torch.float64).long()
        flat = flat[(starts[:, None] + torch.arange(RUN_LENGTH)).reshape(-1).to(flat.device)]
    return bytes(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
