"""The loop over a data set that the stages share: the model runs on one chunk of samples after another.

While it runs on a chunk, one background thread prepares the next chunks and another processes the results of the
previous ones. With `engine=ray`, workers do all of this.
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
    prepare_chunk,
    split_into_chunks,
    split_into_clips,
)
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Computed = TypeVar("Computed")


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
    """Run the model over all samples that are not done yet, in this process or (`engine=ray`) on workers.

    Args:
        name: label of the progress bar.
        is_done: whether an earlier run has stored the sample's results; called in a background thread.
        process: turns the new maps of a chunk into results; runs in a background thread, or on a worker.
        save: stores the results of `process`, chunk by chunk in order; always runs in this process.
        last_layer: the model stops after this layer.
        process_runs_model: call `process` in the main thread, because it runs the model too: models that keep state
            while they generate must not run a second forward pass at the same time.
        second_pass: runs the model a second time on each chunk, before `process`.
        extra_prompts: asked in addition to each expression; siblings are taken from `entries`.
        capture_maps: False leaves the model to `process`, which then gets one sample at a time, without maps.
    """
    # The tokenizer is loaded on first use, which has to happen in this thread.
    warn_of_unknown_words(run.lvlm, [run.query_for(sample.expression) for sample in samples])

    def make_chunk(chunk_samples: Sequence[Sample]) -> Chunk:
        pending = frozenset(sample.id for sample in chunk_samples if not is_done(sample))
        siblings = {}
        if extra_prompts.contrast == "siblings":
            siblings = {sample.id: entries.siblings(sample) for sample in chunk_samples}
        return Chunk(chunk_samples, pending, extra_prompts, siblings, capture_maps)

    if run.frames_per_clip:
        parts = split_into_clips(samples, run.frames_per_clip)
    else:
        parts = split_into_chunks(samples, run.batch_size if capture_maps else 1, entries.images)

    with tqdm(total=len(samples), desc=name, unit="expression", disable=None) as bar:
        if run.uses_workers:
            task = Task(process, last_layer, second_pass)
            _run_on_workers(run, entries, map(make_chunk, parts), task, save, bar)
            return

        def attend(prepared: PreparedChunk) -> _AttendedChunk:
            attended = attend_chunk(run, entries, prepared, last_layer, second_pass)
            return _AttendedChunk(len(prepared.chunk.samples), attended)

        def finish(chunk: _AttendedChunk) -> None:
            if chunk.attended and (results := process(run, entries, chunk.attended)):
                save(results)
            bar.update(chunk.num_samples)

        windows_open = run.options.show_plot  # they need the main thread
        run_pipelined(
            parts,
            lambda part: prepare_chunk(run, entries, make_chunk(part)),
            attend,
            finish,
            finish_in_background=not (process_runs_model or windows_open),
            num_bytes=_AttendedChunk.num_bytes,
        )


class _AttendedChunk(NamedTuple):
    num_samples: int
    attended: list[AttendedSample]

    def num_bytes(self) -> int:
        """Memory of the maps and of the decoded images, each counted once."""
        sources = {id(one.image): one.image for one in self.attended}
        pixels = sum(image.width * image.height for source in sources.values() for image in images_of(source))
        return 4 * pixels + sum(one.maps.num_bytes for one in self.attended)


def _run_on_workers(
    run: Run,
    entries: Entries,
    chunks: Iterable[Chunk],
    task: Task,
    save: Callable[[Sequence[Any]], None],
    bar: tqdm,
) -> None:
    """Send the chunks that have pending samples to Ray workers, and save their results in order."""
    from localization_heads.stages.workers import run_on_workers

    pending = []
    for chunk in chunks:
        if chunk.pending:
            pending.append(chunk)
        else:
            bar.update(len(chunk.samples))
    with closing(run_on_workers(run, pending, task)) as outputs:
        for chunk, output in zip(pending, outputs, strict=True):
            entries.failures += output.failures
            if output.results:
                save(output.results)
            bar.update(len(chunk.samples))


def run_pipelined(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    compute: Callable[[Prepared], Computed],
    finish: Callable[[Computed], None],
    *,
    finish_in_background: bool = True,
    num_bytes: Callable[[Computed], int] = lambda _: 0,
) -> None:
    """Call `finish(compute(prepare(item)))` for every item, overlapping the three steps of successive items.

    `compute` runs in this thread. `prepare` runs up to `background.PREFETCH` items ahead of it and `finish` up to as
    many behind it, each in a thread of its own. If a step fails or is interrupted, all items computed so far are still
    finished.

    Args:
        finish_in_background: False calls `finish` in this thread, right after `compute`.
        num_bytes: size of a computed item; at most `background.MAX_PENDING_BYTES` wait for `finish`.
    """
    with closing(prefetch(items, prepare)) as prepared:
        if finish_in_background:
            with closing(postprocess(map(compute, prepared), finish, num_bytes)) as finished:
                deque(finished, maxlen=0)
            return
        for item in prepared:
            finish(compute(item))
