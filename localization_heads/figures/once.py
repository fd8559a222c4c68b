"""A figure is drawn once: its file says what it was made of, and a rerun on the same inputs leaves it as it is."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from localization_heads.version import __version__

KEY = "Inputs"
"""Of the text in a PNG that says what the figure was made of."""
made_of: ContextVar[str] = ContextVar("made_of", default="")


def plot_once(
    plot: Callable[..., Figure], *inputs: object, path: Path, always: bool = False, **named: object
) -> Figure | None:
    """`plot(*inputs, path=path, **named)`; None where the PNG at `path` was made of the same inputs by the same code.

    The file itself says so: times of change say nothing of inputs.

    Args:
        always: draw in any case, for a figure that will be shown.
    """
    digest = hashlib.sha256(_code())
    _feed(
        digest,
        [
            plot.__name__,
            sorted({font.name for font in font_manager.fontManager.ttflist}),
            inputs,
            sorted(named.items()),
        ],
    )
    inputs_digest = digest.hexdigest()
    if not always and _is_made_of(path, inputs_digest):
        return None
    token = made_of.set(inputs_digest)
    try:
        return plot(*inputs, path=path, **named)
    finally:
        made_of.reset(token)


@cache
def _code() -> bytes:
    """What draws, as far as it may change."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    own = b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(f"{__version__} {matplotlib.__version__} ".encode() + own).digest()


def _is_made_of(path: Path, made_of: str) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
            file.seek(-12, io.SEEK_END)
            return made_of.encode() in beginning and b"IEND" in file.read()
    except OSError:
        return False


def _feed(digest: Any, value: object) -> None:
    """Add a value, with what it consists of, so that other values leave another digest."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, Image.Image):
        digest.update(f"{value.mode} {value.size}".encode())
        digest.update(value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, [(field.name, getattr(value, field.name)) for field in fields(value)])
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{value!r};".encode())
