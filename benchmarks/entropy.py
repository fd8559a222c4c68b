"""(e) The criteria of all heads computed in one batch, against the published code's loop over heads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.floor import Work
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.cells import label_components
from localization_heads.heads.criteria import head_statistics

KEY = "e"
HEADS, SIDE = 1024, 24  # LLaVA-1.5-7B: 32 layers of 32 heads, 24 x 24 image tokens


def rows(setting: Setting) -> list[Row]:
    what = f"all statistics of {HEADS} maps, {SIDE} x {SIDE}, at once / their spatial entropy, head by head"
    return [
        _row(setting, random_maps(), what),
        _row(setting, random_maps(0), "the same of random noise, the worst case"),
    ]


def _row(setting: Setting, attention: NDArray[np.float32], what: str) -> Row:
    np.testing.assert_allclose(batched_entropy(attention), looped_entropy(attention), rtol=1e-5, atol=1e-6)
    variants = {
        "once": lambda: batched_entropy(attention),
        "loop": lambda: looped_entropy(attention),
        "label": lambda: label_components(attention > attention.mean(axis=(1, 2), keepdims=True)),
    }
    timings = setting.time(variants)
    note = f"labelling alone {timings.fastest('label', 'once'):.2f} of it"
    work = Work(attention.size, attention.nbytes)  # least work: every cell is read once
    return timed_row(KEY, what, timings, "once", "loop", work=work, machine=setting.machine, note=note)


def random_maps(sigma: float = 1.5) -> NDArray[np.float32]:
    """(head, h, w): random maps with several components each, smoothed by a Gaussian of `sigma` cells."""
    noise = np.random.default_rng(0).random((HEADS, SIDE, SIDE))
    return ndimage.gaussian_filter(noise, (0, sigma, sigma)).astype(np.float32)


def batched_entropy(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """(head,): the spatial entropy; `head_statistics` computes all other statistics with it."""
    return head_statistics(attention).spatial_entropy


def looped_entropy(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """(head,): the same as the published code computes it, labelling one map at a time and looping over components."""
    return np.array([_map_entropy(head_map) for head_map in attention], np.float32)


def _map_entropy(attention: NDArray[np.float32]) -> float:
    labels, count = ndimage.label(attention > attention.mean(dtype=np.float64), np.ones((3, 3)))
    areas = [np.sum(labels == number) for number in range(1, count + 1)]
    shares = [area / sum(areas) for area in areas]
    return -sum(share * np.log(share) for share in shares)
