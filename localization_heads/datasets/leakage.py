"""Detect leakage: images shared by two sets of samples. Heads must not be scored on the images they were found on.

Two samples have the same image if it has the same `picture` name (written by `stage=prepare`), the same COCO id in
its file name, or else the same file content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from localization_heads.data.address import is_address
from localization_heads.data.lines import read_objects
from localization_heads.data.samples import Sample
from localization_heads.datasets.base import coco_picture_from_name
from localization_heads.errors import UsageError
from localization_heads.hub import load_heads
from localization_heads.store.files import read_json

KEY_DIGITS = 16


def image_keys(samples: Iterable[Sample]) -> list[str | None]:
    """A key that identifies each sample's image; None for an image in memory or an unreadable one."""
    cache: dict[str, str | None] = {}
    keys: list[str | None] = []
    for sample in samples:
        if sample.picture:
            keys.append(sample.picture)
            continue
        name = sample.image_key
        if name not in cache:
            cache[name] = _file_key(name)
        keys.append(cache[name])
    return keys


def _file_key(name: str) -> str | None:
    """The key of a file, from its COCO id or else its content; of an address, from its text."""
    if not name or "\0" in name:  # in memory, or several images
        return None
    if picture := coco_picture_from_name(Path(name).name):
        return picture
    if is_address(name):
        return "address:" + hashlib.sha256(name.encode()).hexdigest()[:KEY_DIGITS]
    try:
        with Path(name).open("rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()[:KEY_DIGITS]
    except (OSError, ValueError):
        return None


def read_pictures(data_file: Path, option: str = "data_file") -> set[str]:
    """The `picture` names in a file written by `stage=prepare`. UsageError for any other file."""
    pictures: set[str] = set()
    for line, entry in read_objects(data_file, option):
        name = entry.get("picture") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UsageError(f"{data_file}: line {line} names no image: give files that stage=prepare wrote")
        pictures.add(name)
    return pictures


def find_prepared_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the data files that `stage=prepare` wrote to a folder, each with its metadata."""
    for metadata_file in sorted(folder.glob("*.json")):
        data_file = metadata_file.with_suffix(".jsonl")
        try:
            record = read_json(metadata_file, 1 << 20)
        except UsageError:
            continue
        if isinstance(record, dict) and isinstance(record.get("split"), str) and data_file.is_file():
            yield data_file, record


def check_unseen(samples: Sequence[Sample], source: Path | str | None, *, allowed: bool = False) -> None:
    """UsageError if samples have images that the heads were found on.

    Args:
        source: the heads.json, local or on the hub. None for heads without one (published heads, a list), where the
            images are unknown.
        allowed: skip the check (`allow_leakage=true`).
    """
    if allowed or source is None:
        return
    seen = set(load_heads(source).pictures)
    num_shared = sum(key in seen for key in image_keys(samples)) if seen else 0
    if num_shared:
        raise UsageError(
            f"{num_shared} of the {len(samples)} entries show images that {source} was found on: find the heads on "
            "others (stage=prepare has exclude=), or write allow_leakage=true"
        )
