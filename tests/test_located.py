"""What `ground` returns shows, saves and exports itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.data.masks import read_mask
from localization_heads.errors import UsageError
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.located import Located, to_coco
from localization_heads.options.groups import GroundingOptions


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


def test_supervision() -> None:
    pytest.importorskip("supervision")
    found = located().to_supervision()
    assert found.xyxy.tolist() == [[10, 10, 30, 30]]
    assert found.data["class_name"].tolist() == ["the dog"]
