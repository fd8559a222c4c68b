"""Pictures from http(s) addresses, bounded in time, size and redirects."""

from __future__ import annotations

import threading
import time
from typing import Any

from localization_heads.data.image_error import ImageError, is_address
from localization_heads.data.network import NetworkSettingError, open_client
from localization_heads.errors import WorkError

MAX_BYTES = 32 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0


class DownloadError(WorkError):
    """The network failed: no connection, a time-out, a server in trouble. `path` is the address."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def shown_address(address: str) -> str:
    """The address for people: without user name and password, and not endless."""
    scheme, colon, rest = address.partition("://")
    host, slash, tail = rest.partition("/")
    text = scheme + colon + host.rpartition("@")[2] + slash + tail
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= 200 else printable[:199] + "~"


def download(address: str, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The bytes at `address`.

    The work is done in a thread that is left behind when `max_seconds` are over: name look-ups and servers
    that send a byte now and then obey no other limit. Raises ImageError where the address is at fault
    (not found, too large, a redirect to somewhere else), DownloadError where the network is.
    """
    outcome: list[bytes | BaseException] = []
    deadline = time.monotonic() + max_seconds

    def work() -> None:
        try:
            outcome.append(_fetch(address, max_bytes, deadline))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True, name="image download")
    thread.start()
    thread.join(max_seconds)
    if not outcome:
        raise DownloadError(shown_address(address), f"not there after {max_seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _fetch(address: str, max_bytes: int, deadline: float) -> bytes:
    import httpx

    name = shown_address(address)
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    # Compressed answers could grow without limit when unpacked, so none is asked for.
    headers = {"User-Agent": "localization-heads", "Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        with open_client(timeout=timeout, headers=headers, follow_redirects=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                with client.stream("GET", address) as answer:
                    if not answer.has_redirect_location:
                        return _content(answer, name, max_bytes, deadline)
                    target = str(answer.url.join(answer.headers["location"]))
                if not is_address(target):
                    raise ImageError(name, f"redirects to {shown_address(target)}, which is not http(s)")
                address = target
    except NetworkSettingError as error:
        raise DownloadError(name, str(error)) from error
    except httpx.TimeoutException as error:
        raise DownloadError(name, "the server does not answer in time") from error
    except httpx.UnsupportedProtocol as error:
        raise ImageError(name, "not an http(s) address") from error
    except httpx.TransportError as error:
        raise DownloadError(name, f"cannot be reached: {_reason(error)}; is this machine offline?") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ImageError(name, f"not a usable address ({_reason(error)})") from error
    raise ImageError(name, f"more than {MAX_REDIRECTS} redirects")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _content(answer: Any, name: str, max_bytes: int, deadline: float) -> bytes:
    """The body of an answer, cut off where a limit is passed."""
    if answer.status_code >= 500:
        raise DownloadError(name, f"the server answers {answer.status_code} {answer.reason_phrase}".rstrip())
    if answer.status_code != 200:
        raise ImageError(name, f"the server answers {answer.status_code} {answer.reason_phrase}".rstrip())
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise ImageError(name, "the server sends a compressed answer, which is not taken")
    limit = f"larger than the limit of {max_bytes / (1 << 20):g} MB"
    if (
        answer.headers.get("content-length", "0").isdecimal()
        and int(answer.headers.get("content-length", "0")) > max_bytes
    ):
        raise ImageError(name, limit)
    body = bytearray()
    for chunk in answer.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise ImageError(name, limit)
        if time.monotonic() > deadline:
            raise DownloadError(name, "the download takes too long")
    return bytes(body)
