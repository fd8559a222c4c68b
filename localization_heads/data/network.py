"""HTTP clients, and the name of the proxy or certificate setting at fault when none can be made."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def client_trouble() -> str | None:
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
