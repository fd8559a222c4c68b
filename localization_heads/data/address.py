"""Names of images: paths and http(s) addresses, shown without secrets; `ImageError`, which names the image at fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from localization_heads.errors import UsageError

HIDDEN = "..."
"""Replaces the parts that are left out of an address."""

_PARTIAL = re.compile(r"://(?:[^/]*:)?\.\.\.(?:/|$)|\?\.\.\.$")


@dataclass(frozen=True)
class Address:
    """An http(s) address of an image. As text it is without user name, password and query, which may be secrets.

    Args:
        url: the whole address, for fetching and comparing; it is never stored or shown.
        allow_private: whether it may lead to this machine or into a private network.

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
    """Whether `source` is an http(s) address and not a path."""
    return isinstance(source, Address) or (
        isinstance(source, str) and source.lower().startswith(("http://", "https://"))
    )


def image_source(name: str, *, allow_private: bool = False) -> Address | str:
    """An address if the text is one, else the text itself, as a path.

    >>> image_source("cat.jpg"), image_source("http://localhost/cat.jpg")
    ('cat.jpg', Address('http://localhost/cat.jpg', allow_private=False))
    """
    return Address(name, allow_private) if is_address(name) else name


def without_secrets(text: str) -> str:
    """An address without what may be secret: user name, password, query and fragment. A path stays as it is.

    A password may contain a slash, a question mark or an at sign that should have been escaped. So if there may be a
    user name, everything up to the last at sign is left out.

    >>> without_secrets("http://me:pass/word@example.org/cat.jpg")
    'http://.../example.org/cat.jpg'
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    authority, tail = _split(rest, "/?#")
    path, query = _split(tail, "?#")
    host = authority.rpartition("@")[2]
    if re.fullmatch(r"\[[^\]]*\](:\d*)?|[^:@]*", authority):
        doubtful = ""
    elif re.fullmatch(r"[^:@]*:\d*", authority):  # a host with its port, or a user and a number
        doubtful = path
    else:
        doubtful = tail
        host = host if "@" in authority else f"{authority.partition(':')[0]}:{HIDDEN}"
    if "@" in doubtful:
        hidden = len(doubtful.rpartition("@")[0]) + 1
        path, query = _split(tail[hidden:], "?#")
        host, path = HIDDEN, f"/{path}"
    return f"{scheme}://{host}{path}" + (f"?{HIDDEN}" if query.startswith("?") else "")


def _split(text: str, ends: str) -> tuple[str, str]:
    """The text up to the first of the characters `ends`, and the rest, which begins with it."""
    match = re.search(f"[{ends}]", text)
    return (text, "") if match is None else (text[: match.start()], text[match.start() :])


def is_partial(text: str) -> bool:
    """Whether `without_secrets` left something out of this address, so that it no longer leads to the image."""
    return _PARTIAL.search(text) is not None


class ImageError(UsageError):
    """An image that cannot be used. The message is one line and starts with `path`.

    Args:
        path: the file or address as the user knows it.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path | Address, reason: str) -> None:
        super().__init__(f"{shown_name(path)}: {reason}")
        self.path = without_secrets(str(path))
        self.reason = reason


def shown_name(name: str | Path | Address) -> str:
    """The name of an image for messages: an address without its secrets, on one line, shortened."""
    name = without_secrets(str(name))
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-100:]}"
    return "".join(char if char.isprintable() else "?" for char in name)
