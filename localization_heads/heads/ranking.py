"""Selection frequency: which heads come out best, sample after sample (Sec. 4.3 of the paper).

Per draw of samples: average the attention sums, keep the heads above the elbow (criterion 1), then mark in
every sample the `top_n` kept heads of lowest spatial entropy (criterion 2). A head's selection frequency is
the share of samples that marked it. The threshold needs the average first, so the data are read twice, in
chunks: `rank_heads` takes memory maps of any length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.heads.criteria import CriteriaOptions, attention_sum_threshold, keep_heads
from localization_heads.heads.head import Head

CHUNK_VALUES = 1 << 18
"""Numbers of one array that are in memory at a time: 2 MB in float64."""


@dataclass(frozen=True)
class RankedHead:
    """One head with its evidence; averages are over the samples drawn.

    Args:
        selection_frequency: share of the samples that marked it, averaged over the trials, 0 to 1.
        selection_frequency_std: its (population) standard deviation over the trials.
        attention_sum: mean attention sum.
        spatial_entropy: mean over the samples where it is finite, in nats; none if there is no such sample.
        kept: whether criterion 1 keeps it.
    """

    layer: int
    head: int
    selection_frequency: float
    selection_frequency_std: float
    attention_sum: float
    spatial_entropy: float | None
    kept: bool = True

    @property
    def address(self) -> Head:
        return Head(self.layer, self.head)


@dataclass(frozen=True)
class HeadRanking:
    """The heads of a model, best first, and the recipe that ranked them.

    `heads` holds every head of the model, the kept ones first; read back from JSON, the kept ones only.
    `tau` is the threshold of criterion 1 averaged over the trials; none for `elbow="index"`, which has none.
    """

    heads: tuple[RankedHead, ...]
    tau: float | None
    top_n: int
    num_samples: int
    num_trials: int
    options: CriteriaOptions = field(default_factory=CriteriaOptions)
    model: str = ""

    CSV_HEADER = (
        "rank",
        "layer",
        "head",
        "selection_frequency",
        "selection_frequency_std",
        "attention_sum",
        "spatial_entropy",
        "kept",
    )

    @property
    def exclude_layers(self) -> int:
        return self.options.exclude_layers

    @property
    def kept(self) -> tuple[RankedHead, ...]:
        """The heads that pass criterion 1, best first."""
        return tuple(head for head in self.heads if head.kept)

    def top(self, k: int = 3) -> list[Head]:
        """The `k` localization heads (Sec. 4.3; the paper takes three).

        Raises:
            ValueError: if fewer than `k` heads passed criterion 1, or `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"the number of heads must be at least 1, not {k}")
        if len(self.kept) < k:
            raise ValueError(f"only {len(self.kept)} heads passed criterion 1: {k} cannot be taken")
        return [head.address for head in self.kept[:k]]

    def csv_rows(self) -> Iterator[tuple[object, ...]]:
        """A row a head, ranked from 1, in the order of `CSV_HEADER`; a missing entropy is empty."""
        for rank, head in enumerate(self.heads, start=1):
            entropy = "" if head.spatial_entropy is None else _rounded(head.spatial_entropy)
            frequency = _rounded(head.selection_frequency), _rounded(head.selection_frequency_std)
            yield (
                rank,
                head.layer,
                head.head,
                *frequency,
                _rounded(head.attention_sum),
                entropy,
                int(head.kept),
            )

    def to_json(self) -> dict[str, Any]:
        """The content of `heads.json`: plain values, numbers rounded to six decimals, kept heads only."""
        return {
            "version": 1,
            "model": self.model,
            "num_samples": self.num_samples,
            "num_trials": self.num_trials,
            "tau": None if self.tau is None else _rounded(self.tau),
            "top_n": self.top_n,
            "exclude_layers": self.options.exclude_layers,
            "criteria": {
                "entropy": self.options.entropy,
                "threshold": self.options.threshold,
                "elbow": self.options.elbow,
                "bottom_row_filter": self.options.bottom_row_filter,
                "tau": self.options.tau,
            },
            "heads": [_head_to_json(head) for head in self.kept],
        }

    @classmethod
    def from_json(cls, data: object) -> HeadRanking:
        """Read what `to_json` wrote, or a hand-made file with the same keys; the order of heads is kept.

        Raises:
            UsageError: naming what is wrong, for anything that is not such a ranking.
        """
        fields = _Fields(data, "heads.json")
        if fields.integer("version", 1) != 1:
            raise UsageError(f"heads.json: version must be 1, not {fields.values['version']!r}")
        heads = tuple(_head_from_json(entry, number) for number, entry in enumerate(fields.sequence("heads")))
        addresses = [head.address for head in heads]
        if len(set(addresses)) < len(addresses):
            twice = next(address for address in addresses if addresses.count(address) > 1)
            raise UsageError(f"heads.json: {twice} is listed twice")
        return cls(
            heads=heads,
            tau=fields.number("tau"),
            top_n=fields.integer("top_n", 1),
            num_samples=fields.integer("num_samples", 1),
            num_trials=fields.integer("num_trials", 1),
            options=_options_from_json(fields),
            model=fields.text("model"),
        )


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
        sums, entropy, kept: `[layer, head]`.

    Returns:
        At most `top_n` heads; fewer if fewer have a finite entropy.
    """
    order = _by_entropy(sums.reshape(1, -1), entropy.reshape(1, -1))[0]
    allowed = (kept & np.isfinite(entropy)).ravel()
    chosen = [index for index in order if allowed[index]][:top_n]
    return [Head(*divmod(int(index), sums.shape[1])) for index in chosen]


def rank_heads(
    sums: NDArray[np.floating[Any]],
    entropies: NDArray[np.floating[Any]],
    *,
    options: CriteriaOptions | None = None,
    top_n: int = 10,
    num_trials: int = 5,
    num_samples: int = 1000,
    seed: int = 42,
    bottom_row: NDArray[np.bool_] | None = None,
    model: str = "",
) -> HeadRanking:
    """Selection frequency of every head (Sec. 4.3), with its spread over random trials.

    A pool of more than `num_samples` samples: each trial draws `num_samples` of them without replacement;
    frequency, sums and tau are means over the trials, the spread is their standard deviation. A smaller
    pool: every such draw would be the whole pool and the spread a meaningless 0, so frequency, sums and tau
    are those of the whole pool and the spread comes from `num_trials` bootstrap resamples of it.

    Heads are ranked by kept first, frequency, then mean attention sum, then layer, then head.

    Args:
        sums, entropies: `[sample, layer, head]`, arrays or memory maps; read in chunks.
        bottom_row: the flags `[sample, layer, head]` that `options.bottom_row_filter` needs.
        seed: the same seed and samples give the same ranking.

    Raises:
        ValueError: for shapes that differ, no sample, numbers below 1 or sums that are not finite.
    """
    options = options or CriteriaOptions()
    _check_pool(sums, entropies, bottom_row, options)
    for name, value in (("top_n", top_n), ("num_trials", num_trials), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    pool = _Pool(sums, entropies, bottom_row if options.bottom_row_filter else None)
    rng = np.random.default_rng(seed)
    if len(sums) > num_samples:
        centre = spread = _run_trials(
            pool, _random_draws(rng, len(sums), num_trials, num_samples), options, top_n
        )
    else:
        centre = _run_trials(pool, np.ones((1, len(sums)), dtype=np.int64), options, top_n)
        spread = _run_trials(pool, _bootstrap_draws(rng, len(sums), num_trials), options, top_n)
    tau, heads = _ranked(centre, spread, options)
    return HeadRanking(
        heads=heads,
        tau=tau,
        top_n=top_n,
        num_samples=min(len(sums), num_samples),
        num_trials=num_trials,
        options=options,
        model=model,
    )


@dataclass(frozen=True)
class _Pool:
    """All samples, `[sample, layer, head]` each, on disk or in memory."""

    sums: NDArray[np.floating[Any]]
    entropies: NDArray[np.floating[Any]]
    bottom_row: NDArray[np.bool_] | None

    def chunks(self, draws: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
        """The samples that any draw holds, a memory-friendly number at a time."""
        used = np.flatnonzero(draws.any(axis=0))
        size = max(1, CHUNK_VALUES // self.sums[0].size)
        for start in range(0, used.size, size):
            yield used[start : start + size]


@dataclass(frozen=True)
class _Trials:
    """What each trial found, `[trial, layer, head]`; tau is `[trial]`, NaN where the rule has none."""

    frequency: NDArray[np.float64]
    sums: NDArray[np.float64]
    tau: NDArray[np.float64]
    entropy: NDArray[np.float64]  # totals of the finite entropies and
    finite: NDArray[np.float64]  # how many there are


def _random_draws(rng: np.random.Generator, pool: int, num_trials: int, size: int) -> NDArray[np.int64]:
    """How often each trial holds each sample, `[trial, sample]`: `size` different samples a trial."""
    draws = np.zeros((num_trials, pool), dtype=np.int64)
    for draw in draws:
        draw[rng.choice(pool, size, replace=False)] = 1
    return draws


def _bootstrap_draws(rng: np.random.Generator, pool: int, num_trials: int) -> NDArray[np.int64]:
    """The same for resamples of the whole pool with replacement."""
    return np.stack([np.bincount(rng.integers(pool, size=pool), minlength=pool) for _ in range(num_trials)])


def _run_trials(pool: _Pool, draws: NDArray[np.int64], options: CriteriaOptions, top_n: int) -> _Trials:
    shape = (len(draws), *pool.sums.shape[1:])
    sizes = draws.sum(axis=1)[:, None]  # (trial, 1)
    sums = _mean_sums(pool, draws) / sizes
    kept = np.stack([_keep(trial.reshape(shape[1:]), options) for trial in sums])
    counts, entropy, finite = _marks(pool, draws, kept.reshape(len(draws), -1), top_n)
    taus = [_tau(trial.reshape(shape[1:]), options) for trial in sums]
    return _Trials(
        frequency=(counts / sizes).reshape(shape),
        sums=sums.reshape(shape),
        tau=np.array([math.nan if tau is None else tau for tau in taus]),
        entropy=entropy.reshape(shape),
        finite=finite.reshape(shape),
    )


def _mean_sums(pool: _Pool, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """First pass: attention sums added up over each draw, `[trial, head]`."""
    total = np.zeros((len(draws), pool.sums[0].size))
    for rows in pool.chunks(draws):
        values = pool.sums[rows].reshape(rows.size, -1).astype(np.float64)
        total += _weighted(draws[:, rows], values)
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
            usable &= ~pool.bottom_row[rows].reshape(rows.size, -1)
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
    frequency = centre.frequency.mean(axis=0)
    deviation = spread.frequency.std(axis=0)
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


def _check_pool(
    sums: NDArray[np.floating[Any]],
    entropies: NDArray[np.floating[Any]],
    bottom_row: NDArray[np.bool_] | None,
    options: CriteriaOptions,
) -> None:
    if sums.ndim != 3 or sums.shape != entropies.shape or 0 in sums.shape:
        raise ValueError(
            f"sums and entropies must both be [sample, layer, head]: {sums.shape}, {entropies.shape}"
        )
    if options.bottom_row_filter and (bottom_row is None or bottom_row.shape != sums.shape):
        raise ValueError("bottom_row_filter needs the bottom-row flags of every head in every sample")


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _head_to_json(head: RankedHead) -> dict[str, Any]:
    return {
        "layer": head.layer,
        "head": head.head,
        "selection_frequency": _rounded(head.selection_frequency),
        "selection_frequency_std": _rounded(head.selection_frequency_std),
        "attention_sum": _rounded(head.attention_sum),
        "spatial_entropy": None if head.spatial_entropy is None else _rounded(head.spatial_entropy),
    }


def _head_from_json(entry: object, number: int) -> RankedHead:
    fields = _Fields(entry, f"heads.json: heads[{number}]")
    return RankedHead(
        layer=fields.integer("layer"),
        head=fields.integer("head"),
        selection_frequency=fields.required_number("selection_frequency", 0.0, 1.0),
        selection_frequency_std=fields.required_number("selection_frequency_std", 0.0),
        attention_sum=fields.required_number("attention_sum"),
        spatial_entropy=fields.number("spatial_entropy", 0.0),
    )


def _options_from_json(fields: _Fields) -> CriteriaOptions:
    """The recipe's reading; a file without `criteria` is taken as the paper's."""
    given = fields.values.get("criteria", {})
    known = {"entropy", "threshold", "elbow", "bottom_row_filter", "tau"}
    if not isinstance(given, dict) or not set(given) <= known:
        raise UsageError(f"heads.json: criteria must hold only {', '.join(sorted(known))}")
    try:
        return CriteriaOptions(exclude_layers=fields.integer("exclude_layers"), **given)
    except ValueError as error:
        raise UsageError(f"heads.json: criteria: {error}") from None


class _Fields:
    """Typed access to a JSON object of unknown origin: anything unexpected is a `UsageError`."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where} must be an object with named fields, not {type(data).__name__}")
        self.values: dict[str, Any] = data
        self.where = where

    def get(self, name: str) -> object:
        if name not in self.values:
            raise UsageError(f"{self.where}: '{name}' is missing")
        return self.values[name]

    def integer(self, name: str, least: int = 0) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        """A finite number within the limits, or none."""
        return None if self.get(name) is None else self.required_number(name, least, most)

    def required_number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not (abs(value) < 1e300 and least <= value <= most):  # also refuses NaN and integers too large
            raise self._wrong(name, "finite" if most == math.inf else f"between {least:g} and {most:g}")
        return float(value)

    def sequence(self, name: str) -> list[object]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def _wrong(self, name: str, wanted: str) -> UsageError:
        return UsageError(f"{self.where}: '{name}' must be {wanted}, not {str(self.values[name])[:40]!r}")
