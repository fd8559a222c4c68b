"""`stage=rank attention_files=`: heads ranked over attention files on disk, of this tool or of the published code.

One file is in memory at a time. The statistics go into a hidden folder, from which a run that was killed goes on, and
which is removed at the end; files of one image whose queries differ are read a second time for their sensitivity.
Neither the model nor torch is needed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from localization_heads.options.groups import CriteriaOptions
from localization_heads.options.kinds import as_measured
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

ENDINGS = (".pkl", ".pkl.gz", ".safetensors")
MOST_FILES = 1_000_000


class _Facts(NamedTuple):
    """What is remembered of a file besides its statistics; as JSON a list."""

    shape: tuple[int, int]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    image_file: str
    query: str
    model: str
    asked: Mapping[str, str | None]

    @classmethod
    def of(cls, maps: AttentionMaps) -> _Facts:
        shape = maps.num_layers, maps.num_heads
        return cls(
            shape, maps.grid, maps.image_size, maps.image_file, maps.query, maps.model, maps.asked or {}
        )

    @classmethod
    def logged(cls, found: Mapping[str, Any] | None) -> _Facts | None:
        if found is None:
            return None
        shape, grid, size, *texts = found["facts"]
        return cls(tuple(shape), tuple(grid), tuple(size), *texts)


class _Read(NamedTuple):
    """A file: its place in the list, its key in the store, and what its maps are of."""

    place: int
    path: Path
    key: bytes
    image: tuple[object, ...]
    query: str


@dataclass
class _Pile:
    """The files read so far, and the one that the others have to agree with; `asked` is empty where they differ."""

    shape: tuple[int, int] | None = None
    first: Path | None = None
    model: str = ""
    named_by: Path | None = None
    asked: Mapping[str, str | None] | None = None
    read: list[_Read] = field(default_factory=list)
    failures: list[BadEntry] = field(default_factory=list)

    def agree(self, path: Path, facts: _Facts) -> None:
        """UsageError where the file is of another model, or its heads are others."""
        if self.shape is None:
            self.shape, self.first = facts.shape, path
        if facts.shape != self.shape:
            raise UsageError(
                f"attention_files: {path} has {facts.shape[0]} layers of {facts.shape[1]} heads, and {self.first} has "
                f"{self.shape[0]} of {self.shape[1]}: rank the files of one model at a time"
            )
        self.asked = facts.asked if self.asked in (None, facts.asked) else {}
        if facts.model and not self.model:
            self.model, self.named_by = facts.model, path
        if facts.model and facts.model != self.model:
            raise UsageError(
                f"attention_files: {path} is of {printable(facts.model, 80)}, and {self.named_by} of "
                f"{printable(self.model, 80)}: rank the files of one model at a time"
            )


def rank_files(run: Run) -> Result:
    """The ranking over the files that `attention_files` names -> heads.json, heads.csv and their figures.

    Raises:
        UsageError: no file there, files of different models, or `criteria=robust` without two files of one image.
        NothingDoneError: none of the files can be read.
    """
    if run.options.heads_by != "criteria":
        raise UsageError(
            f"heads_by={run.options.heads_by}: attention files hold no truth; leave out one of the two"
        )
    files = attention_files(str(run.options.attention_files))
    writable_folder(run.options.output_dir)
    measured = as_measured(run.options.criteria)
    kept = json.dumps(
        [str(local_path(str(run.options.attention_files)).absolute()), measured], sort_keys=True
    )
    folder = Path(run.options.output_dir) / f".rank-{hashlib.sha256(kept.encode()).hexdigest()[:16]}"
    with RunLock(folder):
        try:
            result = _rank(run, files, folder)
        except (UsageError, NothingDoneError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _rank(run: Run, files: Sequence[Path], folder: Path) -> Result:
    pile, criteria = _Pile(), run.options.criteria
    store = _collect(files, pile, criteria, folder)
    if store is None or pile.shape is None:
        raise NothingDoneError("no attention file could be used", pile.failures)
    run = _of_model(run, pile)
    check_criteria(criteria, pile.shape[0])
    draws = random_draws(len(files), run.options.num_trials, run.options.num_samples, run.options.random_seed)
    drawn = draws.sum(axis=0)
    pile.read = [one for one in pile.read if drawn[one.place]]
    if not pile.read:
        raise NothingDoneError("no attention file that was drawn could be used", pile.failures)
    rows = store.rows([one.key for one in pile.read])
    ranking = run.rank_heads(rows, run.spec.name, draws[:, [one.place for one in pile.read]])
    ranking = add_sensitivity(ranking, _mean_sensitivity(pile, drawn, criteria, folder))
    writable_folder(run.folder)
    with RunLock(run.folder):
        ranking = _described(ranking, pile)
        warn_of_disagreement(ranking, run.options.k)
        if not ranking.kept:
            log.warning("%s: heads.json lists none to ground with", NONE_KEPT)
        return Result(save_ranking_files(run, ranking), pile.failures, ranking=ranking)


def attention_files(named: str) -> list[Path]:
    """The attention files of a folder, or of its folder `attention`, or those that a pattern means; by name.

    What lies beside an attention file (analysis, metadata) is passed over. UsageError where there is none.
    """
    path = local_path(named)
    places = [path, path / "attention"] if path.is_dir() else []
    if places:
        found = (file for place in places if place.is_dir() for file in place.iterdir())
    else:
        found = (Path(file) for file in glob.iglob(str(path), recursive=True))  # noqa: PTH207  (absolute ones too)
    try:
        files = sorted(set(islice(filter(_is_attention, found), MOST_FILES + 1)))
    except OSError as error:
        raise UsageError(f"attention_files={named}: {error.strerror or error}") from error
    if not files:
        raise UsageError(
            f"attention_files={named}: no attention file there; give a folder of .pkl, .pkl.gz or .safetensors "
            "files, or a pattern such as runs/*.pkl"
        )
    if len(files) > MOST_FILES:
        raise UsageError(f"attention_files={named}: more than {MOST_FILES:,} files; rank a part of them")
    return files


def _is_attention(file: Path) -> bool:
    return (
        file.name.endswith(ENDINGS)
        and not file.name.startswith(".")
        and not attention_stem(file).endswith(SIDE_SUFFIXES)
        and file.is_file()
    )


def _collect(
    files: Sequence[Path], pile: _Pile, criteria: CriteriaOptions, folder: Path
) -> StatisticsStore | None:
    """The statistics of every file that can be read; the others are put aside. None if none can.

    What a file's maps are of is logged after its statistics: of a file in the log, these are there.
    """
    store: StatisticsStore | None = None
    logged = ResultLog(folder, "files", {})
    for place, path in enumerate(tqdm(files, desc="rank", unit="file", disable=None)):
        key, maps = sample_key("", path), None
        facts = _Facts.logged(logged.get(key))
        if facts is None or (store is not None and key not in store):
            try:
                maps = load_attention(path)
            except UsageError as error:
                pile.failures.append(BadEntry(0, path.name, " ".join(str(error).split())))
                continue
            facts = _Facts.of(maps)
        pile.agree(path, facts)
        if store is None:
            store = StatisticsStore(folder, settings={}, num_layers=facts.shape[0], num_heads=facts.shape[1])
        if maps is not None:
            found = head_statistics(maps.attention, criteria)
            columns = found.attention_sum, found.area_entropy, found.mass_entropy, found.bottom_row_focus
            store.append([key], *(column[None] for column in columns))
            logged.append([(key, {"facts": list(facts)})])
        image = (facts.image_file, facts.image_size, facts.grid) if facts.image_file else (place,)
        pile.read.append(_Read(place, path, key, image, facts.query))
    return store


def _of_model(run: Run, pile: _Pile) -> Run:
    """The run under the name of the model that the files are of, whose folder its heads.json goes into."""
    named = run.overrides is None or run.is_given("model", "model.name", "model.label")
    if not pile.model:
        if not named:
            raise UsageError(
                "attention_files: these files do not say which model they are of; name it, as in model=llava"
            )
        return run
    if pile.model == run.spec.name:
        return run
    if named and run.spec.name != EMBEDDED:
        raise UsageError(
            f"attention_files: these files are of {printable(pile.model, 80)} ({pile.named_by}), and not of "
            f"{run.spec.name}: leave out model="
        )
    return Run(replace(run.options, model=find_spec(pile.model)), run.model_choice, None, run.before_model)


def _mean_sensitivity(
    pile: _Pile, drawn: NDArray[np.int64], criteria: CriteriaOptions, folder: Path
) -> SensitivityStatistics:
    """The mean sensitivity over the images that several files are of; each counts for all its files.

    Raises:
        UsageError: the ranking is to go by it, and no image has two files with different queries.
    """
    assert pile.shape is not None
    means, nothing = RunningMean(pile.shape), np.full(pile.shape, np.nan)
    images = dict(_of_several_queries(pile.read))
    if not images and measures_sensitivity(criteria):
        raise UsageError(
            "criteria.sensitivity=siblings: no two of these files are of one image with different queries, so no "
            "head can be seen to move; write criteria=paper"
        )
    layers, heads = pile.shape
    columns = {"sensitivity": SENSITIVITY_COLUMNS["sensitivity"]}
    store = StatisticsStore(folder, settings={}, num_layers=layers, num_heads=heads, columns=columns)
    for files in tqdm(images.values(), desc="compare", unit="image", disable=None):
        key = hashlib.sha256(b"".join(one.key for one in files)).digest()[:KEY_BYTES]
        if key not in store:
            store.append([key], _image_sensitivity(files)[None])
        weight = float(sum(drawn[one.place] for one in files))
        means.add(store.views([key])["sensitivity"][0], weight)
    return SensitivityStatistics(means.mean, nothing)


def _image_sensitivity(files: Sequence[_Read]) -> NDArray[np.float64]:
    """Of the files of one image, two or more: `[layer, head]`."""
    image = PairwiseSensitivity()
    for one in files:
        image.add(load_attention(one.path).attention)
    assert image.sensitivity is not None
    return image.sensitivity


def _of_several_queries(read: Sequence[_Read]) -> Iterator[tuple[tuple[object, ...], list[_Read]]]:
    """The images of two files or more with different queries, and a file for each query."""
    images: dict[tuple[object, ...], list[_Read]] = {}
    for one in read:
        if one.query.strip():
            images.setdefault(one.image, []).append(one)
    for image, files in images.items():
        kept: list[_Read] = []
        for one in files:
            if all(other_expressions(one.query, [other.query]) for other in kept):
                kept.append(one)
        if len(kept) > 1:
            yield image, kept


def _described(ranking: HeadRanking, pile: _Pile) -> HeadRanking:
    """With the images, as far as they are known here, the recipe, and how the model was asked, if the files say so."""
    names: Mapping[str, None] = dict.fromkeys(
        str(one.image[0]) for one in pile.read if isinstance(one.image[0], str)
    )
    samples = []
    for name in names:
        try:
            samples.append(Sample(name, ""))
        except UsageError:
            log.debug("%s is no image that can be named", name)
    keys = {key for key in image_keys(samples) if key}
    return replace(
        ranking, pictures=tuple(sorted(keys)), found_with=found_with(pile.asked or {}, ranking.options)
    )
