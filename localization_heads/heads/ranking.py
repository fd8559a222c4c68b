"""Heads ranked over all samples by selection frequency (Sec. 4.3), with the spread of random draws.

With the third criterion: which heads come first, and where the paper's two criteria were fooled.
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
"""Then there are no localization heads: a ranking lists none as kept, and what needs some says so."""

CHUNK_VALUES = 1 << 18
"""Numbers of one array that are in memory at a time: 2 MB in float64."""


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

    Heads are ranked by kept first, frequency, then mean attention sum, then layer, then head. With
    `options.per_sample` criterion 1 is applied to each sample by its own elbow (`select_in_sample`): tau is the average
    of these, and a head is kept if it passes in any sample.

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
    kept: NDArray[np.bool_]  # by criterion 1: of the trial's average, or in any of its samples


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
    sums = (_mean_sums(pool, draws) / sizes[:, None]).reshape(shape)
    if options.per_sample:
        counts, kept, tau = _own_marks(pool, draws, options, top_n)
    else:
        kept = np.stack([keep_heads(trial, options) for trial in sums])
        counts = _marks(pool, draws, kept.reshape(len(draws), -1), options, top_n).reshape(shape)
        tau = np.array([_tau(trial, options) for trial in sums])
    entropy, finite = _mean_entropies(pool, draws)
    return _Trials(sizes, counts, sums, tau, entropy.reshape(shape), finite.reshape(shape), kept)


def _mean_sums(pool: _Pool, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """First pass: attention sums added up over each draw, `[trial, head]`; finite or a ValueError."""
    total = np.zeros((len(draws), math.prod(pool.sums.shape[1:])))
    for rows in pool.chunks(draws):
        values = pool.sums[rows].reshape(rows.size, -1).astype(np.float64)
        total += _weighted(draws[:, rows], values)
    if not np.isfinite(total).all():
        raise ValueError("attention sums must be finite: they hold NaN or infinite values")
    return total


def _mean_entropies(pool: _Pool, draws: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Finite entropies of each head, `[trial, head]`: their total over each draw, and how many there are."""
    entropy, finite = (np.zeros((len(draws), math.prod(pool.sums.shape[1:]))) for _ in range(2))
    for rows in pool.chunks(draws):
        values = pool.entropies[rows].reshape(rows.size, -1)
        usable = np.isfinite(values)
        entropy += _weighted(draws[:, rows], np.where(usable, values, 0.0))
        finite += _weighted(draws[:, rows], usable.astype(np.float64))
    return entropy, finite


def _marks(
    pool: _Pool, draws: NDArray[np.int64], kept: NDArray[np.bool_], options: CriteriaOptions, top_n: int
) -> NDArray[np.float64]:
    """Second pass: how often each trial marked each of the heads it kept, `[trial, head]`."""
    counts = np.zeros(kept.shape)
    for rows in pool.chunks(draws):
        weights = draws[:, rows]
        values = pool.entropies[rows].reshape(rows.size, -1)
        usable = np.isfinite(values)
        if pool.bottom_row is not None:
            usable &= ~pool.bottom_row[rows].reshape(rows.size, -1).astype(bool)
        order = entropy_order(pool.sums[rows].reshape(rows.size, -1), values, options.ties)
        usable = np.take_along_axis(usable, order, axis=1)  # best head first, as `order`
        for trial, allowed in enumerate(kept):
            candidates = usable & allowed[order]
            sample, place = np.nonzero(candidates & (candidates.cumsum(axis=1) <= top_n))
            counts[trial] += np.bincount(
                order[sample, place], weights=weights[trial, sample], minlength=kept.shape[1]
            )
    return counts


def _own_marks(
    pool: _Pool, draws: NDArray[np.int64], options: CriteriaOptions, top_n: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """The same where each sample has its own elbow: marks and heads kept `[trial, layer, head]`, mean tau `[trial]`."""
    shape = pool.sums.shape[1:]
    counts, kept = np.zeros((len(draws), *shape)), np.zeros((len(draws), *shape), dtype=bool)
    tau = np.zeros(len(draws))
    for rows in pool.chunks(draws):
        flags = np.zeros((rows.size, *shape), bool) if pool.bottom_row is None else pool.bottom_row[rows]
        samples = zip(
            pool.sums[rows], pool.entropies[rows], flags.astype(bool), draws[:, rows].T, strict=True
        )
        for sums, entropy, bottom_row, weights in samples:
            for head in select_in_sample(sums, entropy, bottom_row, options, top_n):
                counts[:, head.layer, head.head] += weights
            kept[weights > 0] |= keep_heads(sums, options)
            tau += weights * _tau(sums, options)
    return counts, kept, tau / draws.sum(axis=1)


def _weighted(weights: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`weights [trial, sample] @ values [sample, head]`, adding in sample order whatever the machine."""
    return np.asarray(np.einsum("ts,sn->tn", weights.astype(np.float64), values))


def _tau(sums: NDArray[np.floating[Any]], options: CriteriaOptions) -> float:
    """The threshold of criterion 1; NaN where the rule has none."""
    if options.elbow == "index":
        return math.nan
    if options.tau is not None:
        return float(options.tau)
    return attention_sum_threshold(sums, options)


def _ranked(
    centre: _Trials, spread: _Trials, options: CriteriaOptions
) -> tuple[float | None, tuple[RankedHead, ...]]:
    """tau and every head, best first: means over the trials of `centre`, deviations over `spread`."""
    # tau travels as one more head: the same additions in the same order, so that the head whose sum is tau
    # in every trial still reaches it.
    means = np.column_stack([centre.sums.reshape(len(centre.tau), -1), centre.tau]).mean(axis=0)
    tau = None if options.elbow == "index" else float(means[-1])
    sums = means[:-1].reshape(centre.sums.shape[1:])
    own: NDArray[np.bool_] = np.logical_or.reduce(centre.kept, axis=0)  # in any sample of any trial
    kept = own if options.per_sample else keep_heads(sums, replace(options, tau=tau))
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


def _checked(draws: NDArray[np.int64], sums: SampleArray) -> NDArray[np.int64]:
    """Given draws without the trials that no usable sample is left of."""
    if draws.ndim != 2 or draws.shape[1] != len(sums):
        raise ValueError(f"draws must be [trial, sample] for {len(sums)} samples, not {draws.shape}")
    if not draws.any():
        raise ValueError("draws must hold at least one of the samples")
    return draws[draws.any(axis=1)]


def _check_pool(
    sums: SampleArray, entropies: SampleArray, bottom_row: SampleArray | None, options: CriteriaOptions
) -> None:
    if sums.ndim != 3 or sums.shape != entropies.shape or 0 in sums.shape:
        raise ValueError(
            f"sums and entropies must both be [sample, layer, head]: {sums.shape}, {entropies.shape}"
        )
    if options.bottom_row_filter and (bottom_row is None or bottom_row.shape != sums.shape):
        raise ValueError("bottom_row_filter needs the bottom-row flags of every head in every sample")


def add_sensitivity(ranking: HeadRanking, means: SensitivityStatistics) -> HeadRanking:
    """The ranking with each head's sensitivity and consistency, in the order that its options ask for.

    With `options.sensitivity="siblings"` the heads that criterion 1 keeps are ranked by `RankedHead.sensitivity_score`,
    then by selection frequency, attention sum, layer and head; heads without a score come last. With `"none"` the
    order stays the paper's.
    """
    heads = [_with(head, means) for head in ranking.heads]
    if ranking.options.sensitivity != "none":
        heads.sort(key=_by_sensitivity)  # stable: ties stay in the paper's order
    return replace(ranking, heads=tuple(heads))


def _with(head: RankedHead, means: SensitivityStatistics) -> RankedHead:
    known = (float(values[head.address]) for values in means)
    sensitivity, consistency = (None if math.isnan(value) else value for value in known)
    return replace(head, sensitivity=sensitivity, consistency=consistency)


def _by_sensitivity(head: RankedHead) -> tuple[bool, bool, float]:
    score = head.sensitivity_score
    return not head.kept, score is None, 0.0 if score is None else -round(score, 6)


def top_by_paper_criteria(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by the paper's two criteria, whatever the ranking is ordered by."""
    return [head.address for head in _papers_order(ranking)[:k]]


def _papers_order(ranking: HeadRanking) -> list[RankedHead]:
    return sorted(
        ranking.kept, key=lambda head: (-head.selection_frequency, -head.attention_sum, head.address)
    )


def top_by_sensitivity(ranking: HeadRanking, k: int) -> list[Head]:
    """The first `k` heads by sensitivity score; none where it was not measured."""
    if not ranking.has_sensitivity:
        return []
    return [head.address for head in sorted(_papers_order(ranking), key=_by_sensitivity)[:k]]


def describe_disagreement(ranking: HeadRanking, k: int) -> str | None:
    """One sentence where the first `k` heads of the two rankings are not the same; None where they are, or where the
    sensitivity was not measured.
    """
    paper, robust = top_by_paper_criteria(ranking, k), top_by_sensitivity(ranking, k)
    if not robust or set(paper) == set(robust):
        return None
    resting = [head for head in paper if head not in robust]
    named = {head.address: head for head in ranking.kept}
    facts = ", ".join(
        f"{head} (sensitivity score {named[head].sensitivity_score or 0:.2f})" for head in resting
    )
    return (
        f"the paper's two criteria put {_names(paper)} first, and the heads whose maps follow the expression are "
        f"{_names(robust)} (criteria=robust): look at the maps of {facts}, which follow it less"
    )


def _names(heads: list[Head]) -> str:
    return " ".join(map(str, heads))
