"""Out-of-memory errors: every device words them differently; here they become one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from localization_heads.errors import OutOfMemoryError

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's allocators for the CPU and for Apple's GPUs word it, in plain RuntimeErrors."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises OutOfMemoryError, which names the remedies, where an allocation fails."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        raise OutOfMemoryError(
            "out of memory: lower batch_size, write batch_size=auto, or load the model in fewer bits"
        ) from error


def free_memory() -> None:
    """Give unused blocks back to the device, so that a smaller batch finds them in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_memory_error(error: Exception) -> bool:
    """Whether an allocation failed."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(sign in str(error).lower() for sign in _SIGNS)
