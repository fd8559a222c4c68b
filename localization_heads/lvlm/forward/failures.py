"""Context managers that turn failures of a model or its processor into one-line errors.

Libraries and devices report the same failure with different exceptions and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from localization_heads.errors import OutOfMemoryError, UsageError, WorkError, first_line

_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")
"""In plain RuntimeErrors of torch's allocators for the CPU and for Apple's GPUs."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemoryError, which names the remedies, if an allocation fails."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        raise OutOfMemoryError(
            "out of memory: lower batch_size, write batch_size=auto, or load the model in fewer bits"
        ) from error


def free_memory() -> None:
    """Release the GPU allocator's cached blocks, so that fragmentation does not prevent a smaller batch."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_memory_error(error: Exception) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error).lower() for message in _OUT_OF_MEMORY_MESSAGES)


@contextmanager
def processor_errors(what: str) -> Iterator[None]:
    """Raise UsageError, beginning with `what`, for any error of a processor but one of memory."""
    try:
        yield
    except (UsageError, WorkError):
        raise
    except Exception as error:  # such as an aspect ratio over the limit, or tokens of other media
        if is_memory_error(error):
            raise
        raise UsageError(f"{what}: {first_line(error)}") from error


@contextmanager
def mismatch_errors(name: str) -> Iterator[None]:
    """Raise UsageError if pixels, tokens and the model's own sizes do not match."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"{name} cannot read its processor's output for the image and its text ({first_line(error)}): "
            "the two do not match, or the image is too long and thin"
        ) from error
