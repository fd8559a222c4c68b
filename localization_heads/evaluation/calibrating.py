"""Fit a `Calibration` (`grounding.confidence`) on the signals of labelled entries, and cross-validate it.

Presence and a right box are two logistic regressions. `calibrate` fits both from scratch; `recalibrate` adapts a known
calibration to a new domain with few labels (Platt scaling, then small changes of the weights).
"""

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
    calibration_error_by_chance,
    with_bootstrap_interval,
)
from localization_heads.evaluation.scores import number
from localization_heads.grounding.confidence import MODEL_SIGNALS, Calibration, Logistic

MIN_LABELS = 20
"""Entries of each class (right and wrong, present and absent) that a fit needs."""
MIN_LABELS_TO_RECALIBRATE = 10
"""Entries with a right box, and with a wrong one, that `recalibrate` needs."""
MIN_LABELS_TO_ADAPT = 3
"""Entries of each class below which `recalibrate` keeps a regression as it is."""
FOLDS = 5
INVERSE_PENALTY = 1.0
"""scikit-learn's C: the inverse of the L2 penalty on the weights of the standardised signals."""
SLOPE_PENALTY = 3.0
"""`recalibrate`: L2 penalty on the slope's distance from 1."""
INTERCEPT_PENALTY = 3.0
"""`recalibrate`: L2 penalty on the intercept. Fifty labels may contain more of one class than their domain does."""
WEIGHT_PENALTY = 10.0
"""`recalibrate`: L2 penalty on the change of each standardised signal's weight after that."""
PRESENCE_SIGNALS = (*MODEL_SIGNALS, "gain", "answer", "attention ")
"""Signals of presence if the model was asked; a name that ends with a space is a prefix."""
PRESENCE_SIGNALS_FROM_MAPS = (
    "mass", "density", "entropy", "peak", "overlap", "agreement", "mask", "answer", "gain", "divergence", "attention ",
)  # fmt: skip
"""Signals of presence if it was not."""
RIGHT_SIGNALS = ("gain", "mask")
"""Signals of a right box if a segmenter's mask may determine it: those that measured best on validation scenes."""
RIGHT_SIGNALS_FROM_MAPS = ("gain", "agreement")
"""Signals of a right box without a segmenter."""


@dataclass(frozen=True)
class LabelledSignals:
    """The signals and labels of n entries.

    Args:
        signals: by name, for each entry.
        right: bool `[n]`, whether the box is right; always False for absent objects.
        present: bool `[n]`, whether the expression refers to something in the image.
        images: identity of each image; entries of one image share a fold in cross-validation.
    """

    signals: Sequence[Mapping[str, float]]
    right: NDArray[np.bool_]
    present: NDArray[np.bool_]
    images: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Names of the signals that every entry has."""
        first, *others = self.signals
        return [name for name in first if all(name in row for row in others)]

    def subset(self, indices: NDArray[np.intp]) -> LabelledSignals:
        signals, images = [self.signals[i] for i in indices], [self.images[i] for i in indices]
        return LabelledSignals(signals, self.right[indices], self.present[indices], images)


def calibrate(labelled: LabelledSignals, recipe: Mapping[str, Any], *, seed: int = 42) -> Calibration:
    """Fit a calibration with L2-regularised logistic regressions of the standardised signals.

    `present` is fitted on all entries if enough are absent, `right` on the entries that are present. The weights are
    converted back to the units of the signals.

    Raises:
        UsageError: fewer than `MIN_LABELS` entries are right, or wrong; absent entries count as wrong if `present`
            is fitted.
    """
    fits_presence = has_enough(labelled.present, MIN_LABELS)
    right = labelled.right if fits_presence else labelled.right[labelled.present]
    _check_enough(right, MIN_LABELS, "a calibration")
    names = labelled.names
    was_asked = "question" in names or "first_token" in names
    presence_names = _select(PRESENCE_SIGNALS if was_asked else PRESENCE_SIGNALS_FROM_MAPS, names)
    right_names = _select(RIGHT_SIGNALS if "mask" in names else RIGHT_SIGNALS_FROM_MAPS, names)

    def fit(part: LabelledSignals) -> Calibration:
        present = part.subset(np.flatnonzero(part.present))
        return Calibration(
            recipe,
            _fit(present.signals, right_names, present.right),
            _fit(part.signals, presence_names, part.present) if fits_presence else None,
            len(part.right),
        )

    return replace(fit(labelled), measured=_cross_validate(labelled, fit, seed))


def recalibrate(labelled: LabelledSignals, known: Calibration, *, seed: int = 42) -> Calibration:
    """Adapt a calibration to a new domain: refit slope and intercept (Platt 1999), then shift the weights slightly.

    A regression with hardly any labels of one class stays as it is.

    Raises:
        UsageError: fewer than `MIN_LABELS_TO_RECALIBRATE` entries are right, or wrong; or a signal is missing.
    """
    _check_enough(labelled.right, MIN_LABELS_TO_RECALIBRATE, "calibrate_from")
    if missing := sorted(known.signal_names - set(labelled.names)):
        raise UsageError(f"calibrate_from: these entries have no signal {missing[0]}, which it needs")

    def fit(part: LabelledSignals) -> Calibration:
        present = part.subset(np.flatnonzero(part.present))
        return replace(
            known,
            right=_adapt(present.signals, known.right, present.right),
            present=known.present and _adapt(part.signals, known.present, part.present),
            num_labels=len(part.right),
        )

    return replace(fit(labelled), measured=_cross_validate(labelled, fit, seed))


def has_enough(labels: NDArray[np.bool_], minimum: int) -> bool:
    """Whether at least `minimum` labels are true and as many are false."""
    return bool(min(labels.sum(), (~labels).sum()) >= minimum)


def _check_enough(right: NDArray[np.bool_], minimum: int, what: str) -> None:
    if not has_enough(right, minimum):
        raise UsageError(
            f"{what} needs at least {minimum} entries whose box is right and {minimum} whose box is wrong; there are "
            f"{int(right.sum())} and {int((~right).sum())}: add entries with truth, absent ones among them"
        )


def _select(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that are wanted, or start with a wanted prefix (one that ends with a space).

    >>> _select(["gain", "attention "], ["gain", "gains", "attention L4H6"])
    ['gain', 'attention L4H6']
    """
    prefixes = tuple(name for name in wanted if name.endswith(" "))
    return [name for name in names if name in wanted or (prefixes and name.startswith(prefixes))]


def _cross_validate(
    labelled: LabelledSignals, fit: Callable[[LabelledSignals], Calibration], seed: int
) -> dict[str, Any]:
    """Metrics of 5-fold cross-validation, with 95 % intervals; no image is in two folds.

    `auroc_right` is that of the probability that the box is right given that the object is present, over the present
    entries; all other metrics are over all entries. With fewer images than folds there are only the counts.
    """
    right, present = labelled.right, labelled.present
    counts = {
        "num_right": int(right.sum()),
        "num_wrong": int((~right).sum()),
        "num_absent": int((~present).sum()),
    }
    if len(set(labelled.images)) < FOLDS:
        return counts
    calibrations = _fit_without_own_fold(labelled, fit, seed)
    pairs = list(zip(calibrations, labelled.signals, strict=True))
    confidence = np.array([calibration.confidence(row) for calibration, row in pairs])
    if_present = np.array([calibration.right.probability(row) for calibration, row in pairs])
    numbers = number("auroc_right", *with_bootstrap_interval(auroc, if_present[present], right[present], seed=seed))
    statistics = {"auroc_useful": auroc, "aurc": aurc, "ece": calibration_error}
    for name, statistic in statistics.items():
        numbers |= number(name, *with_bootstrap_interval(statistic, confidence, right, seed=seed))
    numbers |= number("ece_by_chance", *calibration_error_by_chance(confidence, seed=seed))
    presences = [calibration.presence(row) for calibration, row in pairs]
    if not present.all() and None not in presences:
        presence = np.array(presences, dtype=np.float64)
        for name, statistic in {"auroc_present": auroc, "ece_present": calibration_error}.items():
            numbers |= number(name, *with_bootstrap_interval(statistic, presence, present, seed=seed))
    return counts | numbers


def _fit_without_own_fold(
    labelled: LabelledSignals, fit: Callable[[LabelledSignals], Calibration], seed: int
) -> list[Calibration]:
    """For each entry, the calibration fitted on the folds that it is not in."""
    from sklearn.model_selection import StratifiedGroupKFold

    classes = labelled.right.astype(int) + labelled.present  # absent, wrong or right: some of each in every fold
    if np.unique(classes, return_counts=True)[1].min() < FOLDS:
        classes = labelled.right.astype(int)
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    calibrations: list[Calibration | None] = [None] * len(classes)
    for training, held_out in folds.split(classes, classes, list(labelled.images)):
        calibration = fit(labelled.subset(training))
        for i in held_out:
            calibrations[i] = calibration
    return [calibration for calibration in calibrations if calibration is not None]


def _fit(signals: Sequence[Mapping[str, float]], names: Sequence[str], labels: NDArray[np.bool_]) -> Logistic:
    """A regression over standardised signals, in the signals' own units; a constant signal gets no weight."""
    table = np.array([[row[name] for name in names] for row in signals], dtype=np.float64)
    mean, std = table.mean(axis=0), table.std(axis=0)
    varies = std > 1e-9
    slopes, intercept = _fit_standardised((table[:, varies] - mean[varies]) / std[varies], labels)
    weights = np.zeros(len(names))
    weights[varies] = slopes / std[varies]
    nonzero = {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight}
    return Logistic(float(intercept - weights @ mean), nonzero)


def _fit_standardised(table: NDArray[np.float64], labels: NDArray[np.bool_]) -> tuple[NDArray[Any], float]:
    """Slopes and intercept; the base rate alone if there is no signal or only one class."""
    from sklearn.linear_model import LogisticRegression

    if not table.shape[1] or labels.all() or not labels.any():
        return np.zeros(table.shape[1]), _base_rate(labels)
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000).fit(table, labels)
    return model.coef_[0], float(model.intercept_[0])


def _base_rate(labels: NDArray[np.bool_]) -> float:
    """The log-odds of the share of true labels."""
    share = float(np.clip(labels.mean(), 1e-6, 1 - 1e-6))
    return float(np.log(share / (1 - share)))


def _adapt(signals: Sequence[Mapping[str, float]], known: Logistic, labels: NDArray[np.bool_]) -> Logistic:
    """Scale and shift a known regression, then change its weights slightly where the new domain differs.

    First slope and intercept, penalised by `SLOPE_PENALTY / 2 (slope - 1)^2 + INTERCEPT_PENALTY / 2 intercept^2`, which
    keeps them at 1 and 0 unless the labels say otherwise; then the weights of signals standardised over these entries,
    penalised by `WEIGHT_PENALTY / 2 (new - old)^2` each, with the intercept again.
    """
    if not has_enough(labels, MIN_LABELS_TO_ADAPT):
        return known
    names = list(known.weights)
    table = np.array([[row[name] for name in names] for row in signals], dtype=np.float64)
    table = table.reshape(len(signals), -1)  # also without any signal
    logits = np.array([known.logit(row) for row in signals])
    (slope_change,), shift = _fit_offset(logits[:, None], logits, labels, SLOPE_PENALTY)
    slope = max(1 + slope_change, 0.0)  # never reverses the order
    if slope == 0:
        return Logistic(_base_rate(labels), dict.fromkeys(names, 0.0))
    mean, std = table.mean(axis=0), table.std(axis=0)
    std[std < 1e-9] = np.inf
    changes, second_shift = _fit_offset((table - mean) / std, slope * logits + shift, labels, WEIGHT_PENALTY)
    changes = changes / std
    weights = {name: slope * known.weights[name] + float(change) for name, change in zip(names, changes, strict=True)}
    return Logistic(slope * known.intercept + shift + second_shift - float(changes @ mean), weights)


def _fit_offset(
    table: NDArray[np.float64], offset: NDArray[np.float64], labels: NDArray[np.bool_], penalty: float
) -> tuple[NDArray[np.float64], float]:
    """Weights `w` and intercept `b` that maximise the likelihood of the logits `offset + table w + b`.

    Penalised by `penalty / 2 |w|^2 + INTERCEPT_PENALTY / 2 b^2`.
    """
    from scipy.optimize import minimize

    sign = np.where(labels, 1.0, -1.0)
    penalties = np.array([INTERCEPT_PENALTY] + [penalty] * table.shape[1])

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (offset + table @ values[1:] + values[0])
        by_logit = -sign / (1 + np.exp(np.clip(margin, -500, 500)))
        gradient = np.concatenate([[by_logit.sum()], table.T @ by_logit]) + penalties * values
        return float(np.logaddexp(0, -margin).sum() + (penalties / 2 * values**2).sum()), gradient

    best = minimize(loss, np.zeros(1 + table.shape[1]), jac=True, method="L-BFGS-B").x
    return best[1:], float(best[0])
