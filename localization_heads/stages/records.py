"""The statistics of a run: which of those on disk are its own, which are kept, sensitivity among them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.data.samples import Sample
from localization_heads.data.sources import num_images
from localization_heads.errors import UsageError
from localization_heads.heads.criteria import HeadStatistics
from localization_heads.heads.ranking import add_sensitivity, describe_disagreement
from localization_heads.heads.ready import NATIVE_BOX, asked
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics, mean_sensitivity
from localization_heads.lvlm.answers.box_formats import BOX
from localization_heads.lvlm.extra_prompts import measures_sensitivity
from localization_heads.options.groups import CriteriaOptions, SensitivityOptions
from localization_heads.options.kinds import as_measured
from localization_heads.options.programs import FinderOptions
from localization_heads.stages.chunks import AttendedSample, SecondPass
from localization_heads.stages.entries import Entries, image_key
from localization_heads.stages.run import Run
from localization_heads.store.paths import local_path
from localization_heads.store.statistics import (
    COLUMNS,
    SENSITIVITY_COLUMNS,
    StatisticsRows,
    StatisticsStore,
    StoreHeader,
    find_stores,
)

log = logging.getLogger(__name__)


def open_store(run: Run, *, with_sensitivity: bool = False) -> StatisticsStore:
    """The statistics of this model under these options; other options keep theirs in another file.

    Args:
        with_sensitivity: with columns for sensitivity and consistency.
    """
    return StatisticsStore(
        run.folder / "statistics",
        settings={"asked": statistics_options(run, with_sensitivity=with_sensitivity), **run.model_settings},
        num_layers=run.lvlm.num_layers,
        num_heads=run.lvlm.num_heads,
        columns={**COLUMNS, **SENSITIVITY_COLUMNS} if with_sensitivity else COLUMNS,
    )


def open_ranking_store(run: Run, entries: Entries) -> StatisticsStore:
    """The store of a run that ranks heads, with sensitivity if the criteria use it."""
    entries.with_sensitivity = measures_sensitivity(run.options.criteria)
    return open_store(run, with_sensitivity=entries.with_sensitivity)


def statistics_options(run: Run, *, with_sensitivity: bool = False) -> dict[str, Any]:
    """The options that the statistics depend on, as far as they are known without the model (for `stage=rank`).

    `criteria.entropy` is not among them: the store holds both entropies. Nor is `criteria.mirrored`: each sample's key
    says whether its mirrored image was asked.
    """
    criteria = run.options.criteria
    sensitivity = {"sensitivity": criteria.sensitivity, "siblings": list(criteria.siblings)}
    spec = run.spec
    return {
        "model.name": str(path.resolve()) if (path := local_path(spec.name)).is_dir() else spec.name,
        "model.dtype": spec.dtype,
        "model.quantization": spec.quantization,
        "model.attn_implementation": spec.attn_implementation,
        "model.pad_to_square": spec.pad_to_square,
        "model.system": spec.system,
        "conv_mode": run.options.conv_mode or spec.conv_mode,
        "drop_lone_spaces": run.options.drop_lone_spaces,
        "query_token": run.options.query_token,
        "view": run.options.view,
        **({"model.fix_mistral_regex": True} if spec.fix_mistral_regex else {}),
        **_wording(run.options),
        **{f"criteria.{name}": value for name, value in as_measured(criteria).items()},
        **({f"criteria.{name}": value for name, value in sensitivity.items()} if with_sensitivity else {}),
    }


def _wording(options: FinderOptions) -> dict[str, Any]:
    """As `LVLM.wording`; of `last_and_answer`, the statistics are those of the last prompt token."""
    alone = options.query_token in ("answer_mean", "answer_span")
    tokens: dict[str, Any] = {"answer_tokens": options.answer_tokens} if alone else {}
    tokens |= {"answer_span": options.answer_span} if options.answer_span else {}
    tokens |= {"instances_by": options.instances_by} if options.instances == "all" else {}
    return tokens | ({"paraphrases": list(options.paraphrases)} if options.paraphrases else {})


def prompt_conditions(settings: Mapping[str, Any], *, of_box: bool = False) -> dict[str, str | None]:
    """How the model was asked (`LVLM.asked`), from the settings of its statistics.

    Args:
        of_box: for a box of its own, whose prompt and query token are others.
    """
    conv_mode, system, query_token, _ = settings["question"]
    paraphrases = settings.get("paraphrases")
    if of_box:
        query_token, paraphrases = "answer_span", None
    if of_box or settings.get("answer_span") == BOX:
        conv_mode = NATIVE_BOX
    return asked(conv_mode, system, query_token, settings["weights"][1], paraphrases=paraphrases)


def append_statistics(
    entries: Entries,
    found: Sequence[tuple[Sample, HeadStatistics]],
    store: StatisticsStore,
    keys: Sequence[bytes] | None = None,
    sensitivity: Sequence[SensitivityStatistics] = (),
) -> None:
    """Add the statistics of a chunk, one sample or more; those of a sample that is there already stay.

    Args:
        keys: of the samples.
        sensitivity: of the samples, in a store that has columns for it.
    """
    samples, statistics = zip(*found, strict=True)
    store.append(
        keys or [entries.key(sample) for sample in samples],
        np.stack([found.attention_sum for found in statistics]),
        np.stack([found.area_entropy for found in statistics]),
        np.stack([found.mass_entropy for found in statistics]),
        np.stack([found.bottom_row_focus for found in statistics]),
        *(np.stack(column) for column in zip(*sensitivity, strict=True)),
    )


def find_stored_statistics(run: Run) -> StoreHeader:
    """The store of these options; of several, which differ in their weights, the one used last."""
    with_sensitivity = measures_sensitivity(run.options.criteria)
    wanted = statistics_options(run, with_sensitivity=with_sensitivity)
    records = find_stores(run.folder / "statistics")
    fitting = [record for record in records if record.settings.get("asked") == wanted]
    if not fitting and not with_sensitivity:  # a store with sensitivity has the paper's criteria, too
        fitting = [record for record in records if record.has_sensitivity and _paper_part(record) == wanted]
    if len(fitting) > 1:
        log.warning("%d stores fit these options, of other weights: taking the one used last", len(fitting))
    if fitting:
        return fitting[0]
    there = [_difference(record.settings.get("asked"), wanted) for record in records]
    held = f"only with {'; or with '.join(sorted(set(there)))}" if there else "none yet"
    raise UsageError(
        f"stage=rank: no statistics of these options in {run.folder / 'statistics'} ({held}): "
        "run stage=find with them first"
    )


def _paper_part(record: StoreHeader) -> dict[str, Any]:
    asked = record.settings.get("asked")
    sensitivity = {f"criteria.{name}" for name in SensitivityOptions.__pydantic_fields__}
    return {name: value for name, value in (asked or {}).items() if name not in sensitivity}


def _difference(made: Any, wanted: dict[str, Any]) -> str:
    """`conv_mode=chat, view=tiles`: a store's options where they differ from those of this run."""
    made = made if isinstance(made, dict) else {}
    pairs = ((name, made.get(name)) for name, value in wanted.items() if made.get(name) != value)
    return ", ".join(f"{name}={'null' if value is None else str(value)[:60]}" for name, value in pairs)


def choose_mirrored_samples(samples: Sequence[Sample], criteria: CriteriaOptions) -> frozenset[str]:
    """The ids of the samples of the first `criteria.mirrored` images."""
    if not measures_sensitivity(criteria):
        return frozenset()
    samples = [sample for sample in samples if num_images(sample.image) == 1]
    images: dict[str | int, None] = dict.fromkeys(image_key(sample) for sample in samples)
    first = set(list(images)[: criteria.mirrored])
    return frozenset(sample.id for sample in samples if image_key(sample) in first)


def mirrored_pass(ids: Collection[str]) -> SecondPass | None:
    """Asks about the mirrored images of these samples; None if there are none."""
    return partial(_with_mirrored, ids=frozenset(ids)) if ids else None


def _with_mirrored(
    run: Run, _: Entries, attended: Sequence[AttendedSample], *, ids: frozenset[str]
) -> list[AttendedSample]:
    def mirrored(one: AttendedSample) -> NDArray[np.float32] | None:
        wanted = one.sample.id in ids
        return run.lvlm.attend_mirrored(one.single_image, one.sample.expression, one.maps) if wanted else None

    return [one._replace(mirrored_maps=mirrored(one)) for one in attended]


def add_stored_sensitivity(
    ranking: HeadRanking, rows: StatisticsRows, draws: NDArray[np.int64], shape: tuple[int, int]
) -> HeadRanking:
    """The ranking with the mean sensitivity over the samples of `rows`, each counted as often as it was drawn.

    Args:
        draws: `[trial, sample]`, as `rank_heads` has them.
    """
    sensitivity = average_sensitivity(rows, draws.sum(axis=0).tolist(), shape)
    return ranking if sensitivity is None else add_sensitivity(ranking, sensitivity)


def average_sensitivity(
    rows: StatisticsRows, weights: Sequence[float], shape: tuple[int, int]
) -> SensitivityStatistics | None:
    """The weighted mean sensitivity over the samples of `rows`; None in a store without it."""
    samples = rows.sensitivity_statistics()
    return None if samples is None else mean_sensitivity(samples, weights, shape)


def warn_of_disagreement(ranking: HeadRanking, k: int) -> None:
    """A warning where sensitivity and the paper's two criteria put different heads first."""
    if measures_sensitivity(ranking.options) and not ranking.has_sensitivity:
        log.warning("criteria=robust: no image could be asked about anything else; the order is the paper's")
    if (said := describe_disagreement(ranking, k)) is not None:
        log.warning("%s", said)
