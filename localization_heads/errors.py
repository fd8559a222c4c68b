"""The two ways a run can go wrong, and the exit status of each."""


class UsageError(Exception):
    """The user asked for something that cannot be: a bad option, a missing file, a broken data set.

    The message is one line that names the option, file or line at fault and the way out. Exit status 2.
    """

    exit_status = 2


class WorkError(Exception):
    """The request was sound but the work failed: no memory, no network, a broken checkpoint. Exit status 1."""

    exit_status = 1
