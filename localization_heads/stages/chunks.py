"""A data set in chunks, and a chunk's way through the model.

Entries of one image go together, so that it is encoded once. They are cut into the same chunks in every run, and a
chunk goes through the model as a whole or not at all, for a smaller batch would round differently: a run that was
killed goes on with the same batches, and the same numbers, to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.address import is_address
from localization_heads.data.samples import Sample, check_inside
from localization_heads.data.sources import PromptImages, image_at, num_images
from localization_heads.errors import NotFiniteError, OutOfMemoryError, UsageError, WorkError
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, ExtraPrompts
from localization_heads.stages.entries import (
    MAX_CHUNK_PIXELS,
    MAX_PREFETCH_PIXELS,
    Entries,
    ImageCache,
    image_key,
)
from localization_heads.stages.run import Run

if TYPE_CHECKING:
    from localization_heads.lvlm.model import PreparedBatch

log = logging.getLogger(__name__)

FRAME_RATE = 5.0
"""Frames a second of scenes that move, which know no time."""
WINDOW = 32
"""Chunks among which entries of about the same length are put together."""


class Chunk(NamedTuple):
    """Samples that go through the model together, and the ids of those whose results are missing.

    Args:
        extra_prompts: what is asked beside their expressions.
        siblings: for each id, the other expressions of the sample's image in the data.
        capture_maps: whether maps are made of them; else their work asks the model itself, and gets `NO_MAPS`.
    """

    samples: Sequence[Sample]
    missing: frozenset[str]
    extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS
    siblings: Mapping[str, Sequence[str]] = {}
    capture_maps: bool = True


PLAIN = Chunk((), frozenset())
"""What says that nothing is asked beside the expressions."""
NO_MAPS = AttentionMaps(np.zeros((0, 0, 1, 1), np.float32), (0, 0, 1, 1), (1, 1))

Opened = Sequence[tuple[Sample, PromptImages]]


class PreparedChunk(NamedTuple):
    """A chunk with its images opened and the host's share of the model's work done.

    Args:
        opened: None where that is left to `attend_chunk`.
        ready: None where `attend_samples` has to do it.
    """

    chunk: Chunk
    opened: Opened | None
    ready: PreparedBatch | None = None


class AttendedSample(NamedTuple):
    """A sample with its opened image and the maps of every head.

    Attributes:
        zoomed_box: the box that a second look at the image found, in its pixels (`zoom=true`).
        mirrored_maps: the maps of the mirrored image, as the model gave them (`criteria=robust`).
    """

    sample: Sample
    image: PromptImages
    maps: AttentionMaps
    zoomed_box: Box | None = None
    mirrored_maps: NDArray[np.float32] | None = None

    @property
    def single_image(self) -> Image.Image:
        """The image, where the prompt shows one."""
        return image_at(self.image, None)


ProcessChunk = Callable[[Run, Entries, Sequence[AttendedSample]], Sequence[Any]]
"""What is made of the maps of a chunk where the model is. Pickled to be sent there, so it holds no run and no model."""
SecondPass = Callable[[Run, Entries, Sequence[AttendedSample]], list[AttendedSample]]
"""Asks the model about a chunk a second time. Pickled as well."""


class Task(NamedTuple):
    """What a worker does with each chunk: `attend_chunk` down to `last_layer`, then `process`."""

    process: ProcessChunk
    last_layer: int | None = None
    second_pass: SecondPass | None = None


def chunks(samples: Sequence[Sample], size: int, known: ImageCache | None = None) -> Iterator[list[Sample]]:
    """Samples in chunks of at most `size`, cut in the same way in every run.

    Those of one image are together, wherever they stand in the file (more than `size` are several chunks). A chunk
    is filled up with images of about the same size and expressions of about the same length, so that little is
    padded. Its images have at most `MAX_CHUNK_PIXELS` together, or it has only one: that, and not `size`, bounds the
    memory for large images, which cost more to decode than a larger batch would save.
    """
    known = known or ImageCache(0)
    chunk: list[Sample] = []
    pixels = 0
    for part in _parts(samples, size, known):
        more = known.pixels(part[0])
        if chunk and (len(chunk) + len(part) > size or pixels + more > MAX_CHUNK_PIXELS):
            yield chunk
            chunk, pixels = [], 0
        chunk, pixels = [*chunk, *part], pixels + more
    if chunk:
        yield chunk


def _parts(samples: Sequence[Sample], size: int, known: ImageCache) -> Iterator[list[Sample]]:
    """The samples of each image, in parts of at most `size`; sorted by length within windows."""

    def length(part: list[Sample]) -> tuple[int, int]:
        """Pixels of the image, then letters of the longest expression: about as many tokens."""
        return known.pixels(part[0]), max(len(sample.expression) for sample in part)

    images: dict[str | int, list[Sample]] = {}
    for sample in samples:
        images.setdefault(image_key(sample), []).append(sample)
    parts = (group[start : start + size] for group in images.values() for start in range(0, len(group), size))
    if size == 1:
        yield from parts
    while window := list(islice(parts, WINDOW * size)):
        yield from sorted(window, key=length)


def clips(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Frames of each moving picture in their order, at most `size` of them together (`video=native`)."""
    moving: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        moving.setdefault((sample.picture, sample.expression), []).append(sample)
    for frames in moving.values():
        yield from (frames[start : start + size] for start in range(0, len(frames), size))


def prepare_chunk(run: Run, entries: Entries, chunk: Chunk, *, ahead: bool = True) -> PreparedChunk:
    """Open the chunk's images and do what the host can do before the model.

    Args:
        ahead: the model still works on another chunk, so an image of over `MAX_PREFETCH_PIXELS` has to wait.
    """
    if not chunk.missing:
        return PreparedChunk(chunk, [])
    first = chunk.samples[0]
    if ahead and not is_address(first.image) and entries.images.pixels(first) > MAX_PREFETCH_PIXELS:
        return PreparedChunk(chunk, None)
    opened = _open(run, entries, chunk.samples)
    if not any(sample.id in chunk.missing for sample, _ in opened):
        return PreparedChunk(chunk, [])
    if run.frames_per_clip or not chunk.capture_maps or not run.lvlm.can_prepare(chunk.extra_prompts):
        return PreparedChunk(chunk, opened)
    try:
        expressions = [run.query_for(sample.expression) for sample, _ in opened]
        return PreparedChunk(chunk, opened, run.lvlm.prepare([image for _, image in opened], expressions))
    except Exception:  # `attend_samples` finds out whose fault it is
        return PreparedChunk(chunk, opened)


def _open(run: Run, entries: Entries, samples: Sequence[Sample]) -> Opened:
    """The samples with their images, one object an image; those whose image or expression is unusable fail."""
    opened: list[tuple[Sample, PromptImages]] = []
    images: dict[str | int, PromptImages] = {}
    for sample in samples:
        with entries.skip_on_error(sample, WorkError):
            run.lvlm.with_num_images(num_images(sample.image)).prompt(sample.expression)
            if (key := image_key(sample)) not in images:
                images[key] = entries.images.load(sample, again=entries.images_reused)
            if isinstance(image := images[key], Image.Image):
                check_inside(sample, image.size)
            opened.append((sample, images[key]))
    return opened


def attend_chunk(
    run: Run,
    entries: Entries,
    prepared: PreparedChunk,
    last_layer: int | None,
    second_pass: SecondPass | None = None,
) -> list[AttendedSample]:
    """The maps of the chunk's missing samples, after a second look at the whole chunk if one is wanted."""
    chunk = prepared.chunk
    if prepared.opened is None:
        prepared = prepare_chunk(run, entries, chunk, ahead=False)
    attended = attend_samples(run, entries, prepared.opened or [], last_layer, prepared.ready, chunk)
    if second_pass and attended:
        attended = second_pass(run, entries, attended)
    return [one for one in attended if one.sample.id in chunk.missing]


def attend_samples(
    run: Run,
    entries: Entries,
    opened: Opened,
    last_layer: int | None,
    ready: PreparedBatch | None = None,
    chunk: Chunk = PLAIN,
) -> list[AttendedSample]:
    """The maps of opened samples. If the model cannot take them together, one by one, so that only the culprit fails.

    With `batch_size=auto`, what does not fit into the memory is halved until it does, and later chunks are cut to
    what fitted.

    Args:
        chunk: says what is asked beside the samples.

    Raises:
        WorkError: out of memory, with a `batch_size` that was given or with a single entry.
    """

    def in_parts(size: int) -> list[AttendedSample]:
        parts = (opened[start : start + size] for start in range(0, len(opened), size))
        return [
            found for part in parts for found in attend_samples(run, entries, part, last_layer, chunk=chunk)
        ]

    if not opened:
        return []
    if run.frames_per_clip:
        return _attend_clip(run, entries, opened, last_layer)
    if not chunk.capture_maps:
        return [AttendedSample(sample, image, NO_MAPS) for sample, image in opened]
    if entries.max_batch_size and len(opened) > entries.max_batch_size:
        return in_parts(entries.max_batch_size)
    samples, images = zip(*opened, strict=True)
    expressions = [run.query_for(sample.expression) for sample in samples]
    try:
        maps = run.lvlm.attend_batch(
            images,
            expressions,
            last_layer=last_layer,
            prepared=ready,
            extra_prompts=chunk.extra_prompts,
            siblings=[chunk.siblings.get(sample.id, ()) for sample in samples],
        )
        named = [
            one.named(id=sample.id, image_file=sample.at(one.image_index).image_file)
            for one, sample in zip(maps, samples, strict=True)
        ]
        return _finite(
            entries, [AttendedSample(*found) for found in zip(samples, images, named, strict=True)]
        )
    except OutOfMemoryError:
        if run.options.batch_size != "auto" or len(opened) == 1:
            raise  # every chunk would fail
    except WorkError:
        raise
    except Exception as error:
        if len(opened) > 1:
            return in_parts(1)
        known = isinstance(error, UsageError)
        entries.fail(
            samples[0], error if known else f"the model cannot take it: {type(error).__name__}: {error}"
        )
        return []
    # Outside the handlers, where no traceback holds on to the batch that failed.
    from localization_heads.lvlm.forward.failures import free_memory

    entries.max_batch_size = (len(opened) + 1) // 2
    log.warning("out of memory: going on with %d entries at a time", entries.max_batch_size)
    free_memory()
    return in_parts(entries.max_batch_size)


def _attend_clip(run: Run, entries: Entries, opened: Opened, last_layer: int | None) -> list[AttendedSample]:
    """The maps of frames that the model is shown in one prompt; if it cannot take them, all of them fail."""
    samples, images = zip(*opened, strict=True)
    times = [float(sample.facts.get("time", number / FRAME_RATE)) for number, sample in enumerate(samples)]
    try:
        maps = run.lvlm.attend_clip(
            images, run.query_for(samples[0].expression), times, last_layer=last_layer
        )
    except OutOfMemoryError as error:
        raise WorkError(
            f"out of memory: lower frames_per_prompt={run.frames_per_clip}, or load the model in fewer bits"
        ) from error
    except WorkError:
        raise
    except Exception as error:
        reason = error if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        for sample in samples:
            entries.fail(sample, f"the model cannot take its clip: {reason}")
        return []
    return _finite(entries, [AttendedSample(*found) for found in zip(samples, images, maps, strict=True)])


def _finite(entries: Entries, attended: Sequence[AttendedSample]) -> list[AttendedSample]:
    """The entries whose attention is finite; each of the others fails alone."""
    finite = []
    for one in attended:
        try:
            one.maps.check_finite()
            finite.append(one)
        except NotFiniteError as error:
            entries.fail(one.sample, error)
    return finite
