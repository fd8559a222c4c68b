"""`stage=prepare`: a benchmark in the form that users have on their disk, written as JSON lines.

Each line is an expression: `id`, `prompt`, `image_path`, `bbox`, `mask`, `ignore` where there is any, and `picture`,
the image's name in all data sets. A `.json` file of the same name records the sources, the draw and the counts.
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

from localization_heads.data.box_scale import TrueBox, check_scale
from localization_heads.data.images import decode_image, image_size
from localization_heads.data.masks import encode_source
from localization_heads.datasets.leakage import prepared_images, prepared_sets
from localization_heads.datasets.reference import BadRecord, Entry, Index, Record, Source, check_box_inside
from localization_heads.datasets.source import OFFICIAL, Counts, count, open_source
from localization_heads.errors import BadEntry, BadLineError, NothingDoneError, UsageError, WorkError
from localization_heads.stages.run import Run
from localization_heads.store.files import RunLock, atomic_write, write_bytes, write_json

log = logging.getLogger(__name__)

EXTENSIONS = {"JPEG": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Args:
        splits: what the source holds, by split.
        written: what the file holds.
    """

    dataset: str
    splits: Mapping[str, Counts]
    split: str
    written: Counts
    failures: list[BadEntry]
    paths: list[Path]


def prepare(run: Run) -> Prepared:
    """Read a benchmark, choose its expressions and write them with their truth."""
    run.options.require("dataset", "dataset_path")
    images = Path(run.options.images) if run.options.images else None
    source = open_source(str(run.options.dataset), Path(str(run.options.dataset_path)), images)
    index = source.index()
    chosen, left_out = _choose(run, index)
    target = Path(run.options.dataset_folder) / f"{_name(run, source)}.jsonl"
    with RunLock(target.parent):
        if run.options.split == "train" and not run.options.allow_leakage:
            check_leakage(run, index, chosen, target.parent)
        splits = {split: count(entries) for split, entries in _by_split(index.entries).items()}
        _warn(run, source, splits[run.options.split])
        written, failures = _write(run, target, source, chosen)
        failures += index.bad
        record = _describe(run, source, written, left_out, len(failures))
        write_json(target.with_suffix(".json"), record)
    paths = [target, target.with_suffix(".json")]
    return Prepared(str(run.options.dataset), splits, run.options.split, written, failures, paths)


def sample_entries(entries: Sequence[Entry], number: int, seed: int) -> list[Entry]:
    """Draw `number` entries by the hash of seed and id; they keep their order.

    So the draw depends only on the ids: it is the same from the pickles and from parquet, and a draw of 100 is part
    of the draw of 1,000.
    """

    def place(entry: Entry) -> bytes:
        return hashlib.sha256(f"{seed}:{entry.id}".encode()).digest()

    drawn = set(sorted(entries, key=place)[:number])
    return [entry for entry in entries if entry in drawn]


def sample_size(run: Run) -> int | None:
    """`num_samples` for the training split; all of the other splits, unless the user gave a number."""
    given = any(override.startswith("num_samples=") for override in run.overrides or ())
    return run.options.num_samples if given or run.options.split == "train" else None


def check_leakage(run: Run, index: Index, chosen: Sequence[Entry], folder: Path) -> None:
    """UsageError if the sample shows images of evaluation splits: of its source, or prepared beside it."""
    shown = {entry.picture for entry in chosen}
    held = {
        f"{run.options.dataset} {split}": {entry.picture for entry in entries}
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
            f"the {len(shown)} images drawn from {run.options.dataset} train are also evaluated: {listed}. "
            "Leave them out with exclude=[prepared evaluation files], or write allow_leakage=true"
        )


def _choose(run: Run, index: Index) -> tuple[list[Entry], int]:
    """The expressions to write, and how many `exclude` has left out."""
    splits = _by_split(index.entries)
    if not index.entries and not index.bad:
        raise UsageError(f"dataset_path={run.options.dataset_path}: it holds no reference")
    if not index.entries:
        raise NothingDoneError("no row could be read", index.bad[:10])
    if run.options.split not in splits:
        found = ", ".join(f"{name} ({len(entries)} expressions)" for name, entries in splits.items())
        raise UsageError(f"split={run.options.split}: dataset_path has {found}")
    entries = splits[run.options.split]
    if twice := [id for id, times in Counter(entry.id for entry in entries).items() if times > 1]:
        raise UsageError(
            f"dataset_path holds {run.options.dataset} {run.options.split} twice: {twice[0]} is in it again"
        )
    excluded = (prepared_images(Path(file), "exclude") for file in run.options.exclude)
    images: set[str] = set().union(*excluded)
    kept = [entry for entry in entries if entry.picture not in images]
    if not kept:
        raise UsageError(f"exclude: it leaves no expression of {run.options.dataset} {run.options.split}")
    number = sample_size(run)
    chosen = (
        kept
        if number is None or number >= len(kept)
        else sample_entries(kept, number, run.options.random_seed)
    )
    return chosen, len(entries) - len(kept)


def _by_split(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry)
    return splits


def _name(run: Run, source: Source) -> str:
    """`refcoco-val`, `refcocog-google-val`, `refcoco-train-1000-seed42`."""
    parts = [run.options.dataset, source.variant, run.options.split]
    if (number := sample_size(run)) is not None:
        parts += [str(number), f"seed{run.options.random_seed}"]
    return "-".join(part for part in parts if part)


def _warn(run: Run, source: Source, found: Counts) -> None:
    for note in source.notes:
        log.warning("%s", note)
    official = OFFICIAL.get((str(run.options.dataset), run.options.split))
    if official and found != official:
        log.warning(
            "%s %s has %d references and %d expressions here, %d and %d in papers: numbers do not compare",
            run.options.dataset,
            run.options.split,
            *found,
            *official,
        )


def _write(run: Run, target: Path, source: Source, chosen: Sequence[Entry]) -> tuple[Counts, list[BadEntry]]:
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
                _write_lines(file, target.parent, record, entries, boxes)
                written += entries
            except (UsageError, WorkError, BadLineError) as error:
                reason = " ".join(str(error).split())
                failures += [BadEntry(entry.row + 1, entry.id, reason) for entry in entries]
        check_scale(boxes, f"dataset_path={run.options.dataset_path}")
        if not written:
            raise NothingDoneError(f"none of {len(chosen)} expressions could be prepared", failures[:10])
    return count(written), failures


def _write_lines(
    file: BinaryIO,
    folder: Path,
    record: Record | BadRecord,
    entries: Sequence[Entry],
    boxes: list[TrueBox],
) -> None:
    if isinstance(record, BadRecord):
        raise BadLineError(record.reason)
    fields = dict(_truth(folder, record, entries[0], boxes))
    for entry in entries:
        line = {"id": entry.id, "prompt": entry.text, **fields, "picture": entry.picture, **record.more}
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
    if record.mask is not None:
        yield "mask", encode_source(record.mask, size)
    if record.ignore is not None:
        yield "ignore", encode_source(record.ignore, size)


def _save_image(folder: Path, content: bytes, entry: Entry) -> tuple[str, tuple[int, int]]:
    """Write an image under a name made of its content, once; returns the name, from the data file's folder."""
    format, image = decode_image(f"the image of row {entry.row + 1}", content)
    name = hashlib.sha256(content).hexdigest()[:32] + EXTENSIONS.get(format, f".{format.lower()}")
    if not (folder / "images" / name).is_file():
        write_bytes(folder / "images" / name, content)
    return f"images/{name}", image.size


def _describe(run: Run, source: Source, written: Counts, left_out: int, failed: int) -> dict[str, Any]:
    """All that decides the content of the file, for the one who finds it."""
    number = sample_size(run)
    return {
        "version": 1,
        "dataset": run.options.dataset,
        "split": run.options.split,
        "source": source.kind,
        "variant": source.variant,
        "files": [_digest(file) for file in source.files],
        "num_samples": number,
        "random_seed": run.options.random_seed if number is not None else None,
        "references": written.references,
        "expressions": written.expressions,
        "excluded": left_out,
        "failed": failed,
        "allow_leakage": run.options.allow_leakage,
        "notes": source.notes,
    }


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}
