"""Shared fixtures. Nothing here or below needs a network: the hub is switched off before transformers loads."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; Ctrl-C is tested here
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from chromium import Browser, browser
from front import Calls, Front, fronts
from hypothesis import HealthCheck, settings
from PIL import Image

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.model import LVLM
from localization_heads.options import compose

# A busy machine is no fault: no test fails because an example, or drawing it, took long.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _composed_with_less() -> None:
    """A process composes options once, and here a thousand times: Hydra is told anew only of another program."""
    register, registered = compose.register, [""]

    def register_another(program: str) -> None:
        if registered[-1] != program:
            register(program)
            registered.append(program)

    compose.register = register_another


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Several test processes share the cores, and the models are too small to share out."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lvlm() -> LVLM:
    """The embedded model. Tests must not change it."""
    return load_model(device="cpu")


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """A wide image of smooth noise: every patch differs from the next."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 90), Image.Resampling.BICUBIC)


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """`caplog` with the package's records, even after a command has stopped them from propagating."""
    monkeypatch.setattr(logging.getLogger("localization_heads"), "propagate", True)
    return caplog


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Front]:
    """The commands in an empty folder."""
    yield from fronts(tmp_path, monkeypatch, capsys)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()
    original = LVLM.attend_batch

    def spy(self: LVLM, images: Any, expressions: Any, **options: Any) -> Any:
        if len(seen) == seen.fail_at:
            raise KeyboardInterrupt
        seen.append(list(expressions))
        return original(self, images, expressions, **options)

    monkeypatch.setattr(LVLM, "attend_batch", spy)
    return seen


@pytest.fixture
def endless() -> Iterator[Any]:
    """Makes a model answer until it is stopped; afterwards it ends its answers as before."""
    changed: list[tuple[Any, Any]] = []

    def never_end(model: Any) -> None:
        changed.append((model.generation_config, model.generation_config.eos_token_id))
        model.generation_config.eos_token_id = None

    yield never_end
    for config, tokens in changed:
        config.eos_token_id = tokens


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as page:
        yield page
