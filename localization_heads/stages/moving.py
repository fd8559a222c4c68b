"""The third criterion on the way through a data set: what is asked beside each expression, and what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.data.samples import Sample
from localization_heads.data.together import num_images
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.ranking import HeadRanking, rank_heads
from localization_heads.heads.record import resting
from localization_heads.heads.robust import disagreement, with_movement
from localization_heads.heads.sensitivity import Movement, mean_movement
from localization_heads.lvlm.beside import is_wanted, movement_in, probing
from localization_heads.lvlm.mirrored import ask_mirrored
from localization_heads.options.groups import CriteriaOptions
from localization_heads.stages.chunks import Attended, LookAgain
from localization_heads.stages.entries import Entries, image_key
from localization_heads.stages.run import Run
from localization_heads.store.statistics import StatisticsRows

log = logging.getLogger(__name__)


def to_be_mirrored(samples: Sequence[Sample], criteria: CriteriaOptions) -> frozenset[str]:
    """The ids of the samples of the first `criteria.mirrored` images."""
    if not is_wanted(criteria):
        return frozenset()
    samples = [sample for sample in samples if num_images(sample.image) == 1]
    images: dict[str | int, None] = dict.fromkeys(image_key(sample) for sample in samples)
    first = set(list(images)[: criteria.mirrored])
    return frozenset(sample.id for sample in samples if image_key(sample) in first)


def looking_again(ids: Collection[str]) -> LookAgain | None:
    """Asks about the mirrored images of these samples; None if there are none."""
    return partial(_with_mirrored, ids=frozenset(ids)) if ids else None


def _with_mirrored(
    run: Run, _: Entries, attended: Sequence[Attended], *, ids: frozenset[str]
) -> list[Attended]:
    def mirrored(one: Attended) -> NDArray[np.float32] | None:
        wanted = one.sample.id in ids
        return ask_mirrored(run.lvlm, one.single, one.sample.expression, one.maps) if wanted else None

    return [one._replace(mirrored=mirrored(one)) for one in attended]


def ranked(
    ranking: HeadRanking, rows: StatisticsRows, draws: NDArray[np.int64], shape: tuple[int, int]
) -> HeadRanking:
    """The ranking with the third criterion over the samples of `rows`, each counted as often as it was drawn.

    Args:
        draws: `[trial, sample]`, as `rank_heads` has them.
    """
    movement = over(rows, draws.sum(axis=0).tolist(), shape)
    return ranking if movement is None else with_movement(ranking, movement)


def over(rows: StatisticsRows, weights: Sequence[float], shape: tuple[int, int]) -> Movement | None:
    """The mean over the samples of `rows`, each with its weight; None in a store without the third criterion."""
    samples = rows.moved()
    return None if samples is None else mean_movement(samples, weights, shape)


def facts_of(run: Run, image: Image.Image, expression: str) -> list[tuple[str, str]]:
    """What `stage=doctor` says of the third criterion on one image, as (name, value); nothing if it is not asked for.

    Warns as `warn` does.
    """
    criteria = run.options.criteria
    if not is_wanted(criteria):
        return []
    maps = run.lvlm.attend(image, expression, beside=probing(criteria))
    mirrored = ask_mirrored(run.lvlm, image, expression, maps) if criteria.mirrored else None
    found = head_statistics(maps.attention, criteria)
    ranking = rank_heads(
        found.attention_sum[None],
        found.spatial_entropy[None],
        bottom_row=found.bottom_row_focus[None],
        options=criteria,
        top_n=run.top_n,
        num_trials=1,
    )
    shape = (maps.num_layers, maps.num_heads)
    ranking = with_movement(ranking, mean_movement([movement_in(maps, mirrored)], [1], shape))
    warn(ranking, run.options.k)
    first = ranking.kept[: run.options.k]
    moves = [f"{head.address} ({head.movement:.2f})" for head in first if head.movement is not None]
    rest = [str(head.address) for head in resting(ranking)[:10]]
    return [
        (
            "they follow",
            f"{' '.join(moves) or 'none'}: heads by movement with the expression, on this image alone",
        ),
        ("they rest", " ".join(rest) or "none"),
    ]


def warn(ranking: HeadRanking, k: int) -> None:
    """A warning where the third criterion and the paper's two put different heads first."""
    if is_wanted(ranking.options) and not ranking.is_moved:
        log.warning("criteria=robust: no image could be asked about anything else; the order is the paper's")
    if (said := disagreement(ranking, k)) is not None:
        log.warning("%s", said)
