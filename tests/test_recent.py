"""The images asked about last: found by content, bounded in bytes, safe for threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import localization_heads as lh
from localization_heads.apps.terminal import start
from localization_heads.errors import UsageError
from localization_heads.lvlm.model import LVLM, ImageCache
from localization_heads.lvlm.sharing import EncodedImage
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.programs import ChatOptions
from localization_heads.stages.run import ChatRun

SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def asked(lvlm: LVLM) -> LVLM:
    """The embedded model with an empty memory."""
    twin = copy.copy(lvlm)
    twin.recent = ImageCache()
    return twin


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images that were read, in order."""
    original, sizes = EncodedImage._compute_prefix, []

    def spy(self: EncodedImage, depth: int) -> object:
        sizes.append(self.image.size)
        return original(self, depth)

    monkeypatch.setattr(EncodedImage, "_compute_prefix", spy)
    return sizes


def turned_images(image: Image.Image, count: int) -> list[Image.Image]:
    """Of one number of pixels, so that all take the same memory."""
    return [image.rotate(90 * n).resize((60 + n, 60)).crop((0, 0, 60, 60)) for n in range(count)]


def test_an_image_is_known_by_its_content(
    asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]
) -> None:
    """Opened anew, it is the same; one pixel changed, it is another; another prompt reads it anew."""
    (first,) = asked.ask(image, ["the dog"])
    (second,) = asked.ask(image.copy(), ["the dog"])
    np.testing.assert_array_equal(first.attention, second.attention)
    np.testing.assert_allclose(first.attention, asked.attend(image, "the dog").attention, **SAME)
    assert len(encoded) == 1
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    asked.ask(changed, ["the dog"])
    asked.prompted("plain").ask(image, ["the dog"])
    assert len(encoded) == 3
    assert asked.ask(image, ["the dog"])[0].prompt == first.prompt


def test_the_oldest_goes_when_the_bytes_are_full(
    asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]
) -> None:
    """Room for two: asking the first again keeps it, and the second makes way for the third."""
    one, two, three = turned_images(image, 3)
    asked.ask(one, ["the dog"])
    each = asked.recent.num_bytes
    asked.recent.max_bytes = int(2.5 * each)
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


def test_a_deeper_question_makes_an_image_grow(asked: LVLM, image: Image.Image) -> None:
    """What fits down to the first layer need not fit down to the last."""
    asked.ask(image, ["the dog"], last_layer=0)
    asked.recent.max_bytes = int(1.5 * asked.recent.num_bytes)
    asked.ask(image, ["the dog"], last_layer=0)
    assert len(asked.recent) == 1
    (maps,) = asked.ask(image, ["the dog"])
    assert len(asked.recent) == 0
    np.testing.assert_allclose(maps.attention, asked.attend(image, "the dog").attention, **SAME)


def test_no_memory_at_all(asked: LVLM, image: Image.Image) -> None:
    asked.recent.max_bytes = 0
    (maps,) = asked.ask(image, ["the dog"])
    assert len(asked.recent) == 0
    np.testing.assert_allclose(maps.attention, asked.attend(image, "the dog").attention, **SAME)
    with pytest.raises(UsageError, match="empty"):
        asked.ask(image, [""])


def test_threads_ask_right_while_images_come_and_go(asked: LVLM, image: Image.Image) -> None:
    """Few bytes, so that images come and go while others are asked."""
    few = turned_images(image, 3)
    asked.ask(few[0], ["the dog"])
    asked.recent.max_bytes = int(1.5 * asked.recent.num_bytes)
    expected = [asked.attend(image, "the dog").attention for image in few]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(n % 3, pool.submit(asked.ask, few[n % 3], ["the dog"])) for n in range(24)]
    for n, job in jobs:
        np.testing.assert_allclose(job.result()[0].attention, expected[n], **SAME)
    assert asked.recent.num_bytes <= asked.recent.max_bytes


def test_ground_reads_an_image_once(asked: LVLM, image: Image.Image, encoded: list[tuple[int, int]]) -> None:
    read_out = GroundingOptions()
    found = [
        lh.ground(asked, image, text, [lh.Head(3, 0)], options=read_out) for text in ("the dog", "a red car")
    ]
    assert len(encoded) == 1
    for grounding, text in zip(found, ("the dog", "a red car"), strict=True):
        maps = asked.attend(image, text)
        expected = lh.grounding.ground.ground_maps(maps, [lh.Head(3, 0)], read_out)
        np.testing.assert_allclose(grounding.box, expected.box, atol=1e-3)


def test_the_option_of_the_conversation() -> None:
    run = ChatRun(ChatOptions.of({"device": "cpu", "num_threads": 1, "picture_memory": 3}))
    assert start(run).lvlm.recent.max_bytes == 3 * 2**20
    with pytest.raises(UsageError, match="picture_memory=-1"):
        ChatOptions.of({"picture_memory": -1})
