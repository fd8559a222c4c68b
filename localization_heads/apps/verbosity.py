"""`-q` and `-v`: how much a command says. What went wrong is always said."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partialmethod

from localization_heads.apps.printable import printable

QUIET, VERBOSE = {"-q", "--quiet"}, {"-v", "--verbose"}
HELP = """\
-q, --quiet    no progress bars, no tables, no notes: errors and the exit status alone
-v, --verbose  also what was loaded and how long it took"""

is_quiet = False


class _Notes(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def verbosity(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Obey `-q` and `-v` while the block runs; gives the other arguments."""
    global is_quiet
    given = set(arguments)
    is_quiet = bool(given & QUIET)
    level = logging.ERROR if is_quiet else logging.INFO if given & VERBOSE else logging.WARNING
    _log_to_stderr(level)
    try:
        with _no_bars() if is_quiet else nullcontext():
            yield [argument for argument in arguments if argument not in QUIET | VERBOSE]
    finally:
        is_quiet = False


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Notes("note: %(message)s"))
    package = logging.getLogger("localization_heads")
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch progress bars off, also those of libraries."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before
