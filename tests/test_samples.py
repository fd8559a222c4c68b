"""Data files: valid lines become samples, and every kind of invalid line an error with its line number."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from localization_heads.data.address import Address
from localization_heads.data.box_scale import (
    MAX_HEADERS_READ,
    TrueBox,
    check_box_scale,
    collect_true_boxes,
    find_scale_problem,
)
from localization_heads.data.images import load_image
from localization_heads.data.lines import MAX_LINE_BYTES, check_box
from localization_heads.data.samples import Sample, decode_mask, load_samples, load_visualization_entries
from localization_heads.errors import BadLineError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with `images/cat.png`, and a folder `sets/` with other images."""
    for name in ("images/cat.png", "sets/dog.png", "sets/images/cat.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(**changes):
    entry = {"id": "a", "prompt": "the cat", "image_path": "images/cat.png", **changes}
    return json.dumps({key: value for key, value in entry.items() if value is not ...})


def write(folder, *lines, name="sets/data.jsonl"):
    path = folder / name
    content = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in lines)
    path.write_bytes(content)
    return path


def test_minimal_line_becomes_a_sample(folder):
    loaded = load_samples(
        write(folder, '{"id": "example_1", "prompt": "What is in this image?", "image_path": "images/cat.png"}')
    )
    assert loaded.bad == []
    assert loaded.entries == [
        Sample(image=Path("images/cat.png"), expression="What is in this image?", id="example_1", line=1)
    ]
    assert loaded.entries[0].image_file == "images/cat.png"


def test_paths_resolve_against_working_directory_then_data_file(folder):
    path = write(
        folder,
        line(id="1"),
        line(id="2", image_path="dog.png"),
        line(id="3", image_path=str(folder / "images/cat.png")),
    )
    images = [sample.image for sample in load_samples(path).entries]
    assert images == [Path("images/cat.png"), folder / "sets/dog.png", folder / "images/cat.png"]


def test_ground_truth_and_addresses_are_read(folder):
    runs = {"size": [3, 4], "counts": [6, 6]}
    path = write(
        folder,
        line(id="1", image_path="https://example.org/a.png", bbox=[0, 1.5, 2, 3], mask=runs),
        line(id="2", mask=[[0, 0, 4, 0, 4, 3]]),
        line(id="3", mask="dog.png", bbox=None, extra="ignored"),
    )
    loaded = load_samples(path)
    assert not loaded.bad
    first, second, third = loaded.entries
    assert first.image == Address("https://example.org/a.png")
    assert (first.bbox, first.mask) == ((0.0, 1.5, 2.0, 3.0), runs)
    allowed = load_samples(path, allow_private_addresses=True).entries[0]
    assert allowed.image == Address("https://example.org/a.png", allow_private=True)
    assert second.mask == [[0.0, 0.0, 4.0, 0.0, 4.0, 3.0]]
    assert third.mask == folder / "sets/dog.png"
    assert third.bbox is None


def test_absent_and_multiple_targets_are_read(folder):
    absent, several = load_samples(
        write(folder, line(id="1", bbox=None, absent=True), line(id="2", bboxes=[[0, 0, 1, 1], [1, 1, 2, 3]]))
    ).entries
    assert absent.absent and not absent.has_truth and absent.true_boxes == ()
    assert several.has_truth and several.true_boxes == ((0, 0, 1, 1), (1, 1, 2, 3))
    with pytest.raises(UsageError, match="marked absent but has a true box or mask"):
        Sample("cat.png", "the cat", bbox=(0, 0, 1, 1), absent=True)


def test_masks_of_several_targets_are_merged(folder):
    first, second = [[0, 0, 2, 0, 2, 2, 0, 2]], {"size": [3, 4], "counts": [11, 1]}
    read = load_samples(
        write(
            folder,
            line(id="1", bboxes=[[0, 0, 2, 2], [3, 2, 4, 3]], masks=[first, second]),
            line(id="2", mask=first, masks=[first]),
            line(id="3", masks="all"),
            line(id="4", masks=[]),
            line(id="5", masks=[first], absent=True, bbox=None),
        )
    )
    (sample,) = read.entries
    assert decode_mask(sample, (4, 3)).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    assert "masks" not in sample.facts
    messages = [
        "'mask' and 'masks'",
        "one mask for each object",
        "0 masks: an expression has 1 to 100",
        "but there is 'masks'",
    ]
    assert all(part in bad.reason for part, bad in zip(messages, read.bad, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + line().encode() + b"\n",
        line().encode() + b"\r\n",
        b"\r\n\n   \n" + line().encode(),
        line(prompt="the cat\u2028sat").encode(),
    ],
)
def test_bom_line_endings_and_blank_lines_are_ignored(content, folder):
    loaded = load_samples(write(folder, content))
    assert len(loaded.entries) == 1
    assert not loaded.bad


BAD_LINES = [
    ("nonsense", "not JSON"),
    ('{"id": "a"', "not JSON"),
    (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b'{"prompt": "\xe9"}', "not UTF-8"),
    ("[1, 2]", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ("null", "not a JSON object"),
    ("[" * 200_000, "deep"),
    ('{"a":' * 100_000, "deep"),
    ('{"id": NaN}', "NaN"),
    ('{"id": 1e999}', "1e999 is too large"),
    ('{"bbox": [0, 0, Infinity, 1]}', "Infinity"),
    ('{"id": ' + "9" * 5000 + "}", "not usable JSON"),
    (line(prompt=...), "'prompt' is missing"),
    (line(prompt=..., query="the cat"), r"'prompt' is missing \(it has 'query'\)"),
    (line(prompt=""), "'prompt' is empty"),
    (line(prompt=" \n"), "'prompt' is empty"),
    (line(prompt=5), "'prompt' must be text"),
    (line(prompt=["a"]), "'prompt' must be text"),
    (line(prompt="\ud800"), "Unicode"),
    (line(image_path=...), "'image_path' is missing"),
    (line(image_path=..., image="x"), r"it has 'image'"),
    (line(image_path=True), "'image_path' must be text"),
    (line(image_path="no.png"), "no.png: no such file"),
    (line(image_path="images"), "is a folder"),
    (line(image_path="images/cat.png/x"), "no such file"),
    (line(image_path="a\0b"), "NUL"),
    (line(image_path="a\nb\x1b[31m"), "no such file"),
    (line(image_path="n" * 5000), "too long|no such file"),
    (line(image_path="file:///etc/passwd"), "neither a path nor"),
    (
        line(image_path="ftp://me:pass/word@example.org/a.png"),
        r"^'ftp://.../example.org/a.png' is neither a path nor",
    ),
    (line(image_path="\ud800"), "Unicode"),
    (line(id="../x"), "separator|dot"),  # other ids: test_store.py
    (line(id=""), "empty"),
    (line(id=True), "'id' must be"),
    (line(id=["a"]), "'id' must be"),
    (line(bbox=[1, 2, 3]), "'bbox' has length 3"),  # other boxes: test_sample_rejects_invalid_boxes
    ('{"bbox": ' + "[" * 900 + "]" * 900 + ", " + line()[1:], "'bbox' has length 1"),
    (line(bbox=[0, 0, 10**400, 4]), "'bbox'"),
    (line(absent=1), "'absent' must be true or false"),
    (line(absent=True, bbox=[0, 0, 1, 1]), "'absent' is true but there is 'bbox'"),
    (line(absent=True, mask=[[0, 0, 4, 0, 4, 3]]), "'absent' is true but there is 'mask'"),
    (line(bboxes=[]), "'bboxes' must be a list of boxes"),
    (line(bboxes=[[0, 0, 1, 1], [3, 0, 3, 4]]), "'bboxes', number 2: 'bbox' is empty"),
    (line(mask=5), "the mask must be"),
    (line(mask=[]), "the mask must be"),
    (line(mask={}), "'size'"),
    (line(mask={"size": [3, 4]}), "'counts'"),
    (line(mask={"size": [3], "counts": ""}), "'size'"),
    (line(mask={"size": [3, True], "counts": ""}), "'size'"),
    (line(mask={"size": [10**6, 10**6], "counts": ""}), "over the limit"),
    (line(mask=[[1, 2, 3, 4]]), "three points"),
    (line(mask=[[1, 2, 3, 4, 5, 6, 7]]), "three points"),
    (line(mask=[[1, 2, 3, 4, 5, "6"]]), "not a coordinate"),
    (line(mask=[[1, 2, 3, 4, 5, None]]), "not a coordinate"),
    (line(mask=[["abcdef"]]), "polygon"),
    (line(mask=["abcdef"]), "polygon"),
    (line(mask="no.png"), "no.png: no such file"),
    (line(mask=""), "no such file|folder|not"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_invalid_line_is_reported_and_the_others_are_read(bad, message, folder):
    loaded = load_samples(write(folder, line(id="first"), "", bad, line(id="last")))
    assert [sample.id for sample in loaded.entries] == ["first", "last"]
    (entry,) = loaded.bad
    assert entry.line == 3 and str(entry).startswith("line 3") and str(entry).isprintable()
    assert re.search(message, entry.reason) and len(entry.reason) < 500, entry.reason


def test_overlong_line_is_skipped(folder):
    long = line(prompt="a" * (3 * MAX_LINE_BYTES))
    loaded = load_samples(
        write(folder, long, line(id="2"), long, line(prompt="b" * (MAX_LINE_BYTES // 2), id="4"), long)
    )
    assert [(sample.id, sample.line) for sample in loaded.entries] == [("2", 2), ("4", 4)]
    assert [(bad.line, bad.reason) for bad in loaded.bad] == [(n, "the line is longer than 1 MB") for n in (1, 3, 5)]


@pytest.mark.parametrize(
    ("name", "message"), [("no.jsonl", "no such file"), ("sets", "is a folder"), ("a\0b", "no such|null")]
)
@pytest.mark.parametrize("load", [load_samples, load_visualization_entries])
def test_missing_data_file_is_named(load, name, message, folder):
    with pytest.raises(UsageError, match=f"^data_file=.*({message})"):
        load(name)


def test_numeric_and_missing_ids_are_accepted(folder):
    path = write(folder, line(id=7), line(id=...), line(id=None), line(id=1.5), line(id=-2))
    assert [sample.id for sample in load_samples(path).entries] == ["7", "line_2", "line_3", "1.5", "-2"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a", "a", "already used on line 1"),
        ("cat", "Cat", "overwrite the files of 'cat' on line 1"),
        ("é", "e\u0301", "overwrite"),
        ("straße", "STRASSE", "overwrite"),
        ("a", "a_analysis", "overwrite"),
        ("a_analysis", "a", "overwrite"),
        ("a", "A_metadata", "overwrite"),
        ("line_2", ..., "already used on line 1"),
        (7, "7", "already used on line 1"),
    ],
)
def test_ids_with_colliding_files_are_rejected(first, second, message, folder):
    loaded = load_samples(write(folder, line(id=first), line(id=second), line(id="c")))
    assert [sample.line for sample in loaded.entries] == [1, 3]
    assert loaded.bad[0].line == 2 and message in loaded.bad[0].reason


def test_invalid_line_does_not_reserve_its_id(folder):
    loaded = load_samples(write(folder, line(prompt=""), line()))
    assert [sample.line for sample in loaded.entries] == [2]


def test_tilde_is_expanded_in_every_path(folder, monkeypatch):
    """In each field that holds a path."""
    monkeypatch.setenv("HOME", str(folder))
    Path("a.pkl").touch()
    names = {"image_path": "~/images/cat.png", "mask": "~/sets/dog.png", "ignore": "~/sets/dog.png"}
    (sample,) = load_samples(write(folder, line(**names))).entries
    assert sample.image == folder / "images/cat.png"
    assert sample.mask == sample.ignore == folder / "sets/dog.png"
    lines = [json.dumps({"id": name, "attention_file": f"~/{name}.pkl"}) for name in ("a", "gone")]
    entries = load_visualization_entries(write(folder, *lines)).entries
    assert [entry.attention_file for entry in entries] == [folder / "a.pkl", folder / "gone.pkl"]
    loaded = load_samples(write(folder, line(image_path="~nobody-of-that-name/a.png")))
    assert "no such file" in loaded.bad[0].reason


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \r\n", "is empty"),
        (POINTER, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        (f"[{line()}]", "is a JSON array, not JSON lines (one object on each line): `jq -c '.[]' "),
        (f"[{line()},\n{line()}]", "is a JSON array"),
        (json.dumps([{"id": "a"}], indent=1), "is a JSON array"),
        ("\ufeff[\n]", "is a JSON array"),
        ("[", "is a JSON array"),
        (
            json.dumps({"images": [], "annotations": []}, indent=2),
            "is JSON over several lines, not JSON lines",
        ),
    ],
)
@pytest.mark.parametrize("load", [load_samples, load_visualization_entries])
def test_empty_file_and_other_formats_are_rejected(load, content, message, folder):
    path = write(folder, content, name="sets/data.json")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"data_file={path} {message}")


def test_image_that_is_an_lfs_pointer_is_reported(folder):
    Path("images/cat.png").write_text(POINTER)
    with pytest.raises(UsageError, match=r"cat\.png: is a Git LFS pointer.*git lfs pull"):
        load_image("images/cat.png")


# ------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda box: (np.float32(1), np.int64(2), *box[2:])])
def test_sample_converts_any_kind_of_box(kind):
    sample = Sample("a.png", "the cat", bbox=kind([1, 2, 3, 4.5]))
    assert sample.bbox == (1.0, 2.0, 3.0, 4.5)
    assert all(type(number) is float for number in sample.bbox)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 0, 3, 4), r"^sample 'the cat': 'bbox' has its corners swapped: x1 = 3 is not above x0 = 5"),
        ((0, 4, 3, 1), r"y1 = 1 is not above y0 = 4.*of \[x, y, width, height\], write \[x, y, x \+ width"),
        ((0, 4, 3, 4), "'bbox' is empty: y1 = 4"),
        ((1, 2, 3), "'bbox' has length 3: it must be four numbers"),
        ((1, 2, 3, 4, 5), "'bbox' has length 5"),
        ({"x": 1}, "'bbox' must be four numbers"),
        (np.zeros((1, 4)), "'bbox' has length 1"),
        (np.zeros((4, 4)), "'bbox' must hold four numbers in pixels, not list"),
        ((0, 0, math.nan, 1), "four numbers in pixels, not nan"),
        (np.array([0, 0, np.inf, 1]), "four numbers in pixels, not inf"),
        ("1 2 3 4", "'bbox' must be four numbers"),
        ((0, 0, "3", 4), "four numbers in pixels, not '3'"),
        ((0, 0, True, True), "four numbers in pixels, not True"),
        ((0, 0, 1e300, 4), "four numbers in pixels, not 1e\\+300"),
        ((0, 0, 10**5000, 4), "not a huge number"),
    ],
)
def test_sample_rejects_invalid_boxes(box, message):
    with pytest.raises(UsageError, match=message) as caught:
        Sample("a.png", "the cat", bbox=box)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError, match=r"^a: 'bbox'"):
        Sample("a.png", "the cat", id="a", bbox=box)


def test_repr_and_image_file_show_no_secret():
    sample = Sample("https://me:SECRET@example.org/a.png?SECRET", "the cat")
    assert sample.image_file == "https://example.org/a.png?..."
    assert "SECRET" not in repr(sample)
    assert sample.image_key == "https://me:SECRET@example.org/a.png?SECRET"


# ----------------------------------------------------------------------------------------- pixels or not

PHOTO = (640, 480)


@pytest.mark.parametrize(
    ("boxes", "sizes", "message", "certain"),
    [
        # Boxes in pixels: no problem.
        ([(10, 20, 300, 400)], [PHOTO], None, False),
        ([(0, 0, 640, 480), (0, 0, 644, 490)], [PHOTO] * 2, None, False),  # slightly outside the image
        ([(0, 0, 1, 1)], [(4, 3)], None, False),  # a tiny image
        ([(1, 1, 3, 3), (0, 0, 2, 2)], [PHOTO] * 2, None, False),  # tiny objects
        ([(10, 20, 990, 900)] * 50, [(1000, 1000)] * 50, None, False),  # plausible in both scales
        ([(10, 20, 990, 900)] * 19, [(2000, 1500)] * 19, None, False),  # too few to tell
        ([(10, 20, 990, 900)] * 50, [(2000, 1200)] * 50, None, False),
        ([(10, 20, 400, 300)] * 50, [(2000, 1500)] * 50, None, False),  # all in a corner
        # From 0 to 1.
        ([(0.1, 0.2, 0.7, 0.9)], [PHOTO], "all 1 boxes lie within the first pixel", True),
        ([(0.1, 0.2, 0.7, 0.9), (0, 0, 1, 1)], [PHOTO, (0, 0)], "look like 0 to 1", True),
        ([(0, 0, 1.02, 1), (9, 9, 20, 20)], [PHOTO] * 2, "1 of the 2 boxes lie within", False),
        # From 0 to 1000: (290, 340, 840, 830) of 384 x 384 pixels, (160, 80, 840, 980) of 451 x 300.
        ([(290, 340, 840, 830), (160, 80, 840, 980)], [(384, 384), (451, 300)], "2 of 2 boxes reach far", True),
        ([(290, 340, 840, 830), (10, 10, 90, 90)], [(384, 384)] * 2, "1 of 2 boxes reach far", False),
        ([(290, 340, 840, 830)], [(384, 384)], "1 of 1 boxes reach far", False),  # one may be a mistake
        ([(290, 340, 840, 830), (0, 0, 1500, 90)], [(384, 384)] * 2, "of larger copies", False),
        ([(10, 20, 990, 900)] * 20, [(2000, 1500)] * 20, "none of the 20 boxes in images of 1250", False),
    ],
)  # fmt: skip
def test_boxes_that_are_not_in_pixels_are_detected(boxes, sizes, message, certain):
    found = find_scale_problem(np.array(boxes, float), np.array(sizes))
    if message is None:
        assert found is None
    else:
        assert message in found.description
        assert found.is_error is certain


def test_box_scale_check_raises_or_warns_with_an_example(caplog):
    boxes = [TrueBox("line 3 (a)", (290, 340, 840, 830), (384, 384))]
    check_box_scale(boxes, "data_file")
    assert "data_file: 1 of 1 boxes" in caplog.text
    with pytest.raises(UsageError, match=r"such as \[290, 340, 840, 830\] in an image of 384 x 384 pixels \(line 3"):
        check_box_scale(boxes * 2, "data_file")


def test_image_headers_of_a_large_data_set_are_sampled(folder):
    samples = [Sample(Path("images/cat.png"), "the cat", bbox=(0, 0, 4, 3))] * 1000
    found = collect_true_boxes([*samples, Sample(Path("gone.png"), "the cat", bbox=(0, 0, 4, 3))])
    assert len(found) == 1001
    assert sum(one.size == (4, 3) for one in found) == MAX_HEADERS_READ - 1  # the last file is missing


@given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=2), st.none()), max_size=6))
def test_check_box_accepts_only_ordered_finite_numbers(value):
    try:
        box = check_box(value)
    except BadLineError:
        return
    assert list(box) == value and not any(isinstance(x, bool) for x in value)
    assert all(type(x) is float and math.isfinite(x) for x in box)
    assert box[2] > box[0] and box[3] > box[1]


corner = st.floats(-1e5, 1e5, width=32)


@given(corner, corner, st.floats(0.0078125, 1e5), st.floats(0.0078125, 1e5))
def test_check_box_accepts_every_nonempty_box(x, y, width, height):
    assert check_box([x, y, x + width, y + height]) == (x, y, x + width, y + height)


# ------------------------------------------------------------------------------------------------- noise

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
fields = ["id", "prompt", "image_path", "bbox", "mask", "layer", "head", "attention_file"]


@settings(max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from(fields), json_values, max_size=6), min_size=1, max_size=4))
def test_arbitrary_objects_become_samples_or_errors(entries):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.jsonl"
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
        loaded = load_samples(path)
        assert len(loaded.entries) + len(loaded.bad) == len(entries)
        assert all(bad.reason.isprintable() for bad in loaded.bad)
        drawn = load_visualization_entries(path)
        assert len(drawn.entries) + len(drawn.bad) == len(entries)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_become_line_errors_or_one_error(content):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.jsonl"
        path.write_bytes(content)
        try:
            loaded = load_samples(path)
        except UsageError as error:
            message = str(error)
        else:
            assert not loaded.entries
            assert {bad.line for bad in loaded.bad} <= set(range(1, content.count(b"\n") + 2))
            return
    assert re.search(r"is empty|is a JSON array|is JSON over several|is a Git LFS", message)


# ------------------------------------------------------------------------------------------------- masks


def test_decode_mask_checks_the_size(folder):
    loaded = load_samples(write(folder, line(mask={"size": [3, 4], "counts": [6, 6]})))
    expected = np.zeros((3, 4), bool)
    expected[:, 2:] = True
    np.testing.assert_array_equal(decode_mask(loaded.entries[0], (4, 3)), expected)
    with pytest.raises(UsageError, match=r"line 1 \(a\): the mask is 4 x 3 pixels, its image 5 x 3"):
        decode_mask(loaded.entries[0], (5, 3))
    with pytest.raises(UsageError, match="has no mask"):
        decode_mask(Sample("x.png", "x"), (4, 3))


# ------------------------------------------------------------------------------------ visualization entries


def test_visualization_entries_are_read(folder):
    for name in ("one.pkl", "sets/two.pkl"):
        (folder / name).touch()
    path = write(
        folder,
        '{"id": "a", "attention_file": "one.pkl"}',
        '{"id": "a", "attention_file": "two.pkl", "layer": 20, "head": 5}',
        '{"attention_file": "one.pkl"}',
        '{"id": "b"}',
        '{"id": "c", "attention_file": "elsewhere/three.pkl"}',
    )
    loaded = load_visualization_entries(path)
    assert not loaded.bad
    found = [(e.id, e.attention_file, e.layer, e.head, e.line) for e in loaded.entries]
    assert found == [
        ("a", Path("one.pkl"), None, None, 1),
        ("a", folder / "sets/two.pkl", 20, 5, 2),
        ("one", Path("one.pkl"), None, None, 3),
        ("b", None, None, None, 4),
        ("c", Path("elsewhere/three.pkl"), None, None, 5),  # may be in another model's folder
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{}", "'attention_file' is missing"),
        ('{"id": "a", "attention_file": "."}', "is a folder"),
        ('{"id": "a", "attention_file": 5}', "must be text"),
        ('{"id": "a", "layer": 3}', "go together"),
        ('{"id": "a", "layer": -1, "head": 0}', "'layer' must be"),
        ('{"id": "a", "layer": 1, "head": true}', "'head' must be"),
        ('{"id": "a", "layer": 1.0, "head": 1}', "'layer' must be"),
        ('{"id": "../a"}', "the id"),
        ("nonsense", "not JSON"),
    ],
)
def test_invalid_visualization_entry_is_reported(bad, message, folder):
    loaded = load_visualization_entries(write(folder, '{"id": "x"}', bad))
    assert len(loaded.entries) == 1
    assert loaded.bad[0].line == 2 and message in loaded.bad[0].reason
