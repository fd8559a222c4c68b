"""Ablations: the conditions, the curves and their intervals, and `stage=ablate` as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Front, draw_image, write_lines
from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.data.lines import Region, read_expected_answers
from localization_heads.evaluation.controls import mean_map
from localization_heads.experiments.ablation import ablation_finding, compute_curves, make_conditions
from localization_heads.heads.head import Head
from localization_heads.lvlm.interventions.switching import output_projection
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.native_box import generate_box
from localization_heads.options.stage_groups import ScenesOptions
from localization_heads.scenes.expressions import make_questions
from localization_heads.scenes.write import two_object_scenes
from localization_heads.stages import ablate

LISTED = [Head(2, 0), Head(3, 1), Head(2, 3), Head(3, 0)]
BY_SUM = [Head(3, 3), Head(2, 0), Head(3, 1), Head(2, 1)]


def test_conditions_are_nested_and_layer_matched() -> None:
    conditions = make_conditions(LISTED, BY_SUM, [0, 1, 3, 9], draws=3, heads_per_layer=6, seed=0)
    assert conditions[0].name == "heads-0-0" and conditions[0].heads == ()
    assert [one.size for one in conditions] == [0, *[1] * 5, *[3] * 5, *[4] * 5]
    by_name = {one.name: one.heads for one in conditions}
    assert by_name["heads-3-0"] == tuple(LISTED[:3])
    assert by_name["attention_sum-4-0"] == tuple(BY_SUM)
    for draw in range(3):
        random = by_name[f"random-3-{draw}"]
        assert [head.layer for head in random] == [2, 3, 2]
        assert not {*random} & {*LISTED} and len({*random}) == 3
        assert by_name[f"random-1-{draw}"] == random[:1]
    assert len({by_name[f"random-4-{draw}"] for draw in range(3)}) > 1
    assert conditions == make_conditions(LISTED, BY_SUM, [9, 3, 1], draws=3, heads_per_layer=6, seed=0)


def test_random_heads_fall_back_on_the_lowest_listed_ones() -> None:
    """In a layer with too few other heads."""
    listed = [Head(0, 2), Head(0, 0)]
    conditions = make_conditions(listed, listed, [2], draws=1, heads_per_layer=3)
    assert {one.name: one.heads for one in conditions}["random-2-0"] == (Head(0, 1), Head(0, 0))


CONDITIONS = make_conditions([Head(1, 0)], [Head(1, 1)], [1], draws=2, heads_per_layer=4)


def values(before: float, heads: float, random: tuple[float, float], by_sum: float) -> dict[str, dict[str, float]]:
    found = [("heads-0-0", before), ("heads-1-0", heads), ("attention_sum-1-0", by_sum)]
    found += [(f"random-1-{draw}", value) for draw, value in enumerate(random)]
    return {name: {"answers": value} for name, value in found}


def test_curves_by_hand() -> None:
    three = [values(1, 0, (1, 0), 1), values(1, 0.5, (1, 1), 0), values(0, 0, (0, 1), 0)]
    found = compute_curves(CONDITIONS, three, "answers")
    assert found["counts"] == [0, 1] and found["num"] == 3
    assert found["curves"] == {
        "heads": [0.666667, 0.166667], "random": [0.666667, 0.666667], "attention_sum": [0.666667, 0.333333]
    }  # fmt: skip
    assert found["falls"] == {"heads": [0, 0.5], "random": [0, 0], "attention_sum": [0, 0.333333]}
    assert found["intervals"]["heads"][0] == [0, 1] and found["fall_intervals"]["heads"][1] == [0, 1]


def test_intervals_are_of_paired_differences() -> None:
    """A second implementation in loops; every expression loses 0.5, so every resample does."""
    rng = np.random.default_rng(1)
    many = [values(v, v - 0.5, (v, v), v) for v in rng.choice([0.5, 1.0], 40)]
    found = compute_curves(CONDITIONS, many, "answers", seed=7)
    assert found["fall_intervals"]["heads"][1] == [0.5, 0.5]
    before = np.array([one["heads-0-0"]["answers"] for one in many])
    drawn = np.random.default_rng(7).integers(40, size=(1000, 40))
    means = sorted(np.mean([before[place] for place in row]) for row in drawn)
    np.testing.assert_allclose(found["intervals"]["heads"][0], np.quantile(means, [0.025, 0.975]), atol=1e-6)


def test_map_measures_are_compared_with_the_same_heads_maps_before() -> None:
    one: Any = {name: {"maps": 0.0, "maps_before": 0.0} for name in values(0, 0, (0, 0), 0)}
    one["heads-0-0"] = {"maps": 1.0, "maps_before": 1.0}
    one["random-1-0"] = {"maps": 0.0, "maps_before": 1.0}
    found = compute_curves(CONDITIONS, [one], "maps")
    assert found["curves"]["heads"] == [1, 0]
    assert found["falls"]["heads"] == [0, 0]  # the other heads were wrong before
    assert found["falls"]["random"] == [0, 0.5]


def test_finding_of_an_ablation() -> None:
    found = ablation_finding(CONDITIONS, [values(1, 0, (1, 1), 1)] * 4, {}, "switched off")
    assert found.numbers["heads"] == [[1, 0]] and found.numbers["measure"] == "answers right"
    assert found.numbers["curves"]["heads"] == [1, 0] and found.numbers["counts"] == [0, 1]
    assert "those of the list -100.0 [-100.0, -100.0]; random ones of the same layers 0.0 [0.0, 0.0]" in found.reading
    (table,) = found.tables
    assert table.rows == (("0", "100.0 [100, 100]", "", ""), ("1", "0.0 [0, 0]", *["100.0 [100, 100]"] * 2))


def test_mean_map_leaves_heads_out() -> None:
    maps = AttentionMaps(np.arange(12, dtype=np.float32).reshape(3, 2, 1, 2), (0, 0, 2, 1), (2, 1))
    others = mean_map(maps, 1, [Head(1, 0), Head(0, 0)])  # L1H1, L2H0 and L2H1
    assert others.attention.ravel().tolist() == [8, 9]
    assert mean_map(maps, 1).attention.ravel().tolist() == [7, 8]


def test_questions_and_scenes_of_two_objects() -> None:
    asked = {one.kind: one for one in make_questions("left animal", "plain big dog")}
    assert asked["name"].text == "what is the left animal ?" and asked["name"].answer == "dog"
    assert asked["colour"].answer == "plain" and asked["size"].answer == "big"
    assert [one.kind for one in make_questions("the dog", "a dog that runs")] == ["description"]
    scene = next(two_object_scenes(ScenesOptions(size=64)))
    assert len({thing.name for thing in scene.objects}) == len(scene.objects) == 2


def test_expected_answers_are_read_from_a_data_file(tmp_path: Path) -> None:
    region = {"bbox": [0, 0, 4, 4], "answer": "dog"}
    lines: list[Any] = [
        {"id": "a", "answer": "red"},
        {"id": "b", "regions": [region, {**region, "answer": "cat"}]},
        {"id": "c", "answer": 3},
        {"id": "d", "regions": [region]},
        {"id": "e", "regions": [region, {"bbox": [1, 2], "answer": "cat"}]},
        {"id": "f", "regions": [region] * 17},
        {"id": "g", "answer": "x" * 401},
        {"id": "h"},
        "not json",
    ]
    found = read_expected_answers(write_lines(tmp_path / "data.jsonl", lines))
    assert found.answers == {1: "red"}
    assert found.regions == {2: (Region((0, 0, 4, 4), "dog"), Region((0, 0, 4, 4), "cat"))}
    assert [bad.line for bad in found.bad] == [3, 4, 5, 6, 7]
    assert "number 2: 'bbox' has length 2" in found.bad[2].reason


SCENES = ("data=scenes", "scenes.size=96", "scenes.count=3", "batch_size=2")
FEW = ("stage=ablate", "heads=[4-4,5-6]", "ablate.counts=[2]", "ablate.draws=1", "ablate.answer_tokens=4")


def test_an_interrupted_ablation_resumes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    result = front.succeed(*FEW, *SCENES)
    assert "answers right (%), 3 expressions" in result.out and "By question, with 2 heads" in result.out
    whole = front.json("ablation.json")
    assert whole["heads"] == [[4, 4], [5, 6]] and whole["counts"] == [0, 2]
    assert whole["measure"] == "answers right"
    assert set(whole["curves"]) == set(whole["intervals"]) == {"heads", "random", "attention_sum"}
    assert "Acc@0.5 of the other heads' maps" in whole["measures"]
    assert Image.open(front.out / "ablation.png").size[0] > 300
    original, measured, limit = ablate.Ablation.__call__, [], 1

    def spy(self: Any, run: Any, entries: Any, attended: Any) -> Any:
        if len(measured) >= limit:
            raise KeyboardInterrupt
        measured.extend(attended)
        return original(self, run, entries, attended)

    monkeypatch.setattr(ablate.Ablation, "__call__", spy)
    (front.out / "ablation.json").unlink()
    assert front.finder(*FEW, *SCENES).status != 0
    assert len(measured) == 2 and not (front.out / "ablation.json").exists()
    limit = 3
    front.succeed(*FEW, *SCENES)
    assert len(measured) == 3 and front.json("ablation.json") == whole


def test_steering_as_a_command(front: Front) -> None:
    front.succeed(*FEW, *SCENES, "scenes.count=2", "steer=true", "ablate.strength=8")
    found = front.json("ablation.json")
    assert found["measure"] == "answers that name what is in the region"
    assert found["choices"]["ablate.strength"] == 8


def test_native_boxes_of_a_model_that_writes_none(front: Front) -> None:
    front.succeed(*FEW, *SCENES, "ablate.measure=boxes", "model.native_box=paligemma", "scenes.count=1")
    found = front.json("ablation.json")
    assert found["measure"] == "native boxes right (IoU 0.5)"
    assert found["curves"]["heads"] == [0, 0] and list(found["measures"]) == [found["measure"]]


def test_native_boxes_by_hand(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes PaliGemma's box around the centre or, without head 2-0, in a corner.

    Two of three true boxes are in the centre, so only switching off 2-0 makes all boxes wrong.
    """

    def generate_native_box(lvlm: LVLM, *arguments: Any) -> Any:
        text = ""

        def generate(input_ids: Any, attention_mask: Any, pixel_values: Any, **_: Any) -> Any:
            nonlocal text
            written: list[Any] = []
            hook = output_projection(lvlm, 2).register_forward_pre_hook(lambda _, given: written.append(given[0]))
            lvlm.model.base_model(input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
            hook.remove()
            is_on = bool(written[-1][..., : written[-1].shape[-1] // lvlm.num_heads].any())
            numbers = (256, 256, 768, 768) if is_on else (0, 0, 40, 40)  # of 1024
            text = "".join(f"<loc{number:04d}>" for number in numbers)
            return input_ids

        with monkeypatch.context() as patch:
            patch.setattr(lvlm.model, "generate", generate)
            patch.setattr(type(lvlm.processor.tokenizer), "decode", lambda *_, **__: text)
            return generate_box(lvlm, *arguments)

    monkeypatch.setattr(ablate, "generate_box", generate_native_box)
    draw_image(Path("a.png"), size=(96, 96))
    boxes = [[24, 24, 72, 72], [24, 24, 72, 60], [0, 40, 40, 90]]
    lines = [{"id": f"{n}", "prompt": "the dog", "image_path": "a.png", "bbox": box} for n, box in enumerate(boxes)]
    write_lines(Path("data.jsonl"), lines)
    words = ("data_file=data.jsonl", "ablate.measure=boxes", "model.native_box=paligemma", "ablate.draws=2")
    front.succeed("stage=ablate", "heads=[4-4,2-0]", "ablate.counts=[1,2]", *words)
    found = front.json("ablation.json")
    assert found["curves"] == {
        "heads": [0.666667, 0.666667, 0], "random": [0.666667] * 3, "attention_sum": [0.666667] * 3
    }  # fmt: skip
    assert found["falls"]["heads"] == [0, 0, 0.666667]


def test_known_heads_of_another_query_token_are_not_taken(front: Front) -> None:
    result = front.succeed(
        "stage=ablate",
        *SCENES,
        "scenes.count=1",
        "query_token=answer_mean",
        "ablate.measure=maps",
        "ablate.counts=[1]",
    )
    assert "no ready list of heads fits: own-tiny" in result.err


def test_an_unknown_output_projection_fails_the_run(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not every entry."""
    monkeypatch.setattr("localization_heads.lvlm.interventions.switching.PROJECTIONS", ("mixer",))
    assert "has no output projections of a known name (mixer)" in front.error(
        "stage=ablate", *SCENES, "ablate.counts=[1]"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("heads=[4-9]",), "there is no L4H9"),
        (("heads=greedy",), "changes fixed heads"),
        (("ablate.measure=boxes",), "not known to write boxes"),
        (("ablate.counts=[]",), "ablate.counts"),
        (("ablate.how=half",), "choose one of zero, mean"),
        (("ablate.strength=nan",), "ablate.strength"),
    ],
)
def test_bad_options(front: Front, options: tuple[str, ...], message: str) -> None:
    assert message in front.error("stage=ablate", *SCENES, "scenes.count=1", *options)


def test_entries_without_anything_to_measure(front: Front) -> None:
    Image.new("RGB", (64, 48)).save("a.png")
    write_lines(Path("data.jsonl"), [{"id": "a", "prompt": "the dog", "image_path": "a.png"}])
    for option in ("ablate.steer=false", "ablate.steer=true"):
        assert "stage=ablate needs entries with" in front.error("stage=ablate", "data_file=data.jsonl", option)
