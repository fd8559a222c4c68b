"""The second look (`zoom=true`): its geometry by hand, from Python, over a data file, after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import EXPRESSIONS, Calls, Front, one_line, stub_figures, write_data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_maps import block, grounded

import localization_heads as lh
from localization_heads.data.masks import read_mask
from localization_heads.grounding.boxes import (
    apply_second_look,
    average_boxes,
    crop_around,
    square_around,
    to_image_pixels,
)
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import GroundingOptions
from localization_heads.scenes.scene import TEST_SEEDS, render_scene
from localization_heads.segmentation.grabcut import GrabCut
from localization_heads.segmentation.segmenter import refine

HEADS = [lh.Head(2, 5), lh.Head(3, 1)]
OPTIONS = ("stage=ground", "data_file=data.jsonl", "heads=[2-5,3-1]", "batch_size=2", "grounding=paper")


@pytest.mark.parametrize(
    ("box", "size", "min_side", "crop"),
    [
        ((40, 40, 60, 60), (100, 100), 0, (30, 30, 70, 70)),  # half a box on each side
        ((40, 45, 60, 55), (100, 100), 0, (30, 30, 70, 70)),  # square, whatever the box
        ((40, 40, 50, 50), (100, 100), 60, (15, 15, 75, 75)),  # the smallest side
        ((0, 40, 20, 60), (100, 100), 0, (0, 30, 40, 70)),  # shifted into the image
        ((85, 90, 99, 99), (100, 100), 0, (72, 72, 100, 100)),
        ((0, 0, 70, 20), (100, 40), 0, (0, 0, 100, 40)),  # no square fits
        ((10, 5, 40, 20), (100, 40), 0, (0, 0, 60, 40)),
        ((3, 0, 4, 1), (8, 1), 0, (2, 0, 4, 1)),  # one row of pixels
    ],
)
def test_crop_by_hand(box: Any, size: Any, min_side: float, crop: Any) -> None:
    assert square_around(box, size, min_side) == crop


@given(
    *(st.integers(1, 300) for _ in range(2)),
    *(st.floats(0, 1, allow_nan=False) for _ in range(4)),
    st.floats(0, 500),
)
def test_crops_contain_the_box_and_lie_in_the_image(
    W: int, H: int, left: float, right: float, top: float, bottom: float, min_side: float
) -> None:
    box = (min(left, right) * W, min(top, bottom) * H, max(left, right) * W, max(top, bottom) * H)
    x0, y0, x1, y1 = square_around(box, (W, H), min_side)
    assert 0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H
    assert x0 <= box[0] + 1 and y0 <= box[1] + 1 and box[2] - 1 <= x1 and box[3] - 1 <= y1
    side = max(x1 - x0, y1 - y0)
    assert x1 - x0 == min(side, W) and y1 - y0 == min(side, H)  # square where it fits


def test_the_smallest_crop_is_six_cells_wide() -> None:
    """Cells of 10 x 20 pixels: six times the longer side."""
    one = block((16, 16), slice(7, 8), slice(7, 8))
    assert crop_around(grounded(one)) == (45, 45, 105, 105)
    assert crop_around(grounded(one, (0, 0, 160, 320), (160, 320))) == (15, 90, 135, 210)


def test_no_crop_of_a_flat_map_or_of_the_whole_image() -> None:
    assert crop_around(grounded(np.ones((8, 8)))) is None
    assert crop_around(grounded(block((8, 8), slice(1, 7), slice(1, 7)))) is None


def test_mapping_back_and_averaging_by_hand() -> None:
    assert to_image_pixels((1.5, 0, 10, 8), (30, 20, 70, 60)) == (31.5, 20, 40, 28)
    assert average_boxes((0, 0, 10, 10), (0, 0, 10, 20)) == (0, 0, 10, 15)  # IoU exactly 0.5
    assert average_boxes((0, 0, 10, 10), (0, 0, 10, 20.1)) == (0, 0, 10, 10)
    assert average_boxes((0, 0, 10, 10), None) == (0, 0, 10, 10)


def test_the_score_is_that_of_the_final_box() -> None:
    first = grounded(block((8, 8), slice(2, 4), slice(2, 6)))
    assert (first.box, first.score) == ((20, 20, 60, 40), 1.0)
    again = apply_second_look(first, (20, 20, 50, 40))
    assert again.box == (20, 20, 55, 40)
    assert again.score == pytest.approx(7 / 8)
    assert apply_second_look(first, (70, 70, 80, 80)) is first


def test_a_second_look_from_python_grounds_the_crop(lvlm: LVLM) -> None:
    """The second box is that of the crop, grounded by hand; the mask starts from the averaged box."""
    image = Image.fromarray(render_scene(TEST_SEEDS.start, size=96).image)
    options = GroundingOptions()
    once = lh.ground(lvlm, image, "panda", options=options, segmenter=None)
    crop = crop_around(once)
    assert crop is not None
    second = lh.ground(lvlm, image.crop(crop), "panda", options=options, segmenter=None)
    expected = apply_second_look(once, to_image_pixels(second.box, crop))
    assert expected.box != once.box
    twice = lh.ground(lvlm, image, "panda", options=options, zoom=True)
    assert twice.box == pytest.approx(expected.box)
    assert twice.score == pytest.approx(expected.score, abs=1e-6)
    assert (twice.mask == refine(expected, image, GrabCut()).mask).all()


def test_over_a_data_file(front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Each chunk is asked a second time, in one batch, where there is a crop; the boxes are those from Python."""
    stub_figures(monkeypatch)
    write_data(front.folder, 5)
    lvlm, plain = lh.load_model(device="cpu"), {"options": GroundingOptions(), "segmenter": None}
    assert front.finder(*OPTIONS, "batch_size=3").status == 0
    chunks = [list(chunk) for chunk in calls]
    asked = {expression: (lvlm, f"image_{number}.png", expression) for number, expression in enumerate(EXPRESSIONS)}

    def looked_at_closer(heads: list[lh.Head]) -> list[list[str]]:
        return [[one for one in chunk if crop_around(lh.ground(*asked[one], heads, **plain))] for chunk in chunks]

    pairs = ([lh.Head(2, one), lh.Head(3, other)] for one in range(8) for other in range(8))
    heads, closer = next((pair, parts) for pair in pairs if sorted(map(len, parts := looked_at_closer(pair))) == [1, 2])
    found = {
        expression: (
            lh.ground(*ask, heads, **plain),
            lh.ground(*ask, heads, options=GroundingOptions(), zoom=True),
        )
        for expression, ask in asked.items()
    }
    options = (*OPTIONS, "batch_size=3", f"heads=[{','.join(f'{one.layer}-{one.head}' for one in heads)}]")
    expected = [part for pair in zip(chunks, closer, strict=True) for part in pair if part]
    calls.clear()
    assert front.finder(*options, "zoom=true").status == 0
    assert list(calls) == expected
    lines = front.lines()
    for line, (_, twice) in zip(lines, found.values(), strict=True):
        assert line["bbox"] == pytest.approx(twice.box, abs=1e-3)
        assert (read_mask(line["mask"], (64, 48)) == twice.mask).mean() > 0.99
    assert any(first.box != twice.box for first, twice in found.values())


def test_a_killed_second_look_resumes(front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Killed between the first and the second look: the same file byte for byte, without the finished chunks."""
    stub_figures(monkeypatch)
    write_data(front.folder, 5)
    assert front.finder(*OPTIONS, "zoom=true", "output_dir=whole").status == 0
    whole, asked = Path("whole/tiny/predictions.jsonl").read_bytes(), len(calls)
    calls.restart(fail_at=3)
    assert front.finder(*OPTIONS, "zoom=true").status == 130
    calls.restart()
    assert front.finder(*OPTIONS, "zoom=true").status == 0
    assert len(calls) == asked - 2  # the first chunk's two looks
    assert (front.out / "predictions.jsonl").read_bytes() == whole


def test_predictions_without_zoom_are_not_resumed_with_it(
    front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    stub_figures(monkeypatch)
    write_data(front.folder, 4)
    calls.restart(fail_at=1)
    assert front.finder(*OPTIONS).status == 130
    calls.restart()
    assert front.finder(*OPTIONS, "zoom=true").status == 0
    assert {one for chunk in calls for one in chunk} == set(EXPRESSIONS[:4])


def test_greedy_heads_of_the_first_look_are_kept(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)
    write_data(front.folder, 2)
    options = ("stage=ground", "data_file=data.jsonl", "heads=greedy")
    assert front.finder(*options).status == 0
    once = front.lines()
    assert front.finder(*options, "zoom=true").status == 0
    twice = front.lines()
    assert [line["heads"] for line in once] == [line["heads"] for line in twice]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("stage=pipeline", "zoom=true"),
            "zoom=: stage=pipeline does not read it; write stage=ground or evaluate",
        ),
        (("stage=find", "instances=all"), "instances=: stage=find does not read it"),
        (("stage=ground", "zoom=true", "instances=all"), "leave out zoom= or instances=all"),
    ],
)
def test_contradicting_options_are_refused(front: Front, options: tuple[str, ...], said: str) -> None:
    result = front.finder(*options, "data_file=data.jsonl")
    assert result.status == 2
    assert said in one_line(result.err)
