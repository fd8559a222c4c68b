"""Appending to a file so that a kill, a full disk or a flipped bit costs one record and nothing else.

The statistics store (records of one size) and the result log (one line per result) share this: every record is on the
disk before `append` returns, and has a checksum; a record that does not match it is skipped.

One SQLite file for both was measured instead (100,000 samples of 1,024 heads, chunks of 16, each on the disk before
the next; two cores, SSD, seconds) and is slower, both in its default journal mode and with a write-ahead log, which
is not meant for network drives. It has no checksums of its own, so the measured table had a column for them.

                                        here | SQLite, default / write-ahead log
    append statistics                    4.9 | 10.4 / 6.8
    append results                       6.6 | 13.4 / 13.8
    read sums and entropies, shuffled    0.5 | 2.4 / 2.1
    find the sound statistics            0.6 | 0.6 / 0.8
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError, WorkError
from localization_heads.store.files import parse_json, read_json

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 << 20  # bytes


def append(path: Path, content: bytes, end: int) -> None:
    """Write at the end of a file; the data are on the disk on return.

    Args:
        end: size of the file before, to which it is cut back if the write fails.

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


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file; None where there is none that `read_json` takes."""
    try:
        return read_json(path, MAX_JSON_BYTES)
    except UsageError:
        return None


VERSION = 2
_CRC_DIGITS, _KEY_DIGITS = 8, 32


class ResultLog:
    """Append-only results by key (16 bytes), for one set of settings; a hidden file that `finish` removes.

    Args:
        settings: everything that the results depend on, as JSON values; other settings have another file.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).digest()
        self._seed = zlib.crc32(digest)  # a line of other settings does not pass as one of these
        self.path = folder / f".{name}-{digest.hex()[:16]}.jsonl"
        self._places: dict[bytes, tuple[int, int]] = {}  # where a line begins, and its length
        self._end = 0
        try:
            self._recover()
        except OSError as error:
            raise WorkError(f"cannot read {self.path}: {error.strerror or error}") from error

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The result of that key; None if it is missing or damaged."""
        if key not in self._places:
            return None
        start, length = self._places[key]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                line = file.read(length)
        except OSError as error:
            raise WorkError(f"cannot read {self.path}: {error.strerror or error}") from error
        if self._key(line) != key:
            return None
        try:
            result = parse_json(line[_CRC_DIGITS + _KEY_DIGITS + 2 :])
        except ValueError:
            return None
        return result if isinstance(result, dict) else None

    def append(self, results: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
        """Add finished results; they are on the disk on return. The latest result of a key counts."""
        lines = [self._line(key, result) for key, result in results]
        append(self.path, b"".join(lines), self._end)
        for (key, _), line in zip(results, lines, strict=True):
            self._places[key] = self._end, len(line)
            self._end += len(line)

    def finish(self) -> None:
        """Remove the log: the run is complete and its files are written."""
        self.path.unlink(missing_ok=True)

    def _line(self, key: bytes, result: dict[str, Any]) -> bytes:
        content = f"{key.hex()} {json.dumps(result, allow_nan=False)}".encode()
        return f"{zlib.crc32(content, self._seed):08x} ".encode() + content + b"\n"

    def _key(self, line: bytes) -> bytes | None:
        """The key of a whole and undamaged line, None of any other."""
        crc, content = line[:_CRC_DIGITS], line[_CRC_DIGITS + 1 : -1]
        if not line.endswith(b"\n") or crc != f"{zlib.crc32(content, self._seed):08x}".encode():
            return None
        try:
            return bytes.fromhex(content[:_KEY_DIGITS].decode())
        except ValueError:
            return None

    def _recover(self) -> None:
        """Find the sound lines and cut off a torn tail. What is damaged is passed over, and its work done again."""
        if not self.path.is_file():
            return
        damaged = 0
        with self.path.open("rb") as file:
            while line := file.readline(MAX_JSON_BYTES):
                if (key := self._key(line)) is not None:
                    self._places[key] = self._end, len(line)
                elif line.endswith(b"\n"):
                    damaged += 1
                else:
                    break
                self._end += len(line)
        if damaged:
            log.warning("%s: %d damaged results are left out and made again", self.path, damaged)
        if self.path.stat().st_size != self._end:
            log.info("%s: the last result was cut off by a kill and is made again", self.path)
            truncate(self.path, self._end)
