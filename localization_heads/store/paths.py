"""Names of the files of one entry. An id is a plain file name, so it cannot escape from its folder."""

from __future__ import annotations

import os
import unicodedata
from hashlib import sha256
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError, shown

ATTENTION_FORMATS = {
    "pkl": ".pkl",
    "safetensors": ".safetensors",
    "published": ".pkl",
    "published_august": ".pkl",
}
_EXTENSIONS = (".pkl.gz", ".pkl", ".safetensors")

SIDE_SUFFIXES = ("_analysis", "_metadata", "_meta")
"""`<id>.pkl` has companions `<id>_analysis.pkl` and, from the published code, `<id>_metadata.pkl` and `<id>_meta.pkl`.
So another id must not collide with an id plus one of these."""

MAX_ID_BYTES = 255 - len("_visualization_L9999H9999.png")
"""File systems allow 255 bytes per name, and this is the longest suffix that an id gets."""


def check_id(id: str) -> str:
    """Return `id` if it is safe as a file name, else raise ValueError with the reason.

    >>> check_id("example_1")
    'example_1'
    """
    if not id:
        raise ValueError("the id is empty")
    if id.startswith("."):
        raise ValueError(f"the id {id!r} starts with a dot: an id is a plain file name")
    if "/" in id or "\\" in id:
        raise ValueError(f"the id {shown(id)} holds a path separator: an id is a file name, never a path")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in id):
        raise ValueError(f"the id {shown(id)} holds a control character")
    if id != id.strip():
        raise ValueError(f"the id {shown(id)} starts or ends with a space")
    if len(id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"the id {shown(id)} is longer than {MAX_ID_BYTES} bytes")
    return id


def expand_home(path: Any) -> Any:
    """Expand a leading `~` or `~user` in text; return anything else unchanged."""
    return os.path.expanduser(path) if isinstance(path, str) else path  # noqa: PTH111  (knows ~nobody)


def reserved_stems(id: str) -> list[str]:
    """The stems of the `.pkl` files that an entry owns, case-folded as on a case-insensitive file system."""
    return [unicodedata.normalize("NFC", id + suffix).casefold() for suffix in ("", *SIDE_SUFFIXES)]


def entry_path(folder: str | Path, id: str, suffix: str) -> Path:
    """`folder / (id + suffix)`, guaranteed to be directly in `folder`. UsageError for an invalid id."""
    try:
        name = check_id(id) + suffix
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Path(folder) / name


def attention_path(folder: str | Path, id: str, format: str = "pkl") -> Path:
    """The path of an entry's attention file; `format` is one of `ATTENTION_FORMATS`."""
    if format not in ATTENTION_FORMATS:
        raise UsageError(f"attention_format={format} is unknown: choose one of {', '.join(ATTENTION_FORMATS)}")
    return entry_path(folder, id, ATTENTION_FORMATS[format])


def side_path(attention_file: str | Path, suffix: str) -> Path:
    """`<stem><suffix>` in the folder of an attention file.

    >>> side_path("attention/cat.pkl.gz", "_analysis.pkl").as_posix()
    'attention/cat_analysis.pkl'
    """
    path = Path(attention_file)
    return path.with_name(attention_stem(path) + suffix)


def attention_stem(attention_file: str | Path) -> str:
    """The name of an attention file without its extension, which is the entry's id."""
    name = stem = Path(attention_file).name
    for ending in _EXTENSIONS:
        stem = stem.removesuffix(ending)
    return stem or name


def analysis_path(attention_file: str | Path) -> Path:
    """The path of the analysis of an attention file."""
    return side_path(attention_file, "_analysis.pkl")


def model_folder(name: str) -> str:
    """A safe folder name for a Hugging Face id or a local folder.

    For a local folder it ends in eight digits of the path's hash, so that folders of the same name differ.

    >>> model_folder("org/some-model"), model_folder("/data/models/mine/")
    ('org--some-model', 'mine-087ac83c')
    """
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    path = local_path(name).resolve()
    text = f"{path.name}-{sha256(str(path).encode()).hexdigest()[:8]}" if local else name.replace("/", "--")
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip(".")
    return safe or "model"


PACKAGE = Path(__file__).parents[1]


def local_path(name: str | Path) -> Path:
    """A path as the user wrote it, with `~` expanded.

    `examples/...` falls back to the copy inside the package where it does not exist, as outside the repository.
    """
    path = Path(expand_home(str(name)))
    if path.parts[:1] == ("examples",) and not path.exists() and (PACKAGE / path).exists():
        return PACKAGE / path
    return path
