"""ReasonSeg from LISA's folders, rasterised as in LISA, and from Parquet with masks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from localization_heads.cells import tight_box
from localization_heads.datasets.base import BadRecord, Record
from localization_heads.datasets.reasonseg import paint_shapes
from localization_heads.datasets.source import open_source
from localization_heads.errors import BadLineError, UsageError
from tests.dataset_files import RICKY, ricky_row, save_lisa, save_rows, shape

BIG = ((2, 2), (40, 2), (40, 30), (2, 30))
SMALL = ((10, 10), (20, 10), (20, 20), (10, 20))
ENTRY = {"text": ["what keeps one dry?", "the thing against rain"], "is_sentence": True, "shapes": []}


def entry(*shapes, **change):
    return {**ENTRY, "shapes": [shape(label, *points) for label, points in shapes], **change}


def lisa_mask(shapes, size):
    """A second implementation, LISA's script: 0 background, 1 target, 255 ignored."""
    cv2 = pytest.importorskip("cv2")
    width, height = size

    def paint(canvas, shape, value):
        points = np.array([shape["points"]], dtype=np.int32)
        cv2.polylines(canvas, points, True, value, 1)
        cv2.fillPoly(canvas, points, value)
        return canvas

    painted = [shape for shape in shapes if shape["label"].lower() != "flag"]
    areas = [paint(np.zeros((height, width), np.uint8), shape, 1).sum() for shape in painted]
    canvas = np.zeros((height, width), np.uint8)
    for index in np.argsort(areas)[::-1]:
        paint(canvas, painted[index], 255 if "ignore" in painted[index]["label"].lower() else 1)
    return canvas


CASES = {
    "one target": [("target", BIG)],
    "a hole that is ignored": [("ignore", SMALL), ("target", BIG)],
    "a target in an ignored region": [("target", SMALL), ("Ignore_region", BIG)],
    "flags paint nothing": [("Flag", BIG), ("target", SMALL)],
    "other labels are targets": [("umbrella", SMALL)],
    "two of equal area": [("ignore", SMALL), ("target", SMALL)],
    "truncated to whole pixels": [("target", ((2.9, 2.2), (40.7, 2.9), (40.1, 30.8), (2.6, 30.6)))],
    "past the image": [("target", ((-20, 10), (200, 10), (200, 30), (-20, 30)))],
    "no shape": [],
}


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
def test_shapes_are_painted_as_in_lisa(shapes):
    shapes = [shape(label, *points) for label, points in shapes]
    target, ignored = paint_shapes(shapes, (64, 48))
    expected = lisa_mask(shapes, (64, 48))
    np.testing.assert_array_equal(target, expected == 1)
    np.testing.assert_array_equal(ignored, expected == 255)


def test_random_polygons_are_painted_as_in_opencv():
    """Also where they extend past the image."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(1, 12)))
        radii = rng.uniform(1, 240, len(angles))
        points = [(160 + r * np.cos(a), 150 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]
        shapes = [shape("target", *points)]
        ours, theirs = paint_shapes(shapes, (320, 300))[0], lisa_mask(shapes, (320, 300)) == 1
        np.testing.assert_array_equal(ours, theirs)


def test_paint_shapes_by_hand():
    """A small ignored square on a large target is neither target nor background; outlines belong to a shape."""
    target, ignored = paint_shapes([shape("ignore", *SMALL), shape("target", *BIG)], (64, 48))
    assert target.sum() == 39 * 29 - 11 * 11
    assert ignored.sum() == 11 * 11 and not (target & ignored).any()
    assert tight_box(target) == (2.0, 2.0, 41.0, 31.0)
    assert tight_box(np.zeros((3, 3), bool)) is None


def test_shapes_are_clipped_to_the_image():
    shapes = [shape(label, *points) for label, points in [*CASES["past the image"], ("ignore", SMALL)]]
    whole = paint_shapes(shapes, (64, 48))
    assert whole[0].sum() == 64 * 21 - 11 * 11 and whole[1].sum() == 11 * 11


def test_painting_keeps_one_mask_in_memory():
    """Eighty masks of four megapixels would take 320 MB; the result is two."""
    shapes = [shape("target", (0, 0), (1999, 0), (1999, 1999), (n, 1999)) for n in range(80)]
    tracemalloc.start()
    target, ignored = paint_shapes(shapes, (2000, 2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
    assert not ignored.any() and target.all()


@pytest.mark.parametrize(
    "shapes",
    [
        [shape("target", (0, 0), (7999, 0), (7999, 7999), (0, 7999))] * 150,
        [shape("target", *[(0, 0), (60_000_000, 60_000_000)] * 10)],
        [shape("target", *[(0, 0), (1, 7999)] * 40_000)],
    ],
    ids=["many large shapes", "outlines far past the image", "many points in every row"],
)
def test_expensive_shapes_are_rejected(shapes):
    with pytest.raises(BadLineError, match="far more than an image of 8000 x 8000 pixels needs"):
        paint_shapes(shapes, (8000, 8000))


BAD_SHAPES = {
    "not a list": "abc",
    "not a list of dicts": ["abc"],
    "no label": [{"points": [[1, 2]]}],
    "no points": [{"label": "target", "points": []}],
    "a point of three": [{"label": "target", "points": [[1, 2, 3]]}],
    "a point of text": [{"label": "target", "points": [["1", 2]]}],
    "a huge coordinate": [{"label": "target", "points": [[1e300, 2]]}],
    "a point of NaN": [{"label": "target", "points": [[float("nan"), 2]]}],
    "a boolean coordinate": [{"label": "target", "points": [[True, 2]]}],
    "too many points": [{"label": "target", "points": [[1, 2]] * 100_001}],
    "too many shapes": [{"label": "target", "points": [[1, 2]]}] * 10_001,
}


@pytest.mark.parametrize("shapes", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_invalid_shapes_are_rejected(shapes):
    with pytest.raises(BadLineError):
        paint_shapes(shapes, (64, 48))


def records(path):
    source = open_source("reasonseg", path, None)
    index = source.index()
    return index, list(source.records(sorted({one.row for one in index.entries})))


def test_lisa_folders_are_read_by_split(tmp_path):
    root = tmp_path / "reason_seg" / "ReasonSeg"
    save_lisa(root / "train", "t1", entry(("target", BIG)))
    save_lisa(root / "val", "v1", entry(("target", BIG), ("ignore", SMALL)))
    save_lisa(root / "val", "v2", entry(("target", SMALL), text="one text", is_sentence=False))
    index, found = records(tmp_path)
    assert [(e.id, e.split, e.picture) for e in index.entries] == [
        ("t1_sent0", "train", "reasonseg:t1"),
        ("t1_sent1", "train", "reasonseg:t1"),
        ("v1_sent0", "val", "reasonseg:v1"),
        ("v2_sent0", "val", "reasonseg:v2"),
    ]
    assert index.entries[2].text == "what keeps one dry?"
    train, first, second = found
    assert train.ignore is None
    assert train.extra == {"is_sentence": True} and second.extra == {"is_sentence": False}
    assert first.ignore.sum() == 11 * 11 and first.box == (2.0, 2.0, 41.0, 31.0) and first.size == (64, 48)
    assert records(root / "val")[0].entries == [e._replace(row=n) for n, e in enumerate(index.entries[2:])]


def test_cp1252_files_are_read(tmp_path):
    save_lisa(tmp_path / "val", "a", entry(("target", BIG), text=["what\u2019s wet?"], encoding="cp1252"))
    index, _ = records(tmp_path)
    assert index.entries[0].text == "what\u2019s wet?"


def test_invalid_file_loses_only_itself(tmp_path):
    folder = tmp_path / "val"
    save_lisa(folder, "good", entry(("target", BIG)))
    (folder / "broken.json").write_text("{")
    (folder / "deep.json").write_text("[" * 10**5)
    (folder / "list.json").write_text("[]")
    save_lisa(folder, "no-text", entry(("target", BIG), text=[]))
    save_lisa(folder, "no-image", entry(("target", BIG)))
    (folder / "no-image.jpg").unlink()
    save_lisa(folder, "bad-shape", entry(shapes=[{"label": "target"}]))
    save_lisa(folder, "bad-image", entry(("target", BIG)))
    (folder / "bad-image.jpg").write_bytes(b"abc")
    index, found = records(tmp_path)
    assert {bad.id for bad in index.failures} == {"broken", "deep", "list", "no-text"}
    assert [type(one) for one in found] == [BadRecord, BadRecord, Record, BadRecord]
    assert "no such file" in found[3].reason


def test_empty_target_is_absent(tmp_path):
    save_lisa(tmp_path / "test", "a", entry(("ignore", BIG)))
    _, (found,) = records(tmp_path)
    assert found.absent and found.box is None and found.mask is None and found.ignore.any()


def test_invalid_text_loses_only_itself(tmp_path):
    save_lisa(tmp_path / "train", "a", entry(("target", BIG), text=["one", " ", "three", 4]))
    index, (found,) = records(tmp_path)
    assert [one.id for one in index.entries] == ["a_sent0", "a_sent2"] and isinstance(found, Record)
    assert [(bad.id, bad.split) for bad in index.failures] == [("a_sent1", "train"), ("a_sent3", "train")]


def test_parquet_masks_are_read(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random((48, 64)) > 0.5, rng.random((30, 20)) > 0.9, np.zeros((8, 9), bool)]
    rows = [ricky_row(f"img{n}", f"what is {n}?", mask, seed=n) for n, mask in enumerate(masks)]
    path = tmp_path / "ReasonSeg_test" / "data" / "test-00000-of-00001.parquet"
    save_rows(path, rows, RICKY, row_group_size=2)
    index, found = records(tmp_path / "ReasonSeg_test")
    assert [(e.id, e.split, e.picture, e.text) for e in index.entries[:2]] == [
        ("row0_sent0", "test", "reasonseg:img0", "what is 0?"),
        ("row1_sent0", "test", "reasonseg:img1", "what is 1?"),
    ]
    for record, mask in zip(found, masks, strict=True):
        assert record.size == mask.shape[::-1] and record.box == tight_box(mask)
        assert record.absent == (not mask.any())
        if mask.any():
            np.testing.assert_array_equal(record.mask, mask)


def test_parquet_split_is_taken_from_the_repository_name(tmp_path):
    rows = [ricky_row("a", "x", np.ones((4, 4), bool))]
    save_rows(tmp_path / "ReasonSeg_val" / "data" / "test-00000-of-00001.parquet", rows, RICKY)
    index, _ = records(tmp_path / "ReasonSeg_val")
    assert index.entries[0].split == "val"


BAD_ROWS = {
    "mask of another height": {"img_height": 7},
    "mask of another width": {"img_width": 7},
    "transposed mask": {"img_height": 2, "img_width": 8},
    "ragged mask": {"mask": [[True] * 4] * 3 + [[True] * 5]},
    "no mask": {"mask": None},
    "no image": {"image": None},
}


@pytest.mark.parametrize("change", BAD_ROWS.values(), ids=BAD_ROWS)
def test_invalid_row_loses_only_itself(tmp_path, change):
    good = ricky_row("a", "x", np.ones((4, 4), bool))
    save_rows(tmp_path / "test.parquet", [{**good, **change}, good], RICKY)
    _, (first, second) = records(tmp_path)
    assert isinstance(first, BadRecord) and isinstance(second, Record)


@pytest.mark.parametrize("change", [{"img_height": 10**9}, {"img_width": 0}, {"img_width": None}, {"text": " "}])
def test_row_with_an_invalid_size_or_text_is_not_indexed(tmp_path, change):
    good = ricky_row("a", "x", np.ones((4, 4), bool))
    save_rows(tmp_path / "test.parquet", [{**good, **change}, good], RICKY)
    index, _ = records(tmp_path)
    assert [bad.line for bad in index.failures] == [1] and len(index.entries) == 1


def test_masks_larger_than_their_images_are_rejected(tmp_path):
    """Run-length encoding stores a gigabyte of mask in a small file."""
    row = {**ricky_row("a", "x", np.ones((400, 400), bool)), "img_height": 4, "img_width": 4}
    save_rows(tmp_path / "test.parquet", [row], RICKY)
    with pytest.raises(UsageError, match="far more values than its images have pixels"):
        records(tmp_path)


def test_unrecognised_folder_is_reported(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="found images"):
        open_source("reasonseg", tmp_path, None)
