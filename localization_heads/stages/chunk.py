"""What becomes of one chunk of a data set, wherever it is worked on: opened, prepared, run by the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from localization_heads.data.samples import Sample
from localization_heads.stages.entries import Attended, Entries, attend, made_ready, open_chunk
from localization_heads.stages.run import Run

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.batches import Batch

Work = Callable[[Run, Entries, Sequence[Attended]], Sequence[Any]]
"""What is made of the maps of a chunk where the model is. Pickled to be sent there, so it holds no run and no model."""


class Chunk(NamedTuple):
    """Samples that go through the model together, and the ids of those whose results are not there yet."""

    samples: Sequence[Sample]
    missing: frozenset[str]


class Prepared(NamedTuple):
    """A chunk with its pictures open and the host's share of the model's work done."""

    chunk: Chunk
    opened: Sequence[tuple[Sample, Image.Image]]
    ready: Batch | None


def prepare(run: Run, entries: Entries, chunk: Chunk) -> Prepared:
    """The whole chunk goes through the model or nothing of it: a smaller batch would round differently."""
    opened = open_chunk(run, entries, chunk.samples) if chunk.missing else []
    if not any(sample.id in chunk.missing for sample, _ in opened):
        return Prepared(chunk, [], None)
    return Prepared(chunk, opened, made_ready(run.lvlm, opened))


def compute(run: Run, entries: Entries, prepared: Prepared, last_layer: int | None) -> list[Attended]:
    """The maps of the chunk's missing samples."""
    attended = attend(run, entries, prepared.opened, last_layer=last_layer, ready=prepared.ready)
    return [one for one in attended if one.sample.id in prepared.chunk.missing]
