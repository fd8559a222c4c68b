"""The entries of a data file that a run works on, with their images, their ground truth and their failures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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
"""Pixels of the decoded images that one pass keeps for the next; 3 bytes each."""
MAX_CHUNK_PIXELS = 24_000_000
"""Pixels of a chunk's images, unless it has only one: one camera image, or seventy images of COCO."""
MAX_PREFETCH_PIXELS = 16_000_000
"""Pixels of an image that may be loaded while the model is busy with others: processors take 20 bytes per pixel."""


class DecodedImageCache:
    """The decoded images of a run, so that most are opened only once.

    An image is kept if it was opened for its size, or loaded with `keep=True`, and fits. It is dropped when it is
    loaded without `keep`.

    Args:
        max_pixels: pixels of all images that are kept.
    """

    def __init__(self, max_pixels: int) -> None:
        self._free_pixels = max_pixels
        self._sizes: dict[str | int, int] = {}
        self._images: dict[str | int, Image.Image] = {}

    def pixels(self, sample: Sample) -> int:
        """Pixels of the sample's images: 0 if they are broken, `MAX_CHUNK_PIXELS` if they are yet to be downloaded."""
        images = sample.image if isinstance(sample.image, Together) else (sample.image,)
        if any(map(is_address, images)):
            return MAX_CHUNK_PIXELS
        if (key := image_key(sample)) not in self._sizes:
            self._sizes[key] = self._read_size(key, sample)
        return self._sizes[key]

    def _read_size(self, key: str | int, sample: Sample) -> int:
        try:
            if isinstance(sample.image, Together):
                return num_pixels(sample.image)  # several images are not kept
            if isinstance(sample.image, Image.Image):
                width, height = sample.image.size
                return width * height
            max_pixels = min(self._free_pixels, MAX_PREFETCH_PIXELS)
            (width, height), image = probe_image(sample.image, max_pixels)  # type: ignore[arg-type]
        except UsageError:
            return 0
        if image is not None:
            self._keep(key, image)
        return width * height

    def _keep(self, key: str | int, image: Image.Image) -> None:
        self._images[key] = image
        self._free_pixels -= image.width * image.height

    def load(self, sample: Sample, *, keep: bool = False) -> PromptImages:
        """The decoded image, or the images of one prompt. Raises what `load_image` does.

        Args:
            keep: the image will be loaded again.
        """
        if isinstance(sample.image, Together):
            return load_prompt_images(sample.image)
        key = image_key(sample)
        image = self._images.get(key)
        if image is None:
            image = load_image(sample.image)
            if keep and image.width * image.height <= self._free_pixels:
                self._keep(key, image)
        elif not keep:
            del self._images[key]
            self._free_pixels += image.width * image.height
        return image


def image_key(sample: Sample) -> str | int:
    """The identity of a sample's image, which samples of the same file share."""
    return sample.image_key or id(sample.image)


@dataclass
class Entries:
    """The samples that a run works on, in file order, and those that have failed.

    Args:
        max_batch_size: the largest batch expected to fit into memory, once one did not (`batch_size=auto`).
        images_reused: a second pass loads the images again.
        with_sensitivity: the statistics include sensitivity, so they depend on the siblings.
    """

    samples: list[Sample]
    failures: list[BadEntry] = field(default_factory=list)
    max_batch_size: int | None = None
    images_reused: bool = False
    with_sensitivity: bool = False
    images: DecodedImageCache = field(default_factory=lambda: DecodedImageCache(MAX_CACHED_PIXELS), repr=False)
    _keys: dict[str, bytes] = field(default_factory=dict, repr=False)
    _by_image: dict[str | int, list[str]] = field(default_factory=dict, repr=False)

    def key(self, sample: Sample) -> bytes:
        """16 bytes that identify the sample's expression, image and id.

        Computed once, so that a key does not change when the image file is modified during the run.
        """
        if sample.id not in self._keys:
            self._keys[sample.id] = sample_key(sample.expression, sample.image_key, sample.id)
        return self._keys[sample.id]

    def siblings(self, sample: Sample) -> tuple[str, ...]:
        """The first other expressions of the sample's image, in file order."""
        if not self._by_image:
            by_image: dict[str | int, list[str]] = {}
            for one in self.samples:
                by_image.setdefault(image_key(one), []).append(one.expression)
            self._by_image = by_image  # assigned when complete: several threads read it
        return other_expressions(sample.expression, self._by_image.get(image_key(sample), ()))

    def result_key(self, sample: Sample, contrast: Contrast) -> bytes:
        """`key`, also identifying the siblings if the sample's result depends on them."""
        key = self.key(sample)
        if contrast != "siblings":
            return key
        siblings = json.dumps(self.siblings(sample)).encode()
        return hashlib.blake2b(key + siblings, digest_size=len(key)).digest()

    def statistics_key(self, sample: Sample, *, mirrored: bool = False) -> bytes:
        """The key of the sample's statistics; `mirrored` if they include the mirrored image."""
        if not self.with_sensitivity:
            return self.key(sample)
        key = self.result_key(sample, "siblings")
        return hashlib.blake2b(key + b"mirrored", digest_size=len(key)).digest() if mirrored else key

    def stored_statistics_key(self, sample: Sample, store: Container[bytes]) -> bytes:
        """The key under which `store` holds the sample's statistics: the mirrored one if it is there."""
        mirrored = self.statistics_key(sample, mirrored=True)
        return mirrored if mirrored in store else self.statistics_key(sample)

    def fail(self, sample: Sample, reason: object) -> None:
        """Record the sample as failed. The reason is put on one line, without the sample's own name in front."""
        line = " ".join(str(reason).split()).removeprefix(f"{sample_name(sample)}: ")
        self.failures.append(BadEntry(sample.line, sample.id, line))

    @contextmanager
    def skip_on_error(self, sample: Sample, *more: type[Exception]) -> Iterator[None]:
        """Record the sample as failed if the block raises a UsageError, or one of `more`, and go on.

        A sample that comes from no data file is the run's only one, so its error is raised.
        """
        try:
            yield
        except Exception as error:
            if not sample.line or not isinstance(error, (UsageError, *more)):
                raise
            self.fail(sample, error)

    def sorted_failures(self) -> list[BadEntry]:
        """The failures by line number."""
        return sorted(self.failures, key=lambda failure: failure.line)

    @property
    def usable(self) -> list[Sample]:
        """The samples that have not failed."""
        failed = {failure.line for failure in self.failures}
        return [sample for sample in self.samples if sample.line not in failed]


def load_entries(run: Run) -> Entries:
    """Read `data_file` and keep the entries that the options select."""
    run.options.require("data_file")
    data_file: str | Path = str(run.options.data_file)
    if data_file == "scenes":
        data_file = write_scenes(run.options.scenes)
    file = load_samples(data_file, allow_private_addresses=run.options.allow_private_addresses)
    entries = Entries(*select_range(run.options, file.entries, file.bad))
    if allows_several_images(run):
        return entries
    for sample in entries.samples:
        if num_images(sample.image) > 1:
            entries.fail(sample, MULTI_IMAGE_ERROR)
    return Entries([one for one in entries.samples if num_images(one.image) == 1], entries.failures)


def allows_several_images(run: Run) -> bool:
    """Whether a prompt of this run may show several images."""
    return run.options.stage in SEVERAL_IMAGE_STAGES and not run.options.zoom


def select_range(
    options: EntryChoice, entries: Sequence[Line], bad: Sequence[BadEntry]
) -> tuple[list[Line], list[BadEntry]]:
    """The entries and bad lines from `start_index` up to `end_index`, which count both.

    A given range applies whatever `process_all` says.
    """
    start, end = options.start_index, options.end_index
    if (start, end) == (0, -1):
        return list(entries), list(bad)
    lines = sorted([entry.line for entry in entries] + [entry.line for entry in bad])
    selected = set(lines[start : None if end == -1 else end])
    if not selected:
        raise UsageError(f"start_index={start} end_index={end}: data_file has only {len(lines)} entries")
    return [entry for entry in entries if entry.line in selected], [b for b in bad if b.line in selected]


def require_truth(
    entries: Entries,
    what: str,
    complete: Callable[[Sample], Sample] = lambda sample: sample,
    *,
    or_absent: bool = False,
) -> Entries:
    """The entries that have a true box or mask; the others fail.

    Args:
        what: what needs the ground truth, for the error message.
        complete: applied to each of these samples, for example to derive the box from the mask.
        or_absent: also accept samples whose object is absent, or that have several true boxes.

    Raises:
        UsageError: no entry is left and some lack ground truth, or the boxes are not in pixels.
        NothingDoneError: no entry is left for other reasons.
    """
    check_box_scale(collect_true_boxes(entries.samples), "data_file")
    samples = []
    for sample in entries.samples:
        with entries.skip_on_error(sample, WorkError):
            has_truth = sample.bbox is not None or sample.mask is not None
            if not has_truth and not (or_absent and (sample.absent or sample.boxes)):
                raise UsageError(NO_TRUTH)
            samples.append(complete(sample))
    if not samples:
        failures = entries.sorted_failures()
        unlabelled = next((failure for failure in failures if NO_TRUTH in failure.reason), None)
        if unlabelled is None:
            raise NothingDoneError("no entry could be used", failures)
        raise UsageError(f"{what} needs entries with bbox or mask; the first: {unlabelled}")
    return Entries(samples, entries.failures)
