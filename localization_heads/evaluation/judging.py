"""Score groundings and controls against the ground truth, and aggregate the scores for `metrics.json`.

Shared by `stage=evaluate` and `localization_heads.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from localization_heads.attention import AttentionMaps
from localization_heads.cells import tight_box
from localization_heads.data.samples import Sample, check_inside, decode_ignored, decode_mask, sample_name
from localization_heads.errors import UsageError, check_choice
from localization_heads.evaluation.confidence import TOP_LEVEL_METRICS, Claim, confidence_metrics
from localization_heads.evaluation.controls import CENTRE, DRAWS, centre_box, control_groundings
from localization_heads.evaluation.metrics import NUM_RESAMPLES
from localization_heads.evaluation.scores import Score, Truth, score_box, score_grounding, summarize
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head
from localization_heads.options.compose import describe_preset
from localization_heads.options.groups import CriteriaOptions, GroundingOptions

NO_TRUTH = "has neither bbox nor mask: there is nothing to score against"

Bootstrap = Literal["expression", "image"]
Scores = dict[str, list[Score]]
"""Scores on one expression by method; `random_heads` has one score per draw, the others a single one."""

HEADS = "heads"
CONTROLS = ("random_heads", "all_heads", "centre_box", "oracle")
"""The controls in the order of `metrics.json`."""


def truth_of(sample: Sample, image_size: tuple[int, int]) -> Truth:
    """The sample's true mask and its true box, which defaults to the tight box of the mask.

    Args:
        image_size: `(W, H)` of the image in pixels.

    Raises:
        UsageError: the sample, which the message names, has neither, or its box or mask does not fit the image.

    >>> truth_of(Sample("cat.jpg", "the cat", bbox=(1, 2, 3, 4)), (8, 8))
    Truth(box=(1.0, 2.0, 3.0, 4.0), mask=None, ignored=None)
    """
    if sample.bbox is None and sample.mask is None:
        raise UsageError(f"{sample_name(sample)}: {NO_TRUTH}")
    check_inside(sample, image_size)
    mask = None if sample.mask is None else decode_mask(sample, image_size)
    box = sample.bbox or (None if mask is None else tight_box(mask))
    if box is None:
        raise UsageError(f"{sample_name(sample)}: the mask is empty and there is no bbox")
    return Truth(box, mask, None if mask is None else decode_ignored(sample, image_size))


def overlap_of_all(sample: Sample, found: Sequence[Grounding]) -> tuple[int, int] | None:
    """Intersection and union, in pixels, of the union of all predicted masks with the true one, for a protocol.

    Only for samples whose protocol needs it: absent ones of ReasonSeg, whose true mask is empty, and those of gRefCOCO
    that are absent or have a mask. None for all others.
    """
    protocol, size = sample.facts.get("protocol"), found[0].image_size
    has_mask = protocol == "grefcoco" and sample.mask is not None
    if protocol not in ("reasonseg", "grefcoco") or not (sample.absent or has_mask):
        return None
    masks = [grounding.mask for grounding in found if not grounding.absent]
    predicted = np.logical_or.reduce(masks) if masks else np.zeros(size[::-1], dtype=bool)
    if not sample.absent:
        return truth_of(sample, size).overlap(predicted)
    empty = np.zeros_like(predicted)
    return Truth((0.0, 0.0, 0.0, 0.0), empty, decode_ignored(sample, size)).overlap(predicted)


@dataclass(frozen=True)
class Judge:
    """Scores the heads and the controls, and aggregates the scores.

    Args:
        criteria: the criteria of the heads; the control of all heads uses their `exclude_layers`.
        grounding: the read-out of the heads and the controls.
        controls: whether to score the controls.
        bootstrap: what the intervals resample: expressions, or images with all their expressions.
        seed: of the random heads and of the bootstrap.

    Raises:
        ArgumentError: `bootstrap` is neither `expression` nor `image`.
    """

    criteria: CriteriaOptions
    grounding: GroundingOptions
    controls: bool = True
    bootstrap: Bootstrap = "expression"
    seed: int = 42

    def __post_init__(self) -> None:
        check_choice("bootstrap", self.bootstrap, Bootstrap)

    def scores(
        self,
        maps: AttentionMaps,
        grounding: Grounding,
        truth: Truth,
        refine: Callable[[Grounding], Grounding] = lambda answer: answer,
    ) -> Scores:
        """Score the heads' grounding, and the controls if there are any.

        Args:
            maps: those of all layers, if there are controls.
            refine: the segmenter, which makes the masks of the controls.
        """
        scores = {HEADS: [score_grounding(grounding, truth)]}
        if not self.controls:
            return scores
        grounded = control_groundings(
            maps,
            grounding.heads,
            truth,
            self.grounding,
            exclude_layers=self.criteria.exclude_layers,
            seed=self.seed,
        )
        controls = {
            # The copy frees the mask that it caches, one byte per pixel, once it is scored.
            name: [score_grounding(refine(replace(answer)), truth) for answer in answers]
            for name, answers in grounded.items()
        }
        controls["centre_box"] = [score_box(centre_box(maps.image_size), truth, maps.image_size)]
        return scores | {name: controls[name] for name in CONTROLS}

    def metrics(
        self, scored: Sequence[Mapping[str, Sequence[Score]]], images: Sequence[str], num_failed: int = 0
    ) -> dict[str, Any]:
        """The metrics of `metrics.json`: those of heads and controls with their intervals, and counts.

        Args:
            scored: the scores of each expression, all with the same methods.
            images: identity of each expression's image.
        """
        if not scored:
            return {"num_samples": 0, "num_failed": num_failed, "controls": {}}
        methods = {name: [scores[name] for scores in scored] for name in scored[0]}
        groups = images if self.bootstrap == "image" else None
        summary = summarize(methods, groups=groups, seed=self.seed)
        num_masks = sum(answers[0].overlap is not None for answers in methods[HEADS])
        return {
            **summary.pop(HEADS),
            **({"num_masks": num_masks} if num_masks else {}),
            "num_samples": len(scored),
            "num_failed": num_failed,
            "controls": summary,
        }

    def trust(self, claims: Sequence[Claim]) -> dict[str, Any]:
        """The block `confidence` of `metrics.json`, and those of its metrics that are repeated at the top level."""
        block = confidence_metrics(claims, by_image=self.bootstrap == "image", seed=self.seed)
        names = [name for name in TOP_LEVEL_METRICS if name in block]
        repeated = {key: block[key] for name in names for key in (name, f"{name}_interval")}
        return {**repeated, "confidence": block} if block else {}

    def choices(self, heads: Sequence[Head] | None, k: int) -> dict[str, Any]:
        """The settings that the metrics depend on, as JSON values by name.

        Args:
            heads: the fixed heads; None or empty if each sample selects its own `k`.
        """
        controls = {
            "random_heads": f"{DRAWS} draws of other heads of the same layers, averaged",
            "all_heads": f"mean over all heads of the layers from {self.criteria.exclude_layers} on",
            "centre_box": f"the middle {CENTRE:g} of width and height",
            "oracle": "true mask (true box where there is none) on the model's grid by area",
        }
        return {
            "heads": [str(head) for head in heads] if heads else "greedy: each sample's own",
            "k": len(heads) if heads else k,
            "criteria": asdict(self.criteria),
            "grounding": asdict(self.grounding),
            "read_out": describe_preset("grounding", self.grounding),
            "controls": controls if self.controls else None,
            "bootstrap": f"{NUM_RESAMPLES} resamples of {self.bootstrap}s, 95 %",
            "random_seed": self.seed,
        }
