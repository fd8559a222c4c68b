"""Encode once, ask many: the maps on a shared encoding equal those of single prompts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FAMILY_NAMES, tiny
from PIL import Image
from test_query_token import SPANLESS
from tiny_models import llava_model, llava_processor

from localization_heads.errors import OutOfMemoryError, UsageError
from localization_heads.lvlm import sharing
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.families.table import FAMILIES
from localization_heads.lvlm.forward.capture import decoder_layers
from localization_heads.lvlm.forward.prefix import max_shareable_length, why_not_shared
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import EncodedImage, prepare_unshared
from localization_heads.lvlm.text.prompts import locate_expression
from localization_heads.options.groups import ModelSpec

SAME = {"rtol": 0, "atol": 1e-5}
EXPRESSIONS = ["the red car", "the dog left in this image", "car", "the dog"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
UNSHARED = {"florence2", "inkling2", "inkling_mm_model", "paligemma", "paligemma2", "unlimited_ocr"}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_equals_single_prompts(name: str) -> None:
    lvlm, image = tiny(name), coordinate_image(190, 110)
    encoded = lvlm.encode_image(image)
    assert encoded.shares == (name not in UNSHARED)
    assert_equals_single_prompts(lvlm, encoded, image, EXPRESSIONS)


def assert_equals_single_prompts(
    lvlm: LVLM, encoded: EncodedImage, image: Image.Image, expressions: list[str], layer: int | None = None
) -> None:
    for expression, maps in zip(expressions, encoded.attend(expressions, last_layer=layer), strict=True):
        alone = lvlm.attend(image, expression, last_layer=layer)
        assert (maps.image_box, maps.prompt, maps.query) == (alone.image_box, alone.prompt, expression)
        np.testing.assert_allclose(maps.attention, alone.attention, **SAME)
        assert layer is None or not maps.attention[layer + 1 :].any()


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "idefics3", "gemma3", "mllama", "qwen3_5", "gemma4"])
@pytest.mark.parametrize("query_token", SPANLESS)
def test_every_query_token_equals_single_prompts(name: str, query_token: str) -> None:
    lvlm, image = copy.copy(tiny(name)), coordinate_image(110, 150)
    lvlm.query_token = query_token
    encoded = lvlm.encode_image(image)
    assert encoded.shares == (query_token != "answer_first")
    assert_equals_single_prompts(lvlm, encoded, image, EXPRESSIONS)


@pytest.mark.parametrize("mode", ["referseg", "chat", "plain"])
def test_every_template_equals_single_prompts(mode: str, image: Image.Image) -> None:
    """Also expressions that share letters with the stand-ins, and one so long that the others are padded."""
    lvlm = load_model(device="cpu", conv_mode=mode)
    asked = ["it", "it's 2", "a", "?", "the dog " * 30, "狗在左边"]
    encoded = lvlm.encode_image(image)
    assert encoded.shares
    assert_equals_single_prompts(lvlm, encoded, image, asked)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma4", "mllama", "qwen3_5"])
def test_a_deeper_layer_encodes_the_image_again(name: str) -> None:
    lvlm, image = tiny(name), coordinate_image(110, 150)
    first, last = min(lvlm.attention_modules), max(lvlm.attention_modules)
    encoded = lvlm.encode_image(image, last_layer=first)
    shallow = encoded.num_bytes
    for layer in (first, last, first):
        assert_equals_single_prompts(lvlm, encoded, image, EXPRESSIONS, layer)
    assert encoded.num_bytes > shallow or first == last


def count(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> list[int]:
    """A list with one item for each call."""
    original, calls = getattr(target, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, counted)
    return calls


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_the_image_is_processed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the image processor, the vision tower, and each layer of the language model."""
    lvlm, image = tiny(name), coordinate_image(110, 150)
    resized = count(monkeypatch, type(lvlm.processor.image_processor), "preprocess")
    seen = count(monkeypatch, lvlm.model.base_model, "get_image_features")
    read: list[tuple[int, int]] = []
    layer = decoder_layers(lvlm.model)[0]
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    try:
        encoded = lvlm.encode_image(image)
        encoded.attend(EXPRESSIONS)
        encoded.attend(["the left car"])
    finally:
        hook.remove()
    tokens = lvlm.model_inputs([image], [lvlm.prompt(EXPRESSIONS[0])])["input_ids"].shape[1]
    assert (len(resized), len(seen)) == (2, 1)  # the second is the line above
    (whole, ends, end) = read
    assert whole[0] == 1 and whole[1] > tokens - 10
    assert ends[0] == len(EXPRESSIONS) and ends[1] < 12
    assert end[0] == 1 and end[1] < 8


def test_early_exit_runs_no_later_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, image = tiny("gemma4"), coordinate_image(110, 150)
    later = count(monkeypatch, decoder_layers(lvlm.model)[2], "forward")
    head = count(monkeypatch, lvlm.model.lm_head, "forward")
    lvlm.encode_image(image, last_layer=1).attend(EXPRESSIONS, last_layer=1)
    assert (later, head) == ([], [])
    lvlm.encode_image(image).attend(EXPRESSIONS)
    assert (len(later), head) == (2, [])


def test_a_batch_encodes_each_repeated_image_once(
    lvlm: LVLM, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results, in their order, are those of single pairs."""
    other, third = image.rotate(180), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    images = [image, other, image, third, image, other]
    asked = ["the dog", "a red car", "the cat on the left", "the dog", "a house", "it"]
    encoded = count(monkeypatch, sharing.EncodedImage, "_compute_prefix")
    found = lvlm.attend_batch(images, asked)
    assert len(encoded) == 2
    for maps, image, expression in zip(found, images, asked, strict=True):
        assert maps.query == expression
        np.testing.assert_allclose(maps.attention, lvlm.attend(image, expression).attention, **SAME)
    assert np.abs(found[0].attention - found[3].attention).max() > 1e-4  # they are told apart


def test_a_prefix_that_reaches_into_an_expression_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a tokenizer merges characters across the expression's start."""
    monkeypatch.setattr(sharing, "STAND_INS", ("the red car in this", "the red car in image"))
    image = coordinate_image(110, 150)
    for name in ("llava", "qwen2_vl", "aya_vision", "gemma3", "gemma4", "mllama", "qwen3_5"):
        lvlm = copy.copy(tiny(name))
        for lvlm.query_token in ("last", "expression_mean"):
            asked = ["the red car in this image", "the dog", "the red car"]
            assert_equals_single_prompts(lvlm, lvlm.encode_image(image), image, asked)


def test_several_threads_ask_one_image(lvlm: LVLM, image: Image.Image) -> None:
    encoded = lvlm.encode_image(image, last_layer=1)
    asked = ["the dog", "a red car", "the cat on the left", "a house"] * 4
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(encoded.attend, [e, "it"], last_layer=n % 4) for n, e in enumerate(asked)]
    for n, (expression, job) in enumerate(zip(asked, jobs, strict=True)):
        alone = lvlm.attend(image, expression, last_layer=n % 4)
        np.testing.assert_allclose(job.result()[0].attention, alone.attention, **SAME)


def test_an_image_after_the_text_is_not_shared() -> None:
    lvlm = copy.copy(tiny("llava"))
    lvlm._locate_cached = lambda text, *_: locate_expression(f"{{}}. {lvlm.image_text} here".format, text)
    encoded = lvlm.encode_image(coordinate_image(110, 150))
    assert not encoded.shares
    assert_equals_single_prompts(lvlm, encoded, encoded.image, ["the dog"])


def test_why_an_image_is_not_shared() -> None:
    for name, word in (("paligemma", "bidirectional"), ("florence2", "encoder")):
        assert word in (tiny(name).why_not_shared or "")
    assert tiny("llava").why_not_shared is None


def test_rotary_scaling_limits_the_length_that_can_be_shared() -> None:
    """Up to the trained length, `dynamic` frequencies are those of no scaling, and `longrope` has its short factors."""
    config = copy.deepcopy(tiny("llava").model.config)
    assert max_shareable_length(config) == math.inf
    config.text_config.max_position_embeddings = 100
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "short_factor": [1.0, 0.5]}
    longrope["original_max_position_embeddings"] = 40
    for rope, longest in (
        (DYNAMIC, 99),
        (longrope | {"long_factor": [1.0, 0.25]}, 39),
        (longrope | {"long_factor": [1.0, 0.5]}, math.inf),
    ):
        config.text_config.rope_parameters = rope
        assert max_shareable_length(config) == longest
        assert why_not_shared(config) is None


@pytest.mark.parametrize(("kind", "trained"), [("dynamic", 1024), ("longrope", 30), ("longrope", 60)])
def test_rotary_scaling_below_the_trained_length_equals_single_prompts(
    kind: str, trained: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With InternVL 3's scaling and another. Prompts have 41 to 44 tokens: with a limit of 30, they are not shared."""
    factors = {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": trained,
    }
    rope = DYNAMIC if kind == "dynamic" else {**DYNAMIC, "rope_type": kind, **factors}
    model, processor = llava_model(rope_parameters=dict(rope)), llava_processor()
    lvlm = LVLM(model, processor, ModelSpec("scaled"), system="", conv_mode="plain")
    image, words = coordinate_image(110, 150), ["the dog", "the red car", "dog left in this image"]
    alone = [lvlm.attend(image, expression) for expression in words]
    asked: list[object] = []
    monkeypatch.setattr(sharing, "prepare_unshared", lambda *given: asked.append(given) or prepare_unshared(*given))
    encoded = lvlm.encode_image(image)
    assert encoded.shares
    for expression, one in zip(words, alone, strict=True):
        np.testing.assert_allclose(encoded.attend([expression])[0].attention, one.attention, **SAME)
    assert len(asked) == (3 if trained == 30 else 0)


def test_the_documentation_lists_the_families_that_cannot_share() -> None:
    """With the reasons of the table, word for word."""
    text = (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    section = text.partition("## One image, many expressions\n")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^- `(\w+)`: (.+)$", section, re.MULTILINE))
    reasons = {name: family.why_not_shared for name, family in FAMILIES.items() if family.why_not_shared}
    assert listed == reasons
    unshared = {tiny(name).model.config.model_type for name in UNSHARED}
    assert unshared == reasons.keys()


def test_unusable_expressions_are_refused(lvlm: LVLM, image: Image.Image) -> None:
    encoded = lvlm.encode_image(image)
    assert encoded.attend([]) == []
    with pytest.raises(UsageError, match="empty"):
        encoded.attend(["the dog", " "])
    with pytest.raises(UsageError, match="tokens with the image"):
        encoded.attend(["dog " * 5000])


@pytest.mark.parametrize("where", ["on_device", "capture_rows", "forward"])
def test_out_of_memory_names_the_remedies(
    lvlm: LVLM, image: Image.Image, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """On the way to the device, and in the model."""
    encoded = lvlm.encode_image(image)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lvlm.model.base_model if where == "forward" else LVLM, where, full)
    texts = ["the dog", "a car"]
    asked: list[Callable[[], object]] = [
        lambda: lvlm.attend_batch([image] * 2, texts),
        lambda: lvlm.attend_batch([image, image.copy()], texts),
        lambda: lvlm.attend(image, "the dog"),
        (lambda: lvlm.encode_image(image)) if where == "on_device" else lambda: encoded.attend(texts),
    ]
    for ask in asked:
        with pytest.raises(OutOfMemoryError, match="batch_size=auto"):
            ask()


def test_num_bytes_counts_the_kv_cache_and_the_pixels(lvlm: LVLM, image: Image.Image) -> None:
    encoded = lvlm.encode_image(image)
    text = lvlm.model.config.get_text_config()
    tokens = lvlm.model_inputs([image], [lvlm.prompt("the dog")])["input_ids"].shape[1]
    width = text.num_key_value_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    most = 2 * lvlm.num_layers * tokens * width * 4
    processed = lvlm.model_inputs([image], [lvlm.prompt("it")])["pixel_values"].nbytes
    pixels = processed + image.width * image.height * 3
    assert 0.9 * most < encoded.num_bytes - pixels < 1.1 * most


def test_boxes_of_a_downscaled_image_are_in_its_original_pixels(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    image = coordinate_image(80, 40)
    small = lvlm.attend(image.reduce(2), "the dog")
    monkeypatch.setattr("localization_heads.data.images.MAX_MODEL_PIXELS", 1000)
    words = ["the dog", "the cat"]
    for maps in (
        lvlm.attend(image, "the dog"),
        lvlm.attend_batch([image, image], words)[0],
        prepare_unshared(lvlm, [image, image], words)(None)[0],
        lvlm.encode_image(image).attend(words)[0],
    ):
        np.testing.assert_allclose(maps.attention, small.attention, **SAME)
        assert maps.image_size == (80, 40)
        assert maps.image_box == (0, -20, 80, 60)
    assert small.image_box == (0, -10, 40, 30)
