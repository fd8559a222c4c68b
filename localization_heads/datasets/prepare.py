"""`stage=prepare`: convert a benchmark from its published format to JSON lines.

Each line is an expression: `id`, `prompt`, `image_path`, `bbox`, `mask`, `ignore` if any, and `picture`, a name for the
image that is the same in all data sets. A `.json` file of the same name records the sources, the sample and the counts.

The expressions of an object can be used one by one, reduced to one, or joined in one prompt. lmms-eval has two kinds of
RefCOCO tasks, whose scores are not comparable: `refcoco_bbox_rec` uses each expression by itself; `refcoco_grounding`
(pull request 1373 of EvolvingLMMs-Lab/lmms-eval) joins all expressions of an object, quoted and separated by commas.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from localization_heads.data.box_scale import TrueBox, check_box_scale
from localization_heads.data.images import decode_image, image_size
from localization_heads.data.masks import encode_mask_source
from localization_heads.datasets.base import (
    BadRecord,
    Index,
    IndexEntry,
    Record,
    Source,
    check_box_inside,
)
from localization_heads.datasets.leakage import find_prepared_files, read_pictures
from localization_heads.datasets.source import OFFICIAL_COUNTS, Counts, count_entries, open_source
from localization_heads.errors import BadEntry, BadLineError, NothingDoneError, UsageError, WorkError
from localization_heads.options.finder_mixins import REFCOCO, Protocol, Sentence
from localization_heads.options.programs import FinderOptions
from localization_heads.store.files import RunLock, atomic_write, write_bytes, write_json

log = logging.getLogger(__name__)

EXTENSIONS = {"JPEG": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class PreparedDataset:
    """The result of `prepare`.

    Args:
        splits: what the source contains, by split.
        split: the split that was written.
        written: what the data file contains.
        failures: the rows and expressions of the split that could not be used.
        paths: the data file and its metadata.
        protocol: the evaluation protocol.
    """

    dataset: str
    splits: Mapping[str, Counts]
    split: str
    written: Counts
    failures: list[BadEntry]
    paths: list[Path]
    protocol: str = ""


def prepare(options: FinderOptions, *, limit_train_only: bool = True) -> PreparedDataset:
    """Read a benchmark, choose expressions and write them with their ground truth.

    Args:
        limit_train_only: apply `num_samples` to the training split only; other splits are written in full.
    """
    options.require("dataset", "dataset_path")
    images = Path(options.images) if options.images else None
    check_protocol(options)
    source = open_source(str(options.dataset), Path(str(options.dataset_path)), images)
    index = source.index()
    split = _choose_split(options, index)
    number = None if limit_train_only and split != "train" else options.num_samples
    chosen, num_excluded = _choose_entries(options, index, split, number)
    target = Path(options.dataset_folder) / f"{_file_stem(options, source, split, number)}.jsonl"
    protocol = source.protocol or options.protocol
    with RunLock(target.parent):
        if split == "train" and not options.allow_leakage:
            check_leakage(options, index, chosen, target.parent)
        splits = {name: count_entries(entries) for name, entries in _group_by_split(index.entries).items()}
        _log_notes(options, source, split, splits[split])
        written, failures = _write_data_file(options, target, source, chosen, protocol)
        failures += index.failures_of(split)
        metadata = _make_metadata(options, source, split, number, written, num_excluded, len(failures))
        write_json(target.with_suffix(".json"), {**metadata, "protocol": protocol})
    paths = [target, target.with_suffix(".json")]
    return PreparedDataset(str(options.dataset), splits, split, written, failures, paths, protocol)


def check_protocol(options: FinderOptions) -> None:
    """UsageError if `protocol=` and `sentence=` contradict each other or the data set."""
    if options.protocol == "lmms" and options.dataset not in REFCOCO:
        raise UsageError(f"protocol=lmms: it joins expressions of {', '.join(REFCOCO)}, not of {options.dataset}")
    if options.protocol == "lmms" and options.sentence != "all":
        raise UsageError(f"sentence={options.sentence}: protocol=lmms joins all of an object; leave sentence= out")


def draw_entries(entries: Sequence[IndexEntry], number: int, seed: int) -> list[IndexEntry]:
    """Sample `number` entries by the hash of seed and id, in their original order.

    The sample depends only on seed and ids: it is the same from the pickles and from Parquet, and a sample of 100 is a
    subset of the sample of 1,000.
    """

    def sort_key(entry: IndexEntry) -> bytes:
        return hashlib.sha256(f"{seed}:{entry.id}".encode()).digest()

    drawn = set(sorted(entries, key=sort_key)[:number])
    return [entry for entry in entries if entry in drawn]


def check_leakage(options: FinderOptions, index: Index, chosen: Sequence[IndexEntry], folder: Path) -> None:
    """UsageError if a training sample shares images with evaluation splits, of its source or prepared in `folder`."""
    drawn_images = {entry.picture for entry in chosen}
    evaluated = {
        f"{options.dataset} {split}": {entry.picture for entry in entries}
        for split, entries in _group_by_split(index.entries).items()
        if split != "train"
    }
    for data_file, metadata in find_prepared_files(folder):
        if metadata["split"] != "train":
            evaluated[data_file.name] = read_pictures(data_file)
    shared = {name: len(drawn_images & images) for name, images in evaluated.items() if drawn_images & images}
    if shared:
        listed = ", ".join(f"{number} of {name}" for name, number in shared.items())
        raise UsageError(
            f"the {len(drawn_images)} images drawn from {options.dataset} train are also evaluated: {listed}. "
            "Leave them out with exclude=[prepared evaluation files], or write allow_leakage=true"
        )


def _choose_split(options: FinderOptions, index: Index) -> str:
    """The split to write. UsageError if it does not exist; NothingDoneError if none of it is usable."""
    if not index.entries and not index.failures:
        raise UsageError(f"dataset_path={options.dataset_path}: it holds no reference")
    splits = _group_by_split(index.entries)
    names = {*splits, *(failure.split for failure in index.failures if failure.split)}
    split: str = options.split or (min(names) if len(names) == 1 else "val")
    if split in splits:
        return split
    failures = index.failures_of(split)
    if failures and (split in names or not index.entries):
        raise NothingDoneError(f"no row of {split} could be read", failures[:10])
    available = ", ".join(f"{name} ({len(entries)} expressions)" for name, entries in splits.items())
    raise UsageError(f"split={split}: dataset_path has {available or 'none that can be read'}")


def _choose_entries(
    options: FinderOptions, index: Index, split: str, number: int | None
) -> tuple[list[IndexEntry], int]:
    """The expressions to write, and how many were left out by `exclude`."""
    all_entries = _group_by_split(index.entries)[split]
    occurrences = Counter(entry.id for entry in all_entries)
    if duplicates := [id for id, count in occurrences.items() if count > 1]:
        raise UsageError(f"dataset_path holds {options.dataset} {split} twice: {duplicates[0]} is in it again")
    entries = apply_protocol(all_entries, options.protocol, options.sentence)
    excluded = (read_pictures(Path(file), "exclude") for file in options.exclude)
    images: set[str] = set().union(*excluded)
    remaining = [entry for entry in entries if entry.picture not in images]
    if not remaining:
        raise UsageError(f"exclude: it leaves no expression of {options.dataset} {split}")
    num_excluded = len(entries) - len(remaining)
    if number is None or number >= len(remaining):
        return remaining, num_excluded
    return draw_entries(remaining, number, options.random_seed), num_excluded


def _group_by_split(entries: Sequence[IndexEntry]) -> dict[str, list[IndexEntry]]:
    splits: dict[str, list[IndexEntry]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry)
    return splits


def _file_stem(options: FinderOptions, source: Source, split: str, number: int | None) -> str:
    """`refcoco-val`, `refcocog-google-val`, `refcoco-train-1000-seed42`, `refcoco-val-joined`."""
    parts = [options.dataset, source.variant, split]
    parts.append(protocol_suffix(options.protocol, options.sentence))
    if number is not None:
        parts += [str(number), f"seed{options.random_seed}"]
    return "-".join(part for part in parts if part)


def _log_notes(options: FinderOptions, source: Source, split: str, counts: Counts) -> None:
    for note in source.notes:
        log.warning("%s", note)
    official = OFFICIAL_COUNTS.get((str(options.dataset), split))
    if official and counts != official:
        log.warning(
            "%s %s has %d references and %d expressions here, %d and %d in papers: numbers do not compare",
            options.dataset,
            split,
            *counts,
            *official,
        )


def _write_data_file(
    options: FinderOptions, target: Path, source: Source, chosen: Sequence[IndexEntry], protocol: str
) -> tuple[Counts, list[BadEntry]]:
    """Write the lines record by record; returns the counts written and the failures."""
    by_row = {row: list(entries) for row, entries in groupby(chosen, key=lambda entry: entry.row)}
    failures: list[BadEntry] = []
    written: list[IndexEntry] = []
    boxes: list[TrueBox] = []
    with atomic_write(target) as file:
        records = source.records(sorted(by_row))
        for record in tqdm(records, total=len(by_row), desc="prepare", unit="reference", disable=None):
            entries = by_row[record.row]
            try:
                _write_lines(file, target.parent, record, entries, boxes, protocol)
                written += entries
            except (UsageError, WorkError, BadLineError) as error:
                reason = " ".join(str(error).split())
                failures += [BadEntry(entry.row + 1, entry.id, reason) for entry in entries]
        check_box_scale(boxes, f"dataset_path={options.dataset_path}")
        if not written:
            raise NothingDoneError(f"none of {len(chosen)} expressions could be prepared", failures[:10])
    return count_entries(written), failures


def _write_lines(
    file: BinaryIO,
    folder: Path,
    record: Record | BadRecord,
    entries: Sequence[IndexEntry],
    boxes: list[TrueBox],
    protocol: str,
) -> None:
    if isinstance(record, BadRecord):
        raise BadLineError(record.reason)
    fields = dict(_ground_truth_fields(folder, record, entries[0], boxes))
    shared_fields = {"picture": entries[0].picture, "protocol": protocol, **record.extra}
    for entry in entries:
        line = {"id": entry.id, "prompt": entry.text, **fields, **shared_fields}
        file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _ground_truth_fields(
    folder: Path, record: Record, entry: IndexEntry, boxes: list[TrueBox]
) -> Iterator[tuple[str, Any]]:
    """Yield the fields of image, boxes and masks, checked for consistency; boxes are also appended to `boxes`."""
    if isinstance(record.image, bytes):
        path, size = _save_image(folder, record.image, entry)
    else:
        path, size = str(record.image.absolute()), image_size(record.image)
    if record.size is not None and record.size != size:
        width, height = record.size
        raise BadLineError(f"the image is {size[0]} x {size[1]} pixels, the source says {width} x {height}")
    yield "image_path", path
    if record.box is not None:
        boxes.append(TrueBox(entry.id, record.box, size))
        check_box_inside(record.box, size)
        yield "bbox", list(record.box)
    for box in record.boxes:
        boxes.append(TrueBox(entry.id, box, size))
        check_box_inside(box, size)
    if record.boxes:
        yield "bboxes", [list(box) for box in record.boxes]
    if record.absent:
        yield "bbox", None
        yield "absent", True
    if record.mask is not None:
        yield "mask", encode_mask_source(record.mask, size)
    if record.ignore is not None:
        yield "ignore", encode_mask_source(record.ignore, size)


def _save_image(folder: Path, content: bytes, entry: IndexEntry) -> tuple[str, tuple[int, int]]:
    """Write an image to a file named after its content, unless it exists; returns its relative path and `(W, H)`."""
    format, image = decode_image(f"the image of row {entry.row + 1}", content)
    name = hashlib.sha256(content).hexdigest()[:32] + EXTENSIONS.get(format, f".{format.lower()}")
    if not (folder / "images" / name).is_file():
        write_bytes(folder / "images" / name, content)
    return f"images/{name}", image.size


def _make_metadata(
    options: FinderOptions,
    source: Source,
    split: str,
    number: int | None,
    written: Counts,
    num_excluded: int,
    failed: int,
) -> dict[str, Any]:
    """Everything that determines the content of the data file, for reproducibility."""
    return {
        "version": 1,
        "dataset": options.dataset,
        "split": split,
        "sentence": options.sentence,
        "source": source.kind,
        "variant": source.variant,
        "files": [_file_digest(file) for file in source.files],
        "num_samples": number,
        "random_seed": options.random_seed if number is not None else None,
        "references": written.references,
        "expressions": written.expressions,
        "excluded": num_excluded,
        "failed": failed,
        "allow_leakage": options.allow_leakage,
        "notes": source.notes,
    }


def _file_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def select_sentences(entries: Sequence[IndexEntry], sentence: Sentence) -> list[IndexEntry]:
    """All entries, or the first or the longest of each row (the first of equally long ones).

    Args:
        entries: in the order of the source, with entries of the same row adjacent.

    >>> rows = [IndexEntry("a", "val", "p", "cat", 0), IndexEntry("b", "val", "p", "black cat", 0)]
    >>> [entry.id for entry in select_sentences(rows, "longest")]
    ['b']
    """
    if sentence == "all":
        return list(entries)
    rows = [list(row) for _, row in groupby(entries, key=lambda entry: entry.row)]
    if sentence == "first":
        return [row[0] for row in rows]
    return [max(row, key=lambda entry: len(entry.text)) for row in rows]


def join_sentences(entries: Sequence[IndexEntry]) -> list[IndexEntry]:
    """One entry per row, which joins its expressions: each quoted, separated by commas.

    >>> first = IndexEntry("ref1_sent1", "val", "p", "cat", 0)
    >>> join_sentences([first, IndexEntry("ref1_sent2", "val", "p", "black cat", 0)])[0]
    IndexEntry(id='ref1_joined', split='val', picture='p', text='"cat", "black cat"', row=0)
    """
    joined = []
    for _, row in groupby(entries, key=lambda entry: entry.row):
        first, *others = row
        text = ", ".join(f'"{entry.text}"' for entry in (first, *others))
        joined.append(first._replace(id=f"{first.id.rpartition('_')[0]}_joined", text=text))
    return joined


def apply_protocol(entries: Sequence[IndexEntry], protocol: Protocol, sentence: Sentence) -> list[IndexEntry]:
    """Select and join expressions according to the options."""
    chosen = select_sentences(entries, sentence)
    return join_sentences(chosen) if protocol == "lmms" else chosen


def protocol_suffix(protocol: Protocol, sentence: Sentence) -> str:
    """The part of the file name that depends on the protocol; "" if each expression is used by itself."""
    return "joined" if protocol == "lmms" else "" if sentence == "all" else sentence
