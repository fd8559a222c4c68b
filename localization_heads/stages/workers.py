"""`engine=ray`: the chunks of a data set are distributed over workers by Ray Data.

Ray Data does the scheduling: it starts one actor per GPU (or per few cores), each with its own model, restarts a dead
actor and repeats its chunks, and returns the results in order. This module defines what a worker receives and returns.
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
from localization_heads.options.stage_groups import EngineOptions
from localization_heads.stages.chunks import Chunk, Task, attend_chunk, prepare_chunk
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run

MAX_BLOCKS = 1000
"""Ray Data needs about 10 ms to schedule a block, so many chunks share this many blocks evenly."""
RETRIES = 3
"""How often a block is repeated after its worker died."""
MIB = 2**20


class WorkerPool(NamedTuple):
    """The number of workers, and the resources that Ray reserves for each."""

    num_workers: int
    cpus: float
    gpus: float


class WorkerSetup(NamedTuple):
    """What a worker needs to create its `Run`, and the task that it does on each chunk.

    Args:
        folder: the working directory of the command, which relative paths start from.
    """

    options: FinderOptions
    model_choice: str
    overrides: Sequence[str] | None
    folder: str
    task: Task


class ChunkOutput(NamedTuple):
    """What a worker returns for a chunk. An `error`, its class and message, ends the run."""

    results: Sequence[Any]
    failures: Sequence[BadEntry]
    error: tuple[type[Exception], str] | None = None


class Worker:
    """A Ray actor: loads the model for its first chunk, then runs the task on chunk after chunk."""

    def __init__(self, setup: bytes) -> None:
        self._setup: WorkerSetup = pickle.loads(setup)
        self._run = Run(self._setup.options, self._setup.model_choice, self._setup.overrides)
        self._max_batch_size: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        try:
            output = self._run_task(pickle.loads(row["chunk"]))
        except (UsageError, WorkError) as error:
            kind = UsageError if isinstance(error, UsageError) else WorkError
            output = ChunkOutput([], [], (kind, str(error)))
        return {"output": _pickle_output(output)}

    def _run_task(self, chunk: Chunk) -> ChunkOutput:
        try:
            os.chdir(self._setup.folder)
        except OSError as error:
            raise WorkError(f"engine=ray: every machine needs the folder {self._setup.folder} ({error})") from None
        process, last_layer, second_pass = self._setup.task
        entries = Entries(list(chunk.samples), max_batch_size=self._max_batch_size)
        prepared = prepare_chunk(self._run, entries, chunk)
        attended = attend_chunk(self._run, entries, prepared, last_layer, second_pass)
        results = process(self._run, entries, attended) if attended else []
        self._max_batch_size = entries.max_batch_size
        return ChunkOutput(results, entries.failures)


def run_on_workers(run: Run, chunks: Sequence[Chunk], task: Task) -> Generator[ChunkOutput, None, None]:
    """Run the task on every chunk, yielding the outputs in the order of the chunks.

    Raises:
        UsageError: more workers are asked for than this machine has room for.
        WorkError: a worker cannot start, or died more than `RETRIES` times on one block.
    """
    if not chunks:
        return
    with _connect(run.options.engine) as ray:
        pool = _size_pool(run, ray.cluster_resources())
        setup = WorkerSetup(worker_options(run, pool), run.model_choice, run.overrides, str(Path.cwd()), task)
        samples = {sample.id: sample for chunk in chunks for sample in chunk.samples}
        with _silent(ray), closing(_map_chunks(ray, chunks, pool, setup)) as rows:
            for row in rows:
                output = _unpickle_output(row["output"], samples)
                if output.error:
                    kind, message = output.error
                    raise kind(message)
                yield output


def _map_chunks(
    ray: Any, chunks: Sequence[Chunk], pool: WorkerPool, setup: WorkerSetup
) -> Generator[Mapping[str, Any], None, None]:
    """Yield the rows that the workers return, in order."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    with warnings.catch_warnings():  # max_task_retries is deprecated, but nothing else bounds the retries yet
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
            Worker,
            fn_constructor_args=(pickle.dumps(setup),),
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_workers, len(items))),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
    try:
        yield from mapped.iter_rows()
    except ray.exceptions.RayActorError as error:
        raise WorkError(
            f"engine=ray: a worker died {RETRIES + 1} times on the same entries, or could not start "
            f"({_last_line(error)}); engine=local shows with which one"
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkError(f"engine=ray: {_last_line(error)}") from error


@contextmanager
def _connect(engine: EngineOptions) -> Iterator[Any]:
    """Start Ray, or join the cluster at `engine.address`, and disconnect afterwards.

    A Ray that the caller has started is used and left running. One started here sends no usage reports and listens on
    the local interface only.
    """
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
    arguments: dict[str, Any] = {"address": engine.address}
    if engine.address is None:
        arguments = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": engine.object_store * MIB,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with _mute_stderr():
            ray.init(log_to_driver=False, configure_logging=False, **arguments)
    except Exception as error:
        shown = "null" if engine.address is None else engine.address
        raise WorkError(f"engine.address={shown}: Ray does not start: {_last_line(error)}") from error
    try:
        yield ray
    finally:
        with suppress(Exception):
            ray.shutdown()


@contextmanager
def _mute_stderr() -> Iterator[None]:
    """Discard stderr, where Ray's core reports its log level before it applies it. Errors are raised all the same."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Keep Ray from printing about every dead worker, since the command reports the outcome itself.

    There is no public switch for this, so the one of Ray's debugger is used.
    """
    worker = ray._private.worker
    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def _size_pool(run: Run, resources: Mapping[str, float]) -> WorkerPool:
    """A pool with as many workers as the GPUs allow or, without GPUs, the cores.

    Raises:
        UsageError: Ray runs on this machine only, which has no room for `engine.num_workers`.
    """
    engine = run.options.engine
    cpus, gpus = engine.cpus_per_worker, engine.gpus_per_worker
    if gpus is None:
        gpus = 1 if resources.get("GPU") and run.options.device != "cpu" else 0
    limits = {"cpus": (resources.get("CPU", 0), cpus), "gpus": (resources.get("GPU", 0), gpus)}
    room, name = min((int(has / needs), name) for name, (has, needs) in limits.items() if needs)
    num_workers = engine.num_workers or max(room, 1)
    if engine.address is None and num_workers > room:
        has, needs = limits[name]
        raise UsageError(
            f"engine.num_workers={num_workers}: {has:g} {name} have room for {room} workers at "
            f"engine.{name}_per_worker={needs:g}"
        )
    return WorkerPool(num_workers, cpus, gpus)


def worker_options(run: Run, pool: WorkerPool) -> FinderOptions:
    """The command's options, with a number of threads that suits the model and the worker's cores."""
    import torch

    run.lvlm  # noqa: B018  loading a small model reduces the number of threads
    threads = run.options.num_threads or min(torch.get_num_threads(), max(1, int(pool.cpus)))
    return replace(run.options, num_threads=threads, engine=EngineOptions())


class _Pickler(pickle.Pickler):
    """Pickles a sample as its id, since the main process has the sample."""

    def persistent_id(self, value: Any) -> str | None:
        return value.id if isinstance(value, Sample) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, samples: Mapping[str, Sample]) -> None:
        super().__init__(io.BytesIO(data))
        self._samples = samples

    def persistent_load(self, id: str) -> Sample:
        return self._samples[id]


def _pickle_output(output: ChunkOutput) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(output)
    return file.getvalue()


def _unpickle_output(data: bytes, samples: Mapping[str, Sample]) -> ChunkOutput:
    output: ChunkOutput = _Unpickler(data, samples).load()
    return output


def _last_line(error: BaseException) -> str:
    """The last line of a remote traceback, which names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
