"""Peak memory of a piece of work, above what was allocated before it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Peak bytes that `work` adds: of the GPU if there is one, else of this process (Linux only; None elsewhere)."""
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
    """Free bytes of a device; on the CPU on Linux only, None elsewhere."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if not sys.platform.startswith("linux"):
        return None
    return proc_bytes(Path("/proc/meminfo"), "MemAvailable")


def reset_peak() -> int:
    """Reset the process's peak resident set size; returns the present size in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident_peak() -> int:
    """Peak resident set size since `reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    return proc_bytes(Path("/proc/self/status"), field)


def proc_bytes(file: Path, field: str) -> int:
    """A field of a file below /proc that is given in kB, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", file.read_text())
    assert match is not None
    return 1024 * int(match[1])
