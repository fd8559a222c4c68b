"""Decoders print nothing: a picture is read or refused, and what is said about it says this tool."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from PIL import _imaging

_lock = threading.Lock()
_entries: list[tuple[object, int]] = []
"""The filter that is in force, with the number of threads that want it."""


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """No warning of Pillow's while the block runs, in any number of threads; none of libtiff's from then on.

    `warnings.catch_warnings` puts back the filters that it found: of two threads that overlap, one would switch the
    warnings of the other on, or leave all warnings of the process off. So one filter is added, for Pillow alone, and
    taken away by the last thread.
    """
    _quiet_libtiff()
    with _lock:
        if not _entries:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _entries.append((warnings.filters[0], 0))
        entry, users = _entries.pop()
        _entries.append((entry, users + 1))
    try:
        yield
    finally:
        with _lock:
            entry, users = _entries.pop()
            if users > 1:
                _entries.append((entry, users - 1))
            else:
                with suppress(ValueError):  # somebody has put other filters in their place
                    warnings.filters.remove(entry)  # type: ignore[attr-defined]


@cache
def _quiet_libtiff() -> None:
    """libtiff writes to the standard error output itself, past Python, unless its handlers are taken away."""
    with suppress(OSError, AttributeError):  # a Pillow that hides its libtiff, as on Windows
        library = ctypes.CDLL(_imaging.__file__)  # which finds the libtiff that Pillow was linked to
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
