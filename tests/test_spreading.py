"""`engine=ray`: the results of `engine=local` to the byte, whatever becomes of the workers."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pytest
from front import EXPRESSIONS, Front, draw_image, one_line, stub_figures, write_lines
from tiny_models import save_overflowing

from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.options.programs import FinderOptions
from localization_heads.options.stage_groups import EngineOptions
from localization_heads.stages import flow, workers
from localization_heads.stages.chunks import Chunk, Task
from localization_heads.stages.run import Run

ROOT = Path(__file__).parents[1]
RAY = ("engine=ray", "engine.cpus_per_worker=1")
WORKERS = {"find": 2}
"""One for the others: each worker that starts costs seconds, and all stages go through the data in the same way."""
DATA = ("data_file=data.jsonl", "heads=[2-0,3-1]", "batch_size=2", "visualize_limit=1")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Two cores, started once. Its workers find the modules of these tests."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
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
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Twelve entries of six images, one of them broken and one line no entry at all; figures are stubs."""
    stub_figures(monkeypatch)
    write_entries(front.folder)
    return front


def write_entries(folder: Path) -> None:
    dice, entries = np.random.default_rng(5), list[Any]()
    for number in range(12):
        path = draw_image(folder / f"image_{number % 6}.png", number % 6)
        x0, y0 = (int(value) for value in dice.integers(0, 30, 2))
        entry = {"id": f"entry_{number}", "prompt": EXPRESSIONS[number % 5], "image_path": path.name}
        entries.append({**entry, "bbox": [x0, y0, x0 + 20, y0 + 15]})
    (folder / "image_3.png").write_bytes((folder / "image_3.png").read_bytes()[:100])
    entries.insert(7, "{no json")
    write_lines(folder / "data.jsonl", entries)


def folder_of(engine: str) -> Path:
    return Path(f"by_{engine}/tiny")


def files_of(engine: str) -> dict[str, bytes]:
    """What a run has written, but for the stores' own files; of the page with its date, what its scripts draw."""
    folder = folder_of(engine)
    names = ("heads.json", "heads.csv", "predictions.jsonl", "metrics.json", "per_sample.parquet")
    names += ("labels.json", "ablation.json")
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if (page := folder / "report.html").is_file():
        found["report"] = (
            page.read_bytes().partition(b'type="application/json">')[2].partition(b"</script>")[0]
        )
    maps = sorted(
        path for path in folder.glob("attention/*") if path.suffix in (".pkl", ".json", ".csv", ".html")
    )
    return found | {path.name: path.read_bytes() for path in maps}


@pytest.mark.parametrize(
    ("stage", "made"),
    [
        ("find", {"heads.json"}),
        ("batch", {"heads.json", "predictions.jsonl"}),
        ("ground", {"predictions.jsonl"}),
        ("evaluate", {"predictions.jsonl", "metrics.json", "per_sample.parquet"}),
    ],
)
def test_the_same_as_locally(
    ray: Any, front: Front, monkeypatch: pytest.MonkeyPatch, stage: str, made: set[str]
) -> None:
    """Files to the byte, and bad entries in the same words, though `find` loses a worker in the middle of a chunk.

    `ground` goes with a model that overflows on some entries, which fail alone; `evaluate` looks a second time, and
    `batch` asks about other words and the mirrored image.
    """
    data = DATA
    if stage == "ground":
        data = (*DATA, f"model.name={save_overflowing(front.folder / 'model')}", "model.label=tiny")
    if stage == "evaluate":
        data = (*DATA, "zoom=true")
    if stage == "batch":
        data = (*DATA, "criteria=robust", "criteria.mirrored=2")
    local = front.finder(f"stage={stage}", *data, "output_dir=by_local")
    if stage == "find":
        monkeypatch.setattr("localization_heads.stages.find._analyse_chunk", killing.killed_once)
    monkeypatch.setattr(flow, "attend_chunk", killing.left_to_workers)
    workers = WORKERS.get(stage, 1)
    spread = front.finder(f"stage={stage}", *data, "output_dir=by_ray", *RAY, f"engine.num_workers={workers}")
    assert (local.status, spread.status) == (1, 1), spread.err
    assert spread.out.replace("by_ray", "by_local") == local.out
    for number in (3, 9):
        assert f"entry_{number}" in spread.out
    files = files_of("ray")
    assert made <= set(files)
    assert files == files_of("local")
    assert stage == "ground" or b'"cards":' in files["report"]
    assert (stage == "ground") == ("NaN" in spread.out)
    assert (stage == "find") == killing.MARK.exists()
    if stage == "find":
        assert int(killing.MARK.read_text()) != os.getpid()


def test_an_entry_that_kills_every_worker(ray: Any, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is given up after a few tries, and what was finished is kept: the next run does the rest."""
    original = killing.analysed
    assert workers.RETRIES == 3
    monkeypatch.setattr(workers, "RETRIES", 1)  # each costs the start of a worker
    monkeypatch.setattr("localization_heads.stages.find._analyse_chunk", killing.killed_always)
    assert "a worker died 2 times" in front.error(
        "stage=find", *DATA, "output_dir=by_ray", *RAY, "engine.num_workers=1", status=1
    )
    assert killing.MARK.read_text() == "xx"
    monkeypatch.setattr("localization_heads.stages.find._analyse_chunk", original)
    assert front.finder("stage=find", *DATA, "output_dir=by_ray").status == 1
    assert front.finder("stage=find", *DATA, "output_dir=by_local").status == 1
    assert files_of("ray") == files_of("local")


def test_more_workers_than_there_is_room_for_are_refused(ray: Any, front: Front) -> None:
    result = front.finder(
        "stage=find", *DATA, "engine=ray", "engine.num_workers=3", "engine.cpus_per_worker=1"
    )
    assert result.status == 2
    assert one_line(result.err) == (
        "error: engine.num_workers=3: 2 cpus have room for 2 workers at engine.cpus_per_worker=1"
    )


# ------------------------------------------------------------------------------------------------ without Ray


def by_one_worker(run: Run, chunks: Sequence[Chunk], task: Task) -> Iterator[workers.ChunkOutput]:
    """A worker in this process, which gets and returns what travels with Ray."""
    options = replace(run.options, engine=EngineOptions())
    recipe = workers.WorkerSetup(options, run.model_choice, run.overrides, str(Path.cwd()), task)
    worker = workers.Worker(pickle.dumps(recipe))
    samples = {sample.id: sample for chunk in chunks for sample in chunk.samples}
    for chunk in chunks:
        yield workers._unpickle_output(worker({"chunk": pickle.dumps(chunk)})["output"], samples)


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (
            ("stage=trace", "max_new_tokens=2", "trace.keep=all"),
            {"entry_0_trace.html", "entry_4_trace.html"},
        ),
        (("stage=ablate", "ablate.counts=[1]", "ablate.draws=1", "ablate.measure=maps"), {"ablation.json"}),
        (
            ("stage=find", "heads_by=mass", "criteria=robust", "criteria.mirrored=2"),
            {"labels.json", "heads.json"},
        ),
    ],
    ids=["trace", "ablate", "labels"],
)
def test_a_worker_does_the_same(
    front: Front, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], made: set[str]
) -> None:
    words = (*DATA, *words, "end_index=5", "report=false")
    local = front.finder(*words, "output_dir=by_local")
    monkeypatch.setattr(workers, "run_on_workers", by_one_worker)
    monkeypatch.setattr(flow, "attend_chunk", killing.left_to_workers)
    spread = front.finder(*words, "output_dir=by_ray", "engine=ray")
    assert (local.status, spread.status) == (1, 1), spread.err
    assert spread.out.replace("by_ray", "by_local") == local.out
    assert made <= set(files_of("ray")) and files_of("ray") == files_of("local")


def test_results_come_back_with_the_samples_of_the_command() -> None:
    """Only their ids travel."""
    samples = {id: Sample("p.png", "x" * 1000, id=id, line=1) for id in ("a", "b")}
    value = workers.ChunkOutput(
        [(samples["a"], np.arange(3)), {"again": samples["a"], "other": samples["b"]}], []
    )
    data = workers._pickle_output(value)
    assert len(data) < 500
    found = workers._unpickle_output(data, samples).results
    assert found[0][0] is found[1]["again"] is samples["a"]
    assert found[1]["other"] is samples["b"]
    assert list(found[0][1]) == [0, 1, 2]


ENGINE = {
    "kind": "ray", "num_workers": None, "cpus_per_worker": 2, "gpus_per_worker": None, "address": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("resources", "asked", "device", "expected"),
    [
        ({"CPU": 8}, {}, "auto", (4, 2, 0)),
        ({"CPU": 1}, {}, "auto", (1, 2, 0)),  # a cluster that may grow
        ({"CPU": 64, "GPU": 4}, {}, "auto", (4, 2, 1)),
        ({"CPU": 4, "GPU": 4}, {}, "cuda", (2, 2, 1)),
        ({"CPU": 64, "GPU": 4}, {}, "cpu", (32, 2, 0)),
        ({"CPU": 64, "GPU": 4}, {"gpus_per_worker": 0.5}, "auto", (8, 2, 0.5)),
        ({"CPU": 64, "GPU": 4}, {"num_workers": 9}, "auto", (9, 2, 1)),
    ],
)
def test_how_many_workers(
    resources: dict[str, float], asked: dict[str, Any], device: str, expected: Sequence[float]
) -> None:
    run = Run(FinderOptions.of({"engine": {**ENGINE, **asked}, "device": device, "stage": "find"}))
    assert workers._size_pool(run, resources) == expected


@pytest.mark.parametrize(
    ("resources", "asked", "problem"),
    [
        (
            {"CPU": 1},
            {},
            "num_workers=1: 1 cpus have room for 0 workers at engine.cpus_per_worker=2",
        ),
        (
            {"CPU": 8, "GPU": 1},
            {"num_workers": 2},
            "1 gpus have room for 1 workers at engine.gpus_per_worker=1",
        ),
    ],
)
def test_this_machine_does_not_grow(resources: dict[str, float], asked: dict[str, Any], problem: str) -> None:
    run = Run(FinderOptions.of({"engine": {**ENGINE, "address": None, **asked}, "stage": "find"}))
    with pytest.raises(UsageError, match=problem):
        workers._size_pool(run, resources)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"stage": "rank"}, "stage=rank has no data set to spread"),
        ({"stage": "ground", "image_file": "p.png"}, "one image cannot be spread"),
        ({"stage": "find", "device": "cuda:1"}, "device=cuda:1: with engine=ray, choose one of"),
    ],
)
def test_what_cannot_be_spread(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        FinderOptions.of({"engine": {**ENGINE}, **options})


def test_without_the_extra(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'localization-heads[ray]'" in front.error("stage=find", *DATA, "engine=ray")


def test_the_work_holds_no_model() -> None:
    """It is pickled for the workers: a run in it would take its model along."""
    from functools import partial

    from localization_heads.evaluation.judging import Judge
    from localization_heads.options.groups import CriteriaOptions, GroundingOptions
    from localization_heads.stages.evaluate import EntryScorer
    from localization_heads.stages.ground import _ground_each

    judge = Judge(CriteriaOptions(), GroundingOptions())
    work = partial(_ground_each, heads=None, measure=EntryScorer(judge, None).measure, seen=None)
    assert len(pickle.dumps(work)) < 2000
