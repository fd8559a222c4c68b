"""Failures of a model or its processor as errors of one line, which libraries and devices word differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from localization_heads.errors import OutOfMemoryError, UsageError, WorkError, first_line

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


@contextmanager
def processor_errors(what: str) -> Iterator[None]:
    """Raises UsageError, which begins with `what`, for whatever a processor says no with; memory errors pass."""
    try:
        yield
    except (UsageError, WorkError):
        raise
    except Exception as error:  # limits of the aspect ratio, tokens of other media, settings that do not fit
        if is_memory_error(error):
            raise
        raise UsageError(f"{what}: {first_line(error)}") from error


@contextmanager
def mismatch_errors(name: str) -> Iterator[None]:
    """Raises UsageError where the model finds that pixels, tokens and its own sizes do not belong together."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"{name} cannot read what its processor makes of the image and its text ({first_line(error)}): "
            "they do not fit each other, or the image is too long and thin"
        ) from error
