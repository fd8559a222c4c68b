"""From the maps of a few heads to one map: combine, contrast, limit peaks, smooth, sum (Sec. 5, App. B.2).

The paper smooths each head's map and sums them. The other steps are options of the read-out, off under
`grounding=paper`: each of them replaces the heads' maps by a single one before the smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.attention import AttentionMaps
from localization_heads.cells import upsample, visible_cells, visible_edges
from localization_heads.heads.head import Head
from localization_heads.options.groups import Border, GroundingOptions

CONSENSUS_POWER = 4
"""Exponent of a head's mean overlap with the other heads: an outlier gets little weight (docs/readouts.md)."""
PEAK_WINDOW = 5
"""Side, in cells, of the window around a cell that its value is compared with."""
PEAK_CELLS = 6
"""Largest peak, in cells, that is cut: the next highest value in the window is the reference."""


def maps_to_smooth(
    attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions
) -> NDArray[np.floating[Any]]:
    """The maps that are smoothed and summed: `[k, h, w]`, finer by `options.upsample`.

    These are the maps of the k heads, as in the paper, or a single map made from them if `options` weight or contrast
    them or limit peaks, or if the answer's maps are there as well.
    """
    is_contrasted = options.contrast != "none" and bool(attention.others)
    is_weighted = options.combine != "sum" or attention.answer is not None
    if not (is_contrasted or is_weighted or options.peak_limit is not None):
        return upsample(head_maps(attention.attention, heads), options.upsample, options.interpolation)
    combined = sum_maps(attention, heads, options)
    if is_contrasted:
        others = [sum_maps(other, heads, options) for other in attention.others]
        combined = contrast_maps(combined, others, options.contrast_weight)
    if options.peak_limit is not None:
        combined = limit_peaks(combined, options.peak_limit)
    return upsample(combined[None], options.upsample, options.interpolation)


def combine(
    maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0, border: Border = "mirror"
) -> NDArray[np.float64]:
    """`sum_k G * A_k`: the sum `[h, w]` of the smoothed maps `[k, h, w]`, not renormalised."""
    return np.asarray(smooth(maps, kernel_size, sigma, border).sum(axis=0))


def smooth(
    maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0, border: Border = "mirror"
) -> NDArray[np.float64]:
    """Gaussian smoothing of every map `[..., h, w]` (App. B.2), float64.

    Args:
        border: `mirror` extends the map without repeating the edge cell (`c b | a b c`; "reflect" in OpenCV and
            torchvision), `repeat` repeats it (`b a | a b c`; "reflect" in scipy). A grid smaller than the kernel is
            mirrored several times.
    """
    kernel = gaussian_kernel(kernel_size, sigma)
    smoothed = np.asarray(maps, dtype=np.float64)
    mode = "mirror" if border == "mirror" else "reflect"
    if kernel.size > 1:
        for axis in (-2, -1):
            smoothed = ndimage.correlate1d(smoothed, kernel, axis=axis, mode=mode)
    return smoothed


def gaussian_kernel(kernel_size: int = 7, sigma: float = 1.0) -> NDArray[np.float64]:
    """`g_i ~ exp(-i^2 / 2 sigma^2)` at `kernel_size` integer steps around 0, adding up to 1.

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


def sum_maps(attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions) -> NDArray[np.float64]:
    """The sum of the heads' maps, weighted by `options.combine`, before smoothing: float64 `[h, w]`.

    If the maps of the answer's tokens are there as well, the geometric mean of both sums, each normalised to 1: a cell
    counts only if the query token and the answer attend to it.
    """
    sums = []
    for source in (attention.attention, attention.answer):
        if source is not None:
            maps = head_maps(source, attention.places(heads)).astype(np.float64)
            weights = consensus_weights(maps) if options.combine == "consensus" else np.ones(len(maps))
            sums.append(np.einsum("k,khw->hw", weights, maps))
    return sums[0] if len(sums) == 1 else np.sqrt(normalise(sums[0]) * normalise(sums[1]))


def head_maps(attention: NDArray[np.float32], heads: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The maps `[k, h, w]` of some heads, out of `[layer, head, h, w]`."""
    if not heads:
        raise ValueError("grounding needs at least one head")
    num_layers, num_heads = attention.shape[:2]
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise ValueError(f"no head {Head(layer, head)} among {num_layers} layers of {num_heads}")
    return np.stack([attention[layer, head] for layer, head in heads])


def consensus_weights(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Weights of the maps `[k, h, w]`, adding up to 1: each map's mean overlap with the others, to the fourth power.

    Equal weights if no two maps overlap, and for a single map.

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
    """Bhattacharyya coefficients `sum sqrt(p q)` of all pairs of k maps `[h, w]`, normalised to 1: `[k, k]`.

    1 for maps that are equal up to scale, 0 for maps without a common cell.
    """
    roots = np.sqrt(np.stack([normalise(values).ravel() for values in maps]))
    return np.asarray(roots @ roots.T)


def contrast_maps(
    combined: NDArray[np.float64], others: Sequence[NDArray[np.float64]], weight: float
) -> NDArray[np.float64]:
    """`max(P - weight * mean(B), 0)`: a map minus the mean of other maps, all normalised to 1, in the map's own scale.

    >>> contrast_maps(np.array([[3.0, 1.0]]), [np.array([[0.0, 5.0]])], 0.5).tolist()
    [[3.0, 0.0]]
    """
    background = np.mean([normalise(other) for other in others], axis=0)
    return np.asarray(np.clip(combined - weight * combined.sum() * background, 0, None))


def normalise(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """A map `[h, w]` scaled to a sum of 1; unchanged if it has no attention."""
    total = float(values.sum())
    return np.asarray(values / total if total > 0 else values, dtype=np.float64)


def limit_peaks(combined: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """A map `[h, w]` with each cell capped at `limit` times the seventh highest value of the 5 x 5 window around it.

    This cuts attention sinks of up to six cells, which tower over their surroundings, and leaves objects, which cover
    more cells. At the border the window is smaller; with fewer than seven cells nothing is cut.
    """
    padding = PEAK_WINDOW // 2
    padded = np.pad(combined, padding, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PEAK_WINDOW, PEAK_WINDOW))
    windows = windows.reshape(*combined.shape, -1)  # (h, w, 25)
    reference = np.partition(windows, -1 - PEAK_CELLS, axis=-1)[..., -1 - PEAK_CELLS]
    cap = np.where(np.isfinite(reference), limit * np.clip(reference, 0, None), np.inf)
    return np.minimum(combined, cap)


def image_shares(attention: AttentionMaps, heads: Sequence[Head]) -> NDArray[np.float64]:
    """The share of the heads' attention that each image of a prompt with several receives: `[n]`, adding up to 1.

    Cells in the padding do not count. Equal shares if there is no attention at all.
    """
    sums = np.array([_sum_on_image(maps, heads) for maps in attention.images])
    return sums / sums.sum() if sums.sum() > 0 else np.full(len(sums), 1 / len(sums))


def _sum_on_image(attention: AttentionMaps, heads: Sequence[Head]) -> float:
    combined = head_maps(attention.attention, attention.places(heads)).sum(axis=0, dtype=np.float64)
    visible = visible_cells(*visible_edges(attention.image_box, attention.image_size, attention.grid))
    return float(combined[visible].sum())
