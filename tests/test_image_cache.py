"""The cache of encoded images: keyed by content, bounded in bytes, thread-safe."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import localization_heads as lh
from localization_heads.apps.terminal import start
from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.grounding.ground import ground_maps
from localization_heads.lvlm.image_cache import ImageCache
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import EncodedImage
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.programs import ChatOptions
from localization_heads.stages.run import ChatRun


@pytest.fixture
def asked(lvlm: LVLM) -> LVLM:
    """The embedded model with an empty cache of images."""
    twin = copy.copy(lvlm)
    twin.recent = ImageCache()
    return twin


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images that were encoded, in order."""
    original, sizes = EncodedImage._compute_prefix, []

    def spy(self: EncodedImage, depth: int) -> object:
        sizes.append(self.image.size)
        return original(self, depth)

    monkeypatch.setattr(EncodedImage, "_compute_prefix", spy)
    return sizes


def rotated_images(image: Image.Image, count: int) -> list[Image.Image]:
    """Different images with the same number of pixels, which take the same memory."""
    return [image.rotate(90 * n).resize((60 + n, 60)).crop((0, 0, 60, 60)) for n in range(count)]


def test_images_are_cached_by_their_content(asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]) -> None:
    """A copy is a cache hit; one changed pixel or another prompt is not."""
    (first,) = asked.ask(image, ["the dog"])
    (second,) = asked.ask(image.copy(), ["the dog"])
    np.testing.assert_array_equal(first.attention, second.attention)
    assert_attended(first, asked, image)
    assert len(encoded) == 1
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    asked.ask(changed, ["the dog"])
    asked.prompted("plain").ask(image, ["the dog"])
    assert len(encoded) == 3
    assert asked.ask(image, ["the dog"])[0].prompt == first.prompt


def assert_attended(maps: AttentionMaps, lvlm: LVLM, image: Image.Image) -> None:
    """The maps of "the dog" are those of `attend`, which uses no cache."""
    expected = lvlm.attend(image, "the dog").attention
    np.testing.assert_allclose(maps.attention, expected, rtol=0, atol=1e-5)


def test_the_least_recently_used_image_is_dropped(
    asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]
) -> None:
    """With room for two, asking the first again keeps it, and the third replaces the second."""
    one, two, three = rotated_images(image, 3)
    asked.ask(one, ["the dog"])
    asked.recent.max_bytes = int(2.5 * asked.recent.num_bytes)
    asked.ask(two, ["the dog"])
    asked.ask(one, ["a car"])
    asked.ask(three, ["the dog"])
    assert len(asked.recent) == 2
    assert asked.recent.num_bytes <= asked.recent.max_bytes
    assert len(encoded) == 3
    asked.ask(one, ["a house"])
    assert len(encoded) == 3
    asked.ask(two, ["a house"])
    assert len(encoded) == 4


def test_more_layers_make_an_image_too_large(asked: LVLM, image: Image.Image) -> None:
    """An image that fits up to the first layer need not fit up to the last."""
    asked.ask(image, ["the dog"], last_layer=0)
    asked.recent.max_bytes = int(1.5 * asked.recent.num_bytes)
    asked.ask(image, ["the dog"], last_layer=0)
    assert len(asked.recent) == 1
    (maps,) = asked.ask(image, ["the dog"])
    assert len(asked.recent) == 0
    assert_attended(maps, asked, image)


def test_max_bytes_0_caches_nothing(asked: LVLM, image: Image.Image) -> None:
    asked.recent.max_bytes = 0
    (maps,) = asked.ask(image, ["the dog"])
    assert len(asked.recent) == 0
    assert_attended(maps, asked, image)
    with pytest.raises(UsageError, match="empty"):
        asked.ask(image, [""])


def test_threads_may_share_the_cache(asked: LVLM, image: Image.Image) -> None:
    """With so little room that images are dropped while others are asked."""
    images = rotated_images(image, 3)
    asked.ask(images[0], ["the dog"])
    asked.recent.max_bytes = int(1.5 * asked.recent.num_bytes)
    with ThreadPoolExecutor(4) as pool:
        jobs = [(images[n % 3], pool.submit(asked.ask, images[n % 3], ["the dog"])) for n in range(24)]
    for one, job in jobs:
        assert_attended(job.result()[0], asked, one)
    assert asked.recent.num_bytes <= asked.recent.max_bytes


def test_ground_encodes_an_image_once(asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]) -> None:
    options, heads = GroundingOptions(), [lh.Head(3, 0)]
    boxes = {text: lh.ground(asked, image, text, heads, options=options).box for text in ("the dog", "a red car")}
    assert len(encoded) == 1
    for text, box in boxes.items():
        expected = ground_maps(asked.attend(image, text), heads, options)
        np.testing.assert_allclose(box, expected.box, atol=1e-3)


def test_picture_memory_sets_the_size_of_the_cache() -> None:
    run = ChatRun(ChatOptions.of({"device": "cpu", "num_threads": 1, "picture_memory": 3}))
    assert start(run).lvlm.recent.max_bytes == 3 * 2**20
    with pytest.raises(UsageError, match="picture_memory=-1"):
        ChatOptions.of({"picture_memory": -1})
