"""On a GPU: every family against eager attention, against the CPU, and single against batched maps."""

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
    """Without TF32, to which cuDNN rounds convolutions by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.empty_cache()


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> LVLM:
    on_cpu = tiny(name)
    model = copy.deepcopy(on_cpu.model).to(DEVICE, dtype)
    return LVLM(model, on_cpu.processor, on_cpu.spec, system="", conv_mode="plain")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_capture_equals_eager_on_a_gpu(name: str) -> None:
    assert capture_difference(on_gpu(name), SIZES["small"]) < 1e-4


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_maps_on_a_gpu_equal_those_on_a_cpu(name: str) -> None:
    """Single, batched, and for several expressions of an image encoded once."""
    gpu, cpu = on_gpu(name), tiny(name)
    images = [coordinate_image(150, 110), coordinate_image(110, 190), coordinate_image(64, 64)]
    together = gpu.attend_batch(images, EXPRESSIONS)
    for image, expression, batched in zip(images, EXPRESSIONS, together, strict=True):
        expected = cpu.attend(image, expression).attention
        np.testing.assert_allclose(gpu.attend(image, expression).attention, expected, rtol=0, atol=1e-3)
        np.testing.assert_allclose(batched.attention, expected, rtol=0, atol=1e-3)
    shared = gpu.encode_image(images[0]).attend(EXPRESSIONS)
    expected = cpu.attend(images[0], EXPRESSIONS[1]).attention
    np.testing.assert_allclose(shared[1].attention, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_capture_in_bfloat16_is_as_close_to_float32_as_eager(name: str) -> None:
    """The rounding error of 16 bits differs between kernels; the capture does not add to it."""
    exact, _ = captured_and_eager(on_gpu(name), SIZES["small"])
    captured, eager = captured_and_eager(on_gpu(name, torch.bfloat16), SIZES["small"])
    assert largest_difference(captured, exact) <= 2 * largest_difference(eager, exact) + 0.01


@pytest.mark.parametrize("query_token", SPANLESS)
def test_the_embedded_model_on_a_gpu_equals_that_on_a_cpu(image: Any, query_token: str) -> None:
    expected = load_model(device="cpu", query_token=query_token).attend(image, "the dog").attention
    found = load_model(device=DEVICE, query_token=query_token).attend(image, "the dog").attention
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
