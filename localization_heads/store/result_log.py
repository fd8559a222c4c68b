"""Finished results of a long run, a line each, so that a killed run does none of them again.

A line is `CRC32 key JSON`, the first two in hexadecimal. Where the lines lie is known from opening the log; a result is
read when it is asked for, so a hundred thousand of them take no memory here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.errors import WorkError
from localization_heads.store import journal

log = logging.getLogger(__name__)

VERSION = 2
LONGEST_LINE = journal.LARGEST_JSON
_CRC_DIGITS, _KEY_DIGITS = 8, 32


class ResultLog:
    """Append-only results by key (16 bytes), for one set of settings; a hidden file that `finish` removes.

    Args:
        settings: whatever the results depend on, as JSON values; other settings have another file.
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
        """The result of that key; None if there is none, or none that can be read."""
        if key not in self._places:
            return None
        start, length = self._places[key]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                line = file.read(length)
        except OSError as error:
            raise WorkError(f"cannot read {self.path}: {error.strerror or error}") from error
        result = journal.parse_json(line[_CRC_DIGITS + _KEY_DIGITS + 2 :])
        return result if self._key(line) == key and isinstance(result, dict) else None

    def append(self, results: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
        """Add finished results; they are on the disk on return. Of one key the latest counts."""
        lines = [self._line(key, result) for key, result in results]
        journal.append(self.path, b"".join(lines), self._end)
        for (key, _), line in zip(results, lines, strict=True):
            self._places[key] = self._end, len(line)
            self._end += len(line)

    def finish(self) -> None:
        """The run is complete and its files are written: the log has served."""
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
            while line := file.readline(LONGEST_LINE):
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
            journal.truncate(self.path, self._end)
