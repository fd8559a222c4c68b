"""`find_heads`: a model's heads ranked from Python, without labels or by them, without files and options."""

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
from localization_heads.heads.ranking import random_draws, rank_heads, with_movement
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import Moved, mean_movement
from localization_heads.lvlm.extra_prompts import (
    MAX_SIBLINGS,
    NO_EXTRA_PROMPTS,
    ExtraPrompts,
    measure_sensitivity,
    measures_sensitivity,
    sensitivity_prompts,
)
from localization_heads.lvlm.native_box import with_box_span
from localization_heads.options.groups import CriteriaOptions
from localization_heads.options.parts import HeadsBy, Shrink

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM, PreparedBatch

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Expressions of one image whose maps are in memory together."""


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
    """Rank a model's heads by selection frequency (Sec. 4), without labels; or by labels, where samples have them.

    A sample whose attention is not finite (half precision overflows on some) is left out, with a warning.

    Args:
        samples: images with expressions, read as they are needed; only a few kilobytes of each are kept. An image
            whose samples follow each other is encoded once for them all.
        criteria: how heads are told from the others; None for the paper's two criteria. With
            `CriteriaOptions(sensitivity="siblings")` those that follow the expression come first (`heads.sensitivity`).
        top_n: heads marked in each sample (N); None takes what suits the model: the paper's 10, or fewer if the model
            has few heads.
        num_trials: random draws to average over.
        num_samples: samples in each of them.
        by: `criteria`; or what scores each head on each sample, all of which must have a box or a mask: `mass`, `iou`
            and `pointing` of its own map, or `vrh`, the attention of the box that the model writes (`heads.labels`).
        num_labels: samples drawn for a ranking by labels, by `seed`; None takes all. Other draws show its spread.
        shrink: whether few labels are drawn towards the label-free ranking (`heads.labels.shrunk`).
        shrink_n0: with how many labels both count alike.

    Raises:
        ArgumentError: there is no sample, or fewer than `num_labels`.
        UsageError: an image or an expression that cannot be used, or a sample without truth that needs one; `vrh` of
            a model that writes no boxes.
        NotFiniteError: no sample's attention is finite.
    """
    check_choice("by", by, HeadsBy)
    check_choice("shrink", shrink, Shrink)
    criteria = criteria or CriteriaOptions()
    unusable: list[NotFiniteError] = []
    scorer = _scorer(lvlm, by)
    found = _measured(lvlm, samples, criteria, scorer, unusable)
    if not found:
        raise unusable[0] if unusable else ArgumentError("find_heads needs at least one sample")
    sums, entropies, bottom_row = (
        np.stack(column) for column in zip(*(one.columns for one in found), strict=True)
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
    drawn = random_draws(len(found), num_trials, num_samples, seed).sum(axis=0)
    if measures_sensitivity(criteria):
        movement = [one.moved for one in found if one.moved]
        shape = lvlm.num_layers, lvlm.num_heads
        ranking = with_movement(ranking, mean_movement(movement, drawn.tolist(), shape))
    keys = [one.image_key for one in found]
    if scorer is None:
        pictures = _named(keys, drawn)
        return replace(ranking, pictures=pictures, found_with=found_with(lvlm.asked, criteria))
    recipe = LabelRecipe(by, num_labels, num_trials, seed, shrink, shrink_n0)
    labelled = rank_by_labels(
        np.stack([one.scores for one in found if one.scores is not None]), ranking, recipe
    )
    asked = (with_box_span(lvlm) if by == "vrh" else lvlm).asked
    # What is mixed in was found on all of them, without their labels.
    drawn = recipe.drawn(len(found))[0] if shrink == "none" else np.ones(len(found), np.int64)
    labelled = replace(labelled, pictures=_named(keys, drawn))
    return replace(labelled, found_with=found_with(asked, criteria, recipe.named(labelled.num_samples)))


class _Measured(NamedTuple):
    """What is kept of a sample.

    Args:
        image_key: the name of its image, where it has one.
        columns: of every head, attention sum, spatial entropy and bottom-row flag.
        moved: its third criterion, where that is wanted.
        scores: of every head by the sample's label, where there are labels.
    """

    image_key: str | None
    columns: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    moved: Moved | None
    scores: NDArray[np.float32] | None


def _measured(
    lvlm: LVLM,
    samples: Iterable[Sample],
    criteria: CriteriaOptions,
    scorer: Scorer | None,
    unusable: list[NotFiniteError],
) -> list[_Measured]:
    """Every sample that can be used; the maps are measured while the model is at the next ones."""

    def asked(one: AttendedSample) -> _Asked:
        """With what the model is asked once more."""
        moved = None
        if measures_sensitivity(criteria):
            is_early = one.number < criteria.mirrored
            mirrored = lvlm.attend_mirrored(one.image, one.sample.expression, one.maps) if is_early else None
            moved = measure_sensitivity(one.maps, mirrored)
        return one, moved, scorer(one) if scorer else None

    keys: dict[int, str | None] = {}  # of the last image: looked up once for those that follow each other

    def measure(given: _Asked) -> _Measured:
        one, moved, scores = given
        if one.number not in keys:
            keys.clear()
            keys[one.number] = image_keys([one.sample])[0]
        found = head_statistics(one.maps.attention, criteria)
        columns = found.attention_sum, found.spatial_entropy, found.bottom_row_focus
        return _Measured(keys[one.number], columns, moved, scores)

    def num_bytes(given: _Asked) -> int:
        return given[0].maps.num_bytes

    with closing(attended(lvlm, samples, unusable, extra_prompts=sensitivity_prompts(criteria))) as every:
        return list(postprocess(map(asked, every), measure, num_bytes, 2 * AT_ONCE))


def _named(keys: Sequence[str | None], drawn: NDArray[np.int64]) -> tuple[str, ...]:
    """The images that the ranking is made from, as far as they have a name or a file: it is not judged on them."""
    return tuple(sorted({key for key, times in zip(keys, drawn, strict=True) if key and times}))


def _scorer(lvlm: LVLM, by: HeadsBy) -> Scorer | None:
    """What scores every head in a labelled sample; None without labels."""
    if by == "criteria":
        return None
    if by != "vrh":
        return lambda one: label_scores(one.maps, truth_of(one.sample, one.image.size))[by]
    reader = with_box_span(lvlm)

    def of_box(one: AttendedSample) -> NDArray[np.float32]:
        truth = truth_of(one.sample, one.image.size)
        return mass_on_patches(reader.attend(one.image, one.sample.expression), truth.box)

    return of_box


class AttendedSample(NamedTuple):
    """A sample with its image, the image's place among those that follow each other, and every head's maps."""

    sample: Sample
    image: Image.Image
    number: int
    maps: AttentionMaps


Scorer = Callable[[AttendedSample], NDArray[np.float32]]
"""Scores every head in a labelled sample."""
_Asked = tuple[AttendedSample, "Moved | None", "NDArray[np.float32] | None"]
"""A sample with the third criterion and the scores of its heads, where they are wanted."""


def attended(
    lvlm: LVLM,
    samples: Iterable[Sample],
    unusable: list[NotFiniteError],
    last_layer: int | None = None,
    extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
) -> Generator[AttendedSample, None, None]:
    """The maps of each sample, in order. Samples that follow each other share an image that is the same.

    Args:
        unusable: gets the errors of those whose attention is not finite, which are passed over.
    """
    plainly = lvlm.can_prepare(extra_prompts)

    def prepare(part: _Part) -> tuple[_Part, PreparedBatch | None]:
        return part, lvlm.prepare(*part.pairs) if plainly else None

    with closing(prefetch(_parts(samples), prepare)) as coming:
        for part, ready in coming:
            siblings = [part.siblings] * len(part.samples)
            maps = lvlm.attend_batch(
                *part.pairs,
                last_layer=last_layer,
                prepared=ready,
                extra_prompts=extra_prompts,
                siblings=siblings,
            )
            for sample, found in zip(part.samples, maps, strict=True):
                try:
                    found.check_finite()
                except NotFiniteError as error:
                    log.warning("%r is left out: %s", sample.id or sample.expression, error)
                    unusable.append(error)
                    continue
                yield AttendedSample(sample, part.image, part.number, found)


class _Part(NamedTuple):
    """Samples of one image, the image's place, and the first of its expressions so far with all of these."""

    samples: Sequence[Sample]
    image: Image.Image
    number: int
    siblings: Sequence[str]

    @property
    def pairs(self) -> tuple[list[PromptImages], list[str]]:
        return [self.image] * len(self.samples), [sample.expression for sample in self.samples]


def _parts(samples: Iterable[Sample]) -> Iterator[_Part]:
    # Images in memory are compared by their pixels, files by their paths.
    images = groupby(samples, key=lambda sample: sample.image_key or sample.image)
    for number, (_, group) in enumerate(images):
        first = next(group)
        image, group = load_image(first.single), chain([first], group)
        siblings: tuple[str, ...] = ()
        while part := list(islice(group, AT_ONCE)):
            siblings = (*siblings[: MAX_SIBLINGS + 1], *(sample.expression for sample in part))
            yield _Part(part, image, number, siblings)
