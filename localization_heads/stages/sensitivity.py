"""Sensitivity, the third criterion (`criteria=robust`), in the stages: mirrored images, and its place in a ranking."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.samples import Sample
from localization_heads.data.sources import num_images
from localization_heads.heads.ranking import add_sensitivity, describe_disagreement
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics, mean_sensitivity
from localization_heads.lvlm.extra_prompts import measures_sensitivity
from localization_heads.options.groups import CriteriaOptions
from localization_heads.stages.chunks import AttendedSample, SecondPass
from localization_heads.stages.entries import Entries, image_key
from localization_heads.stages.run import Run
from localization_heads.store.statistics import StatisticsRows

log = logging.getLogger(__name__)


def choose_mirrored_samples(samples: Sequence[Sample], criteria: CriteriaOptions) -> frozenset[str]:
    """The ids of the samples of the first `criteria.mirrored` images, whose mirrored images are to be used."""
    if not measures_sensitivity(criteria):
        return frozenset()
    samples = [sample for sample in samples if num_images(sample.image) == 1]
    images = list(dict.fromkeys(image_key(sample) for sample in samples))
    mirrored = set(images[: criteria.mirrored])
    return frozenset(sample.id for sample in samples if image_key(sample) in mirrored)


def mirrored_pass(ids: Collection[str]) -> SecondPass | None:
    """A second pass over the mirrored images of these samples; None without samples."""
    return partial(_attend_mirrored, ids=frozenset(ids)) if ids else None


def _attend_mirrored(
    run: Run, _: Entries, attended: Sequence[AttendedSample], *, ids: frozenset[str]
) -> list[AttendedSample]:
    def mirrored_maps(one: AttendedSample) -> NDArray[np.float32] | None:
        if one.sample.id not in ids:
            return None
        return run.lvlm.attend_mirrored(one.single_image, one.sample.expression, one.maps)

    return [one._replace(mirrored_maps=mirrored_maps(one)) for one in attended]


def add_stored_sensitivity(
    ranking: HeadRanking, rows: StatisticsRows, draws: NDArray[np.int64], shape: tuple[int, int]
) -> HeadRanking:
    """The ranking with sensitivity, if `rows` include it, averaged over the drawn samples.

    Args:
        draws: how often each trial draws each sample of `rows`, `[trial, sample]`.
        shape: `(layers, heads)`.
    """
    sensitivity = average_sensitivity(rows, draws.sum(axis=0).tolist(), shape)
    return ranking if sensitivity is None else add_sensitivity(ranking, sensitivity)


def average_sensitivity(
    rows: StatisticsRows, weights: Sequence[float], shape: tuple[int, int]
) -> SensitivityStatistics | None:
    """The weighted mean of sensitivity over the samples of `rows`; None if they do not include it."""
    samples = rows.sensitivity_statistics()
    return None if samples is None else mean_sensitivity(samples, weights, shape)


def warn_of_disagreement(ranking: HeadRanking, k: int) -> None:
    """Warn if sensitivity and the paper's two criteria put different heads first."""
    if measures_sensitivity(ranking.options) and not ranking.has_sensitivity:
        log.warning("criteria=robust: no image could be asked about anything else; the order is the paper's")
    if (warning := describe_disagreement(ranking, k)) is not None:
        log.warning("%s", warning)
