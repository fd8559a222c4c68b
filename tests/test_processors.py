"""Processors: missing settings are filled in, and images that they refuse are one-line errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import build, tiny
from family_recipes import RECIPES
from PIL import Image
from tiny_models import edit, llava_model, llava_processor, save_llava

import localization_heads as lh
from localization_heads.errors import OutOfMemoryError, UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.processors import check_image_sizes, fill_in_missing, use_pillow
from localization_heads.lvlm.checks.footprints import views_seen
from localization_heads.options.groups import ModelSpec

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def without(*names: str) -> Callable[[Path], None]:
    """Remove keys from the processor's file."""
    return lambda folder: edit(folder / "processor_config.json", lambda d: [d.pop(name) for name in names])


def old_layout(folder: Path, **changes: Any) -> None:
    """Only a `preprocessor_config.json`, with the image processor's settings."""
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "processor_config.json").unlink()


def oldest_layout(folder: Path) -> None:
    """As CLIP's feature extractors were saved: sizes are numbers, and no class is named."""
    old_layout(folder, size=48, crop_size=48, feature_extractor_type="CLIPFeatureExtractor")
    edit(folder / "preprocessor_config.json", lambda d: d.pop("image_processor_type"))


def no_padding(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda d: d.pop("pad_token"))


def no_padding_anywhere(folder: Path) -> None:
    no_padding(folder)
    edit(folder / "config.json", lambda d: [d["text_config"].pop("pad_token_id"), d.pop("pad_token_id", None)])


REMOVALS: dict[str, Callable[[Path], None]] = {
    "patch size and more": without(*LLAVA_SETTINGS),
    "extra tokens": without("num_additional_image_tokens"),
    "strategy": without("vision_feature_select_strategy"),
    "processor's file, old": lambda folder: old_layout(folder, processor_class="LlavaProcessor"),
    "processor's file, oldest": oldest_layout,
    "pad token": no_padding,
    "pad token everywhere": no_padding_anywhere,
}


@pytest.mark.parametrize("removed", REMOVALS)
def test_missing_settings_do_not_change_the_maps(removed: str, tmp_path: Path, image: Image.Image) -> None:
    """For two images in one batch, with padded prompts."""
    folder = save_llava(tmp_path / "model")
    REMOVALS[removed](folder)
    images, words = [image, image.copy()], ["the dog", "the red car left"]
    whole = load_model(str(save_llava(tmp_path / "whole")), device="cpu").attend_batch(images, words)
    for found, expected in zip(load_model(str(folder), device="cpu").attend_batch(images, words), whole, strict=True):
        np.testing.assert_allclose(found.attention, expected.attention, rtol=0, atol=1e-6)
        assert found.image_box == expected.image_box


def test_a_chat_template_saved_with_the_tokenizer_is_used(tmp_path: Path, image: Image.Image) -> None:
    by_tokenizer, by_processor = save_llava(tmp_path / "tokenizer"), save_llava(tmp_path / "processor")
    edit(by_tokenizer / "tokenizer_config.json", lambda d: d.update(chat_template=TEMPLATE))
    (by_processor / "chat_template.jinja").write_text(TEMPLATE)
    found, expected = (
        load_model(str(folder), device="cpu", conv_mode="chat").attend(image, "the dog")
        for folder in (by_tokenizer, by_processor)
    )
    assert found.prompt == expected.prompt == "USER: <image>\nthe dog. ASSISTANT:"
    np.testing.assert_array_equal(found.attention, expected.attention)


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "llava_next", "llava_onevision", "vipllava", "glm4v"])
def test_filled_in_settings_are_those_of_the_family(name: str) -> None:
    processor, model = build(RECIPES[name])
    names = [one for one in (*LLAVA_SETTINGS, "num_image_tokens") if hasattr(processor, one)]
    expected = {one: getattr(processor, one) for one in names}
    for one in names:
        setattr(processor, one, 0 if one.startswith("num_additional") else None)
    fill_in_missing(processor, model.config)
    assert {one: getattr(processor, one) for one in names} == expected


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llava", {"size": {"shortest_edge": 10**6}}, "size.shortest_edge=1e\\+06, more than 16,384 pixels"),
        ("llava", {"crop_size": {"height": 336, "width": 10**9}}, "crop_size.width=1e\\+09"),
        ("idefics3", {"size": {"longest_edge": 10**5}}, "size.longest_edge=1e\\+05"),
        (
            "qwen2_vl",
            {"size": {"shortest_edge": 10**10, "longest_edge": 10**10}},
            "more than 400,000,000 pixels",
        ),
    ],
)
def test_image_settings_that_would_exhaust_memory(name: str, settings: dict[str, Any], message: str) -> None:
    image_processor = build(RECIPES[name])[0].image_processor
    check_image_sizes(image_processor, "x")
    changed = type(image_processor)(**{**image_processor.to_dict(), **settings})
    with pytest.raises(UsageError, match=message):
        check_image_sizes(changed, "x")


def test_the_image_token_is_never_the_padding_token() -> None:
    processor, config = llava_processor(), llava_model().config
    processor.tokenizer = copy(processor.tokenizer)
    for index, expected in ((3, "<unk>"), (config.image_token_index, "</s>"), (10**9, "</s>")):
        processor.tokenizer.pad_token = None
        config.text_config.pad_token_id = config.pad_token_id = index
        fill_in_missing(processor, config)
        assert processor.tokenizer.pad_token == expected


THIN = Image.new("RGB", (900, 2))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_an_image_beyond_the_aspect_limit_is_refused(name: str, image: Image.Image) -> None:
    for ask in (
        lambda lvlm: lvlm.attend(THIN, "the dog"),
        lambda lvlm: lvlm.attend_batch([image, THIN], ["the dog"] * 2),
        lambda lvlm: lvlm.encode_image(THIN),
        lambda lvlm: lh.ground(lvlm, THIN, "the dog", heads=[(0, 0)]),
    ):
        with pytest.raises(UsageError, match=r"900 x 2.*aspect ratio must be smaller than 200") as caught:
            ask(tiny(name))
        assert "\n" not in str(caught.value)


def test_a_thin_image_has_no_tiles() -> None:
    """900 x 2 pixels on LLaVA-1.6: the tiles contain nothing but padding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        maps = tiny("llava_next").attend(THIN, "the dog")
    assert [view.name for view in views_seen(tiny("llava_next"), THIN)] == ["whole"]
    assert maps.attention.sum() > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava_onevision", "<video>"),
        ("qwen2_vl", "<|video_pad|>"),
        ("qwen2_vl", "<|image_pad|>"),
        ("internvl", "<video>"),
    ],
)
def test_media_tokens_in_an_expression_are_refused(name: str, text: str, image: Image.Image) -> None:
    with pytest.raises(UsageError, match="control token"):
        tiny(name).attend(image, f"the dog {text}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("no\nmore"), UsageError, r"the processor of x .*160 x 90 pixels.*: no$"),
        (TypeError(), UsageError, "TypeError"),
        (MemoryError(), OutOfMemoryError, "batch_size"),
    ],
)
def test_errors_of_a_processor_are_one_line(
    error: Exception, kind: type[Exception], message: str, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = load_model(device="cpu")
    monkeypatch.setattr(lvlm, "spec", ModelSpec("x"))

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(lvlm.processor), "__call__", failing)
    with pytest.raises(kind, match=message):
        lvlm.attend(image, "the dog")


def test_a_processor_of_another_model_is_refused(tmp_path: Path, image: Image.Image) -> None:
    """It makes more image tokens than the tower has features."""
    folder = save_llava(tmp_path)
    edit(folder / "processor_config.json", lambda d: d.update(patch_size=4))
    with pytest.raises(UsageError, match="do not match"):
        load_model(str(folder), device="cpu").attend(image, "the dog")
    assert torch.is_grad_enabled()


def test_pixels_do_not_depend_on_torchvision() -> None:
    """Image processors are replaced by those with Pillow, unless the family has none; settings are kept."""
    own = use_pillow(llava_processor().image_processor)
    assert use_pillow(own) is own
    for kind, form in (("CLIPImageProcessor", type(own)), ("FuyuImageProcessor", None), ("Novel", None)):
        torchvisions = type(kind, (), {"to_dict": lambda _: own.to_dict()})()
        found = use_pillow(torchvisions)
        assert type(found) is (form or type(torchvisions))
        assert found.to_dict() == own.to_dict()
