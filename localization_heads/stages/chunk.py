"""What becomes of one chunk of a data set, wherever it is worked on: opened, prepared, run by the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from localization_heads.data.address import is_address
from localization_heads.data.images import image_size
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.stages.entries import Attended, Entries, attend, made_ready, open_chunk
from localization_heads.stages.run import Run

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.batches import Batch

Work = Callable[[Run, Entries, Sequence[Attended]], Sequence[Any]]
"""What is made of the maps of a chunk where the model is. Pickled to be sent there, so it holds no run and no model."""


CHUNK_PIXELS = 24_000_000
"""Of the pictures of a chunk together, unless it has only one: a camera's, or seventy of COCO. Each takes 4 bytes."""
OPENED_AHEAD = 16_000_000
"""Pixels of a picture that is opened while the model still works on others: processors take 20 bytes for each."""


class Chunk(NamedTuple):
    """Samples that go through the model together, and the ids of those whose results are not there yet."""

    samples: Sequence[Sample]
    missing: frozenset[str]


class Prepared(NamedTuple):
    """A chunk with its pictures open and the host's share of the model's work done.

    Args:
        opened: None where that is left to `compute`.
    """

    chunk: Chunk
    opened: Sequence[tuple[Sample, Image.Image]] | None
    ready: Batch | None


def prepare(run: Run, entries: Entries, chunk: Chunk) -> Prepared:
    """The whole chunk goes through the model or nothing of it: a smaller batch would round differently.

    A picture of more than `OPENED_AHEAD` is left to `compute`.
    """
    if (
        chunk.missing
        and pixels_of(chunk.samples[0]) > OPENED_AHEAD
        and not is_address(chunk.samples[0].image)
    ):
        return Prepared(chunk, None, None)
    return _opened(run, entries, chunk)


def _opened(run: Run, entries: Entries, chunk: Chunk) -> Prepared:
    opened = open_chunk(run, entries, chunk.samples) if chunk.missing else []
    if not any(sample.id in chunk.missing for sample, _ in opened):
        return Prepared(chunk, [], None)
    return Prepared(chunk, opened, made_ready(run.lvlm, opened))


def compute(run: Run, entries: Entries, prepared: Prepared, last_layer: int | None) -> list[Attended]:
    """The maps of the chunk's missing samples."""
    missing = prepared.chunk.missing
    if prepared.opened is None:
        prepared = _opened(run, entries, prepared.chunk)
    attended = attend(run, entries, prepared.opened or [], last_layer=last_layer, ready=prepared.ready)
    return [one for one in attended if one.sample.id in missing]


def pixels_of(sample: Sample) -> int:
    """From the picture's header, 0 for what is no picture. An address, which is not fetched for this, fills a chunk."""
    if is_address(sample.image):
        return CHUNK_PIXELS
    try:
        width, height = image_size(sample.image)
    except UsageError:
        return 0
    return width * height
