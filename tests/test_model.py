"""`LVLM`: one pair or many, early exit, precision, and where the grid lies in the image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_models import llava_model, llava_processor

from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec

EXPRESSIONS = ["the dog", "a red car on the left side of the very long street"]


def random_lvlm(mode: str) -> LVLM:
    """A random model whose processor crops, pads or squeezes."""
    return LVLM(llava_model(), llava_processor(mode=mode), ModelSpec("random"), system="", conv_mode="referseg")


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_maps_have_shape_type_range_and_texts(lvlm: LVLM, image: Image.Image) -> None:
    maps = lvlm.attend(image, " the\ndog ")
    assert maps.attention.shape == (lvlm.num_layers, lvlm.num_heads, *maps.grid)
    assert maps.attention.dtype == np.float32
    assert maps.attention.flags["C_CONTIGUOUS"]
    assert maps.attention.min() >= 0
    sums = maps.attention.sum((-2, -1))
    assert (sums > 0).all()
    assert (sums <= 1 + 1e-5).all()
    assert maps.image_size == image.size
    assert (maps.query, maps.model) == (" the\ndog ", "embedded")
    assert maps.prompt == lvlm.prompt("the dog")
    assert maps.prompt.endswith("the dog.")
    assert (maps.id, maps.image_file) == ("", "")


def test_a_padded_batch_equals_single_calls(lvlm: LVLM, image: Image.Image) -> None:
    images = [image, image.rotate(180).resize((70, 130))]
    batch = lvlm.attend_batch(images, EXPRESSIONS)
    for maps, image, expression in zip(batch, images, EXPRESSIONS, strict=True):
        alone = lvlm.attend(image, expression)
        np.testing.assert_allclose(maps.attention, alone.attention, rtol=0, atol=2e-5)
        assert (maps.image_box, maps.prompt) == (alone.image_box, alone.prompt)
    assert np.abs(batch[0].attention - batch[1].attention).max() > 1e-3


def test_maps_depend_on_expression_and_image_alone(lvlm: LVLM, image: Image.Image) -> None:
    first = lvlm.attend(image, "the dog").attention
    np.testing.assert_array_equal(first, lvlm.attend(image, "the dog").attention)
    assert np.abs(first - lvlm.attend(image, "What is on the left?").attention).max() > 1e-4
    assert np.abs(first - lvlm.attend(image.rotate(180), "the dog").attention).max() > 1e-4


@pytest.mark.parametrize("last", [0, 1, -2, -1])
def test_early_exit_gives_the_same_maps_and_then_zeros(lvlm: LVLM, image: Image.Image, last: int) -> None:
    last_layer = range(lvlm.num_layers)[last]
    full = lvlm.attend_batch([image, image], EXPRESSIONS)
    early = lvlm.attend_batch([image, image], EXPRESSIONS, last_layer=last_layer)
    for maps, whole in zip(early, full, strict=True):
        assert maps.attention.shape == whole.attention.shape
        np.testing.assert_array_equal(maps.attention[: last_layer + 1], whole.attention[: last_layer + 1])
        assert not maps.attention[last_layer + 1 :].any()


def test_half_precision_gives_about_the_same_sums(lvlm: LVLM, image: Image.Image) -> None:
    """bfloat16 gives about the same sums; the row itself is computed in fp32."""
    half = load_model(device="cpu", dtype="bfloat16").attend(image, "the dog").attention
    full = lvlm.attend(image, "the dog").attention
    assert half.dtype == np.float32
    difference = np.abs(half.sum((-2, -1)) - full.sum((-2, -1)))
    assert difference.max() > 0
    assert np.median(difference) < 0.02


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("pad", (100, 50), (0.0, -25.0, 100.0, 75.0)),
        ("pad", (50, 101), (-25.0, 0.0, 76.0, 101.0)),
        ("crop", (96, 48), (24.0, 0.0, 72.0, 48.0)),
        ("crop", (48, 144), (0.0, 48.0, 48.0, 96.0)),
        ("squeeze", (100, 50), (0.0, 0.0, 100.0, 50.0)),
    ],
)
def test_maps_have_the_processors_geometry(
    mode: str, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    maps = random_lvlm(mode).attend(noise(size), "the dog")
    assert maps.image_box == pytest.approx(box)
    assert maps.image_size == size


@pytest.mark.parametrize("mode", ["pad", "crop", "squeeze"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_images_have_cells_of_positive_size(mode: str, size: tuple[int, int]) -> None:
    maps = random_lvlm(mode).attend(noise(size), "the dog")
    assert np.isfinite(maps.attention).all()
    x0, y0, x1, y1 = maps.image_box
    assert x1 > x0
    assert y1 > y0


@pytest.mark.parametrize("size", [(60_000, 500), (1, 20_000_000)])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_extreme_aspect_ratios_are_refused(mode: str, size: tuple[int, int]) -> None:
    """Few pixels, but padding or resizing would make gigabytes of them: refused before that."""
    image = Image.new("L", size).convert("RGB")
    if mode == "crop" and size[0] == 60_000:
        assert random_lvlm(mode).attend(image, "the dog").image_size == size  # small once resized
        return
    with pytest.raises(UsageError, match=f"{size[0]} x {size[1]}.*too long and thin"):
        random_lvlm(mode).attend(image, "the dog")


def test_control_tokens_never_reach_the_model(lvlm: LVLM, image: Image.Image) -> None:
    """LLaVA's own placeholder is dropped; every other special token is refused."""
    assert lvlm.prompt("<image>\nthe dog") == lvlm.prompt("the dog")
    for token in set(lvlm.processor.tokenizer.all_special_tokens) - {"<image>"}:
        with pytest.raises(UsageError, match="control token"):
            lvlm.attend(image, f"the {token} dog")


@pytest.mark.parametrize("expression", ["🐕‍🦺🔥", "the dog " * 100, "狗在左边", "a\nb", "'; DROP TABLE heads; --", "-"])
def test_unusual_expressions_have_finite_maps(lvlm: LVLM, image: Image.Image, expression: str) -> None:
    maps = lvlm.attend(image, expression)
    assert np.isfinite(maps.attention).all()
    assert maps.query == expression


def test_each_conv_mode_has_its_own_prompt(image: Image.Image, lvlm: LVLM) -> None:
    chat, plain = (
        load_model(device="cpu", conv_mode=mode).attend(image, "the dog").prompt for mode in ("chat", "plain")
    )
    assert plain == f"{lvlm.image_token}\nthe dog."
    assert chat.count(lvlm.image_token) == 1
    assert "the dog." in chat
    with pytest.raises(UsageError, match="conv_mode=chat: random has no chat template"):
        random_lvlm("crop").chat_prompt("the dog")


def test_a_prompt_longer_than_the_context_is_refused(lvlm: LVLM, image: Image.Image) -> None:
    with pytest.raises(UsageError, match="tokens with the image"):
        lvlm.attend(image, "dog " * 5000)
