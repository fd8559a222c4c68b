"""`lh.ground` from Python: one image or many, one expression or many; what it returns shows and saves itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import localization_heads as lh
from localization_heads.arguments import masks, read_out
from localization_heads.attention import AttentionMaps
from localization_heads.data.masks import read_mask
from localization_heads.errors import ArgumentError, UsageError
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.located import Located, to_coco
from localization_heads.lvlm.model import LVLM
from localization_heads.options.compose import default_grounding
from localization_heads.options.groups import GroundingOptions
from localization_heads.segmentation.grabcut import GrabCut

HEADS = ["L2H0", (3, 1)]


@pytest.fixture(scope="module")
def lvlm() -> LVLM:
    return lh.load_model(device="cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ground(lvlm: LVLM, image: Any, expression: Any, **named: Any) -> Any:
    return lh.ground(lvlm, image, expression, named.pop("heads", HEADS), segmenter=None, **named)


def test_several_expressions_of_one_image(lvlm: LVLM, image: Image.Image) -> None:
    """As a list, or as on the command line; the same as one by one."""
    one_by_one = [ground(lvlm, image, text) for text in ("the dog", "the cat")]
    for expression in (
        ["the dog", "the cat"],
        ("the dog", "the cat"),
        "the dog; the cat",
        ["the dog;the cat"],
    ):
        found = ground(lvlm, image, expression)
        assert [one.expression for one in found] == ["the dog", "the cat"]
        assert [one.box for one in found] == [one.box for one in one_by_one]
    assert isinstance(ground(lvlm, image, ["the dog"]), list), "a list gives a list"
    assert isinstance(ground(lvlm, image, "the dog"), lh.Located)


def test_many_images_go_through_the_model_together(
    lvlm: LVLM, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, in order, and with the boxes of each alone; paths and images may be mixed."""
    images: list[Any] = [image.rotate(angle, expand=True) for angle in range(0, 360, 20)]
    alone = [ground(lvlm, one, "the dog") for one in images]
    images[3].save(path := tmp_path / "a.png")
    images[3] = path
    batches: list[int] = []
    attend_batch = LVLM.attend_batch

    def counted(self: LVLM, images: Any, *arguments: Any, **named: Any) -> Any:
        batches.append(len(images))
        return attend_batch(self, images, *arguments, **named)

    monkeypatch.setattr(LVLM, "attend_batch", counted)
    found = ground(lvlm, images, "the dog")
    assert batches == [16, 2]
    for one, other in zip(found, alone, strict=True):
        assert one.box == pytest.approx(other.box)
    assert found[3].name == str(path)
    pairs = ground(lvlm, images[:2], ["the dog", "the cat"])
    assert [one.expression for one in pairs] == ["the dog", "the cat"]


def test_one_way_or_the_other(lvlm: LVLM, image: Image.Image) -> None:
    """Images, heads and options as they come; the results are the same."""
    expected = ground(lvlm, image, "the dog").box
    pixels = np.array(image)
    for same in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert ground(lvlm, same, "the dog").box == expected
    for heads in ([lh.Head(2, 0), lh.Head(3, 1)], ["2-0", "3-1"], np.array([[2, 0], [3, 1]])):
        assert ground(lvlm, image, "the dog", heads=heads).box == expected
    sharp = default_grounding()
    for options in (sharp, "sharp", {"means": sharp.means}):
        assert ground(lvlm, image, "the dog", options=options).box == expected
    assert ground(lvlm, image, "the dog", heads="greedy", k=2).heads
    assert len(ground(lvlm, image, "the dog", heads="auto", k=2).heads) == 2


WRONG: dict[str, dict[str, Any]] = {
    "image=[] names no image": {"image": []}, "expression=[] names nothing": {"expression": []},
    "expression=3: give a text": {"expression": 3},
    "expression=[None]: give a text": {"expression": [None]},
    "2 images and 3 expressions": {"image": ["a.png", "b.png"], "expression": ["x", "y", "z"]},
    "'int' is not an image: give a path": {"image": 3}, "heads=[] names no head": {"heads": []},
    "heads=3: give a ranking": {"heads": 3}, "heads=[3]: give a ranking": {"heads": [3]},
    "heads=['x']: give a ranking": {"heads": ["x"]}, "heads: there is no L99H0": {"heads": ["99-0"]},
    "k=0: the number of heads": {"k": 0}, "k='3': the number of heads": {"k": "3"},
    "options='blunt': choose one of paper": {"options": "blunt"},
    "options={'mean': 2}": {"options": {"mean": 2}}, "abstain=0.5 needs a calibration": {"abstain": 0.5},
    "lvlm: 'tiny' is no model": {"lvlm": "tiny"}, "no-such.png: no such file": {"image": "no-such.png"},
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_wrong_arguments_are_one_line(said: str, lvlm: LVLM, image: Image.Image) -> None:
    named = {"lvlm": lvlm, "image": image, "expression": "the dog", **WRONG[said]}
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        ground(named.pop("lvlm"), named.pop("image"), named.pop("expression"), **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("expression", ["the dog; the cat", ["a", "b"], 3, []])
def test_every_object_of_one_expression_at_a_time(lvlm: LVLM, image: Image.Image, expression: Any) -> None:
    assert lh.ground_all(lvlm, image, "the dogs", HEADS, segmenter=None)[0].expression
    with pytest.raises(ArgumentError, match="expression"):
        lh.ground_all(lvlm, image, expression, HEADS, segmenter=None)


def test_a_pipeline_takes_several_in_one_text(lvlm: LVLM, image: Image.Image) -> None:
    pipe = lh.pipeline(lvlm, HEADS)
    assert [one["label"] for one in pipe(image, "the dog; the cat")] == ["the dog", "the cat"]
    assert pipe(image, "the dog") == pipe(image, ["the dog"])[0]


def test_presets_by_name() -> None:
    assert isinstance(masks("grabcut"), GrabCut)
    assert masks("none") is masks(None) is None
    with pytest.raises(ArgumentError, match="segmenter='knife': choose one of author_hint, grabcut"):
        masks("knife")
    assert read_out("paper") == lh.GroundingOptions()
    assert read_out(None) == read_out("sharp") == default_grounding()
    assert read_out({"means": 3}).means == 3


def test_a_ranking_shows_its_table() -> None:
    """In a terminal, and in a notebook, where nothing of its text is markup."""
    heads = tuple(RankedHead(2, n, 0.9 - n / 100, 0.01, 0.5, None if n else 0.25) for n in range(17))
    ranking = HeadRanking(heads, 0.1, 10, 20, 5, model="<b>mine")
    text = str(ranking).splitlines()
    assert text[0] == "17 heads of <b>mine over 20 samples"
    assert text[1].split() == [
        "rank", "head", "selection", "frequency", "attention", "sum", "spatial", "entropy",
    ]  # fmt: skip
    assert text[2].split() == ["1", "L2H0", "0.900", "±", "0.010", "0.500", "0.250"]
    assert text[3].split()[-1] == "-"
    assert text[-1] == "and 2 more"
    assert len({len(line) for line in text[1:-1]}) == 1
    page = ranking._repr_html_()
    assert "&lt;b&gt;mine" in page
    assert page.count("<tr>") == 16


def test_the_type_of_the_weights_as_torch_has_it() -> None:
    half = lh.load_model(device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------- what it returns


def located(corner: int = 1, name: str = "") -> Located:
    """A box of 2 x 2 cells of 10 pixels, its first cell at `corner`."""
    attention = np.zeros((1, 1, 6, 8), dtype=np.float32)
    attention[0, 0, corner : corner + 2, corner : corner + 2] = 1
    maps = AttentionMaps(attention, image_size=(80, 60), image_box=(0, 0, 80, 60))
    found = ground_maps(maps, [Head(0, 0)], GroundingOptions(kernel_size=1))
    return Located.of(found, Image.new("RGB", (80, 60), "grey"), "the dog", name)


def test_as_a_line_of_predictions() -> None:
    said = json.loads(json.dumps(located(name="cat.png").to_dict()))
    assert (said["expression"], said["image"]) == ("the dog", "cat.png")
    assert said["bbox"] == [10, 10, 30, 30]
    assert said["image_size"] == [80, 60]
    assert said["heads"] == [[0, 0]]
    assert np.argwhere(read_mask(said["mask"], (80, 60))).min(axis=0).tolist() == [10, 10]


@pytest.mark.parametrize("ending", [".png", ".PDF", ".svg", ".json"])
def test_saved_as_its_ending_says(ending: str, tmp_path: Path) -> None:
    path = located().save(tmp_path / f"one{ending}")
    beginning = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<svg", ".json": b"{"}[ending.lower()]
    assert path.read_bytes().startswith(beginning)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one\.txt: it must end in one of \.png"):
        located().save(tmp_path / "one.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        located().save(tmp_path / "file" / "one.json")


def test_in_a_notebook() -> None:
    assert located()._repr_png_().startswith(b"\x89PNG")


def test_one_coco_data_set_of_several() -> None:
    """Two results of one image share its entry; images in memory have one each."""
    data = to_coco([located(1, "cat.png"), located(3, "cat.png"), located(1)])
    assert [image["id"] for image in data["images"]] == [1, 2]
    assert [(one["image_id"], one["bbox"]) for one in data["annotations"]] == [
        (1, [10, 10, 20, 20]),
        (1, [30, 30, 20, 20]),
        (2, [10, 10, 20, 20]),
    ]
    assert located().to_coco()["annotations"][0]["expression"] == "the dog"


def test_a_result_becomes_a_detection_of_supervision() -> None:
    pytest.importorskip("supervision")
    found = located().to_supervision()
    assert found.xyxy.tolist() == [[10, 10, 30, 30]]
    assert found.data["class_name"].tolist() == ["the dog"]
