"""`evaluate`: boxes and masks scored from Python, without files and options."""

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
from localization_heads.finding import attended
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import Grounding
from localization_heads.lvlm.vocabulary import warn_of_unknown_words
from localization_heads.options.groups import CriteriaOptions
from localization_heads.segmentation.segmenter import GRABCUT

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM

log = logging.getLogger(__name__)


class Scored(NamedTuple):
    """One sample: the predicted box, and the scores of each method.

    Attributes:
        id: the sample's.
        box: xyxy in pixels.
        scores: by method, as in `metrics["controls"]`, those of the heads first, as `"heads"`.
    """

    id: str
    expression: str
    box: Box
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        metrics: what `metrics.json` holds: each metric and its 95 % interval, the counts, `controls` and `choices`.
        samples: in the order in which they came.
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
    """`ground` every sample, and score it against its true box and mask, beside the controls (Sec. 5).

    Samples that are `absent`, or have several true boxes, take part in what is said of the confidence, and in F1 and
    Pr@(F1=1), which are there where such samples are.

    A sample is left out, with a warning, and counted among `num_failed` if its attention is not finite, or if it has to
    pick its own heads and none passes the criteria.

    Args:
        samples: with `bbox` or `mask`, or both; read as they are needed, as by `find_heads`.
        heads: as in `ground`, for all samples.
        options: as in `ground`, for the controls too.
        segmenter: as in `ground`, for the controls too.
        criteria: what heads must pass where each sample picks its own; `exclude_layers` is also that of the control
            of all heads.
        controls: score random heads, all heads, the centre box and the oracle as well; they need all layers.
        native: ask the model for a box of its own; None asks one that is known to write boxes, beside the controls.
        bootstrap: what the 95 % intervals draw: expressions, or images with all their expressions.
        seed: of the random heads and of the bootstrap.
        calibration: as in `ground`.

    Raises:
        ArgumentError: there is no sample, or a head that the model does not have.
        UsageError: a sample whose image, expression or truth cannot be used; boxes that are no pixels of their
            images, before the first sample where `samples` is a sequence, else after the last.
        NotFiniteError: no sample's attention is finite.
    """
    from localization_heads.lvlm.native_box import generate_box, native_box_format

    grounder = grounder_of(lvlm, heads, criteria or CriteriaOptions(), options, segmenter, k)
    grounder = calibrated(grounder, lvlm, calibration)
    judge = Judge(grounder.criteria, grounder.options, controls, bootstrap, seed)
    form = native_box_format(lvlm, native, by_default=controls)
    scored: list[Scored] = []
    claims: list[Claim] = []
    answers: list[Answer] = []
    images: list[str] = []
    boxes: list[TrueBox] = []
    unusable: list[NotFiniteError] = []
    num_headless = 0
    if listed := isinstance(samples, Sequence):
        check_box_scale(collect_true_boxes(samples), "samples")
    last_layer = None if controls else grounder.last_layer
    extra_prompts = grounder.extra_prompts(every_head=controls)
    for sample, opened, number, maps in attended(lvlm, samples, unusable, last_layer, extra_prompts):
        one_box = not sample.absent and len(sample.boxes) < 2
        truth = truth_of(_with_one(sample), opened.size) if one_box else None
        if sample.bbox is not None and not listed:
            boxes.append(TrueBox(sample_name(sample), sample.bbox, opened.size))
        try:
            grounding = grounder.ground(maps, opened)
        except NoHeadError as error:
            log.warning("%s is left out: %s", sample.id, error)
            num_headless += 1
            continue
        known = replace(sample, bbox=truth.box) if truth else sample
        image = sample.image_key or f"image {number}"
        claims.append(claim_of(known, grounding, image))
        answers.append(_answer(known, grounding, image))
        if truth is None:
            continue
        scores = judge.scores(
            maps,
            grounding,
            truth,
            partial(grounder.refine, image=opened, name=f"a control of {sample_name(sample)}"),
        )
        if form:
            box, _ = generate_box(lvlm, form, opened, sample.expression)
            scores["native"] = [score_box(box, truth, opened.size)]
        scored.append(Scored(sample.id, sample.expression, grounding.box, scores))
        images.append(image)
        own = scores[HEADS][0]
        answers[-1] = answers[-1]._replace(peak=own.pointing, overlap=answers[-1].overlap or own.overlap)
    warn_of_unknown_words(lvlm, [claim.expression for claim in claims])
    if not claims:
        none = ArgumentError("evaluate needs at least one sample that can be grounded")
        raise unusable[0] if unusable else none
    check_box_scale(boxes, "samples")
    block = protocol_block(answers, lvlm.note, by_image=bootstrap == "image", seed=seed)
    choices = {
        **lvlm.choices,
        **judge.choices(grounder.heads, k),
        "segmenter": named_segmenter(segmenter),
        "native": form and form.prompt,
        "instances": "one",
        "zoom": False,
        **named_protocol(block),
    }
    metrics = judge.metrics([one.scores for one in scored], images, len(unusable) + num_headless)
    several = _of_several(answers, by_image=bootstrap == "image", seed=seed)
    return Evaluation({**metrics, **several, **judge.trust(claims), **block, "choices": choices}, scored)


def _of_several(answers: Sequence[Answer], *, by_image: bool, seed: int) -> dict[str, Any]:
    """F1 and Pr@(F1=1) over all samples; nothing where each has one true box, as in Acc@0.5."""
    if all(len(one.truths) == 1 for one in answers):
        return {}
    groups = [one.image for one in answers] if by_image else None
    boxes, truths = {"boxes": [one.boxes for one in answers]}, [one.truths for one in answers]
    found = instance_metrics(boxes, truths, groups=groups, seed=seed)["boxes"]
    return {**found, "num_answers": len(answers)}


def _answer(sample: Sample, grounding: Grounding, image: str) -> Answer:
    """What was answered, and what is true, for the benchmark's own metric."""
    return Answer(
        boxes=() if grounding.absent else (grounding.box,),
        truths=sample.true_boxes,
        rejected=grounding.absent,
        confidence=grounding.confidence,
        overlap=overlap_of_all(sample, [grounding]),
        image=image,
        facts=sample.facts,
    )


def _with_one(sample: Sample) -> Sample:
    """A list of one true box is that box."""
    return replace(sample, bbox=sample.boxes[0]) if sample.boxes and sample.bbox is None else sample
