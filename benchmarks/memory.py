"""How much memory a piece of work takes at its height, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Of the GPU if there is one, else of this process (Linux only; None elsewhere)."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    before = reset_peak()
    work()
    return resident_peak() - before


def free_memory(device: Any) -> int | None:
    """Bytes that can be had on a device (Linux only on the CPU; None elsewhere)."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if not sys.platform.startswith("linux"):
        return None
    return kilobytes(Path("/proc/meminfo"), "MemAvailable")


def reset_peak() -> int:
    """Forget the process's highest resident size; returns the present one, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident_peak() -> int:
    """The highest resident size since `reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    return kilobytes(Path("/proc/self/status"), field)


def kilobytes(file: Path, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", file.read_text())
    assert found is not None
    return 1024 * int(found[1])
