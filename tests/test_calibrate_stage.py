"""`stage=calibrate`, `calibration=`, `abstain=` and what `evaluate` says of confidences, as commands."""

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
    result = front.finder(*FIT)
    assert result.status == 0, result.err
    return front


def predictions(front: Front):
    return list(read_predictions(front.out / "predictions.jsonl"))


def metrics(front: Front):
    return json.loads((front.out / "metrics.json").read_text())


def test_from_labels_to_abstaining(calibrated: Front):
    front, path = calibrated, calibrated.out / "calibration.json"
    data = json.loads(path.read_text())
    assert data["num_labels"] == 80 and data["present"] and data["measured"]["auroc_useful"] > 0.7
    assert data["recipe"]["heads"] == [[4, 4], [5, 3], [5, 6]] and data["recipe"]["grounding.sigma"] == 0.35
    assert data["recipe"]["weights"] and data["recipe"]["query_token"] == "last"

    result = front.finder(*TEST)
    assert result.status == 0, result.err
    found, block = predictions(front), metrics(front)["confidence"]
    assert block["calibrated"] and block["num_answers"] == 24 and 0 < block["num_absent"] < 24
    assert metrics(front)["num_samples"] == 24 - block["num_absent"]
    assert metrics(front)["auroc_present"] == block["auroc_present"] > 0.6
    assert all(one.calibrated and one.bbox and one.presence is not None and not one.absent for one in found)
    assert (front.out / "confidence.png").is_file() and "AUROC: present against absent" in result.out

    assert front.finder(*TEST, "abstain=0.5").status == 0
    turned, block = predictions(front), metrics(front)["confidence"]
    for before, after in zip(found, turned, strict=True):
        assert after.absent == (before.presence < 0.5) and (after.bbox is None) == after.absent
        assert (after.presence, after.confidence) == (before.presence, before.confidence)
    absent = [one.absent for one in turned]
    assert any(absent) and not all(absent) and block["n_acc"] > 0 and block["t_acc"] > 0
    assert block["auroc_right"] == metrics(front)["auroc_right"]

    result = front.finder("stage=ground", "abstain=1", "visualize_limit=1", *TEST[1:])
    assert result.status == 0 and "nothing there" in result.out
    assert all(one.absent for one in predictions(front) if one.presence < 1)


def test_what_does_not_fit_is_said_or_refused(calibrated: Front):
    front, path = calibrated, calibrated.out / "calibration.json"
    other = ("grounding.sigma=0.5",)
    result = front.finder(*TEST, *other)
    assert result.status == 0 and "not calibrated" in result.err and "grounding.sigma 0.35" in result.err
    assert not metrics(front)["confidence"]["calibrated"] and "uncalibrated" in result.out
    assert all(one.confidence == one.agreement for one in predictions(front))
    for change in (other, ("heads=[4-4]",), ("query_token=expression_end",)):
        result = front.finder(*TEST, *change, f"calibration={path}")
        assert result.status == 2, change
        assert "was fitted with" in result.err and "run stage=calibrate again" in result.err
    assert front.finder(*TEST, "calibration=none").status == 0
    assert not metrics(front)["confidence"]["calibrated"]
    for arguments in (("calibration=none",), other):
        result = front.finder(*TEST, "abstain=0.5", *arguments)
        assert result.status == 2 and "run stage=calibrate" in result.err
    result = front.finder(*TEST, "calibration=nowhere.json")
    assert (
        result.status == 2
        and "calibration=nowhere.json: there is no such file; stage=calibrate" in result.err
    )
    Path("broken.json").write_text('{"version": 2}')
    result = front.finder(*TEST, "calibration=broken.json")
    assert result.status == 2 and "calibration=broken.json: it is no calibration" in result.err


def test_a_new_domain_from_few_labels(calibrated: Front):
    front, first = calibrated, Path("first.json")
    (front.out / "calibration.json").rename(first)
    few = [option.replace("count=80", "count=50") for option in FIT]
    result = front.finder(*few, "scenes.style=openmoji", f"calibrate_from={first}")
    assert result.status == 0, result.err
    old, new = json.loads(first.read_text()), json.loads((front.out / "calibration.json").read_text())
    assert new["num_labels"] == 50 and new["recipe"] == old["recipe"]
    assert new["right"]["weights"].keys() == old["right"]["weights"].keys() == {"gain", "agreement"}
    assert new["right"] != old["right"] and new["present"] != old["present"]
    result = front.finder(*few, "grounding.sigma=0.5", f"calibrate_from={first}")
    assert result.status == 2 and "first.json was fitted with grounding.sigma 0.35" in result.err
    result = front.finder(*few, "zoom=true", f"calibrate_from={first}")
    assert result.status == 2 and "first.json was fitted with zoom False" in result.err
    result = front.finder(*few, "calibrate_from=nowhere.json")
    assert result.status == 2 and "calibrate_from=nowhere.json: there is no such file" in result.err


def test_a_calibration_has_the_model_asked_what_it_weighs(calibrated: Front):
    path = calibrated.out / "calibration.json"
    data = json.loads(path.read_text())
    data["recipe"]["signals"] = True
    data["present"] = {"intercept": 0.5, "weights": {"question": 1.0, "statement": 0.1, "expression": 0.1}}
    path.write_text(json.dumps(data))
    result = calibrated.finder(*TEST, "scenes.count=2")
    assert result.status == 0 and "not calibrated" not in result.err
    assert all(one.calibrated and 0 < one.confidence < one.presence < 1 for one in predictions(calibrated))
    assert len({one.presence for one in predictions(calibrated)}) == 2


def test_too_few_labels_and_no_truth(front: Front):
    result = front.finder(*(option.replace("count=80", "count=8") for option in FIT))
    assert result.status == 2 and "needs at least 20 entries whose box is right" in result.err
    assert not (front.out / "calibration.json").exists()
    result = front.finder("stage=find", "calibrate_from=a.json", *SCENES)
    assert result.status == 2 and "stage=calibrate" in result.err


def test_a_killed_calibration_ends_with_the_same_bytes(front: Front, calls: Calls):
    assert front.finder(*FIT, "output_dir=whole").status == 0
    calls.restart(fail_at=4)
    assert front.finder(*FIT).status == 130
    done = sum(calls.sizes)
    calls.restart()
    assert front.finder(*FIT).status == 0
    assert sum(calls.sizes) == 80 - done
    assert (front.out / "calibration.json").read_bytes() == Path("whole/tiny/calibration.json").read_bytes()


def test_only_absent_entries(calibrated: Front):
    result = calibrated.finder(*TEST, "scenes.absent=1", "abstain=0.5")
    assert result.status == 0, result.err
    found = metrics(calibrated)
    assert found["num_samples"] == 0 and 0 < found["n_acc"] <= 1 and "acc@0.5" not in found


def test_python_gives_the_same(calibrated: Front):

    path, options = (
        calibrated.out / "calibration.json",
        GroundingOptions(sigma=0.35, means=1.5, component="largest_mass"),
    )
    assert calibrated.finder(*TEST).status == 0
    lvlm, line = load_model(device="cpu"), predictions(calibrated)[0]
    (folder,) = {file.parent for file in Path("outputs/scenes").glob("test*/scene_00000.png")}
    entry = json.loads((folder / "scenes.jsonl").read_text().splitlines()[0])
    heads, image = [lh.Head(4, 4), lh.Head(5, 6), lh.Head(5, 3)], folder / entry["image_path"]
    asked = {"options": options, "segmenter": None}
    found = lh.ground(lvlm, image, entry["prompt"], heads, calibration=path, abstain=1.0, **asked)
    assert found.calibrated and found.absent and len(found.own_boxes) == 3
    assert found.confidence == pytest.approx(line.confidence, abs=1e-4)
    assert found.agreement == pytest.approx(line.agreement, abs=1e-4)
    raw = lh.ground(lvlm, image, entry["prompt"], heads, **asked)
    assert raw.confidence == raw.agreement and not raw.calibrated and raw.presence is None
    with pytest.raises(UsageError, match="heads"):
        lh.ground(lvlm, image, entry["prompt"], heads[:2], calibration=path, **asked)
    with pytest.raises(ValueError, match=r"abstain=0\.5 needs a calibration"):
        lh.ground(lvlm, image, entry["prompt"], heads, abstain=0.5, **asked)
