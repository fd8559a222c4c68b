"""Where a run stores the statistics of the heads, and which stored statistics it may use.

Statistics made with other weights or under other options are kept in stores of their own, so none are mixed up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.heads.criteria import HeadStatistics
from localization_heads.heads.ready import NATIVE_BOX, asked_conditions
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.lvlm.answers.box_formats import BOX
from localization_heads.lvlm.extra_prompts import measures_sensitivity
from localization_heads.options.declaration import measured_values
from localization_heads.options.groups import SensitivityOptions
from localization_heads.options.programs import FinderOptions
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run
from localization_heads.store.paths import local_path
from localization_heads.store.statistics import (
    COLUMNS,
    SENSITIVITY_COLUMNS,
    StatisticsStore,
    StoreHeader,
    find_stores,
)

log = logging.getLogger(__name__)


def open_statistics(run: Run, *, with_sensitivity: bool = False) -> StatisticsStore:
    """The store of this model's statistics under the run's options.

    Args:
        with_sensitivity: the store includes sensitivity.
    """
    return StatisticsStore(
        run.folder / "statistics",
        settings={"asked": _options(run, with_sensitivity=with_sensitivity), **run.model_settings},
        num_layers=run.lvlm.num_layers,
        num_heads=run.lvlm.num_heads,
        columns={**COLUMNS, **SENSITIVITY_COLUMNS} if with_sensitivity else COLUMNS,
    )


def open_ranking_statistics(run: Run, entries: Entries) -> StatisticsStore:
    """The store of a run that ranks heads. Sets `entries.with_sensitivity` if the criteria use sensitivity."""
    entries.with_sensitivity = measures_sensitivity(run.options.criteria)
    return open_statistics(run, with_sensitivity=entries.with_sensitivity)


def append_statistics(
    entries: Entries,
    statistics: Sequence[tuple[Sample, HeadStatistics]],
    store: StatisticsStore,
    keys: Sequence[bytes] | None = None,
    sensitivity: Sequence[SensitivityStatistics] = (),
) -> None:
    """Store the statistics of one or more samples. Statistics that are already stored stay as they are.

    Args:
        keys: keys of the samples; by default `entries.key`.
        sensitivity: sensitivities of the samples, for a store that includes them.
    """
    samples, of_samples = zip(*statistics, strict=True)
    store.append(
        keys or [entries.key(sample) for sample in samples],
        np.stack([one.attention_sum for one in of_samples]),
        np.stack([one.area_entropy for one in of_samples]),
        np.stack([one.mass_entropy for one in of_samples]),
        np.stack([one.bottom_row_focus for one in of_samples]),
        *(np.stack(column) for column in zip(*sensitivity, strict=True)),
    )


def find_stored_statistics(run: Run) -> StoreHeader:
    """The stored statistics that fit the run's options, without loading the model (`stage=rank`).

    If several stores fit, which then differ in the weights, it is the one used last.

    Raises:
        UsageError: there are none.
    """
    with_sensitivity = measures_sensitivity(run.options.criteria)
    options = _options(run, with_sensitivity=with_sensitivity)
    stores = find_stores(run.folder / "statistics")
    matching = [store for store in stores if store.settings.get("asked") == options]
    if not matching and not with_sensitivity:  # a store with sensitivity also holds the paper's two criteria
        matching = [store for store in stores if store.has_sensitivity and _without_sensitivity(store) == options]
    if len(matching) > 1:
        log.warning("%d stores fit these options, of other weights: taking the one used last", len(matching))
    if matching:
        return matching[0]
    others = [_difference(store.settings.get("asked"), options) for store in stores]
    held = f"only with {'; or with '.join(sorted(set(others)))}" if others else "none yet"
    raise UsageError(
        f"stage=rank: no statistics of these options in {run.folder / 'statistics'} ({held}): "
        "run stage=find with them first"
    )


def _options(run: Run, *, with_sensitivity: bool) -> dict[str, Any]:
    """The options that the statistics depend on, as far as they are known before the model is loaded.

    `criteria.entropy` is left out because a store holds both entropies, and `criteria.mirrored` because each sample's
    key says whether its mirrored image was used.
    """
    criteria, spec = run.options.criteria, run.spec
    sensitivity = {"sensitivity": criteria.sensitivity, "siblings": list(criteria.siblings)}
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
        **_prompt_options(run.options),
        **{f"criteria.{name}": value for name, value in measured_values(criteria).items()},
        **({f"criteria.{name}": value for name, value in sensitivity.items()} if with_sensitivity else {}),
    }


def _prompt_options(options: FinderOptions) -> dict[str, Any]:
    """The options behind `LVLM.extra_settings`; with `last_and_answer`, the statistics are of the last prompt token."""
    named: dict[str, Any] = {}
    if options.query_token in ("answer_mean", "answer_span"):
        named["answer_tokens"] = options.answer_tokens
    if options.answer_span:
        named["answer_span"] = options.answer_span
    if options.instances == "all":
        named["instances_by"] = options.instances_by
    if options.paraphrases:
        named["paraphrases"] = list(options.paraphrases)
    return named


def _without_sensitivity(store: StoreHeader) -> dict[str, Any]:
    """A store's options without those of sensitivity."""
    excluded = {f"criteria.{name}" for name in SensitivityOptions.__pydantic_fields__}
    options = store.settings.get("asked") or {}
    return {name: value for name, value in options.items() if name not in excluded}


def _difference(stored: Any, options: dict[str, Any]) -> str:
    """The stored options that differ from the run's, for example `conv_mode=chat, view=tiles`."""
    stored = stored if isinstance(stored, dict) else {}
    pairs = ((name, stored.get(name)) for name, value in options.items() if stored.get(name) != value)
    return ", ".join(f"{name}={'null' if value is None else str(value)[:60]}" for name, value in pairs)


def prompt_conditions(settings: Mapping[str, Any], *, of_box: bool = False) -> dict[str, str | None]:
    """How the model was prompted (`LVLM.asked`), from the settings of its statistics.

    Args:
        of_box: for a box that the model writes itself, which has a prompt and a query token of its own.
    """
    conv_mode, system, query_token, _ = settings["question"]
    paraphrases = settings.get("paraphrases")
    if of_box:
        query_token, paraphrases = "answer_span", None
    if of_box or settings.get("answer_span") == BOX:
        conv_mode = NATIVE_BOX
    return asked_conditions(conv_mode, system, query_token, settings["weights"][1], paraphrases=paraphrases)
