"""The two criteria that separate localization heads from the rest (Sec. 4 of the paper), for all heads at once.

Criterion 1 is how much a head attends to the image at all (attention sum), criterion 2 whether it attends to few
places (spatial entropy). `head_statistics` computes both in one pass over a stack of maps `[..., h, w]`;
`attention_sum` and `spatial_entropy` return one of them. The defaults are the paper's; where the published code
differs, its variant is a named option of `CriteriaOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from localization_heads.cells import label_separated
from localization_heads.errors import ArgumentError, NotFiniteError
from localization_heads.options.groups import CriteriaOptions, Threshold, Weight

BLOCK_CELLS = 1 << 17
"""Cells that are processed together, so that all intermediate arrays fit into a processor's cache."""


@dataclass(frozen=True)
class HeadStatistics:
    """The criteria of every head in one sample. Every array is `[layer, head]`, or has the shape of the stack of maps.

    Args:
        attention_sum: criterion 1.
        area_entropy: criterion 2 in nats, with components weighted by area.
        mass_entropy: the same with components weighted by mass.
        num_components: 8-connected components of the binarised map.
        bottom_row_focus: the published code's flag for a map whose bottom row is active.
        weight: which of the entropies is `spatial_entropy`.
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


def head_statistics(attention: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> HeadStatistics:
    """Both criteria for every head of one sample, in one pass.

    Args:
        attention: `[layer, head, h, w]`, or any stack `[..., h, w]`.
        options: `threshold`, `means`, `bottom_row_above` and `entropy` are used; the others belong to the ranking.

    Raises:
        NotFiniteError: for a NaN or infinite map, which makes the whole sample unusable.

    >>> statistics = head_statistics(np.ones((32, 32, 24, 24)) / 1152)
    >>> statistics.attention_sum.shape, float(statistics.attention_sum[0, 0]), float(statistics.spatial_entropy[0, 0])
    ((32, 32), 0.5, inf)
    """
    options = options or CriteriaOptions()
    *stack, height, width = _as_maps(attention).shape
    maps = attention.reshape(-1, height, width)
    step = max(1, BLOCK_CELLS // (height * width))
    blocks = [_block_statistics(maps[start : start + step], options) for start in range(0, max(1, len(maps)), step)]
    parts = zip(*blocks, strict=True)
    sums, area, mass, counts, focus = (np.concatenate(part).reshape(stack) for part in parts)
    return HeadStatistics(
        attention_sum=sums.astype(np.float32),
        area_entropy=area.astype(np.float32),
        mass_entropy=mass.astype(np.float32),
        num_components=counts.astype(np.int64),
        bottom_row_focus=focus,
        weight=options.entropy,
    )


def attention_sum(maps: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """`S = sum_i a[i]` over the image tokens (criterion 1, Sec. 4.1), accumulated in float64.

    Args:
        maps: attention `[..., h, w]`, not renormalised over the image, so 0 <= S <= 1.

    Returns:
        float32 `[...]`.

    >>> float(attention_sum(np.array([[0.25, 0.0], [0.125, 0.125]])))
    0.5
    """
    sums, _ = _sum_and_excess(maps)
    return sums.astype(np.float32)


def elbow(values: ArrayLike) -> float:
    """`tau` of criterion 1 (Sec. 4.1, App. A): the elbow of the sorted values.

    It is the value with the largest distance to the chord from the smallest to the largest value.

    >>> elbow([0.0, 0.1, 0.2, 1.0])
    0.2
    """
    ordered = np.sort(_as_values(values))
    return float(ordered[_elbow_of_sorted(ordered)])


def elbow_index(values: ArrayLike) -> int:
    """Index of the elbow in the ascending order of the values, from 0.

    >>> elbow_index([0.0, 0.1, 0.2, 1.0])
    2
    """
    return _elbow_of_sorted(np.sort(_as_values(values)))


def head_at_elbow(sums: NDArray[np.floating[Any]]) -> int:
    """Flat index `layer * H + head` of the head at the elbow; equal sums are sorted by that index.

    >>> head_at_elbow(np.array([[0.9, 0.0], [0.1, 0.2]]))  # sorted 0, 0.1, 0.2, 0.9: the elbow is 0.2
    3
    """
    return int(np.argsort(sums, axis=None, kind="stable")[elbow_index(sums)])


def _elbow_of_sorted(ordered: NDArray[np.float64]) -> int:
    """`argmax_i |(n-1)(v_i - v_0) - i(v_{n-1} - v_0)|`, the first if tied; 0 if there is no bend.

    This is the vertical distance to the chord, times n-1. The perpendicular distance differs from it by a constant
    factor, the cosine of the chord's slope, so both have the same argmax. Fewer than three values, equal values and
    values on a straight line have no bend: the index of the smallest is returned, so that no head is dropped.
    """
    last = len(ordered) - 1
    rise = ordered[-1] - ordered[0]
    distance = np.abs(last * (ordered - ordered[0]) - np.arange(last + 1) * rise)
    index = int(np.argmax(distance))
    # Values on a straight line differ from it by rounding, which must not choose a threshold.
    return index if distance[index] > 1e-9 * last * rise else 0


def attention_sum_threshold(sums: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> float:
    """`tau` of criterion 1: the elbow of the sums `[layer, head]`, without the excluded layers or over all.

    Args:
        options: `exclude_layers` and `elbow_heads` are used.

    >>> sums = np.array([[9.0, 9.0], [9.0, 9.0], [0.0, 0.125], [0.25, 1.0]])
    >>> attention_sum_threshold(sums)
    0.25
    """
    options = options or CriteriaOptions()
    check_criteria(options, sums.shape[0])
    return elbow(sums if options.elbow_heads == "all" else sums[options.exclude_layers :])


def check_criteria(criteria: CriteriaOptions, num_layers: int) -> None:
    """ArgumentError if all layers are excluded."""
    if criteria.exclude_layers >= num_layers:
        raise ArgumentError(f"criteria.exclude_layers={criteria.exclude_layers}: there are only {num_layers} layers")


def keep_heads(sums: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> NDArray[np.bool_]:
    """Criterion 1: the heads with `S >= tau` outside the excluded layers; tau is given or the elbow of the sums.

    With `elbow="index"` (the published code of June 2025) there is no tau: heads are kept from the flat index
    `layer * H + head` of the head at the elbow of *all* heads on, whatever their sums.

    Args:
        sums: attention sums `[layer, head]`, of one sample or averaged over several.

    Returns:
        bool `[layer, head]`.

    >>> sums = np.array([[9.0, 9.0], [9.0, 9.0], [0.0, 0.125], [0.25, 1.0]])
    >>> keep_heads(sums).tolist()
    [[False, False], [False, False], [False, False], [True, True]]
    """
    options = options or CriteriaOptions()
    threshold = attention_sum_threshold(sums, options) if options.tau is None else options.tau
    if options.elbow == "value":
        kept = sums >= threshold
    else:
        kept = np.arange(sums.size).reshape(sums.shape) >= head_at_elbow(sums)
    kept[: options.exclude_layers] = False
    return kept


def binarise(maps: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> NDArray[np.bool_]:
    """Positive cells of each map: `A > means * mean(A)`, or `relu(A - means * mean(A)) > threshold` for a number.

    The comparison is strict, so a constant map has no positive cell.

    Args:
        maps: `[..., h, w]`.
        options: `threshold` and `means` are used.

    Returns:
        bool `[..., h, w]`.

    Raises:
        NotFiniteError: for a NaN or infinite map.

    >>> binarise(np.array([[4.0, 0.0], [1.0, 1.0]])).tolist()
    [[True, False], [False, False]]
    >>> binarise(np.array([[4.0, 3.0], [1.0, 0.0]]), CriteriaOptions(means=2)).tolist()  # twice the mean is 4
    [[False, False], [False, False]]
    """
    options = options or CriteriaOptions()
    _, excess = _sum_and_excess(maps, options.means)
    return np.asarray(excess[..., :-1, :] > _numeric_threshold(options.threshold))


def spatial_entropy(
    maps: NDArray[np.floating[Any]],
    *,
    weight: Weight = "area",
    threshold: Threshold = "mean",
    means: float = 1.0,
) -> NDArray[np.float32]:
    """`H = -sum_i p_i ln p_i` over the 8-connected components (criterion 2, Sec. 4.2, App. B).

    With `weight="area"`, `p_i = |C_i| / sum_j |C_j|`. With `"mass"` (published code), `p_i` is the component's
    `sum relu(A - means * mean)` divided by that of the whole map. Under a numeric threshold these shares need not add
    up to 1, and H is 0 if no cell exceeds the threshold.

    Args:
        maps: attention `[..., h, w]`; scaling a map does not change its entropy.

    Returns:
        float32 `[...]` in nats; 0 for one component, +inf if there is no component (area) or no cell above
        `means * mean` (mass). Maps whose components have the same areas have bit-identical entropies, wherever the
        components lie, so ties are exact.

    Raises:
        NotFiniteError: for a NaN or infinite map.

    >>> maps = np.array([[4.0, 0.0, 3.0], [0.0, 0.0, 3.0]])  # a component of one cell, and one of two
    >>> round(float(spatial_entropy(maps)), 4)
    0.6365
    >>> round(float(-(np.log(1 / 3) / 3 + np.log(2 / 3) * 2 / 3)), 4)
    0.6365
    """
    options = CriteriaOptions(entropy=weight, threshold=threshold, means=means)
    return head_statistics(maps, options).spatial_entropy


def _block_statistics(maps: NDArray[np.floating[Any]], options: CriteriaOptions) -> tuple[NDArray[Any], ...]:
    """Attention sum, both entropies (area, mass), number of components and bottom-row flag, each `(n,)`."""
    n, height, width = maps.shape
    sums, excess = _sum_and_excess(maps, options.means)
    # An inactive row below each map and an inactive column at its left separate components of adjacent maps and rows.
    active = np.zeros((n, height + 1, width + 1), dtype=np.bool_)
    active[..., 1:] = excess > _numeric_threshold(options.threshold)
    active[:, -1] = False
    map_of, areas, masses = _components(active, excess)  # (components,)

    total_area = _group_sums(areas, map_of, n)
    if options.threshold == "mean":  # then the components hold all the positive excess
        total_mass = _group_sums(masses, map_of, n)
    else:
        total_mass = np.maximum(excess[:, :-1], 0).sum(axis=(1, 2))
    above = options.bottom_row_above
    focus = active[:, -2, 1:].all(axis=1) if above is None else (maps[:, -1] > above).any(axis=1)
    entropies = _entropy(areas, total_area, map_of), _entropy(masses, total_mass, map_of)
    return sums, *entropies, np.bincount(map_of, minlength=n), np.asarray(focus)


def _sum_and_excess(
    maps: NDArray[np.floating[Any]], means: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum of each map, `[...]`, and its excess `A - means * mean(A)`, `[..., h + 1, w]`, in float64.

    The extra row of the excess is minus the sum of the columns above it. So the integral image of a column of maps is 0
    again at the start of each map, and a faint map loses no precision to a strong one before it.
    """
    maps = _as_maps(maps)
    *stack, height, width = maps.shape
    excess = np.empty((*stack, height + 1, width))
    excess[..., :-1, :] = maps
    columns = np.ones(height) @ excess[..., :-1, :]
    sums = columns.sum(axis=-1)
    if not np.isfinite(sums).all():  # exactly if all cells are, and cheaper to test
        raise NotFiniteError
    # Rounding may put the mean an ulp below the smallest cell, which would make a constant map active everywhere.
    reference = means * np.maximum(sums / (height * width), maps.min(axis=(-2, -1)))
    excess[..., -1, :] = 0
    excess -= reference[..., None, None]
    excess[..., -1, :] = height * reference[..., None] - columns
    return sums, excess


def _components(
    active: NDArray[np.bool_], excess: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """The index of its map, the area and the mass of every component, each `(components,)`, in the order of the labels.

    Area and mass are summed over runs of adjacent active cells in a row, which are far fewer than cells: a run's area
    is the difference of its two ends, its mass the difference of the row's cumulative sum at these.

    Args:
        active: bool `(n, h + 1, w + 1)`, inactive in the last row and the first column of each map.
        excess: `(n, h + 1, w)`, from `_sum_and_excess`.
    """
    count, labels = label_separated(active)
    flat = active.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1])  # alternating: the cell before a run, and its last cell
    if not ends.size:
        return ends, np.zeros(0), np.zeros(0)
    integral = cv2.integral(excess.reshape(-1, excess.shape[-1]), sdepth=cv2.CV_64F).ravel()
    cumulative = integral[active.shape[-1] :].take(ends) - integral.take(ends)  # of the row, up to each end
    last_cell = ends[1::2]
    label = labels.ravel()[last_cell].astype(np.intp)  # (runs,)

    def sum_of_runs(values: NDArray[Any]) -> NDArray[np.float64]:
        return _group_sums(values[1::2] - values[::2], label, count)[1:]

    cell_of = np.empty(count, dtype=np.intp)  # a cell of each component
    cell_of[label] = last_cell
    return cell_of[1:] // active[0].size, sum_of_runs(ends), sum_of_runs(cumulative)


def _entropy(parts: NDArray[np.float64], totals: NDArray[np.float64], map_of: NDArray[np.intp]) -> NDArray[np.float64]:
    """`-sum p ln p` over the components of each map, where p is a part's share of the map's total: `(n,)`.

    Args:
        parts: area or mass of every component, `(components,)`.
        totals: of each map, `(n,)`; the entropy is +inf where it is 0.
        map_of: index of the map of every component, `(components,)`.
    """
    # Part and total may be summed in different orders: after rounding, a single component's share is exactly 1.
    shares = np.round(parts / totals[map_of], 12)
    # The sum of integers does not depend on the order of the components, so ties are exact.
    terms = np.rint(special.xlogy(shares, shares) * 2.0**45)
    entropy = np.abs(_group_sums(terms, map_of, len(totals))) / 2.0**45
    return np.where(totals > 0, entropy, np.inf)


def _group_sums(values: NDArray[Any], group: NDArray[np.intp], num_groups: int) -> NDArray[np.float64]:
    """Sum of the values of each group: float64 `(num_groups,)`."""
    return np.asarray(np.bincount(group, weights=values, minlength=num_groups), dtype=np.float64)


def _numeric_threshold(threshold: Threshold) -> float:
    return 0.0 if threshold == "mean" else float(threshold)


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
