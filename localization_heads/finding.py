"""`find_heads`: rank a model's heads from Python, label-free as in the paper or by labels.

It streams over the samples: only a few kilobytes of statistics are kept of each. Statistics are computed in a
background thread while the model attends to the next batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.background import postprocess, prefetch
from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.data.sources import PromptImages
from localization_heads.datasets.leakage import image_keys
from localization_heads.errors import ArgumentError, NotFiniteError, check_choice
from localization_heads.evaluation.head_iou import label_scores
from localization_heads.evaluation.judging import truth_of
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.labels import LabelRecipe, mass_on_patches, rank_by_labels
from localization_heads.heads.ranking import add_sensitivity, random_draws, rank_heads
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics, mean_sensitivity
from localization_heads.lvlm.extra_prompts import (
    MAX_SIBLINGS,
    NO_EXTRA_PROMPTS,
    ExtraPrompts,
    measure_sensitivity,
    measures_sensitivity,
    sensitivity_prompts,
)
from localization_heads.lvlm.native_box import with_box_span
from localization_heads.options.finder_mixins import HeadsBy, Shrink
from localization_heads.options.groups import CriteriaOptions

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM, PreparedBatch

log = logging.getLogger(__name__)

BATCH_SIZE = 16
"""Expressions of one image that are attended to, and whose maps are in memory, together."""


def find_heads(
    lvlm: LVLM,
    samples: Iterable[Sample],
    *,
    criteria: CriteriaOptions | None = None,
    top_n: int | None = None,
    num_trials: int = 5,
    num_samples: int = 1000,
    seed: int = 42,
    by: HeadsBy = "criteria",
    num_labels: int | None = None,
    shrink: Shrink = "none",
    shrink_n0: float = 10.0,
) -> HeadRanking:
    """Rank a model's heads by selection frequency (Sec. 4), without labels; or by labels, if the samples have them.

    A sample whose attention is not finite (which can happen in half precision) is skipped with a warning.

    Args:
        samples: images with expressions, read lazily. An image is encoded once for all consecutive samples that share
            it.
        criteria: the criteria that localization heads must meet; None for the paper's two. With
            `CriteriaOptions(sensitivity="siblings")`, heads whose maps follow the expression are ranked first
            (`heads.sensitivity`).
        top_n: heads marked per sample (N); None for the model's default: the paper's 10, or fewer for a model with few
            heads.
        num_trials: random draws that the selection frequency is averaged over.
        num_samples: samples per draw.
        seed: of all random draws.
        by: `criteria` for the label-free ranking; otherwise what scores each head on each sample, which must have a box
            or a mask: `mass`, `iou` and `pointing` score the head's own map, `vrh` the attention of the tokens of the
            box that the model writes (`heads.labels`).
        num_labels: samples drawn for a ranking by labels; None for all. `num_trials` draws show its spread.
        shrink: whether to shrink a ranking from few labels towards the label-free one (`heads.labels.shrink_scores`).
        shrink_n0: the number of labels at which both rankings weigh the same.

    Raises:
        ArgumentError: there are no samples, or fewer than `num_labels`.
        UsageError: an unusable image or expression; a sample without ground truth that needs it; `vrh` with a model
            that writes no boxes.
        NotFiniteError: no sample has finite attention.
    """
    check_choice("by", by, HeadsBy)
    check_choice("shrink", shrink, Shrink)
    criteria = criteria or CriteriaOptions()
    not_finite: list[NotFiniteError] = []
    score_by_label = _label_scorer(lvlm, by)
    measured = _measure_samples(lvlm, samples, criteria, score_by_label, not_finite)
    if not measured:
        raise not_finite[0] if not_finite else ArgumentError("find_heads needs at least one sample")
    sums, entropies, bottom_row = (
        np.stack(column) for column in zip(*(sample.statistics for sample in measured), strict=True)
    )
    ranking = rank_heads(
        sums,
        entropies,
        bottom_row=bottom_row,
        options=criteria,
        top_n=top_n or lvlm.spec.top_n,
        num_trials=num_trials,
        num_samples=num_samples,
        seed=seed,
        model=lvlm.name,
    )
    times_drawn = random_draws(len(measured), num_trials, num_samples, seed).sum(axis=0)
    if measures_sensitivity(criteria):
        sensitivities = [sample.sensitivity for sample in measured if sample.sensitivity]
        shape = lvlm.num_layers, lvlm.num_heads
        ranking = add_sensitivity(ranking, mean_sensitivity(sensitivities, times_drawn.tolist(), shape))
    keys = [sample.image_key for sample in measured]
    if score_by_label is None:
        return replace(ranking, pictures=_drawn_images(keys, times_drawn), found_with=found_with(lvlm.asked, criteria))
    recipe = LabelRecipe(by, num_labels, num_trials, seed, shrink, shrink_n0)
    scores = np.stack([sample.label_scores for sample in measured if sample.label_scores is not None])
    labelled = rank_by_labels(scores, ranking, recipe)
    # A shrunk ranking also depends on the images of unlabelled samples, through the label-free ranking.
    times_drawn = recipe.draw(len(measured))[0] if shrink == "none" else np.ones(len(measured), np.int64)
    asked = (with_box_span(lvlm) if by == "vrh" else lvlm).asked
    return replace(
        labelled,
        pictures=_drawn_images(keys, times_drawn),
        found_with=found_with(asked, criteria, recipe.found_with(labelled.num_samples)),
    )


def _drawn_images(keys: Sequence[str | None], times_drawn: NDArray[np.int64]) -> tuple[str, ...]:
    """The known names of the images that the ranking was made from, so that it is not evaluated on them."""
    return tuple(sorted({key for key, times in zip(keys, times_drawn, strict=True) if key and times}))


class StreamedSample(NamedTuple):
    """A sample with its decoded image and the maps of every head.

    `image_number` counts runs of consecutive samples that share an image.
    """

    sample: Sample
    image: Image.Image
    image_number: int
    maps: AttentionMaps


LabelScorer = Callable[[StreamedSample], NDArray[np.float32]]
"""Scores every head on a labelled sample: float32 `[layer, head]`."""


def _label_scorer(lvlm: LVLM, by: HeadsBy) -> LabelScorer | None:
    """The scorer for a ranking by labels; None for the label-free ranking."""
    if by == "criteria":
        return None
    if by != "vrh":
        return lambda attended: label_scores(attended.maps, truth_of(attended.sample, attended.image.size))[by]
    reader = with_box_span(lvlm)

    def mass_of_written_box(attended: StreamedSample) -> NDArray[np.float32]:
        truth = truth_of(attended.sample, attended.image.size)
        return mass_on_patches(reader.attend(attended.image, attended.sample.expression), truth.box)

    return mass_of_written_box


class _Probed(NamedTuple):
    """A sample with the results of its further forward passes, None unless the criteria or the labels need them."""

    attended: StreamedSample
    sensitivity: SensitivityStatistics | None
    label_scores: NDArray[np.float32] | None


class _MeasuredSample(NamedTuple):
    """The statistics of a sample that are kept after its maps are freed.

    Args:
        image_key: identity of its image, if known.
        statistics: attention sum, spatial entropy and bottom-row flag, each `[layer, head]`.
        sensitivity: if the criteria use it.
        label_scores: `[layer, head]`, in a ranking by labels.
    """

    image_key: str | None
    statistics: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    sensitivity: SensitivityStatistics | None
    label_scores: NDArray[np.float32] | None


def _measure_samples(
    lvlm: LVLM,
    samples: Iterable[Sample],
    criteria: CriteriaOptions,
    score_by_label: LabelScorer | None,
    not_finite: list[NotFiniteError],
) -> list[_MeasuredSample]:
    """Measure every usable sample; statistics are computed while the model attends to the next batch."""

    def probe(attended: StreamedSample) -> _Probed:
        sensitivity = None
        if measures_sensitivity(criteria):
            mirrored = None
            if attended.image_number < criteria.mirrored:
                mirrored = lvlm.attend_mirrored(attended.image, attended.sample.expression, attended.maps)
            sensitivity = measure_sensitivity(attended.maps, mirrored)
        return _Probed(attended, sensitivity, score_by_label(attended) if score_by_label else None)

    latest_key: dict[int, str | None] = {}  # image number -> key: computed once per run of samples

    def measure(probed: _Probed) -> _MeasuredSample:
        attended, sensitivity, scores = probed
        if attended.image_number not in latest_key:
            latest_key.clear()
            latest_key[attended.image_number] = image_keys([attended.sample])[0]
        found = head_statistics(attended.maps.attention, criteria)
        statistics = found.attention_sum, found.spatial_entropy, found.bottom_row_focus
        return _MeasuredSample(latest_key[attended.image_number], statistics, sensitivity, scores)

    def num_bytes(probed: _Probed) -> int:
        return probed.attended.maps.num_bytes

    with closing(stream_attention(lvlm, samples, not_finite, extra_prompts=sensitivity_prompts(criteria))) as attended:
        return list(postprocess(map(probe, attended), measure, num_bytes, 2 * BATCH_SIZE))


def stream_attention(
    lvlm: LVLM,
    samples: Iterable[Sample],
    not_finite: list[NotFiniteError],
    last_layer: int | None = None,
    extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
) -> Generator[StreamedSample, None, None]:
    """Yield the maps of each sample, in order. An image is encoded once for consecutive samples that share it.

    Args:
        not_finite: receives the errors of samples whose attention is not finite; these are skipped.
        last_layer: the last layer to run; None for all.
    """
    can_prefetch = lvlm.can_prepare(extra_prompts)

    def prepare(batch: _Batch) -> tuple[_Batch, PreparedBatch | None]:
        return batch, lvlm.prepare(*batch.pairs) if can_prefetch else None

    with closing(prefetch(_batches(samples), prepare)) as prepared:
        for batch, inputs in prepared:
            siblings = [batch.siblings] * len(batch.samples)
            every_maps = lvlm.attend_batch(
                *batch.pairs,
                last_layer=last_layer,
                prepared=inputs,
                extra_prompts=extra_prompts,
                siblings=siblings,
            )
            for sample, maps in zip(batch.samples, every_maps, strict=True):
                try:
                    maps.check_finite()
                except NotFiniteError as error:
                    log.warning("%r is left out: %s", sample.id or sample.expression, error)
                    not_finite.append(error)
                    continue
                yield StreamedSample(sample, batch.image, batch.image_number, maps)


class _Batch(NamedTuple):
    """Consecutive samples of one image.

    Args:
        siblings: expressions of the image so far, those of this batch included, which contrasts and probes draw from.
    """

    samples: Sequence[Sample]
    image: Image.Image
    image_number: int
    siblings: Sequence[str]

    @property
    def pairs(self) -> tuple[list[PromptImages], list[str]]:
        """Images and expressions, as `attend_batch` takes them."""
        return [self.image] * len(self.samples), [sample.expression for sample in self.samples]


def _batches(samples: Iterable[Sample]) -> Iterator[_Batch]:
    # Files are compared by path, images in memory by their pixels.
    runs = groupby(samples, key=lambda sample: sample.image_key or sample.image)
    for image_number, (_, run) in enumerate(runs):
        first = next(run)
        image, run = load_image(first.single), chain([first], run)
        siblings: tuple[str, ...] = ()
        while batch := list(islice(run, BATCH_SIZE)):
            siblings = (*siblings[: MAX_SIBLINGS + 1], *(sample.expression for sample in batch))
            yield _Batch(batch, image, image_number, siblings)
