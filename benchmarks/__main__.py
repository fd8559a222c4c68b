"""Run every benchmark and print a table of ratios."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import entropy


def milliseconds(work: Callable[[], Any], runs: int = 7) -> float:
    """Median over `runs`, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = perf_counter()
        work()
        times.append(1000 * (perf_counter() - start))
    return median(times[1:])


def main() -> None:
    maps = entropy.maps()
    np.testing.assert_allclose(entropy.all_at_once(maps), entropy.one_by_one(maps), rtol=1e-5, atol=1e-6)
    ours, loop = (milliseconds(lambda f=way: f(maps)) for way in (entropy.all_at_once, entropy.one_by_one))
    table = Table(caption=f"one core; {platform.machine()}, Python {platform.python_version()}")
    for column in ("what", "here", "the other way", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    what = f"spatial entropy of {entropy.HEADS} maps, {entropy.SIDE} x {entropy.SIDE}: all at once / head by head"
    table.add_row(what, f"{ours:.1f} ms", f"{loop:.1f} ms", f"{ours / loop:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
