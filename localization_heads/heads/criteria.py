"""The two criteria that tell localization heads from the rest (Sec. 4 of the paper), for all heads at once.

Criterion 1 asks how much a head looks at the image at all (attention sum), criterion 2 whether it looks at
few places (spatial entropy). `head_statistics` measures both in one pass over a stack of maps `[..., h, w]`, whose
components OpenCV labels together; the functions beside it give one of its numbers each. The readings of the
published code that differ from the paper are named options, collected in `CriteriaOptions`; the defaults are the
paper's.
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

BLOCK = 1 << 17
"""Cells that are measured together: as many as a processor's cache holds with all that is made of them."""


@dataclass(frozen=True)
class HeadStatistics:
    """What the criteria say of every head in one sample. Every array is `[layer, head]`, or as the maps are stacked.

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
    """Both criteria for every head of one sample, in one pass.

    Args:
        attention: `[layer, head, h, w]`, or any stack `[..., h, w]`.
        options: `threshold`, `means` and `bottom_row_above` matter here, and `entropy` says which of the two
            counts; the rest belongs to the ranking.

    Raises:
        NotFiniteError: for a NaN or infinite map; the sample is unusable, not merely its worst head.

    >>> statistics = head_statistics(np.ones((32, 32, 24, 24)) / 1152)
    >>> statistics.attention_sum.shape, float(statistics.attention_sum[0, 0]), float(statistics.spatial_entropy[0, 0])
    ((32, 32), 0.5, inf)
    """
    options = options or CriteriaOptions()
    *stack, height, width = _as_maps(attention).shape
    maps = attention.reshape(-1, height, width)
    step = max(1, BLOCK // (height * width))
    blocks = [_measure(maps[start : start + step], options) for start in range(0, max(1, len(maps)), step)]
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
    """`S = sum_i a[i]` over the image tokens (criterion 1, Sec. 4.1), summed in float64.

    Args:
        maps: attention `[..., h, w]`, not renormalised over the image, so 0 <= S <= 1.

    Returns:
        float32 `[...]`.

    >>> float(attention_sum(np.array([[0.25, 0.0], [0.125, 0.125]])))
    0.5
    """
    sums, _ = _excess(maps)
    return sums.astype(np.float32)


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


def head_at_elbow(sums: NDArray[np.floating[Any]]) -> int:
    """Flat index `layer * H + head` of the head that stands at the elbow; of equal sums the first stands first.

    >>> head_at_elbow(np.array([[0.9, 0.0], [0.1, 0.2]]))  # sorted 0, 0.1, 0.2, 0.9: the elbow is 0.2, of the last head
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


def attention_sum_threshold(sums: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> float:
    """`tau` of criterion 1: the elbow of the sums `[layer, head]` of the layers that are not excluded, or of all.

    Args:
        options: `exclude_layers` and `elbow_heads` matter here.

    >>> sums = np.array([[9.0, 9.0], [9.0, 9.0], [0.0, 0.125], [0.25, 1.0]])
    >>> attention_sum_threshold(sums)
    0.25
    """
    options = options or CriteriaOptions()
    check_criteria(options, sums.shape[0])
    return elbow(sums if options.elbow_heads == "all" else sums[options.exclude_layers :])


def check_criteria(criteria: CriteriaOptions, num_layers: int) -> None:
    """ArgumentError if no layer is left to choose heads from."""
    if criteria.exclude_layers >= num_layers:
        raise ArgumentError(
            f"criteria.exclude_layers={criteria.exclude_layers}: there are only {num_layers} layers"
        )


def keep_heads(sums: NDArray[np.floating[Any]], options: CriteriaOptions | None = None) -> NDArray[np.bool_]:
    """Criterion 1: the heads with `S >= tau` outside the excluded layers, tau being fixed or the elbow of the sums.

    Under `elbow="index"` (the published code of June 2025) it keeps the heads whose flat index `layer * H + head` is
    at least that of the head at the elbow of *all* heads, whatever their own sums; it has no tau.

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
    """`A > means * mean(A)`, each map by its own mean; or `relu(A - means * mean(A)) > threshold` for a number.

    The comparison is strict, so a constant map has no positive cell.

    Args:
        maps: `[..., h, w]`.
        options: `threshold` and `means` matter here.

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
    _, excess = _excess(maps, options.means)
    return np.asarray(excess[..., :-1, :] > _limit(options.threshold))


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
    >>> round(float(-(np.log(1 / 3) / 3 + np.log(2 / 3) * 2 / 3)), 4)
    0.6365
    """
    options = CriteriaOptions(entropy=weight, threshold=threshold, means=means)
    return head_statistics(maps, options).spatial_entropy


def _measure(maps: NDArray[np.floating[Any]], options: CriteriaOptions) -> tuple[NDArray[Any], ...]:
    """Attention sum, area entropy, mass entropy, number of components and bottom-row flag of maps `(n, h, w)`."""
    n, height, width = maps.shape
    sums, excess = _excess(maps, options.means)
    # Inactive in one row more below each map and one cell more before each row, which keep maps and rows apart.
    active = np.zeros((n, height + 1, width + 1), dtype=np.bool_)
    active[..., 1:] = excess > _limit(options.threshold)
    active[:, -1] = False
    owner, areas, masses = _components(active, excess)

    # Above the mean, the components hold all excess that is positive.
    at_mean = options.threshold == "mean"
    whole = _added(masses, owner, n) if at_mean else np.maximum(excess[:, :-1], 0).sum(axis=(1, 2))
    above = options.bottom_row_above
    focus = active[:, -2, 1:].all(axis=1) if above is None else (maps[:, -1] > above).any(axis=1)
    entropies = _entropy(areas, _added(areas, owner, n), owner), _entropy(masses, whole, owner)
    return sums, *entropies, np.bincount(owner, minlength=n), np.asarray(focus)


def _excess(
    maps: NDArray[np.floating[Any]], means: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum of each map, `[...]`, and `A - means * mean(A)`, `[..., h + 1, w]`; both are computed in float64.

    The row more below each map takes away what the columns above it add up to. So the integral image of maps one
    below the other begins at 0 with each of them, and loses no digits of a faint map that follows a strong one.
    """
    maps = _as_maps(maps)
    *stack, height, width = maps.shape
    excess = np.empty((*stack, height + 1, width))
    excess[..., :-1, :] = maps
    columns = np.ones(height) @ excess[..., :-1, :]
    sums = columns.sum(axis=-1)
    if not np.isfinite(sums).all():  # so exactly if all cells are: one look per map instead of one per cell
        raise NotFiniteError
    # A rounded mean may fall an ulp below the smallest cell, and a constant map would be active everywhere.
    taken = means * np.maximum(sums / (height * width), maps.min(axis=(-2, -1)))
    excess[..., -1, :] = 0
    excess -= taken[..., None, None]
    excess[..., -1, :] = height * taken[..., None] - columns
    return sums, excess


def _components(
    active: NDArray[np.bool_], excess: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """The map, the area and the mass of every component, in the order of the labels.

    Both are added up over runs, the neighbouring active cells of one row: far fewer than cells. Between the ends of
    a run lies its area, and between what an integral image has there its mass.

    Args:
        active: `(n, h + 1, w + 1)`, inactive in the last row and the first column of each map.
        excess: `(n, h + 1, w)`, as `_excess` has it.
    """
    count, labels = label_separated(active)
    flat = active.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1])  # in turn: the place before a run, and the run's last
    if not ends.size:
        return ends, np.zeros(0), np.zeros(0)
    integral = cv2.integral(excess.reshape(-1, excess.shape[-1]), sdepth=cv2.CV_64F).ravel()
    upto = integral[active.shape[-1] :].take(ends) - integral.take(ends)  # the row's cells up to there
    last = ends[1::2]
    label = labels.ravel()[last].astype(np.intp)  # (runs,)

    def by_component(upto: NDArray[Any]) -> NDArray[np.float64]:
        return _added(upto[1::2] - upto[::2], label, count)[1:]

    place = np.empty(count, dtype=np.intp)
    place[label] = last
    return place[1:] // active[0].size, by_component(ends), by_component(upto)


def _entropy(
    parts: NDArray[np.float64], whole: NDArray[np.float64], owner: NDArray[np.intp]
) -> NDArray[np.float64]:
    """`-sum p ln p` over each map's parts, as shares of the map's whole `(n,)`; +inf where the whole is 0."""
    # Sums in different orders: rounding makes a lone component's share exactly 1.
    shares = np.round(parts / whole[owner], 12)
    # Whole numbers: their sum does not depend on where the components lie, so that ties are ties.
    terms = np.rint(special.xlogy(shares, shares) * 2.0**45)
    entropy = np.abs(_added(terms, owner, len(whole))) / 2.0**45
    return np.where(whole > 0, entropy, np.inf)


def _added(values: NDArray[Any], group: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    """Sum of the values of each group: float64 `(groups,)`."""
    return np.asarray(np.bincount(group, weights=values, minlength=groups), dtype=np.float64)


def _limit(threshold: Threshold) -> float:
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
