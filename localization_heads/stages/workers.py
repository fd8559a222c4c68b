"""`engine=ray`: the chunks of a data set over the workers of Ray Data.

Ray Data does the scheduling: it starts one actor per GPU or per few cores, each with a model of its own, restarts a
dead one and repeats its chunks, and returns the results in order. This module says what a worker gets and returns.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, UsageError, WorkError
from localization_heads.options.programs import FinderOptions
from localization_heads.options.surroundings import EngineOptions
from localization_heads.stages.chunks import Chunk, Task, attend_chunk, prepare_chunk
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run

BLOCKS = 1000
"""Blocks that Ray Data schedules at most: each costs it about 10 ms. More chunks share them evenly."""
RETRIES = 3
"""How often a block is repeated after its worker died."""
MIB = 2**20


class Spread(NamedTuple):
    """How many workers, and the resources that Ray reserves for each."""

    workers: int
    cpus: float
    gpus: float


class WorkerRecipe(NamedTuple):
    """What a worker is made from."""

    options: FinderOptions
    model_choice: str
    overrides: Sequence[str] | None
    folder: str
    task: Task


class Done(NamedTuple):
    """What a worker returns for a chunk; `error`, its class and its message, ends the run."""

    results: Sequence[Any]
    failures: Sequence[BadEntry]
    error: tuple[type[Exception], str] | None = None


class Worker:
    """An actor: loads the model for its first chunk, and applies the work to the maps of every chunk."""

    def __init__(self, recipe: bytes) -> None:
        self._recipe: WorkerRecipe = pickle.loads(recipe)
        self._run = Run(self._recipe.options, self._recipe.model_choice, self._recipe.overrides)
        self._max_batch_size: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        try:
            done = self._work_on(pickle.loads(row["chunk"]))
        except (UsageError, WorkError) as error:
            done = Done([], [], (UsageError if isinstance(error, UsageError) else WorkError, str(error)))
        return {"done": _without_samples(done)}

    def _work_on(self, chunk: Chunk) -> Done:
        try:
            os.chdir(self._recipe.folder)  # paths of data and models are those of the command
        except OSError as error:
            raise WorkError(
                f"engine=ray: every machine needs the folder {self._recipe.folder} ({error})"
            ) from None
        entries = Entries(list(chunk.samples), max_batch_size=self._max_batch_size)
        ready = prepare_chunk(self._run, entries, chunk)
        process, last_layer, second_pass = self._recipe.task
        fresh = attend_chunk(self._run, entries, ready, last_layer, second_pass)
        results = process(self._run, entries, fresh) if fresh else []
        self._max_batch_size = entries.max_batch_size
        return Done(results, entries.failures)


def run_on_workers(run: Run, chunks: Sequence[Chunk], task: Task) -> Generator[Done, None, None]:
    """The results of the task on each chunk, and the entries that failed in it, in the order of the chunks.

    Raises:
        UsageError: more workers than this machine has room for.
        WorkError: a worker cannot work, or died more than `RETRIES` times on one block.
    """
    if not chunks:
        return
    with _ray(run.options.engine) as ray:
        spread = _spread(run, ray.cluster_resources())
        options, folder = worker_options(run, spread), str(Path.cwd())
        recipe = WorkerRecipe(options, run.model_choice, run.overrides, folder, task)
        samples = {sample.id: sample for chunk in chunks for sample in chunk.samples}
        with _silent(ray), closing(_rows(ray, chunks, spread, recipe)) as rows:
            for row in rows:
                done = _with_samples(row["done"], samples)
                if done.error:
                    kind, message = done.error
                    raise kind(message)
                yield done


def _rows(
    ray: Any, chunks: Sequence[Chunk], spread: Spread, recipe: WorkerRecipe
) -> Generator[Mapping[str, Any], None, None]:
    """What the workers return, in order."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    with warnings.catch_warnings():  # Ray Data has no other way yet to bound the retries
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map(
            Worker,
            fn_constructor_args=(pickle.dumps(recipe),),
            compute=ray.data.ActorPoolStrategy(size=min(spread.workers, len(items))),
            num_cpus=spread.cpus,
            num_gpus=spread.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    try:
        yield from mapped.iter_rows()
    except ray.exceptions.RayActorError as error:
        raise WorkError(
            f"engine=ray: a worker died {RETRIES + 1} times on the same entries, or could not start "
            f"({_summary(error)}); engine=local shows with which one"
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkError(f"engine=ray: {_summary(error)}") from error


@contextmanager
def _ray(engine: EngineOptions) -> Iterator[Any]:
    """Ray, started here or joined, and left as it was found; without usage reports, on the local interface only."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise UsageError("engine=ray needs an extra: pip install 'localization-heads[ray]'") from None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield ray
        return
    where: dict[str, Any] = {"address": engine.address}
    if engine.address is None:
        where = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": engine.object_store * MIB,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with _no_standard_error():
            ray.init(log_to_driver=False, configure_logging=False, **where)
    except Exception as error:
        shown = "null" if engine.address is None else engine.address
        raise WorkError(f"engine.address={shown}: Ray does not start: {_summary(error)}") from error
    try:
        yield ray
    finally:
        with suppress(Exception):
            ray.shutdown()


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Ray's core reports its log level there before it obeys it. Errors are raised, so nothing is lost."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Keeps Ray from printing about every dead worker; the command reports the outcome itself.

    The switch is that of Ray's debugger: there is no public one.
    """
    worker = ray._private.worker
    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def _spread(run: Run, resources: Mapping[str, float]) -> Spread:
    """As many workers as there are GPUs for or, without any, cores.

    Raises:
        UsageError: Ray runs on this machine only, and has no room for `engine.num_workers`.
    """
    engine = run.options.engine
    cpus, gpus = engine.cpus_per_worker, engine.gpus_per_worker
    if gpus is None:
        gpus = 1 if resources.get("GPU") and run.options.device != "cpu" else 0
    asked = {"cpus": (resources.get("CPU", 0), cpus), "gpus": (resources.get("GPU", 0), gpus)}
    room, name = min((int(has / needs), name) for name, (has, needs) in asked.items() if needs)
    workers = engine.num_workers or max(room, 1)
    if engine.address is None and workers > room:
        has, needs = asked[name]
        raise UsageError(
            f"engine.num_workers={workers}: there is room for {room} with engine.{name}_per_worker={needs:g}, "
            f"for there are {has:g} {name}"
        )
    return Spread(workers, cpus, gpus)


def worker_options(run: Run, spread: Spread) -> FinderOptions:
    """The options of a worker's run: the command's, with the threads that suit the model and the worker's cores."""
    import torch

    run.lvlm  # noqa: B018  sets the threads of a small model
    threads = run.options.num_threads or min(torch.get_num_threads(), max(1, int(spread.cpus)))
    return replace(run.options, num_threads=threads, engine=EngineOptions())


class _Pickler(pickle.Pickler):
    """Pickles only the id of a sample: the command has the rest."""

    def persistent_id(self, value: Any) -> str | None:
        return value.id if isinstance(value, Sample) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, samples: Mapping[str, Sample]) -> None:
        super().__init__(io.BytesIO(data))
        self._samples = samples

    def persistent_load(self, id: str) -> Sample:
        return self._samples[id]


def _without_samples(value: Done) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _with_samples(data: bytes, samples: Mapping[str, Sample]) -> Done:
    done: Done = _Unpickler(data, samples).load()
    return done


def _summary(error: BaseException) -> str:
    """The last line of a remote traceback, which says what happened; the others say where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
