"""The tool from Python: `ground` and `evaluate`, what the commands do without files and options.

`find_heads` is in `finding`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.box_scale import TrueBox, check_scale, true_boxes
from localization_heads.data.images import ImageSource, load_image
from localization_heads.data.samples import Sample, where
from localization_heads.errors import NoHeadError, NotFiniteError, UsageError
from localization_heads.evaluation.claims import Claim, claim_of
from localization_heads.evaluation.judging import Bootstrap, Judge, Scores, truth_of
from localization_heads.evaluation.scores import score_box
from localization_heads.finding import attended
from localization_heads.grounder import Grounder, check_heads, load_calibration, make_segmenter
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import LEAST_OF_PLACES, Grounding, ground_maps
from localization_heads.grounding.zoom import crop_around, mapped_back
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking
from localization_heads.lvlm.vocabulary import in_singular, note_unknown_words
from localization_heads.options.compose import newcomers_grounding
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.options.instances import PLACES, InstancesBy
from localization_heads.segmentation.segmenter import GRABCUT, Segmenter

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM

log = logging.getLogger(__name__)

K = 3
"""Heads that a sample picks for itself (the paper's k)."""


def ground(
    lvlm: LVLM,
    image: ImageSource,
    expression: str,
    heads: Sequence[Head] | HeadRanking | None = None,
    *,
    options: GroundingOptions | None = None,
    segmenter: Segmenter | SegmenterOptions | None = GRABCUT,
    zoom: bool = False,
    calibration: Calibration | str | Path | None = None,
    abstain: float | None = None,
) -> Grounding:
    """The box, mask and heat map of an expression in an image (Sec. 5).

    The prefix that holds the image is kept: asked about the same image again, the model does not encode it anew.

    Args:
        image: an image, a path or an http(s) address (an `Address` may allow private ones).
        heads: whose maps are added; of a ranking the three best, with a note in `lvlm.notes` if it was made with
            other weights, another prompt or query token; None takes the model's known localization heads, and if there
            are none, the three that this very image and expression pick (the paper's "greedy" ablation).
        segmenter: what makes the mask: GrabCut by default, None for the map's own pseudo-mask. A SAM is loaded once,
            by `make_segmenter`, and handed in here.
        zoom: ask again about a crop around the box, and average both boxes where they agree (`grounding.zoom`).
        calibration: what makes the confidence a probability: a `calibration.json` of stage=calibrate; None leaves the
            raw signal.
        abstain: the least probability of presence (of a calibration without it, the least confidence) of what is
            there: below it, the result is `absent`. None takes everything for present.

    Raises:
        ValueError: a head that the model does not have, no head at all in `heads`, or `abstain` without a calibration.
        UsageError: an image or an expression that cannot be used, or one that no head passes the criteria for; a
            calibration of other heads or another recipe.
        NotFiniteError: NaN or infinite attention.
    """
    opened = load_image(image)
    grounder = _grounder(lvlm, heads, CriteriaOptions(), options, segmenter)
    grounder = _calibrated(grounder, lvlm, calibration, abstain, zoom=zoom)
    note_unknown_words(lvlm, [expression])
    (maps,) = lvlm.ask(opened, [expression], last_layer=grounder.last_layer, beside=grounder.beside())
    second = _second_look(lvlm, grounder, maps, opened, expression) if zoom else None
    return grounder.ground(maps, opened, second=second)


def _second_look(
    lvlm: LVLM, grounder: Grounder, maps: AttentionMaps, image: Image.Image, expression: str
) -> Box | None:
    """The box that the same heads find in a crop around the first one, in pixels of the image; None if none is asked.

    Args:
        maps: of the whole image.
    """
    first = ground_maps(maps, grounder.heads_of(maps), grounder.options)
    if (crop := crop_around(first)) is None:
        return None
    last_layer = max(head.layer for head in first.heads)
    closer = lvlm.attend(image.crop(crop), expression, last_layer=last_layer)
    found = ground_maps(closer, first.heads, grounder.options)
    return mapped_back(found.box, crop) if found.cells.any() else None


def ground_all(
    lvlm: LVLM,
    image: ImageSource,
    expression: str,
    heads: Sequence[Head] | HeadRanking | None = None,
    *,
    options: GroundingOptions | None = None,
    segmenter: Segmenter | SegmenterOptions | None = GRABCUT,
    by: InstancesBy = "components",
    calibration: Calibration | str | Path | None = None,
    abstain: float | None = None,
) -> list[Grounding]:
    """Every object that an expression such as "the dogs" fits, that of the highest score first; at least one.

    Each is a component of the map's positive cells that holds at least `LEAST_MASS` of the strongest one's attention,
    with a box, a mask and a score of its own (the share of the whole map in its box); of two that overlap by more than
    half only the better one is there. Each is `absent` by itself. A plural that the model does not know is asked in the
    singular. Arguments and errors as of `ground`.

    Args:
        by: whether the map is that of the expression (`components`) or the mean of those of the expression on the left,
            on the right, at the top and at the bottom (`places`), of which an object draws `LEAST_OF_PLACES` or more.
    """
    if by == "places":
        lvlm = lvlm.worded(PLACES)
    expression = in_singular(lvlm.processor.tokenizer, expression)
    opened = load_image(image)
    grounder = _calibrated(
        _grounder(lvlm, heads, CriteriaOptions(), options, segmenter), lvlm, calibration, abstain
    )
    if by == "places":
        grounder = replace(grounder, least_mass=LEAST_OF_PLACES)
    note_unknown_words(lvlm, [expression])
    (maps,) = lvlm.ask(opened, [expression], last_layer=grounder.last_layer, beside=grounder.beside())
    return grounder.ground_all(maps, opened)


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
    heads: Sequence[Head] | HeadRanking | None = None,
    *,
    criteria: CriteriaOptions | None = None,
    options: GroundingOptions | None = None,
    segmenter: Segmenter | SegmenterOptions | None = GRABCUT,
    controls: bool = True,
    native: bool | None = None,
    bootstrap: Bootstrap = "expression",
    seed: int = 42,
    calibration: Calibration | str | Path | None = None,
) -> Evaluation:
    """`ground` every sample, and score it against its true box and mask, beside the controls (Sec. 5).

    Samples that are `absent`, or have several true boxes, take part in what is said of the confidence alone.

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
        ValueError: there is no sample, or a head that the model does not have.
        UsageError: a sample whose image, expression or truth cannot be used; boxes that are no pixels of their
            images, before the first sample where `samples` is a sequence, else after the last.
        NotFiniteError: no sample's attention is finite.
    """
    from localization_heads.lvlm.native_box import ask_for_box, wanted_format

    grounder = _grounder(lvlm, heads, criteria or CriteriaOptions(), options, segmenter)
    grounder = _calibrated(grounder, lvlm, calibration)
    judge = Judge(grounder.criteria, grounder.options, controls, bootstrap, seed)
    form = wanted_format(lvlm, native, by_default=controls)
    scored: list[Scored] = []
    claims: list[Claim] = []
    images: list[str] = []
    boxes: list[TrueBox] = []
    unusable: list[NotFiniteError] = []
    num_headless = 0
    if listed := isinstance(samples, Sequence):
        check_scale(true_boxes(samples), "samples")
    last_layer = None if controls else grounder.last_layer
    beside = grounder.beside(every_head=controls)
    for sample, opened, number, maps in attended(lvlm, samples, unusable, last_layer, beside):
        one_box = not sample.absent and len(sample.boxes) < 2
        truth = truth_of(_with_one(sample), opened.size) if one_box else None
        if sample.bbox is not None and not listed:
            boxes.append(TrueBox(where(sample), sample.bbox, opened.size))
        try:
            grounding = grounder.ground(maps, opened)
        except NoHeadError as error:
            log.warning("%s is left out: %s", sample.id, error)
            num_headless += 1
            continue
        known = replace(sample, bbox=truth.box) if truth else sample
        claims.append(claim_of(known, grounding, sample.image_key or f"image {number}"))
        if truth is None:
            continue
        scores = judge.scores(maps, grounding, truth, partial(grounder.refine, image=opened))
        if form:
            box, _ = ask_for_box(lvlm, form, opened, sample.expression)
            scores["native"] = [score_box(box, truth, opened.size)]
        scored.append(Scored(sample.id, sample.expression, grounding.box, scores))
        images.append(sample.image_key or f"image {number}")
    note_unknown_words(lvlm, [claim.expression for claim in claims])
    if not claims:
        none = ValueError("evaluate needs at least one sample that can be grounded")
        raise unusable[0] if unusable else none
    check_scale(boxes, "samples")
    choices = {
        **lvlm.choices,
        **judge.choices(grounder.heads, K),
        "segmenter": _named(segmenter),
        "native": form and form.prompt,
        "instances": "one",
        "zoom": False,
    }
    metrics = judge.metrics([one.scores for one in scored], images, len(unusable) + num_headless)
    return Evaluation({**metrics, **judge.trust(claims), "choices": choices}, scored)


def _with_one(sample: Sample) -> Sample:
    """A list of one true box is that box."""
    return replace(sample, bbox=sample.boxes[0]) if sample.boxes and sample.bbox is None else sample


def _calibrated(
    grounder: Grounder,
    lvlm: LVLM,
    calibration: Calibration | str | Path | None,
    abstain: float | None = None,
    *,
    zoom: bool = False,
) -> Grounder:
    """The grounder with the calibration, and the presence from which on it takes a thing for present.

    Raises:
        ValueError: `abstain` without a calibration.
        UsageError: the calibration cannot be read or does not fit.
    """
    if calibration is None:
        if abstain is not None:
            raise ValueError(f"abstain={abstain:g} needs a calibration: stage=calibrate writes one")
        return grounder
    found = calibration if isinstance(calibration, Calibration) else load_calibration(calibration)
    named = "the calibration" if isinstance(calibration, Calibration) else calibration
    found.check(grounder.recipe({**lvlm.choices, **lvlm.asked}, zoom=zoom), named)
    return replace(grounder, calibration=found, abstain=abstain)


def _grounder(
    lvlm: LVLM,
    heads: Sequence[Head] | HeadRanking | None,
    criteria: CriteriaOptions,
    options: GroundingOptions | None,
    segmenter: Segmenter | SegmenterOptions | None,
) -> Grounder:
    """The grounder that the arguments of `ground` and `evaluate` ask for. ValueError for a head the model lacks."""
    if isinstance(heads, HeadRanking):
        lvlm.note_other_conditions("these heads", heads.found_with)
        heads = heads.top(K)
    if heads is not None and not len(heads):
        raise ValueError("heads names no head; None takes those that are known, or each sample's own")
    if heads is None:
        ready = lvlm.ready
        if ready.advice:
            lvlm.note(ready.advice)
        heads = ready.heads[:K]
    chosen = tuple(Head(*head) for head in heads)
    try:
        check_heads(chosen, lvlm.num_layers, lvlm.num_heads)
    except UsageError as error:
        raise ValueError(str(error)) from None
    made = make_segmenter(segmenter) if isinstance(segmenter, SegmenterOptions) else segmenter
    return Grounder(chosen, criteria, options or newcomers_grounding(), made, K)


def _named(segmenter: Segmenter | SegmenterOptions | None) -> dict[str, Any]:
    """As `metrics.json` names it."""
    if isinstance(segmenter, SegmenterOptions):
        return asdict(segmenter)
    return {"kind": "none" if segmenter is None else segmenter.name}
