"""The entries of a data file that one run works on, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from localization_heads.attention import AttentionMaps
from localization_heads.data.images import load_image
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.samples import Sample, VisualizationEntry, load_samples
from localization_heads.errors import UsageError, WorkError
from localization_heads.options import require
from localization_heads.stages.run import Run
from localization_heads.stages.scenes import scenes
from localization_heads.store.statistics import sample_key

if TYPE_CHECKING:
    from PIL import Image


Line = TypeVar("Line", Sample, VisualizationEntry)


@dataclass
class Entries:
    """The samples to work on, in file order, and the failures met so far."""

    samples: list[Sample]
    failures: list[BadEntry] = field(default_factory=list)
    _keys: dict[int, bytes] = field(default_factory=dict, repr=False)

    def key(self, sample: Sample) -> bytes:
        """16 bytes that change with the sample's expression, picture or id.

        Made once a run: a picture that is touched meanwhile must not lose its place.
        """
        if sample.line not in self._keys:
            self._keys[sample.line] = sample_key(sample.expression, sample.image_file, sample.id)
        return self._keys[sample.line]

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
    """A sample with its opened picture and the maps of every head."""

    sample: Sample
    image: Image.Image
    maps: AttentionMaps


def select_entries(run: Run) -> Entries:
    """Read `data_file` and cut it to the entries that the options ask for."""
    require(run.options, "data_file")
    file = load_samples(scenes(run) if run["data_file"] == "scenes" else run["data_file"])
    return Entries(*choose_range(run.options, file.samples, file.bad))


def choose_range(
    options: Mapping[str, Any], entries: Sequence[Line], bad: Sequence[BadEntry]
) -> tuple[list[Line], list[BadEntry]]:
    """The entries from `start_index` up to `end_index`, bad lines counted.

    A range that is given is meant, whatever `process_all` says; none that is given is every entry.
    """
    start, end = options["start_index"], options["end_index"]
    if (start, end) == (0, -1):
        return list(entries), list(bad)
    lines = sorted([entry.line for entry in entries] + [entry.line for entry in bad])
    chosen = set(lines[start : None if end == -1 else end])
    if not chosen:
        raise UsageError(f"start_index={start} end_index={end}: data_file has only {len(lines)} entries")
    return [entry for entry in entries if entry.line in chosen], [b for b in bad if b.line in chosen]


def open_chunk(run: Run, entries: Entries, chunk: Sequence[Sample]) -> list[tuple[Sample, Image.Image]]:
    """The pictures of a chunk; samples whose picture or expression is unusable are put aside."""
    opened = []
    for sample in chunk:
        try:
            run.lvlm.prompt(sample.expression)
            opened.append((sample, load_image(sample.image)))
        except (UsageError, WorkError) as error:
            entries.fail(sample, error)
    return opened


def attend(
    run: Run,
    entries: Entries,
    opened: Sequence[tuple[Sample, Image.Image]],
    *,
    last_layer: int | None = None,
) -> list[Attended]:
    """The maps of a chunk. If the model cannot take it whole, one by one, so that only the culprit fails."""
    if not opened:
        return []
    samples, images = zip(*opened, strict=True)
    expressions = [sample.expression for sample in samples]
    try:
        maps = run.lvlm.attend_batch(images, expressions, last_layer=last_layer)
    except WorkError:
        raise  # out of memory: every chunk would fail
    except Exception as error:
        if len(opened) > 1:
            return [found for one in opened for found in attend(run, entries, [one], last_layer=last_layer)]
        known = isinstance(error, UsageError)
        entries.fail(
            samples[0], error if known else f"the model cannot take it: {type(error).__name__}: {error}"
        )
        return []
    return [Attended(*found) for found in zip(samples, images, maps, strict=True)]


def chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Consecutive samples, always cut at the same places, so that a resumed run forms the same batches."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
