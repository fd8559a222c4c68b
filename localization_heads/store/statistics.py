"""What `find` and `batch` keep of every sample: sums, entropies and the bottom-row flag of all heads.

A file of records of one size, appended a chunk at a time and read through the page cache, so neither a
hundred thousand samples nor a kill in the middle of a write costs more than the last chunk. A record is

    key (16 bytes) | attention_sum f4 [L, H] | spatial_entropy f4 [L, H] | bottom_row u1 [L, H] | pad | CRC32 u4

and a JSON file of the same name beside it says what the numbers were made with. Both names carry a digest of
that, so statistics of another model, prompt or criterion never mix in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError, WorkError
from localization_heads.store.atomic import write_json

log = logging.getLogger(__name__)

VERSION = 1
KEY_BYTES = 16
_SCAN_BYTES = 16 << 20


def sample_key(expression: str, image: str | Path, id: str = "") -> bytes:
    """16 bytes that stand for a sample: its expression, its picture and its id.

    A file counts by its resolved path, size and time of change, so an edited picture is a new sample; an
    http(s) address counts as it is written.
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
    """Rows in the order that was asked for. The three views read from the file what is indexed, no more."""

    attention_sum: RowView
    spatial_entropy: RowView
    bottom_row_focus: RowView

    def __len__(self) -> int:
        return len(self.attention_sum)

    def chunks(self, size: int = 256) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield `(sums, entropies, bottom_row)` of up to `size` samples, as arrays in memory."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.attention_sum[part], self.spatial_entropy[part], self.bottom_row_focus[part]


class RowView:
    """An array `[sample, layer, head]` on disk, in an order of its own.

    `view[i]`, `view[i:j]` and `view[indices]` are arrays in memory; `np.asarray(view)` reads all of it.
    """

    def __init__(self, stored: NDArray[Any], order: NDArray[np.int64], dtype: type) -> None:
        self._stored = stored
        self._order = order
        self.dtype = np.dtype(dtype)
        self.shape: tuple[int, ...] = (len(order), *stored.shape[1:])
        self.ndim = stored.ndim

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        first, *rest = index if isinstance(index, tuple) else (index,)
        rows = np.asarray(self._stored[self._order[first]], dtype=self.dtype)
        if not rest:
            return rows
        keep = () if isinstance(first, int | np.integer) else (slice(None),)
        return rows[(*keep, *rest)]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)


class StatisticsStore:
    """Append-only statistics of every sample, for one set of settings, in `folder`.

    Opening drops a record that a kill cut in half and passes over damaged ones. One writer at a time: the
    caller holds the folder's `RunLock`.

    Args:
        settings: whatever the numbers depend on (model, prompt, criteria), as JSON values.
    """

    def __init__(
        self, folder: str | Path, *, settings: Mapping[str, Any], num_layers: int, num_heads: int
    ) -> None:
        self._dtype = _record_type(num_layers, num_heads)
        header = {
            "version": VERSION,
            "layers": int(num_layers),
            "heads": int(num_heads),
            "record_bytes": self._dtype.itemsize,
            "settings": dict(settings),
        }
        digest = _digest(header)
        self._seed = zlib.crc32(digest)  # a record of other settings does not pass as one of these
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
        """The keys of all sound records, in the order of writing."""
        return list(self._positions)

    def append(
        self,
        keys: Sequence[bytes],
        attention_sum: NDArray[Any],
        spatial_entropy: NDArray[Any],
        bottom_row_focus: NDArray[Any],
    ) -> None:
        """Add a chunk: keys `[sample]` and three arrays `[sample, layer, head]`, in one write, on disk on return.

        Keys that are already there are left out. Raises ValueError for wrong shapes or NaN, WorkError where
        the disk fails; the store is then as it was.
        """
        records = self._records(keys, attention_sum, spatial_entropy, bottom_row_focus)
        if not len(records):
            return
        try:
            with self.path.open("ab") as file:
                file.write(records.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._truncate()
            raise WorkError(f"cannot write {self.path}: {error.strerror or error}") from error
        except BaseException:
            self._truncate()
            raise
        for record in records:
            self._positions[record["key"].tobytes()] = self._count
            self._count += 1

    def rows(self, keys: Sequence[bytes]) -> StatisticsRows:
        """The statistics of `keys`, in that order; a key may come more than once. KeyError if one is missing."""
        order = np.array([self._positions[key] for key in keys], dtype=np.int64)
        if self._count:
            records: NDArray[Any] = np.memmap(self.path, dtype=self._dtype, mode="r", shape=(self._count,))
        else:
            records = np.zeros(0, self._dtype)
        return StatisticsRows(
            RowView(records["attention_sum"], order, np.float32),
            RowView(records["spatial_entropy"], order, np.float32),
            RowView(records["bottom_row_focus"], order, np.bool_),
        )

    def _records(self, keys: Sequence[bytes], *arrays: NDArray[Any]) -> NDArray[Any]:
        names = ("attention_sum", "spatial_entropy", "bottom_row_focus")
        shape = (len(keys), *self._dtype["attention_sum"].shape)
        for name, array in zip(names, arrays, strict=True):
            if np.shape(array) != shape:
                raise ValueError(f"{name} must be {shape}, not {np.shape(array)}")
            if np.isnan(array).any():
                raise ValueError(f"{name} holds NaN")
        fresh: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if len(key) != KEY_BYTES:
                raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
            if key not in self._positions:
                fresh.setdefault(bytes(key), i)
        records = np.zeros(len(fresh), self._dtype)
        chosen = list(fresh.values())
        for name, array in zip(names, arrays, strict=True):
            records[name] = np.asarray(array)[chosen]
        for row, key in enumerate(fresh):
            records["key"][row] = np.frombuffer(key, np.uint8)
            records["crc"][row] = self._crc(records[row : row + 1])
        return records

    def _crc(self, record: NDArray[Any]) -> int:
        return zlib.crc32(record.tobytes()[:-4], self._seed)

    def _recover(self) -> None:
        """Find the sound records and cut off a torn tail."""
        if not self.path.exists():
            return
        size = self._dtype.itemsize
        per_scan = max(1, _SCAN_BYTES // size)
        damaged = 0
        with self.path.open("rb") as file:
            while len(content := file.read(per_scan * size)) >= size:
                for start in range(0, len(content) - size + 1, size):
                    record = memoryview(content)[start : start + size]
                    if zlib.crc32(record[:-4], self._seed) == int.from_bytes(record[-4:], "little"):
                        self._positions.setdefault(bytes(record[:KEY_BYTES]), self._count)
                    else:
                        damaged += 1
                    self._count += 1
        if damaged:
            log.warning("%s: %d damaged records are left out and made again", self.path, damaged)
        if self.path.stat().st_size != self._count * size:
            log.info("%s: the last record was cut off by a kill and is made again", self.path)
            self._truncate()

    def _truncate(self) -> None:
        """Bring the file back to whole records."""
        try:
            os.truncate(self.path, self._count * self._dtype.itemsize)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror or error}") from error


def _record_type(num_layers: int, num_heads: int) -> np.dtype[Any]:
    heads = num_layers * num_heads
    if heads < 1:
        raise ValueError("a model has at least one layer and one head")
    flags_end = KEY_BYTES + 9 * heads
    crc = -(-flags_end // 4) * 4  # so that the floats of every record are aligned
    shape = (num_layers, num_heads)
    return np.dtype(
        {
            "names": ["key", "attention_sum", "spatial_entropy", "bottom_row_focus", "crc"],
            "formats": [("u1", KEY_BYTES), ("<f4", shape), ("<f4", shape), ("u1", shape), "<u4"],
            "offsets": [0, KEY_BYTES, KEY_BYTES + 4 * heads, KEY_BYTES + 8 * heads, crc],
            "itemsize": crc + 4,
        }
    )
