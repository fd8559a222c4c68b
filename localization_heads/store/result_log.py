"""Finished results of a long run, a JSON line each, so that a killed run does none of them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.errors import WorkError
from localization_heads.store.atomic import write_bytes


class ResultLog:
    """Append-only results by key, for one set of settings; a hidden file that `finish` removes.

    Args:
        settings: whatever the results depend on, as JSON values; other settings have another file.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f".{name}-{digest}.jsonl"
        self._results = self._read()

    def get(self, key: bytes) -> dict[str, Any] | None:
        return self._results.get(key.hex())

    def append(self, results: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
        """Add finished results; they are on the disk on return."""
        lines = [json.dumps({"key": key.hex(), "result": result}, allow_nan=False) for key, result in results]
        try:
            with self.path.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._results.update((key.hex(), result) for key, result in results)

    def finish(self) -> None:
        """The run is complete and its files are written: the log has served."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        """The sound lines. One that a kill cut off or a disk damaged is dropped, and its work done again."""
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        sound = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n") and _parse(line)]
        if (whole := b"".join(sound)) != content:
            write_bytes(self.path, whole)
        entries = [entry for line in sound if (entry := _parse(line))]
        return {entry["key"]: entry["result"] for entry in entries}


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line of the log, None if it is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    complete = (
        isinstance(entry, dict)
        and isinstance(entry.get("key"), str)
        and isinstance(entry.get("result"), dict)
    )
    return entry if complete else None
