"""How reliable a confidence is: AUROC, risk-coverage and calibration error, the block `confidence` of `metrics.json`.

Each metric takes the confidences `[n]` of n answers and bool `[n]`, whether each was right; equal confidences are
treated as ties. A metric is NaN where it is undefined (no answers, or for AUROC only one class).

Three events are told apart: the box is right given that the expression refers to something (`auroc_right`), the
expression refers to something (`auroc_present`), and both (`auroc_useful`); an absent object has no right box. The
control for presence is a classifier that sees the expression's words but no image (`text_only`): where absent
expressions use other words it does well (0.92 on GroundingME), so a high `auroc_present` alone proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.data.samples import Sample
from localization_heads.evaluation.metrics import NUM_RESAMPLES, percentile_interval
from localization_heads.evaluation.scores import number, rounded
from localization_heads.grounding.ground import Grounding

BINS = 10
"""Bins of equal width, for the calibration error and the reliability diagram."""
RIGHT = 0.5
"""A box is right if its IoU with a true box is at least this."""
FOLDS = 5
TOP_LEVEL_METRICS = ("auroc_right", "auroc_present", "auroc_useful", "aurc", "ece", "n_acc")
"""Metrics that `metrics.json` repeats at its top level."""
MAX_CURVE_POINTS = 100
"""Points of the risk-coverage curve that are written."""

Statistic = Callable[[NDArray[np.float64], NDArray[np.bool_]], float]


def auroc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Area under the ROC curve: P(a right answer has a higher confidence than a wrong one), ties counting one half.

    >>> auroc([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    0.875
    """
    from scipy.stats import rankdata

    values, is_right = _as_arrays(confidence, right)
    positive = int(is_right.sum())
    negative = is_right.size - positive
    if not positive or not negative:
        return float("nan")
    above = rankdata(values)[is_right].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coverage and risk `[n]`: for each k, the share of answers kept and the share of wrong ones among the k surest.

    Wrong answers are spread evenly over equal confidences, so that the result does not depend on the order of ties.

    >>> coverage, risk = risk_coverage([0.9, 0.5, 0.5], [True, True, False])
    >>> coverage.round(2).tolist(), risk.round(2).tolist()
    ([0.33, 0.67, 1.0], [0.0, 0.25, 0.33])
    """
    values, is_right = _as_arrays(confidence, right)
    levels, group = np.unique(-values, return_inverse=True)
    wrong = np.bincount(group, weights=~is_right, minlength=len(levels)) / np.maximum(np.bincount(group), 1)
    ordered = np.sort(group)
    counts = np.arange(1, len(values) + 1)
    return counts / max(len(values), 1), np.cumsum(wrong[ordered]) / counts


def aurc(confidence: ArrayLike, right: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean risk (Geifman and El-Yaniv 2017). Lower is better."""
    _, risk = risk_coverage(confidence, right)
    return float(risk.mean()) if risk.size else float("nan")


def reliability(confidence: ArrayLike, right: ArrayLike) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and count of each bin of equal width in 0 to 1, without empty bins."""
    values, is_right = _as_arrays(confidence, right)
    bins = np.clip((values * BINS).astype(int), 0, BINS - 1)
    return [
        (float(values[bins == bin].mean()), float(is_right[bins == bin].mean()), int((bins == bin).sum()))
        for bin in range(BINS)
        if (bins == bin).any()
    ]


def calibration_error(confidence: ArrayLike, right: ArrayLike) -> float:
    """Expected calibration error: |mean confidence - accuracy| of each bin, averaged with the bins' counts as weights.

    >>> calibration_error([0.9, 0.9, 0.1, 0.1], [True, False, False, False])
    0.25
    """
    bins = reliability(confidence, right)
    total = sum(count for _, _, count in bins)
    return sum(abs(mean - accuracy) * count for mean, accuracy, count in bins) / total if total else float("nan")


def calibration_error_by_chance(confidence: ArrayLike, *, seed: int = 42) -> tuple[float, tuple[float, float]]:
    """The calibration error that a perfectly calibrated method would have: its mean over draws and 95 % interval.

    It is not 0, since the accuracy of a bin with few answers deviates from its confidence by chance.
    """
    values = np.asarray(confidence, dtype=np.float64)
    if not values.size:
        return float("nan"), (float("nan"), float("nan"))
    draw = np.random.default_rng(seed).random
    errors = np.array([calibration_error(values, draw(len(values)) < values) for _ in range(NUM_RESAMPLES)])
    return float(errors.mean()), percentile_interval(errors)


def with_bootstrap_interval(
    statistic: Statistic,
    confidence: ArrayLike,
    right: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    seed: int = 42,
) -> tuple[float, tuple[float, float]]:
    """A statistic and its 95 % bootstrap interval; resamples in which it is undefined are ignored.

    Args:
        groups: `[n]`, such as each answer's image: whole groups are resampled. None resamples answers.
    """
    values, is_right = _as_arrays(confidence, right)
    units = _resampling_units(len(values), groups)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(NUM_RESAMPLES if len(units) > 1 else 0):
        indices = np.concatenate([units[i] for i in rng.integers(len(units), size=len(units))])
        resampled.append(statistic(values[indices], is_right[indices]))
    return statistic(values, is_right), percentile_interval(resampled)


def _resampling_units(count: int, groups: ArrayLike | None) -> list[NDArray[np.intp]]:
    """The answers' indices in each group; without groups each answer is one."""
    if groups is None:
        return list(np.arange(count)[:, None])
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == i) for i in range(int(group.max(initial=-1)) + 1)]


def _as_arrays(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
    values, is_right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if values.shape != is_right.shape or values.ndim != 1:
        raise ValueError(f"confidences {values.shape} and answers {is_right.shape} must be lists of one length")
    return values, is_right


def predict_presence_from_text(
    expressions: Sequence[str], present: ArrayLike, images: Sequence[str], *, seed: int = 42
) -> NDArray[np.float64] | None:
    """The probability that each expression refers to something, predicted from its words without the image.

    A logistic regression over unigrams and bigrams, cross-validated so that no image is in two folds.

    Args:
        present: the labels, bool `[n]`.
        images: identity of each expression's image.

    Returns:
        float64 `[n]`, or None if there are fewer than `FOLDS` images, or expressions of either class.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline

    labels = np.asarray(present, dtype=bool)
    if min(labels.sum(), (~labels).sum(), len(set(images))) < FOLDS:
        return None
    probabilities = np.full(len(labels), float(labels.mean()))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels, images)
    for training, held_out in folds:
        if len(set(labels[training].tolist())) < 2:
            continue
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True)
        model = make_pipeline(words, LogisticRegression(max_iter=1000))
        model.fit([expressions[i] for i in training], labels[training])
        probabilities[held_out] = model.predict_proba([expressions[i] for i in held_out])[:, 1]
    return probabilities


class Claim(NamedTuple):
    """The confidence of one answer, and the ground truth about it.

    Attributes:
        confidence, presence, calibrated, absent: as in `Grounding`.
        right: the box is right, even if the answer was that the object is absent.
        present: the expression refers to something in the image.
        image: identity of the image.
    """

    confidence: float | None
    presence: float | None
    calibrated: bool
    absent: bool
    right: bool
    present: bool
    image: str
    expression: str

    @property
    def if_present(self) -> float | None:
        """The probability that the box is right given that the object is present: confidence / presence."""
        if self.confidence is None or not self.presence:
            return self.confidence
        return self.confidence / self.presence


def is_right(sample: Sample, box: Box) -> bool:
    """Whether a box has an IoU of at least `RIGHT` with a true box; False for an absent object.

    >>> is_right(Sample("cat.jpg", "the cat", bbox=(0, 0, 2, 2)), (0, 0, 2, 1))
    True
    """
    return any(bool(box_iou(box, true) >= RIGHT) for true in sample.true_boxes)


def claim_of(sample: Sample, grounding: Grounding, image: str) -> Claim:
    """The confidence of a grounding, and whether the sample's true boxes confirm it."""
    return Claim(
        confidence=grounding.confidence,
        presence=grounding.presence,
        calibrated=grounding.calibrated,
        absent=grounding.absent,
        right=is_right(sample, grounding.box),
        present=not sample.absent,
        image=image,
        expression=sample.expression,
    )


def confidence_metrics(claims: Sequence[Claim], *, by_image: bool = False, seed: int = 42) -> dict[str, Any]:
    """The block `confidence` of `metrics.json`: AUROC, AURC, calibration error and accuracy of abstaining, and curves.

    Each metric has a 95 % interval; undefined metrics are omitted, and without any confidence the block is empty.
    `aurc`, `ece` and the curves are over all answers, those about absent objects included: `risk_coverage` has
    (coverage, risk), `reliability` has (mean confidence, accuracy, count) of each non-empty bin.

    Args:
        by_image: the intervals resample images with all their expressions.
    """
    known = [claim for claim in claims if claim.confidence is not None]
    if not known:
        return {}
    confidence = np.array([claim.confidence for claim in known])
    right = np.array([claim.right for claim in known])
    present = np.array([claim.present for claim in known])
    images = np.array([claim.image for claim in known])
    metrics = _Metrics(images if by_image else None, seed)
    metrics.compute("auroc_right", auroc, [claim.if_present for claim in known], right, among=present)
    if not present.all():
        presence = [claim.presence if claim.presence is not None else claim.confidence for claim in known]
        metrics.compute("auroc_present", auroc, presence, present)
        metrics.compute("auroc_useful", auroc, confidence, right)
    metrics.compute("aurc", aurc, confidence, right)
    metrics.compute("ece", calibration_error, confidence, right)
    if calibrated := all(claim.calibrated for claim in known):
        metrics.add("ece_by_chance", *calibration_error_by_chance(confidence, seed=seed))
    absent = np.array([claim.absent for claim in known])
    if absent.any():
        metrics.compute("n_acc", _mean, absent, present, among=~present)
        metrics.compute("t_acc", _mean, ~absent, present, among=present)
    if not present.all():
        texts = [claim.expression for claim in known]
        predicted = predict_presence_from_text(texts, present, images.tolist(), seed=seed)
        if predicted is not None:
            metrics.compute("text_only", auroc, predicted, present)
    return {
        "calibrated": calibrated,
        "num_answers": len(known),
        "num_absent": int((~present).sum()),
        "num_right": int(right.sum()),
        **metrics.values,
        "risk_coverage": _risk_coverage_points(confidence, right),
        "reliability": [[rounded(m), rounded(s), n] for m, s, n in reliability(confidence, right)],
    }


class _Metrics:
    """Collects metrics with their bootstrap intervals by name, except undefined ones."""

    def __init__(self, groups: NDArray[Any] | None, seed: int) -> None:
        self.values: dict[str, Any] = {}
        self._groups, self._seed = groups, seed

    def compute(
        self,
        name: str,
        statistic: Statistic,
        confidence: Any,
        labels: NDArray[np.bool_],
        among: NDArray[np.bool_] | None = None,
    ) -> None:
        selected = np.ones_like(labels) if among is None else among
        groups = None if self._groups is None else self._groups[selected]
        confidence = np.asarray(confidence, dtype=np.float64)[selected]
        value, interval = with_bootstrap_interval(
            statistic, confidence, labels[selected], groups=groups, seed=self._seed
        )
        self.add(name, value, interval)

    def add(self, name: str, value: float, interval: tuple[float, float]) -> None:
        if not np.isnan(value):
            self.values |= number(name, value, interval)


def _mean(values: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _risk_coverage_points(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[list[float | None]]:
    """At most `MAX_CURVE_POINTS` points of the curve, its last included."""
    coverage, risk = risk_coverage(confidence, right)
    kept = np.unique(np.linspace(0, len(coverage) - 1, MAX_CURVE_POINTS).round().astype(int))
    return [[rounded(coverage[i]), rounded(risk[i])] for i in kept]
