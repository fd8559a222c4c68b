"""Running the model over a data set once: statistics into the store, and for a batch every map onto the disk.

The data are cut into the same chunks in every run, and a chunk is on the disk before the next begins. So a run that
was killed goes on with the same batches, and the same numbers, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from localization_heads.attention import AttentionMaps
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.heads.analysis import analysis_rows
from localization_heads.heads.criteria import HeadStatistics, attention_sum, head_statistics
from localization_heads.stages.entries import Attended, Entries, attend, chunks, open_chunk
from localization_heads.stages.run import Run
from localization_heads.store.attention_files import load_attention, save_analysis, save_attention
from localization_heads.store.paths import analysis_path, attention_path
from localization_heads.store.statistics import StatisticsStore

ROUNDING = 1e-3
"""How far the sums of one sample may lie apart when it went through the model in another batch."""


def open_store(run: Run) -> StatisticsStore:
    """The statistics of this model under these options; other options keep theirs in another file."""
    return StatisticsStore(
        run.folder / "statistics",
        settings={
            **run.model_settings,
            "entropy": run.criteria.entropy,
            "threshold": run.criteria.threshold,
        },
        num_layers=run.lvlm.num_layers,
        num_heads=run.lvlm.num_heads,
    )


def collect(
    run: Run, entries: Entries, samples: Sequence[Sample], store: StatisticsStore, *, keep_maps: bool
) -> None:
    """Run the model over the samples whose statistics (and, for a batch, attention files) are not there yet."""
    bar = tqdm(total=len(samples), desc="collect", unit="expression", disable=None)
    for chunk in chunks(samples, run["batch_size"]):
        missing = {s.line for s in chunk if not _is_done(run, entries, s, store, keep_maps)}
        # The whole chunk goes through the model or nothing of it: a smaller batch would round differently.
        opened = open_chunk(run, entries, chunk) if missing else []
        if any(sample.line in missing for sample, _ in opened):
            attended = attend(run, entries, opened)
            fresh = [one for one in attended if one.sample.line in missing]
            _keep(run, entries, fresh, store, keep_maps=keep_maps)
        bar.update(len(chunk))
    bar.close()


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


def _keep(
    run: Run, entries: Entries, attended: Sequence[Attended], store: StatisticsStore, *, keep_maps: bool
) -> None:
    """Files first, statistics last: what the store holds is complete."""
    if not attended:
        return
    statistics = [head_statistics(one.maps.attention, run.criteria) for one in attended]
    if keep_maps:
        for one, found in zip(attended, statistics, strict=True):
            _save_entry(run, one.sample, one.maps, found)
    store.append(
        [entries.key(one.sample) for one in attended],
        np.stack([found.attention_sum for found in statistics]),
        np.stack([found.spatial_entropy for found in statistics]),
        np.stack([found.bottom_row_focus for found in statistics]),
    )


def _save_entry(run: Run, sample: Sample, maps: AttentionMaps, statistics: HeadStatistics) -> None:
    path = attention_path(run.attention_folder, sample.id, run["attention_format"])
    save_attention(maps.named(id=sample.id, image_file=sample.image_file), path)
    save_analysis(analysis_rows(statistics, run.criteria), analysis_path(path))
