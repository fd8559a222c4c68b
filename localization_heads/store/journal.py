"""Appending to a file so that a kill, a full disk or a flipped bit costs one record and nothing else.

The statistics store (records of one size) and the result log (a line a result) share this: every record ends up on
the disk before `append` returns, bears a checksum, and is passed over if that does not fit.

One SQLite file for both was measured instead (100,000 samples of 1,024 heads, chunks of 16, each on the disk before
the next; two cores, SSD, seconds): it is slower, in its default journal mode / with a write-ahead log, which is not
for network drives. It has no checksums of its own, so a column for them was there too.

    append statistics 4.9 | 10.4 / 6.8       read sums and entropies, shuffled 0.5 | 2.4 / 2.1
    append results    6.6 | 13.4 / 13.8      find the sound statistics         0.6 | 0.6 / 0.8
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError, WorkError

LARGEST_JSON = 64 << 20  # bytes


def append(path: Path, content: bytes, end: int) -> None:
    """Write at the end of a file; on the disk on return.

    Args:
        end: size of the file before. It is cut back to that where the write fails.

    Raises:
        WorkError: the disk fails.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        truncate(path, end)
        if isinstance(error, OSError):
            raise WorkError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def truncate(path: Path, size: int) -> None:
    """Cut a file, if it is there, to its first `size` bytes."""
    try:
        os.truncate(path, size)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text; None for what is none, is nested too deeply or holds a number that is not finite."""
    try:
        return json.loads(content, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is not finite")
    return value


def read_json(path: Path) -> Any:
    """`parse_json` of a file; None where it cannot be read or is larger than `LARGEST_JSON`."""
    try:
        return parse_json(path.read_bytes()) if path.stat().st_size <= LARGEST_JSON else None
    except OSError:
        return None
