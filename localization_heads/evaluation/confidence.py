"""How far a confidence can be trusted: AUROC, risk and coverage, calibration error.

Each takes the confidences `[n]` of n answers and whether each answer was right, bool `[n]`; equal confidences always go
together. All are NaN where they are undefined (no answer; for AUROC, none of one kind).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.evaluation.metrics import NUM_RESAMPLES, percentile_interval

BINS = 10
"""Of equal width, of the calibration error and the reliability diagram."""


def auroc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a right answer has more confidence than a wrong one, ties half.

    >>> auroc([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    0.875
    """
    from scipy.stats import rankdata

    values, is_right = _both(confidence, right)
    positive = int(is_right.sum())
    negative = is_right.size - positive
    if not positive or not negative:
        return float("nan")
    above = rankdata(values)[is_right].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of wrong answers among the n answers of highest confidence, for each n: coverages and risks, `[n]`.

    Among equal confidences the wrong answers are spread evenly: no order of theirs is better than another.

    >>> coverage, risk = risk_coverage([0.9, 0.5, 0.5], [True, True, False])
    >>> coverage.round(2).tolist(), risk.round(2).tolist()
    ([0.33, 0.67, 1.0], [0.0, 0.25, 0.33])
    """
    values, is_right = _both(confidence, right)
    levels, group = np.unique(-values, return_inverse=True)
    wrong = np.bincount(group, weights=~is_right, minlength=len(levels)) / np.maximum(np.bincount(group), 1)
    ordered = np.sort(group)
    counts = np.arange(1, len(values) + 1)
    return counts / max(len(values), 1), np.cumsum(wrong[ordered]) / counts


def aurc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean of its risks (Geifman and El-Yaniv 2017). Lower is better."""
    _, risk = risk_coverage(confidence, right)
    return float(risk.mean()) if risk.size else float("nan")


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean confidence, share of right answers and count of each bin of equal width over 0 to 1; empty bins left out."""
    values, is_right = _both(confidence, right)
    place = np.clip((values * bins).astype(int), 0, bins - 1)
    return [
        (float(values[place == bin].mean()), float(is_right[place == bin].mean()), int((place == bin).sum()))
        for bin in range(bins)
        if (place == bin).any()
    ]


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over the bins, by their counts.

    >>> calibration_error([0.9, 0.9, 0.1, 0.1], [True, False, False, False])
    0.25
    """
    found = reliability(confidence, right, bins)
    total = sum(count for _, _, count in found)
    return sum(abs(mean - share) * count for mean, share, count in found) / total if total else float("nan")


def chance_error(confidence: ArrayLike, *, seed: int = 42) -> tuple[float, tuple[float, float]]:
    """The calibration error of n answers whose confidences are exact: the mean over draws, and where 95 % of them lie.

    A bin of few answers misses its confidence by chance, so that no finite sample has an error of 0.
    """
    values = np.asarray(confidence, dtype=np.float64)
    if not values.size:
        return float("nan"), (float("nan"), float("nan"))
    draw = np.random.default_rng(seed).random
    errors = np.array([calibration_error(values, draw(len(values)) < values) for _ in range(NUM_RESAMPLES)])
    low, high = percentile_interval(errors)
    return float(errors.mean()), (float(low), float(high))


def with_interval(
    statistic: Callable[[NDArray[np.float64], NDArray[np.bool_]], float],
    confidence: ArrayLike,
    right: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    seed: int = 42,
) -> tuple[float, tuple[float, float]]:
    """A statistic and its 95 % bootstrap interval; resamples in which it is undefined are left out.

    Args:
        groups: the group (image) of each answer, which are resampled as a whole; None resamples answers.
    """
    values, is_right = _both(confidence, right)
    members = _members(len(values), groups)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(NUM_RESAMPLES if len(members) > 1 else 0):
        places = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(statistic(values[places], is_right[places]))
    known = np.array([value for value in drawn if not np.isnan(value)])
    low, high = percentile_interval(known) if known.size else (float("nan"), float("nan"))
    return statistic(values, is_right), (float(low), float(high))


def _members(count: int, groups: ArrayLike | None) -> list[NDArray[np.intp]]:
    if groups is None:
        return list(np.arange(count)[:, None])
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == one) for one in range(int(group.max(initial=-1)) + 1)]


def _both(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
    values, is_right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if values.shape != is_right.shape or values.ndim != 1:
        raise ValueError(
            f"confidences {values.shape} and answers {is_right.shape} must be lists of one length"
        )
    return values, is_right
