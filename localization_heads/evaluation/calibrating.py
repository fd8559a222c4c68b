"""Fits a `Calibration` on the signals of labelled entries, and measures it on entries that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.evaluation.confidence import (
    aurc,
    auroc,
    calibration_error,
    chance_error,
    with_interval,
)
from localization_heads.evaluation.scores import number
from localization_heads.grounding.confidence import ASKED, Calibration, Logistic

FEWEST = 20
"""Entries of either kind that a fit needs."""
FEWEST_AGAIN = 10
"""Entries of either kind that a fit again needs."""
FEWEST_MOVED = 3
"""Entries of either kind without which a fit again leaves a factor as it is."""
FOLDS = 5
STRENGTH = 1.0
"""Inverse of the L2 penalty on the weights of standardised signals (scikit-learn's C)."""
SLOPE_PENALTY = 3.0
"""L2 penalty on how far a fit again takes the slope from 1."""
INTERCEPT_PENALTY = 3.0
"""The same on how far it takes the intercept from 0: fifty labels may hold more of one kind than their domain does."""
MOVE_PENALTY = 10.0
"""The same on how far it then takes the weight of each standardised signal from where it was."""
PRESENCE = (*ASKED, "gain", "answer", "attention ")
"""Signals of presence, those of one name or of a name that begins like this; where the model was asked."""
PRESENCE_BY_MAPS = (
    "mass", "density", "entropy", "peak", "overlap", "agreement", "mask", "answer", "gain", "divergence", "attention ",
)  # fmt: skip
"""The same where it was not."""
RIGHT = ("gain", "mask")
"""Signals of a right box, where a segmenter's mask may make it; they measured best on validation scenes."""
RIGHT_BY_MAPS = ("gain", "agreement")
"""The same where none does."""


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
    """Two logistic regressions: of `present` over all entries, if enough are absent, and of `right` over the others.

    The signals are standardised, which is folded into the weights, and the weights held small (L2).

    Raises:
        UsageError: fewer than `FEWEST` entries are right, or wrong; absent ones are wrong, where they are fitted.
    """
    both = enough(labelled.present, FEWEST)
    check_enough(labelled.right if both else labelled.right[labelled.present], FEWEST, "a calibration")
    names = labelled.names
    of_presence = chosen(
        PRESENCE if "question" in names or "first_token" in names else PRESENCE_BY_MAPS, names
    )
    of_right = chosen(RIGHT if "mask" in names else RIGHT_BY_MAPS, names)

    def fit(part: Labelled) -> Calibration:
        there = part.at(np.flatnonzero(part.present))
        right = _logistic(there.signals, of_right, there.right)
        present = _logistic(part.signals, of_presence, part.present) if both else None
        return Calibration(recipe, right, present, len(part.right))

    return replace(fit(labelled), measured=measure(labelled, fit, seed))


def chosen(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of the names, those that are wanted, or begin with a wanted one that ends with a space.

    >>> chosen(["gain", "attention "], ["gain", "gains", "attention L4H6"])
    ['gain', 'attention L4H6']
    """
    groups = tuple(name for name in wanted if name.endswith(" "))
    return [name for name in names if name in wanted or (groups and name.startswith(groups))]


def calibrate_again(labelled: Labelled, known: Calibration, *, seed: int = 42) -> Calibration:
    """The calibration of a new domain: slope and intercept fitted anew (Platt 1999), then the weights moved a little.

    A factor of which there are hardly any labels of either kind stays as it is.

    Raises:
        UsageError: fewer than `FEWEST_AGAIN` entries are right, or wrong; or a signal is missing.
    """
    check_enough(labelled.right, FEWEST_AGAIN, "calibrate_from")
    if missing := sorted(known.names - set(labelled.names)):
        raise UsageError(f"calibrate_from: these entries have no signal {missing[0]}, which it needs")

    def fit(part: Labelled) -> Calibration:
        there = part.at(np.flatnonzero(part.present))
        present = known.present and _moved(part.signals, known.present, part.present)
        right = _moved(there.signals, known.right, there.right)
        return replace(known, right=right, present=present, num_labels=len(part.right))

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

    `auroc_right` is that of the probability that the box is right if there is something, over the entries that are
    present; all others are over all. 95 % intervals stand beside them. Of fewer images than parts there are only the
    counts.
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
    pairs = list(zip(found, labelled.signals, strict=True))
    confidence = np.array([one.confidence(row) for one, row in pairs])
    of_right = np.array([one.right.probability(row) for one, row in pairs])
    numbers = number("auroc_right", *with_interval(auroc, of_right[present], right[present], seed=seed))
    for name, statistic in {"auroc_useful": auroc, "aurc": aurc, "ece": calibration_error}.items():
        numbers |= number(name, *with_interval(statistic, confidence, right, seed=seed))
    numbers |= number("ece_by_chance", *chance_error(confidence, seed=seed))
    said = [one.presence(row) for one, row in pairs]
    if not present.all() and None not in said:
        there = np.array(said, dtype=np.float64)
        for name, statistic in {"auroc_present": auroc, "ece_present": calibration_error}.items():
            numbers |= number(name, *with_interval(statistic, there, present, seed=seed))
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


def _moved(rows: Sequence[Mapping[str, float]], known: Logistic, truth: NDArray[np.bool_]) -> Logistic:
    """`slope * (old sum) + intercept`, and then weights near those, which bring in what differs in the new domain.

    First slope and intercept with `SLOPE_PENALTY / 2 (slope - 1)^2 + INTERCEPT_PENALTY / 2 intercept^2`, which hold
    them at 1 and 0 unless the labels say otherwise; then the weights of signals standardised over these rows, each with
    `MOVE_PENALTY / 2 (new - old)^2`, and the intercept once more.
    """
    if not enough(truth, FEWEST_MOVED):
        return known
    names = list(known.weights)
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64).reshape(len(rows), -1)
    sums = np.array([known.total(row) for row in rows])
    (change,), intercept = _penalised(sums[:, None], sums, truth, SLOPE_PENALTY)
    slope = max(1 + change, 0.0)  # never the reverse order
    if slope == 0:
        return Logistic(_base_rate(truth), dict.fromkeys(names, 0.0))
    mean, spread = table.mean(axis=0), table.std(axis=0)
    spread[spread < 1e-9] = np.inf
    moves, more = _penalised((table - mean) / spread, slope * sums + intercept, truth, MOVE_PENALTY)
    moves = moves / spread
    weights = {
        name: slope * known.weights[name] + float(move) for name, move in zip(names, moves, strict=True)
    }
    return Logistic(slope * known.intercept + intercept + more - float(moves @ mean), weights)


def _penalised(
    table: NDArray[np.float64], offset: NDArray[np.float64], truth: NDArray[np.bool_], penalty: float
) -> tuple[NDArray[np.float64], float]:
    """Slopes `w` and intercept `b` of `offset + table w + b`, by the log-likelihood less `penalty / 2 |w|^2` and
    `INTERCEPT_PENALTY / 2 b^2`.
    """
    from scipy.optimize import minimize

    sign = np.where(truth, 1.0, -1.0)

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (offset + table @ values[1:] + values[0])
        pull = -sign / (1 + np.exp(np.clip(margin, -500, 500)))
        held = np.array([INTERCEPT_PENALTY] + [penalty] * table.shape[1])
        gradient = np.concatenate([[pull.sum()], table.T @ pull]) + held * values
        return float(np.logaddexp(0, -margin).sum() + (held / 2 * values**2).sum()), gradient

    found = minimize(loss, np.zeros(1 + table.shape[1]), jac=True, method="L-BFGS-B").x
    return found[1:], float(found[0])


def _fit(table: NDArray[np.float64], truth: NDArray[np.bool_], strength: float) -> tuple[NDArray[Any], float]:
    """Slopes and intercept of scikit-learn's logistic regression; the base rate alone if nothing varies."""
    from sklearn.linear_model import LogisticRegression

    if not table.shape[1] or truth.all() or not truth.any():
        return np.zeros(table.shape[1]), _base_rate(truth)
    model = LogisticRegression(C=strength, max_iter=1000).fit(table, truth)
    return model.coef_[0], float(model.intercept_[0])


def _base_rate(truth: NDArray[np.bool_]) -> float:
    """The log-odds of the share of true ones."""
    share = float(np.clip(truth.mean(), 1e-6, 1 - 1e-6))
    return float(np.log(share / (1 - share)))
