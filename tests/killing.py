"""Work that ends its own process once, or at every try, as a lack of memory does; workers import it by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localization_heads.stages import find

MARK, VICTIM = Path("killed"), "entry_5"

analysed = find._analyse_chunk


def killed_once(run: Any, entries: Any, attended: Sequence[Any], **options: Any) -> Any:
    """Dies with the victim's chunk in its hands; leaves the process's id behind."""
    if not MARK.exists() and any(one.sample.id == VICTIM for one in attended):
        MARK.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return analysed(run, entries, attended, **options)


def killed_always(run: Any, entries: Any, attended: Sequence[Any], **options: Any) -> Any:
    if any(one.sample.id == VICTIM for one in attended):
        with MARK.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return analysed(run, entries, attended, **options)


def left_to_workers(*_: Any, **__: Any) -> None:
    """In place of the model's way through a chunk in the command's own process."""
    raise AssertionError("the command ran the model itself")
