"""How a data set is split into chunks, and how one chunk goes through the model.

Samples of one image share a chunk, so that the image is encoded only once. Every run splits a data set in the same way,
and a chunk goes through the model as a whole or not at all, because a smaller batch would round differently. A killed
run that is started again therefore sees the same batches and gives the same numbers, to the last bit.
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
    DecodedImageCache,
    Entries,
    image_key,
)
from localization_heads.stages.run import Run

if TYPE_CHECKING:
    from localization_heads.lvlm.model import PreparedBatch

log = logging.getLogger(__name__)

DEFAULT_FRAME_RATE = 5.0
"""Frames per second of a clip whose frames have no times (animated scenes)."""
SORT_WINDOW = 32
"""Chunks within which samples are sorted by length."""


class Chunk(NamedTuple):
    """Samples that go through the model together.

    Args:
        pending: ids of the samples whose results are not stored yet.
        extra_prompts: asked in addition to each expression.
        siblings: for each sample id, the other expressions of its image in the data.
        capture_maps: False for a stage that runs the model itself; its samples get `NO_MAPS`.
    """

    samples: Sequence[Sample]
    pending: frozenset[str]
    extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS
    siblings: Mapping[str, Sequence[str]] = {}
    capture_maps: bool = True


_DEFAULTS = Chunk((), frozenset())
NO_MAPS = AttentionMaps(np.zeros((0, 0, 1, 1), np.float32), (0, 0, 1, 1), (1, 1))

LoadedSamples = Sequence[tuple[Sample, PromptImages]]


class PreparedChunk(NamedTuple):
    """A chunk whose images are loaded and, where possible, preprocessed on the CPU.

    Args:
        loaded: None leaves the loading to `attend_chunk`.
        batch: None leaves the preprocessing to `attend_samples`.
    """

    chunk: Chunk
    loaded: LoadedSamples | None
    batch: PreparedBatch | None = None


class AttendedSample(NamedTuple):
    """A sample with its loaded image and the attention maps of every head.

    Attributes:
        zoomed_box: the box found in the crop of `zoom=true`, in pixels of the whole image.
        mirrored_maps: the maps of the mirrored image, not mirrored back (`criteria=robust`).
    """

    sample: Sample
    image: PromptImages
    maps: AttentionMaps
    zoomed_box: Box | None = None
    mirrored_maps: NDArray[np.float32] | None = None

    @property
    def single_image(self) -> Image.Image:
        """The image of a prompt that shows only one."""
        return image_at(self.image, None)


ProcessChunk = Callable[[Run, Entries, Sequence[AttendedSample]], Sequence[Any]]
"""Turns the attended samples of a chunk into results.

It is pickled and sent to the workers, so it must hold no run and no model; it gets those of its worker instead.
"""
SecondPass = Callable[[Run, Entries, Sequence[AttendedSample]], list[AttendedSample]]
"""Runs the model a second time on the samples of a chunk. It is pickled as well."""


class Task(NamedTuple):
    """What a worker does with each chunk: `attend_chunk` up to `last_layer`, then `process`."""

    process: ProcessChunk
    last_layer: int | None = None
    second_pass: SecondPass | None = None


def split_into_chunks(
    samples: Sequence[Sample], size: int, images: DecodedImageCache | None = None
) -> Iterator[list[Sample]]:
    """Split samples into chunks of at most `size`, always in the same way.

    Samples of one image stay together, wherever they stand in the file; more than `size` of them fill several chunks.
    A chunk collects images of similar size and expressions of similar length, which keeps padding small. It holds at
    most `MAX_CHUNK_PIXELS`, or a single image. With large images it is that limit which bounds the memory: they cost
    more to decode than a larger batch would save.
    """
    images = images or DecodedImageCache(0)
    chunk: list[Sample] = []
    pixels = 0
    for group in _group_by_image(samples, size, images):
        group_pixels = images.pixels(group[0])
        if chunk and (len(chunk) + len(group) > size or pixels + group_pixels > MAX_CHUNK_PIXELS):
            yield chunk
            chunk, pixels = [], 0
        chunk, pixels = [*chunk, *group], pixels + group_pixels
    if chunk:
        yield chunk


def _group_by_image(samples: Sequence[Sample], size: int, images: DecodedImageCache) -> Iterator[list[Sample]]:
    """The samples of each image, in groups of at most `size`, sorted by length within each window."""

    def length(group: list[Sample]) -> tuple[int, int]:
        """A proxy for the number of tokens: pixels of the image, then characters of the longest expression."""
        return images.pixels(group[0]), max(len(sample.expression) for sample in group)

    by_image: dict[str | int, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(image_key(sample), []).append(sample)
    groups = (same[start : start + size] for same in by_image.values() for start in range(0, len(same), size))
    if size == 1:
        yield from groups
    while window := list(islice(groups, SORT_WINDOW * size)):
        yield from sorted(window, key=length)


def split_into_clips(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Split the frames of each video and expression into clips of at most `size`, in order (`video=native`)."""
    videos: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        videos.setdefault((sample.picture, sample.expression), []).append(sample)
    for frames in videos.values():
        yield from (frames[start : start + size] for start in range(0, len(frames), size))


def prepare_chunk(run: Run, entries: Entries, chunk: Chunk, *, prefetch: bool = True) -> PreparedChunk:
    """Load the chunk's images and preprocess them on the CPU.

    Args:
        prefetch: the model is still busy with another chunk, so images over `MAX_PREFETCH_PIXELS` are left for later.
    """
    if not chunk.pending:
        return PreparedChunk(chunk, [])
    first = chunk.samples[0]
    if prefetch and not is_address(first.image) and entries.images.pixels(first) > MAX_PREFETCH_PIXELS:
        return PreparedChunk(chunk, None)
    loaded = _load_images(run, entries, chunk.samples)
    if not any(sample.id in chunk.pending for sample, _ in loaded):
        return PreparedChunk(chunk, [])
    if run.frames_per_clip or not chunk.capture_maps or not run.lvlm.can_prepare(chunk.extra_prompts):
        return PreparedChunk(chunk, loaded)
    try:
        expressions = [run.query_for(sample.expression) for sample, _ in loaded]
        return PreparedChunk(chunk, loaded, run.lvlm.prepare([image for _, image in loaded], expressions))
    except Exception:  # `attend_samples` repeats this and finds the sample that causes it
        return PreparedChunk(chunk, loaded)


def _load_images(run: Run, entries: Entries, samples: Sequence[Sample]) -> LoadedSamples:
    """The samples with their images, decoded once per image. Samples with a bad image or expression fail."""
    loaded: list[tuple[Sample, PromptImages]] = []
    images: dict[str | int, PromptImages] = {}
    for sample in samples:
        with entries.skip_on_error(sample, WorkError):
            run.lvlm.with_num_images(num_images(sample.image)).prompt(sample.expression)
            if (key := image_key(sample)) not in images:
                images[key] = entries.images.load(sample, keep=entries.images_reused)
            if isinstance(image := images[key], Image.Image):
                check_inside(sample, image.size)
            loaded.append((sample, images[key]))
    return loaded


def attend_chunk(
    run: Run,
    entries: Entries,
    prepared: PreparedChunk,
    last_layer: int | None,
    second_pass: SecondPass | None = None,
) -> list[AttendedSample]:
    """Run the model on the whole chunk, with the second pass if there is one -> the pending samples with their maps."""
    chunk = prepared.chunk
    if prepared.loaded is None:
        prepared = prepare_chunk(run, entries, chunk, prefetch=False)
    attended = attend_samples(run, entries, prepared.loaded or [], last_layer, prepared.batch, chunk)
    if second_pass and attended:
        attended = second_pass(run, entries, attended)
    return [one for one in attended if one.sample.id in chunk.pending]


def attend_samples(
    run: Run,
    entries: Entries,
    loaded: LoadedSamples,
    last_layer: int | None,
    batch: PreparedBatch | None = None,
    chunk: Chunk = _DEFAULTS,
) -> list[AttendedSample]:
    """Run the model on loaded samples -> the samples with their maps.

    A batch that the model rejects is repeated sample by sample, so that only the bad sample fails. With
    `batch_size=auto`, a batch that does not fit into memory is halved until it does; later batches keep that size.

    Args:
        chunk: the samples' chunk, for its extra prompts, siblings and `capture_maps`.

    Raises:
        WorkError: out of memory, with a fixed `batch_size` or with a single sample.
    """

    def attend_in_parts(size: int) -> list[AttendedSample]:
        parts = (loaded[start : start + size] for start in range(0, len(loaded), size))
        return [one for part in parts for one in attend_samples(run, entries, part, last_layer, chunk=chunk)]

    if not loaded:
        return []
    if run.frames_per_clip:
        return _attend_clip(run, entries, loaded, last_layer)
    if not chunk.capture_maps:
        return [AttendedSample(sample, image, NO_MAPS) for sample, image in loaded]
    if entries.max_batch_size and len(loaded) > entries.max_batch_size:
        return attend_in_parts(entries.max_batch_size)
    samples, images = zip(*loaded, strict=True)
    expressions = [run.query_for(sample.expression) for sample in samples]
    try:
        maps = run.lvlm.attend_batch(
            images,
            expressions,
            last_layer=last_layer,
            prepared=batch,
            extra_prompts=chunk.extra_prompts,
            siblings=[chunk.siblings.get(sample.id, ()) for sample in samples],
        )
        named = [
            one.named(id=sample.id, image_file=sample.at(one.image_index).image_file)
            for one, sample in zip(maps, samples, strict=True)
        ]
        return _drop_not_finite(entries, [AttendedSample(*one) for one in zip(samples, images, named, strict=True)])
    except OutOfMemoryError:
        if run.options.batch_size != "auto" or len(loaded) == 1:
            raise  # every chunk would fail
    except WorkError:
        raise
    except Exception as error:
        if len(loaded) > 1:
            return attend_in_parts(1)
        is_known = isinstance(error, UsageError)
        entries.fail(samples[0], error if is_known else f"the model cannot take it: {type(error).__name__}: {error}")
        return []
    # Handled out here because inside the handler the traceback keeps the failed batch in memory.
    from localization_heads.lvlm.forward.failures import free_memory

    entries.max_batch_size = (len(loaded) + 1) // 2
    log.warning("out of memory: going on with %d entries at a time", entries.max_batch_size)
    free_memory()
    return attend_in_parts(entries.max_batch_size)


def _attend_clip(run: Run, entries: Entries, loaded: LoadedSamples, last_layer: int | None) -> list[AttendedSample]:
    """Run the model on frames that share one prompt; if it rejects them, all of them fail."""
    samples, images = zip(*loaded, strict=True)
    times = [float(sample.facts.get("time", i / DEFAULT_FRAME_RATE)) for i, sample in enumerate(samples)]
    try:
        maps = run.lvlm.attend_clip(images, run.query_for(samples[0].expression), times, last_layer=last_layer)
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
    return _drop_not_finite(entries, [AttendedSample(*one) for one in zip(samples, images, maps, strict=True)])


def _drop_not_finite(entries: Entries, attended: Sequence[AttendedSample]) -> list[AttendedSample]:
    """The samples whose attention is finite; the others fail."""
    finite = []
    for one in attended:
        try:
            one.maps.check_finite()
            finite.append(one)
        except NotFiniteError as error:
            entries.fail(one.sample, error)
    return finite
