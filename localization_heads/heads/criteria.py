"""The two criteria that tell localization heads from the rest (Sec. 4 of the paper), for all heads at once.

Criterion 1 asks how much a head looks at the image at all (attention sum), criterion 2 whether it looks at
few places (spatial entropy). Every function takes maps `[..., h, w]` and works on the whole stack in numpy:
the components of all heads are found by one labelling call. The readings of the published code that differ
from the paper are named options, collected in `CriteriaOptions`; the defaults are the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, special

from localization_heads.errors import NotFiniteError
from localization_heads.options.groups import CriteriaOptions, ElbowHeads, ElbowRule, Threshold, Weight


@dataclass(frozen=True)
class HeadStatistics:
    """What the criteria say of every head in one sample. Every array is `[layer, head]`.

    `attention_sum` and both entropies are float32 (in nats, as `spatial_entropy` has them), `num_components` int64,
    `bottom_row_focus` bool. `weight` says which entropy counts.
    """

    attention_sum: NDArray[np.float32]
    area_entropy: NDArray[np.float32]
    mass_entropy: NDArray[np.float32]
    num_components: NDArray[np.int64]
    bottom_row_focus: NDArray[np.bool_]
    weight: Weight = "area"

    @property
    def spatial_entropy(self) -> NDArray[np.float32]:
        return self.area_entropy if self.weight == "area" else self.mass_entropy


def head_statistics(
    attention: NDArray[np.floating[Any]], options: CriteriaOptions | None = None
) -> HeadStatistics:
    """Both criteria for every head of one sample, with one labelling of the whole stack.

    Args:
        attention: `[layer, head, h, w]`.
        options: `threshold`, `means` and `bottom_row_above` matter here, and `entropy` says which of the two
            counts; the rest belongs to the ranking.

    Raises:
        NotFiniteError: for a NaN or infinite map; the sample is unusable, not merely its worst head.

    >>> statistics = head_statistics(np.ones((32, 32, 24, 24)) / 1152)
    >>> statistics.attention_sum.shape, float(statistics.attention_sum[0, 0]), float(statistics.spatial_entropy[0, 0])
    ((32, 32), 0.5, inf)
    """
    options = options or CriteriaOptions()
    masks = binarise(attention, threshold=options.threshold, means=options.means)
    labels = label_components(masks)
    above = options.bottom_row_above
    return HeadStatistics(
        attention_sum=attention_sum(attention),
        area_entropy=_entropy(attention, labels, "area").astype(np.float32),
        mass_entropy=_entropy(attention, labels, "mass", options.means).astype(np.float32),
        num_components=_counts(labels),
        bottom_row_focus=_bottom_row(masks) if above is None else _bottom_row_peak(attention, above),
        weight=options.entropy,
    )


def attention_sum(maps: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """`S = sum_i a[i]` over the image tokens (criterion 1, Sec. 4.1), summed in float64.

    Args:
        maps: attention `[..., h, w]`, not renormalised over the image, so 0 <= S <= 1.

    Returns:
        float32 `[...]`.

    >>> float(attention_sum(np.array([[0.25, 0.0], [0.125, 0.125]])))
    0.5
    """
    sums = _as_maps(maps).sum(axis=(-2, -1), dtype=np.float64)
    _check_finite(sums)
    return np.asarray(sums, dtype=np.float32)


def elbow(values: ArrayLike) -> float:
    """`tau`: the sorted value farthest from the straight line between the smallest and the largest.

    Keeping `value >= elbow(values)` is criterion 1 (Sec. 4.1, App. A).

    >>> elbow([0.0, 0.1, 0.2, 1.0])
    0.2
    """
    ordered = np.sort(_as_values(values))
    return float(ordered[_elbow_of_sorted(ordered)])


def elbow_index(values: ArrayLike) -> int:
    """Position of the elbow in the ascending order of the values, from 0.

    >>> elbow_index([0.0, 0.1, 0.2, 1.0])
    2
    """
    return _elbow_of_sorted(np.sort(_as_values(values)))


def elbow_head(sums: NDArray[np.floating[Any]]) -> int:
    """Flat index `layer * H + head` of the head that stands at the elbow; of equal sums the first stands first.

    >>> elbow_head(np.array([[0.9, 0.0], [0.1, 0.2]]))  # sorted 0, 0.1, 0.2, 0.9: the elbow is 0.2, of the last head
    3
    """
    return int(np.argsort(sums, axis=None, kind="stable")[elbow_index(sums)])


def _elbow_of_sorted(ordered: NDArray[np.float64]) -> int:
    """`argmax_i |(n-1)(v_i - v_0) - i(v_{n-1} - v_0)|`, the first if several; 0 where there is no bend.

    This is the vertical distance to the chord, times n-1. The perpendicular distance is the vertical one
    times the cosine of the chord's slope, a constant, so both have the same argmax, and scaling either axis
    changes nothing. Fewer than three values, equal values and values on a straight line have no bend: the
    smallest is returned so that nothing is dropped.
    """
    last = len(ordered) - 1
    rise = ordered[-1] - ordered[0]
    distance = np.abs(last * (ordered - ordered[0]) - np.arange(last + 1) * rise)
    index = int(np.argmax(distance))
    # Values on a line are off it by rounding only, and rounding must not choose a threshold.
    return index if distance[index] > 1e-9 * last * rise else 0


def attention_sum_threshold(
    sums: NDArray[np.floating[Any]], *, exclude_layers: int = 2, elbow_heads: ElbowHeads = "considered"
) -> float:
    """`tau` of criterion 1: the elbow of the sums `[layer, head]` of the layers that are not excluded, or of all.

    >>> sums = np.array([[9.0, 9.0], [9.0, 9.0], [0.0, 0.125], [0.25, 1.0]])
    >>> attention_sum_threshold(sums)
    0.25
    """
    if exclude_layers >= sums.shape[0]:
        raise ValueError(f"exclude_layers={exclude_layers} leaves none of the {sums.shape[0]} layers")
    return elbow(sums if elbow_heads == "all" else sums[exclude_layers:])


def keep_heads(
    sums: NDArray[np.floating[Any]],
    *,
    tau: float | None = None,
    elbow: ElbowRule = "value",
    exclude_layers: int = 2,
    elbow_heads: ElbowHeads = "considered",
) -> NDArray[np.bool_]:
    """Criterion 1: the heads with `S >= tau` outside the excluded layers.

    Args:
        sums: attention sums `[layer, head]`, averaged over the data set.
        tau: the threshold; none takes the elbow.
        elbow: `"index"` is the published bug: it keeps the heads whose flat index `layer * H + head` is at least that
            of the head at the elbow of *all* heads, whatever their own sums. It has no tau.
        exclude_layers: that many first layers are never kept.
        elbow_heads: `"all"` takes the elbow of all heads, those of the excluded layers included.

    Returns:
        bool `[layer, head]`.

    >>> sums = np.array([[9.0, 9.0], [9.0, 9.0], [0.0, 0.125], [0.25, 1.0]])
    >>> keep_heads(sums).tolist()
    [[False, False], [False, False], [False, False], [True, True]]
    """
    _check_choice("elbow", elbow, get_args(ElbowRule))
    threshold = (
        attention_sum_threshold(sums, exclude_layers=exclude_layers, elbow_heads=elbow_heads)
        if tau is None
        else tau
    )
    if elbow == "value":
        kept = sums >= threshold
    elif tau is None:
        kept = np.arange(sums.size).reshape(sums.shape) >= elbow_head(sums)
    else:
        raise ValueError("tau is a value: it cannot be combined with elbow=index")
    kept[:exclude_layers] = False
    return kept


def binarise(
    maps: NDArray[np.floating[Any]], *, threshold: Threshold = "mean", means: float = 1.0
) -> NDArray[np.bool_]:
    """`A > means * mean(A)`, each map by its own mean; or `relu(A - means * mean(A)) > threshold` for a number.

    The comparison is strict, so a constant map has no active cell.

    Args:
        maps: `[..., h, w]`.

    Returns:
        bool `[..., h, w]`.

    Raises:
        ValueError: for a negative threshold, means below 1, or (NotFiniteError) a NaN or infinite map.

    >>> binarise(np.array([[4.0, 0.0], [1.0, 1.0]])).tolist()
    [[True, False], [False, False]]
    >>> binarise(np.array([[4.0, 3.0], [1.0, 0.0]]), means=2).tolist()  # twice the mean is 4
    [[False, False], [False, False]]
    """
    maps = _as_maps(maps)
    _check_threshold(threshold)
    _check_means(means)
    taken = means * _means(maps)
    if threshold == "mean":
        return np.asarray(maps > taken)
    # Subtracted, as the formula says: `maps > mean + threshold` rounds otherwise where both sides are equal.
    return np.asarray(maps - taken > float(threshold))


def label_components(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 8-connected components of a stack of masks, 1..n through the whole stack; 0 is background.

    Args:
        masks: bool `[..., h, w]`.

    Returns:
        int32 `[..., h, w]`; the numbers of one map are consecutive and above those of the maps before it.

    >>> label_components(np.array([[True, False, True], [False, False, True]])).tolist()
    [[1, 0, 2], [0, 0, 2]]
    """
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True  # eight neighbours in the plane, none in the planes beside it
    labels, _ = ndimage.label(masks.reshape(-1, *masks.shape[-2:]), structure=neighbours, output=np.int32)
    return np.asarray(labels.reshape(masks.shape), dtype=np.int32)


def component_count(maps: NDArray[np.floating[Any]], *, threshold: Threshold = "mean") -> NDArray[np.int64]:
    """Number of 8-connected components of each binarised map: int64 `[...]`.

    >>> int(component_count(np.array([[4.0, 0.0, 3.0], [0.0, 0.0, 3.0]])))
    2
    """
    return _counts(label_components(binarise(maps, threshold=threshold)))


def spatial_entropy(
    maps: NDArray[np.floating[Any]],
    *,
    weight: Weight = "area",
    threshold: Threshold = "mean",
    means: float = 1.0,
) -> NDArray[np.float32]:
    """`H = -sum_i p_i ln p_i` over the 8-connected components (criterion 2, Sec. 4.2, App. B).

    With `weight="area"`, `p_i = |C_i| / sum_j |C_j|`. With `"mass"` (published code), `p_i` is the
    component's `sum relu(A - means * mean)` over that of the whole map; under a numeric threshold these shares need
    not add up to 1, and a map whose positive cells all stay below it has no share at all: H is 0 there.

    Args:
        maps: attention `[..., h, w]`; the entropy does not change if a map is scaled.

    Returns:
        float32 `[...]` in nats; 0 for one component, +inf where there is nothing to have a share of: no component
        (area), no cell above `means` means (mass). Maps whose components have the same areas get the same bits
        wherever the components lie, so that ties are ties.

    Raises:
        NotFiniteError: for a NaN or infinite map.

    >>> maps = np.array([[4.0, 0.0, 3.0], [0.0, 0.0, 3.0]])  # a component of one cell, and one of two
    >>> round(float(spatial_entropy(maps)), 4)
    0.6365
    >>> round(-(math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3), 4)
    0.6365
    """
    _check_choice("weight", weight, get_args(Weight))
    labels = label_components(binarise(maps, threshold=threshold, means=means))
    return _entropy(maps, labels, weight, means).astype(np.float32)


def bottom_row_focus(maps: NDArray[np.floating[Any]], *, threshold: Threshold = "mean") -> NDArray[np.bool_]:
    """Whether every cell of the bottom row is active (the published code's flag): bool `[...]`.

    >>> bool(bottom_row_focus(np.array([[0.0, 0.0], [1.0, 1.0]])))
    True
    """
    return _bottom_row(binarise(maps, threshold=threshold))


def _bottom_row(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(masks[..., -1, :].all(axis=-1))


def _bottom_row_peak(maps: NDArray[np.floating[Any]], above: float) -> NDArray[np.bool_]:
    """Whether any cell of the bottom row has more attention than that (published code of August 2025)."""
    return np.asarray((maps[..., -1, :] > above).any(axis=-1))


def _entropy(
    maps: NDArray[np.floating[Any]], labels: NDArray[np.int32], weight: Weight, means: float = 1.0
) -> NDArray[np.float64]:
    counts = _counts(labels).ravel()  # (n,)
    owner = np.repeat(np.arange(counts.size), counts)  # (components,): the map each belongs to
    if weight == "area":
        parts = np.bincount(labels.ravel(), minlength=owner.size + 1)[1:]
        totals = np.bincount(owner, weights=parts, minlength=counts.size)
        shares = parts / totals[owner]
    else:
        excess = np.maximum(maps - means * _means(maps), 0.0)
        parts = np.bincount(labels.ravel(), weights=excess.ravel(), minlength=owner.size + 1)[1:]
        totals = excess.sum(axis=(-2, -1)).ravel()
        # The two sums add the cells in different orders: rounding makes a lone component's share exactly 1.
        shares = np.round(parts / totals[owner], 12)
    # Summed from the smallest share up, the result does not depend on where the components lie.
    shares = shares[np.lexsort((shares, owner))]
    sums = np.bincount(owner, weights=special.xlogy(shares, shares), minlength=counts.size)
    entropy = np.where(totals > 0, np.abs(sums), np.inf)
    return entropy.reshape(labels.shape[:-2])


def _counts(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Components of each map. Labels only grow along the stack, so the maximum so far counts them."""
    top = np.maximum.accumulate(labels.reshape(-1, labels.shape[-2] * labels.shape[-1]).max(axis=1))
    return np.diff(top, prepend=0).astype(np.int64).reshape(labels.shape[:-2])


def _means(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Mean of each map in float64 `[..., 1, 1]`."""
    means = maps.mean(axis=(-2, -1), dtype=np.float64, keepdims=True)
    _check_finite(means)
    # A rounded mean may fall an ulp below the smallest cell, and a constant map would be active everywhere.
    return np.asarray(np.maximum(means, maps.min(axis=(-2, -1), keepdims=True)), dtype=np.float64)


def _as_maps(maps: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    maps = np.asarray(maps)
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"attention maps must be [..., h, w] with at least one cell, not {maps.shape}")
    return maps


def _as_values(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise ValueError("the elbow of no values is not defined")
    if not np.isfinite(array).all():
        raise ValueError("attention sums must be finite: they hold NaN or infinite values")
    return array


def _check_finite(totals: NDArray[np.float64]) -> None:
    # A sum or mean is finite exactly if all its cells are: one look per map instead of one per cell.
    if not np.isfinite(totals).all():
        raise NotFiniteError


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_threshold(threshold: object) -> None:
    if threshold != "mean" and not (_is_number(threshold) and float(threshold) >= 0):  # type: ignore[arg-type]
        raise ValueError(f"threshold must be mean or a number of at least 0, not {threshold!r}")


def _check_means(means: object) -> None:
    if not (_is_number(means) and float(means) >= 1):  # type: ignore[arg-type]
        raise ValueError(f"means must be a number of at least 1, not {means!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
