"""Every object that an expression fits: from Python, in predictions.jsonl, in the figure, and scored."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from front import Calls, Front, stub_figures, write_data, write_lines
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_sams import TINY, noise

import localization_heads as lh
from localization_heads import figures
from localization_heads.attention import AttentionMaps
from localization_heads.cells import box_iou, mask_coverage, mass_inside
from localization_heads.errors import UsageError
from localization_heads.evaluation.scores import instance_metrics
from localization_heads.figures.several import COLOURS, place_labels
from localization_heads.grounder import Grounder
from localization_heads.grounding.confidence import Calibration, Logistic
from localization_heads.grounding.ground import ground_instances, ground_maps
from localization_heads.grounding.proposals import select_proposals
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.segmentation import sam as sams
from localization_heads.store.results import Instance, Prediction

ONE = "grounding.component=largest_mass"


class Pixels:
    """A segmenter whose mask is what it is given."""

    name = "pixels"

    def __init__(self, *masks: np.ndarray) -> None:
        self._masks = list(masks)

    def segment(self, image: Any, grounding: Any) -> np.ndarray:
        return self._masks.pop(0)


def mask_of(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((80, 80), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def three() -> AttentionMaps:
    """Components of mass 8, 4 and 3 at the left, in the middle and at the right, and one of 1, of 16."""
    grid = np.zeros((8, 8), dtype=np.float32)
    grid[1:3, 0:2], grid[1:3, 3], grid[5:8, 6], grid[7, 0] = 2.0, 2.0, 1.0, 1.0
    return AttentionMaps(grid[None, None], (0, 0, 80, 80), (80, 80))


def grounder(segmenter: Any = None, **options: Any) -> Grounder:
    return Grounder((lh.Head(0, 0),), CriteriaOptions(), GroundingOptions(sigma=0.0, **options), segmenter=segmenter)


def test_components_by_hand() -> None:
    found = grounder().ground_all(three(), None)
    assert [one.box for one in found] == [(0, 10, 20, 30), (30, 10, 40, 30), (60, 50, 70, 80)]
    assert [one.score for one in found] == [8 / 16, 4 / 16, 3 / 16]
    assert found[0].box == grounder(component="largest_mass").ground(three(), None).box
    assert [int(one.mask.sum()) for one in found] == [400, 200, 300]


def test_the_segmenters_boxes_are_scored_and_duplicates_left_out() -> None:
    """The second mask reaches over the first object, so that it becomes the best; the third is the second once more."""
    image = Image.new("RGB", (80, 80))
    masks = mask_of(0, 10, 10, 30), mask_of(0, 10, 40, 30), mask_of(0, 10, 38, 30)
    found = grounder(Pixels(*masks), box_from="mask").ground_all(three(), image)
    assert [one.box for one in found] == [(0, 10, 40, 30), (0, 10, 10, 30)]
    assert [one.score for one in found] == [12 / 16, 4 / 16]
    assert [one.mask_from for one in found] == ["pixels", "pixels"]
    assert (found[0].mask == masks[1]).all()
    assert all(one.score == mass_inside(one.combined, one.image_box, one.image_size, one.box) for one in found)


def test_where_nothing_stands_out_it_is_the_whole_image() -> None:
    flat = AttentionMaps(np.ones((1, 1, 8, 8), np.float32), (0, 0, 80, 80), (80, 80))
    (only,) = grounder().ground_all(flat, None)
    assert (only.box, only.score) == ((0, 0, 80, 80), 0.0)


def test_from_python(lvlm: Any) -> None:
    image = Image.open("examples/images/octopus_14.png").convert("RGB")
    options = GroundingOptions(component="largest_mass")
    found = lh.ground_all(lvlm, image, "the animals", options=options)
    assert sorted(found, key=lambda one: -one.score) == found
    single = lh.ground(lvlm, image, "the animal", options=options)  # which the model knows
    assert single.box in [one.box for one in found]
    assert found[0].mask.shape == image.size[::-1]
    recipe = Grounder(lvlm.known_heads, CriteriaOptions(), options).recipe({**lvlm.choices, **lvlm.asked})
    calibration = Calibration(recipe, Logistic(-1.0, {"mass": 4.0}))
    sure = lh.ground_all(lvlm, image, "the animals", options=options, calibration=calibration, abstain=0.6)
    assert [one.box for one in sure] == [one.box for one in found] and all(one.calibrated for one in sure)
    assert [one.absent for one in sure] == [1 / (1 + np.exp(1 - 4 * one.score)) < 0.6 for one in sure]
    with pytest.raises(ValueError, match=r"abstain=0\.6 needs a calibration"):
        lh.ground_all(lvlm, image, "the animals", options=options, abstain=0.6)


def test_predictions_hold_all_boxes(front: Front, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """The best box stands where it did; a killed run ends with the same bytes."""
    stub_figures(monkeypatch)
    write_data(front.folder, 5)
    options = ("stage=ground", "data_file=data.jsonl", "batch_size=2", ONE)
    assert front.finder(*options).status == 0
    assert all("boxes" not in line for line in front.lines())
    result = front.finder(*options, "instances=all")
    assert result.status == 0, result.err
    lines, whole = front.lines(), (front.out / "predictions.jsonl").read_bytes()
    assert any(len(line["boxes"]) > 1 for line in lines)
    for line in lines:
        assert all(list(one) == ["bbox", "score", "confidence", "mask"] for one in line["boxes"])
        best = line["boxes"][0]
        assert (line["bbox"], line["score"], line["mask"]) == (best["bbox"], best["score"], best["mask"])
        scores = [one["score"] for one in line["boxes"]]
        assert scores == sorted(scores, reverse=True)
        assert all(f"{one['score']:.2f}" in result.out for one in line["boxes"])  # each has its row
    calls.restart(fail_at=1)
    assert front.finder(*options, "instances=all").status == 130
    calls.restart()
    assert front.finder(*options, "instances=all").status == 0
    assert (calls.sizes, (front.out / "predictions.jsonl").read_bytes()) == ([2, 1], whole)


def test_predictions_read_what_they_wrote() -> None:
    boxes = [Instance((0.0, 1.0, 2.0, 3.0), 0.5, None, 0.25), Instance((0.0, 0.0, 1.0, 1.0), 0.25)]
    one = Prediction("a", (0.0, 1.0, 2.0, 3.0), 0.5, boxes=boxes)
    assert Prediction.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Prediction.from_json({**one.to_json(), "boxes": []}).boxes == []


@pytest.mark.parametrize(
    "boxes",
    [
        3,
        ["x"],
        [{}],
        [{"bbox": None, "score": 1}],
        [{"bbox": [0, 0, 1], "score": 1}],
        [{"bbox": [0, 0, 1, 1]}],
        [{"bbox": [0, 0, 1, 1], "score": "1"}],
        [{"bbox": [0, 0, 1, 1], "score": 1, "mask": 3}],
    ],
)
def test_broken_boxes_are_no_prediction(boxes: Any) -> None:
    line = {**Prediction("a").to_json(), "boxes": boxes}
    with pytest.raises((ValueError, KeyError, TypeError)):
        Prediction.from_json(line)


A, B = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)


def test_metrics_by_hand() -> None:
    """Two objects, one and none: all boxes find 2 of 2, 1 with one too many, none; the best alone misses one."""
    answers = {"boxes": [[A, B], [A, B], [A]], "single_box": [[A], [A], [A]]}
    found = instance_metrics(answers, [[A, B], [A], []])
    assert found["boxes"]["f1@0.5"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-6)
    assert found["boxes"]["pr@f1=1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["single_box"]["f1@0.5"] == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-6)
    assert found["single_box"]["difference"]["f1@0.5"][0] == 0.0
    low, high = found["boxes"]["f1@0.5_interval"]
    assert 0 <= low < 0.55 < high <= 1


def test_evaluate_scores_several_boxes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries with several boxes, and those that refer to nothing, count in F1 and not in Acc@0.5."""
    stub_figures(monkeypatch)
    write_data(front.folder, 4)
    entries = [json.loads(line) for line in (front.folder / "data.jsonl").read_text().splitlines()]
    truths = [
        {"bbox": [5, 5, 30, 30]},
        {"bboxes": [[5, 5, 30, 30]]},
        {"bboxes": [[0, 0, 9, 9], [30, 9, 60, 40]]},
    ]
    truths.append({"bbox": None, "absent": True})
    write_lines(front.folder / "data.jsonl", [entry | truth for entry, truth in zip(entries, truths, strict=True)])
    options = ("stage=evaluate", "data_file=data.jsonl", "controls=false", "report=false")
    result = front.finder(*options, "instances=all")
    assert result.status == 0, result.err
    metrics = front.json("metrics.json")
    assert (metrics["num_samples"], metrics["num_answers"], metrics["num_failed"]) == (2, 4, 0)
    assert {"f1@0.5", "pr@f1=1", "difference"} <= set(metrics["single_box"])
    assert len(metrics["f1@0.5_interval"]) == 2
    assert front.finder(*options).status == 0
    single = front.json("metrics.json")
    assert "single_box" not in single
    assert single["f1@0.5"] <= 0.75  # what is absent has a box, which is wrong
    boxes = [line["bbox"] for line in front.lines()]
    expected = instance_metrics(
        {"one": [[box] for box in boxes]},
        [[(5, 5, 30, 30)], [(5, 5, 30, 30)], [(0, 0, 9, 9), (30, 9, 60, 40)], []],
    )["one"]
    assert single["f1@0.5"] == expected["f1@0.5"]


def test_one_true_box_each_is_acc(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)
    write_data(front.folder, 2, bbox=[5, 5, 30, 30])
    options = ("stage=evaluate", "data_file=data.jsonl", "controls=false", "report=false")
    assert front.finder(*options).status == 0
    assert "f1@0.5" not in front.json("metrics.json")


def test_only_several_boxes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has a single true box: F1 alone is left, in the table and the report too."""
    stub_figures(monkeypatch)
    write_data(front.folder, 2, bboxes=[[0, 0, 9, 9], [30, 9, 60, 40]])
    result = front.finder("stage=evaluate", "data_file=data.jsonl")
    assert result.status == 0, result.err
    assert "F1" in result.out and "Acc" not in result.out
    assert (front.out / "report.html").is_file()


numbers = st.floats(0, 100, allow_nan=False)


@example([(0.0, 0.0, 0.0, 0.0)] * 2 + [(0.0, 0.0, 0.0, 1.0)] + [(0.0, 0.0, 0.0, 0.0)] * 6)
@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=9))
def test_no_label_lies_on_another(corners: list[Any]) -> None:
    """Small labels and room for all."""
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    places = place_labels(boxes, [(4.0, 5.0)] * len(boxes), (200, 200))
    for n, (x, y) in enumerate(places):
        assert 0 <= x <= 196 and 0 <= y <= 195
        others = [(u, v) for m, (u, v) in enumerate(places) if m != n]
        assert all(abs(x - u) >= 4 - 1e-9 or abs(y - v) >= 5 - 1e-9 for u, v in others)


def test_the_figure_numbers_all_boxes(tmp_path: Any) -> None:
    found = grounder().ground_all(three(), None)
    objects = [figures.DetectedObject("the dogs", one.box, one.score, one.mask) for one in found]
    image = Image.new("RGB", (80, 80), "grey")
    drawn = figures.plot_instances(image, found[0], objects, tmp_path / "all.png", truths=[A, B], expression="the dogs")
    assert [text.get_text() for text in drawn.axes[0].texts] == ["1", "2", "3"]
    assert Image.open(tmp_path / "all.png").size[0] > 300


@pytest.mark.parametrize("count", [1, 2, 4])
def test_equal_boxes_share_their_line(count: int, tmp_path: Any) -> None:
    """About as many pixels of each colour along the box; with one box fewer its colour is not there."""
    objects = [figures.DetectedObject(f"thing {n}", (20, 20, 60.0 + 0.1 * n, 60), 0.5) for n in range(count)]
    figures.plot_several(Image.new("RGB", (80, 80), "white"), objects, tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    pixels = pixels[pixels.shape[0] // 2 :]  # below the numbers
    colours = [np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) for colour in COLOURS[:4]]
    counts = [int((np.abs(pixels - colour).max(axis=-1) < 30).sum()) for colour in colours]
    assert min(counts[:count]) > 0.4 * max(counts)
    assert not any(counts[count:])


def test_same_corner_other_place() -> None:
    """Three boxes from one corner: side by side; a box smaller than its label: beside it."""
    boxes = [(0, 0, 50, 50), (0, 0, 40, 40), (0, 0, 30, 30), (60, 60, 61, 61)]
    assert place_labels(boxes, [(10, 12)] * 4, (100, 100)) == [(0, 0), (10, 0), (20, 0), (60, 48)]


def test_a_plural_is_asked_in_the_singular_and_by_places(lvlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model knows "octopus" alone; the mean of four maps, each in the shape of one, by hand."""
    image = Image.open("examples/images/octopus_14.png").convert("RGB")
    asked: list[str] = []
    ask = type(lvlm).located_prompt
    monkeypatch.setattr(type(lvlm), "located_prompt", lambda self, text: asked.append(text) or ask(self, text))
    options = GroundingOptions(component="largest_mass")
    found = lh.ground_all(lvlm, image, "the octopuses", options=options, segmenter=None)
    assert "the octopus" in asked and "the octopuses" not in asked
    assert not any("octopuses" in note for note in lvlm.notes)
    assert [one.box for one in found] == [
        one.box for one in lh.ground_all(lvlm, image, "the octopus", options=options, segmenter=None)
    ]
    asked.clear()
    spread = lh.ground_all(lvlm, image, "the octopuses", options=options, segmenter=None, by="places")
    places = ["on the left", "on the right", "at the top", "at the bottom"]
    assert {f"the octopus {place}" for place in places} <= set(asked) and "the octopus" not in asked
    heads = lvlm.known_heads
    maps = [lvlm.attend(image, f"the octopus {place}").attention for place in places]
    total = np.zeros(maps[0].shape[-2:])
    for head in heads:
        total += np.mean([m[head] / m[head].sum() for m in maps], axis=0) * np.mean([m[head].sum() for m in maps])
    alone = AttentionMaps(total[None, None].astype(np.float32), (0, 0, *image.size), image.size)
    expected = ground_instances(alone, [lh.Head(0, 0)], options, least=0.3)
    np.testing.assert_allclose([one.box for one in spread], [one.box for one in expected], atol=1e-3)


class Proposing(Pixels):
    def propose(self, image: Any) -> np.ndarray:
        return np.array([mask_of(0, 10, 20, 35), mask_of(0, 12, 10, 28), mask_of(0, 40, 80, 80)])


def test_proposals_come_before_components() -> None:
    """The object at the left is proposed; the others are components still, each segmented by itself."""
    image = Image.new("RGB", (80, 80))
    own = mask_of(28, 8, 41, 31), mask_of(58, 48, 71, 80)
    found = replace(grounder(Proposing(*own)), proposes=True).ground_all(three(), image)
    assert [one.box for one in found] == [(0, 10, 20, 35), (30, 10, 40, 30), (60, 50, 70, 80)]
    assert (found[0].mask == mask_of(0, 10, 20, 35)).all() and found[0].mask_overlap == 0.8
    assert (found[1].mask == own[0]).all()
    assert found[0].score == 0.5 and found[0].confidence is not None
    plain = grounder(Proposing(*own)).ground_all(three(), None)
    assert replace(grounder(Proposing()), proposes=True).ground_all(three(), None)[0].box == plain[0].box


@pytest.mark.parametrize(
    "masks", [np.ones((2, 8, 8), np.uint8), np.ones((8, 8), bool), []], ids=["bytes", "one", "none"]
)
def test_what_is_proposed_are_masks(masks: Any) -> None:
    class Wrong(Pixels):
        def propose(self, image: Any) -> Any:
            return masks

    with pytest.raises(UsageError, match=r"it must propose bool masks \[n, h, w\], not"):
        replace(grounder(Wrong()), proposes=True).ground_all(three(), Image.new("RGB", (80, 80)))


def test_a_segmenter_is_needed_for_proposals(lvlm: lh.LVLM) -> None:
    image = Image.open("examples/images/octopus_14.png").convert("RGB")
    with pytest.raises(UsageError, match=r"^by='segmented': choose one of components, places, segmenter$"):
        lh.ground_all(lvlm, image, "the octopus", by="segmented")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^image_boxes='all': choose one of one, each$"):
        lh.ground(lvlm, image, "the octopus", image_boxes="all")  # type: ignore[call-overload]
    for segmenter in (None, Pixels()):
        with pytest.raises(UsageError, match="by=segmenter: give a segmenter that can propose"):
            lh.ground_all(lvlm, image, "the octopus", segmenter=segmenter, by="segmenter")
    every = lh.ground_all(lvlm, image, "the octopus", by="segmenter")
    assert every[0].mask_from == "grabcut" and box_iou(every[0].box, (111, 129, 323, 321)) > 0.9


@pytest.mark.parametrize("kind", TINY)
def test_a_sam_proposes(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The weights are random; a map that attends to what one of the masks covers chooses of them."""
    monkeypatch.setattr(sams, "MIN_PREDICTED_IOU", -np.inf)
    family = sams.FAMILIES[kind]
    sam = sams.Sam(TINY[kind](), family, family.mean, family.std)
    image = noise(80, 80)
    mask = min(sam.propose(image), key=lambda one: abs(one.mean() - 0.2))
    shares = mask_coverage(mask, (0, 0, 80, 80), (20, 20))
    maps = AttentionMaps(shares[None, None].astype(np.float32), (0, 0, 80, 80), (80, 80))
    found = replace(grounder(sam), proposes=True).ground_all(maps, image)
    assert found[0].mask_from == kind and found[0].mask.shape == (80, 80)
    whole = ground_maps(maps, [lh.Head(0, 0)], GroundingOptions(sigma=0.0))
    expected = select_proposals(whole, sam.propose(image), kind)
    assert {one.box for one in found if one.mask_from == kind} >= {max(expected, key=lambda one: one.score).box}


def test_proposals_from_the_command_line(front: Front) -> None:
    write_data(front.folder, 2)
    asked = ("stage=ground", "data_file=data.jsonl", "instances_by=segmenter", "instances=all")
    result = front.finder(*asked, "segmenter=none")
    assert result.status == 2 and "instances_by=segmenter needs a segmenter" in result.err
    result = front.finder(*asked, "segmenter=grabcut")
    assert result.status == 0, result.err
    assert all(line["boxes"] for line in front.lines())


def test_places_are_for_all_objects_alone(front: Front) -> None:
    write_data(front.folder, 2)
    asked = ("stage=ground", "data_file=data.jsonl", "instances_by=places")
    result = front.finder(*asked)
    assert result.status == 2 and "instances_by=places: write instances=all" in result.err
    result = front.finder(*asked, "instances=all", "paraphrases=[a {}]")
    assert result.status == 2 and "leave out paraphrases=" in result.err
    result = front.finder(*asked, "instances=all", "segmenter=none")
    assert result.status == 0, result.err
    assert all(line["boxes"] for line in front.lines())
