"""Heads ranked by selection frequency over all samples (Sec. 4.3), with its spread over random draws.

`add_sensitivity` adds criterion 3 to a ranking, which `criteria=robust` then orders it by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localization_heads.heads.criteria import attention_sum_threshold, keep_heads
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import entropy_order, select_in_sample
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.options.groups import CriteriaOptions

NONE_KEPT = "no head passes criterion 1 on average"
"""Message for a ranking without localization heads."""

CHUNK_VALUES = 1 << 18
"""Values of one array that are read at a time: 2 MB in float64."""


class SampleArray(Protocol):
    """Values `[sample, layer, head]`: an array, a memory map, or a view of a file that reads only what is indexed."""

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
    """Rank every head by its selection frequency (Sec. 4.3), with the frequency's spread over random trials.

    If there are more than `num_samples` samples, each trial draws `num_samples` of them without replacement; frequency,
    sums and tau are means over the trials, and the spread is the standard deviation. Otherwise every draw would be the
    whole pool and the spread 0, so frequency, sums and tau are those of the whole pool, and the spread is that of
    `num_trials` bootstrap resamples.

    Kept heads come first; ties in frequency go to the higher mean attention sum, then the lower layer, then the lower
    head. With `options.per_sample`, criterion 1 uses each sample's own elbow (`select_in_sample`): tau is the mean of
    these, and a head is kept if it passes in any sample.

    Args:
        sums: attention sums, `[sample, layer, head]`, read in chunks.
        entropies: spatial entropies, `[sample, layer, head]`, read in chunks.
        bottom_row: flags `[sample, layer, head]`, needed for `options.bottom_row_filter`.
        draws: how often each trial holds each sample, `[trial, sample]`, from `random_draws` for a larger pool; by
            default they are drawn from the samples given. Trials may differ in size if samples of the pool were
            unusable; every drawn sample counts the same.
        seed: of the draws.

    Raises:
        ValueError: for shapes that differ, no sample, numbers below 1 or sums that are not finite.

    >>> sums = np.full((20, 4, 2), 0.1)  # sample, layer, head
    >>> sums[:, 3, 1] = 0.9
    >>> ranking = rank_heads(sums, np.ones_like(sums), top_n=1)
    >>> ranking.top(1), ranking.heads[0].selection_frequency
    ([Head(layer=3, head=1)], 1.0)
    """
    options = options or CriteriaOptions()
    _check_shapes(sums, entropies, bottom_row, options)
    for name, value in (("top_n", top_n), ("num_trials", num_trials), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    pool = _Pool(sums, entropies, bottom_row if options.bottom_row_filter else None)
    if draws is None:
        draws = random_draws(len(sums), num_trials, num_samples, seed)
    else:
        draws = _non_empty_draws(draws, len(sums))
    trials = spread_trials = _run_trials(pool, draws, options, top_n)
    is_single_draw = len(draws) == 1
    if is_single_draw:
        resamples = _bootstrap_draws(np.random.default_rng(seed), draws[0], num_trials)
        spread_trials = _run_trials(pool, resamples, options, top_n)
    tau, heads = _ranked_heads(trials, spread_trials, options)
    return HeadRanking(
        heads=heads,
        tau=tau,
        top_n=top_n,
        num_samples=int(trials.sizes.max()),
        num_trials=num_trials,
        options=options,
        model=model,
        spread="bootstrap" if is_single_draw else "draws",
    )


@dataclass(frozen=True)
class _Pool:
    """The statistics of all samples, each `[sample, layer, head]`, on disk or in memory."""

    sums: SampleArray
    entropies: SampleArray
    bottom_row: SampleArray | None

    def chunks(self, draws: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
        """Indices of the samples that any draw holds, in chunks of about `CHUNK_VALUES` values."""
        used = np.flatnonzero(draws.any(axis=0))
        size = max(1, CHUNK_VALUES // math.prod(self.sums.shape[1:]))
        for start in range(0, used.size, size):
            yield used[start : start + size]


@dataclass(frozen=True)
class _Trials:
    """The result of each trial, `[trial, layer, head]` unless stated.

    Args:
        sizes: number of samples, `[trial]`.
        counts: number of samples that selected the head.
        sums: mean attention sum.
        tau: threshold of criterion 1, `[trial]`; NaN if there is none.
        entropy: total of the finite spatial entropies.
        finite: number of finite spatial entropies.
        kept: whether the head passes criterion 1, by its mean sum or (`per_sample`) in any sample.
    """

    sizes: NDArray[np.int64]
    counts: NDArray[np.float64]
    sums: NDArray[np.float64]
    tau: NDArray[np.float64]
    entropy: NDArray[np.float64]
    finite: NDArray[np.float64]
    kept: NDArray[np.bool_]


def random_draws(pool: int, num_trials: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """How often each trial holds each of `pool` samples, `[trial, sample]`: `num_samples` without replacement.

    If the pool is not larger than `num_samples`, all draws would be the same: the result is one row of ones.

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
    """How often each bootstrap resample of one draw holds each sample, `[trial, sample]`."""
    drawn = np.flatnonzero(draw)
    resamples = [drawn[rng.integers(drawn.size, size=drawn.size)] for _ in range(num_trials)]
    return np.stack([np.bincount(resample, minlength=draw.size) for resample in resamples])


def _run_trials(pool: _Pool, draws: NDArray[np.int64], options: CriteriaOptions, top_n: int) -> _Trials:
    shape = (len(draws), *pool.sums.shape[1:])  # (trial, layer, head)
    sizes = draws.sum(axis=1)
    sums = (_total_sums(pool, draws) / sizes[:, None]).reshape(shape)
    if options.per_sample:
        counts, kept, tau = _count_selections_per_sample(pool, draws, options, top_n)
    else:
        kept = np.stack([keep_heads(trial, options) for trial in sums])
        tau = np.array([_tau(trial, options) for trial in sums])
        counts = _count_selections(pool, draws, kept.reshape(len(draws), -1), options, top_n).reshape(shape)
    entropy, finite = _total_entropies(pool, draws)
    return _Trials(sizes, counts, sums, tau, entropy.reshape(shape), finite.reshape(shape), kept)


def _total_sums(pool: _Pool, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Attention sums added up over each draw, `[trial, layer * head]`. ValueError if any is not finite."""
    total = np.zeros((len(draws), math.prod(pool.sums.shape[1:])))
    for rows in pool.chunks(draws):
        values = pool.sums[rows].reshape(rows.size, -1).astype(np.float64)
        total += _weighted_sum(draws[:, rows], values)
    if not np.isfinite(total).all():
        raise ValueError("attention sums must be finite: they hold NaN or infinite values")
    return total


def _total_entropies(pool: _Pool, draws: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Total and number of the finite entropies over each draw, `[trial, layer * head]`."""
    entropy, finite = (np.zeros((len(draws), math.prod(pool.sums.shape[1:]))) for _ in range(2))
    for rows in pool.chunks(draws):
        values = pool.entropies[rows].reshape(rows.size, -1)
        usable = np.isfinite(values)
        entropy += _weighted_sum(draws[:, rows], np.where(usable, values, 0.0))
        finite += _weighted_sum(draws[:, rows], usable.astype(np.float64))
    return entropy, finite


def _count_selections(
    pool: _Pool, draws: NDArray[np.int64], kept: NDArray[np.bool_], options: CriteriaOptions, top_n: int
) -> NDArray[np.float64]:
    """Number of samples that select each head, `[trial, layer * head]`: criterion 2 among the trial's kept heads."""
    counts = np.zeros(kept.shape)
    for rows in pool.chunks(draws):
        weights = draws[:, rows]
        values = pool.entropies[rows].reshape(rows.size, -1)
        usable = np.isfinite(values)
        if pool.bottom_row is not None:
            usable &= ~pool.bottom_row[rows].reshape(rows.size, -1).astype(bool)
        order = entropy_order(pool.sums[rows].reshape(rows.size, -1), values, options.ties)
        usable = np.take_along_axis(usable, order, axis=1)  # in the order of `order`, best head first
        for trial, allowed in enumerate(kept):
            candidates = usable & allowed[order]
            sample, rank = np.nonzero(candidates & (candidates.cumsum(axis=1) <= top_n))
            counts[trial] += np.bincount(order[sample, rank], weights=weights[trial, sample], minlength=kept.shape[1])
    return counts


def _count_selections_per_sample(
    pool: _Pool, draws: NDArray[np.int64], options: CriteriaOptions, top_n: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """The same with each sample's own elbow: counts and kept heads `[trial, layer, head]`, and mean tau `[trial]`."""
    shape = pool.sums.shape[1:]
    counts, kept = np.zeros((len(draws), *shape)), np.zeros((len(draws), *shape), dtype=bool)
    tau = np.zeros(len(draws))
    for rows in pool.chunks(draws):
        flags = np.zeros((rows.size, *shape), bool) if pool.bottom_row is None else pool.bottom_row[rows]
        samples = zip(pool.sums[rows], pool.entropies[rows], flags.astype(bool), draws[:, rows].T, strict=True)
        for sums, entropy, bottom_row, weights in samples:
            for head in select_in_sample(sums, entropy, bottom_row, options, top_n):
                counts[:, head.layer, head.head] += weights
            kept[weights > 0] |= keep_heads(sums, options)
            tau += weights * _tau(sums, options)
    return counts, kept, tau / draws.sum(axis=1)


def _weighted_sum(weights: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`weights [trial, sample] @ values [sample, head]`, summed in sample order on any machine, unlike BLAS."""
    return np.asarray(np.einsum("ts,sn->tn", weights.astype(np.float64), values))


def _tau(sums: NDArray[np.floating[Any]], options: CriteriaOptions) -> float:
    """The threshold of criterion 1; NaN if it has none."""
    if options.elbow == "index":
        return math.nan
    if options.tau is not None:
        return float(options.tau)
    return attention_sum_threshold(sums, options)


def _ranked_heads(
    trials: _Trials, spread_trials: _Trials, options: CriteriaOptions
) -> tuple[float | None, tuple[RankedHead, ...]]:
    """tau and every head, best first: means over `trials`, standard deviations over `spread_trials`."""
    # tau is averaged as if it were another head: with the same additions in the same order, a head whose sum is tau
    # in every trial still passes.
    means = np.column_stack([trials.sums.reshape(len(trials.tau), -1), trials.tau]).mean(axis=0)
    tau = None if options.elbow == "index" else float(means[-1])
    sums = means[:-1].reshape(trials.sums.shape[1:])
    kept_in_any: NDArray[np.bool_] = np.logical_or.reduce(trials.kept, axis=0)
    kept = kept_in_any if options.per_sample else keep_heads(sums, replace(options, tau=tau))
    # A ratio of integers: averaging the trials' frequencies would break ties by rounding.
    frequency = trials.counts.sum(axis=0) / trials.sizes.sum()
    deviation = (spread_trials.counts / spread_trials.sizes[:, None, None]).std(axis=0)
    finite = trials.finite.sum(axis=0)
    entropy = trials.entropy.sum(axis=0) / np.maximum(finite, 1)
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
    heads.sort(key=lambda h: (not h.kept, -h.selection_frequency, -h.attention_sum))  # stable: then layer, head
    return tau, tuple(heads)


def _non_empty_draws(draws: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """The draws without trials that have no usable sample."""
    if draws.ndim != 2 or draws.shape[1] != num_samples:
        raise ValueError(f"draws must be [trial, sample] for {num_samples} samples, not {draws.shape}")
    if not draws.any():
        raise ValueError("draws must hold at least one of the samples")
    return draws[draws.any(axis=1)]


def _check_shapes(
    sums: SampleArray, entropies: SampleArray, bottom_row: SampleArray | None, options: CriteriaOptions
) -> None:
    if sums.ndim != 3 or sums.shape != entropies.shape or 0 in sums.shape:
        raise ValueError(f"sums and entropies must both be [sample, layer, head]: {sums.shape}, {entropies.shape}")
    if options.bottom_row_filter and (bottom_row is None or bottom_row.shape != sums.shape):
        raise ValueError("bottom_row_filter needs the bottom-row flags of every head in every sample")


def add_sensitivity(ranking: HeadRanking, means: SensitivityStatistics) -> HeadRanking:
    """The ranking with each head's mean sensitivity and consistency, reordered by them if its options say so.

    With `options.sensitivity="siblings"` the heads that criterion 1 keeps are ranked by `RankedHead.sensitivity_score`,
    then by selection frequency, attention sum, layer and head; heads without a score come last. With `"none"` the
    order stays the paper's.
    """
    heads = [_with_sensitivity(head, means) for head in ranking.heads]
    if ranking.options.sensitivity != "none":
        heads.sort(key=_by_sensitivity)  # stable: ties stay in the paper's order
    return replace(ranking, heads=tuple(heads))


def _with_sensitivity(head: RankedHead, means: SensitivityStatistics) -> RankedHead:
    values = (float(mean[head.address]) for mean in means)
    sensitivity, consistency = (None if math.isnan(value) else value for value in values)
    return replace(head, sensitivity=sensitivity, consistency=consistency)


def _by_sensitivity(head: RankedHead) -> tuple[bool, bool, float]:
    score = head.sensitivity_score
    return not head.kept, score is None, 0.0 if score is None else -round(score, 6)


def top_by_paper_criteria(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by the paper's two criteria, even if the ranking is ordered by sensitivity."""
    return [head.address for head in _in_paper_order(ranking)[:k]]


def _in_paper_order(ranking: HeadRanking) -> list[RankedHead]:
    return sorted(ranking.kept, key=lambda head: (-head.selection_frequency, -head.attention_sum, head.address))


def top_by_sensitivity(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by sensitivity score; empty if it was not measured."""
    if not ranking.has_sensitivity:
        return []
    return [head.address for head in sorted(_in_paper_order(ranking), key=_by_sensitivity)[:k]]


def describe_disagreement(ranking: HeadRanking, k: int) -> str | None:
    """One sentence if the first `k` heads by the paper's criteria and by sensitivity differ; None if they agree.

    None as well if sensitivity was not measured.
    """
    paper, robust = top_by_paper_criteria(ranking, k), top_by_sensitivity(ranking, k)
    if not robust or set(paper) == set(robust):
        return None
    by_address = {head.address: head for head in ranking.kept}
    doubtful = ", ".join(
        f"{head} (sensitivity score {by_address[head].sensitivity_score or 0:.2f})"
        for head in paper
        if head not in robust
    )
    return (
        f"the paper's two criteria put {_names(paper)} first, and the heads whose maps follow the expression are "
        f"{_names(robust)} (criteria=robust): look at the maps of {doubtful}, which follow it less"
    )


def _names(heads: list[Head]) -> str:
    return " ".join(map(str, heads))
