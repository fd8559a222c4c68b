"""`stage=rank attention_files=`: heads ranked over attention files on disk, of this tool or of the published code.

Neither the model nor torch is needed, and one file is in memory at a time. The statistics are stored in a hidden
folder, from which an interrupted run resumes and which is removed at the end. Files of one image with different queries
are read a second time to measure the sensitivity.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from localization_heads.attention import AttentionMaps
from localization_heads.data.samples import Sample
from localization_heads.datasets.leakage import image_keys
from localization_heads.errors import BadEntry, NothingDoneError, UsageError, printable
from localization_heads.heads.criteria import check_criteria, head_statistics
from localization_heads.heads.ranking import NONE_KEPT, add_sensitivity, random_draws
from localization_heads.heads.ready import found_with
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import PairwiseSensitivity, RunningMean, SensitivityStatistics
from localization_heads.lvlm.checkpoints.spec import EMBEDDED, find_spec
from localization_heads.lvlm.extra_prompts import measures_sensitivity, other_expressions
from localization_heads.options.declaration import measured_values
from localization_heads.options.groups import CriteriaOptions
from localization_heads.stages.outcome import Result
from localization_heads.stages.ranking import save_ranking_files
from localization_heads.stages.run import Run
from localization_heads.stages.sensitivity import warn_of_disagreement
from localization_heads.store.attention_files import load_attention
from localization_heads.store.files import RunLock, writable_folder
from localization_heads.store.journal import ResultLog
from localization_heads.store.paths import SIDE_SUFFIXES, attention_stem, local_path
from localization_heads.store.statistics import KEY_BYTES, SENSITIVITY_COLUMNS, StatisticsStore, sample_key

log = logging.getLogger(__name__)

SUFFIXES = (".pkl", ".pkl.gz", ".safetensors")
MAX_FILES = 1_000_000


def rank_files(run: Run) -> Result:
    """Rank the heads over the files that `attention_files` names -> heads.json, heads.csv and their figures.

    Raises:
        UsageError: no attention file there, files of different models, or `criteria=robust` without two files of one
            image.
        NothingDoneError: none of the files can be read.
    """
    if run.options.heads_by != "criteria":
        raise UsageError(f"heads_by={run.options.heads_by}: attention files hold no truth; leave out one of the two")
    files = list_attention_files(str(run.options.attention_files))
    writable_folder(run.options.output_dir)
    source = str(local_path(str(run.options.attention_files)).absolute())
    inputs = json.dumps([source, measured_values(run.options.criteria)], sort_keys=True)
    folder = Path(run.options.output_dir) / f".rank-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    with RunLock(folder):
        try:
            result = _rank(run, files, folder)
        except (UsageError, NothingDoneError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run keeps it, to resume from
    return result


def _rank(run: Run, files: Sequence[Path], folder: Path) -> Result:
    collection, criteria = _Collection(), run.options.criteria
    store = _collect_statistics(files, collection, criteria, folder)
    if store is None or collection.shape is None:
        raise NothingDoneError("no attention file could be used", collection.failures)
    run = _with_model_of(run, collection)
    check_criteria(criteria, collection.shape[0])
    draws = random_draws(len(files), run.options.num_trials, run.options.num_samples, run.options.random_seed)
    times_drawn = draws.sum(axis=0)
    collection.files = [file for file in collection.files if times_drawn[file.position]]
    if not collection.files:
        raise NothingDoneError("no attention file that was drawn could be used", collection.failures)
    rows = store.rows([file.key for file in collection.files])
    ranking = run.rank_heads(rows, run.spec.name, draws[:, [file.position for file in collection.files]])
    ranking = add_sensitivity(ranking, _mean_sensitivity(collection, times_drawn, criteria, folder))
    writable_folder(run.folder)
    with RunLock(run.folder):
        ranking = _add_provenance(ranking, collection)
        warn_of_disagreement(ranking, run.options.k)
        if not ranking.kept:
            log.warning("%s: heads.json lists none to ground with", NONE_KEPT)
        return Result(save_ranking_files(run, ranking), collection.failures, ranking=ranking)


def list_attention_files(source: str) -> list[Path]:
    """The attention files in a folder and in its subfolder `attention`, or those that match a pattern, sorted by path.

    Files next to an attention file (its analysis, its metadata) are ignored.

    Raises:
        UsageError: there are none, or too many.
    """
    path = local_path(source)
    if path.is_dir():
        folders = [folder for folder in (path, path / "attention") if folder.is_dir()]
        candidates = (file for folder in folders for file in folder.iterdir())
    else:
        # `Path.glob` does not take absolute patterns.
        candidates = (Path(file) for file in glob.iglob(str(path), recursive=True))  # noqa: PTH207
    try:
        files = sorted(set(islice(filter(_is_attention_file, candidates), MAX_FILES + 1)))
    except OSError as error:
        raise UsageError(f"attention_files={source}: {error.strerror or error}") from error
    if not files:
        raise UsageError(
            f"attention_files={source}: no attention file there; give a folder of .pkl, .pkl.gz or .safetensors "
            "files, or a pattern such as runs/*.pkl"
        )
    if len(files) > MAX_FILES:
        raise UsageError(f"attention_files={source}: more than {MAX_FILES:,} files; rank a part of them")
    return files


def _is_attention_file(file: Path) -> bool:
    return (
        file.name.endswith(SUFFIXES)
        and not file.name.startswith(".")
        and not attention_stem(file).endswith(SIDE_SUFFIXES)
        and file.is_file()
    )


@dataclass
class _Collection:
    """The files read so far, all of one model.

    Attributes:
        shape: `(layers, heads)` of every file, None before the first one, `shape_from`.
        model: the model that the files name; empty before `model_from`, the first file that names one.
        asked: how the model was asked (`LVLM.asked`); None before the first file, empty if the files differ.
    """

    shape: tuple[int, int] | None = None
    shape_from: Path | None = None
    model: str = ""
    model_from: Path | None = None
    asked: Mapping[str, str | None] | None = None
    files: list[_File] = field(default_factory=list)
    failures: list[BadEntry] = field(default_factory=list)

    def check_same_model(self, path: Path, facts: _FileFacts) -> None:
        """Raise UsageError if the file names another model than the files before it, or has another shape."""
        if self.shape is None:
            self.shape, self.shape_from = facts.shape, path
        if facts.shape != self.shape:
            raise UsageError(
                f"attention_files: {path} has {facts.shape[0]} layers of {facts.shape[1]} heads, and "
                f"{self.shape_from} has {self.shape[0]} of {self.shape[1]}: rank the files of one model at a time"
            )
        self.asked = facts.asked if self.asked in (None, facts.asked) else {}
        if facts.model and not self.model:
            self.model, self.model_from = facts.model, path
        if facts.model and facts.model != self.model:
            raise UsageError(
                f"attention_files: {path} is of {printable(facts.model, 80)}, and {self.model_from} of "
                f"{printable(self.model, 80)}: rank the files of one model at a time"
            )


class _File(NamedTuple):
    """An attention file that was read.

    Attributes:
        position: in the list of all files.
        key: of its statistics in the store.
        image: identity of its image: equal for files of one image.
    """

    position: int
    path: Path
    key: bytes
    image: tuple[object, ...]
    query: str


class _FileFacts(NamedTuple):
    """The metadata of an attention file, logged as a JSON list so that the file need not be read again."""

    shape: tuple[int, int]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    image_file: str
    query: str
    model: str
    asked: Mapping[str, str | None]

    @classmethod
    def from_maps(cls, maps: AttentionMaps) -> _FileFacts:
        shape = maps.num_layers, maps.num_heads
        return cls(shape, maps.grid, maps.image_size, maps.image_file, maps.query, maps.model, maps.asked or {})

    @classmethod
    def from_log(cls, entry: Mapping[str, Any] | None) -> _FileFacts | None:
        if entry is None:
            return None
        shape, grid, size, *texts = entry["facts"]
        return cls(tuple(shape), tuple(grid), tuple(size), *texts)


def _collect_statistics(
    files: Sequence[Path], collection: _Collection, criteria: CriteriaOptions, folder: Path
) -> StatisticsStore | None:
    """Store the statistics of every readable file, and add the files to the collection; None if none can be read.

    A file is logged after its statistics are stored, so the statistics of every logged file are there.
    """
    store: StatisticsStore | None = None
    file_log = ResultLog(folder, "files", {})
    for index, path in enumerate(tqdm(files, desc="rank", unit="file", disable=None)):
        key, maps = sample_key("", path), None
        facts = _FileFacts.from_log(file_log.get(key))
        if facts is None or (store is not None and key not in store):
            try:
                maps = load_attention(path)
            except UsageError as error:
                collection.failures.append(BadEntry(0, path.name, " ".join(str(error).split())))
                continue
            facts = _FileFacts.from_maps(maps)
        collection.check_same_model(path, facts)
        if store is None:
            store = StatisticsStore(folder, settings={}, num_layers=facts.shape[0], num_heads=facts.shape[1])
        if maps is not None:
            statistics = head_statistics(maps.attention, criteria)
            store.append(
                [key],
                statistics.attention_sum[None],
                statistics.area_entropy[None],
                statistics.mass_entropy[None],
                statistics.bottom_row_focus[None],
            )
            file_log.append([(key, {"facts": list(facts)})])
        image = (facts.image_file, facts.image_size, facts.grid) if facts.image_file else (index,)
        collection.files.append(_File(index, path, key, image, facts.query))
    return store


def _with_model_of(run: Run, collection: _Collection) -> Run:
    """The run with the model of the files, into whose folder heads.json goes."""
    model_given = run.overrides is None or run.is_given("model", "model.name", "model.label")
    if not collection.model:
        if not model_given:
            raise UsageError(
                "attention_files: these files do not say which model they are of; name it, as in model=llava"
            )
        return run
    if collection.model == run.spec.name:
        return run
    if model_given and run.spec.name != EMBEDDED:
        raise UsageError(
            f"attention_files: these files are of {printable(collection.model, 80)} ({collection.model_from}), "
            f"and not of {run.spec.name}: leave out model="
        )
    return Run(replace(run.options, model=find_spec(collection.model)), run.model_choice, None, run.before_model)


def _mean_sensitivity(
    collection: _Collection, times_drawn: NDArray[np.int64], criteria: CriteriaOptions, folder: Path
) -> SensitivityStatistics:
    """The mean sensitivity over the images with several queries, each weighted by how often its files were drawn.

    Raises:
        UsageError: the ranking needs it, and no image has two files with different queries.
    """
    assert collection.shape is not None
    mean = RunningMean(collection.shape)
    groups = _group_by_image(collection.files)
    if not groups and measures_sensitivity(criteria):
        raise UsageError(
            "criteria.sensitivity=siblings: no two of these files are of one image with different queries, so no "
            "head can be seen to move; write criteria=paper"
        )
    layers, heads = collection.shape
    columns = {"sensitivity": SENSITIVITY_COLUMNS["sensitivity"]}
    store = StatisticsStore(folder, settings={}, num_layers=layers, num_heads=heads, columns=columns)
    for files in tqdm(groups, desc="compare", unit="image", disable=None):
        key = hashlib.sha256(b"".join(file.key for file in files)).digest()[:KEY_BYTES]
        if key not in store:
            store.append([key], _image_sensitivity(files)[None])
        weight = float(sum(times_drawn[file.position] for file in files))
        mean.add(store.views([key])["sensitivity"][0], weight)
    no_consistency = np.full(collection.shape, np.nan)
    return SensitivityStatistics(mean.mean, no_consistency)


def _image_sensitivity(files: Sequence[_File]) -> NDArray[np.float64]:
    """The sensitivity `[layer, head]` over two or more files of one image."""
    pairwise = PairwiseSensitivity()
    for file in files:
        pairwise.add(load_attention(file.path).attention)
    assert pairwise.sensitivity is not None
    return pairwise.sensitivity


def _group_by_image(files: Sequence[_File]) -> list[list[_File]]:
    """For each image with two or more different queries, one file per query."""
    by_image: dict[tuple[object, ...], list[_File]] = {}
    for file in files:
        if not file.query.strip():
            continue
        others = by_image.setdefault(file.image, [])
        if all(other_expressions(file.query, [other.query]) for other in others):
            others.append(file)
    return [group for group in by_image.values() if len(group) > 1]


def _add_provenance(ranking: HeadRanking, collection: _Collection) -> HeadRanking:
    """The ranking with its recipe, how the model was asked, and the images that it was made on, as far as known."""
    image_files = dict.fromkeys(file.image[0] for file in collection.files if isinstance(file.image[0], str))
    samples = []
    for name in image_files:
        try:
            samples.append(Sample(name, ""))
        except UsageError:
            log.debug("%s does not name an image", name)
    keys = {key for key in image_keys(samples) if key}
    return replace(
        ranking, pictures=tuple(sorted(keys)), found_with=found_with(collection.asked or {}, ranking.options)
    )
