"""Fits a `Calibration` on the signals of labelled entries, and measures it on entries that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.evaluation.confidence import aurc, auroc, calibration_error, with_interval
from localization_heads.evaluation.scores import rounded
from localization_heads.grounding.confidence import Calibration, Logistic

FEWEST = 20
"""Entries of either kind that a fit needs."""
FEWEST_AGAIN = 10
"""Entries of either kind that slope and intercept alone need."""
FOLDS = 5
STRENGTH = 1.0
"""Inverse of the L2 penalty on the weights of standardised signals (scikit-learn's C)."""
PLATT_STRENGTH = 100.0
"""The same on the slope of a fit again: all but none."""


@dataclass(frozen=True)
class Labelled:
    """The signals of n entries, and what is true of each.

    Args:
        signals: of each entry, by name.
        right: whether its box is right; never of what is absent.
        present: whether its expression refers to something in the image.
        images: the identity of its image, with which it is left out in cross-validation.
    """

    signals: Sequence[Mapping[str, float]]
    right: NDArray[np.bool_]
    present: NDArray[np.bool_]
    images: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Of the signals that every entry has."""
        first, *others = self.signals
        return [name for name in first if all(name in one for one in others)]

    def at(self, places: NDArray[np.intp]) -> Labelled:
        """Some of the entries."""
        rows, images = [self.signals[i] for i in places], [self.images[i] for i in places]
        return Labelled(rows, self.right[places], self.present[places], images)


def calibrate(labelled: Labelled, recipe: Mapping[str, Any], *, seed: int = 42) -> Calibration:
    """The logistic regressions of `right` over all entries and, with enough absent ones, of `present`.

    The signals are standardised, which is folded into the weights, and the weights held small (L2).

    Raises:
        UsageError: fewer than `FEWEST` entries are right, or wrong.
    """
    check_enough(labelled.right, FEWEST, "a calibration")

    def fit(part: Labelled) -> Calibration:
        right = _logistic(part.signals, labelled.names, part.right)
        both = enough(labelled.present, FEWEST)
        present = _logistic(part.signals, labelled.names, part.present) if both else None
        return Calibration(recipe, right, present, len(part.right))

    return replace(fit(labelled), measured=measure(labelled, fit, seed))


def calibrate_again(labelled: Labelled, known: Calibration, *, seed: int = 42) -> Calibration:
    """The calibration of a new domain: the weights of `known`, slope and intercept fitted anew (Platt 1999).

    Where few entries are absent, the probability of presence stays as it is.

    Raises:
        UsageError: fewer than `FEWEST_AGAIN` entries are right, or wrong; or a signal is missing.
    """
    check_enough(labelled.right, FEWEST_AGAIN, "calibrate_from")
    if missing := sorted(known.names - set(labelled.names)):
        raise UsageError(f"calibrate_from: these entries have no signal {missing[0]}, which it needs")

    def fit(part: Labelled) -> Calibration:
        present = known.present
        if present is not None and enough(labelled.present, FEWEST_AGAIN):
            present = _platt(part.signals, present, part.present)
        return replace(
            known,
            right=_platt(part.signals, known.right, part.right),
            present=present,
            num_labels=len(part.right),
        )

    return replace(fit(labelled), measured=measure(labelled, fit, seed))


def enough(truth: NDArray[np.bool_], least: int) -> bool:
    """Whether there are so many of either kind."""
    return bool(min(truth.sum(), (~truth).sum()) >= least)


def check_enough(right: NDArray[np.bool_], least: int, what: str) -> None:
    """UsageError, with the counts, if there are fewer than `least` of either kind."""
    if not enough(right, least):
        raise UsageError(
            f"{what} needs at least {least} entries whose box is right and {least} whose box is wrong; there are "
            f"{int(right.sum())} and {int((~right).sum())}: add entries with truth, absent ones among them"
        )


def measure(labelled: Labelled, fit: Callable[[Labelled], Calibration], seed: int = 42) -> dict[str, Any]:
    """How well fits do on the part of the entries that they were not made of (5-fold, no image in two parts).

    `auroc_right` is over the entries that are present, all others over all; 95 % intervals beside them. Of fewer images
    than parts there are only the counts.
    """
    right, present = labelled.right, labelled.present
    counts = {
        "num_right": int(right.sum()),
        "num_wrong": int((~right).sum()),
        "num_absent": int((~present).sum()),
    }
    if len(set(labelled.images)) < FOLDS:
        return counts
    found = _left_out(labelled, fit, seed)
    confidence = np.array(
        [one.right.probability(row) for one, row in zip(found, labelled.signals, strict=True)]
    )
    numbers = _with_intervals("auroc_right", auroc, confidence[present], right[present], seed)
    numbers |= _with_intervals("auroc_useful", auroc, confidence, right, seed)
    numbers |= _with_intervals("aurc", aurc, confidence, right, seed)
    numbers |= _with_intervals("ece", calibration_error, confidence, right, seed)
    models = [one.present for one in found]
    if not present.all() and None not in models:
        there = np.array(
            [m.probability(row) for m, row in zip(models, labelled.signals, strict=True) if m is not None]
        )
        numbers |= _with_intervals("auroc_present", auroc, there, present, seed)
        numbers |= _with_intervals("ece_present", calibration_error, there, present, seed)
    return counts | numbers


def _left_out(labelled: Labelled, fit: Callable[[Labelled], Calibration], seed: int) -> list[Calibration]:
    """For each entry the calibration that was fitted without its part."""
    from sklearn.model_selection import StratifiedGroupKFold

    kinds = labelled.right.astype(int) + labelled.present  # wrong ones and absent ones in every part
    if np.unique(kinds, return_counts=True)[1].min() < FOLDS:
        kinds = labelled.right.astype(int)
    parts = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    found: list[Calibration | None] = [None] * len(kinds)
    for fitted, left in parts.split(kinds, kinds, list(labelled.images)):
        one = fit(labelled.at(fitted))
        for place in left:
            found[place] = one
    return [one for one in found if one is not None]


def _with_intervals(name: str, statistic: Any, values: Any, truth: Any, seed: int) -> dict[str, Any]:
    value, (low, high) = with_interval(statistic, values, truth, seed=seed)
    return {name: rounded(value), f"{name}_interval": [rounded(low), rounded(high)]}


def _logistic(
    rows: Sequence[Mapping[str, float]], names: Sequence[str], truth: NDArray[np.bool_]
) -> Logistic:
    """The fit over standardised signals, in terms of the signals themselves; one that never changes has no weight."""
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    mean, spread = table.mean(axis=0), table.std(axis=0)
    varies = spread > 1e-9
    scaled = (table[:, varies] - mean[varies]) / spread[varies]
    weights = np.zeros(len(names))
    slopes, intercept = _fit(scaled, truth, STRENGTH)
    weights[varies] = slopes / spread[varies]
    kept = {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight}
    return Logistic(float(intercept - weights @ mean), kept)


def _platt(rows: Sequence[Mapping[str, float]], known: Logistic, truth: NDArray[np.bool_]) -> Logistic:
    """`slope * (old sum) + intercept`: the old order, other probabilities."""
    sums = np.array([known.total(row) for row in rows])
    (slope,), intercept = _fit(sums[:, None], truth, PLATT_STRENGTH)
    slope = max(float(slope), 0.0)  # never the reverse order
    return Logistic(
        float(intercept) + slope * known.intercept,
        {name: slope * weight for name, weight in known.weights.items()},
    )


def _fit(table: NDArray[np.float64], truth: NDArray[np.bool_], strength: float) -> tuple[NDArray[Any], float]:
    """Slopes and intercept of scikit-learn's logistic regression; the base rate alone if nothing varies."""
    from sklearn.linear_model import LogisticRegression

    if not table.shape[1] or truth.all() or not truth.any():
        share = float(np.clip(truth.mean(), 1e-6, 1 - 1e-6))
        return np.zeros(0), float(np.log(share / (1 - share)))
    model = LogisticRegression(C=strength, max_iter=1000).fit(table, truth)
    return model.coef_[0], float(model.intercept_[0])
