"""`evaluate`: ground samples with ground truth from Python, and score boxes and masks against it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from localization_heads.arguments import Heads, K, Masks, ReadOut, calibrated, grounder_of, named_segmenter
from localization_heads.attention import Box
from localization_heads.data.box_scale import TrueBox, check_box_scale, collect_true_boxes
from localization_heads.data.samples import Sample, sample_name
from localization_heads.errors import ArgumentError, NoHeadError, NotFiniteError
from localization_heads.evaluation.confidence import Claim, claim_of
from localization_heads.evaluation.judging import HEADS, Bootstrap, Judge, Scores, overlap_of_all, truth_of
from localization_heads.evaluation.protocols import Answer, named_protocol, protocol_block
from localization_heads.evaluation.scores import instance_metrics, score_box
from localization_heads.finding import stream_attention
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import Grounding
from localization_heads.lvlm.vocabulary import warn_of_unknown_words
from localization_heads.options.groups import CriteriaOptions
from localization_heads.segmentation.segmenter import GRABCUT

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM

log = logging.getLogger(__name__)


class Scored(NamedTuple):
    """The predicted box of one sample and the scores of each method.

    Attributes:
        id: the sample's id.
        box: the predicted box, xyxy in pixels.
        scores: by method: `"heads"` first, then the controls as named in `metrics["controls"]`.
    """

    id: str
    expression: str
    box: Box
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        metrics: the content of `metrics.json`: each metric with its 95 % interval, counts, `controls` and `choices`.
        samples: scores of each sample, in input order.
    """

    metrics: dict[str, Any]
    samples: list[Scored]


def evaluate(
    lvlm: LVLM,
    samples: Iterable[Sample],
    heads: Heads = None,
    *,
    criteria: CriteriaOptions | None = None,
    options: ReadOut = None,
    segmenter: Masks = GRABCUT,
    k: int = K,
    controls: bool = True,
    native: bool | None = None,
    bootstrap: Bootstrap = "expression",
    seed: int = 42,
    calibration: Calibration | str | Path | None = None,
) -> Evaluation:
    """Ground every sample and score it against its true box and mask, with controls for comparison (Sec. 5).

    Samples that are `absent` or have several true boxes count only in the metrics of confidence, in those of the
    benchmark's protocol, and in F1 and Pr@(F1=1), which are reported if there are such samples.

    A sample is skipped with a warning and counted in `num_failed` if its attention is not finite, or if it has to
    select its own heads and none passes the criteria.

    Args:
        samples: with a `bbox`, a `mask` or both; read lazily, as by `find_heads`.
        heads: as in `ground`.
        options: as in `ground`; the controls use the same.
        segmenter: as in `ground`; the controls use the same.
        criteria: what a head must pass if each sample selects its own; its `exclude_layers` also applies to the
            control of all heads.
        controls: also score random heads, all heads, the centre box and the oracle, which need all layers.
        native: also score the box that the model itself writes; None does so, if there are controls, for models known
            to write boxes.
        bootstrap: what the 95 % intervals resample: expressions, or images with all their expressions.
        seed: of the random heads and of the bootstrap.
        calibration: as in `ground`.

    Raises:
        ArgumentError: there are no samples, or a head that the model does not have.
        UsageError: a sample whose image, expression or ground truth is unusable; boxes that are not in pixels of their
            images, raised before the first sample if `samples` is a sequence, else after the last.
        NotFiniteError: no sample has finite attention.
    """
    from localization_heads.lvlm.native_box import generate_box, native_box_format

    grounder = grounder_of(lvlm, heads, criteria or CriteriaOptions(), options, segmenter, k)
    grounder = calibrated(grounder, lvlm, calibration)
    judge = Judge(grounder.criteria, grounder.options, controls, bootstrap, seed)
    box_format = native_box_format(lvlm, native, by_default=controls)
    scored: list[Scored] = []
    claims: list[Claim] = []
    answers: list[Answer] = []
    image_keys: list[str] = []
    boxes: list[TrueBox] = []
    not_finite: list[NotFiniteError] = []
    num_without_heads = 0
    if is_sequence := isinstance(samples, Sequence):
        check_box_scale(collect_true_boxes(samples), "samples")
    last_layer = None if controls else grounder.last_layer
    extra_prompts = grounder.extra_prompts(every_head=controls)
    for sample, image, image_number, maps in stream_attention(lvlm, samples, not_finite, last_layer, extra_prompts):
        has_single_truth = not sample.absent and len(sample.boxes) < 2
        truth = truth_of(_with_bbox(sample), image.size) if has_single_truth else None
        if sample.bbox is not None and not is_sequence:
            boxes.append(TrueBox(sample_name(sample), sample.bbox, image.size))
        try:
            grounding = grounder.ground(maps, image)
        except NoHeadError as error:
            log.warning("%s is left out: %s", sample.id, error)
            num_without_heads += 1
            continue
        known = replace(sample, bbox=truth.box) if truth else sample
        image_key = sample.image_key or f"image {image_number}"
        claims.append(claim_of(known, grounding, image_key))
        answers.append(_answer(known, grounding, image_key))
        if truth is None:
            continue
        scores = judge.scores(
            maps,
            grounding,
            truth,
            partial(grounder.refine, image=image, name=f"a control of {sample_name(sample)}"),
        )
        if box_format:
            box, _ = generate_box(lvlm, box_format, image, sample.expression)
            scores["native"] = [score_box(box, truth, image.size)]
        scored.append(Scored(sample.id, sample.expression, grounding.box, scores))
        image_keys.append(image_key)
        score = scores[HEADS][0]
        answers[-1] = answers[-1]._replace(peak=score.pointing, overlap=answers[-1].overlap or score.overlap)
    warn_of_unknown_words(lvlm, [claim.expression for claim in claims])
    if not claims:
        nothing = ArgumentError("evaluate needs at least one sample that can be grounded")
        raise not_finite[0] if not_finite else nothing
    check_box_scale(boxes, "samples")
    block = protocol_block(answers, lvlm.note, by_image=bootstrap == "image", seed=seed)
    choices = {
        **lvlm.choices,
        **judge.choices(grounder.heads, k),
        "segmenter": named_segmenter(segmenter),
        "native": box_format and box_format.prompt,
        "instances": "one",
        "zoom": False,
        **named_protocol(block),
    }
    num_failed = len(not_finite) + num_without_heads
    metrics = judge.metrics([sample.scores for sample in scored], image_keys, num_failed)
    several = _instance_metrics(answers, by_image=bootstrap == "image", seed=seed)
    return Evaluation({**metrics, **several, **judge.trust(claims), **block, "choices": choices}, scored)


def _instance_metrics(answers: Sequence[Answer], *, by_image: bool, seed: int) -> dict[str, Any]:
    """F1 and Pr@(F1=1) over all samples; empty if each has exactly one true box, where they add nothing to Acc@0.5."""
    if all(len(answer.truths) == 1 for answer in answers):
        return {}
    groups = [answer.image for answer in answers] if by_image else None
    boxes, truths = [answer.boxes for answer in answers], [answer.truths for answer in answers]
    metrics = instance_metrics({"boxes": boxes}, truths, groups=groups, seed=seed)["boxes"]
    return {**metrics, "num_answers": len(answers)}


def _answer(sample: Sample, grounding: Grounding, image: str) -> Answer:
    """The prediction and the ground truth for the benchmark's own metrics (`evaluation.protocols`)."""
    return Answer(
        boxes=() if grounding.absent else (grounding.box,),
        truths=sample.true_boxes,
        rejected=grounding.absent,
        confidence=grounding.confidence,
        overlap=overlap_of_all(sample, [grounding]),
        image=image,
        facts=sample.facts,
    )


def _with_bbox(sample: Sample) -> Sample:
    """The sample with the first of its `boxes` as `bbox`, if it has no `bbox`."""
    return replace(sample, bbox=sample.boxes[0]) if sample.boxes and sample.bbox is None else sample
