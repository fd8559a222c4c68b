"""One run at a time in an output folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from localization_heads.errors import UsageError
from localization_heads.store.atomic import remove_leftovers, writable_folder

LOCK_NAME = ".lh-run.lock"


class RunLock:
    """Holds a folder for this run: `with RunLock(folder): ...`, or `acquire` and `release`.

    A second run on the folder gets a UsageError at once instead of waiting. The system drops the lock when
    the process ends, however it ends, so a kill leaves nothing to clear. Taking it clears the temporary files
    of killed runs from the folder and from `attention/` and `statistics/` in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: BaseFileLock | None = None

    def acquire(self) -> RunLock:
        """Take the folder, making it if need be. UsageError if another run has it or it cannot be written."""
        writable_folder(self.folder)
        lock = FileLock(str(self.folder / LOCK_NAME), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"another run is working in {self.folder}: wait until it ends, or choose another output_dir"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise UsageError(f"cannot lock {self.folder} ({error}): choose another output_dir") from error
        self._lock = lock
        for name in ("", "attention", "statistics"):
            remove_leftovers(self.folder / name)
        return self

    def release(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self._lock.release()
            self._lock = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
