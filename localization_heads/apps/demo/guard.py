"""The limits of the page: a folder of its own, connections without proxies, requests of bounded size.

Notable choices: gradio keeps uploads and results below one folder, so this process gets one of its own and removes it
at the end. The size of a request is counted here as its bytes come in, because gradio reads a body whole before any of
our code sees it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from localization_heads.apps.frontdoor import environment
from localization_heads.errors import UsageError

log = logging.getLogger(__name__)

MAX_BODY = 1 << 18  # bytes of a request that is no upload: two long texts and a few numbers
MAX_UPLOAD = 32 << 20
MAX_UPLOADS = 512 << 20  # bytes of all images that lie in the page's folder
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@contextmanager
def direct_connections() -> Iterator[None]:
    """No proxy and no certificates: gradio asks its own page whether it is there, by http and on this machine.

    httpx reads these variables as soon as gradio is imported and fails on a SOCKS proxy, on `[::1]` in `no_proxy` and
    on certificates that are not there.
    """
    names = [*PROXIES, *map(str.upper, PROXIES), *CERTIFICATES]
    with environment(**dict.fromkeys(names)):
        yield


def note_missing_certificates() -> None:
    """Warn of certificate files that do not exist: the page does without them, other programs may not."""
    for name in CERTIFICATES:
        if (place := os.environ.get(name)) and not Path(place).exists():
            log.warning(
                "%s=%s: no such file or folder; the page needs no certificates and goes on", name, place
            )


def check_address(host: str, port: int | None) -> None:
    """UsageError if nothing can be served there. gradio itself tries a hundred ports of a host that does not exist."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        asked = f"host={host}" + (f" port={port}" if port else "")
        raise UsageError(f"{asked}: {error.strerror or error}; choose another") from error


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for all that gradio and the page write, below `GRADIO_TEMP_DIR` where that is set; gone afterwards.

    Raises:
        UsageError: nothing can be written there, naming the variable.
    """
    place = os.environ.get("GRADIO_TEMP_DIR")
    try:
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="localization-heads-", dir=place or None)).resolve()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        name = f"GRADIO_TEMP_DIR={place}" if place else "the folder for temporary files"
        raise UsageError(
            f"{name}: {reason}; GRADIO_TEMP_DIR has to name a folder that can be written to"
        ) from error
    try:
        with environment(GRADIO_TEMP_DIR=str(folder), GRADIO_RUN_HISTORY="false"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class BoundedRequests:
    """ASGI middleware: a request of too many bytes is refused, and uploads make room for themselves.

    Args:
        app: what answers the requests.
        make_room: called before an upload is read.
    """

    def __init__(self, app: App, make_room: Callable[[], None]) -> None:
        self.app, self.make_room = app, make_room
        self.coming_in = 0  # bytes of uploads that have not ended

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limit = MAX_UPLOAD if is_upload else MAX_BODY
        if is_upload:
            await asyncio.to_thread(self.make_room)
        taken, is_answered = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            self.coming_in += size * is_upload
            if taken > limit or self.coming_in > MAX_UPLOADS:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            if _announced(scope) > limit:
                raise _TooLargeError
            await self.app(scope, counted, noted)
        except _TooLargeError:
            if not is_answered:
                await _refuse(send, f"at most {limit >> 10:,} KB at a time")
        finally:
            self.coming_in -= taken * is_upload


class _TooLargeError(Exception):
    """The request holds more than it may."""


def make_room(entries: Iterable[Path], max_bytes: int = MAX_UPLOADS) -> None:
    """Remove the oldest of these files and folders until the others hold at most `max_bytes`."""
    found = sorted(((*_age_and_size(entry), entry) for entry in entries), reverse=True)
    for (_, _, entry), total in zip(found, accumulate(size for _, size, _ in found), strict=True):
        if total > max_bytes:
            remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, or a folder with all its content; it may be gone already."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _age_and_size(entry: Path) -> tuple[float, int]:
    """Time of the last change and size in bytes; zeros for an entry that has been removed meanwhile."""
    try:
        files = [entry] if entry.is_file() else list(entry.rglob("*"))
        return entry.stat().st_mtime, sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        return 0.0, 0


def _announced(scope: Message) -> int:
    """The length that a request says it has, 0 if it says none."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


async def _refuse(send: Send, reason: str) -> None:
    content = reason.encode()
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": content})
