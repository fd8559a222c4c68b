"""Geometry of image tokens: LLaVA's against pixels traced through its processor, other families by hand.

`test_families` cannot check families whose processors need torchvision without it. Then views on a common grid:
attention is distributed over it without loss inside the image.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llava_processor

from localization_heads.errors import UsageError
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.families.geometry import ProcessedImage, View, check_shape, even_view, read_maps
from localization_heads.lvlm.families.table import views_of

SIZES = [(160, 90), (90, 160), (100, 100), (33, 200), (21, 13), (641, 480)]
LLAVA = SimpleNamespace(model_type="llava", image_token_id=4, vision_config=SimpleNamespace())


def grid_of(config: Any, image_processor: Any, num_tokens: int, size: tuple[int, int]) -> View:
    """The only view of an image with that many tokens."""
    inputs = {"input_ids": np.full((1, num_tokens), config.image_token_id)}
    (view,) = views_of(ProcessedImage(config, SimpleNamespace(image_processor=image_processor), inputs, 0, size))
    return view


def traced_cells(processor: Any, size: tuple[int, int], side: int) -> np.ndarray:
    """[side, side, 2] centre of each cell in original pixels, read from the processed image; NaN in the padding."""
    ip = processor.image_processor
    pixels = np.asarray(ip(images=[coordinate_image(*size)])["pixel_values"][0], np.float64)
    pixels = pixels * np.reshape(ip.image_std, (3, 1, 1)) + np.reshape(ip.image_mean, (3, 1, 1))
    pixels[:, pixels[2] < 0.99] = np.nan
    patch = pixels.shape[-1] // side
    cells = pixels[:2].reshape(2, side, patch, side, patch).mean((2, 4))
    return np.moveaxis(cells, 0, -1) * size


@pytest.mark.parametrize("mode", ["pad", "crop", "squeeze"])
@pytest.mark.parametrize("size", SIZES)
def test_cells_match_the_origin_of_their_pixels(mode: str, size: tuple[int, int]) -> None:
    processor, side = llava_processor(mode=mode, side=96), 12
    grid = grid_of(LLAVA, processor.image_processor, side * side, size)
    x0, y0, x1, y1 = grid.box
    cell_w, cell_h = (x1 - x0) / side, (y1 - y0) / side
    columns, rows = x0 + (np.arange(side) + 0.5) * cell_w, y0 + (np.arange(side) + 0.5) * cell_h
    expected = np.stack(np.broadcast_arrays(columns[None], rows[:, None]), -1)
    traced = traced_cells(processor, size, side)
    inside = np.isfinite(traced).all(-1)
    # Resizing blurs an image much smaller than the grid, which draws its outermost cells inwards.
    error = np.abs(traced - expected)[inside] / (cell_w, cell_h)
    assert inside.sum() >= side
    assert np.median(error) < 0.1
    assert np.quantile(error, 0.9) < 0.25


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("pad", (640, 480), (0, -80, 640, 560)),
        ("pad", (3, 6), (-1, 0, 5, 6)),  # LLaVA rounds an odd half down
        ("crop", (96, 48), (24, 0, 72, 48)),  # not resized
        ("crop", (192, 96), (48, 0, 144, 96)),
    ],
)
def test_padding_and_crop_by_hand(mode: str, size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert grid_of(LLAVA, llava_processor(mode=mode).image_processor, 36, size).box == box


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_padding_is_square_and_contains_the_image(width: int, height: int) -> None:
    x0, y0, x1, y1 = grid_of(LLAVA, llava_processor(mode="pad").image_processor, 36, (width, height)).box
    assert x1 - x0 == y1 - y0 == max(width, height)
    assert max(x0, y0) <= 0
    assert (x1, y1) >= (width, height)


def test_tokens_that_form_no_grid_are_refused() -> None:
    with pytest.raises(UsageError, match="square grid"):
        grid_of(LLAVA, llava_processor().image_processor, 35, (10, 10))


def test_pixtral_takes_any_shape() -> None:
    """Its model type is `llava`, but its processor resizes to a longest edge."""
    config, processor = SimpleNamespace(model_type="llava"), SimpleNamespace(size={"longest_edge": 1024})
    check_shape(config, processor, (60_000, 500))


TOKEN = 7


def views(
    config: dict[str, Any], image_processor: Any, ids: list[int], size: tuple[int, int], **inputs: Any
) -> dict[str, View]:
    words = {0: "text", TOKEN: "image", 1: "<|tile_x_separator|>", 2: "<|tile_y_separator|>"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda row: [words[i] for i in row])
    processor = SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
    rows = {"input_ids": np.array([ids]), **{name: np.array([row]) for name, row in inputs.items()}}
    image = ProcessedImage(SimpleNamespace(image_token_id=TOKEN, **config), processor, rows, 0, size)
    return {view.name: view for view in views_of(image)}


def test_kimi_pads_right_and_bottom() -> None:
    """100 x 50 in cells of 28, without resizing: four columns of 112 pixels, two rows of 56."""
    ip = SimpleNamespace(patch_size=14, merge_size=2, max_patches=16384, size={"max_height": 512})
    found = views({"model_type": "kimi_k25"}, ip, [0, *[TOKEN] * 8, 0], (100, 50), image_grid_thw=[1, 4, 8])
    assert found["whole"].box == (0, 0, 112, 56)
    assert found["whole"].index.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_kimi_shrinks_large_images() -> None:
    """200 x 100 to at most four patches of 14 a side: 56 x 28, which fills its cells."""
    ip = SimpleNamespace(patch_size=14, merge_size=2, max_patches=16384, size={"max_height": 4})
    found = views({"model_type": "kimi_k25"}, ip, [TOKEN] * 2, (200, 100), image_grid_thw=[1, 2, 4])
    assert found["whole"].box == pytest.approx((0, 0, 200, 100))


def test_mistral3_reads_the_resized_size() -> None:
    """56 x 84 pixels in cells of 28; line break tokens are not image tokens."""
    vision = SimpleNamespace(patch_size=14)
    config = {"model_type": "mistral3", "vision_config": vision, "spatial_merge_size": 2}
    found = views(config, None, [TOKEN] * 3 + [0] + [TOKEN] * 3 + [0], (90, 60), image_sizes=[56, 84])
    assert found["whole"].index.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert found["whole"].box == (0, 0, 90, 60)


def test_llama4_pads_its_tiles_right_and_bottom() -> None:
    """An image of 40 x 30 on two tiles of 28: it is shrunk to 37 x 28, the rest of the 56 is padding."""
    vision = SimpleNamespace(image_size=28, patch_size=7, pixel_shuffle_ratio=0.5)
    ip = SimpleNamespace(size={"height": 28, "width": 28}, resize_to_max_canvas=False)
    tile = [TOKEN] * 4
    ids = [*tile, 1, *tile, 2, *tile]  # left tile, right tile, thumbnail
    found = views({"model_type": "llama4", "vision_config": vision}, ip, ids, (40, 30))
    assert found["whole"].index.tolist() == [[10, 11], [12, 13]]
    assert found["tiles"].index.tolist() == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert found["tiles"].box == pytest.approx((0, 0, 56 * 40 / 37, 30))
    assert found["whole"].box == (0, 0, 40, 30)


WHOLE = even_view("whole", np.array([[0]]), (0, 0, 4, 2))
TILES = even_view("tiles", np.array([[2, 1]]), (0, 0, 4, 2))
ROW = np.array([[0.5, 0.3, 0.1]], np.float32)  # one head, three keys


def test_a_single_even_view_is_used_as_it_is() -> None:
    """Bit-identical, in the order of its index, padding included."""
    view = even_view("whole", np.array([[2, 0], [1, 3]]), (0, -1, 4, 3))
    row = np.random.default_rng(0).random((2, 3, 4), np.float32)
    maps, box = read_maps(row, [view], (4, 2))
    assert box == (0, -1, 4, 3)
    assert np.array_equal(maps, row[..., [2, 0, 1, 3]].reshape(2, 3, 2, 2))


def test_two_views_are_added() -> None:
    """Half of the whole's 0.5 is added to each of the tiles' 0.1 and 0.3."""
    maps, box = read_maps(ROW, [WHOLE, TILES], (4, 2))
    assert box == (0, 0, 4, 2)
    np.testing.assert_allclose(maps, [[[0.35, 0.55]]])


@pytest.mark.parametrize(
    ("views", "choice", "expected"),
    [
        ([WHOLE, TILES], "whole", [[[0.5]]]),
        ([WHOLE, TILES], "tiles", [[[0.1, 0.3]]]),
        ([WHOLE], "tiles", [[[0.5]]]),  # an image too small for tiles
    ],
)
def test_choice_of_a_view(views: list[View], choice: str, expected: list) -> None:
    np.testing.assert_allclose(read_maps(ROW, views, (4, 2), choice)[0], expected)


def test_uneven_cells_are_distributed_over_even_ones() -> None:
    """Columns of 1 and 3 pixels, on two of 2: a third of the wide one's 0.3 goes to the left."""
    view = View("tiles", np.array([[0, 1]]), np.array([0.0, 1, 4]), np.array([0.0, 2]))
    np.testing.assert_allclose(read_maps(ROW, [view], (4, 2))[0], [[[0.6, 0.2]]], rtol=1e-6)


def test_attention_outside_the_image_is_left_out() -> None:
    """Two columns of four pixels, the right one all padding: its 0.1 is dropped."""
    padded = even_view("tiles", np.array([[1, 2]]), (0, 0, 8, 2))
    maps, _ = read_maps(ROW, [WHOLE, padded], (4, 2))
    np.testing.assert_allclose(maps.sum(), 0.5 + 0.3, rtol=1e-6)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=3),
    st.integers(5, 50),
    st.integers(5, 50),
)
def test_attention_sum_is_preserved(grids: list[tuple[int, int]], width: int, height: int) -> None:
    """If all views lie inside the image, whatever their grids."""
    views, start = [], 0
    for h, w in grids:
        index = np.arange(start, start + h * w).reshape(h, w)
        views.append(even_view("tiles", index, (0, 0, width, height)))
        start += h * w
    row = np.random.default_rng(0).random(start).astype(np.float32)
    maps, _ = read_maps(row, views, (width, height))
    assert maps.sum() == pytest.approx(row.sum(), rel=1e-5)
