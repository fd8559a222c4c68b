"""The loop over a data set that `find`, `batch`, `ground`, `evaluate` and `experiment` share.

While the model works on one chunk, a thread opens and prepares the next ones, and another keeps the results of the
last ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from localization_heads.background import postprocess, prefetch
from localization_heads.data.samples import Sample
from localization_heads.data.sources import images_of
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, ExtraPrompts
from localization_heads.lvlm.vocabulary import warn_of_unknown_words
from localization_heads.stages.chunks import (
    AttendedSample,
    Chunk,
    PreparedChunk,
    ProcessChunk,
    SecondPass,
    Task,
    attend_chunk,
    chunks,
    clips,
    prepare_chunk,
)
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run

AUTO = 16
"""`batch_size=auto`: entries in a chunk. One that does not fit goes through the model in parts."""

Given = TypeVar("Given")
Ready = TypeVar("Ready")
Done = TypeVar("Done")


class _Computed(NamedTuple):
    num_samples: int
    fresh: list[AttendedSample]

    def num_bytes(self) -> int:
        """Of the maps and the images."""
        images = {id(one.image): one.image for one in self.fresh}
        pixels = sum(one.width * one.height for image in images.values() for one in images_of(image))
        return 4 * pixels + sum(one.maps.num_bytes for one in self.fresh)


def run_over_samples(
    run: Run,
    entries: Entries,
    samples: Sequence[Sample],
    name: str,
    *,
    is_done: Callable[[Sample], bool],
    process: ProcessChunk,
    save: Callable[[Sequence[Any]], None],
    last_layer: int | None = None,
    process_runs_model: bool = False,
    second_pass: SecondPass | None = None,
    extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
    capture_maps: bool = True,
) -> None:
    """Run the model over all samples that are not done yet: here, or with `engine=ray` on its workers.

    Args:
        name: of the progress bar.
        is_done: whether a sample's results are there from an earlier run; not called in this thread.
        process: what is made of the missing maps of a chunk, in another thread or another process.
        save: gets the results of `process`, chunk after chunk in their order; in this process.
        last_layer: the layers above it are not run.
        process_runs_model: `process` is called in this thread: some models generate with a state of their own, which a
            forward pass at the same time would overwrite.
        second_pass: asks the model a second time about each chunk, before `process`.
        extra_prompts: what is asked beside each expression; siblings are those of `entries`.
        capture_maps: False leaves all that the model is asked to `process`, for one sample at a time.
    """
    warn_of_unknown_words(
        run.lvlm, [run.query_for(sample.expression) for sample in samples]
    )  # loaded here, not in a thread

    def chunk_of(part: Sequence[Sample]) -> Chunk:
        missing = frozenset(sample.id for sample in part if not is_done(sample))
        siblings = {
            sample.id: entries.siblings(sample) for sample in part if extra_prompts.contrast == "siblings"
        }
        return Chunk(part, missing, extra_prompts, siblings, capture_maps)

    def compute_one(prepared: PreparedChunk) -> _Computed:
        return _Computed(
            len(prepared.chunk.samples), attend_chunk(run, entries, prepared, last_layer, second_pass)
        )

    def finish(computed: _Computed) -> None:
        if computed.fresh and (results := process(run, entries, computed.fresh)):
            save(results)
        bar.update(computed.num_samples)

    size = AUTO if run.options.batch_size == "auto" else run.options.batch_size
    size = size if capture_maps else 1
    parts = (
        clips(samples, run.frames_per_clip) if run.frames_per_clip else chunks(samples, size, entries.images)
    )
    with tqdm(total=len(samples), desc=name, unit="expression", disable=None) as bar:
        if run.uses_workers:
            _over_workers(
                run, entries, map(chunk_of, parts), Task(process, last_layer, second_pass), save, bar
            )
            return
        run_pipelined(
            parts,
            lambda part: prepare_chunk(run, entries, chunk_of(part)),
            compute_one,
            finish,
            behind=not (process_runs_model or run.options.show_plot),  # windows open in the main thread only
            weigh=_Computed.num_bytes,
        )


def _over_workers(
    run: Run,
    entries: Entries,
    every: Iterable[Chunk],
    task: Task,
    save: Callable[[Sequence[Any]], None],
    bar: tqdm,
) -> None:
    """The same with `engine=ray`, to which only chunks with missing samples are sent."""
    from localization_heads.stages.workers import run_on_workers

    todo = []
    for chunk in every:
        if chunk.missing:
            todo.append(chunk)
        else:
            bar.update(len(chunk.samples))
    with closing(run_on_workers(run, todo, task)) as done:
        for chunk, one in zip(todo, done, strict=True):
            entries.failures += one.failures
            if one.results:
                save(one.results)
            bar.update(len(chunk.samples))


def run_pipelined(
    items: Iterable[Given],
    prepare: Callable[[Given], Ready],
    compute: Callable[[Ready], Done],
    finish: Callable[[Done], None],
    *,
    behind: bool = True,
    weigh: Callable[[Done], int] = lambda _: 0,
) -> None:
    """`finish(compute(prepare(item)))` for every item, the three at the same time on items that follow each other.

    `compute` runs in this thread; `prepare` runs up to `PREFETCH` items before it and `finish` up to `PREFETCH` after
    it, each in a thread of its own. If one of them fails or is interrupted, what was computed until then is finished.

    Args:
        behind: False runs `finish` in this thread, right after `compute`.
        weigh: bytes that something computed takes; at most `MAX_PENDING_BYTES` of them wait for `finish`.
    """
    with closing(prefetch(items, prepare)) as ready:
        if behind:
            with closing(postprocess(map(compute, ready), finish, weigh)) as finished:
                deque(finished, maxlen=0)
            return
        for one in ready:
            finish(compute(one))
