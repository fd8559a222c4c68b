"""`stage=prepare`: a benchmark in the form that users have on their disk, written as JSON lines.

Each line is an expression: `id`, `prompt`, `image_path`, `bbox`, `mask`, `ignore` where there is any, and `picture`,
the image's name in all data sets. A `.json` file of the same name records the sources, the draw and the counts.

Which expressions of an object are asked, and how: each alone, one of them, or all of them in one prompt. lmms-eval has
both kinds of tasks for RefCOCO: `refcoco_bbox_rec` asks each expression by itself; `refcoco_grounding` (pull request
1373 of EvolvingLMMs-Lab/lmms-eval) puts all of an object into one prompt, each in quotes, with commas between. Numbers
of one kind do not compare with those of the other.
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
from localization_heads.datasets.base import BadRecord, Entry, Index, Record, Source, check_box_inside
from localization_heads.datasets.leakage import prepared_images, prepared_sets
from localization_heads.datasets.source import OFFICIAL, Counts, count, open_source
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
        splits: what the source holds, by split.
        written: what the file holds.
        failures: what of the split could not be used.
        protocol: how the expressions are asked and scored, by name.
    """

    dataset: str
    splits: Mapping[str, Counts]
    split: str
    written: Counts
    failures: list[BadEntry]
    paths: list[Path]
    protocol: str = ""


def prepare(options: FinderOptions, *, all_but_train: bool = True) -> PreparedDataset:
    """Read a benchmark, choose its expressions and write them with their truth.

    Args:
        all_but_train: `num_samples` counts for the training split only, and other splits are taken whole.
    """
    options.require("dataset", "dataset_path")
    images = Path(options.images) if options.images else None
    check_protocol(options)
    source = open_source(str(options.dataset), Path(str(options.dataset_path)), images)
    index = source.index()
    split = _split(options, index)
    number = None if all_but_train and split != "train" else options.num_samples
    chosen, left_out = _choose(options, index, split, number)
    target = Path(options.dataset_folder) / f"{_name(options, source, split, number)}.jsonl"
    protocol = source.protocol or options.protocol
    with RunLock(target.parent):
        if split == "train" and not options.allow_leakage:
            check_leakage(options, index, chosen, target.parent)
        splits = {name: count(entries) for name, entries in _by_split(index.entries).items()}
        _warn(options, source, split, splits[split])
        written, failures = _write(options, target, source, chosen, protocol)
        failures += index.bad_of(split)
        record = _describe(options, source, split, number, written, left_out, len(failures))
        write_json(target.with_suffix(".json"), {**record, "protocol": protocol})
    paths = [target, target.with_suffix(".json")]
    return PreparedDataset(str(options.dataset), splits, split, written, failures, paths, protocol)


def check_protocol(options: FinderOptions) -> None:
    """UsageError where `protocol=` and `sentence=` contradict each other or the data set."""
    if options.protocol == "lmms" and options.dataset not in REFCOCO:
        raise UsageError(
            f"protocol=lmms: it joins expressions of {', '.join(REFCOCO)}, not of {options.dataset}"
        )
    if options.protocol == "lmms" and options.sentence != "all":
        raise UsageError(
            f"sentence={options.sentence}: protocol=lmms joins all of an object; leave sentence= out"
        )


def sample_entries(entries: Sequence[Entry], number: int, seed: int) -> list[Entry]:
    """Draw `number` entries by the hash of seed and id; they keep their order.

    So the draw depends only on the ids: it is the same from the pickles and from parquet, and a draw of 100 is part
    of the draw of 1,000.
    """

    def place(entry: Entry) -> bytes:
        return hashlib.sha256(f"{seed}:{entry.id}".encode()).digest()

    drawn = set(sorted(entries, key=place)[:number])
    return [entry for entry in entries if entry in drawn]


def check_leakage(options: FinderOptions, index: Index, chosen: Sequence[Entry], folder: Path) -> None:
    """UsageError if the sample shows images of evaluation splits: of its source, or prepared beside it."""
    shown = {entry.picture for entry in chosen}
    held = {
        f"{options.dataset} {split}": {entry.picture for entry in entries}
        for split, entries in _by_split(index.entries).items()
        if split != "train"
    }
    for data_file, record in prepared_sets(folder):
        if record["split"] != "train":
            held[data_file.name] = prepared_images(data_file)
    shared = {name: len(shown & images) for name, images in held.items() if shown & images}
    if shared:
        listed = ", ".join(f"{number} of {name}" for name, number in shared.items())
        raise UsageError(
            f"the {len(shown)} images drawn from {options.dataset} train are also evaluated: {listed}. "
            "Leave them out with exclude=[prepared evaluation files], or write allow_leakage=true"
        )


def _split(options: FinderOptions, index: Index) -> str:
    """The split to write. UsageError if there is none of that name; NothingDoneError if nothing of it is of use."""
    if not index.entries and not index.bad:
        raise UsageError(f"dataset_path={options.dataset_path}: it holds no reference")
    splits = _by_split(index.entries)
    names = {*splits, *(bad.split for bad in index.bad if bad.split)}
    split = options.split or (names.copy().pop() if len(names) == 1 else "val")
    if split in splits:
        return split
    if bad := index.bad_of(split) if index.entries == [] or split in names else []:
        raise NothingDoneError(f"no row of {split} could be read", bad[:10])
    found = ", ".join(f"{name} ({len(entries)} expressions)" for name, entries in splits.items())
    raise UsageError(f"split={split}: dataset_path has {found or 'none that can be read'}")


def _choose(options: FinderOptions, index: Index, split: str, number: int | None) -> tuple[list[Entry], int]:
    """The expressions to write, and how many `exclude` has left out."""
    every = _by_split(index.entries)[split]
    if twice := [id for id, times in Counter(entry.id for entry in every).items() if times > 1]:
        raise UsageError(f"dataset_path holds {options.dataset} {split} twice: {twice[0]} is in it again")
    entries = asked(every, options.protocol, options.sentence)
    excluded = (prepared_images(Path(file), "exclude") for file in options.exclude)
    images: set[str] = set().union(*excluded)
    kept = [entry for entry in entries if entry.picture not in images]
    if not kept:
        raise UsageError(f"exclude: it leaves no expression of {options.dataset} {split}")
    chosen = (
        kept if number is None or number >= len(kept) else sample_entries(kept, number, options.random_seed)
    )
    return chosen, len(entries) - len(kept)


def _by_split(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry)
    return splits


def _name(options: FinderOptions, source: Source, split: str, number: int | None) -> str:
    """`refcoco-val`, `refcocog-google-val`, `refcoco-train-1000-seed42`, `refcoco-val-joined`."""
    parts = [options.dataset, source.variant, split]
    parts.append(part_of_name(options.protocol, options.sentence))
    if number is not None:
        parts += [str(number), f"seed{options.random_seed}"]
    return "-".join(part for part in parts if part)


def _warn(options: FinderOptions, source: Source, split: str, found: Counts) -> None:
    for note in source.notes:
        log.warning("%s", note)
    official = OFFICIAL.get((str(options.dataset), split))
    if official and found != official:
        log.warning(
            "%s %s has %d references and %d expressions here, %d and %d in papers: numbers do not compare",
            options.dataset,
            split,
            *found,
            *official,
        )


def _write(
    options: FinderOptions, target: Path, source: Source, chosen: Sequence[Entry], protocol: str
) -> tuple[Counts, list[BadEntry]]:
    """Write the lines as the records come; what cannot be used is put aside."""
    by_row = {row: list(entries) for row, entries in groupby(chosen, key=lambda entry: entry.row)}
    failures: list[BadEntry] = []
    written: list[Entry] = []
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
    return count(written), failures


def _write_lines(
    file: BinaryIO,
    folder: Path,
    record: Record | BadRecord,
    entries: Sequence[Entry],
    boxes: list[TrueBox],
    protocol: str,
) -> None:
    if isinstance(record, BadRecord):
        raise BadLineError(record.reason)
    fields = dict(_truth(folder, record, entries[0], boxes))
    named = {"picture": entries[0].picture, "protocol": protocol, **record.more}
    for entry in entries:
        line = {"id": entry.id, "prompt": entry.text, **fields, **named}
        file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _truth(folder: Path, record: Record, entry: Entry, boxes: list[TrueBox]) -> Iterator[tuple[str, Any]]:
    """Image, box and masks, checked against each other; the box is also added to `boxes`."""
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


def _save_image(folder: Path, content: bytes, entry: Entry) -> tuple[str, tuple[int, int]]:
    """Write an image under a name made of its content, once; returns the name, from the data file's folder."""
    format, image = decode_image(f"the image of row {entry.row + 1}", content)
    name = hashlib.sha256(content).hexdigest()[:32] + EXTENSIONS.get(format, f".{format.lower()}")
    if not (folder / "images" / name).is_file():
        write_bytes(folder / "images" / name, content)
    return f"images/{name}", image.size


def _describe(
    options: FinderOptions,
    source: Source,
    split: str,
    number: int | None,
    written: Counts,
    left_out: int,
    failed: int,
) -> dict[str, Any]:
    """All that decides the content of the file, for the one who finds it."""
    return {
        "version": 1,
        "dataset": options.dataset,
        "split": split,
        "sentence": options.sentence,
        "source": source.kind,
        "variant": source.variant,
        "files": [_digest(file) for file in source.files],
        "num_samples": number,
        "random_seed": options.random_seed if number is not None else None,
        "references": written.references,
        "expressions": written.expressions,
        "excluded": left_out,
        "failed": failed,
        "allow_leakage": options.allow_leakage,
        "notes": source.notes,
    }


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def chosen_sentences(entries: Sequence[Entry], sentence: Sentence) -> list[Entry]:
    """All entries, or of each row the first or the longest one. Of equally long ones the first.

    Args:
        entries: in the order of the source, those of a row side by side.

    >>> rows = [Entry("a", "val", "p", "cat", 0), Entry("b", "val", "p", "black cat", 0)]
    >>> [entry.id for entry in chosen_sentences(rows, "longest")]
    ['b']
    """
    if sentence == "all":
        return list(entries)
    rows = [list(row) for _, row in groupby(entries, key=lambda entry: entry.row)]
    if sentence == "first":
        return [row[0] for row in rows]
    return [max(row, key=lambda entry: len(entry.text)) for row in rows]


def joined_sentences(entries: Sequence[Entry]) -> list[Entry]:
    """One entry for each row, which asks all its expressions at once.

    >>> rows = [Entry("ref1_sent1", "val", "p", "cat", 0), Entry("ref1_sent2", "val", "p", "black cat", 0)]
    >>> joined_sentences(rows)[0]
    Entry(id='ref1_joined', split='val', picture='p', text='"cat", "black cat"', row=0)
    """
    joined = []
    for _, row in groupby(entries, key=lambda entry: entry.row):
        first, *others = row
        text = ", ".join(f'"{entry.text}"' for entry in (first, *others))
        joined.append(first._replace(id=f"{first.id.rpartition('_')[0]}_joined", text=text))
    return joined


def asked(entries: Sequence[Entry], protocol: Protocol, sentence: Sentence) -> list[Entry]:
    """The entries as the options have them asked."""
    chosen = chosen_sentences(entries, sentence)
    return joined_sentences(chosen) if protocol == "lmms" else chosen


def part_of_name(protocol: Protocol, sentence: Sentence) -> str:
    """What the name of the prepared file says of it: nothing where each expression is asked by itself."""
    return "joined" if protocol == "lmms" else "" if sentence == "all" else sentence
