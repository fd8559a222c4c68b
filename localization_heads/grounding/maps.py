"""From the maps of several heads to one: they are weighted, added, contrast_maps, freed of peaks, smoothed (Sec. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.attention import AttentionMaps
from localization_heads.cells import visible_cells, visible_edges
from localization_heads.heads.head import Head
from localization_heads.options.groups import Border, GroundingOptions

CONSENSUS_POWER = 4
"""Of a head's agreement with the others: a head beside them weighs little (docs/readouts.md)."""
NEIGHBOURS = 5
"""Side, in cells, of the neighbourhood that a peak is compared with."""
PEAK = 6
"""Cells of a neighbourhood that may belong to a peak: the value after them limits it."""


def sum_maps(
    attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions
) -> NDArray[np.float64]:
    """The sum of the heads' maps, weighted by `options.combine`, before smoothing: float64 `[h, w]`.

    Where the answer's tokens were read as well, the geometric mean of their sum and that of the query token, each
    scaled to a sum of 1: a cell counts if both look at it.
    """
    both = [attention.attention] if attention.answer is None else [attention.attention, attention.answer]
    sums = []
    for read in both:
        maps = head_maps(read, attention.places(heads)).astype(np.float64)
        weights = consensus_weights(maps) if options.combine == "consensus" else np.ones(len(maps))
        sums.append(np.einsum("k,khw->hw", weights, maps))
    return sums[0] if len(sums) == 1 else np.sqrt(normalise(sums[0]) * normalise(sums[1]))


def image_shares(attention: AttentionMaps, heads: Sequence[Head]) -> NDArray[np.float64]:
    """The share of the heads' attention to the images of a prompt that each image draws: `[n]`, adding up to 1.

    Cells in the padding do not count. Without any attention, all images have the same share.
    """
    sums = np.array([_seen_sum(one, heads) for one in attention.images])
    return sums / sums.sum() if sums.sum() > 0 else np.full(len(sums), 1 / len(sums))


def _seen_sum(attention: AttentionMaps, heads: Sequence[Head]) -> float:
    combined = head_maps(attention.attention, attention.places(heads)).sum(axis=0, dtype=np.float64)
    seen = visible_cells(*visible_edges(attention.image_box, attention.image_size, attention.grid))
    return float(combined[seen].sum())


def consensus_weights(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The weight of each of the maps `[k, h, w]`, adding up to 1: its mean overlap with the others, to the fourth.

    A single map has weight 1; maps that overlap nowhere have equal weights.

    >>> consensus_weights(np.array([[[1.0, 0]], [[1.0, 0]], [[0, 1.0]]])).tolist()
    [0.5, 0.5, 0.0]
    """
    overlap = pairwise_overlaps(maps)
    np.fill_diagonal(overlap, 0.0)
    weights = overlap.sum(axis=1) ** CONSENSUS_POWER
    return weights / weights.sum() if weights.sum() > 0 else np.full(len(maps), 1 / len(maps))


def pairwise_overlaps(
    maps: Sequence[NDArray[np.floating[Any]]] | NDArray[np.floating[Any]],
) -> NDArray[np.float64]:
    """The Bhattacharyya coefficient `sum sqrt(p q)` of each two of k maps `[h, w]` scaled to a sum of 1: `[k, k]`.

    1 of equal maps, 0 of maps without a common cell.
    """
    roots = np.sqrt(np.stack([normalise(one).ravel() for one in maps]))
    return np.asarray(roots @ roots.T)


def contrast_maps(
    combined: NDArray[np.float64], others: Sequence[NDArray[np.float64]], weight: float
) -> NDArray[np.float64]:
    """`max(P - weight * mean(B), 0)` of a map and of others, all scaled to a sum of 1, in the scale of the map.

    >>> contrast_maps(np.array([[3.0, 1.0]]), [np.array([[0.0, 5.0]])], 0.5).tolist()
    [[3.0, 0.0]]
    """
    background = np.mean([normalise(other) for other in others], axis=0)
    return np.asarray(np.clip(combined - weight * combined.sum() * background, 0, None))


def normalise(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """A map `[h, w]` with a sum of 1; one without any attention as it is."""
    total = float(values.sum())
    return np.asarray(values / total if total > 0 else values, dtype=np.float64)


def limit_peaks(combined: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """A map `[h, w]`, each cell capped at `limit` times the seventh highest of the 5 x 5 cells around and in it.

    An attention sink of up to six cells towers over its surroundings and is cut; an object covers more cells than
    that, and stays as it is. At the border fewer cells count; where they are fewer than seven, nothing is cut.
    """
    pad = NEIGHBOURS // 2
    around = np.pad(combined, pad, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(around, (NEIGHBOURS, NEIGHBOURS))
    ranked = np.partition(windows.reshape(*combined.shape, -1), -1 - PEAK, axis=-1)[..., -1 - PEAK]
    return np.minimum(combined, np.where(np.isfinite(ranked), limit * np.clip(ranked, 0, None), np.inf))


def gaussian_kernel(kernel_size: int = 7, sigma: float = 1.0) -> NDArray[np.float64]:
    """`g_i ~ exp(-i^2 / 2 sigma^2)` at `kernel_size` whole steps around 0, adding up to 1.

    Raises:
        ValueError: for an even or non-positive size, or a negative or infinite sigma.

    >>> gaussian_kernel(3, 1.0).round(4).tolist()
    [0.2741, 0.4519, 0.2741]
    """
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1:
        raise ValueError(f"kernel_size must be a whole number of at least 1, not {kernel_size!r}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the kernel has a centre, not {kernel_size}")
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma!r}")
    if sigma == 0:
        return np.ones(1)
    steps = np.arange(kernel_size) - kernel_size // 2
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def smooth(
    maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0, border: Border = "mirror"
) -> NDArray[np.float64]:
    """Gaussian smoothing of every map `[..., h, w]` (App. B.2), float64.

    Beyond the border the map is mirrored without repeating the edge cell (`c b | a b c`), what OpenCV and
    torchvision call reflect, or with `border="repeat"` repeating it (`b a | a b c`), what scipy calls reflect; grids
    smaller than the kernel are mirrored again and again.
    """
    kernel = gaussian_kernel(kernel_size, sigma)
    smoothed = np.asarray(maps, dtype=np.float64)
    mode = "mirror" if border == "mirror" else "reflect"
    if kernel.size > 1:
        for axis in (-2, -1):
            smoothed = ndimage.correlate1d(smoothed, kernel, axis=axis, mode=mode)
    return smoothed


def combine(
    maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0, border: Border = "mirror"
) -> NDArray[np.float64]:
    """`sum_k G * A_k`: the smoothed maps `[k, h, w]` added up to `[h, w]`, not renormalised."""
    return np.asarray(smooth(maps, kernel_size, sigma, border).sum(axis=0))


def head_maps(attention: NDArray[np.float32], heads: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The maps `[k, h, w]` of the heads, of `[layer, head, h, w]`."""
    if not heads:
        raise ValueError("grounding needs at least one head")
    num_layers, num_heads = attention.shape[:2]
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise ValueError(f"no head {Head(layer, head)} among {num_layers} layers of {num_heads}")
    return np.stack([attention[layer, head] for layer, head in heads])
