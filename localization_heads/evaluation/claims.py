"""What the confidences of many answers are worth: the block `confidence` of `metrics.json`.

Three events are told apart: the box is right among expressions that refer to something (`auroc_right`, of the
probability that it is right if there is something), the expression refers to something (`auroc_present`), and both
(`auroc_useful`). What is absent has no right box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.data.samples import Sample
from localization_heads.evaluation.confidence import (
    aurc,
    auroc,
    calibration_error,
    chance_error,
    reliability,
    risk_coverage,
    with_interval,
)
from localization_heads.evaluation.scores import rounded
from localization_heads.evaluation.text_only import presence_from_text
from localization_heads.grounding.ground import Grounding

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
            self.found |= {name: rounded(value), f"{name}_interval": [rounded(bound) for bound in interval]}


def _share(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Of ones among zeros and ones."""
    return float(values.mean()) if values.size else float("nan")


def _curve(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> list[list[float | None]]:
    """At most `MOST_POINTS` points of the risk-coverage curve, its last among them."""
    coverage, risk = risk_coverage(confidence, right)
    kept = np.unique(np.linspace(0, len(coverage) - 1, MOST_POINTS).round().astype(int))
    return [[rounded(coverage[i]), rounded(risk[i])] for i in kept]
