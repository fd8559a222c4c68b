"""The machine and its measured peak arithmetic and memory speed, the reference for the column "reached"."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.floor import Work
from benchmarks.memory import free_memory
from benchmarks.timing import synchronize


@dataclass(frozen=True)
class Machine:
    """
    Args:
        dtype: the faster of float32 and bfloat16.
        flops, bandwidth: operations and bytes per second, the best of several large matrix products and copies.
        probe: one such product. It is timed with the variants, since a busy machine is slower than at the start.
        probe_flops: operations of the probe.
        memory: free bytes at the start; None if the system does not say.
    """

    device: torch.device
    dtype: torch.dtype
    flops: float
    bandwidth: float
    probe: Callable[[], Any]
    probe_flops: float
    memory: int | None = None

    def floor(self, work: Work, probe_seconds: float) -> float:
        """Seconds that `work` takes at least, at the speed that the probe reached in the same round."""
        share = self.probe_flops / probe_seconds / self.flops
        return work.seconds(share * self.flops, share * self.bandwidth)

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    def describe(self) -> str:
        rate = f"{self.flops / 1e12:.2f} TFLOP/s in {str(self.dtype).removeprefix('torch.')}"
        load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
        return (
            f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}; {_gpu()}; "
            f"{rate}, {self.bandwidth / 1e9:.0f} GB/s measured; "
            f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
        )


def measure(*, quick: bool = False) -> Machine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probes = {dtype: _matrix_product(device, dtype, quick) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {dtype: _fastest_seconds(probe) for dtype, probe in probes.items()}
    dtype = min(seconds, key=seconds.__getitem__)
    probe_flops = 2.0 * math.prod(_matrix_sizes(quick))
    flops, bandwidth = probe_flops / seconds[dtype], _copy_bandwidth(device, quick)
    return Machine(device, dtype, flops, bandwidth, probes[dtype], probe_flops, free_memory(device))


def _matrix_sizes(quick: bool) -> tuple[int, int, int]:
    """Tokens, inputs and outputs of LLaVA-1.5-7B's largest product for a prompt of 640 tokens."""
    return (64, 256, 256) if quick else (640, 4096, 11008)


def _matrix_product(device: torch.device, dtype: torch.dtype, quick: bool) -> Callable[[], Any]:
    tokens, inputs, outputs = _matrix_sizes(quick)
    left = torch.randn(tokens, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    return lambda: torch.nn.functional.linear(left, weight)


def _copy_bandwidth(device: torch.device, quick: bool) -> float:
    source = torch.zeros((1 if quick else 256) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest_seconds(lambda: target.copy_(source))


def _fastest_seconds(work: Callable[[], Any], runs: int = 6) -> float:
    times = []
    for _ in range(runs):
        start = perf_counter()
        work()
        synchronize()
        times.append(perf_counter() - start)
    return min(times[1:])


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
