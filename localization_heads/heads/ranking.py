"""Selection frequency: which heads come out best, sample after sample (Sec. 4.3 of the paper).

Per draw of samples: average the attention sums, keep the heads above the elbow (criterion 1), then mark in
every sample the `top_n` kept heads of lowest spatial entropy (criterion 2). A head's selection frequency is
the share of samples that marked it. The threshold needs the average first, so the data are read twice, in
chunks: `rank_heads` takes memory maps of any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localization_heads.heads.criteria import CriteriaOptions, attention_sum_threshold, keep_heads
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking, RankedHead

__all__ = ["HeadRanking", "RankedHead", "random_draws", "rank_heads", "select_heads"]

CHUNK_VALUES = 1 << 18
"""Numbers of one array that are in memory at a time: 2 MB in float64."""


def select_heads(
    sums: NDArray[np.floating[Any]],
    entropy: NDArray[np.floating[Any]],
    kept: NDArray[np.bool_],
    top_n: int = 10,
) -> list[Head]:
    """Criterion 2 in one sample: the `top_n` kept heads of lowest finite spatial entropy, best first.

    Ties (many heads have entropy 0 on small grids) go to the higher attention sum of this sample, then the
    lower layer, then the lower head.

    Args:
        sums: attention sums, `[layer, head]`.
        entropy: spatial entropies, `[layer, head]`.
        kept: what criterion 1 keeps, `[layer, head]`.

    Returns:
        At most `top_n` heads; fewer if fewer have a finite entropy.

    >>> sums = np.array([[0.5, 0.25], [0.75, 0.125]])
    >>> entropy = np.array([[1.0, 0.0], [0.0, np.inf]])
    >>> select_heads(sums, entropy, kept=sums > 0, top_n=2)
    [Head(layer=1, head=0), Head(layer=0, head=1)]
    """
    order = _by_entropy(sums.reshape(1, -1), entropy.reshape(1, -1))[0]
    allowed = (kept & np.isfinite(entropy)).ravel()
    chosen = [index for index in order if allowed[index]][:top_n]
    return [Head(*divmod(int(index), sums.shape[1])) for index in chosen]


class SampleArray(Protocol):
    """Values `[sample, layer, head]`: an array, a memory map, or a view that reads what is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def rank_heads(
    sums: SampleArray,
    entropies: SampleArray,
    *,
    options: CriteriaOptions | None = None,
    top_n: int = 10,
    num_trials: int = 5,
    num_samples: int = 1000,
    seed: int = 42,
    bottom_row: SampleArray | None = None,
    draws: NDArray[np.int64] | None = None,
    model: str = "",
) -> HeadRanking:
    """Selection frequency of every head (Sec. 4.3), with its spread over random trials.

    A pool of more than `num_samples` samples: each trial draws `num_samples` of them without replacement;
    frequency, sums and tau are means over the trials, the spread is their standard deviation. A smaller
    pool: every such draw would be the whole pool and the spread a meaningless 0, so frequency, sums and tau
    are those of the whole pool and the spread comes from `num_trials` bootstrap resamples of it.

    Heads are ranked by kept first, frequency, then mean attention sum, then layer, then head.

    Args:
        sums: attention sums, `[sample, layer, head]`, an array or a memory map; read in chunks.
        entropies: spatial entropies, likewise.
        bottom_row: the flags `[sample, layer, head]` that `options.bottom_row_filter` needs.
        draws: which samples each trial holds, `[trial, sample]`, as `random_draws` made them for a pool that
            these samples are a part of; none draws from the samples given. Where samples of the pool were
            unusable, trials differ in size: every drawn sample counts the same.
        seed: the same seed and samples give the same ranking.

    Raises:
        ValueError: for shapes that differ, no sample, numbers below 1 or sums that are not finite.

    >>> sums = np.full((20, 4, 2), 0.1)  # sample, layer, head
    >>> sums[:, 3, 1] = 0.9
    >>> ranking = rank_heads(sums, np.ones_like(sums), top_n=1)
    >>> ranking.top(1), ranking.heads[0].selection_frequency
    ([Head(layer=3, head=1)], 1.0)
    """
    options = options or CriteriaOptions()
    _check_pool(sums, entropies, bottom_row, options)
    for name, value in (("top_n", top_n), ("num_trials", num_trials), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    pool = _Pool(sums, entropies, bottom_row if options.bottom_row_filter else None)
    draws = random_draws(len(sums), num_trials, num_samples, seed) if draws is None else _checked(draws, sums)
    centre = spread = _run_trials(pool, draws, options, top_n)
    one_draw = len(draws) == 1
    if one_draw:
        resamples = _bootstrap_draws(np.random.default_rng(seed), draws[0], num_trials)
        spread = _run_trials(pool, resamples, options, top_n)
    tau, heads = _ranked(centre, spread, options)
    return HeadRanking(
        heads=heads,
        tau=tau,
        top_n=top_n,
        num_samples=int(centre.sizes.max()),
        num_trials=num_trials,
        options=options,
        model=model,
        spread="bootstrap" if one_draw else "draws",
    )


@dataclass(frozen=True)
class _Pool:
    """All samples, `[sample, layer, head]` each, on disk or in memory."""

    sums: SampleArray
    entropies: SampleArray
    bottom_row: SampleArray | None

    def chunks(self, draws: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
        """The samples that any draw holds, a memory-friendly number at a time."""
        used = np.flatnonzero(draws.any(axis=0))
        size = max(1, CHUNK_VALUES // math.prod(self.sums.shape[1:]))
        for start in range(0, used.size, size):
            yield used[start : start + size]


@dataclass(frozen=True)
class _Trials:
    """What each trial found, `[trial, layer, head]`; tau is `[trial]`, NaN where the rule has none."""

    sizes: NDArray[np.int64]  # samples of each trial
    counts: NDArray[np.float64]  # how many of them marked the head
    sums: NDArray[np.float64]
    tau: NDArray[np.float64]
    entropy: NDArray[np.float64]  # totals of the finite entropies and
    finite: NDArray[np.float64]  # how many there are


def random_draws(pool: int, num_trials: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """How often each trial holds each of `pool` samples, `[trial, sample]`: `num_samples` different ones.

    One row of ones, the whole pool, if it is not larger than `num_samples`: all draws would be the same.

    >>> random_draws(pool=3, num_trials=5, num_samples=1000, seed=42).tolist()
    [[1, 1, 1]]
    >>> random_draws(pool=9, num_trials=2, num_samples=4, seed=42).sum(axis=1).tolist()
    [4, 4]
    """
    if pool <= num_samples:
        return np.ones((1, pool), dtype=np.int64)
    rng = np.random.default_rng(seed)
    draws = np.zeros((num_trials, pool), dtype=np.int64)
    for draw in draws:
        draw[rng.choice(pool, num_samples, replace=False)] = 1
    return draws


def _bootstrap_draws(rng: np.random.Generator, draw: NDArray[np.int64], num_trials: int) -> NDArray[np.int64]:
    """The same for resamples, with replacement, of the samples of one draw."""
    held = np.flatnonzero(draw)
    resamples = [held[rng.integers(held.size, size=held.size)] for _ in range(num_trials)]
    return np.stack([np.bincount(resample, minlength=draw.size) for resample in resamples])


def _run_trials(pool: _Pool, draws: NDArray[np.int64], options: CriteriaOptions, top_n: int) -> _Trials:
    shape = (len(draws), *pool.sums.shape[1:])
    sizes = draws.sum(axis=1)
    sums = _mean_sums(pool, draws) / sizes[:, None]
    kept = np.stack([_keep(trial.reshape(shape[1:]), options) for trial in sums])
    counts, entropy, finite = _marks(pool, draws, kept.reshape(len(draws), -1), top_n)
    taus = [_tau(trial.reshape(shape[1:]), options) for trial in sums]
    return _Trials(
        sizes=sizes,
        counts=counts.reshape(shape),
        sums=sums.reshape(shape),
        tau=np.array([math.nan if tau is None else tau for tau in taus]),
        entropy=entropy.reshape(shape),
        finite=finite.reshape(shape),
    )


def _mean_sums(pool: _Pool, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """First pass: attention sums added up over each draw, `[trial, head]`; finite or a ValueError."""
    total = np.zeros((len(draws), math.prod(pool.sums.shape[1:])))
    for rows in pool.chunks(draws):
        values = pool.sums[rows].reshape(rows.size, -1).astype(np.float64)
        total += _weighted(draws[:, rows], values)
    if not np.isfinite(total).all():
        raise ValueError("attention sums must be finite: they hold NaN or infinite values")
    return total


def _marks(
    pool: _Pool, draws: NDArray[np.int64], kept: NDArray[np.bool_], top_n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Second pass: how often each trial marked each head, and its finite entropies: total and number."""
    counts, entropy, finite = (np.zeros(kept.shape) for _ in range(3))
    for rows in pool.chunks(draws):
        weights = draws[:, rows]
        values = pool.entropies[rows].reshape(rows.size, -1)
        usable = np.isfinite(values)
        entropy += _weighted(weights, np.where(usable, values, 0.0))
        finite += _weighted(weights, usable.astype(np.float64))
        if pool.bottom_row is not None:
            usable &= ~pool.bottom_row[rows].reshape(rows.size, -1).astype(bool)
        order = _by_entropy(pool.sums[rows].reshape(rows.size, -1), values)
        usable = np.take_along_axis(usable, order, axis=1)  # best head first, as `order`
        for trial, allowed in enumerate(kept):
            candidates = usable & allowed[order]
            sample, place = np.nonzero(candidates & (candidates.cumsum(axis=1) <= top_n))
            counts[trial] += np.bincount(
                order[sample, place], weights=weights[trial, sample], minlength=kept.shape[1]
            )
    return counts, entropy, finite


def _by_entropy(sums: NDArray[np.floating[Any]], entropies: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    """Heads of each sample `[sample, head]` by (entropy, higher sum, index): the tie rule in one place."""
    return np.lexsort((-sums, entropies), axis=-1)  # stable, so equal keys stay in layer, head order


def _weighted(weights: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`weights [trial, sample] @ values [sample, head]`, adding in sample order whatever the machine."""
    return np.asarray(np.einsum("ts,sn->tn", weights.astype(np.float64), values))


def _tau(sums: NDArray[np.float64], options: CriteriaOptions) -> float | None:
    if options.elbow == "index":
        return None
    if options.tau is not None:
        return float(options.tau)
    return attention_sum_threshold(sums, exclude_layers=options.exclude_layers)


def _ranked(
    centre: _Trials, spread: _Trials, options: CriteriaOptions
) -> tuple[float | None, tuple[RankedHead, ...]]:
    """tau and every head, best first: means over the trials of `centre`, deviations over `spread`."""
    # tau travels as one more head: the same additions in the same order, so that the head whose sum is tau
    # in every trial still reaches it.
    means = np.column_stack([centre.sums.reshape(len(centre.tau), -1), centre.tau]).mean(axis=0)
    tau = None if options.elbow == "index" else float(means[-1])
    sums = means[:-1].reshape(centre.sums.shape[1:])
    kept = keep_heads(sums, tau=tau, elbow=options.elbow, exclude_layers=options.exclude_layers)
    # From whole numbers: averaging the trials' frequencies would break ties by rounding.
    frequency = centre.counts.sum(axis=0) / centre.sizes.sum()
    deviation = (spread.counts / spread.sizes[:, None, None]).std(axis=0)
    finite = centre.finite.sum(axis=0)
    entropy = centre.entropy.sum(axis=0) / np.maximum(finite, 1)
    heads = [
        RankedHead(
            layer=layer,
            head=head,
            selection_frequency=float(frequency[layer, head]),
            selection_frequency_std=float(deviation[layer, head]),
            attention_sum=float(sums[layer, head]),
            spatial_entropy=float(entropy[layer, head]) if finite[layer, head] else None,
            kept=bool(kept[layer, head]),
        )
        for layer, head in np.ndindex(sums.shape)
    ]
    heads.sort(key=lambda h: (not h.kept, -h.selection_frequency, -h.attention_sum))  # stable: layer, head
    return tau, tuple(heads)


def _keep(sums: NDArray[np.float64], options: CriteriaOptions) -> NDArray[np.bool_]:
    return keep_heads(
        sums, tau=_tau(sums, options), elbow=options.elbow, exclude_layers=options.exclude_layers
    )


def _checked(draws: NDArray[np.int64], sums: SampleArray) -> NDArray[np.int64]:
    """Given draws without the trials that no usable sample is left of."""
    if draws.ndim != 2 or draws.shape[1] != len(sums):
        raise ValueError(f"draws must be [trial, sample] for {len(sums)} samples, not {draws.shape}")
    if not draws.any():
        raise ValueError("draws must hold at least one of the samples")
    return draws[draws.any(axis=1)]


def _check_pool(
    sums: SampleArray,
    entropies: SampleArray,
    bottom_row: SampleArray | None,
    options: CriteriaOptions,
) -> None:
    if sums.ndim != 3 or sums.shape != entropies.shape or 0 in sums.shape:
        raise ValueError(
            f"sums and entropies must both be [sample, layer, head]: {sums.shape}, {entropies.shape}"
        )
    if options.bottom_row_filter and (bottom_row is None or bottom_row.shape != sums.shape):
        raise ValueError("bottom_row_filter needs the bottom-row flags of every head in every sample")
