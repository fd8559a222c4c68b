"""The entries of a data file that one run works on: their images, their truth, and those that fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from localization_heads.data.address import is_address
from localization_heads.data.box_scale import check_box_scale, collect_true_boxes
from localization_heads.data.images import load_image, probe_image
from localization_heads.data.samples import (
    MULTI_IMAGE_ERROR,
    Sample,
    VisualizationEntry,
    load_samples,
    sample_name,
)
from localization_heads.data.sources import PromptImages, Together, load_prompt_images, num_images, num_pixels
from localization_heads.errors import BadEntry, NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.judging import NO_TRUTH
from localization_heads.lvlm.extra_prompts import other_expressions
from localization_heads.options.groups import Contrast
from localization_heads.options.shared import EntryChoice
from localization_heads.scenes.write import write_scenes
from localization_heads.stages.run import Run
from localization_heads.store.statistics import sample_key

Line = TypeVar("Line", Sample, VisualizationEntry)

SEVERAL_IMAGE_STAGES = ("ground", "batch", "find", "rank", "export")
MAX_CACHED_PIXELS = 24_000_000
"""Of the images that one pass keeps for the next: all of a small data set's, 70 MB of a large one's."""
MAX_CHUNK_PIXELS = 24_000_000
"""Of the images of a chunk, unless it has only one: a camera's image, or seventy of COCO, at 4 bytes a pixel."""
MAX_PREFETCH_PIXELS = 16_000_000
"""Of an image that is opened while the model still works on others: processors take 20 bytes a pixel."""


class ImageCache:
    """The images of one run, each opened and decoded once, as long as the images kept have room.

    An image that was opened for its size or is loaded for another pass is kept, until it is loaded for the last time.

    Args:
        room: pixels of the images kept.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._sizes: dict[str | int, int] = {}
        self._kept: dict[str | int, Image.Image] = {}

    def pixels(self, sample: Sample) -> int:
        """Of its images: 0 for a broken one, `MAX_CHUNK_PIXELS` with an address, which is not fetched for this."""
        images = sample.image if isinstance(sample.image, Together) else (sample.image,)
        if any(map(is_address, images)):
            return MAX_CHUNK_PIXELS
        if (key := image_key(sample)) not in self._sizes:
            self._sizes[key] = self._opened(key, sample)
        return self._sizes[key]

    def _opened(self, key: str | int, sample: Sample) -> int:
        try:
            if isinstance(sample.image, Together):
                return num_pixels(sample.image)  # which of them may be kept is not worth the room
            if isinstance(sample.image, Image.Image):
                width, height = sample.image.size
                return width * height
            (width, height), image = probe_image(sample.image, min(self._room, MAX_PREFETCH_PIXELS))  # type: ignore[arg-type]
        except UsageError:
            return 0
        if image is not None:
            self._keep(key, image)
        return width * height

    def _keep(self, key: str | int, image: Image.Image) -> None:
        self._kept[key] = image
        self._room -= image.width * image.height

    def load(self, sample: Sample, *, again: bool = False) -> PromptImages:
        """The decoded image, or those of one prompt. Raises what `load_image` does.

        Args:
            again: it will be loaded once more.
        """
        if isinstance(sample.image, Together):
            return load_prompt_images(sample.image)
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


def image_key(sample: Sample) -> str | int:
    """The identity of a sample's image: two samples of one file share it."""
    return sample.image_key or id(sample.image)


@dataclass
class Entries:
    """The samples to work on, in file order, and the failures so far.

    Args:
        max_batch_size: the largest batch that the memory may still hold, once one did not fit (`batch_size=auto`).
        images_reused: the images are loaded in a second pass as well.
        with_sensitivity: their statistics hold the sensitivity, which depends on the siblings.
    """

    samples: list[Sample]
    failures: list[BadEntry] = field(default_factory=list)
    max_batch_size: int | None = None
    images_reused: bool = False
    with_sensitivity: bool = False
    images: ImageCache = field(default_factory=lambda: ImageCache(MAX_CACHED_PIXELS), repr=False)
    _keys: dict[str, bytes] = field(default_factory=dict, repr=False)
    _by_image: dict[str | int, list[str]] = field(default_factory=dict, repr=False)

    def key(self, sample: Sample) -> bytes:
        """16 bytes that change with the sample's expression, image or id.

        Made once a run: an image file that is touched meanwhile must not change it.
        """
        if sample.id not in self._keys:
            self._keys[sample.id] = sample_key(sample.expression, sample.image_key, sample.id)
        return self._keys[sample.id]

    def siblings(self, sample: Sample) -> tuple[str, ...]:
        """The first other expressions of the sample's image, in file order, of all samples chosen."""
        if not self._by_image:
            by_image: dict[str | int, list[str]] = {}
            for one in self.samples:
                by_image.setdefault(image_key(one), []).append(one.expression)
            self._by_image = by_image  # at once: several threads ask
        return other_expressions(sample.expression, self._by_image.get(image_key(sample), ()))

    def result_key(self, sample: Sample, contrast: Contrast) -> bytes:
        """16 bytes that also change with the siblings, where the sample's result depends on them."""
        key = self.key(sample)
        if contrast != "siblings":
            return key
        named = json.dumps(self.siblings(sample)).encode()
        return hashlib.blake2b(key + named, digest_size=len(key)).digest()

    def statistics_key(self, sample: Sample, *, mirrored: bool = False) -> bytes:
        """16 bytes for the sample's statistics; `mirrored` where the mirrored image was asked as well."""
        if not self.with_sensitivity:
            return self.key(sample)
        key = self.result_key(sample, "siblings")
        return hashlib.blake2b(key + b"mirrored", digest_size=len(key)).digest() if mirrored else key

    def stored_statistics_key(self, sample: Sample, store: Container[bytes]) -> bytes:
        """The key under which a store has the sample's statistics, or would have them."""
        mirrored = self.statistics_key(sample, mirrored=True)
        return mirrored if mirrored in store else self.statistics_key(sample)

    def fail(self, sample: Sample, reason: object) -> None:
        """Put a sample aside; the others go on. Its place is said once, also where the reason begins with it."""
        said = " ".join(str(reason).split()).removeprefix(f"{sample_name(sample)}: ")
        self.failures.append(BadEntry(sample.line, sample.id, said))

    @contextmanager
    def skip_on_error(self, sample: Sample, *more: type[Exception]) -> Iterator[None]:
        """Put the sample aside on a UsageError, or one of `more`. A sample of no data file raises it: it is alone."""
        try:
            yield
        except Exception as error:
            if not sample.line or not isinstance(error, (UsageError, *more)):
                raise
            self.fail(sample, error)

    def sorted_failures(self) -> list[BadEntry]:
        """The failures by line."""
        return sorted(self.failures, key=lambda failure: failure.line)

    @property
    def usable(self) -> list[Sample]:
        """The samples that have not failed."""
        failed = {failure.line for failure in self.failures}
        return [sample for sample in self.samples if sample.line not in failed]


def load_entries(run: Run) -> Entries:
    """Read `data_file` and cut it to the entries that the options choose."""
    run.options.require("data_file")
    data_file = (
        write_scenes(run.options.scenes) if run.options.data_file == "scenes" else str(run.options.data_file)
    )
    file = load_samples(data_file, allow_private_addresses=run.options.allow_private_addresses)
    entries = Entries(*select_range(run.options, file.entries, file.bad))
    return entries if allows_several_images(run) else _of_one_image(entries)


def allows_several_images(run: Run) -> bool:
    """Whether the run takes several images in one prompt."""
    return run.options.stage in SEVERAL_IMAGE_STAGES and not run.options.zoom


def _of_one_image(entries: Entries) -> Entries:
    """The entries without those whose prompts show several images, which are put aside."""
    for sample in entries.samples:
        if num_images(sample.image) > 1:
            entries.fail(sample, MULTI_IMAGE_ERROR)
    return Entries([one for one in entries.samples if num_images(one.image) == 1], entries.failures)


def require_truth(
    entries: Entries,
    what: str,
    completed: Callable[[Sample], Sample] = lambda sample: sample,
    *,
    or_absent: bool = False,
) -> Entries:
    """Only the entries with a true box or mask, `completed`; the others fail. `what` needs at least one.

    Args:
        or_absent: what is absent, or has several true boxes, is known as well.

    Raises:
        UsageError: none is left, and some have no truth; or the boxes are not in pixels.
        NothingDoneError: none is left, for other reasons.
    """
    check_box_scale(collect_true_boxes(entries.samples), "data_file")
    samples = []
    for sample in entries.samples:
        with entries.skip_on_error(sample, WorkError):
            known = sample.bbox is not None or sample.mask is not None
            if not known and not (or_absent and (sample.absent or sample.boxes)):
                raise UsageError(NO_TRUTH)
            samples.append(completed(sample))
    if not samples:
        failed = entries.sorted_failures()
        without = next((failure for failure in failed if NO_TRUTH in failure.reason), None)
        if without is None:
            raise NothingDoneError("no entry could be used", failed)
        raise UsageError(f"{what} needs entries with bbox or mask; the first: {without}")
    return Entries(samples, entries.failures)


def select_range(
    options: EntryChoice, entries: Sequence[Line], bad: Sequence[BadEntry]
) -> tuple[list[Line], list[BadEntry]]:
    """The entries from `start_index` up to `end_index`, bad lines counted.

    Any range that is given applies, whatever `process_all` says.
    """
    start, end = options.start_index, options.end_index
    if (start, end) == (0, -1):
        return list(entries), list(bad)
    lines = sorted([entry.line for entry in entries] + [entry.line for entry in bad])
    chosen = set(lines[start : None if end == -1 else end])
    if not chosen:
        raise UsageError(f"start_index={start} end_index={end}: data_file has only {len(lines)} entries")
    return [entry for entry in entries if entry.line in chosen], [b for b in bad if b.line in chosen]
