"""The entries of a data file that one run works on, and what becomes of those that fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.data.address import is_address
from localization_heads.data.box_scale import check_scale, true_boxes
from localization_heads.data.images import load_image, open_image
from localization_heads.data.samples import Sample, VisualizationEntry, check_inside, load_samples
from localization_heads.errors import (
    BadEntry,
    NotFiniteError,
    NothingDoneError,
    OutOfMemoryError,
    UsageError,
    WorkError,
)
from localization_heads.evaluation.judging import NO_TRUTH
from localization_heads.options.programs import EntryChoice
from localization_heads.scenes.write import scenes
from localization_heads.stages.run import Run
from localization_heads.store.statistics import sample_key

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM, Batch


log = logging.getLogger(__name__)

Line = TypeVar("Line", Sample, VisualizationEntry)


class OpenedImages:
    """The images of one run, each opened and decoded once as long as those kept have `most` pixels together.

    An image that is kept for another pass stays; any other is handed out and forgotten.
    """

    def __init__(self, most: int) -> None:
        self._room = most
        self._sizes: dict[str | int, int] = {}
        self._kept: dict[str | int, Image.Image] = {}

    def pixels(self, sample: Sample) -> int:
        """0 for what is no image. An address, which is not fetched for this, fills a chunk."""
        if is_address(sample.image):
            return CHUNK_PIXELS
        if (key := image_key(sample)) not in self._sizes:
            self._sizes[key] = self._opened(key, sample)
        return self._sizes[key]

    def _opened(self, key: str | int, sample: Sample) -> int:
        try:
            if isinstance(sample.image, Image.Image):
                width, height = sample.image.size
                return width * height
            (width, height), image = open_image(sample.image, min(self._room, OPENED_AHEAD))  # type: ignore[arg-type]
        except UsageError:
            return 0
        if image is not None:
            self._keep(key, image)
        return width * height

    def _keep(self, key: str | int, image: Image.Image) -> None:
        self._kept[key] = image
        self._room -= image.width * image.height

    def load(self, sample: Sample, *, again: bool = False) -> Image.Image:
        """The image, whole in memory. Raises what `load_image` does.

        Args:
            again: it will be looked at once more, and is kept if there is room.
        """
        key = image_key(sample)
        image = self._kept.get(key)
        if image is None:
            image = load_image(sample.image)
            if again and image.width * image.height <= self._room:
                self._keep(key, image)
        elif not again:
            del self._kept[key]
            self._room += image.width * image.height
        return image


KEPT_PIXELS = 24_000_000
"""Of the images that one pass keeps for the next: those of a small data set, of a large one 70 MB."""


@dataclass
class Entries:
    """The samples to work on, in file order, and the failures met so far.

    Args:
        fitting: the largest batch that the memory may still hold, once one did not fit (`batch_size=auto`).
        images_again: the images are looked at in a second pass.
    """

    samples: list[Sample]
    failures: list[BadEntry] = field(default_factory=list)
    fitting: int | None = None
    images_again: bool = False
    images: OpenedImages = field(default_factory=lambda: OpenedImages(KEPT_PIXELS), repr=False)
    _keys: dict[str, bytes] = field(default_factory=dict, repr=False)

    def key(self, sample: Sample) -> bytes:
        """16 bytes that change with the sample's expression, image or id.

        Made once a run: an image that is touched meanwhile must not lose its place.
        """
        if sample.id not in self._keys:
            self._keys[sample.id] = sample_key(sample.expression, sample.image_key, sample.id)
        return self._keys[sample.id]

    def fail(self, sample: Sample, reason: object) -> None:
        """Put a sample aside; the others go on."""
        self.failures.append(BadEntry(sample.line, sample.id, " ".join(str(reason).split())))

    def in_order(self) -> list[BadEntry]:
        """The failures by line."""
        return sorted(self.failures, key=lambda failure: failure.line)

    @property
    def good(self) -> list[Sample]:
        """The samples that have not failed."""
        failed = {failure.line for failure in self.failures}
        return [sample for sample in self.samples if sample.line not in failed]


class Attended(NamedTuple):
    """A sample with its opened image and the maps of every head."""

    sample: Sample
    image: Image.Image
    maps: AttentionMaps


def select_entries(run: Run) -> Entries:
    """Read `data_file` and cut it to the entries that the options ask for."""
    run.options.require("data_file")
    data_file = (
        scenes(run.options.scenes) if run.options.data_file == "scenes" else str(run.options.data_file)
    )
    file = load_samples(data_file, allow_private_addresses=run.options.allow_private_addresses)
    return Entries(*choose_range(run.options, file.entries, file.bad))


def with_truth(
    entries: Entries, what: str, completed: Callable[[Sample], Sample] = lambda sample: sample
) -> Entries:
    """Only the entries that say where the object is, `completed`; the others fail. `what` needs at least one.

    Raises:
        UsageError: none is left, and some say nothing of where the object is; or the boxes are no pixels.
        NothingDoneError: none is left, for other reasons.
    """
    check_scale(true_boxes(entries.samples), "data_file")
    samples = []
    for sample in entries.samples:
        try:
            if sample.bbox is None and sample.mask is None:
                raise UsageError(NO_TRUTH)
            samples.append(completed(sample))
        except (UsageError, WorkError) as error:
            entries.fail(sample, error)
    if not samples:
        failed = entries.in_order()
        without = next((failure for failure in failed if NO_TRUTH in failure.reason), None)
        if without is None:
            raise NothingDoneError("no entry could be used", failed)
        raise UsageError(f"{what} needs entries with bbox or mask; the first: {without}")
    return Entries(samples, entries.failures)


def choose_range(
    options: EntryChoice, entries: Sequence[Line], bad: Sequence[BadEntry]
) -> tuple[list[Line], list[BadEntry]]:
    """The entries from `start_index` up to `end_index`, bad lines counted.

    A range that is given is meant, whatever `process_all` says; none that is given is every entry.
    """
    start, end = options.start_index, options.end_index
    if (start, end) == (0, -1):
        return list(entries), list(bad)
    lines = sorted([entry.line for entry in entries] + [entry.line for entry in bad])
    chosen = set(lines[start : None if end == -1 else end])
    if not chosen:
        raise UsageError(f"start_index={start} end_index={end}: data_file has only {len(lines)} entries")
    return [entry for entry in entries if entry.line in chosen], [b for b in bad if b.line in chosen]


def open_chunk(run: Run, entries: Entries, chunk: Sequence[Sample]) -> list[tuple[Sample, Image.Image]]:
    """The images of a chunk; samples whose image or expression is unusable are put aside.

    Samples of one image get one and the same object.
    """
    opened: list[tuple[Sample, Image.Image]] = []
    images: dict[str | int, Image.Image] = {}
    for sample in chunk:
        try:
            run.lvlm.prompt(sample.expression)
            if (key := image_key(sample)) not in images:
                images[key] = entries.images.load(sample, again=entries.images_again)
            check_inside(sample, images[key].size)
            opened.append((sample, images[key]))
        except (UsageError, WorkError) as error:
            entries.fail(sample, error)
    return opened


def image_key(sample: Sample) -> str | int:
    """What stands for a sample's image: two samples of one file have one and the same."""
    return sample.image_key or id(sample.image)


def made_ready(lvlm: LVLM, opened: Sequence[tuple[Sample, Image.Image]]) -> Batch | None:
    """What the host can do ahead of the model. None where it fails: `attend` then finds out with which entry."""
    try:
        return lvlm.make_ready([image for _, image in opened], [sample.expression for sample, _ in opened])
    except Exception:
        return None


def attend(
    run: Run,
    entries: Entries,
    opened: Sequence[tuple[Sample, Image.Image]],
    *,
    last_layer: int | None = None,
    ready: Batch | None = None,
) -> list[Attended]:
    """The maps of a chunk. If the model cannot take it whole, one by one, so that only the culprit fails.

    With `batch_size=auto`, a chunk that does not fit into the memory is halved until it does, and later ones are cut
    to what fitted.

    Args:
        ready: what `made_ready` made of the chunk.

    Raises:
        WorkError: out of memory, with a `batch_size` that was given or with a single entry.
    """
    if not opened:
        return []
    if entries.fitting and len(opened) > entries.fitting:
        return _in_parts(run, entries, opened, entries.fitting, last_layer)
    samples, images = zip(*opened, strict=True)
    expressions = [sample.expression for sample in samples]
    try:
        maps = run.lvlm.attend_batch(images, expressions, last_layer=last_layer, ready=ready)
    except OutOfMemoryError:
        if run.options.batch_size != "auto" or len(opened) == 1:
            raise  # every chunk would fail
    except WorkError:
        raise
    except Exception as error:
        if len(opened) > 1:
            return _in_parts(run, entries, opened, 1, last_layer)
        known = isinstance(error, UsageError)
        entries.fail(
            samples[0], error if known else f"the model cannot take it: {type(error).__name__}: {error}"
        )
        return []
    else:
        return _finite(entries, [Attended(*found) for found in zip(samples, images, maps, strict=True)])
    return _in_halves(run, entries, opened, last_layer)  # here nothing holds on to the batch that failed


def _finite(entries: Entries, attended: Sequence[Attended]) -> list[Attended]:
    """The entries whose attention is finite; each of the others fails alone."""
    finite = []
    for one in attended:
        try:
            one.maps.check_finite()
            finite.append(one)
        except NotFiniteError as error:
            entries.fail(one.sample, error)
    return finite


def _in_halves(
    run: Run, entries: Entries, opened: Sequence[tuple[Sample, Image.Image]], last_layer: int | None
) -> list[Attended]:
    from localization_heads.lvlm.failures import free_memory

    entries.fitting = (len(opened) + 1) // 2
    log.warning("out of memory: going on with %d entries at a time", entries.fitting)
    free_memory()
    return _in_parts(run, entries, opened, entries.fitting, last_layer)


def _in_parts(
    run: Run,
    entries: Entries,
    opened: Sequence[tuple[Sample, Image.Image]],
    size: int,
    last_layer: int | None,
) -> list[Attended]:
    parts = (opened[start : start + size] for start in range(0, len(opened), size))
    return [found for part in parts for found in attend(run, entries, part, last_layer=last_layer)]


Work = Callable[[Run, Entries, Sequence[Attended]], Sequence[Any]]
"""What is made of the maps of a chunk where the model is. Pickled to be sent there, so it holds no run and no model."""


CHUNK_PIXELS = 24_000_000
"""Of the images of a chunk together, unless it has only one: a camera's, or seventy of COCO. Each takes 4 bytes."""
OPENED_AHEAD = 16_000_000
"""Pixels of an image that is opened while the model still works on others: processors take 20 bytes for each."""


class Chunk(NamedTuple):
    """Samples that go through the model together, and the ids of those whose results are not there yet."""

    samples: Sequence[Sample]
    missing: frozenset[str]


class ReadyChunk(NamedTuple):
    """A chunk with its images open and the host's share of the model's work done.

    Args:
        opened: None where that is left to `compute`.
    """

    chunk: Chunk
    opened: Sequence[tuple[Sample, Image.Image]] | None
    ready: Batch | None


def make_chunk_ready(run: Run, entries: Entries, chunk: Chunk) -> ReadyChunk:
    """The whole chunk goes through the model or nothing of it: a smaller batch would round differently.

    An image of more than `OPENED_AHEAD` is left to `compute`.
    """
    if (
        chunk.missing
        and entries.images.pixels(chunk.samples[0]) > OPENED_AHEAD
        and not is_address(chunk.samples[0].image)
    ):
        return ReadyChunk(chunk, None, None)
    return _opened(run, entries, chunk)


def _opened(run: Run, entries: Entries, chunk: Chunk) -> ReadyChunk:
    opened = open_chunk(run, entries, chunk.samples) if chunk.missing else []
    if not any(sample.id in chunk.missing for sample, _ in opened):
        return ReadyChunk(chunk, [], None)
    return ReadyChunk(chunk, opened, made_ready(run.lvlm, opened))


def compute(run: Run, entries: Entries, prepared: ReadyChunk, last_layer: int | None) -> list[Attended]:
    """The maps of the chunk's missing samples."""
    missing = prepared.chunk.missing
    if prepared.opened is None:
        prepared = _opened(run, entries, prepared.chunk)
    attended = attend(run, entries, prepared.opened or [], last_layer=last_layer, ready=prepared.ready)
    return [one for one in attended if one.sample.id in missing]
