"""Running the model over a data set once: statistics into the store, and for a batch every map onto the disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.heads.analysis import analysis_rows
from localization_heads.heads.criteria import HeadStatistics, attention_sum, head_statistics
from localization_heads.lvlm.spec import local_path
from localization_heads.stages.entries import Attended, Entries
from localization_heads.stages.passing import go_through
from localization_heads.stages.run import Run
from localization_heads.store.attention_files import load_attention, save_analysis, save_attention
from localization_heads.store.paths import analysis_path, attention_path
from localization_heads.store.statistics import StatisticsStore

ROUNDING = 2e-5
"""How far the sums of one sample may lie apart when it went through a model in float32 in another batch (1.5e-6 seen).

The same weights in bfloat16 are further away (4e-4 or more seen), so one's maps are not taken for the other's. Maps of
bfloat16 from another batch are too, and are made again: time lost, but never a wrong file.
"""


def open_store(run: Run) -> StatisticsStore:
    """The statistics of this model under these options; other options keep theirs in another file."""
    return StatisticsStore(
        run.folder / "statistics",
        settings={"asked": asked_settings(run), **run.model_settings},
        num_layers=run.lvlm.num_layers,
        num_heads=run.lvlm.num_heads,
    )


def asked_settings(run: Run) -> dict[str, Any]:
    """The options that the statistics depend on, as far as they are known without the model: `stage=rank` has none.

    The entropy's weight is not among them: the store holds both.
    """
    spec = run.spec
    return {
        "model.name": str(path.resolve()) if (path := local_path(spec.name)).is_dir() else spec.name,
        "model.dtype": spec.dtype,
        "model.quantization": spec.quantization,
        "model.attn_implementation": spec.attn_implementation,
        "model.pad_to_square": spec.pad_to_square,
        "model.system": spec.system,
        "conv_mode": run["conv_mode"] or spec.conv_mode,
        "drop_lone_spaces": run.drop_lone_spaces,
        "query_token": run["query_token"],
        "view": run["view"],
        "criteria.threshold": run.criteria.threshold,
        "criteria.means": run.criteria.means,
        "criteria.bottom_row_above": run.criteria.bottom_row_above,
    }


def collect(
    run: Run, entries: Entries, samples: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> None:
    """Run the model over the samples whose statistics (and, for a batch, attention files) are not there yet."""
    go_through(
        run,
        entries,
        samples,
        "collect",
        is_done=lambda sample: _is_done(run, entries, sample, store, keep_maps),
        work=partial(_analysed, keep_maps=keep_maps),
        keep=lambda collected: _keep(run, entries, collected, store),
    )


def _is_done(run: Run, entries: Entries, sample: Sample, store: StatisticsStore, keep_maps: bool) -> bool:
    key = entries.key(sample)
    if key not in store:
        return False
    return not keep_maps or _is_on_disk(run, sample, store.rows([key]).attention_sum[0])


def _is_on_disk(run: Run, sample: Sample, stored: NDArray[np.float32]) -> bool:
    """Whether the attention file is the very one that the statistics were made from.

    Another prompt or model under the same id leaves other sums; another batch around it the same but for rounding.
    """
    path = attention_path(run.attention_folder, sample.id, run["attention_format"])
    try:
        maps = load_attention(path)
    except UsageError:
        return False
    same = np.allclose(attention_sum(maps.attention), stored, rtol=0, atol=ROUNDING)
    return same and maps.query == sample.expression and analysis_path(path).is_file()


class _Collected(NamedTuple):
    """A sample's statistics, and its maps where they are kept."""

    sample: Sample
    statistics: HeadStatistics
    maps: AttentionMaps | None


def _analysed(run: Run, _: Entries, attended: Sequence[Attended], *, keep_maps: bool) -> list[_Collected]:
    return [
        _Collected(
            one.sample,
            head_statistics(one.maps.attention, run.criteria),
            one.maps if keep_maps else None,
        )
        for one in attended
    ]


def _keep(run: Run, entries: Entries, collected: Sequence[_Collected], store: StatisticsStore) -> None:
    """Files first, statistics last: what the store holds is complete."""
    for one in collected:
        if one.maps is not None:
            _save_entry(run, one.sample, one.maps, one.statistics)
    keep_statistics(entries, [(one.sample, one.statistics) for one in collected], store)


def keep_statistics(
    entries: Entries, found: Sequence[tuple[Sample, HeadStatistics]], store: StatisticsStore
) -> None:
    """Add the statistics of a chunk, one sample or more; those of a sample that is there already stay."""
    samples, statistics = zip(*found, strict=True)
    store.append(
        [entries.key(sample) for sample in samples],
        np.stack([found.attention_sum for found in statistics]),
        np.stack([found.area_entropy for found in statistics]),
        np.stack([found.mass_entropy for found in statistics]),
        np.stack([found.bottom_row_focus for found in statistics]),
    )


def _save_entry(run: Run, sample: Sample, maps: AttentionMaps, statistics: HeadStatistics) -> None:
    path = attention_path(run.attention_folder, sample.id, run["attention_format"])
    save_attention(maps.named(id=sample.id, image_file=sample.image_file), path)
    save_analysis(analysis_rows(statistics, run.criteria), analysis_path(path))
