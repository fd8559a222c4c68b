"""HTTP clients, and images from http(s) addresses, bounded in time, size and redirects, out of private networks.

Where the settings of this machine allow no client, the error names the proxy or certificate setting at fault. A name is
resolved once, all of its IP addresses are checked, and the connection goes to one of them, so a server cannot gain
anything by resolving differently the second time. Each redirect is checked in the same way. Behind a proxy it is the
proxy that connects; there the name is checked as far as this machine can resolve it.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from localization_heads.data.address import Address, ImageError, is_partial, shown_name, without_secrets
from localization_heads.errors import WorkError, one_line

if TYPE_CHECKING:
    import httpx


class NetworkSettingError(WorkError):
    """A proxy or certificate setting that prevents every connection. The message names it, without passwords."""


def open_client(**options: Any) -> httpx.Client:
    """`httpx.Client`, which reads its proxies and certificates from the environment.

    Raises:
        NetworkSettingError: these settings allow no client.
    """
    import httpx

    with _setting_errors():
        return httpx.Client(**options)


def open_transport(proxy: str | None) -> httpx.HTTPTransport:
    """`httpx.HTTPTransport`: certificates from the environment, the proxy as it is given. Raises as `open_client`."""
    import httpx

    with _setting_errors():
        return httpx.HTTPTransport(proxy=proxy)


@contextmanager
def _setting_errors() -> Iterator[None]:
    import httpx

    try:
        yield
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise NetworkSettingError(_culprit(error)) from error


def client_problem() -> str | None:
    """Why no client can be made on this machine; None if one can."""
    try:
        open_client().close()
    except NetworkSettingError as error:
        return str(error)
    return None


def _culprit(error: Exception) -> str:
    """The environment variable at fault, and what to do."""
    for name, value in sorted(os.environ.items()):
        key = name.lower()
        fault = None
        if key in ("all_proxy", "http_proxy", "https_proxy"):
            fault = _proxy_fault(value)
        elif key == "no_proxy":
            fault = _no_proxy_fault(value)
        elif key in ("ssl_cert_file", "sslkeylogfile") and isinstance(error, OSError):
            fault = _file_fault(key, value)
        if fault:
            return f"the environment variable {name} cannot be used: {fault}"
    return f"the network settings of this machine cannot be used: {one_line(error)}"


def _proxy_fault(value: str) -> str | None:
    import httpx

    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme.startswith("socks") and find_spec("socksio") is None:
        return f"a proxy of the kind {scheme}:// needs a package: pip install socksio; or unset it"
    try:
        httpx.Proxy(value if "://" in value else f"http://{value}")
    except (ValueError, httpx.InvalidURL):
        return "it is not the address of a proxy, such as http://host:3128; mend or unset it"
    return None


def _no_proxy_fault(value: str) -> str | None:
    import httpx

    for host in (part.strip() for part in value.split(",")):
        if _is_ip(host):
            continue
        try:
            httpx.URL(f"all://*{host}")
        except httpx.InvalidURL:
            bare = host.strip("[]")
            way = f"write {bare}, without brackets" if _is_ip(bare) else "that is no host; mend or unset it"
            return f"it holds '{host[:60]}': {way}"
    return None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _file_fault(key: str, value: str) -> str | None:
    if key == "sslkeylogfile":
        return None if Path(value).parent.is_dir() else f"{value}: no such folder; unset it"
    if not Path(value).is_file():
        return f"{value}: no such file; name your certificates, or unset it"
    return f"{value} holds no certificates; name a file that does, or unset it"


MAX_BYTES = 32 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0

PRIVATE = (
    "leads to this machine or into a private network, where images are not fetched from unless "
    "allow_private_addresses=true (in Python: Address(..., allow_private=True))"
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class DownloadError(WorkError):
    """The network failed: no connection, a time-out, a server error. `path` is the address, without secrets."""

    def __init__(self, path: str | Address, reason: str) -> None:
        super().__init__(f"{shown_name(path)}: {reason}")
        self.path = without_secrets(str(path))
        self.reason = reason


def download(address: Address, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The bytes at `address`.

    The work is done in a thread that is abandoned after `max_seconds`: name look-ups, and servers that send a byte
    now and then, respect no other limit. Raises ImageError where the address is at fault
    (not found, private, too large, a redirect to somewhere else), DownloadError where the network is.
    """
    if is_partial(address.url):
        raise ImageError(address, "cannot be fetched again: its query or password was not stored")
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
        raise DownloadError(address, f"not there after {max_seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _fetch(address: Address, max_bytes: int, deadline: float) -> bytes:
    import httpx

    try:
        url = httpx.URL(address.url)
        for _ in range(MAX_REDIRECTS + 1):
            with _answer(address, url) as answer:
                if not answer.has_redirect_location:
                    return _content(answer, address, max_bytes, deadline)
                url = url.join(answer.headers["location"])
            if url.scheme not in ("http", "https"):
                raise ImageError(address, f"redirects to {shown_name(str(url))}, which is not http(s)")
    except httpx.TimeoutException as error:
        raise DownloadError(address, "the server does not answer in time") from error
    except (httpx.TransportError, OSError) as error:
        raise DownloadError(
            address, f"cannot be reached: {one_line(error)}; is this machine offline?"
        ) from error
    except (httpx.InvalidURL, ValueError):  # whose messages quote what may be a password
        raise ImageError(
            address, "not a usable address (in a user name or password, write / as %2F and @ as %40)"
        ) from None
    raise ImageError(address, f"more than {MAX_REDIRECTS} redirects")


@contextmanager
def _answer(address: Address, url: httpx.URL) -> Iterator[httpx.Response]:
    """The answer to one request. A transport is used and not a client, which would log the whole address."""

    proxy = _proxy(url)
    found = _checked_addresses(address, url, proxy)
    with _transport(address, proxy) as transport:
        answer = _first_answer(transport, [None] if proxy else found, url)
        try:
            yield answer
        finally:
            answer.close()


def _transport(address: Address, proxy: str | None) -> httpx.HTTPTransport:
    try:
        return open_transport(proxy)
    except NetworkSettingError as error:
        raise DownloadError(address, str(error)) from error


def _first_answer(transport: httpx.HTTPTransport, places: list[Any], url: httpx.URL) -> httpx.Response:
    """Of the first of the machines that can be connected to; None leaves the look-up to the proxy."""
    import httpx

    for place in places[:-1]:
        try:
            return transport.handle_request(_request(url, place))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    return transport.handle_request(_request(url, places[-1]))


def _request(url: httpx.URL, place: str | None) -> httpx.Request:
    """A request that goes to the machine `place`, under the name that `url` has for it."""
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    headers = {
        "Host": url.netloc.decode("ascii"),
        "User-Agent": "localization-heads",
        "Accept": "image/*",
        # A compressed answer could grow without limit when it is unpacked, so none is asked for.
        "Accept-Encoding": "identity",
    }
    if url.userinfo:
        secret = unquote(url.userinfo.decode("ascii")).encode()
        secret = secret if b":" in secret else secret + b":"
        headers["Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    extensions: dict[str, Any] = {"timeout": timeout.as_dict()}
    if place is not None:
        extensions["sni_hostname"] = url.raw_host.decode("ascii")  # whom the certificate must name
        url = url.copy_with(host=place)
    return httpx.Request("GET", url, headers=headers, extensions=extensions)


def _checked_addresses(address: Address, url: httpx.URL, proxy: str | None) -> list[str]:
    """The numeric addresses of the host. ImageError if one of them is private and that is not allowed."""
    host, port = url.raw_host.decode("ascii"), url.port or {"http": 80, "https": 443}[url.scheme]
    if not host:
        raise ImageError(address, "names no machine")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        if proxy:
            return []
        raise
    numbers = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not address.allow_private and not all(is_public(number) for number in numbers):
        raise ImageError(address, PRIVATE)
    return numbers


def is_public(number: str) -> bool:
    """Whether an IP address belongs to the public internet, also when embedded in an IPv6 address.

    >>> is_public("93.184.215.14"), is_public("10.0.0.1"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(number.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or ip.is_unspecified or getattr(ip, "is_site_local", False)
    )


def _proxy(url: httpx.URL) -> str | None:
    """The proxy that the environment (or the system) names for this address."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _content(answer: httpx.Response, name: Address, max_bytes: int, deadline: float) -> bytes:
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
