"""`stage=calibrate`, `calibration=` and `abstain=` as commands, and the confidence metrics of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from front import Calls, Front

import localization_heads as lh
from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.options.groups import GroundingOptions
from localization_heads.store.results import read_predictions

SCENES = (
    "data=scenes",
    "scenes.size=96",
    "scenes.absent=0.5",
    "heads=[4-4,5-6,5-3]",
    "report=false",
    "worst=0",
)
SHARP = (
    "grounding=paper",
    "grounding.sigma=0.35",
    "grounding.means=1.5",
    "grounding.component=largest_mass",
    "segmenter=none",
)
FIT = ("stage=calibrate", "scenes.split=validation", "scenes.count=80", *SCENES, *SHARP)
TEST = ("stage=evaluate", "scenes.count=24", "controls=false", "visualize_batch=false", *SCENES, *SHARP)


@pytest.fixture
def calibrated(front: Front) -> Front:
    front.succeed(*FIT)
    return front


def predictions(front: Front):
    return list(read_predictions(front.out / "predictions.jsonl"))


def metrics(front: Front):
    return front.json("metrics.json")


def test_evaluate_takes_the_calibration_and_abstains_by_it(calibrated: Front):
    front, data = calibrated, calibrated.json("calibration.json")
    assert data["num_labels"] == 80 and data["present"] and data["measured"]["auroc_useful"] > 0.7
    assert data["recipe"]["heads"] == [[4, 4], [5, 3], [5, 6]] and data["recipe"]["grounding.sigma"] == 0.35
    assert data["recipe"]["weights"] and data["recipe"]["query_token"] == "last"

    result = front.succeed(*TEST)
    found, block = predictions(front), metrics(front)["confidence"]
    assert block["calibrated"] and block["num_answers"] == 24 and 0 < block["num_absent"] < 24
    assert metrics(front)["num_samples"] == 24 - block["num_absent"]
    assert metrics(front)["auroc_present"] == block["auroc_present"] > 0.6
    assert all(one.calibrated and one.bbox and one.presence is not None and not one.absent for one in found)
    assert (front.out / "confidence.png").is_file() and "AUROC: present against absent" in result.out

    front.succeed(*TEST, "abstain=0.5")
    abstaining, block = predictions(front), metrics(front)["confidence"]
    for before, after in zip(found, abstaining, strict=True):
        assert after.absent == (before.presence < 0.5) and (after.bbox is None) == after.absent
        assert (after.presence, after.confidence) == (before.presence, before.confidence)
    absent = [one.absent for one in abstaining]
    assert any(absent) and not all(absent) and block["n_acc"] > 0 and block["t_acc"] > 0
    assert block["auroc_right"] == metrics(front)["auroc_right"]

    result = front.succeed("stage=ground", "abstain=1", "visualize_limit=1", *TEST[1:])
    assert "nothing there" in result.out
    assert all(one.absent for one in predictions(front) if one.presence < 1)


def test_calibrations_that_do_not_fit_are_noted_or_refused(calibrated: Front):
    front, path = calibrated, calibrated.out / "calibration.json"
    other = ("grounding.sigma=0.5",)
    result = front.succeed(*TEST, *other)
    assert "not calibrated" in result.err and "grounding.sigma 0.35" in result.err
    assert not metrics(front)["confidence"]["calibrated"] and "uncalibrated" in result.out
    assert all(one.confidence == one.agreement for one in predictions(front))
    for change in (other, ("heads=[4-4]",), ("query_token=expression_end",)):
        error = front.error(*TEST, *change, f"calibration={path}")
        assert "was fitted with" in error and "run stage=calibrate again" in error
    front.succeed(*TEST, "calibration=none")
    assert not metrics(front)["confidence"]["calibrated"]
    for arguments in (("calibration=none",), other):
        result = front.finder(*TEST, "abstain=0.5", *arguments)  # a note says why none fits
        assert result.status == 2 and "run stage=calibrate" in result.err
    Path("broken.json").write_text('{"version": 2}')
    for name, message in (
        ("nowhere", "there is no such file; stage=calibrate"),
        ("broken", "it is no calibration"),
    ):
        error = front.error(*TEST, f"calibration={name}.json")
        assert f"calibration={name}.json: {message}" in error


def test_calibrate_from_refits_a_calibration_on_another_domain(calibrated: Front):
    front, first = calibrated, Path("first.json")
    (front.out / "calibration.json").rename(first)
    few = [option.replace("count=80", "count=50") for option in FIT]
    front.succeed(*few, "scenes.style=openmoji", f"calibrate_from={first}")
    old, new = json.loads(first.read_text()), front.json("calibration.json")
    assert new["num_labels"] == 50 and new["recipe"] == old["recipe"]
    assert new["right"]["weights"].keys() == old["right"]["weights"].keys() == {"gain", "agreement"}
    assert new["right"] != old["right"] and new["present"] != old["present"]
    for option, message in (
        ("grounding.sigma=0.5", "first.json was fitted with grounding.sigma 0.35"),
        ("zoom=true", "first.json was fitted with zoom False"),
    ):
        assert message in front.error(*few, option, f"calibrate_from={first}")
    error = front.error(*few, "calibrate_from=nowhere.json")
    assert "calibrate_from=nowhere.json: there is no such file" in error


def test_signals_of_a_calibration_are_asked_of_the_model(calibrated: Front):
    path = calibrated.out / "calibration.json"
    data = json.loads(path.read_text())
    data["recipe"]["signals"] = True
    data["present"] = {"intercept": 0.5, "weights": {"question": 1.0, "statement": 0.1, "expression": 0.1}}
    path.write_text(json.dumps(data))
    result = calibrated.succeed(*TEST, "scenes.count=2")
    assert "not calibrated" not in result.err
    assert all(one.calibrated and 0 < one.confidence < one.presence < 1 for one in predictions(calibrated))
    assert len({one.presence for one in predictions(calibrated)}) == 2


def test_too_few_labels_are_refused(front: Front):
    few = [option.replace("count=80", "count=8") for option in FIT]
    assert "needs at least 20 entries whose box is right" in front.error(*few)
    assert not (front.out / "calibration.json").exists()
    assert "stage=calibrate" in front.error("stage=find", "calibrate_from=a.json", *SCENES)


def test_an_interrupted_calibration_resumes_with_the_same_bytes(front: Front, calls: Calls):
    front.succeed(*FIT, "output_dir=whole")
    calls.restart(fail_at=4)
    assert front.finder(*FIT).status == 130
    done = sum(calls.sizes)
    calls.restart()
    front.succeed(*FIT)
    assert sum(calls.sizes) == 80 - done
    assert (front.out / "calibration.json").read_bytes() == Path("whole/tiny/calibration.json").read_bytes()


def test_evaluate_works_with_absent_entries_only(calibrated: Front):
    calibrated.succeed(*TEST, "scenes.absent=1", "abstain=0.5")
    found = metrics(calibrated)
    assert found["num_samples"] == 0 and 0 < found["n_acc"] <= 1 and "acc@0.5" not in found


def test_python_api_gives_the_same_confidence(calibrated: Front):
    path = calibrated.out / "calibration.json"
    options = GroundingOptions(sigma=0.35, means=1.5, component="largest_mass")
    calibrated.succeed(*TEST)
    lvlm, line = load_model(device="cpu"), predictions(calibrated)[0]
    (folder,) = {file.parent for file in Path("outputs/scenes").glob("test*/scene_00000.png")}
    entry = json.loads((folder / "scenes.jsonl").read_text().splitlines()[0])
    heads, image = [lh.Head(4, 4), lh.Head(5, 6), lh.Head(5, 3)], folder / entry["image_path"]
    recipe = {"options": options, "segmenter": None}
    found = lh.ground(lvlm, image, entry["prompt"], heads, calibration=path, abstain=1.0, **recipe)
    assert found.calibrated and found.absent and len(found.own_boxes) == 3
    assert found.confidence == pytest.approx(line.confidence, abs=1e-4)
    assert found.agreement == pytest.approx(line.agreement, abs=1e-4)
    raw = lh.ground(lvlm, image, entry["prompt"], heads, **recipe)
    assert raw.confidence == raw.agreement and not raw.calibrated and raw.presence is None
    with pytest.raises(UsageError, match="heads"):
        lh.ground(lvlm, image, entry["prompt"], heads[:2], calibration=path, **recipe)
    with pytest.raises(ValueError, match=r"abstain=0\.5 needs a calibration"):
        lh.ground(lvlm, image, entry["prompt"], heads, abstain=0.5, **recipe)
