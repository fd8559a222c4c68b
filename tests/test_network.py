"""Proxy and certificate settings that prevent every connection are named, but only if a download needs them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import save_llava

import localization_heads as lh
from localization_heads.data.address import Address
from localization_heads.data.network import DownloadError, client_problem, download
from localization_heads.errors import WorkError
from localization_heads.lvlm.checkpoints import sources
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.segmentation.sam import FAMILIES, load_checkpoint

SETTINGS = {
    "ALL_PROXY": ("socks5://me:secret@localhost:1080", "ALL_PROXY cannot be used.*pip install socksio"),
    "https_proxy": ("socks5h://localhost:1080", "https_proxy cannot be used.*socks5h://.*socksio"),
    "no_proxy": ("localhost,::1,[::1]", r"no_proxy cannot be used: it holds '\[::1\]': write ::1, without"),
    "NO_PROXY": ("127.0.0.1,host:port", "NO_PROXY cannot be used: it holds 'host:port'"),
    "HTTPS_PROXY": ("http://me:secret@host:port", "HTTPS_PROXY cannot be used: it is not the address"),
    "HTTP_PROXY": ("ftp://me:secret@host:21", "HTTP_PROXY cannot be used: it is not the address"),
    "SSL_CERT_FILE": ("/no/such/certificates.pem", "SSL_CERT_FILE cannot be used: /no/such/.*no such file"),
    "SSLKEYLOGFILE": ("/no/such/folder/keys", "SSLKEYLOGFILE cannot be used: /no/such/.*no such folder"),
}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without proxy and certificate settings."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL"):
            monkeypatch.delenv(name)


@pytest.fixture(params=SETTINGS)
def message(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The expected message about a bad setting, which is made here; the hub is not in offline mode."""
    value, message = SETTINGS[request.param]
    monkeypatch.setenv(request.param, value)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    sources.hub_unreachable_reason.cache_clear()
    yield message
    sources.hub_unreachable_reason.cache_clear()


def test_bad_setting_is_named_when_an_image_is_downloaded(message: str) -> None:
    """no_proxy and the proxy of another scheme do not matter for a single image."""
    unused = "no_proxy" in message.lower() or "HTTP_PROXY" in message
    with pytest.raises(DownloadError, match="cannot be reached" if unused else message) as caught:
        download(Address("https://93.184.215.14/a.png"))
    assert "secret" not in str(caught.value)


def test_bad_setting_is_named_when_the_hub_is_needed(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for work in (
        lambda: load_model("nobody-at-all/no-such-model"),
        lambda: lh.load_heads("nobody-at-all/no-such-heads"),
        lambda: load_checkpoint(FAMILIES["sam"], "nobody-at-all/no-such-sam"),
    ):
        with pytest.raises(WorkError, match=message) as caught:
            work()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_cached_model_and_local_folder_need_no_network(
    message: str, tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client_problem()
    snapshot = tmp_path / "models--me--my-llava" / "snapshots" / ("a" * 40)
    save_llava(snapshot)
    (tmp_path / "models--me--my-llava" / "refs").mkdir()
    (tmp_path / "models--me--my-llava" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("me/my-llava", str(shutil.copytree(snapshot, tmp_path / "folder"))):
        assert load_model(name, device="cpu").attend(image, "the dog").attention.shape == (4, 4, 6, 6)


def test_valid_settings_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1,::1,.example.org,fe80::1,*.local,,10.0.0.0/8")
    monkeypatch.setenv("https_proxy", "host:3128")
    assert client_problem() is None
