"""(e) The analysis of all heads: one labelling of the whole stack, against the published code's loop over heads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.floor import Work
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.heads.criteria import head_statistics, spatial_entropy

KEY = "e"
HEADS, SIDE = 1024, 24  # LLaVA-1.5-7B: 32 layers of 32 heads, 24 x 24 image tokens


def rows(setting: Setting) -> list[Row]:
    attention = maps()
    np.testing.assert_allclose(all_at_once(attention), one_by_one(attention), rtol=1e-5, atol=1e-6)
    stack = attention.reshape(32, HEADS // 32, SIDE, SIDE)
    ways = {
        "once": lambda: all_at_once(attention),
        "loop": lambda: one_by_one(attention),
        "statistics": lambda: head_statistics(stack),
    }
    timings = setting.time(ways)
    what = f"spatial entropy of {HEADS} maps, {SIDE} x {SIDE}: all at once / head by head"
    read_once = Work(attention.size, attention.nbytes)
    work = {"work": read_once, "machine": setting.machine}
    return [
        timed_row(KEY, what, timings, "once", "loop", **work),  # type: ignore[arg-type]
        timed_row(
            KEY,
            "all statistics of them (sum, both entropies, flags) / that loop",
            timings,
            "statistics",
            "loop",
        ),
    ]


def maps() -> NDArray[np.float32]:
    """`[head, h, w]`: smooth random maps with several components each."""
    noise = np.random.default_rng(0).random((HEADS, SIDE, SIDE))
    return ndimage.gaussian_filter(noise, (0, 1.5, 1.5)).astype(np.float32)


def all_at_once(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    return spatial_entropy(attention)


def one_by_one(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """The published code's shape: label each map, then go through its components."""
    return np.array([_entropy(one) for one in attention], np.float32)


def _entropy(attention: NDArray[np.float32]) -> float:
    labels, count = ndimage.label(attention > attention.mean(dtype=np.float64), np.ones((3, 3)))
    areas = [np.sum(labels == number) for number in range(1, count + 1)]
    shares = [area / sum(areas) for area in areas]
    return -sum(share * np.log(share) for share in shares)
