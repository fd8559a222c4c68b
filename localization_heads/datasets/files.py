"""Files that a benchmark names: its images in folders of any of the usual layouts, and lists of JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from localization_heads.errors import BadLineError, UsageError, shown
from localization_heads.store.files import read_json

MAX_JSON_BYTES = 256 << 20


def named_image(folders: Sequence[Path], name: object) -> Path:
    """The image of that name in the first folder that has it; in the first folder if none has.

    Raises BadLineError for a name that leads out of the folders.
    """
    if not isinstance(name, str) or not name or len(name) > 400 or not name.isprintable():
        raise BadLineError("the image's file name is missing, or no name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadLineError(f"the image {shown(name)} lies outside the data set")
    places = [folder / part for folder in folders for part in dict.fromkeys((str(path), path.name))]
    return next((place for place in places if place.is_file()), places[0])


def image_folders(images: Path | None, beside: Path, *names: str) -> list[Path]:
    """`images=` and the usual folders in it, or else those beside the annotations. UsageError where there is none."""
    root = images or beside
    if images is not None and not images.is_dir():
        raise UsageError(f"images={images}: no such folder")
    found = [folder for name in names if (folder := root / name).is_dir()]
    if images is None and not found:
        usual = " or ".join(str(beside / name) for name in names)
        raise UsageError(
            f"images= is missing: name the folder of the images (unpacked), or have it as {usual}"
        )
    return [*([images] if images else []), *found]


def read_list(path: Path) -> list[Any]:
    """A JSON list. UsageError for anything else."""
    data = read_json(path, MAX_JSON_BYTES)
    if not isinstance(data, list):
        raise UsageError(f"{path}: it must hold a list of entries")
    return data


def short_fields(entry: dict[str, Any], *names: str) -> dict[str, str | int | float | bool]:
    """Those of some fields that hold a number, or a text of at most 200 characters."""
    found = {name: entry.get(name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (isinstance(value, str) and len(value) <= 200)
        or (isinstance(value, int | float) and abs(value) < 10**18)  # false for NaN
    }
