"""Families whose processors need torchvision, by hand: what `test_families` cannot check without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from localization_heads.lvlm.families import views_of
from localization_heads.lvlm.geometry import ProcessedImage, View

IMAGE = 7


def views(
    config: dict[str, Any], image_processor: Any, ids: list[int], size: tuple[int, int], **inputs: Any
) -> dict[str, View]:
    words = {0: "text", IMAGE: "image", 1: "<|tile_x_separator|>", 2: "<|tile_y_separator|>"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda row: [words[i] for i in row])
    processor = SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
    rows = {"input_ids": np.array([ids]), **{name: np.array([row]) for name, row in inputs.items()}}
    image = ProcessedImage(SimpleNamespace(image_token_id=IMAGE, **config), processor, rows, 0, size)
    return {view.name: view for view in views_of(image)}


def test_kimi_pads_right_and_below() -> None:
    """100 x 50 in cells of 28: four columns of 112 pixels, two rows of 56; nothing is resized."""
    ip = SimpleNamespace(patch_size=14, merge_size=2, max_patches=16384, size={"max_height": 512})
    found = views({"model_type": "kimi_k25"}, ip, [0, *[IMAGE] * 8, 0], (100, 50), image_grid_thw=[1, 4, 8])
    assert found["whole"].box == (0, 0, 112, 56)
    assert found["whole"].index.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_kimi_shrinks_large_images() -> None:
    """200 x 100 to at most four patches of 14 a side: 56 x 28, which fills its cells."""
    ip = SimpleNamespace(patch_size=14, merge_size=2, max_patches=16384, size={"max_height": 4})
    found = views({"model_type": "kimi_k25"}, ip, [IMAGE] * 2, (200, 100), image_grid_thw=[1, 2, 4])
    assert found["whole"].box == pytest.approx((0, 0, 200, 100))


def test_mistral3_reads_the_resized_size() -> None:
    """56 x 84 pixels in cells of 28; the tokens that break lines are none of the image's."""
    vision = SimpleNamespace(patch_size=14)
    config = {"model_type": "mistral3", "vision_config": vision, "spatial_merge_size": 2}
    found = views(config, None, [IMAGE] * 3 + [0] + [IMAGE] * 3 + [0], (90, 60), image_sizes=[56, 84])
    assert found["whole"].index.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert found["whole"].box == (0, 0, 90, 60)


def test_llama4_pads_its_tiles_right_and_below() -> None:
    """An image of 40 x 30 on two tiles of 28: it is shrunk to 37 x 28, the rest of the 56 is padding."""
    vision = SimpleNamespace(image_size=28, patch_size=7, pixel_shuffle_ratio=0.5)
    ip = SimpleNamespace(size={"height": 28, "width": 28}, resize_to_max_canvas=False)
    tile = [IMAGE] * 4
    ids = [*tile, 1, *tile, 2, *tile]  # left tile, right tile, thumbnail
    found = views({"model_type": "llama4", "vision_config": vision}, ip, ids, (40, 30))
    assert found["whole"].index.tolist() == [[10, 11], [12, 13]]
    assert found["tiles"].index.tolist() == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert found["tiles"].box == pytest.approx((0, 0, 56 * 40 / 37, 30))
    assert found["whole"].box == (0, 0, 40, 30)
