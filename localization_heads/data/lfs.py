"""Git LFS pointers: three lines of text that stand where a large file was not fetched."""

from __future__ import annotations

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"

IS_POINTER = "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


def is_pointer(beginning: bytes) -> bool:
    """Whether a file that begins like this is a pointer.

    >>> is_pointer(b"version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a21"), is_pointer(b"GIF89a")
    (True, False)
    """
    return beginning.startswith(_FIRST_LINE)
