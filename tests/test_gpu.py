"""On a GPU: every family against eager attention, against the CPU, and one by one against many at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FAMILY_NAMES, tiny
from test_families import SIZES, capture_difference, captured_and_eager, largest_difference
from test_query_token import SPANLESS

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.model import LVLM

DEVICE = "cuda"
EXPRESSIONS = ["the red car", "the dog left in this image", "car"]

if not torch.cuda.is_available():
    pytest.skip("no GPU on this machine", allow_module_level=True)


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions round to 19 bits on a GPU unless they are told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.empty_cache()


def moved(name: str, dtype: torch.dtype = torch.float32) -> LVLM:
    there = tiny(name)
    model = copy.deepcopy(there.model).to(DEVICE, dtype)
    return LVLM(model, there.processor, there.spec, system="", conv_mode="plain")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_capture_equals_eager_on_a_gpu(name: str) -> None:
    assert capture_difference(moved(name), SIZES["small"]) < 1e-4


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_gpu_sees_what_a_cpu_sees(name: str) -> None:
    """One by one, several images in a batch, and several expressions of an image encoded once."""
    here, there = moved(name), tiny(name)
    images = [coordinate_image(150, 110), coordinate_image(110, 190), coordinate_image(64, 64)]
    together = here.attend_batch(images, EXPRESSIONS)
    for image, expression, batched in zip(images, EXPRESSIONS, together, strict=True):
        expected = there.attend(image, expression).attention
        np.testing.assert_allclose(here.attend(image, expression).attention, expected, rtol=0, atol=1e-3)
        np.testing.assert_allclose(batched.attention, expected, rtol=0, atol=1e-3)
    shared = here.encode_image(images[0]).attend(EXPRESSIONS)
    expected = there.attend(images[0], EXPRESSIONS[1]).attention
    np.testing.assert_allclose(shared[1].attention, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_capture_in_bfloat16_is_as_close_to_float32_as_eager(name: str) -> None:
    """What 16 bits do to these sharp heads differs from kernel to kernel; the capture adds nothing to it."""
    exact, _ = captured_and_eager(moved(name), SIZES["small"])
    captured, eager = captured_and_eager(moved(name, torch.bfloat16), SIZES["small"])
    assert largest_difference(captured, exact) <= 2 * largest_difference(eager, exact) + 0.01


@pytest.mark.parametrize("query_token", SPANLESS)
def test_the_embedded_model_on_a_gpu_is_that_on_a_cpu(image: Any, query_token: str) -> None:
    on_cpu = load_model(device="cpu", query_token=query_token).attend(image, "the dog").attention
    on_gpu = load_model(device=DEVICE, query_token=query_token).attend(image, "the dog").attention
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3)
