"""Addresses: downloads within limits, no secret in messages, and no way into private networks."""

from __future__ import annotations

import re
import socket
import threading
import time
import zlib
from base64 import b64encode
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import pytest
from PIL import Image
from test_images import corner, encoded, png_header

from localization_heads.data import network
from localization_heads.data.address import Address, ImageError, is_redacted, without_secrets
from localization_heads.data.images import load_image
from localization_heads.data.network import DownloadError, download, is_public
from localization_heads.errors import WorkError

IMAGE = encoded(Image.new("RGB", (6, 4), "green"))


ANSWERS = {
    "image": (IMAGE, 200, {}),
    "unavailable": (b"", 503, {}),
    "text": (b"<html>hello</html>", 200, {}),
    "empty": (b"", 200, {}),
    "huge": (png_header(30_000, 30_000), 200, {}),
    "too_large": (b"x", 200, {"Content_Length": str(1 << 40)}),
    "compressed": (zlib.compress(bytes(1 << 20)), 200, {"Content_Encoding": "deflate"}),
    "truncated": (IMAGE[:20], 200, {"Content_Length": str(len(IMAGE))}),
    "moved": (b"", 302, {"Location": "/image"}),
    "loop": (b"", 302, {"Location": "/loop"}),
    "file": (b"", 302, {"Location": "file:///etc/passwd"}),
    "ftp": (b"", 302, {"Location": "ftp://127.0.0.1/a.png"}),
}
"""Content, status and headers by path. Other paths are a method of the handler, or 404."""


class Handler(BaseHTTPRequestHandler):
    """A server whose response depends on the path: images, failures and attacks."""

    def do_GET(self) -> None:
        self.server.requests.append(self.headers["Host"])
        self.path = self.path.removeprefix(f"http://{self.headers['Host']}")  # if used as a proxy
        name = self.path.strip("/").split("?")[0]
        content, status, headers = ANSWERS.get(name, (b"", 404, {}))
        getattr(self, f"get_{name}", lambda: self.answer(content, status, **headers))()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with suppress(OSError):  # the client has disconnected
            for part in [content] if isinstance(content, bytes) else content:
                self.wfile.write(part)

    def get_locked(self) -> None:
        known = self.headers["Authorization"] == "Basic " + b64encode(b"me:a/b").decode()
        self.answer(IMAGE, 200 if known else 401)

    def get_redirect(self) -> None:
        self.answer(b"", 302, Location=self.path.partition("?")[2])

    def get_endless(self) -> None:
        self.answer(repeat(bytes(1 << 16)))

    def get_dripping(self) -> None:
        self.answer(bytes([byte]) for byte in IMAGE if not time.sleep(0.1))

    def get_silent(self) -> None:
        time.sleep(3)


requests_made: list[str] = []


@pytest.fixture
def requests(server):
    """The Host headers of the requests during a test, in order."""
    requests_made.clear()
    return requests_made


@pytest.fixture(scope="module")
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.requests = requests_made
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def private(address: str) -> Address:
    """An address of the test server, which is on this machine."""
    return Address(address, allow_private=True)


@pytest.mark.parametrize("path", ["image", "moved", "image?size=big"])
def test_image_is_downloaded(path, server):
    image = load_image(private(f"{server}/{path}"))
    assert (image.size, corner(image)) == ((6, 4), (0, 128, 0))
    assert load_image(private(f"HTTP{server[4:]}/{path}")).size == (6, 4)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answers 404"),
        ("text", "not an image in a known format"),
        ("empty", "is empty"),
        ("huge", "900 MP, over the limit"),
        ("too_large", "larger than the limit of 32 MB"),
        ("endless", "larger than the limit of 32 MB"),
        ("compressed", "compressed response"),
        ("loop", "more than 5 redirects"),
        ("file", "redirects to file:/.*etc/passwd, which is not"),
        ("ftp", "which is not http"),
    ],
)
def test_faulty_address_raises_image_error(path, message, server):
    with pytest.raises(ImageError, match=message) as caught:
        load_image(private(f"{server}/{path}"))
    assert str(caught.value).startswith(f"{server}/{path}: ")


@pytest.mark.parametrize("path", ["unavailable", "truncated"])
def test_server_error_raises_download_error(path, server):
    with pytest.raises(DownloadError) as caught:
        load_image(private(f"{server}/{path}"))
    assert isinstance(caught.value, WorkError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["silent", "dripping"])
def test_download_gives_up_on_a_slow_server(path, server):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"after 0\.5 s"):
        download(private(f"{server}/{path}"), max_seconds=0.5)
    assert time.monotonic() - start < 2


def test_read_timeout_is_reported(server, monkeypatch):
    monkeypatch.setattr(network, "READ_SECONDS", 0.3)
    with pytest.raises(DownloadError, match="does not answer in time"):
        download(private(f"{server}/silent"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.png", "https://no-such-host.invalid/a.png"])
def test_unreachable_host_mentions_being_offline(address):
    with pytest.raises(DownloadError, match=r"cannot be reached: .*is this machine offline\?"):
        load_image(private(address))


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[::1", "http://a b/", "http://x:99999/", "http://\x00/", "http://" + "a" * 100_000],
)
def test_malformed_address_is_rejected(address):
    with pytest.raises((ImageError, DownloadError)) as caught:
        load_image(address)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("address", "shown", "partial"),
    [
        ("http://example.org/a@b.png", "http://example.org/a@b.png", False),
        ("http://example.org:8080/a.png#mark", "http://example.org:8080/a.png", False),
        ("http://[2001:db8::1]:80/a.png", "http://[2001:db8::1]:80/a.png", False),
        ("https://me:SECRET@example.org/a.png", "https://example.org/a.png", False),
        ("https://SECRET@example.org", "https://example.org", False),
        ("https://example.org/a.png?token=SECRET&b", "https://example.org/a.png?...", True),
        ("https://example.org?SECRET", "https://example.org?...", True),
        ("https://example.org/a.png#SECRET?x", "https://example.org/a.png", False),
        # A password that may be unescaped is removed with everything up to the last at sign.
        ("http://me:SEC/RET@example.org/a.png", "http://.../example.org/a.png", True),
        ("http://me:1/SECRET@example.org/a.png", "http://.../example.org/a.png", True),
        ("http://me:SEC?RET@example.org/a.png", "http://.../example.org/a.png", True),
        ("http://me:SEC#RET@example.org/a.png?SECRET", "http://.../example.org/a.png?...", True),
        ("http://me:SEC@RE/T@example.org/a.png", "http://.../example.org/a.png", True),
        ("http://me:SECRET/a.png", "http://me:.../a.png", True),
        ("ftp://me:SECRET@example.org/a.png", "ftp://example.org/a.png", False),
        ("images/a@b?c.png", "images/a@b?c.png", False),
    ],
)
def test_secrets_are_removed_from_addresses(address, shown, partial):
    assert (without_secrets(address), is_redacted(shown)) == (shown, partial)
    assert without_secrets(shown) == shown
    assert (str(Address(address)), str(ImageError(address, "x"))) == (shown, f"{shown}: x")
    assert not re.search("SEC|RET", f"{Address(address)!r} {DownloadError(address, '')}")


@pytest.mark.parametrize(
    "address",
    [
        "http://me:SEC%2FRET@127.0.0.1:9/a.png?SECRET",
        "http://me:SEC/RET@127.0.0.1:9/a.png",
        "http://127.0.0.1:9/a.png?token=SECRET",
    ],
)
def test_errors_and_logs_show_no_secret(address, caplog):
    caplog.set_level("INFO")
    with pytest.raises((ImageError, DownloadError)) as caught:
        load_image(private(address))
    assert not re.search("SEC|RET", f"{caught.value} {caught.value.path} {caplog.text}")


def test_credentials_are_sent_but_not_logged(server, caplog):
    caplog.set_level("INFO")
    assert load_image(private(server.replace("//", "//me:a%2Fb@") + "/locked?token=SECRET")).size == (6, 4)
    assert "SECRET" not in caplog.text
    with pytest.raises(ImageError, match="answers 401"):
        load_image(private(f"{server}/locked"))


def test_redacted_address_is_not_fetched(server):
    with pytest.raises(ImageError, match="cannot be fetched again: its query or password was not stored"):
        load_image(private(str(private(f"{server}/image?token=SECRET"))))


# ------------------------------------------------------------------------------------------- private networks


# The third is 93.184.215.14 behind NAT64.
PUBLIC = ["93.184.215.14", "2606:2800:21f:cb07::1", "64:ff9b::5db8:d70e"]
# Among them the metadata service of clouds, 127.0.0.1 in 6to4 (2002:) and 10.0.0.1 behind NAT64 (64:ff9b:).
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "64:ff9b:1::1",
]  # fmt: skip


@pytest.mark.parametrize("ip", [*PUBLIC, *PRIVATE])
def test_is_public(ip):
    assert is_public(ip) is (ip in PUBLIC)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]"])
def test_private_address_is_rejected_before_any_request(host, server, requests):
    port = server.rpartition(":")[2]
    with pytest.raises(ImageError, match=r"private network.*unless allow_private_addresses=true"):
        load_image(f"http://{host}:{port}/image")
    assert not requests


def resolve(monkeypatch, names: dict[str, list[list[str]]]) -> None:
    """Resolve host names to these IP addresses: the first list at the first lookup, the last one from then on."""
    real = socket.getaddrinfo

    def fake_getaddrinfo(host, port, *args, **options):
        if host not in names:
            return real(host, port, *args, **options)
        numbers = names[host].pop(0) if len(names[host]) > 1 else names[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers]

    monkeypatch.setattr(socket, "getaddrinfo", fake_getaddrinfo)


def test_all_ip_addresses_of_a_host_must_be_public(server, requests, monkeypatch):
    port = server.rpartition(":")[2]
    resolve(monkeypatch, {"two.example": [["93.184.215.14", "127.0.0.1"]]})
    with pytest.raises(ImageError, match="private network"):
        load_image(f"http://two.example:{port}/image")
    assert not requests


def test_connection_uses_the_checked_ip_address(server, requests, monkeypatch):
    """DNS rebinding: the name is public when it is checked and private when it is connected to."""
    port = server.rpartition(":")[2]
    monkeypatch.setattr(network, "is_public", lambda number: number == "127.0.0.1")
    resolve(monkeypatch, {"rebinding.example": [["127.0.0.1"], ["127.0.0.2"]]})
    assert load_image(f"http://rebinding.example:{port}/image").size == (6, 4)
    assert requests == [f"rebinding.example:{port}"]


def test_redirect_target_is_checked(server, requests, monkeypatch):
    """One host name of this machine counts as public, the other as private."""
    port = server.rpartition(":")[2]
    monkeypatch.setattr(network, "is_public", lambda number: number == "127.0.0.1")
    resolve(monkeypatch, {"open.example": [["127.0.0.1"]], "inside.example": [["127.0.0.2"]]})
    with pytest.raises(ImageError, match="private network"):
        load_image(f"http://open.example:{port}/redirect?http://inside.example:{port}/image")
    assert requests == [f"open.example:{port}"]


def test_next_ip_address_is_tried_if_one_refuses(server, monkeypatch):
    port = server.rpartition(":")[2]
    resolve(monkeypatch, {"two.example": [["127.0.0.9", "127.0.0.1"]]})
    assert load_image(private(f"http://two.example:{port}/image")).size == (6, 4)


def test_proxy_receives_the_host_name(server, requests, monkeypatch):
    """The proxy may be in a private network; the requested host may not, if it resolves here."""
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setenv("no_proxy", "[::1],other.example")
    resolve(monkeypatch, {"public.example": [["93.184.215.14"]], "inside.example": [["10.0.0.1"]]})
    assert load_image("http://public.example/image").size == (6, 4)
    assert requests == ["public.example"]
    with pytest.raises(ImageError, match="private network"):
        load_image("http://inside.example/image")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("http_proxy", "socks5://127.0.0.1:9", "http_proxy cannot be used|cannot be reached"),
        ("SSL_CERT_FILE", "/no/such/file", "SSL_CERT_FILE cannot be used: /no/such/file: no such file"),
    ],
)
def test_bad_network_setting_is_named(name, value, message, server, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(DownloadError, match=message):
        load_image(private(f"{server}/image"))
