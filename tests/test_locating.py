"""`lh.ground` for one or many images and expressions, and `Located`, which plots, saves and exports itself."""

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


def ground(lvlm: LVLM, image: Any, expression: Any, **named: Any) -> Any:
    return lh.ground(lvlm, image, expression, named.pop("heads", HEADS), segmenter=None, **named)


def test_several_expressions_give_the_results_of_each_alone(lvlm: LVLM, image: Image.Image) -> None:
    singly = [ground(lvlm, image, text) for text in ("the dog", "the cat")]
    several = (["the dog", "the cat"], ("the dog", "the cat"), "the dog; the cat", ["the dog;the cat"])
    for expression in several:
        results = ground(lvlm, image, expression)
        assert [result.expression for result in results] == ["the dog", "the cat"]
        assert [result.box for result in results] == [result.box for result in singly]


def test_a_list_gives_a_list_and_a_text_gives_one_result(lvlm: LVLM, image: Image.Image) -> None:
    assert isinstance(ground(lvlm, image, ["the dog"]), list)
    assert isinstance(ground(lvlm, image, "the dog"), lh.Located)


def test_images_are_batched_in_order(
    lvlm: LVLM, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the boxes of each image alone; paths and images may be mixed."""
    images: list[Any] = [image.rotate(angle, expand=True) for angle in range(0, 360, 20)]
    singly = [ground(lvlm, one, "the dog") for one in images]
    images[3].save(path := tmp_path / "a.png")
    images[3] = path
    batches: list[int] = []
    attend_batch = LVLM.attend_batch

    def counted(self: LVLM, images: Any, *arguments: Any, **named: Any) -> Any:
        batches.append(len(images))
        return attend_batch(self, images, *arguments, **named)

    monkeypatch.setattr(LVLM, "attend_batch", counted)
    results = ground(lvlm, images, "the dog")
    assert batches == [16, 2]
    for result, expected in zip(results, singly, strict=True):
        assert result.box == pytest.approx(expected.box)
    assert results[3].name == str(path)
    pairs = ground(lvlm, images[:2], ["the dog", "the cat"])
    assert [pair.expression for pair in pairs] == ["the dog", "the cat"]


def test_every_form_of_an_argument_gives_the_same_result(lvlm: LVLM, image: Image.Image) -> None:
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


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_raise_one_line(message: str, lvlm: LVLM, image: Image.Image) -> None:
    arguments = {"lvlm": lvlm, "image": image, "expression": "the dog", **WRONG[message]}
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        ground(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("expression", ["the dog; the cat", ["a", "b"], 3, []])
def test_ground_all_takes_a_single_expression(lvlm: LVLM, image: Image.Image, expression: Any) -> None:
    assert lh.ground_all(lvlm, image, "the dogs", HEADS, segmenter=None)[0].expression
    with pytest.raises(ArgumentError, match="expression"):
        lh.ground_all(lvlm, image, expression, HEADS, segmenter=None)


def test_segmenters_and_read_outs_by_name() -> None:
    assert isinstance(masks("grabcut"), GrabCut)
    assert masks("none") is masks(None) is None
    with pytest.raises(ArgumentError, match="segmenter='knife': choose one of author_hint, grabcut"):
        masks("knife")
    assert read_out("paper") == lh.GroundingOptions()
    assert read_out(None) == read_out("sharp") == default_grounding()
    assert read_out({"means": 3}).means == 3


def test_a_ranking_is_shown_as_a_table() -> None:
    """In a terminal and in a notebook, where names are escaped."""
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


def test_load_model_takes_a_torch_dtype() -> None:
    half = lh.load_model(device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


def located(corner: int = 1, name: str = "") -> Located:
    """A box of 2 x 2 cells of 10 pixels each, the first cell at `corner`."""
    attention = np.zeros((1, 1, 6, 8), dtype=np.float32)
    attention[0, 0, corner : corner + 2, corner : corner + 2] = 1
    maps = AttentionMaps(attention, image_size=(80, 60), image_box=(0, 0, 80, 60))
    grounding = ground_maps(maps, [Head(0, 0)], GroundingOptions(kernel_size=1))
    return Located.of(grounding, Image.new("RGB", (80, 60), "grey"), "the dog", name)


def test_to_dict_is_a_line_of_predictions() -> None:
    line = json.loads(json.dumps(located(name="cat.png").to_dict()))
    assert (line["expression"], line["image"]) == ("the dog", "cat.png")
    assert (line["bbox"], line["image_size"], line["heads"]) == ([10, 10, 30, 30], [80, 60], [[0, 0]])
    assert np.argwhere(read_mask(line["mask"], (80, 60))).min(axis=0).tolist() == [10, 10]


@pytest.mark.parametrize(
    ("extension", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<svg"), (".json", b"{")]
)
def test_the_extension_decides_the_saved_format(extension: str, magic: bytes, tmp_path: Path) -> None:
    path = located().save(tmp_path / f"one{extension}")
    assert path.read_bytes().startswith(magic)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_wrong_extension_or_path_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one\.txt: it must end in one of \.png"):
        located().save(tmp_path / "one.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        located().save(tmp_path / "file" / "one.json")


def test_a_notebook_shows_the_figure() -> None:
    assert located()._repr_png_().startswith(b"\x89PNG")


def test_to_coco_combines_results() -> None:
    """Results of one image share its entry; each image in memory has its own."""
    data = to_coco([located(1, "cat.png"), located(3, "cat.png"), located(1)])
    assert [image["id"] for image in data["images"]] == [1, 2]
    assert [(entry["image_id"], entry["bbox"]) for entry in data["annotations"]] == [
        (1, [10, 10, 20, 20]),
        (1, [30, 30, 20, 20]),
        (2, [10, 10, 20, 20]),
    ]
    assert located().to_coco()["annotations"][0]["expression"] == "the dog"


def test_to_supervision_gives_one_detection() -> None:
    pytest.importorskip("supervision")
    detections = located().to_supervision()
    assert detections.xyxy.tolist() == [[10, 10, 30, 30]]
    assert detections.data["class_name"].tolist() == ["the dog"]
