"""Attention files, analyses, predictions, JSON and CSV, file names, atomic writes and the lock."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.head import Head
from localization_heads.store import attention_files
from localization_heads.store.attention_files import (
    is_in_format,
    load_analysis,
    load_attention,
    save_analysis,
    save_attention,
)
from localization_heads.store.files import RunLock, atomic_write, read_json, write_csv, write_json
from localization_heads.store.paths import analysis_path, attention_path, check_id, entry_path, side_path
from localization_heads.store.results import Prediction, read_predictions, write_predictions

MAPS = AttentionMaps(
    attention=np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32),
    image_box=(-10.0, 0.0, 110.5, 90.0),
    image_size=(100, 90),
    image_file="examples/images/cät.jpg",
    query="the cat on the left",
    prompt="A chat.\n<image>\nthe cat on the left.",
    model="tiny",
    id="example_1",
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: AttentionMaps, b: AttentionMaps) -> bool:
    return np.array_equal(a.attention, b.attention) and vars(a) | {"attention": 0} == vars(b) | {"attention": 0}


# ---------------------------------------------------------------------------------------- attention files


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_attention_file_round_trip(suffix, tmp_path):
    path = tmp_path / "attention" / f"example_1{suffix}"
    for maps in (MAPS, replace(MAPS, asked={"conv_mode": "chat", "query_token": "last"})):
        save_attention(maps, path)
        assert same(load_attention(path), maps)
    assert load_attention(path).attention.flags.writeable


def test_pickle_has_the_documented_keys(tmp_path):
    save_attention(MAPS, tmp_path / "a.pkl")
    content = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert list(content) == [
        "version", "attention", "grid", "image_size", "image_box", "image_file", "query", "prompt", "model", "id",
    ]  # fmt: skip
    assert content["version"] == 1
    assert content["grid"] == [4, 5]
    assert content["image_size"] == [100, 90]
    assert content["image_box"] == [-10.0, 0.0, 110.5, 90.0]
    assert content["attention"].dtype == np.float32
    assert {type(value) for value in content.values()} == {int, str, list, np.ndarray}


def test_noncontiguous_array_is_saved_correctly(tmp_path):
    maps = replace(MAPS, attention=MAPS.attention.transpose(1, 0, 3, 2)[:, :, ::2])
    for suffix in (".pkl", ".safetensors"):
        save_attention(maps, tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(load_attention(tmp_path / f"a{suffix}").attention, maps.attention)


def test_unknown_suffix_is_rejected(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.pkl or \.safetensors"):
        save_attention(MAPS, tmp_path / "a.npz")


GOOD = {
    "version": 1, "attention": MAPS.attention, "grid": [4, 5], "image_size": [100, 90],
    "image_box": [0.0, 0.0, 100.0, 90.0], "image_file": "", "query": "", "prompt": "", "model": "", "id": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"attention": [1.0]}, "not an array"),
        ({"attention": MAPS.attention[0]}, "must be"),
        ({"attention": MAPS.attention[:0]}, "must be"),
        ({"attention": np.zeros((1, 1, 4, 5), "i4")}, "floating point"),
        ({"attention": np.full((1, 1, 4, 5), np.nan, "f4")}, "NaN"),
        ({"attention": np.full((1, 1, 4, 5), np.inf, "f4")}, "NaN"),
        ({"attention": np.full((1, 1, 4, 5), -1e-9, "f4")}, "negative"),
        ({"attention": np.full((1, 1, 4, 5), 3e38, "f4")}, "above 1, which no softmax gives"),
        ({"grid": [5, 4]}, "'grid'"),
        ({"grid": None}, "'grid'"),
        ({"image_size": [100.5, 90]}, "'image_size'"),
        ({"image_size": [0, 90]}, "'image_size'"),
        ({"image_size": [100]}, "'image_size'"),
        ({"image_size": [10**400, 1]}, "'image_size'"),
        ({"image_size": [10**9000, 1]}, "'image_size'"),
        ({"image_size": [True, True]}, "'image_size'"),
        ({"image_box": [0, 0, 0, 1]}, "'image_box'"),
        ({"image_box": [0, 0, float("nan"), 1]}, "'image_box'"),
        ({"image_box": [0, 0, float("inf"), 1]}, "'image_box'"),
        ({"image_box": "abcd"}, "'image_box'"),
        ({"query": 5}, "'query'"),
        ({"query": b"x"}, "'query'"),
        ({"asked": {"query_token": 5}}, "'asked'"),
        ({"asked": {str(n): "x" for n in range(99)}}, "'asked'"),
        ({"asked": ["last"]}, "'asked'"),
    ],
)
def test_invalid_field_is_named(change, message, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({**GOOD, **change}))
    with pytest.raises(UsageError, match=message) as caught:
        load_attention(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, [], 5, "text", {"a": 1}, [[1, 2]], {0: 1}, None])
def test_unrelated_pickle_is_rejected(content, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match="not an attention file"):
        load_attention(tmp_path / "a.pkl")


@pytest.mark.parametrize("name", ["no.pkl", "no.safetensors", "folder.pkl", "folder.safetensors", "a\0.pkl"])
def test_missing_attention_file_is_reported(name, tmp_path):
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UsageError, match=r"no such file|not a file|null"):
        load_attention(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors file"),
        (b"garbage" * 50, "not a readable safetensors file"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "not a readable safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "no tensor 'attention'"),
        (
            (60).to_bytes(8, "little") + b'{"attention":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "not a readable safetensors file",
        ),
        (safetensors.numpy.save({"weight": np.zeros(3, "f4")}), "no tensor 'attention'"),
        (safetensors.numpy.save({"attention": MAPS.attention}), "version"),
    ],
)
def test_invalid_safetensors_are_rejected(content, message, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.safetensors: .*{message}"):
        load_attention(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((640, 480), (0.0, -80.0, 640.0, 560.0)),
        ((480, 641), (-80.0, 0.0, 561.0, 641.0)),
        ((10, 10), (0.0, 0.0, 10.0, 10.0)),
    ],
)
def test_june_format_is_read(dtype, size, box, tmp_path):
    # As the published code makes them: a slice of the full attention, stacked over layers
    rows = torch.rand(2, 3, 7, 20).to(dtype)
    tensor = rows[:, :, -1:, 2:18]
    (tmp_path / "q.pkl").write_bytes(pickle.dumps(tensor))
    metadata = {"image_file": "dog.png", "query": "the dog", "image_size": size}
    (tmp_path / "q_metadata.pkl").write_bytes(pickle.dumps(metadata))
    maps = load_attention(tmp_path / "q.pkl")
    np.testing.assert_array_equal(maps.attention, tensor.float().numpy().reshape(2, 3, 4, 4))
    assert maps.attention.dtype == np.float32
    assert maps.image_box == box
    assert (maps.image_size, maps.image_file, maps.query, maps.id) == (size, "dog.png", "the dog", "q")


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("meta", ["inside", "beside"])
def test_august_format_is_read(gzipped, meta, tmp_path):
    tensor = torch.rand(2, 3, 1, 16).half() / 16
    facts = {
        "image_file": "dog.png", "query": "the dog", "image_size": (640, 480), "patch_size": 4,
        "vis_len": 16,
    }  # fmt: skip
    content = pickle.dumps({"attn": tensor, "meta": facts if meta == "inside" else {}})
    path = tmp_path / ("q.pkl.gz" if gzipped else "q.pkl")
    path.write_bytes(gzip.compress(content) if gzipped else content)
    if meta == "beside":
        (tmp_path / "q_meta.pkl").write_bytes(pickle.dumps(facts))
    maps = load_attention(path)
    np.testing.assert_array_equal(maps.attention, tensor.float().numpy().reshape(2, 3, 4, 4))
    assert (maps.image_box, maps.image_size) == ((0.0, -80.0, 640.0, 560.0), (640, 480))
    assert (maps.image_file, maps.query, maps.id) == ("dog.png", "the dog", "q")
    assert analysis_path(path) == tmp_path / "q_analysis.pkl"


@pytest.mark.parametrize("format", ["published", "published_august"])
def test_published_formats_round_trip(format, tmp_path):
    """Readable with pickle and torch alone, as the published code does it, and by our own reader."""
    attention = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32) / 16
    texts = {"image_file": "dog.png", "query": "the dog", "prompt": "USER: the dog", "model": "m", "id": "q"}
    maps = AttentionMaps(attention, (0.0, -80.0, 640.0, 560.0), (640, 480), **texts)
    path = tmp_path / "q.pkl"
    save_attention(maps, path)
    assert is_in_format(path, "pkl") and not is_in_format(path, format)
    save_attention(maps, path, format)
    assert is_in_format(path, format) and not is_in_format(path, "pkl")
    content = pickle.loads(path.read_bytes())
    side = tmp_path / ("q_metadata.pkl" if format == "published" else "q_meta.pkl")
    metadata = pickle.loads(side.read_bytes())
    if format == "published_august":
        assert content["meta"] == metadata
        content = content["attn"]
    assert torch.is_tensor(content) and content.shape == (2, 3, 1, 16)
    P = metadata["patch_size"]
    np.testing.assert_array_equal(content[1, 2, 0].reshape(P, P).numpy(), attention[1, 2])
    assert metadata["image_file"] == "dog.png" and metadata["query"] == "the dog"
    assert metadata["image_size"] == (640, 480)
    read = load_attention(path)
    np.testing.assert_array_equal(read.attention, attention)
    assert (read.image_box, read.image_size) == (maps.image_box, maps.image_size)
    assert {name: getattr(read, name) for name in texts} == texts
    save_attention(maps, path)
    assert not side.exists() and load_attention(path).image_box == maps.image_box


@pytest.mark.parametrize("kept", range(5))
@pytest.mark.parametrize(("before", "after"), [*permutations(["pkl", "published", "published_august"], 2)])
def test_interrupted_format_change_is_detected(before, after, kept, tmp_path, monkeypatch):
    """After only the first `kept` writes and removals, the new format is claimed only if all its files are in place."""
    maps = AttentionMaps(np.full((1, 1, 4, 4), 0.01, np.float32), (0.0, -80.0, 640.0, 560.0), (640, 480))
    path, left = tmp_path / "q.pkl", kept
    save_attention(maps, path, before)

    def cut_short(act):
        def acting(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return act(*arguments, **named)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(attention_files, "write_bytes", cut_short(attention_files.write_bytes))
        patch.setattr(Path, "unlink", cut_short(Path.unlink))
        with suppress(KeyboardInterrupt):
            save_attention(maps, path, after)
    if is_in_format(path, after):
        assert torch.is_tensor(pickle.loads(path.read_bytes())) == (after == "published")
        assert load_attention(path).image_box == maps.image_box


@pytest.mark.parametrize("format", ["published", "published_august"])
@pytest.mark.parametrize(
    ("grid", "box", "message"),
    [
        ((4, 5), (0.0, 0.0, 640.0, 480.0), "only square grids, and this one is 5 x 4"),
        ((4, 4), (0.0, 0.0, 640.0, 480.0), "these maps cover 0 0 640 480 of 640 x 480 pixels"),
    ],
)
def test_published_formats_reject_maps_they_cannot_represent(format, grid, box, message, tmp_path):
    maps = AttentionMaps(np.full((1, 1, *grid), 0.01, np.float32), box, (640, 480))
    with pytest.raises(UsageError, match=message):
        save_attention(maps, tmp_path / "q.pkl", format)
    assert not list(tmp_path.iterdir())


def test_hostile_gzip_is_rejected(tmp_path):
    """Bombs, garbage, a truncated file, code in the pickle: a one-line error each, within the memory limit."""
    path = tmp_path / "q.pkl.gz"
    bomb = gzip.compress(pickle.dumps(np.zeros((1, 1, 1, 60 << 20), np.uint8)), 1)
    whole = gzip.compress(pickle.dumps(torch.rand(2, 3, 1, 16)))
    cases = {
        bomb: "unpacks to more than 33 MB",
        whole[:-20]: "not a readable gzip file",
        b"no gzip": "not a readable gzip file",
        whole[:30] + bytes(8) + whole[38:]: "not a readable gzip file",
        gzip.compress(b"cos\nsystem\n(S'true'\ntR."): "refused: the pickle asks for os.system",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(UsageError, match=message):
            load_attention(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(content) + (72 << 20)
        tracemalloc.stop()
    with pytest.raises(UsageError, match="no such file"):
        load_attention(tmp_path / "other.pkl.gz")


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1, 3, 1, 16), torch.ones(1, 3, 1, 16)],  # as from output_attentions
        {1: torch.ones(3, 1, 16), 0: torch.zeros(3, 1, 16)},
        [torch.zeros(3, 1, 16), torch.ones(3, 1, 16)],
        {0: torch.zeros(3, 16), 1: torch.ones(3, 16)},
        np.stack([np.zeros((3, 1, 16)), np.ones((3, 1, 16))]),
        np.stack([np.zeros((3, 4, 4)), np.pad([[[1.0]]] * 3, ((0, 0), (0, 3), (0, 3)))]),
    ],
)
def test_layers_are_ordered_and_image_size_defaults_to_the_grid(content, tmp_path):
    (tmp_path / "q.pkl").write_bytes(pickle.dumps(content))
    maps = load_attention(tmp_path / "q.pkl")
    assert maps.attention.shape == (2, 3, 4, 4)
    assert [layer.max() for layer in maps.attention] == [0, 1]
    assert (maps.image_size, maps.image_box) == ((4, 4), (0.0, 0.0, 4.0, 4.0))


@pytest.mark.parametrize(
    ("tensor", "metadata", "message"),
    [
        (torch.zeros(2, 3, 1, 15), {}, "not a square grid"),
        (torch.zeros(6), {}, "must be"),
        ([torch.zeros(3, 1, 16), torch.zeros(2, 1, 16)], {}, "differ in shape"),
        (torch.full((2, 3, 1, 16), float("nan")), {}, "NaN"),
        (torch.zeros(2, 3, 1, 16), [1], "metadata"),
        (torch.zeros(2, 3, 1, 16), {"image_size": (0, 5)}, "image_size"),
        (torch.zeros(2, 3, 1, 16), {"image_size": "big"}, "image_size"),
        (torch.zeros(2, 3, 1, 16), {"patch_size": 24}, "'patch_size' is 24, and 16 image tokens are 4 x 4"),
        (torch.softmax(torch.rand(2, 3, 6, 6), -1), {}, r"full attention \[L, H, T, T\] of 6 .*sum to 6,"),
        ([torch.softmax(torch.rand(1, 3, 6, 9).half(), -1)] * 2, {}, "full attention"),
        ({"attn": torch.softmax(torch.rand(2, 3, 6, 6), -1)}, {}, "full attention"),
        ({"attn": torch.zeros(2, 3, 1, 16), "meta": "a dog"}, {}, "'meta' is not a dict"),
        ({"attn": "nothing"}, {}, "not an attention file"),
    ],
)
def test_invalid_published_file_is_rejected(tensor, metadata, message, tmp_path):
    (tmp_path / "q.pkl").write_bytes(pickle.dumps(tensor))
    (tmp_path / "q_metadata.pkl").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UsageError, match=message):
        load_attention(tmp_path / "q.pkl")


# ------------------------------------------------------------------------------------------ other records


def test_analysis_round_trip_is_plain(tmp_path):
    plain = {"layer": 3, "head": 1, "spatial_entropy": float("inf"), "above_threshold": True}
    heads = [{name: value if name == "head" else np.asarray(value)[()] for name, value in plain.items()}]
    save_analysis(heads, tmp_path / "a_analysis.pkl")
    assert b"numpy" not in (tmp_path / "a_analysis.pkl").read_bytes()
    assert load_analysis(tmp_path / "a_analysis.pkl") == [plain]


@pytest.mark.parametrize("content", [{}, 5, [1], [{"layer": 1}], [{"layer": "1", "head": 0}]])
def test_unrelated_pickle_is_not_an_analysis(content, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match="not an analysis"):
        load_analysis(tmp_path / "a.pkl")


def test_predictions_round_trip(tmp_path):
    mask = {"size": [2, 2], "counts": "04"}
    predictions = [
        Prediction("a", (0.0, 1.0, 2.5, 3.0), 0.5, mask, (Head(1, 2), Head(3, 4))),
        Prediction("ü", error="broken or cut short"),
        Prediction("b", heads=(Head(1, 2),), agreement=0.25, confidence=0.5, calibrated=True, presence=0.125),
        Prediction("c", absent=True, heads_from="a list (somebody, 2026)"),
    ]
    write_predictions(tmp_path / "p.jsonl", predictions)
    assert list(read_predictions(tmp_path / "p.jsonl")) == predictions
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "a", "bbox": [0.0, 1.0, 2.5, 3.0], "score": 0.5, "mask": mask, "heads": [[1, 2], [3, 4]], "error": None,
        "agreement": None, "confidence": None, "calibrated": False, "present": None, "absent": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ("{}", "'bbox' is missing"),
        ("[1]", "not a JSON object"),
        ('{"id": "a", "bbox": [1, 2]}', "not enough values"),
        ('{"id": "a", "bbox": 5}', "wrong type"),
        ('{"id": "a", "bbox": ["1", 2, 3, 4]}', "'1' is not a number"),
        ('{"id": "a", "bbox": [1e999, 2, 3, 4]}', "too large a number"),
        ('{"id": "a", "bbox": [1' + "0" * 400 + ", 2, 3, 4]}", "wrong type"),
        ('{"id": "a", "bbox": null, "score": NaN}', "NaN"),
        ('{"id": 5, "bbox": null}', "'id', 'error' and 'heads_from' must be text"),
        ('{"id": "a", "bbox": null, "error": [1]}', "'id', 'error' and 'heads_from' must be text"),
        ('{"id": "a", "bbox": null, "heads": [1]}', "wrong type"),
        ('{"id": "a", "bbox": null, "mask": [[1, 2]]}', "'mask' must be COCO RLE"),
        ('{"id": "a", "bbox": null, "mask": {"counts": "0"}}', "'size' must be"),
        ('{"id": "a", "bbox": null, "mask": {"size": [1000000, 1000000], "counts": "0"}}', "over the limit"),
        ('{"id": "a", "bbox": null, "mask": {"size": [2, 2], "counts": [4]}}', "'mask' must be COCO RLE"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_invalid_prediction_is_reported_with_its_line(line, message, tmp_path):
    good = json.dumps(Prediction("a").to_json())
    (tmp_path / "p.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UsageError, match=f"line 3: .*{message}") as caught:
        list(read_predictions(tmp_path / "p.jsonl"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1e999]", "1e999 is too large a number"),
        (b"[-1e999]", "-1e999 is too large a number"),
        (b"[" + b"9" * 400_000 + b".0]", "too large a number"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"9" * 5000, "not usable JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"", "not JSON: Expecting value at column 1"),
        (b'{"a": 1,\n  b}', "at line 2, column 3"),
        (b"[" + b"[]," * 3_000_000 + b"[]]", "far more lists and objects than text"),
    ],
)
def test_invalid_json_gives_a_one_line_error(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_json(tmp_path / "a.json", 10 << 20)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_read_json_tries_encodings_and_limits_size(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["caf\xe9", 1.5, 10]')
    assert read_json(tmp_path / "a.json", 100, encodings=("utf-8", "cp1252")) == ["café", 1.5, 10]
    with pytest.raises(UsageError, match="larger than the limit"):
        read_json(tmp_path / "a.json", 5)


def test_write_json_keeps_order_and_rejects_nan(tmp_path):
    write_json(tmp_path / "h.json", {"b": 1, "a": ["ä"]})
    assert (tmp_path / "h.json").read_bytes() == '{\n  "b": 1,\n  "a": [\n    "ä"\n  ]\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "h.json", float("nan"))
    assert json.loads((tmp_path / "h.json").read_text())["b"] == 1


def test_csv_is_quoted_and_has_unix_line_ends(tmp_path):
    write_csv(tmp_path / "h.csv", ["layer", "note"], [[1, "a, b"], [2, 'say "x"']])
    assert (tmp_path / "h.csv").read_bytes() == b'layer,note\n1,"a, b"\n2,"say ""x"""\n'


# ---------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("id", ["a", "example_1", "cat.left", "图片 1", "a" * 226, "x-y+z", "12"])
def test_plain_names_are_valid_ids(id, tmp_path):
    assert check_id(id) == id
    (tmp_path / f"{id}_visualization_L9999H9999.png").touch()


BAD_IDS = [
    "", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "C:\\x", "a\0b", "a\nb", "a\x1b[31m", "\x7f",
    "a\u2028b", "\ud800", " a", "a ", "a" * 227, "ä" * 115,
]  # fmt: skip


@pytest.mark.parametrize("id", BAD_IDS)
def test_unsafe_names_are_invalid_ids(id, tmp_path):
    with pytest.raises(ValueError, match="the id") as caught:
        check_id(id)
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError):
        attention_path(tmp_path, id)


@given(st.text(max_size=40))
def test_entry_path_stays_in_its_folder(id):
    try:
        path = entry_path("out/attention", id, ".pkl")
    except UsageError:
        return
    assert Path(os.path.normpath(path)).parent == Path("out/attention")


def test_companion_paths_of_an_attention_file():
    assert attention_path("o", "a.b", "safetensors") == Path("o/a.b.safetensors")
    assert analysis_path("o/a.b.safetensors") == Path("o/a.b_analysis.pkl")
    assert side_path("o/a.pkl", "_grounding.png") == Path("o/a_grounding.png")
    with pytest.raises(UsageError, match="attention_format=npz"):
        attention_path("o", "a", "npz")


# ------------------------------------------------------------------------------------------ atomic writing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_keeps_the_old_file(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_new_file_respects_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "sub" / "file") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "sub" / "file").stat().st_mode) == 0o640


def test_longest_file_name_can_be_written(tmp_path):
    with atomic_write(tmp_path / ("n" * 255)) as file:
        file.write(b"x")


def test_unwritable_location_is_reported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with (
            pytest.raises(UsageError, match=r"cannot write .*choose another output_dir"),
            atomic_write(path) as file,
        ):
            file.write(b"x")
    assert names_in(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_raises_work_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="No space left"), atomic_write(tmp_path / "x") as file:
        file.write(b"x")
    assert names_in(tmp_path) == []


WRITER = """
import sys
from localization_heads.store.files import write_bytes
while True:
    for letter in b"abc":
        write_bytes(sys.argv[1], bytes([letter]) * 300_000)
        print("written", flush=True)
"""


def test_killed_writer_never_leaves_a_partial_file(tmp_path):
    path = tmp_path / "file"
    for delay in np.linspace(0.0, 0.012, 7):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        end = time.monotonic() + delay
        while time.monotonic() < end:
            _check_whole(path)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        _check_whole(path)
    visible = [name for name in names_in(tmp_path) if not name.startswith(".")]
    assert visible == ["file"]
    with RunLock(tmp_path):
        assert [name for name in names_in(tmp_path) if name.endswith(".tmp")] == []


def _check_whole(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) == 300_000
    assert len(set(content)) == 1


def test_temporary_files_of_other_writers_are_kept(tmp_path):
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")
        other = tmp_path / ".lh-0123456789abcdef-00000000-1-1.tmp"
        other.touch()
        with RunLock(tmp_path):
            assert other.exists()
    assert (tmp_path / "file").read_bytes() == b"x"


# ------------------------------------------------------------------------------------------------ the lock

HOLDER = """
import sys, time
from localization_heads.store.files import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_is_exclusive_until_its_holder_dies(tmp_path):
    folder = tmp_path / "outputs"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"another run is working in {folder}"), RunLock(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with RunLock(folder), pytest.raises(UsageError, match="another run"), RunLock(folder):
        pass
    with RunLock(folder):
        pass


def test_lock_reports_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"), RunLock(tmp_path / "file" / "sub"):
        pass
