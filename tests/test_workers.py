"""`engine=ray` gives the results of `engine=local`, to the byte, even if workers die."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_killers
from front import EXPRESSIONS, Front, draw_image, stub_figures, write_lines
from tiny_models import save_overflowing

from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.evaluation.judging import Judge
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.options.programs import FinderOptions
from localization_heads.options.stage_groups import EngineOptions
from localization_heads.stages import flow, workers
from localization_heads.stages.chunks import Chunk, Task
from localization_heads.stages.evaluate import EntryScorer
from localization_heads.stages.ground import _ground_each
from localization_heads.stages.run import Run

ROOT = Path(__file__).parents[1]
RAY = ("engine=ray", "engine.cpus_per_worker=1")
DATA = ("data_file=data.jsonl", "heads=[2-0,3-1]", "batch_size=2", "visualize_limit=1")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two cores, started once, whose workers can import the modules of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray")
        pytest.importorskip("ray.data")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
            _node_ip_address="127.0.0.1",
        )
        yield ray
        ray.shutdown()


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Twelve entries of six images, one of which is broken, and a line that is no entry; figures are stubs."""
    stub_figures(monkeypatch)
    rng, entries = np.random.default_rng(5), list[Any]()
    for number in range(12):
        path = draw_image(front.folder / f"image_{number % 6}.png", number % 6)
        x0, y0 = (int(value) for value in rng.integers(0, 30, 2))
        entry = {"id": f"entry_{number}", "prompt": EXPRESSIONS[number % 5], "image_path": path.name}
        entries.append({**entry, "bbox": [x0, y0, x0 + 20, y0 + 15]})
    Path("image_3.png").write_bytes(Path("image_3.png").read_bytes()[:100])
    entries.insert(7, "{no json")
    write_lines(front.folder / "data.jsonl", entries)
    return front


def files_of(engine: str) -> dict[str, bytes]:
    """The results in `by_<engine>` by name; of the report, which holds the date, only the data of its script."""
    folder = Path(f"by_{engine}/tiny")
    suffixes = (".json", ".jsonl", ".csv", ".parquet", ".pkl", ".html")
    paths = [path for path in (*folder.glob("*"), *folder.glob("attention/*")) if path.suffix in suffixes]
    files = {path.name: path.read_bytes() for path in paths}
    if page := files.pop("report.html", b""):
        files["report"] = page.partition(b'type="application/json">')[2].partition(b"</script>")[0]
    return files


MORE_OPTIONS = {
    "batch": ("criteria=robust", "criteria.mirrored=2"),
    "evaluate": ("zoom=true",),
    "ground": ("model.name=./overflowing", "model.label=tiny"),
}
"""`batch` and `evaluate` have a second pass; the model of `ground` overflows on some entries, which fail alone."""


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("find", {"heads.json"}),
        ("batch", {"heads.json", "predictions.jsonl"}),
        ("ground", {"predictions.jsonl"}),
        ("evaluate", {"predictions.jsonl", "metrics.json", "per_sample.parquet"}),
    ],
)
def test_results_are_those_of_the_local_engine(
    ray: Any, front: Front, monkeypatch: pytest.MonkeyPatch, stage: str, expected: set[str]
) -> None:
    """The same files and the same output, although `find` loses a worker in the middle of a chunk."""
    if stage == "ground":
        save_overflowing(front.folder / "overflowing")
    options = (f"stage={stage}", *DATA, *MORE_OPTIONS.get(stage, ()))
    local = front.finder(*options, "output_dir=by_local")
    if stage == "find":
        monkeypatch.setattr("localization_heads.stages.find._analyse_chunk", worker_killers.killed_once)
    monkeypatch.setattr(flow, "attend_chunk", worker_killers.left_to_workers)
    num_workers = 2 if stage == "find" else 1  # each takes seconds to start
    remote = front.finder(*options, "output_dir=by_ray", *RAY, f"engine.num_workers={num_workers}")
    assert (local.status, remote.status) == (1, 1), remote.err
    assert remote.out.replace("by_ray", "by_local") == local.out
    assert "entry_3" in remote.out and "entry_9" in remote.out
    files = files_of("ray")
    assert expected <= set(files)
    assert files == files_of("local")
    assert stage == "ground" or b'"cards":' in files["report"]
    assert (stage == "ground") == ("NaN" in remote.out)
    assert (stage == "find") == worker_killers.MARK.exists()
    if stage == "find":
        assert int(worker_killers.MARK.read_text()) != os.getpid()


def test_an_entry_that_kills_every_worker(ray: Any, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run gives up after a few tries and keeps what is finished; the next run does the rest."""
    assert workers.RETRIES == 3
    monkeypatch.setattr(workers, "RETRIES", 1)  # each starts a worker
    with monkeypatch.context() as patch:
        patch.setattr("localization_heads.stages.find._analyse_chunk", worker_killers.killed_always)
        options = ("stage=find", *DATA, *RAY, "engine.num_workers=1")
        assert "a worker died 2 times" in front.error(*options, "output_dir=by_ray", status=1)
    assert worker_killers.MARK.read_text() == "xx"
    for engine in ("ray", "local"):
        assert front.finder("stage=find", *DATA, f"output_dir=by_{engine}").status == 1
    assert files_of("ray") == files_of("local")


def test_too_many_workers_are_refused(ray: Any, front: Front) -> None:
    message = "engine.num_workers=3: 2 cpus have room for 2 workers at engine.cpus_per_worker=1"
    assert front.error("stage=find", *DATA, *RAY, "engine.num_workers=3") == f"error: {message}"


# ------------------------------------------------------------------------------------------------ without Ray


def by_one_worker(run: Run, chunks: Sequence[Chunk], task: Task) -> Iterator[workers.ChunkOutput]:
    """`run_on_workers` with a single worker in this process, which gets and returns what Ray would transfer."""
    options = replace(run.options, engine=EngineOptions())
    setup = workers.WorkerSetup(options, run.model_choice, run.overrides, str(Path.cwd()), task)
    worker = workers.Worker(pickle.dumps(setup))
    samples = {sample.id: sample for chunk in chunks for sample in chunk.samples}
    for chunk in chunks:
        yield workers._unpickle_output(worker({"chunk": pickle.dumps(chunk)})["output"], samples)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("stage=trace max_new_tokens=2 trace.keep=all", {"entry_0_trace.html", "entry_4_trace.html"}),
        ("stage=ablate ablate.counts=[1] ablate.draws=1 ablate.measure=maps", {"ablation.json"}),
        ("stage=find heads_by=mass criteria=robust criteria.mirrored=2", {"labels.json", "heads.json"}),
    ],
    ids=["trace", "ablate", "labels"],
)
def test_a_worker_in_this_process_gives_the_local_results(
    front: Front, monkeypatch: pytest.MonkeyPatch, options: str, expected: set[str]
) -> None:
    given = (*DATA, *options.split(), "end_index=5", "report=false")
    local = front.finder(*given, "output_dir=by_local")
    monkeypatch.setattr(workers, "run_on_workers", by_one_worker)
    monkeypatch.setattr(flow, "attend_chunk", worker_killers.left_to_workers)
    remote = front.finder(*given, "output_dir=by_ray", "engine=ray")
    assert (local.status, remote.status) == (1, 1), remote.err
    assert remote.out.replace("by_ray", "by_local") == local.out
    assert expected <= set(files_of("ray"))
    assert files_of("ray") == files_of("local")


def test_samples_are_pickled_as_their_ids() -> None:
    """And come back as the very samples of the main process."""
    a, b = (Sample("p.png", "x" * 1000, id=id, line=1) for id in "ab")
    data = workers._pickle_output(workers.ChunkOutput([(a, np.arange(3)), {"again": a, "other": b}], []))
    assert len(data) < 500
    first, second = workers._unpickle_output(data, {"a": a, "b": b}).results
    assert first[0] is second["again"] is a
    assert second["other"] is b
    assert list(first[1]) == [0, 1, 2]


ENGINE = {
    "kind": "ray", "num_workers": None, "cpus_per_worker": 2, "gpus_per_worker": None, "address": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("resources", "engine", "device", "expected"),
    [
        ({"CPU": 8}, {}, "auto", (4, 2, 0)),
        ({"CPU": 1}, {}, "auto", (1, 2, 0)),  # a cluster that may grow
        ({"CPU": 64, "GPU": 4}, {}, "auto", (4, 2, 1)),
        ({"CPU": 4, "GPU": 4}, {}, "cuda", (2, 2, 1)),
        ({"CPU": 64, "GPU": 4}, {}, "cpu", (32, 2, 0)),
        ({"CPU": 64, "GPU": 4}, {"gpus_per_worker": 0.5}, "auto", (8, 2, 0.5)),
        ({"CPU": 64, "GPU": 4}, {"num_workers": 9}, "auto", (9, 2, 1)),
        (
            {"CPU": 1},
            {"address": None},
            "auto",
            "num_workers=1: 1 cpus have room for 0 workers at engine.cpus_per_worker=2",
        ),
        (
            {"CPU": 8, "GPU": 1},
            {"address": None, "num_workers": 2},
            "auto",
            "1 gpus have room for 1 workers at engine.gpus_per_worker=1",
        ),
    ],
)
def test_the_number_of_workers(
    resources: dict[str, float], engine: dict[str, Any], device: str, expected: tuple[float, ...] | str
) -> None:
    """As the resources allow; the machine itself, unlike a cluster, cannot grow for more."""
    run = Run(FinderOptions.of({"engine": {**ENGINE, **engine}, "device": device, "stage": "find"}))
    if isinstance(expected, tuple):
        assert workers._size_pool(run, resources) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            workers._size_pool(run, resources)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"stage": "rank"}, "stage=rank has no data set to spread"),
        ({"stage": "ground", "image_file": "p.png"}, "one image cannot be spread"),
        ({"stage": "find", "device": "cuda:1"}, "device=cuda:1: with engine=ray, choose one of"),
    ],
)
def test_options_that_exclude_workers(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        FinderOptions.of({"engine": {**ENGINE}, **options})


def test_a_missing_extra_is_named(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'localization-heads[ray]'" in front.error("stage=find", *DATA, "engine=ray")


def test_the_pickled_task_holds_no_model() -> None:
    """As it would if `process` held a run."""
    judge = Judge(CriteriaOptions(), GroundingOptions())
    process = partial(_ground_each, heads=None, measure=EntryScorer(judge, None).measure, seen=None)
    assert len(pickle.dumps(process)) < 2000
