"""Masks: valid ones agree with pycocotools, hostile ones are rejected."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco

from localization_heads.data.address import ImageError
from localization_heads.data.masks import MaskError, encode_mask, encode_mask_source, merge_masks, read_mask

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


@given(masks)
def test_rle_round_trip(mask):
    rle = encode_mask(mask)
    assert rle["size"] == list(mask.shape)
    assert isinstance(rle["counts"], str)
    np.testing.assert_array_equal(read_mask(rle, mask.shape[::-1]), mask)
    np.testing.assert_array_equal(coco.decode(rle).astype(bool), mask)


@given(masks)
def test_uncompressed_rle_is_decoded(mask):
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)) != 0)
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    np.testing.assert_array_equal(read_mask({"size": list(mask.shape), "counts": counts}, mask.shape[::-1]), mask)


@pytest.mark.parametrize("shape", [(4000, 5000), (1, 1)])
def test_rle_round_trip_at_extreme_sizes(shape):
    for mask in (np.zeros(shape, bool), np.ones(shape, bool)):
        np.testing.assert_array_equal(read_mask(encode_mask(mask), shape[::-1]), mask)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [3, 4], "counts": ""},
        {"size": [3, 4], "counts": "zzzzzzzz"},
        {"size": [3, 4], "counts": "=0"},
        {"size": [3, 4], "counts": "o" * 1000},
        {"size": [3, 4], "counts": "ooooooooooooO"},
        {"size": [3, 4], "counts": "\x00\x01"},
        {"size": [3, 4], "counts": "ü"},
        {"size": [3, 4], "counts": "0" * 100_000},
        {"size": [3, 4], "counts": [12, -1, 1]},
        {"size": [3, 4], "counts": [10**30]},
        {"size": [3, 4], "counts": [1.0, 11.0]},
        {"size": [3, 4], "counts": [True] * 12},
        {"size": [3, 4], "counts": [11]},
        {"size": [3, 4], "counts": None},
        {"size": [3, 4]},
        {"size": [0, 4], "counts": ""},
        {"size": [-3, -4], "counts": "<"},
        {"size": [2**40, 2**40], "counts": "<"},
        {"size": "34", "counts": "<"},
        {"counts": "<"},
    ],
)
def test_invalid_rle_is_rejected(rle):
    with pytest.raises(MaskError):
        read_mask(rle, (4, 3))


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=60))
def test_arbitrary_counts_decode_as_in_pycocotools_or_are_rejected(counts):
    try:
        mask = read_mask({"size": [5, 7], "counts": counts}, (7, 5))
    except MaskError:
        return
    np.testing.assert_array_equal(mask, coco.decode({"size": [5, 7], "counts": counts}).astype(bool))


SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]


@pytest.mark.parametrize(
    "polygons",
    [
        [SQUARE],
        SQUARE,
        [[1, 1], [4, 1], [4, 3], [1, 3]],
        [[[1, 1], [4, 1], [4, 3], [1, 3]]],
        [SQUARE, SQUARE],
    ],
)
def test_polygons_are_rasterised(polygons):
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(read_mask(polygons, (6, 5)), expected)


def test_merged_masks_are_the_union():
    """RLE and polygons; polygons alone stay polygons."""
    rle = encode_mask(np.eye(4, 6, dtype=bool))
    left, right = [[0, 0, 2, 0, 2, 2, 0, 2]], [4, 1, 6, 1, 6, 3, 4, 3]
    both = merge_masks([left, right])
    assert both == [*left, right]
    expected = read_mask(left, (6, 4)) | read_mask([right], (6, 4)) | np.eye(4, 6, dtype=bool)
    together = merge_masks([rle, left, [right]])
    assert (read_mask(together, (6, 4)) == expected).all()
    assert (read_mask(encode_mask_source(together, (6, 4)), (6, 4)) == expected).all()
    for count in (0, 101):
        with pytest.raises(MaskError, match=f"{count} masks: an expression has 1 to 100"):
            merge_masks([left] * count)
    with pytest.raises(MaskError, match="is 6 x 4 pixels, its image 5 x 4"):
        read_mask(together, (5, 4))


def test_polygons_are_united_quickly():
    """Merged one by one, these took half a minute."""
    y, x = np.divmod(np.arange(9900) * 7, 100)
    boxes = [[45 * int(i), int(j), 45 * int(i) + 45, int(j) + 1] for i, j in zip(x, y, strict=True)]
    expected = np.zeros((700, 4500), bool)
    for x0, y0, x1, y1 in boxes:
        expected[y0:y1, x0:x1] = True
    started = time.process_time()
    mask = read_mask([[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes], (4500, 700))
    assert time.process_time() - started < 5
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("far", [1e3, 1e7, -1e7])
def test_polygons_may_extend_past_the_image(far):
    assert read_mask([[-5, -5, 50, -5, 50, 50, -5, 50]], (6, 5)).all()
    read_mask([[0, 0, far, 0, far, far]], (6, 5))


@pytest.mark.parametrize("polygons", [[[0, 0, 9000, 9000] * 500], [[0.0, 0.0, 5.0, 5.0]] * 3, [SQUARE] * 10_001])
def test_polygons_that_need_too_much_memory_are_rejected(polygons):
    with pytest.raises(MaskError):
        read_mask(polygons, (8000, 8000))


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=12), min_size=1, max_size=3))
def test_arbitrary_polygons_give_a_mask_or_are_rejected(polygons):
    try:
        assert read_mask(polygons, (7, 5)).shape == (5, 7)
    except MaskError:
        assert any(len(polygon) % 2 for polygon in polygons)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_nonzero_pixels_of_a_png_are_the_mask(mode, tmp_path):
    expected = np.zeros((3, 4), bool)
    expected[1, 2] = True
    path = tmp_path / "mask.png"
    if mode == "P":
        image = Image.new("P", (4, 3))
        image.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is background whatever its colour
        image.putpixel((2, 1), 1)
    elif mode == "I;16":
        image = Image.fromarray(expected.astype(np.uint16))
    else:
        image = Image.fromarray(expected).convert(mode)
    image.save(path)
    np.testing.assert_array_equal(read_mask(path, (4, 3)), expected)


def test_png_of_another_size_is_rejected_before_decoding(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("RGB", (7000, 7000)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MaskError, match="the mask is 7000 x 7000 pixels, its image 4 x 3"):
        read_mask(path, (4, 3))


def test_png_is_decoded_in_strips(tmp_path, monkeypatch):
    expected = np.random.default_rng(0).random((9, 5)) > 0.5
    Image.fromarray(expected).convert("RGB").save(tmp_path / "mask.png")
    monkeypatch.setattr("localization_heads.data.images.STRIP_PIXELS", 11)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (5, 9)), expected)


def test_invalid_mask_file_is_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("a.png", "no.png"):
        with pytest.raises(ImageError):
            read_mask(tmp_path / name, (4, 3))
    Image.new("L", (4, 3)).save(tmp_path / "a.bmp")
    with pytest.raises(ImageError, match="PNG"):
        read_mask(tmp_path / "a.bmp", (4, 3))


def test_bool_array_is_a_mask():
    mask = np.eye(3, 4, dtype=bool)
    np.testing.assert_array_equal(read_mask(mask, (4, 3)), mask)
    with pytest.raises(MaskError, match="3 x 4 pixels, its image 4 x 3"):
        read_mask(mask.T, (4, 3))
