"""Leakage: which images two sets of samples share. Heads found on an image must not be scored on it.

Two samples show the same image if their lines give it the same name (`picture`, as `stage=prepare` writes it), if
their files have the same COCO number in their names, or else if the files hold the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from localization_heads.data.address import is_address
from localization_heads.data.lines import read_objects
from localization_heads.data.samples import Sample
from localization_heads.datasets.base import coco_image_of
from localization_heads.errors import UsageError
from localization_heads.hub import load_heads
from localization_heads.store.files import read_json

KEY_DIGITS = 16


def image_keys(samples: Iterable[Sample]) -> list[str | None]:
    """The identity of each sample's image; None for one in memory or one that cannot be read."""
    known: dict[str, str | None] = {}
    keys: list[str | None] = []
    for sample in samples:
        if sample.picture:
            keys.append(sample.picture)
            continue
        name = sample.image_key
        if name not in known:
            known[name] = _file_key(name)
        keys.append(known[name])
    return keys


def _file_key(name: str) -> str | None:
    """By COCO's name, or else by content; an address by its text."""
    if not name or "\0" in name:  # in memory, or several images
        return None
    if known := coco_image_of(Path(name).name):
        return known
    if is_address(name):
        return "address:" + hashlib.sha256(name.encode()).hexdigest()[:KEY_DIGITS]
    try:
        with Path(name).open("rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()[:KEY_DIGITS]
    except (OSError, ValueError):
        return None


def prepared_images(data_file: Path, option: str = "data_file") -> set[str]:
    """The images of a file that `stage=prepare` wrote. UsageError for any other file."""
    images: set[str] = set()
    for line, entry in read_objects(data_file, option):
        name = entry.get("picture") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UsageError(f"{data_file}: line {line} names no image: give files that stage=prepare wrote")
        images.add(name)
    return images


def prepared_sets(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that `stage=prepare` wrote into a folder, each with its record."""
    for side in sorted(folder.glob("*.json")):
        data_file = side.with_suffix(".jsonl")
        try:
            record = read_json(side, 1 << 20)
        except UsageError:
            continue
        if isinstance(record, dict) and isinstance(record.get("split"), str) and data_file.is_file():
            yield data_file, record


def check_unseen(samples: Sequence[Sample], source: Path | str | None, *, allowed: bool = False) -> None:
    """UsageError if samples show images that heads were found on, unless that is allowed.

    Args:
        source: the heads.json, here or on the hub. None for heads without one (published ones, a list): the images
            that they were found on are unknown.
        allowed: the user wrote `allow_leakage=true`.
    """
    if allowed or source is None:
        return
    seen = set(load_heads(source).pictures)
    shared = sum(key in seen for key in image_keys(samples)) if seen else 0
    if shared:
        raise UsageError(
            f"{shared} of the {len(samples)} entries show images that {source} was found on: find the heads on "
            "others (stage=prepare has exclude=), or write allow_leakage=true"
        )
