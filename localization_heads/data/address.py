"""Paths and http(s) addresses of images. Credentials and queries are removed before an address is shown or stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from localization_heads.errors import UsageError

HIDDEN = "..."
"""Stands in for the parts that are removed from an address."""

_REDACTED = re.compile(r"://(?:[^/]*:)?\.\.\.(?:/|$)|\?\.\.\.$")


@dataclass(frozen=True)
class Address:
    """An http(s) address of an image. `str()` leaves out the user name, password and query, which may be secrets.

    Args:
        url: the full address, used to fetch and to compare; never stored or shown.
        allow_private: whether it may resolve to this machine or to a private network.

    >>> print(Address("https://me:secret@example.org/cat.jpg?token=7"))
    https://example.org/cat.jpg?...
    """

    url: str
    allow_private: bool = False

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __repr__(self) -> str:
        return f"Address({str(self)!r}, allow_private={self.allow_private})"


def is_address(source: object) -> bool:
    """Whether `source` is an http(s) address rather than a path."""
    return isinstance(source, Address) or (
        isinstance(source, str) and source.lower().startswith(("http://", "https://"))
    )


def image_source(name: str, *, allow_private: bool = False) -> Address | str:
    """An `Address` if the text is one; otherwise the text itself, which is a path.

    >>> image_source("cat.jpg"), image_source("http://localhost/cat.jpg")
    ('cat.jpg', Address('http://localhost/cat.jpg', allow_private=False))
    """
    return Address(name, allow_private) if is_address(name) else name


def without_secrets(text: str) -> str:
    """An address without user name, password, query and fragment, any of which may be secret. Paths are unchanged.

    A password may contain an unescaped slash, question mark or at sign. So wherever there may be a user name,
    everything up to the last at sign is removed.

    >>> without_secrets("http://me:pass/word@example.org/cat.jpg")
    'http://.../example.org/cat.jpg'
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    authority, tail = _split_at(rest, "/?#")
    path, query = _split_at(tail, "?#")
    host = authority.rpartition("@")[2]
    if re.fullmatch(r"\[[^\]]*\](:\d*)?|[^:@]*", authority):
        suspect = ""
    elif re.fullmatch(r"[^:@]*:\d*", authority):  # a host and port, or a user name and a numeric password
        suspect = path
    else:
        suspect = tail
        host = host if "@" in authority else f"{authority.partition(':')[0]}:{HIDDEN}"
    if "@" in suspect:
        secret_length = len(suspect.rpartition("@")[0]) + 1
        path, query = _split_at(tail[secret_length:], "?#")
        host, path = HIDDEN, f"/{path}"
    return f"{scheme}://{host}{path}" + (f"?{HIDDEN}" if query.startswith("?") else "")


def _split_at(text: str, ends: str) -> tuple[str, str]:
    """Split before the first character that is in `ends`."""
    match = re.search(f"[{ends}]", text)
    return (text, "") if match is None else (text[: match.start()], text[match.start() :])


def is_redacted(text: str) -> bool:
    """Whether `without_secrets` removed part of this address, so that it can no longer be fetched."""
    return _REDACTED.search(text) is not None


class ImageError(UsageError):
    """An image that cannot be used. The message is one line that starts with `path`.

    Args:
        path: the file or address as the user wrote it.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path | Address, reason: str) -> None:
        super().__init__(f"{display_name(path)}: {reason}")
        self.path = without_secrets(str(path))
        self.reason = reason


def display_name(name: str | Path | Address) -> str:
    """A path or address for messages: without secrets, on one line, shortened."""
    name = without_secrets(str(name))
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-100:]}"
    return "".join(char if char.isprintable() else "?" for char in name)
