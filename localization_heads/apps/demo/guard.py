"""Safeguards of the page: a temporary folder, connections without proxies, requests of limited size.

gradio keeps uploads and results below one folder, so this process uses a temporary one and removes it at the end. The
size of a request is counted while it is received, because gradio reads the whole body before any of our code runs.
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

MAX_BODY = 1 << 18  # bytes of a request that is not an upload: two long texts and a few numbers
MAX_UPLOAD = 32 << 20
MAX_UPLOADS = 512 << 20  # bytes of all images in the page's folder
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@contextmanager
def without_proxies() -> Iterator[None]:
    """Unset proxies and certificates: gradio checks its own page by http, on this machine.

    httpx reads these variables when gradio is imported, and fails on a SOCKS proxy, on `[::1]` in `no_proxy` and on
    missing certificates.
    """
    names = [*PROXIES, *map(str.upper, PROXIES), *CERTIFICATES]
    with environment(**dict.fromkeys(names)):
        yield


def warn_of_missing_certificates() -> None:
    """Warn of certificate files that do not exist: the page does not need them, but other programs may."""
    for name in CERTIFICATES:
        if (path := os.environ.get(name)) and not Path(path).exists():
            log.warning("%s=%s: no such file or folder; the page needs no certificates and goes on", name, path)


def check_address(host: str, port: int | None) -> None:
    """UsageError if the address cannot be bound. gradio itself would try a hundred ports of an unknown host."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        options = f"host={host}" + (f" port={port}" if port else "")
        raise UsageError(f"{options}: {error.strerror or error}; choose another") from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for all files of gradio and the page, below `GRADIO_TEMP_DIR` if set. It is removed afterwards.

    Raises:
        UsageError: the folder is not writable; the error names the variable.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR")
    try:
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="localization-heads-", dir=parent or None)).resolve()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        name = f"GRADIO_TEMP_DIR={parent}" if parent else "the folder for temporary files"
        raise UsageError(f"{name}: {reason}; GRADIO_TEMP_DIR has to name a folder that can be written to") from error
    try:
        with environment(GRADIO_TEMP_DIR=str(folder), GRADIO_RUN_HISTORY="false"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class BoundedRequests:
    """ASGI middleware that refuses too large requests, and removes old uploads before a new one.

    Args:
        app: the application that handles the requests.
        make_room: called before an upload is read.
    """

    def __init__(self, app: App, make_room: Callable[[], None]) -> None:
        self.app, self.make_room = app, make_room
        self.bytes_in_flight = 0  # of uploads in progress

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limit = MAX_UPLOAD if is_upload else MAX_BODY
        if is_upload:
            await asyncio.to_thread(self.make_room)
        num_received, is_answered = 0, False

        async def receive_counted() -> Message:
            nonlocal num_received
            message = await receive()
            size = len(message.get("body", b""))
            num_received += size
            self.bytes_in_flight += size * is_upload
            if num_received > limit or self.bytes_in_flight > MAX_UPLOADS:
                raise _TooLargeError
            return message

        async def send_recorded(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            if _content_length(scope) > limit:
                raise _TooLargeError
            await self.app(scope, receive_counted, send_recorded)
        except _TooLargeError:
            if not is_answered:
                await _refuse(send, f"at most {limit >> 10:,} KB at a time")
        finally:
            self.bytes_in_flight -= num_received * is_upload


class _TooLargeError(Exception):
    """The request exceeds its limit."""


def make_room(entries: Iterable[Path], max_bytes: int = MAX_UPLOADS) -> None:
    """Remove the oldest of these files and folders until the others have at most `max_bytes`."""
    newest_first = sorted(((*_time_and_size(entry), entry) for entry in entries), reverse=True)
    totals = accumulate(size for _, size, _ in newest_first)
    for (_, _, entry), total in zip(newest_first, totals, strict=True):
        if total > max_bytes:
            remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, or a folder with its content. It need not exist."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _time_and_size(entry: Path) -> tuple[float, int]:
    """Modification time and size in bytes; zeros for an entry that has been removed in the meantime."""
    try:
        files = [entry] if entry.is_file() else list(entry.rglob("*"))
        return entry.stat().st_mtime, sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        return 0.0, 0


def _content_length(scope: Message) -> int:
    """The value of the request's Content-Length header, 0 without one."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


async def _refuse(send: Send, reason: str) -> None:
    content = reason.encode()
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": content})
