"""The two ways a run can go wrong, and the exit status of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localization_heads.data.jsonl import BadEntry


class UsageError(Exception):
    """The user asked for something that cannot be: a bad option, a missing file, a broken data set.

    The message is one line that names the option, file or line at fault and the way out. Exit status 2.
    """

    exit_status = 2


class WorkError(Exception):
    """The request was sound but the work failed: no memory, no network, a broken checkpoint. Exit status 1."""

    exit_status = 1


class OutOfMemoryError(WorkError):
    """The batch does not fit into the memory; a smaller one may."""


class NothingDoneError(WorkError):
    """No entry of a data set could be used.

    Args:
        failures: the reason of each, by line.
    """

    def __init__(self, what: str, failures: Sequence[BadEntry]) -> None:
        super().__init__(f"{what}; the first: {failures[0]}")
        self.failures = failures


class NoHeadError(UsageError):
    """No head passes the criteria in this sample, so none can ground it."""
