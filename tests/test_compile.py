"""Models under special conditions: compiled, in 16 or fewer bits, in several threads, in mixed batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_query_token import tiny_lvlm
from transformers.utils import is_bitsandbytes_available

from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.spec import find_spec

EXPRESSIONS = ["the dog", "the left red dog , this car", "car.", "this image"]


@pytest.fixture
def images() -> list[Image.Image]:
    """Wide, tall, small and square."""
    sizes = [(160, 90), (70, 200), (20, 31), (64, 64)]
    noise = np.random.default_rng(1)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture
def _quiet_compiler() -> Iterator[None]:
    """Silence the reports of graph breaks, which are expected."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    logger.setLevel(level)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="transformers asks torch 2.7 for it")
@pytest.mark.usefixtures("_quiet_compiler")
def test_compiled_language_model(image: Any) -> None:
    """Partial graphs, compiled before the first capture: without a capture, with one, and with early exit."""
    lvlm = tiny_lvlm("expression_mean")
    decoder = lvlm.model.get_decoder()
    decoder.layers = decoder.layers[:2]  # compiling is slow
    plain = lvlm.attend(image, "the red car").attention
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the red car")])
    with torch.inference_mode():
        logits = lvlm.model(**inputs).logits
        decoder.compile(backend="eager")
        assert torch.equal(lvlm.model(**inputs).logits, logits)
    np.testing.assert_allclose(lvlm.attend(image, "the red car").attention, plain, rtol=0, atol=1e-6)
    early = lvlm.attend(image, "the red car", last_layer=0).attention
    np.testing.assert_allclose(early[0], plain[0], rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(lvlm.model(**inputs).logits, logits)


def in_four_threads(work: Callable[[int], None]) -> None:
    """Run `work(0)` to `work(3)` at the same time."""
    barrier = threading.Barrier(4)

    def together(index: int) -> None:
        barrier.wait()
        work(index)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(together, range(4)))


@pytest.mark.parametrize("query_token", ["last", "expression_mean", "answer_first"])
def test_one_model_in_several_threads(images: list[Image.Image], query_token: str) -> None:
    lvlm = tiny_lvlm(query_token)
    expected = [lvlm.attend(*pair).attention for pair in zip(images, EXPRESSIONS, strict=True)]

    def work(index: int) -> None:
        for _ in range(8):
            found = lvlm.attend(images[index], EXPRESSIONS[index]).attention
            np.testing.assert_allclose(found, expected[index], rtol=0, atol=1e-5)

    in_four_threads(work)


def test_tokenizing_in_several_threads(image: Any) -> None:
    """Tokenizers store padding options as state, which concurrent threads would overwrite."""
    lvlm = tiny_lvlm("expression_mean")
    prompts = [lvlm.located_prompt("the red car , " * 200 + "the dog"), lvlm.located_prompt("the dog")]

    def work(_: int) -> None:
        for _ in range(30):
            inputs = lvlm.model_inputs([image] * 2, [prompt.text for prompt in prompts])
            assert lvlm.query(prompts, inputs).positions is not None

    in_four_threads(work)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("query_token", ["last", "expression_mean"])
def test_sixteen_bits_give_similar_rows(image: Any, dtype: str, query_token: str) -> None:
    """Computed in fp32 from 16-bit queries and keys; they still sum to at most one."""
    exact = load_model(dtype="float32", device="cpu", query_token=query_token).attend(image, "the dog")
    rough = load_model(dtype=dtype, device="cpu", query_token=query_token).attend(image, "the dog")
    assert rough.attention.dtype == np.float32
    assert rough.attention.sum((-2, -1)).max() <= 1 + 1e-3
    np.testing.assert_allclose(rough.attention, exact.attention, rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_four_and_eight_bits_give_correlated_rows(image: Any, bits: str, tmp_path: Path) -> None:
    """Quantized on loading, and from a folder saved quantized, without upcasting."""
    if not is_bitsandbytes_available():
        with pytest.raises(UsageError, match="quantization"):
            load_model(quantization=bits)
        pytest.skip("bitsandbytes is not installed: only its absence was tested")
    exact = load_model(device="cpu", conv_mode="plain").attend(image, "the dog").attention
    few = load_model(replace(find_spec("tiny"), quantization=bits), conv_mode="plain")
    rough = few.attend(image, "the dog").attention
    assert np.isfinite(rough).all()
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.8
    few.model.save_pretrained(tmp_path)
    few.processor.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), conv_mode="plain")
    kinds = [[p.dtype for _, p in sorted(one.model.named_parameters())] for one in (few, again)]
    assert kinds[0] == kinds[1]
    assert {torch.uint8, torch.int8} & set(kinds[1])
    saved = few.attend(image, "the dog").attention  # bitsandbytes rounds its scales when they are saved
    np.testing.assert_allclose(again.attend(image, "the dog").attention, saved, rtol=0, atol=1e-5)
