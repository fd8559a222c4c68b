"""Download images from http(s) addresses within limits of time, size and redirects, and never from private networks.

To prevent server-side request forgery (SSRF), a host name is resolved once, all of its IP addresses are checked, and
the connection is made to one of these, so DNS rebinding gains nothing. Redirects are checked in the same way. Behind a
proxy, which makes the connection itself, the name is checked as far as this machine can resolve it.

If proxy or certificate settings prevent any connection, the error names the setting at fault.
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

from localization_heads.data.address import Address, ImageError, display_name, is_redacted, without_secrets
from localization_heads.errors import WorkError, first_line

if TYPE_CHECKING:
    import httpx


MAX_BYTES = 32 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0

PRIVATE_MESSAGE = (
    "leads to this machine or to a private network, from which images are not fetched unless "
    "allow_private_addresses=true (in Python: Address(..., allow_private=True))"
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NetworkSettingError(WorkError):
    """A proxy or certificate setting prevents every connection. The message names it, without passwords."""


class DownloadError(WorkError):
    """The network failed: no connection, a timeout, a server error. `path` is the address, without secrets."""

    def __init__(self, path: str | Address, reason: str) -> None:
        super().__init__(f"{display_name(path)}: {reason}")
        self.path = without_secrets(str(path))
        self.reason = reason


def download(address: Address, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The bytes at `address`.

    The download runs in a thread that is abandoned after `max_seconds`: name resolution, and servers that send a byte
    now and then, respect no other timeout. Raises ImageError if the address is at fault (not found, private, too large,
    a redirect to something else), DownloadError if the network is.
    """
    if is_redacted(address.url):
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
        raise DownloadError(address, f"no complete response after {max_seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _fetch(address: Address, max_bytes: int, deadline: float) -> bytes:
    import httpx

    try:
        url = httpx.URL(address.url)
        for _ in range(MAX_REDIRECTS + 1):
            with _open_response(address, url) as response:
                if not response.has_redirect_location:
                    return _read_body(response, address, max_bytes, deadline)
                url = url.join(response.headers["location"])
            if url.scheme not in ("http", "https"):
                raise ImageError(address, f"redirects to {display_name(str(url))}, which is not http(s)")
    except httpx.TimeoutException as error:
        raise DownloadError(address, "the server does not answer in time") from error
    except (httpx.TransportError, OSError) as error:
        raise DownloadError(
            address, f"cannot be reached: {first_line(error, 100)}; is this machine offline?"
        ) from error
    except (httpx.InvalidURL, ValueError):  # these messages may quote a password
        raise ImageError(
            address, "not a usable address (in a user name or password, write / as %2F and @ as %40)"
        ) from None
    raise ImageError(address, f"more than {MAX_REDIRECTS} redirects")


@contextmanager
def _open_response(address: Address, url: httpx.URL) -> Iterator[httpx.Response]:
    """The response to one GET request. Uses a transport because a client would log the full address."""
    proxy = _find_proxy(url)
    ip_addresses = _resolve_host(address, url, proxy)
    with _open_address_transport(address, proxy) as transport:
        response = _request_from_first_reachable(transport, [None] if proxy else ip_addresses, url)
        try:
            yield response
        finally:
            response.close()


def _open_address_transport(address: Address, proxy: str | None) -> httpx.HTTPTransport:
    try:
        return open_transport(proxy)
    except NetworkSettingError as error:
        raise DownloadError(address, str(error)) from error


def _request_from_first_reachable(
    transport: httpx.HTTPTransport, ip_addresses: list[Any], url: httpx.URL
) -> httpx.Response:
    """The response of the first IP address that accepts a connection; None leaves name resolution to the proxy."""
    import httpx

    for ip_address in ip_addresses[:-1]:
        try:
            return transport.handle_request(_build_request(url, ip_address))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    return transport.handle_request(_build_request(url, ip_addresses[-1]))


def _build_request(url: httpx.URL, ip_address: str | None) -> httpx.Request:
    """A request that connects to `ip_address` but keeps the host name of `url` for its header and for TLS."""
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    headers = {
        "Host": url.netloc.decode("ascii"),
        "User-Agent": "localization-heads",
        "Accept": "image/*",
        # A compressed response could expand without limit, so none is accepted.
        "Accept-Encoding": "identity",
    }
    if url.userinfo:
        credentials = unquote(url.userinfo.decode("ascii")).encode()
        credentials = credentials if b":" in credentials else credentials + b":"
        headers["Authorization"] = f"Basic {base64.b64encode(credentials).decode()}"
    extensions: dict[str, Any] = {"timeout": timeout.as_dict()}
    if ip_address is not None:
        extensions["sni_hostname"] = url.raw_host.decode("ascii")  # the name to expect in the certificate
        url = url.copy_with(host=ip_address)
    return httpx.Request("GET", url, headers=headers, extensions=extensions)


def _resolve_host(address: Address, url: httpx.URL, proxy: str | None) -> list[str]:
    """The IP addresses of the host. ImageError if any is private and `address` does not allow that."""
    host, port = url.raw_host.decode("ascii"), url.port or {"http": 80, "https": 443}[url.scheme]
    if not host:
        raise ImageError(address, "names no host")
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        if proxy:
            return []
        raise
    ip_addresses = list(dict.fromkeys(str(entry[4][0]) for entry in resolved))
    if not address.allow_private and not all(is_public(ip_text) for ip_text in ip_addresses):
        raise ImageError(address, PRIVATE_MESSAGE)
    return ip_addresses


def is_public(ip_text: str) -> bool:
    """Whether an IP address, or the IPv4 address embedded in an IPv6 address, belongs to the public internet.

    >>> is_public("93.184.215.14"), is_public("10.0.0.1"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(ip_text.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or ip.is_unspecified or getattr(ip, "is_site_local", False)
    )


def _find_proxy(url: httpx.URL) -> str | None:
    """The proxy for `url` according to the environment or the system settings."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _read_body(response: httpx.Response, name: Address, max_bytes: int, deadline: float) -> bytes:
    """The body of a response. Raises ImageError or DownloadError for an error status or once a limit is exceeded."""
    if response.status_code >= 500:
        raise DownloadError(name, f"the server answers {response.status_code} {response.reason_phrase}".rstrip())
    if response.status_code != 200:
        raise ImageError(name, f"the server answers {response.status_code} {response.reason_phrase}".rstrip())
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ImageError(name, "the server sends a compressed response, which is not accepted")
    limit = f"larger than the limit of {max_bytes / (1 << 20):g} MB"
    declared = response.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise ImageError(name, limit)
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise ImageError(name, limit)
        if time.monotonic() > deadline:
            raise DownloadError(name, "the download takes too long")
    return bytes(body)


def open_client(**options: Any) -> httpx.Client:
    """An `httpx.Client`, which reads proxies and certificates from the environment. May raise NetworkSettingError."""
    import httpx

    with _network_setting_errors():
        return httpx.Client(**options)


def open_transport(proxy: str | None) -> httpx.HTTPTransport:
    """An `httpx.HTTPTransport` through `proxy`; certificates as for `open_client`. May raise NetworkSettingError."""
    import httpx

    with _network_setting_errors():
        return httpx.HTTPTransport(proxy=proxy)


@contextmanager
def _network_setting_errors() -> Iterator[None]:
    import httpx

    try:
        yield
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise NetworkSettingError(_describe_faulty_setting(error)) from error


def client_problem() -> str | None:
    """Why no HTTP client can be created on this machine, or None."""
    try:
        open_client().close()
    except NetworkSettingError as error:
        return str(error)
    return None


def _describe_faulty_setting(error: Exception) -> str:
    """Name the environment variable at fault, and how to fix it."""
    for name, value in sorted(os.environ.items()):
        key = name.lower()
        problem = None
        if key in ("all_proxy", "http_proxy", "https_proxy"):
            problem = _proxy_problem(value)
        elif key == "no_proxy":
            problem = _no_proxy_problem(value)
        elif key in ("ssl_cert_file", "sslkeylogfile") and isinstance(error, OSError):
            problem = _certificate_problem(key, value)
        if problem:
            return f"the environment variable {name} cannot be used: {problem}"
    return f"the network settings of this machine cannot be used: {first_line(error, 100)}"


def _proxy_problem(value: str) -> str | None:
    import httpx

    scheme = value.partition("://")[0].lower() if "://" in value else "http"
    if scheme.startswith("socks") and find_spec("socksio") is None:
        return f"a {scheme}:// proxy needs a package: pip install socksio; or unset it"
    try:
        httpx.Proxy(value if "://" in value else f"http://{value}")
    except (ValueError, httpx.InvalidURL):
        return "it is not the address of a proxy, such as http://host:3128; fix or unset it"
    return None


def _no_proxy_problem(value: str) -> str | None:
    import httpx

    for host in (part.strip() for part in value.split(",")):
        if _is_ip(host):
            continue
        try:
            httpx.URL(f"all://*{host}")
        except httpx.InvalidURL:
            bare = host.strip("[]")
            fix = f"write {bare}, without brackets" if _is_ip(bare) else "that is not a host; fix or unset it"
            return f"it holds '{host[:60]}': {fix}"
    return None


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _certificate_problem(key: str, value: str) -> str | None:
    if key == "sslkeylogfile":
        return None if Path(value).parent.is_dir() else f"{value}: no such folder; unset it"
    if not Path(value).is_file():
        return f"{value}: no such file; name your certificates, or unset it"
    return f"{value} holds no certificates; name a file that does, or unset it"
