"""The stages for single images, `ground`, `evaluate` and `scenes`, from the command line to the files they write."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from front import (
    Calls,
    Front,
    cached_load_model,
    draw_image,
    one_line,
    read_lines,
    stub_figures,
    write_data,
    write_lines,
)
from matplotlib.figure import Figure
from PIL import Image, ImageFile
from tiny_models import save_llava, save_overflowing

import localization_heads as lh
from localization_heads import figures
from localization_heads.data import images
from localization_heads.data import network as downloading
from localization_heads.data.address import Address
from localization_heads.data.masks import encode_mask, read_mask
from localization_heads.errors import NotFiniteError
from localization_heads.lvlm import model_with_processor
from localization_heads.lvlm.model import LVLM
from localization_heads.stages import find, ground, single
from localization_heads.stages.single import default_id
from localization_heads.store.attention_files import load_attention
from localization_heads.store.paths import attention_path

ATTENTION_KEYS = [
    "version", "attention", "grid", "image_size", "image_box", "image_file", "query", "prompt", "model", "id",
    "asked",
]  # fmt: skip
IMAGE = ("image_file=cat.png", "query=the dog")
DATA = ("stage=ground", "data_file=data.jsonl")
ANALYSIS_KEYS = [
    "layer", "head", "head_idx", "attn_sum", "spatial_entropy", "bottom_row_focus", "num_components", "above_threshold",
]  # fmt: skip


@pytest.fixture
def front(front: Front) -> Front:
    draw_image(front.folder / "cat.png")
    return front


@pytest.fixture
def attention_file(front: Front) -> Path:
    """The attention of `IMAGE`, collected under the id `a`."""
    front.succeed("stage=collect", *IMAGE, "save_id=a")
    return front.out / "attention/a.pkl"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)


def load_pickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def files(folder: Path) -> set[str]:
    """All files but the hidden ones."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# ---------------------------------------------------------------------------------------------- one image


def test_pipeline_writes_what_the_contract_says(front: Front, lvlm: LVLM) -> None:
    """Attention, analysis and both figures, named after image and query; the box is printed."""
    result = front.succeed("stage=pipeline", "image_file=cat.png", "query=What is in this image?", "top_k=2")
    stem = "attention/cat_what-is-in-this-image"
    figures = [f"{stem}_visualization.png", f"{stem}_grounding.png"]
    assert files(front.out) == {f"{stem}.pkl", f"{stem}_analysis.pkl", *figures}
    assert "box: " in result.out
    assert f"wrote {front.out}/{stem}.pkl" in result.out
    assert all(Image.open(front.out / figure).width > 100 for figure in figures)

    content = load_pickle(front.out / f"{stem}.pkl")
    assert list(content) == ATTENTION_KEYS
    attention = content["attention"]
    assert (type(attention), attention.dtype) == (np.ndarray, np.float32)
    assert attention.shape == (lvlm.num_layers, lvlm.num_heads, *content["grid"])
    assert (content["version"], content["model"], content["image_file"]) == (1, "embedded", "cat.png")
    assert (content["query"], content["id"]) == ("What is in this image?", "cat_what-is-in-this-image")
    assert content["image_size"] == [64, 48]
    assert [type(x) for x in content["image_box"]] == [float] * 4
    expected = lvlm.attend(Image.open("cat.png").convert("RGB"), "What is in this image?")
    np.testing.assert_allclose(attention, expected.attention, rtol=0, atol=1e-6)
    assert content["prompt"] == expected.prompt

    rows = load_pickle(front.out / f"{stem}_analysis.pkl")
    assert len(rows) == lvlm.num_layers * lvlm.num_heads
    assert all(list(row) == ANALYSIS_KEYS for row in rows)
    assert [type(value) for value in rows[0].values()] == [int, int, int, float, float, bool, int, bool]
    assert_kept_and_compact_first(rows)
    for row in rows:
        assert row["head_idx"] == row["layer"] * lvlm.num_heads + row["head"]
        assert row["attn_sum"] == pytest.approx(attention[row["layer"], row["head"]].sum(), abs=1e-5)
    assert {row["layer"] for row in rows if row["above_threshold"]} <= set(range(2, lvlm.num_layers))
    assert any(row["above_threshold"] for row in rows)


def assert_kept_and_compact_first(rows: list[dict[str, Any]]) -> None:
    """So that `rows[:top_k]` are heads that passed the criteria."""
    order = [(not row["above_threshold"], row["spatial_entropy"]) for row in rows]
    assert order == sorted(order)


def test_collect_analyze_and_visualize_add_their_files(front: Front, attention_file: Path) -> None:
    """`visualize` analyses first if there is no analysis."""
    assert files(front.out) == {"attention/a.pkl"}
    result = front.succeed("stage=analyze", f"attention_file={attention_file}", "top_k=2")
    assert "Top 2 heads of this sample" in result.out
    assert files(front.out) == {"attention/a.pkl", "attention/a_analysis.pkl"}
    (front.out / "attention/a_analysis.pkl").unlink()
    front.succeed("stage=visualize", f"attention_file={attention_file}")
    suffixes = (".pkl", "_analysis.pkl", "_visualization.png", "_grounding.png")
    assert files(front.out) == {f"attention/a{suffix}" for suffix in suffixes}


@pytest.mark.usefixtures("attention_file")
def test_a_path_in_another_models_folder_finds_the_file(front: Front) -> None:
    """A path of the published code's documentation works after a run of any model."""
    name = "attention_file=outputs/localization_heads/llava/attention/a.pkl"
    assert f"taking {front.out}/attention/a.pkl" in front.succeed("stage=analyze", name).err
    assert front.succeed("stage=visualize", name).err.count("taking ") == 1


@pytest.mark.usefixtures("no_figures")
def test_visualize_keeps_a_valid_analysis(front: Front, attention_file: Path) -> None:
    """Even one made under other criteria; a file that cannot be read is replaced."""
    name, path = f"attention_file={attention_file}", attention_file.with_name("a_analysis.pkl")
    front.succeed("stage=analyze", name, "criteria.tau=0.9")
    before = path.read_bytes()
    front.succeed("stage=visualize", name, "criteria.tau=0")
    assert path.read_bytes() == before
    path.write_bytes(b"torn")
    front.succeed("stage=visualize", name)
    assert len(load_pickle(path)) > 1


@pytest.mark.parametrize("format", ["safetensors", "published", "published_august"])
def test_every_attention_format_holds_the_same_maps(format: str, front: Front) -> None:
    options = ("stage=pipeline", *IMAGE, "save_id=a", "k=2")
    pickled = front.succeed(*options)
    other = front.succeed(*options, f"attention_format={format}", "output_dir=other")
    one = load_attention(front.out / "attention/a.pkl")
    two = load_attention(attention_path("other/tiny/attention", "a", format))
    np.testing.assert_array_equal(one.attention, two.attention)
    for name in ("image_box", "image_size", "query", "prompt", "model", "id"):
        assert getattr(one, name) == getattr(two, name)
    analysis = load_pickle(Path("other/tiny/attention/a_analysis.pkl"))
    assert load_pickle(front.out / "attention/a_analysis.pkl") == analysis
    assert next(line for line in pickled.out.splitlines() if "box:" in line) in other.out


def test_files_of_the_published_code(front: Front) -> None:
    """A bare torch tensor `[L, H, 1, P*P]` with `_metadata.pkl` is analysed and drawn, without a model."""
    folder = Path("outputs/localization_heads/llava/attention")
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tensor = torch.rand(5, 4, 1, 36).half()
    (folder / "example_1.pkl").write_bytes(pickle.dumps(tensor))
    metadata = {"image_file": "cat.png", "query": "the dog", "image_size": (64, 48)}
    (folder / "example_1_metadata.pkl").write_bytes(pickle.dumps(metadata))
    name = f"attention_file={folder}/example_1.pkl"
    front.succeed("stage=analyze", name)
    rows = load_pickle(folder / "example_1_analysis.pkl")
    assert len(rows) == 20
    sums = tensor.float().sum(-1).squeeze(-1)
    for row in rows:
        assert row["attn_sum"] == pytest.approx(float(sums[row["layer"], row["head"]]), rel=1e-3)
    assert "box: " in front.succeed("stage=visualize", name, "top_k=3").out
    assert {"example_1_visualization.png", "example_1_grounding.png"} <= files(folder)
    assert front.visualize("mode=single", name).status == 0


def test_max_new_tokens_prints_the_answer(front: Front) -> None:
    assert "answer:" not in front.finder("stage=collect", *IMAGE).out
    assert "answer:" in front.finder("stage=collect", *IMAGE, "max_new_tokens=3").out


def test_criteria_reach_the_analysis(front: Front, attention_file: Path) -> None:
    kept, analyses = {}, {}
    for choice in ("criteria=paper", "criteria=published", "criteria.tau=0", "criteria.tau=0.9"):
        front.succeed("stage=analyze", f"attention_file={attention_file}", choice)
        rows = analyses[choice] = load_pickle(attention_file.with_name("a_analysis.pkl"))
        kept[choice] = [row["layer"] for row in rows if row["above_threshold"]]
        assert_kept_and_compact_first(rows)
    assert min(kept["criteria.tau=0"]) == 2
    assert len(kept["criteria.tau=0"]) > len(kept["criteria.tau=0.9"])
    assert analyses["criteria=published"] != analyses["criteria=paper"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("heads=[99-0]", "there is no L99H0"),
        ("heads=0-999", "there is no L0H999"),
        ("heads=[first]", "names no head"),
        ("heads=[]", "names no head"),
        ("heads=[3-2,2-0,L3H2]", "heads names L3H2 twice"),
        ("heads=no.json", "heads=no.json: "),
        ("heads=cat.png", "names no head"),
        ("criteria.exclude_layers=99", "criteria.exclude_layers=99"),
        ("save_id=../x", "the id"),
        ("save_id=/etc/passwd", "the id"),
        ("query=</s>", "control token"),
        ("query=<image>", "the expression is empty"),
        ("image_file=.", "is a folder"),
        ("image_file=text.png", "text.png: not an image"),
        ("image_file=cut.png", "cut.png: broken or cut short"),
        ("image_file=empty.png", "empty.png: the file is empty"),
        ("image_file=bomb.png", "bomb.png: 9000 x 9000 = 81 MP, over the limit"),
        ("output_dir=cat.png", "choose another output_dir"),
        ("model.name=gpt2", "model.name=gpt2"),
        ("conv_mode=chat query=<s>", "control token"),
    ],
)
def test_wrong_input_ends_with_one_line(front: Front, options: str, message: str) -> None:
    Path("text.png").write_text("hello")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("cat.png").read_bytes()[:300])
    if options == "image_file=bomb.png":
        Image.new("1", (9000, 9000)).save("bomb.png")
    given = {"stage": "pipeline", "image_file": "cat.png", "query": "the dog", "k": "1"}
    given |= dict(option.split("=", 1) for option in options.split())
    assert message in front.error(*(f"{name}={value}" for name, value in given.items()))
    assert not Path("/etc/passwd.pkl").exists()


@pytest.mark.parametrize("stage", ["collect", "pipeline", "ground", "doctor", "chat"])
def test_a_private_address_needs_permission(front: Front, stage: str) -> None:
    """With it, a server that does not answer is soon reported as failed work."""
    options = ("image_file=http://127.0.0.1:9/cat.png", "query=the dog")
    run = front.chat if stage == "chat" else partial(front.finder, f"stage={stage}")
    result = run(*options)
    assert result.status == 2
    assert "private network" in one_line(result.err)
    assert "allow_private_addresses=true" in result.err
    result = run(*options, "allow_private_addresses=true")
    assert result.status == 1
    assert "http://127.0.0.1:9/cat.png: cannot be reached" in one_line(result.err)


def test_a_private_address_in_a_data_file_fails_only_its_entry(front: Front) -> None:
    entry = {"id": "a", "prompt": "the dog", "image_path": "http://127.0.0.1:9/cat.png"}
    write_lines(Path("data.jsonl"), [entry, {**entry, "id": "b", "image_path": "cat.png"}])
    for more, reason in ([], "private network"), (["allow_private_addresses=true"], "cannot be reached"):
        assert front.finder(*DATA, "heads=[2-0]", "visualize_batch=false", *more).status == 1
        first, second = front.lines()
        assert (first["id"], second["id"]) == ("b", "a")
        assert reason in second["error"]


def test_secrets_of_an_address_are_not_written(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither into files nor into their names, though addresses that differ only in secrets are two images."""
    downloaded = []

    def download(address: Address) -> bytes:
        downloaded.append(address.url)
        return Path("cat.png").read_bytes()

    monkeypatch.setattr(images, "download", download)
    address = "https://me:SECRET@example.org/cat.png?token=SECRET"
    entry = {"prompt": "the dog", "bbox": [2, 2, 30, 30]}
    write_lines(Path("data.jsonl"), [{**entry, "id": id, "image_path": address + id} for id in ("a", "b")])
    for command in (
        ("stage=collect", f"image_file={address}", "query=the dog"),
        ("stage=ground", f"image_file={address}", "query=the dog", "heads=[2-0]"),
        ("stage=evaluate", "data_file=data.jsonl", "heads=[2-0]", "bootstrap=image", "controls=false"),
        ("stage=batch", "data_file=data.jsonl", "visualize_limit=0"),
    ):
        result = front.succeed(*command)
        assert "SECRET" not in result.out + result.err
        assert "without the image" not in result.err
    assert {f"{address}a", f"{address}b"} <= set(downloaded)
    written = [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"SECRET" in path.read_bytes() or "SECRET" in path.name]
    path = front.out / "attention/cat_the-dog.pkl"
    assert load_attention(path).image_file == "https://example.org/cat.png?..."
    monkeypatch.setattr(images, "download", downloading.download)
    result = front.visualize(f"attention_file={path}")
    assert "drawing without the image: https://example.org/cat.png?...: cannot be fetched again" in result.err


def test_a_missing_checkpoint_names_the_alternatives(front: Front) -> None:
    line = front.error("model=llava", "stage=pipeline", *IMAGE, status=1)
    assert "model=tiny" in line
    assert "model.name=/path/to/folder" in line


def test_a_local_checkpoint_gets_a_folder_named_after_it(front: Front) -> None:
    save_llava("my model")
    result = front.succeed("stage=pipeline", "model.name=./my model", *IMAGE)
    names = " ".join(files(Path("outputs/localization_heads")))
    assert re.search(r"my_model-[0-9a-f]{8}/attention/cat_the-dog\.pkl", names)
    assert "no heads are known for ./my model" in result.err


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("stage", ["analyze", "visualize"])
@pytest.mark.parametrize("in_metadata", [False, True])
def test_hostile_pickles_execute_nothing(front: Front, stage: str, in_metadata: bool) -> None:
    """Neither in an attention file nor in the metadata of one."""
    harmless = pickle.dumps(torch.rand(3, 2, 1, 16))
    hostile = pickle.dumps({"version": 1, "attention": _Bomb()})
    Path("bad.pkl").write_bytes(harmless if in_metadata else hostile)
    if in_metadata:
        Path("bad_metadata.pkl").write_bytes(pickle.dumps(_Bomb()))
    assert "bad" in front.error(f"stage={stage}", "attention_file=bad.pkl")
    viewer = front.visualize("attention_file=bad.pkl")
    assert viewer.status == 2
    assert "bad" in one_line(viewer.err)
    assert not Path("exploded").exists()


def test_a_missing_image_is_left_out_of_the_figures(front: Front, attention_file: Path) -> None:
    """A file that was deleted, and an address that may not or cannot be reached."""
    Path("cat.png").unlink()
    result = front.succeed("stage=visualize", f"attention_file={attention_file}")
    assert result.err.count("note: drawing without the image: cat.png: no such file") == 1
    content = load_pickle(attention_file)
    attention_file.write_bytes(pickle.dumps({**content, "image_file": "http://127.0.0.1:9/cat.png"}))
    for run in (partial(front.finder, "stage=visualize"), front.visualize):
        result = run(f"attention_file={attention_file}")
        assert result.status == 0
        assert "drawing without the image: http://127.0.0.1:9/cat.png: leads to this machine" in result.err
        result = run(f"attention_file={attention_file}", "allow_private_addresses=true")
        assert "drawing without the image: http://127.0.0.1:9/cat.png: cannot be reached" in result.err


@pytest.mark.parametrize(
    ("query", "id"),
    [
        ("The dog, on the LEFT!", "cat_the-dog-on-the-left"),
        ("../../etc", "cat_etc"),
        ("🐕", "cat"),
        ("狗", "cat_狗"),
        ("x" * 500, "cat_" + "x" * 96),
        ("a\nb", "cat_a-b"),
        ("<image>\nthe dog", "cat_image-the-dog"),
    ],
)
def test_default_ids_are_safe_names(query: str, id: str) -> None:
    assert default_id("images/cat.png", query) == id
    assert default_id("https://a.example/cat.png?size=1", query) == id


def test_a_16_bit_image_runs_through_the_pipeline(front: Front) -> None:
    """Including the figures; `test_images.py` has every mode."""
    Image.open("cat.png").convert("L").convert("I;16").save("odd.tif")
    front.succeed("stage=pipeline", "image_file=odd.tif", "query=the dog", "save_id=odd")
    assert load_attention(front.out / "attention/odd.pkl").image_size == (64, 48)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_the_box_of_a_tiny_image_lies_inside_it(front: Front, size: tuple[int, int]) -> None:
    draw_image(Path("dot.png"), 0, size)
    front.succeed("stage=pipeline", "image_file=dot.png", "query=the dog")
    front.succeed("stage=ground", "image_file=dot.png", "query=the dog")
    (line,) = read_lines(front.out / "attention/dot_the-dog_prediction.jsonl")
    x0, y0, x1, y1 = line["bbox"]
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]
    assert read_mask(line["mask"], size).any()


# ---------------------------------------------------------------------------------------------------- ground


@pytest.mark.parametrize(("format", "magic"), [("pdf", b"%PDF"), ("svg", b"<svg")])
def test_figure_format(format: str, magic: bytes, front: Front) -> None:
    result = front.succeed("stage=pipeline", *IMAGE, "save_id=one", f"figure_format={format}")
    for name in ("visualization", "grounding"):
        path = front.out / f"attention/one_{name}.{format}"
        assert path.read_bytes().startswith(magic)
        assert str(path) in result.out
    assert not list(front.out.rglob("*.png"))


def test_ground_every_image_of_a_folder(front: Front) -> None:
    """A broken image fails alone; images that share a name get distinct ids."""
    Path("pics").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        draw_image(Path("pics") / name, 0, (64, 48))
    Path("pics/broken.png").write_bytes(b"no image")
    options = ("stage=ground", "query=the dog", "heads=[2-0]", "segmenter=none", "visualize_batch=false")
    result = front.finder(*options, "image_file=pics")
    assert result.status == 1
    assert "broken.png" in result.out
    ids = [line["id"] for line in front.lines() if line["bbox"]]
    assert ids == ["a_the-dog_1", "a_the-dog_2", "b_the-dog"]
    front.succeed(*options, "image_file=pics/a.*")
    assert len(front.lines()) == 2
    assert "save_id= names the files of one image" in front.error(*options, "image_file=pics", "save_id=x")


def test_ground_one_image(front: Front, lvlm: LVLM) -> None:
    """The prediction and the figure; box, score and mask are those of `lh.ground`."""
    front.succeed("stage=ground", *IMAGE, "heads=[2-0,2-1]", "save_id=a")
    assert files(front.out) == {"attention/a_prediction.jsonl", "attention/a_grounding.png"}
    (line,) = read_lines(front.out / "attention/a_prediction.jsonl")
    assert list(line) == [
        "id", "bbox", "score", "mask", "heads", "error",
        "agreement", "confidence", "calibrated", "present", "absent",
    ]  # fmt: skip
    assert line["confidence"] == line["agreement"] and not line["calibrated"] and line["present"] is None
    assert (line["id"], line["heads"], line["error"]) == ("a", [[2, 0], [2, 1]], None)
    expected = lh.ground(lvlm, "cat.png", "the dog", heads=[lh.Head(2, 0), lh.Head(2, 1)])
    assert line["bbox"] == pytest.approx(expected.box)
    assert line["score"] == pytest.approx(expected.score, abs=1e-5)
    assert line["mask"]["size"] == [48, 64]
    np.testing.assert_array_equal(read_mask(line["mask"], (64, 48)), expected.mask)
    assert expected.heatmap.shape == expected.mask.shape == (48, 64)


@pytest.mark.usefixtures("no_figures")
def test_one_image_leaves_the_files_of_a_data_set_alone(front: Front, calls: Calls) -> None:
    """Both its predictions and the log of an interrupted run."""
    write_data(front.folder, 4)
    data = (*DATA, "batch_size=2", "heads=[2-0]")
    front.succeed(*data)
    before = (front.out / "predictions.jsonl").read_bytes()
    calls.restart(fail_at=1)
    assert front.finder(*data).status == 130
    calls.fail_at = None
    front.succeed("stage=ground", *IMAGE, "batch_size=2", "heads=[2-0]")
    assert (front.out / "predictions.jsonl").read_bytes() == before
    front.succeed(*data)
    assert calls.sizes == [2, 1, 2]


def test_fixed_heads_need_no_statistics(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "head_statistics", lambda *_: pytest.fail("the heads are fixed"))
    front.succeed("stage=ground", *IMAGE, "heads=[2-0]")


@pytest.mark.usefixtures("no_figures")
def test_ground_a_data_file(front: Front) -> None:
    """A line per entry, in order, and figures of the first `visualize_limit` entries."""
    write_data(front.folder, 4)
    front.succeed(*DATA, "heads=[2-0]", "visualize_limit=2", "batch_size=3")
    assert [line["id"] for line in front.lines()] == [f"entry_{n}" for n in range(4)]
    figures = {f"attention/entry_{n}_grounding.png" for n in range(2)}
    assert files(front.out) == {"predictions.jsonl", *figures}


@pytest.mark.usefixtures("no_figures")
def test_sources_of_heads(front: Front, lvlm: LVLM) -> None:
    """greedy, a list, a heads.json, and auto: the heads known for the model."""
    write_data(front.folder, 3)

    def heads_used(heads: str) -> list[list[list[int]]]:
        front.succeed(*DATA, "k=2", f"heads={heads}")
        return [line["heads"] for line in front.lines()]

    assert [len(heads) for heads in heads_used("greedy")] == [2, 2, 2]
    assert heads_used("L2H1") == [[[2, 1]]] * 3
    front.succeed("stage=find", "data_file=data.jsonl")
    best = [[h["layer"], h["head"]] for h in front.json("heads.json")["heads"]]
    (front.out / "heads.json").rename("my heads=1.json")
    assert heads_used("my heads=1.json") == [best[:2]] * 3
    assert heads_used("auto") == [[list(head) for head in lvlm.known_heads[:2]]] * 3


@pytest.mark.usefixtures("no_figures")
def test_heads_found_under_other_conditions_are_noted(front: Front, lvlm: LVLM) -> None:
    """By `ground` and `doctor`, if heads.json records the conditions."""
    write_data(front.folder, 2)
    front.succeed("stage=find", "data_file=data.jsonl", "conv_mode=plain")
    content = front.json("heads.json")
    conditions = content["found_with"]
    assert (conditions["conv_mode"], conditions["criteria"]) == ("plain", "paper")
    assert conditions["weights"] == lvlm.fingerprint
    Path("found.json").write_text(json.dumps(content))
    Path("old.json").write_text(json.dumps({k: v for k, v in content.items() if k != "found_with"}))
    difference = "found with conv_mode=plain (here: referseg)"
    other_prompt = "was found with conv_mode=referseg (here: plain); ask as it was found"
    for options, note in (
        (["heads=found.json"], f"heads=found.json: {difference}"),
        (["heads=found.json", "conv_mode=plain"], ""),
        (["heads=old.json"], ""),
        (["conv_mode=plain"], other_prompt),
        ([], ""),
    ):
        cached_load_model.cache_clear()  # each loaded model notes it only once
        result = front.succeed("stage=ground", *IMAGE, "k=1", *options)
        assert note in result.err
        assert ("found with" in result.err) == bool(note)
    cached_load_model.cache_clear()
    result = front.finder("stage=doctor", "image_file=cat.png", "heads=found.json")
    assert difference in result.err
    assert difference in " ".join(result.out.replace("│", " ").split())


def test_a_heads_file_that_does_not_fit_is_refused(front: Front) -> None:
    """Its heads do not exist in this model, or they are fewer than `k`."""
    head = {
        "layer": 40, "head": 2, "selection_frequency": 1.0, "selection_frequency_std": 0.0,
        "attention_sum": 0.5, "spatial_entropy": 0.1,
    }  # fmt: skip
    ranking = {
        "version": 1, "model": "big", "num_samples": 5, "num_trials": 1, "tau": 0.2, "top_n": 10,
        "exclude_layers": 2, "heads": [head],
    }  # fmt: skip
    Path("big.json").write_text(json.dumps(ranking))
    for k, message in ((1, "there is no L40H2"), (3, "k=3")):
        assert message in front.error("stage=ground", *IMAGE, "heads=big.json", f"k={k}")


@pytest.mark.usefixtures("no_figures")
def test_ground_reports_bad_entries_and_goes_on(front: Front) -> None:
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    good = {"id": "good", "prompt": "the dog", "image_path": "cat.png"}
    bad = [
        {**good, "id": "../x"},
        {**good, "id": "broken", "image_path": "broken.png"},
        {**good, "id": "token", "prompt": "the </s> dog"},
    ]
    write_lines(Path("data.jsonl"), [good, "{not json", *bad, {**good, "id": "last", "prompt": "the cat"}])
    assert front.finder(*DATA, "heads=[2-0]", "batch_size=6").status == 1
    lines = front.lines()
    assert [line["id"] for line in lines if line["error"] is None] == ["good", "last"]
    failed = [line for line in lines if line["error"] is not None]
    assert len(failed) == 4
    assert all(line["bbox"] is None and line["mask"] is None for line in failed)


@pytest.mark.usefixtures("no_figures")
def test_ground_resumes(front: Front, calls: Calls) -> None:
    """After an interruption only the unfinished chunks are done, and the file is the same byte for byte."""
    write_data(front.folder, 5)
    options = (*DATA, "heads=[2-0,3-1]", "batch_size=2")
    front.succeed(*options, "output_dir=whole")
    assert len(calls) == 3
    calls.restart(fail_at=2)
    assert "interrupted" in front.error(*options, status=130)
    assert not (front.out / "predictions.jsonl").exists()
    calls.restart()
    front.succeed(*options)
    assert calls.sizes == [1]
    whole = Path("whole/tiny/predictions.jsonl").read_bytes()
    assert (front.out / "predictions.jsonl").read_bytes() == whole
    calls.clear()
    front.succeed(*options)  # nothing of a finished run is reused
    assert len(calls) == 3


@pytest.mark.usefixtures("no_figures")
def test_other_options_do_not_resume_an_interrupted_run(front: Front, calls: Calls) -> None:
    write_data(front.folder, 4)
    options = (*DATA, "heads=[2-0]", "batch_size=2")
    calls.restart(fail_at=1)
    assert front.finder(*options).status == 130
    calls.restart()
    front.succeed(*options, "model.pad_to_square=false")
    assert len(calls) == 2


# -------------------------------------------------------------------------------------- evaluate and scenes


@pytest.mark.usefixtures("no_figures")
def test_evaluate_with_masks_only(front: Front) -> None:
    """A mask implies its tight box; an empty mask or one of another size fails its entry only."""
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:30] = True
    good = {"id": "good", "prompt": "the dog", "image_path": "cat.png", "mask": encode_mask(mask)}
    wrong = encode_mask(np.ones((7, 7), bool))
    bad = [
        {**good, "id": "unboxed", "mask": wrong},
        {**good, "id": "boxed", "mask": wrong, "bbox": [5, 10, 30, 20]},
        {**good, "id": "empty", "mask": encode_mask(np.zeros((48, 64), bool))},
    ]
    write_lines(Path("data.jsonl"), [good, *bad])
    result = front.finder("stage=evaluate", "data_file=data.jsonl", "heads=[2-0]")
    assert result.status == 1, result.err
    metrics = front.json("metrics.json")
    assert (metrics["num_samples"], metrics["num_failed"]) == (1, 3)
    errors = {line["id"]: line["error"] for line in front.lines()}
    assert errors["good"] is None
    assert "7 x 7" in errors["unboxed"] and "7 x 7" in errors["boxed"] and "empty" in errors["empty"]


@pytest.mark.usefixtures("no_figures")
def test_scenes_are_written_once_and_evaluated(front: Front) -> None:
    """`stage=scenes` writes the benchmark and `data=scenes` uses it; another seed gets another folder."""
    options = ("scenes.count=3", "scenes.size=64")
    front.succeed("stage=scenes", *options)
    (data_file,) = Path("outputs/scenes").glob("*/scenes.jsonl")
    written_at = data_file.stat().st_mtime_ns
    entries = read_lines(data_file)
    assert len(entries) == 3
    for entry in entries:
        image = Image.open(data_file.parent / entry["image_path"])
        assert image.size == (64, 64)
        rows, columns = np.nonzero(read_mask(entry["mask"], image.size))
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert entry["bbox"] == tight
    front.succeed("stage=evaluate", "data=scenes", *options)
    metrics = front.json("metrics.json")
    assert metrics["num_samples"] == 3
    assert 0 <= metrics["mean_iou"] <= 1
    assert "ciou" in metrics
    assert data_file.stat().st_mtime_ns == written_at
    front.succeed("stage=scenes", *options, "scenes.seed=1")
    (other,) = [path for path in Path("outputs/scenes").glob("*/scenes.jsonl") if path != data_file]
    assert other.read_text() != data_file.read_text()


# ------------------------------------------------------------------------------------------------ from Python


def test_the_python_lines_of_the_contract(lvlm: LVLM, tmp_path: Path) -> None:
    image = Image.open(draw_image(tmp_path / "cat.png"))
    ranking = lh.find_heads(lvlm, [lh.Sample(image, "the dog"), lh.Sample(tmp_path / "cat.png", "the cat")])
    assert ranking.num_samples == 2
    result = lh.ground(lvlm, image, "the cat on the left", heads=ranking.top(3))
    assert result.heads == tuple(ranking.top(3))
    assert result.mask.shape == result.heatmap.shape == (48, 64)
    assert result.mask.dtype == bool
    with pytest.raises(ValueError, match="at least one sample"):
        lh.find_heads(lvlm, [])
    with pytest.raises(ValueError, match="there is no L99H0"):
        lh.ground(lvlm, image, "the cat", heads=[lh.Head(99, 0)])


# ------------------------------------------------------------------------------------- attention that is not finite


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("stage", ["find", "batch", "ground", "evaluate"])
def test_an_entry_with_attention_that_is_not_finite_fails_alone(front: Front, stage: str) -> None:
    """The report names NaN and the remedy. If every entry fails, the error line does."""
    write_data(front.folder, count=3, bbox=[8, 8, 40, 40])
    model = (f"model.name={save_overflowing(front.folder / 'model')}", "model.label=m", "num_samples=9")
    result = front.finder(f"stage={stage}", "data_file=data.jsonl", *model)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    out = " ".join(result.out.split())
    for word in ("entry_0", "NaN", "model.dtype=bfloat16 or model.dtype=float32"):
        assert word in out
    folder = front.out.parent / "m"
    if stage != "find":
        lines = read_lines(folder / "predictions.jsonl")
        assert [line["id"] for line in lines if line["error"]] == ["entry_0"]
        assert len(lines) == 3
    if stage == "evaluate":
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["num_samples"], metrics["num_failed"]) == (2, 1)
    else:
        assert stage == "ground" or (folder / "heads.json").is_file()
    write_data(front.folder, count=1, bbox=[8, 8, 40, 40])
    error = front.error(f"stage={stage}", "data_file=data.jsonl", *model, status=1)
    assert re.search(r"the first: .*entry_0.* is not finite \(NaN", error)


@pytest.mark.parametrize("stage", ["pipeline", "collect", "ground"])
def test_one_image_with_attention_that_is_not_finite(front: Front, stage: str) -> None:
    model = f"model.name={save_overflowing(front.folder / 'model')}"
    assert "is not finite (NaN" in front.error(f"stage={stage}", *IMAGE, model, status=1)


def test_python_leaves_out_samples_with_attention_that_is_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lvlm = lh.load_model(str(save_overflowing(tmp_path / "model")), device="cpu")
    image = Image.new("RGB", (64, 48), "red")
    samples = [lh.Sample(image, words, bbox=(8, 8, 40, 40)) for words in ("the car", "the dog", "left")]
    assert lh.find_heads(lvlm, samples).num_samples == lh.find_heads(lvlm, samples[::2]).num_samples
    assert "'the dog' is left out" in caplog.text
    metrics = lh.evaluate(lvlm, samples, [(2, 0)], segmenter=None).metrics
    assert (metrics["num_samples"], metrics["num_failed"]) == (2, 1)
    for fail in (
        lambda: lh.find_heads(lvlm, samples[1:2]),
        lambda: lh.evaluate(lvlm, samples[1:2], [(2, 0)]),
        lambda: lh.ground(lvlm, image, "the dog", [(2, 0)]),
        lambda: lvlm.attend(image, "the dog"),
    ):
        with pytest.raises(NotFiniteError, match=r"model.dtype=bfloat16 or model.dtype=float32"):
            fail()


# ---------------------------------------------------------------------------------------------- computed once


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images are opened and decoded, samples analysed, expressions cleaned, prompts and figures made."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str, applies: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def spy(*arguments: Any, **named: Any) -> Any:
            counts[what] += applies(*arguments)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, spy)

    count(Image, "open", "opened")
    count(ImageFile.ImageFile, "load", "decoded", lambda image: bool(image.tile))
    count(find, "head_statistics", "analysed")
    count(single, "head_statistics", "analysed")
    count(model_with_processor, "clean_expression", "cleaned", lambda text, *_: text.startswith("the "))
    count(model_with_processor, "expression_prompt", "rendered", lambda text, *_: text.startswith("the "))
    count(Figure, "savefig", "drawn")
    return counts


def test_a_batch_computes_each_thing_once(front: Front, counts: Counter[str]) -> None:
    """A second run opens the images for the masks, reads the maps for the boxes, and draws no figure again."""
    number = 4
    write_lines(
        Path("data.jsonl"),
        [
            {"id": f"entry_{n}", "prompt": f"the dog {n}", "image_path": draw_image(Path(f"{n}.png"), n).name}
            for n in range(number)
        ],
    )
    options = ("stage=batch", "data_file=data.jsonl", "report=false")
    front.succeed(*options)
    each = {"opened": number, "decoded": number, "analysed": number}
    assert counts == {**each, "cleaned": number, "rendered": number, "drawn": 2 * number + 3}
    counts.clear()
    figures = {path: path.stat().st_mtime_ns for path in front.out.rglob("*.png")}
    front.succeed(*options)
    assert +counts == each
    assert figures == {path: path.stat().st_mtime_ns for path in front.out.rglob("*.png")}
    draw_image(Path("0.png"), 9)
    counts.clear()
    front.succeed(*options, "top_k=2")
    assert counts["drawn"] >= number + 1  # the top maps of all, and the box of the changed image


def test_a_figure_that_was_cut_short_is_drawn_again(tmp_path: Path) -> None:
    path, values = tmp_path / "grid.png", np.ones((3, 3))
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is not None
    whole = path.read_bytes()
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is None
    path.write_bytes(whole[:-20])
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is not None
    assert path.read_bytes() == whole
    assert figures.plot_once(figures.plot_head_grid, 2 * values, path=path) is not None
    assert figures.plot_once(figures.plot_head_grid, 2 * values, path=path, always=True) is not None
