"""Atomic writes, the lock that gives one run a folder to itself, and parsing of untrusted JSON.

Every file that this tool writes goes through `atomic_write`, except the append-only ones in `journal.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout

from localization_heads.errors import UsageError, WorkError, shown

log = logging.getLogger(__name__)

_TEMPORARY_NAME = re.compile(r"\.lh-[0-9a-f]{16}-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]+\.tmp")


def _this_host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, unique to this writer (host, process, thread) and short however long the name is."""
    target = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".lh-{target}-{_this_host()}-{os.getpid()}-{threading.get_ident():x}.tmp")


def _write_error(path: Path, error: OSError) -> UsageError | WorkError:
    """UsageError if another location would help (permissions, a folder in the way); WorkError for a failing disk."""
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return UsageError(f"cannot write {path}: {reason}; choose another output_dir")
    return WorkError(f"cannot write {path}: {reason}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends, and is removed if the block raises.

    Missing folders are created. The content is synced to disk (fsync) before it gets its name, so a reader, or a run
    after a power failure, finds the old file or the new one, never a partial one. Raises UsageError if the location is
    not writable, WorkError if the disk fails.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            temporary.unlink()  # left by a killed process with our PID
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(path, error) from error
        raise


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Fill a new folder that replaces `path` when the block ends, and is removed if the block raises.

    A reader finds the old content or the new, never a mixture, and for a moment in between nothing. Raises UsageError
    if the location is not writable, WorkError if the disk fails.
    """
    path = Path(path)
    new = _temporary_path(path)
    old = new.with_name(f"{new.name.removesuffix('.tmp')}00.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete(new)
        _delete(old)
        new.mkdir()
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        yield new
        with suppress(FileNotFoundError):
            path.rename(old)
        new.rename(path)
        _delete(old)
    except BaseException as error:
        with suppress(OSError):
            _delete(new)
        with suppress(OSError):
            old.rename(path)  # fails if the new content is already in place
        if isinstance(error, OSError):
            raise _write_error(path, error) from error
        raise


def _delete(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON with a final newline, keeping the order of keys. NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table with `\\n` line ends, so the bytes are the same on every platform."""
    import csv

    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def remove_leftovers(folder: str | Path) -> None:
    """Delete temporary files and folders that killed processes of this machine left directly in `folder`."""
    for path in Path(folder).glob(".lh-*.tmp"):
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if match and match["host"] == _this_host() and not _is_running(int(match["pid"])):
            log.debug("removing the leftover %s", path)
            with suppress(OSError):
                _delete(path)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 would terminate the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def writable_folder(path: str | Path) -> Path:
    """Create the folder if necessary and check that a file can be created in it; UsageError if not."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _write_error(folder, error) from error
    return folder


LOCK_NAME = ".lh-run.lock"


class RunLock:
    """Exclusive use of an output folder by one run: `with RunLock(folder): ...`.

    A second run on the folder gets a UsageError at once instead of waiting. The operating system releases the lock
    however the process ends, so a killed run leaves no stale lock. Acquiring it creates the folder if necessary, and
    deletes the temporary files that killed runs left in it and in its `attention/` and `statistics/`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = FileLock(str(self.folder / LOCK_NAME), timeout=0)

    def __enter__(self) -> None:
        writable_folder(self.folder)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"another run is working in {self.folder}: wait until it ends, or choose another output_dir"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise UsageError(f"cannot lock {self.folder} ({error}): choose another output_dir") from error
        for name in ("", "attention", "statistics"):
            remove_leftovers(self.folder / name)

    def __exit__(self, *_error: object) -> None:
        with suppress(OSError):
            self._lock.release()


_LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"

LFS_POINTER_MESSAGE = "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that starts with these bytes is a Git LFS pointer.

    >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a21"), is_lfs_pointer(b"GIF89a")
    (True, False)
    """
    return beginning.startswith(_LFS_SIGNATURE)


_MIN_PARSED_BYTES = {b"[": 64, b"{": 64, b":": 32, b",": 8}
"""Minimum bytes of memory that parsing allocates per character: `[],` is three bytes of text and seventy in memory."""


def read_json(path: Path, limit: int, encodings: Sequence[str] = ("utf-8",), **options: Any) -> Any:
    """Parse a JSON file of at most `limit` bytes, in the first encoding that fits. UsageError, naming the file."""
    try:
        if path.stat().st_size > limit:
            raise UsageError(f"{path}: larger than the limit of {limit >> 20} MB")
        return parse_json(path.read_bytes(), encodings, **options)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON file that can be read ({error})") from error


def parse_json(content: bytes, encodings: Sequence[str] = ("utf-8",), **options: Any) -> Any:
    """Parse JSON, in the first encoding that decodes it; `options` are passed to `json.loads`.

    Raises:
        ValueError: with a one-line message, for invalid JSON, NaN, numbers beyond the range of a float, nesting that is
            too deep, and values that need far more memory than their text.
    """
    if sum(num_bytes * content.count(char) for char, num_bytes in _MIN_PARSED_BYTES.items()) > 8 * len(content) + (
        64 << 20
    ):
        raise ValueError("not usable JSON: far more lists and objects than text")
    try:
        text = _decode_text(content, encodings)
        return json.loads(text, parse_constant=_reject_constant, parse_float=_parse_finite_float, **options)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not usable JSON: {str(error)[:80]}") from error


def _decode_text(content: bytes, encodings: Sequence[str]) -> str:
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"not {encodings[0].upper()} text")


def _parse_finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)[1:-1]} is too large a number")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
