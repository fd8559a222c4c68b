"""Per-sample head statistics that `find`, `batch` and `evaluate` store: attention sum, entropies, bottom-row flag.

They are fixed-size records in an append-only file, written in chunks and read one by one. So memory does not grow with
the number of samples, and a run that is killed during a write loses at most the last chunk. A record is

    key (16 bytes) | attention_sum, area_entropy, mass_entropy f4 [L, H] | bottom_row u1 [L, H] |
    with sensitivity: sensitivity, consistency f4 [L, H] | pad | CRC32 u4

and a JSON file of the same name beside it, the header, records the settings. Both names contain a hash of these, so
statistics of another model, prompt or threshold never mix. The records are all that the ranking's options need, so
`stage=rank` runs without the model: `find_stores` lists the stores of a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import WorkError
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.options.groups import Weight
from localization_heads.store import journal
from localization_heads.store.files import write_json

log = logging.getLogger(__name__)

VERSION = 3
KEY_BYTES = 16
COLUMNS = {"attention_sum": "<f4", "area_entropy": "<f4", "mass_entropy": "<f4", "bottom_row_focus": "u1"}
"""The fields of a record, one value per head, in file order."""
SENSITIVITY_COLUMNS = {"sensitivity": "<f4", "consistency": "<f4"}
"""Additional fields of a store with sensitivity; NaN where it was not measured."""
_SCAN_BYTES = 16 << 20
_MAX_HEADS = 1 << 20


def sample_key(expression: str, image: str | Path, id: str = "") -> bytes:
    """A 16-byte hash of a sample's expression, image and id.

    An image file is identified by its resolved path, size and modification time, so an edited image is a new sample; an
    http(s) address by its text.
    """
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        identity: list[Any] = [image]
    else:
        path = Path(image)
        try:
            status = path.stat()
            identity = [os.fspath(path.resolve()), status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            identity = [os.fspath(path)]
    return _digest([expression, identity, id])[:KEY_BYTES]


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).digest()


@dataclass(frozen=True)
class StatisticsRows:
    """The statistics of some samples, in the requested order, read from the file when indexed."""

    attention_sum: RowView
    area_entropy: RowView
    mass_entropy: RowView
    bottom_row_focus: RowView
    sensitivity: RowView | None = None
    consistency: RowView | None = None

    def __len__(self) -> int:
        return len(self.attention_sum)

    def sensitivity_statistics(self) -> Iterator[SensitivityStatistics] | None:
        """Yield the sensitivity of each sample, read one by one; None if the store has none."""
        if self.sensitivity is None or self.consistency is None:
            return None
        return (SensitivityStatistics(*row) for row in zip(self.sensitivity, self.consistency, strict=True))

    def spatial_entropy(self, weight: Weight) -> RowView:
        """The spatial entropy with components weighted by `area` or `mass`."""
        return self.area_entropy if weight == "area" else self.mass_entropy


class RowView:
    """A read-only array `[sample, layer, head]` on disk, with samples in a given order.

    `view[i]`, `view[i:j]` and `view[indices]` are loaded into memory; `np.asarray(view)` loads all of it. Rows are read
    rather than memory-mapped, since mapped pages would count towards this process's memory.
    """

    def __init__(self, path: Path, record: np.dtype[Any], column: str, order: NDArray[np.int64]) -> None:
        self._path = path
        self._order = order
        self._record_bytes = record.itemsize
        assert record.fields is not None
        field_dtype = record.fields[column][0]
        self._offset: int = record.fields[column][1]
        self._stored = field_dtype.base
        self.dtype = np.dtype(np.bool_) if self._stored == np.uint8 else self._stored
        self.shape: tuple[int, ...] = (len(order), *field_dtype.shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        first, *rest = index if isinstance(index, tuple) else (index,)
        positions = self._order[first]
        rows = self._read(np.atleast_1d(positions)).astype(self.dtype, copy=False)
        return np.asarray(rows[(0 if np.ndim(positions) == 0 else slice(None), *rest)])

    def _read(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        rows = np.empty((len(positions), *self.shape[1:]), self._stored)
        if not len(rows):
            return rows
        try:
            with self._path.open("rb", buffering=0) as file:
                for row, position in zip(rows, positions.tolist(), strict=True):
                    file.seek(position * self._record_bytes + self._offset)
                    if file.readinto(row.reshape(-1).view(np.uint8).data) != row.nbytes:
                        raise WorkError(f"cannot read {self._path}: it has been truncated in the meantime")
        except OSError as error:
            raise WorkError(f"cannot read {self._path}: {error.strerror or error}") from error
        return rows

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class StoreHeader:
    """The header of a store in a folder.

    Args:
        settings: everything that the statistics depend on.
        last_used: when a run last opened the store, in seconds since 1970.
        columns: the fields of its records.
    """

    folder: Path
    settings: Mapping[str, Any]
    num_layers: int
    num_heads: int
    last_used: float
    columns: Mapping[str, str] = field(default_factory=lambda: COLUMNS)

    @property
    def has_sensitivity(self) -> bool:
        """Whether the records include sensitivity."""
        return dict(self.columns) == {**COLUMNS, **SENSITIVITY_COLUMNS}

    def open(self) -> StatisticsStore:
        return StatisticsStore(
            self.folder,
            settings=self.settings,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            columns=self.columns,
        )


def find_stores(folder: str | Path) -> list[StoreHeader]:
    """The headers of the stores in a folder, most recently used first. Invalid ones and other versions are skipped."""
    headers = []
    for path in Path(folder).glob("statistics-*.json"):
        header = journal.read_json_or_none(path)
        if not isinstance(header, dict) or path.stem != _store_name(header):
            continue
        layers, heads = header.get("layers"), header.get("heads")
        settings, columns = header.get("settings"), header.get("columns", COLUMNS)
        if type(layers) is not int or type(heads) is not int or layers <= 0:
            continue
        is_valid = header.get("version") == VERSION and 0 < heads <= _MAX_HEADS // layers
        if is_valid and isinstance(settings, dict) and isinstance(columns, dict):
            last_used = path.stat().st_mtime
            headers.append(StoreHeader(Path(folder), settings, layers, heads, last_used, columns))
    return sorted(headers, key=lambda header: -header.last_used)


def _store_name(header: Mapping[str, Any]) -> str:
    """The stem of the files that belong to a header; "" if it is nested too deeply to be ours."""
    try:
        return f"statistics-{_digest(header).hex()[:16]}"
    except RecursionError:
        return ""


class StatisticsStore:
    """Append-only statistics of samples, for one set of settings, in `folder`.

    Opening it truncates a partial last record and skips damaged ones. There must be one writer at a time: the caller
    holds the folder's `RunLock`.

    Args:
        settings: everything that the statistics depend on (model, prompt, criteria), as JSON values.
        columns: the fields of a record, with their numpy dtypes; by default those of both criteria. Other columns are
            read with `views` rather than `rows`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settings: Mapping[str, Any],
        num_layers: int,
        num_heads: int,
        columns: Mapping[str, str] = COLUMNS,
    ) -> None:
        self.settings = dict(settings)
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.columns = dict(columns)
        self._dtype = _record_dtype(num_layers, num_heads, self.columns)
        header = {
            "version": VERSION,
            "layers": int(num_layers),
            "heads": int(num_heads),
            "record_bytes": self._dtype.itemsize,
            "settings": self.settings,
            **({} if self.columns == COLUMNS else {"columns": self.columns}),
        }
        digest = _digest(header)
        self._seed = zlib.crc32(digest)  # records written under other settings fail the check
        self.path = Path(folder) / f"statistics-{digest.hex()[:16]}.bin"
        self._positions: dict[bytes, int] = {}
        self._count = 0
        write_json(self.path.with_suffix(".json"), header)
        try:
            self._recover()
        except OSError as error:
            raise WorkError(f"cannot read {self.path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def keys(self) -> list[bytes]:
        """The keys of all intact records, in the order written."""
        return list(self._positions)

    def append(self, keys: Sequence[bytes], *arrays: NDArray[Any]) -> None:
        """Append a chunk in one write, synced to disk: keys `[sample]` and an array `[sample, layer, head]` per column.

        Keys that are already stored are skipped. Raises ValueError for wrong shapes or NaN, and WorkError if the disk
        fails; the store is then unchanged.
        """
        records = self._records(keys, *arrays)
        if not len(records):
            return
        journal.append(self.path, records.tobytes(), self._count * self._dtype.itemsize)
        for record in records:
            self._positions[record["key"].tobytes()] = self._count
            self._count += 1

    def rows(self, keys: Sequence[bytes]) -> StatisticsRows:
        """The statistics of `keys`, in that order; keys may repeat. KeyError if one is missing."""
        return StatisticsRows(**self.views(keys))

    def views(self, keys: Sequence[bytes]) -> dict[str, RowView]:
        """The columns by name, each with the rows of `keys` in that order. KeyError if a key is missing."""
        order = np.array([self._positions[key] for key in keys], dtype=np.int64)
        return {column: RowView(self.path, self._dtype, column, order) for column in self.columns}

    def record_failures(self, reasons: Mapping[bytes, str]) -> None:
        """Add to the recorded reasons why samples have no statistics; samples that do have statistics are skipped."""
        failures = {key: reason for key, reason in {**self.failures(), **reasons}.items() if key not in self}
        if failures or self._failures_path.exists():
            write_json(self._failures_path, {key.hex(): reason for key, reason in failures.items()})

    def failures(self) -> dict[bytes, str]:
        """The reasons passed to `record_failures`, by key."""
        failures = journal.read_json_or_none(self._failures_path)
        try:
            return {bytes.fromhex(key): str(reason) for key, reason in (failures or {}).items()}
        except (AttributeError, ValueError, RecursionError):
            return {}  # not written by this tool

    @property
    def _failures_path(self) -> Path:
        return self.path.with_name(self.path.stem.replace("statistics", "failed") + ".json")

    def _records(self, keys: Sequence[bytes], *arrays: NDArray[Any]) -> NDArray[Any]:
        shape = (len(keys), self.num_layers, self.num_heads)
        for name, array in zip(self.columns, arrays, strict=True):
            if np.shape(array) != shape:
                raise ValueError(f"{name} must be {shape}, not {np.shape(array)}")
            if name not in SENSITIVITY_COLUMNS and np.isnan(array).any():
                raise ValueError(f"{name} holds NaN")
        new_keys: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if len(key) != KEY_BYTES:
                raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
            if key not in self._positions:
                new_keys.setdefault(bytes(key), i)
        records = np.zeros(len(new_keys), self._dtype)
        chosen = list(new_keys.values())
        for name, array in zip(self.columns, arrays, strict=True):
            records[name] = np.asarray(array)[chosen]
        for row, key in enumerate(new_keys):
            records["key"][row] = np.frombuffer(key, np.uint8)
            records["crc"][row] = self._crc(records[row : row + 1])
        return records

    def _crc(self, record: NDArray[Any]) -> int:
        return zlib.crc32(record.tobytes()[:-4], self._seed)

    def _recover(self) -> None:
        """Index the intact records, skip damaged ones, and truncate a partial last record."""
        if not self.path.exists():
            return
        size = self._dtype.itemsize
        records_per_read = max(1, _SCAN_BYTES // size)
        damaged = 0
        with self.path.open("rb") as file:
            while len(content := file.read(records_per_read * size)) >= size:
                for start in range(0, len(content) - size + 1, size):
                    record = memoryview(content)[start : start + size]
                    if zlib.crc32(record[:-4], self._seed) == int.from_bytes(record[-4:], "little"):
                        self._positions.setdefault(bytes(record[:KEY_BYTES]), self._count)
                    else:
                        damaged += 1
                    self._count += 1
        if damaged:
            log.warning("%s: %d damaged records are skipped and computed again", self.path, damaged)
        if self.path.stat().st_size != self._count * size:
            log.info("%s: the last record is incomplete (killed run) and is computed again", self.path)
            journal.truncate(self.path, self._count * size)


def _record_dtype(num_layers: int, num_heads: int, columns: Mapping[str, str]) -> np.dtype[Any]:
    heads = num_layers * num_heads
    if heads < 1:
        raise ValueError("a model has at least one layer and one head")
    sizes = [heads * np.dtype(kind).itemsize for kind in columns.values()]
    starts = [KEY_BYTES, *(KEY_BYTES + np.cumsum(sizes)).tolist()]
    crc = -(-starts[-1] // 4) * 4  # rounded up, so that the floats of every record are aligned
    return np.dtype(
        {
            "names": ["key", *columns, "crc"],
            "formats": [
                ("u1", KEY_BYTES),
                *((kind, (num_layers, num_heads)) for kind in columns.values()),
                "<u4",
            ],
            "offsets": [0, *starts[:-1], crc],
            "itemsize": crc + 4,
        }
    )
