"""How far a confidence can be trusted: AUROC, risk and coverage, calibration error; `confidence` of `metrics.json`.

Each number takes the confidences `[n]` of n answers and whether each answer was right, bool `[n]`; equal confidences
always go together. All are NaN where they are undefined (no answer; for AUROC, none of one kind).

Of claims, three events are told apart: the box is right among expressions that refer to something (`auroc_right`, of
the probability that it is right if there is something), the expression refers to something (`auroc_present`), and both
(`auroc_useful`). What is absent has no right box. A control for presence is the expression alone, without the image:
where absent expressions differ from others in their words, a classifier that never sees an image does well (0.92 on
GroundingME), and so a method may have learned nothing else.
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


def reliability(confidence: ArrayLike, right: ArrayLike) -> list[tuple[float, float, int]]:
    """Mean confidence, share of right answers and count of each bin of equal width over 0 to 1; empty bins left out."""
    values, is_right = _both(confidence, right)
    place = np.clip((values * BINS).astype(int), 0, BINS - 1)
    return [
        (float(values[place == bin].mean()), float(is_right[place == bin].mean()), int((place == bin).sum()))
        for bin in range(BINS)
        if (place == bin).any()
    ]


def calibration_error(confidence: ArrayLike, right: ArrayLike) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over the bins, by their counts.

    >>> calibration_error([0.9, 0.9, 0.1, 0.1], [True, False, False, False])
    0.25
    """
    found = reliability(confidence, right)
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


FOLDS = 5


def presence_from_text(
    expressions: Sequence[str], present: ArrayLike, images: Sequence[str], *, seed: int = 42
) -> NDArray[np.float64] | None:
    """The probability that each expression refers to something, from its words and pairs of words alone.

    Bag of words and logistic regression, each expression judged by a model that was fitted without its image.

    Args:
        present: the truth, bool `[n]`.
        images: the identity of each expression's image.

    Returns:
        float64 `[n]`, or None where there are not enough images or expressions of either kind, or no words.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline

    truth = np.asarray(present, dtype=bool)
    if min(truth.sum(), (~truth).sum(), len(set(images))) < FOLDS:
        return None
    found = np.full(len(truth), float(truth.mean()))
    parts = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(truth, truth, images)
    for fitted, left in parts:
        if len(set(truth[fitted].tolist())) < 2:
            continue
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True)
        model = make_pipeline(words, LogisticRegression(max_iter=1000))
        model.fit([expressions[i] for i in fitted], truth[fitted])
        found[left] = model.predict_proba([expressions[i] for i in left])[:, 1]
    return found


RIGHT = 0.5
"""IoU with a true box from which on a box is right."""
ALSO_BESIDE = ("auroc_right", "auroc_present", "auroc_useful", "aurc", "ece", "n_acc")
"""Numbers that `metrics.json` has beside the metrics, too."""
MOST_POINTS = 100
"""Of the risk-coverage curve that are kept."""

Statistic = Callable[[NDArray[np.float64], NDArray[np.bool_]], float]


class Claim(NamedTuple):
    """What one answer says of itself, and what is true.

    Attributes:
        confidence, presence, calibrated, absent: as in `Grounding`.
        right: the box is right, whether or not it was given as the answer.
        present: the expression refers to something in the image.
        image: its identity.
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
        """The probability that the box is right if there is something; times presence it is the confidence."""
        if self.confidence is None or not self.presence:
            return self.confidence
        return self.confidence / self.presence


def is_right(sample: Sample, box: Box) -> bool:
    """Whether a box has an IoU of at least `RIGHT` with a true one; never for what is absent.

    >>> is_right(Sample("cat.jpg", "the cat", bbox=(0, 0, 2, 2)), (0, 0, 2, 1))
    True
    """
    return any(bool(box_iou(box, true) >= RIGHT) for true in sample.true_boxes)


def claim_of(sample: Sample, grounding: Grounding, image: str) -> Claim:
    """The claim of a grounding about a sample with its true boxes."""
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
    """AUROC, AURC, calibration error and what abstaining achieves, each with its 95 % interval, and the two curves.

    A number that is undefined is left out; of no claim with a confidence the result is empty. `aurc` and `ece` are over
    all answers, absent ones included, and so are the curves: `risk_coverage` (coverage, risk) and `reliability` (mean
    confidence, share of right boxes, count, for each bin that is not empty).

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
    numbers = _Numbers(images if by_image else None, seed)
    numbers.add("auroc_right", auroc, [claim.if_present for claim in known], right, among=present)
    if not present.all():
        said = [claim.presence if claim.presence is not None else claim.confidence for claim in known]
        numbers.add("auroc_present", auroc, said, present)
        numbers.add("auroc_useful", auroc, confidence, right)
    numbers.add("aurc", aurc, confidence, right)
    numbers.add("ece", calibration_error, confidence, right)
    if calibrated := all(claim.calibrated for claim in known):
        numbers.put("ece_by_chance", *chance_error(confidence, seed=seed))
    absent = np.array([claim.absent for claim in known])
    if absent.any():
        numbers.add("n_acc", _share, absent, present, among=~present)
        numbers.add("t_acc", _share, ~absent, present, among=present)
    if not present.all():
        texts = [claim.expression for claim in known]
        blind = presence_from_text(texts, present, images.tolist(), seed=seed)
        if blind is not None:
            numbers.add("text_only", auroc, blind, present)
    return {
        "calibrated": calibrated,
        "num_answers": len(known),
        "num_absent": int((~present).sum()),
        "num_right": int(right.sum()),
        **numbers.found,
        "risk_coverage": _curve(confidence, right),
        "reliability": [[rounded(m), rounded(s), n] for m, s, n in reliability(confidence, right)],
    }


class _Numbers:
    """Collects numbers with their intervals, by name; undefined ones are left out."""

    def __init__(self, groups: NDArray[Any] | None, seed: int) -> None:
        self.found: dict[str, Any] = {}
        self._groups, self._seed = groups, seed

    def add(
        self,
        name: str,
        statistic: Statistic,
        values: Any,
        truth: NDArray[np.bool_],
        among: NDArray[np.bool_] | None = None,
    ) -> None:
        chosen = np.ones_like(truth) if among is None else among
        groups = None if self._groups is None else self._groups[chosen]
        values = np.asarray(values, dtype=np.float64)[chosen]
        self.put(name, *with_interval(statistic, values, truth[chosen], groups=groups, seed=self._seed))

    def put(self, name: str, value: float, interval: tuple[float, float]) -> None:
        if not np.isnan(value):
            self.found |= number(name, value, interval)


def _share(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Of ones among zeros and ones."""
    return float(values.mean()) if values.size else float("nan")


def _curve(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[list[float | None]]:
    """At most `MOST_POINTS` points of the risk-coverage curve, its last among them."""
    coverage, risk = risk_coverage(confidence, right)
    kept = np.unique(np.linspace(0, len(coverage) - 1, MOST_POINTS).round().astype(int))
    return [[rounded(coverage[i]), rounded(risk[i])] for i in kept]
