"""Single images, figures' files, grounding, evaluation and scenes, from the command line to the files."""

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
from localization_heads.data import images
from localization_heads.data import network as downloading
from localization_heads.data.address import Address
from localization_heads.data.masks import encode_mask, read_mask
from localization_heads.errors import NotFiniteError
from localization_heads.lvlm.model import LVLM
from localization_heads.stages.single import default_id
from localization_heads.store.attention_files import load_attention
from localization_heads.store.paths import attention_path

ATTENTION_KEYS = [
    "version", "attention", "grid", "image_size", "image_box", "image_file", "query", "prompt", "model", "id",
    "asked",
]  # fmt: skip
ANALYSIS_KEYS = [
    "layer", "head", "head_idx", "attn_sum", "spatial_entropy", "bottom_row_focus", "num_components", "above_threshold",
]  # fmt: skip


@pytest.fixture
def front(front: Front) -> Front:
    draw_image(front.folder / "cat.png")
    return front


def load_pickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def files(folder: Path) -> set[str]:
    """Everything that a user sees."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# ---------------------------------------------------------------------------------------------- one image


def test_pipeline_writes_what_the_contract_says(front: Front, lvlm: LVLM) -> None:
    """Attention, analysis and both figures, named after image and query, and the box on the screen."""
    result = front.succeed("stage=pipeline", "image_file=cat.png", "query=What is in this image?", "top_k=2")
    stem = "attention/cat_what-is-in-this-image"
    assert files(front.out) == {
        f"{stem}{end}" for end in (".pkl", "_analysis.pkl", "_visualization.png", "_grounding.png")
    }
    assert "box: " in result.out
    assert f"wrote {front.out}/{stem}.pkl" in result.out
    for end in ("_visualization.png", "_grounding.png"):
        assert Image.open(front.out / f"{stem}{end}").width > 100

    content = load_pickle(front.out / f"{stem}.pkl")
    assert list(content) == ATTENTION_KEYS
    attention = content["attention"]
    assert type(attention) is np.ndarray
    assert attention.dtype == np.float32
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
    types = {name: type(value) for name, value in rows[0].items()}
    assert types == dict(zip(ANALYSIS_KEYS, (int, int, int, float, float, bool, int, bool), strict=True))
    order = [(not row["above_threshold"], row["spatial_entropy"]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        assert row["head_idx"] == row["layer"] * lvlm.num_heads + row["head"]
        assert row["attn_sum"] == pytest.approx(attention[row["layer"], row["head"]].sum(), abs=1e-5)
    assert any(row["above_threshold"] for row in rows)
    assert not any(row["above_threshold"] for row in rows if row["layer"] < 2)


def test_collect_analyze_visualize_in_turn(front: Front) -> None:
    """Each adds its files; visualize alone analyses first."""
    front.succeed("stage=collect", "image_file=cat.png", "query=the dog", "save_id=example_1")
    assert files(front.out) == {"attention/example_1.pkl"}
    name = f"attention_file={front.out}/attention/example_1.pkl"
    result = front.succeed("stage=analyze", name, "top_k=2")
    assert "Top 2 heads of this sample" in result.out
    assert files(front.out) == {"attention/example_1.pkl", "attention/example_1_analysis.pkl"}
    (front.out / "attention/example_1_analysis.pkl").unlink()
    front.succeed("stage=visualize", name)
    assert files(front.out) == {
        f"attention/example_1{end}"
        for end in (".pkl", "_analysis.pkl", "_visualization.png", "_grounding.png")
    }


def test_the_path_of_the_first_document_finds_the_model_that_was_run(front: Front) -> None:
    """`outputs/localization_heads/llava/attention/example_1.pkl` works after a run of any model."""
    front.finder("stage=collect", "image_file=cat.png", "query=the dog", "save_id=example_1")
    asked = "outputs/localization_heads/llava/attention/example_1.pkl"
    result = front.succeed("stage=analyze", f"attention_file={asked}")
    assert f"taking {front.out}/attention/example_1.pkl" in result.err
    result = front.finder("stage=visualize", f"attention_file={asked}")
    assert result.err.count("taking ") == 1


def test_visualize_keeps_an_analysis_that_is_there(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been made under other criteria; one that cannot be read is made again."""
    stub_figures(monkeypatch)
    front.finder("stage=collect", "image_file=cat.png", "query=the dog", "save_id=a")
    name, path = f"attention_file={front.out}/attention/a.pkl", front.out / "attention/a_analysis.pkl"
    front.finder("stage=analyze", name, "criteria.tau=0.9")
    before = path.read_bytes()
    front.succeed("stage=visualize", name, "criteria.tau=0")
    assert path.read_bytes() == before
    path.write_bytes(b"torn")
    front.succeed("stage=visualize", name)
    assert len(load_pickle(path)) > 1


@pytest.mark.parametrize("format", ["safetensors", "published", "published_august"])
def test_other_formats_hold_the_same_maps(format: str, front: Front) -> None:
    options = ("stage=pipeline", "image_file=cat.png", "query=the dog", "save_id=a", "k=2")
    pickled = front.finder(*options)
    tensors = front.finder(*options, f"attention_format={format}", "output_dir=other")
    assert (pickled.status, tensors.status) == (0, 0)
    one = load_attention(front.out / "attention/a.pkl")
    two = load_attention(attention_path("other/tiny/attention", "a", format))
    np.testing.assert_array_equal(one.attention, two.attention)
    assert [getattr(one, name) for name in ("image_box", "image_size", "query", "prompt", "model", "id")] == [
        getattr(two, name) for name in ("image_box", "image_size", "query", "prompt", "model", "id")
    ]
    assert load_pickle(front.out / "attention/a_analysis.pkl") == load_pickle(
        Path("other/tiny/attention/a_analysis.pkl")
    )
    assert next(line for line in pickled.out.splitlines() if "box:" in line) in tensors.out


def test_the_seed_tools_own_files(front: Front) -> None:
    """A bare torch tensor `[L, H, 1, P*P]` with `_metadata.pkl`: analysed and drawn, without a model."""
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
    assert all(
        row["attn_sum"] == pytest.approx(float(sums[row["layer"], row["head"]]), rel=1e-3) for row in rows
    )
    result = front.succeed("stage=visualize", name, "top_k=3")
    assert "box: " in result.out
    assert {"example_1_visualization.png", "example_1_grounding.png"} <= files(folder)
    assert front.visualize("mode=single", name).status == 0


def test_the_answer_is_printed_on_request(front: Front) -> None:
    options = ("stage=collect", "image_file=cat.png", "query=the dog")
    assert "answer:" not in front.finder(*options).out
    assert "answer:" in front.finder(*options, "max_new_tokens=3").out


def test_criteria_reach_the_analysis(front: Front) -> None:
    """The published reading, and a threshold of one's own."""
    front.finder("stage=collect", "image_file=cat.png", "query=the dog", "save_id=a")
    path = front.out / "attention/a_analysis.pkl"
    name = f"attention_file={front.out}/attention/a.pkl"
    found = {}
    for choice in ("criteria=paper", "criteria=published", "criteria.tau=0", "criteria.tau=0.9"):
        front.succeed("stage=analyze", name, choice)
        found[choice] = load_pickle(path)
    kept = {name: sum(row["above_threshold"] for row in rows) for name, rows in found.items()}
    layers = {row["layer"] for row in found["criteria.tau=0"] if row["above_threshold"]}
    assert min(layers) == 2
    assert kept["criteria.tau=0"] > kept["criteria.tau=0.9"]
    assert found["criteria=published"] != found["criteria=paper"]
    for rows in found.values():  # so that analysis[:top_k] holds heads that passed
        keys = [(not row["above_threshold"], row["spatial_entropy"]) for row in rows]
        assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["heads=[99-0]"], "there is no L99H0"),
        (["heads=0-999"], "there is no L0H999"),
        (["heads=[first]"], "names no head"),
        (["heads=[]"], "names no head"),
        (["heads=[3-2,2-0,L3H2]"], "heads names L3H2 twice"),
        (["heads=no.json"], "heads=no.json: "),
        (["heads=cat.png"], "names no head"),
        (["criteria.exclude_layers=99"], "criteria.exclude_layers=99"),
        (["save_id=../x"], "the id"),
        (["save_id=/etc/passwd"], "the id"),
        (["query=</s>"], "control token"),
        (["query=<image>"], "the expression is empty"),
        (["image_file=."], "is a folder"),
        (["image_file=text.png"], "text.png: not an image"),
        (["image_file=cut.png"], "cut.png: broken or cut short"),
        (["image_file=empty.png"], "empty.png: the file is empty"),
        (["image_file=bomb.png"], "bomb.png: 9000 x 9000 = 81 MP, over the limit"),
        (["output_dir=cat.png"], "choose another output_dir"),
        (["model.name=gpt2"], "model.name=gpt2"),
        (["conv_mode=chat", "query=<s>"], "control token"),
    ],
)
def test_wrong_input_is_named(front: Front, options: list[str], said: str) -> None:
    """Status 2, one line, no traceback; a later option overrides an earlier one."""
    Path("text.png").write_text("hello")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("cat.png").read_bytes()[:300])
    if "image_file=bomb.png" in options:
        Image.new("1", (9000, 9000)).save("bomb.png")
    given = {"stage": "pipeline", "image_file": "cat.png", "query": "the dog", "k": "1"}
    given |= dict(option.split("=", 1) for option in options)
    assert said in front.error(*(f"{name}={value}" for name, value in given.items()))
    assert not Path("/etc/passwd.pkl").exists()


@pytest.mark.parametrize("stage", ["collect", "pipeline", "ground", "doctor", "chat"])
def test_a_private_address_is_refused_unless_it_is_asked_for(front: Front, stage: str) -> None:
    """Then a server that does not answer is a failure of the work, soon, that names the address."""
    options = ("image_file=http://127.0.0.1:9/cat.png", "query=the dog")
    run = front.chat if stage == "chat" else partial(front.finder, f"stage={stage}")
    result = run(*options)
    assert result.status == 2
    assert "private network" in one_line(result.err)
    assert "allow_private_addresses=true" in result.err
    result = run(*options, "allow_private_addresses=true")
    assert result.status == 1
    assert "http://127.0.0.1:9/cat.png: cannot be reached" in one_line(result.err)


def test_a_private_address_in_a_data_file_costs_its_entry(front: Front) -> None:
    entry = {"id": "a", "prompt": "the dog", "image_path": "http://127.0.0.1:9/cat.png"}
    write_lines(Path("data.jsonl"), [entry, {**entry, "id": "b", "image_path": "cat.png"}])
    options = ("stage=ground", "data_file=data.jsonl", "heads=[2-0]", "visualize_batch=false")
    for more, said in ((), "private network"), (("allow_private_addresses=true",), "cannot be reached"):
        assert front.finder(*options, *more).status == 1
        lines = front.lines()
        assert [line["id"] for line in lines] == ["b", "a"]
        assert said in lines[1]["error"]


def test_secrets_of_an_address_are_in_no_file(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its name either; and two addresses that differ in nothing else are two images."""
    asked = []

    def download(address: Address) -> bytes:
        asked.append(address.url)
        return Path("cat.png").read_bytes()

    monkeypatch.setattr(images, "download", download)
    address = "https://me:SECRET@example.org/cat.png?token=SECRET"
    write_lines(
        Path("data.jsonl"),
        [
            {"id": id, "prompt": "the dog", "image_path": f"{address}{id}", "bbox": [2, 2, 30, 30]}
            for id in ("a", "b")
        ],
    )
    commands = (
        ("stage=collect", f"image_file={address}", "query=the dog"),
        ("stage=ground", f"image_file={address}", "query=the dog", "heads=[2-0]"),
        ("stage=evaluate", "data_file=data.jsonl", "heads=[2-0]", "bootstrap=image", "controls=false"),
        ("stage=batch", "data_file=data.jsonl", "visualize_limit=0"),
    )
    for command in commands:
        result = front.succeed(*command)
        assert "SECRET" not in result.out + result.err
        assert "without the image" not in result.err
    assert {f"{address}a", f"{address}b"} <= set(asked)
    written = [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"SECRET" in path.read_bytes() or "SECRET" in path.name]
    path = front.out / "attention/cat_the-dog.pkl"
    assert load_attention(path).image_file == "https://example.org/cat.png?..."
    monkeypatch.setattr(images, "download", downloading.download)
    result = front.visualize(f"attention_file={path}")
    assert "drawing without the image: https://example.org/cat.png?...: cannot be fetched again" in result.err


def test_a_model_that_is_not_here(front: Front) -> None:
    """Offline: the message names the embedded model and the local folder."""
    result = front.finder("model=llava", "stage=pipeline", "image_file=cat.png", "query=the dog")
    assert result.status == 1
    line = one_line(result.err)
    assert "model=tiny" in line
    assert "model.name=/path/to/folder" in line


def test_a_local_folder_runs_through_the_pipeline(front: Front) -> None:
    """Its files go to a folder named after it."""
    save_llava("my model")
    result = front.succeed(
        "stage=pipeline", "model.name=./my model", "image_file=cat.png", "query=the red car"
    )
    found = files(Path("outputs/localization_heads"))
    assert any(re.fullmatch(r"my_model-[0-9a-f]{8}/attention/cat_the-red-car\.pkl", file) for file in found)
    assert "no heads are known for ./my model" in result.err


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("stage", ["analyze", "visualize"])
@pytest.mark.parametrize("beside", [False, True])
def test_hostile_pickles_run_nothing(front: Front, stage: str, beside: bool) -> None:
    """As the attention file, inside one, and as the metadata beside one."""
    good = pickle.dumps(torch.rand(3, 2, 1, 16))
    Path("bad.pkl").write_bytes(good if beside else pickle.dumps({"version": 1, "attention": _Bomb()}))
    if beside:
        Path("bad_metadata.pkl").write_bytes(pickle.dumps(_Bomb()))
    for result in (
        front.finder(f"stage={stage}", "attention_file=bad.pkl"),
        front.visualize("attention_file=bad.pkl"),
    ):
        assert result.status == 2
        assert "bad" in one_line(result.err)
    assert not Path("exploded").exists()


def test_an_image_that_is_gone_costs_only_the_image(front: Front) -> None:
    """An attention file outlives its image, and an address that cannot be reached."""
    front.finder("stage=collect", "image_file=cat.png", "query=the dog", "save_id=a")
    path = front.out / "attention/a.pkl"
    Path("cat.png").unlink()
    result = front.succeed("stage=visualize", f"attention_file={path}")
    assert result.err.count("note: drawing without the image: cat.png: no such file") == 1
    content = load_pickle(path)
    path.write_bytes(pickle.dumps({**content, "image_file": "http://127.0.0.1:9/cat.png"}))
    for run in (front.finder, front.visualize):
        stage = ["stage=visualize"] if run == front.finder else []
        result = run(*stage, f"attention_file={path}")  # a stranger's file does not choose whom to ask
        assert result.status == 0
        assert "drawing without the image: http://127.0.0.1:9/cat.png: leads to this machine" in result.err
        result = run(*stage, f"attention_file={path}", "allow_private_addresses=true")
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


def test_an_image_of_another_mode_runs(front: Front) -> None:
    """Figures and all; `test_images.py` has every mode."""
    Image.open("cat.png").convert("L").convert("I;16").save("odd.tif")
    front.succeed("stage=pipeline", "image_file=odd.tif", "query=the dog", "save_id=odd")
    assert load_attention(front.out / "attention/odd.pkl").image_size == (64, 48)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_tiny_images_get_a_box_inside_them(front: Front, size: tuple[int, int]) -> None:
    """With figures, masks and all."""
    draw_image(Path("dot.png"), 0, size)
    front.succeed("stage=pipeline", "image_file=dot.png", "query=the dog")
    front.succeed("stage=ground", "image_file=dot.png", "query=the dog")
    (line,) = read_lines(front.out / "attention/dot_the-dog_prediction.jsonl")
    x0, y0, x1, y1 = line["bbox"]
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]
    assert read_mask(line["mask"], size).any()


# ---------------------------------------------------------------------------------------------------- ground


@pytest.mark.parametrize(("form", "beginning"), [("pdf", b"%PDF"), ("svg", b"<svg")])
def test_figures_for_a_paper(form: str, beginning: bytes, front: Front) -> None:
    options = (
        "stage=pipeline", "image_file=cat.png", "query=the dog", "save_id=one", f"figure_format={form}",
    )  # fmt: skip
    result = front.succeed(*options)
    for name in ("visualization", "grounding"):
        path = front.out / f"attention/one_{name}.{form}"
        assert path.read_bytes().startswith(beginning)
        assert str(path) in result.out
    assert not list(front.out.rglob("*.png"))


def test_ground_every_image_of_a_folder(front: Front) -> None:
    """Each is an entry: a broken one is named and the others are done; two of one name have ids of their own."""
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
    assert (
        "save_id= names the files of one image" in front.finder(*options, "image_file=pics", "save_id=x").err
    )


def test_ground_one_image(front: Front) -> None:
    """A box, a mask, an overlay; the same as from Python."""
    front.succeed("stage=ground", "image_file=cat.png", "query=the dog", "heads=[2-0,2-1]", "save_id=a")
    assert files(front.out) == {"attention/a_prediction.jsonl", "attention/a_grounding.png"}
    (line,) = read_lines(front.out / "attention/a_prediction.jsonl")
    assert list(line)[:6] == ["id", "bbox", "score", "mask", "heads", "error"]
    assert list(line)[6:] == ["agreement", "confidence", "calibrated", "present", "absent"]
    assert line["confidence"] == line["agreement"] and not line["calibrated"] and line["present"] is None
    assert (line["id"], line["heads"], line["error"]) == ("a", [[2, 0], [2, 1]], None)
    lvlm = lh.load_model(device="cpu")
    found = lh.ground(lvlm, "cat.png", "the dog", heads=[lh.Head(2, 0), lh.Head(2, 1)])
    assert line["bbox"] == pytest.approx(found.box)
    assert line["score"] == pytest.approx(found.score, abs=1e-5)
    assert line["mask"]["size"] == [48, 64]
    np.testing.assert_array_equal(read_mask(line["mask"], (64, 48)), found.mask)
    assert found.heatmap.shape == found.mask.shape == (48, 64)


def test_one_image_leaves_the_data_sets_files(
    front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    """Its predictions, and what an interrupted run has finished, are not those of the image."""
    stub_figures(monkeypatch)
    write_data(front.folder, 4)
    data, heads = ("stage=ground", "data_file=data.jsonl", "batch_size=2"), "heads=[2-0]"
    front.succeed(*data, heads)
    before = (front.out / "predictions.jsonl").read_bytes()
    calls.restart(fail_at=1)
    assert front.finder(*data, heads).status == 130
    calls.fail_at = None
    image = ("stage=ground", "image_file=cat.png", "query=the dog", "batch_size=2")
    front.succeed(*image, heads)
    assert (front.out / "predictions.jsonl").read_bytes() == before
    front.succeed(*data, heads)
    assert calls.sizes == [2, 1, 2]


def test_fixed_heads_need_no_statistics(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    from localization_heads.stages import ground

    def fail(*_: Any) -> None:
        raise AssertionError("the heads are known")

    monkeypatch.setattr(ground, "head_statistics", fail)
    front.succeed("stage=ground", "image_file=cat.png", "query=the dog", "heads=[2-0]")


def test_ground_a_data_file(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line an entry, in order; the figures of the first `visualize_limit`."""
    stub_figures(monkeypatch)
    write_data(front.folder, 4)
    front.succeed("stage=ground", "data_file=data.jsonl", "heads=[2-0]", "visualize_limit=2", "batch_size=3")
    lines = front.lines()
    assert [line["id"] for line in lines] == [f"entry_{n}" for n in range(4)]
    assert files(front.out) == {
        "predictions.jsonl", "attention/entry_0_grounding.png", "attention/entry_1_grounding.png",
    }  # fmt: skip


def test_heads_from_everywhere(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """greedy, a list, a heads.json, and auto: those that are known of the model."""
    stub_figures(monkeypatch)
    write_data(front.folder, 3)
    options = ("stage=ground", "data_file=data.jsonl", "k=2")

    def heads(choice: str) -> list[list[list[int]]]:
        front.succeed(*options, f"heads={choice}")
        return [line["heads"] for line in front.lines()]

    greedy = heads("greedy")
    assert all(len(found) == 2 for found in greedy)
    assert heads("L2H1") == [[[2, 1]]] * 3
    front.succeed("stage=find", "data_file=data.jsonl")
    best = [[h["layer"], h["head"]] for h in front.json("heads.json")["heads"]]
    (front.out / "heads.json").rename("my heads=1.json")
    assert heads("my heads=1.json") == [best[:2]] * 3
    known = lh.load_model(device="cpu").known_heads
    assert heads("auto") == [[list(head) for head in known[:2]]] * 3


def test_heads_found_in_another_way(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """`find` and `rank` write how; `ground` and `doctor` compare; a file that does not say it is used in silence."""
    stub_figures(monkeypatch)
    write_data(front.folder, 2)
    front.succeed("stage=find", "data_file=data.jsonl", "conv_mode=plain")
    content = front.json("heads.json")
    assert content["found_with"]["weights"] == lh.load_model(device="cpu").fingerprint
    assert (content["found_with"]["conv_mode"], content["found_with"]["criteria"]) == ("plain", "paper")
    Path("found.json").write_text(json.dumps(content))
    Path("old.json").write_text(json.dumps({k: v for k, v in content.items() if k != "found_with"}))
    ground = ("stage=ground", "image_file=cat.png", "query=the dog", "k=1")
    said = "found with conv_mode=plain (here: referseg)"
    for options, noted in (
        ((*ground, "heads=found.json"), f"heads=found.json: {said}"),
        ((*ground, "heads=found.json", "conv_mode=plain"), ""),
        ((*ground, "heads=old.json"), ""),
        (
            (*ground, "conv_mode=plain"),
            "was found with conv_mode=referseg (here: plain); ask as it was found",
        ),
        (ground, ""),
    ):
        cached_load_model.cache_clear()  # a note is said once for a loaded model
        result = front.succeed(*options)
        assert noted in result.err
        assert ("found with" in result.err) == bool(noted)
    cached_load_model.cache_clear()
    result = front.finder("stage=doctor", "image_file=cat.png", "heads=found.json")
    assert said in result.err
    assert said in " ".join(result.out.replace("│", " ").split())


def test_heads_of_another_model(front: Front) -> None:
    """A heads.json whose heads do not exist here is wrong use, not a wrong box; so is one with too few."""
    head = {
        "layer": 40, "head": 2, "selection_frequency": 1.0, "selection_frequency_std": 0.0,
        "attention_sum": 0.5, "spatial_entropy": 0.1,
    }  # fmt: skip
    ranking = {
        "version": 1, "model": "big", "num_samples": 5, "num_trials": 1, "tau": 0.2, "top_n": 10,
        "exclude_layers": 2, "heads": [head],
    }  # fmt: skip
    Path("big.json").write_text(json.dumps(ranking))
    options = ("stage=ground", "image_file=cat.png", "query=the dog", "heads=big.json")
    assert "there is no L40H2" in front.error(*options, "k=1")
    assert "k=3" in front.error(*options, "k=3")


def test_ground_reports_bad_entries_and_goes_on(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    entries: list[Any] = [
        {"id": "good", "prompt": "the dog", "image_path": "cat.png"},
        "{not json",
        {"id": "../x", "prompt": "the dog", "image_path": "cat.png"},
        {"id": "broken", "prompt": "the dog", "image_path": "broken.png"},
        {"id": "token", "prompt": "the </s> dog", "image_path": "cat.png"},
        {"id": "last", "prompt": "the cat", "image_path": "cat.png"},
    ]
    write_lines(Path("data.jsonl"), entries)
    result = front.finder("stage=ground", "data_file=data.jsonl", "heads=[2-0]", "batch_size=6")
    assert result.status == 1
    lines = front.lines()
    assert [line["id"] for line in lines if line["error"] is None] == ["good", "last"]
    assert sum(line["error"] is not None for line in lines) == 4
    assert all(line["bbox"] is None and line["mask"] is None for line in lines if line["error"])


def test_ground_resumes(front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """After an interruption the finished chunks are not done again, and the file is the same byte for byte."""
    stub_figures(monkeypatch)
    write_data(front.folder, 5)
    options = ("stage=ground", "data_file=data.jsonl", "heads=[2-0,3-1]", "batch_size=2")
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
    front.succeed(*options)  # a finished run starts anew
    assert len(calls) == 3


def test_an_interrupted_ground_with_other_options_starts_anew(
    front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    """Another padding is another box: nothing of the interrupted run is taken."""
    stub_figures(monkeypatch)
    write_data(front.folder, 4)
    options = ("stage=ground", "data_file=data.jsonl", "heads=[2-0]", "batch_size=2")
    calls.restart(fail_at=1)
    assert front.finder(*options).status == 130
    calls.restart()
    front.succeed(*options, "model.pad_to_square=false")
    assert len(calls) == 2


# -------------------------------------------------------------------------------------- evaluate and scenes


def test_evaluate_with_masks_alone_and_broken_ones(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask gives its tight box; one of another size fails its entry and not the run."""
    stub_figures(monkeypatch)
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:30] = True
    good = {"id": "good", "prompt": "the dog", "image_path": "cat.png", "mask": encode_mask(mask)}
    wrong = encode_mask(np.ones((7, 7), bool))
    write_lines(
        Path("data.jsonl"),
        [
            good,
            {**good, "id": "alone", "mask": wrong},
            {**good, "id": "boxed", "mask": wrong, "bbox": [5, 10, 30, 20]},
            {**good, "id": "empty", "mask": encode_mask(np.zeros((48, 64), bool))},
        ],
    )
    result = front.finder("stage=evaluate", "data_file=data.jsonl", "heads=[2-0]")
    assert result.status == 1, result.err
    metrics = front.json("metrics.json")
    assert (metrics["num_samples"], metrics["num_failed"]) == (1, 3)
    errors = {line["id"]: line["error"] for line in front.lines()}
    assert errors["good"] is None
    assert "7 x 7" in errors["alone"]
    assert "7 x 7" in errors["boxed"]
    assert "empty" in errors["empty"]


def test_scenes_are_written_once_and_evaluated(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stage=scenes` writes the benchmark, `data=scenes` uses it; another seed is another one."""
    stub_figures(monkeypatch)
    options = ("scenes.count=3", "scenes.size=64")
    front.succeed("stage=scenes", *options)
    (data_file,) = Path("outputs/scenes").glob("*/scenes.jsonl")
    before = data_file.stat().st_mtime_ns
    entries = read_lines(data_file)
    assert len(entries) == 3
    for entry in entries:
        image = Image.open(data_file.parent / entry["image_path"])
        assert image.size == (64, 64)
        mask = read_mask(entry["mask"], image.size)
        x0, y0, x1, y1 = entry["bbox"]
        rows, columns = np.nonzero(mask)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
    front.succeed("stage=evaluate", "data=scenes", *options)
    metrics = front.json("metrics.json")
    assert metrics["num_samples"] == 3
    assert 0 <= metrics["mean_iou"] <= 1
    assert "ciou" in metrics
    assert data_file.stat().st_mtime_ns == before
    front.succeed("stage=scenes", *options, "scenes.seed=1")
    other = [path for path in Path("outputs/scenes").glob("*/scenes.jsonl") if path != data_file]
    assert other[0].read_text() != data_file.read_text()


# ------------------------------------------------------------------------------------------------ from Python


def test_the_few_lines_of_the_contract_run_in_python(lvlm: LVLM, tmp_path: Path) -> None:
    """The few lines of the contract."""
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


# ------------------------------------------------------------------------------------------- attention not finite


@pytest.mark.parametrize("stage", ["find", "batch", "ground", "evaluate"])
def test_an_entry_that_overflows_fails_alone(
    front: Front, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """NaN is named, and the way out; where every entry fails so, the run says it in one line."""
    stub_figures(monkeypatch)
    write_data(front.folder, count=3, bbox=[8, 8, 40, 40])
    model = (f"model.name={save_overflowing(front.folder / 'model')}", "model.label=m", "num_samples=9")
    result = front.finder(f"stage={stage}", "data_file=data.jsonl", *model)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    out = " ".join(result.out.split())
    assert "entry_0" in out
    for word in ("NaN", "model.dtype=bfloat16 or model.dtype=float32"):
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
    result = front.finder(f"stage={stage}", "data_file=data.jsonl", *model)
    assert result.status == 1
    assert re.search(r"the first: .*entry_0.* is not finite \(NaN", one_line(result.err))


@pytest.mark.parametrize("options", [["stage=pipeline"], ["stage=collect"], ["stage=ground"]])
def test_one_image_that_overflows(front: Front, options: list[str]) -> None:
    model = f"model.name={save_overflowing(front.folder / 'model')}"
    assert "is not finite (NaN" in front.error(
        *options, "image_file=cat.png", "query=the dog", model, status=1
    )


def test_samples_that_overflow_are_left_out_in_python(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lvlm = lh.load_model(str(save_overflowing(tmp_path / "model")), device="cpu")
    image = Image.new("RGB", (64, 48), "red")
    samples = [lh.Sample(image, words, bbox=(8, 8, 40, 40)) for words in ("the car", "the dog", "left")]
    assert lh.find_heads(lvlm, samples).num_samples == lh.find_heads(lvlm, samples[::2]).num_samples
    assert "'the dog' is left out" in caplog.text
    metrics = lh.evaluate(lvlm, samples, [(2, 0)], segmenter=None).metrics
    assert (metrics["num_samples"], metrics["num_failed"]) == (2, 1)
    for fails in (
        lambda: lh.find_heads(lvlm, samples[1:2]),
        lambda: lh.evaluate(lvlm, samples[1:2], [(2, 0)]),
        lambda: lh.ground(lvlm, image, "the dog", [(2, 0)]),
        lambda: lvlm.attend(image, "the dog"),
    ):
        with pytest.raises(NotFiniteError, match=r"model.dtype=bfloat16 or model.dtype=float32"):
            fails()


# ---------------------------------------------------------------------------------------------- computed once


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images are opened and decoded, samples analysed, expressions cleaned, prompts and figures made."""
    from localization_heads.lvlm import prompted
    from localization_heads.stages import find, single

    counts: Counter[str] = Counter()

    def count(holder: Any, name: str, what: str, known: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(holder, name)

        def spy(*arguments: Any, **named: Any) -> Any:
            counts[what] += known(*arguments)
            return original(*arguments, **named)

        monkeypatch.setattr(holder, name, spy)

    count(Image, "open", "opened")
    count(ImageFile.ImageFile, "load", "decoded", lambda image: bool(image.tile))
    count(find, "head_statistics", "analysed")
    count(single, "head_statistics", "analysed")
    count(prompted, "clean_expression", "cleaned", lambda text, *_: text.startswith("the "))
    count(prompted, "expression_prompt", "rendered", lambda text, *_: text.startswith("the "))
    count(Figure, "savefig", "drawn")
    return counts


def test_a_batch_computes_each_thing_once(front: Front, counted: Counter[str], tmp_path: Path) -> None:
    """A rerun opens the images for the masks, reads the maps for the boxes, and draws nothing anew."""
    number = 4
    write_lines(
        tmp_path / "data.jsonl",
        [
            {
                "id": f"entry_{n}",
                "prompt": f"the dog {n}",
                "image_path": draw_image(tmp_path / f"{n}.png", n).name,
            }
            for n in range(number)
        ],
    )
    front.succeed("stage=batch", "data_file=data.jsonl", "report=false")
    assert counted == {
        "opened": number, "decoded": number, "analysed": number, "cleaned": number, "rendered": number,
        "drawn": 2 * number + 3,
    }  # fmt: skip
    counted.clear()
    figures = {path: path.stat().st_mtime_ns for path in front.out.rglob("*.png")}
    front.succeed("stage=batch", "data_file=data.jsonl", "report=false")
    assert +counted == {"opened": number, "decoded": number, "analysed": number}
    assert figures == {path: path.stat().st_mtime_ns for path in front.out.rglob("*.png")}
    draw_image(tmp_path / "0.png", 9)
    counted.clear()
    front.succeed("stage=batch", "data_file=data.jsonl", "report=false", "top_k=2")
    assert counted["drawn"] >= number + 1  # the top maps of all, the box of the other image


def test_a_figure_that_was_cut_short_is_drawn_again(tmp_path: Path) -> None:
    from localization_heads import figures

    path, values = tmp_path / "grid.png", np.ones((3, 3))
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is not None
    whole = path.read_bytes()
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is None
    path.write_bytes(whole[:-20])
    assert figures.plot_once(figures.plot_head_grid, values, path=path) is not None
    assert path.read_bytes() == whole
    assert figures.plot_once(figures.plot_head_grid, 2 * values, path=path) is not None
    assert figures.plot_once(figures.plot_head_grid, 2 * values, path=path, always=True) is not None
