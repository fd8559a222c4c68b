"""`lh.evaluate` agrees with `stage=evaluate`, `lh.find_heads` reads images once, and the API is typed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from front import Front, stub_figures, write_data, write_lines
from PIL import Image

import localization_heads as lh
from localization_heads.background import PREFETCH
from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample, decode_mask, load_samples
from localization_heads.errors import UsageError
from localization_heads.evaluation.judging import truth_of
from localization_heads.heads.head import Head
from localization_heads.heads.ready import ReadyHeads
from localization_heads.lvlm import model
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import EncodedImage
from localization_heads.options.groups import CriteriaOptions

ROOT = Path(__file__).parents[1]
HEADS = (Head(2, 0), Head(3, 1))
COUNT = 6
OPTIONS = (
    *("stage=evaluate", "data=scenes", f"scenes.count={COUNT}", "scenes.size=96", "heads=[2-0,3-1]"),
    *("visualize_batch=false", "worst=0", "report=false"),
)
COMMAND_ONLY = ("heads_from", "data_file", "scenes", "range")
"""Choices that only the command records."""


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    stub_figures(monkeypatch)
    return front


def run_command(front: Front, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[Sample]]:
    """`metrics.json`, the rows of `per_sample.parquet`, and their samples."""
    front.succeed(*OPTIONS, *options)
    metrics = front.json("metrics.json")
    (data_file,) = Path("outputs/scenes").rglob("*.jsonl")
    rows = pyarrow.parquet.read_table(front.out / "per_sample.parquet").to_pylist()
    return metrics, rows, load_samples(data_file).entries


def assert_same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two nested dicts of metrics; batches round differently."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_numbers(found[name], value)
        elif isinstance(value, list) and value and isinstance(value[0], list):
            assert np.array(found[name]) == pytest.approx(np.array(value), abs=2e-5), name
        else:
            assert found[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("bootstrap", ["expression", "image"])
def test_evaluate_gives_the_results_of_the_command(front: Front, lvlm: LVLM, bootstrap: Any) -> None:
    metrics, rows, samples = run_command(front, f"bootstrap={bootstrap}")
    evaluation = lh.evaluate(lvlm, iter(samples), HEADS, bootstrap=bootstrap)
    choices, expected = evaluation.metrics.pop("choices"), metrics.pop("choices")
    assert_same_numbers(evaluation.metrics, metrics)
    assert metrics["num_samples"] == metrics["num_masks"] == COUNT
    segmenter, expected_segmenter = choices.pop("segmenter"), expected.pop("segmenter")
    assert expected_segmenter.items() <= segmenter.items()
    assert json.loads(json.dumps(choices)) == {
        name: value for name, value in expected.items() if name not in COMMAND_ONLY
    }
    for scored, sample, row in zip(evaluation.samples, samples, rows, strict=True):
        assert (scored.id, scored.expression) == (sample.id, sample.expression)
        assert (scored.id, scored.expression) == (row["id"], row["expression"])
        assert scored.box == pytest.approx(row["predicted_box"])
        (score,) = scored.scores["heads"]
        assert score.iou == pytest.approx(row["iou"], abs=2e-5)
        assert score.overlap == (row["intersection"], row["union"])
        ious = [score.iou for score in scored.scores["random_heads"]]
        assert np.mean(ious) == pytest.approx(row["random_heads_iou"], abs=2e-5)


def test_a_benchmarks_own_metrics_equal_those_of_the_command(front: Front, lvlm: LVLM) -> None:
    """Also with an entry without a target; a file of several protocols gets none, and a note says so."""
    path = write_data(front.folder, count=4, bbox=[8, 8, 40, 40], protocol="ref-l4", category="o365_1")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= {"bbox": None, "absent": True}
    write_lines(path, lines)
    options = ("stage=evaluate", "data_file=data.jsonl", "heads=[2-0,3-1]", "controls=false", *OPTIONS[-3:])
    front.succeed(*options)
    metrics = front.json("metrics.json")
    found = lh.evaluate(lvlm, load_samples(path).entries, HEADS, controls=False).metrics
    assert metrics["choices"]["protocol"] == found["choices"]["protocol"] == "ref-l4"
    assert_same_numbers(found["protocol"], metrics["protocol"])
    several = ("f1@0.5", "f1@0.5_interval", "pr@f1=1", "num_answers")  # one entry has no target
    assert {name: found[name] for name in several} == {name: metrics[name] for name in several}
    assert metrics["protocol"]["num_answers"] == 4 and "acc>0.5[class mean]" in metrics["protocol"]
    lines[2]["protocol"] = "unc"
    write_lines(path, lines)
    result = front.finder(*options)
    assert "4 entries are of several protocols (ref-l4: 3, unc: 1): evaluate each in a file" in result.err
    assert "protocol" not in front.json("metrics.json")


def test_controls_can_be_left_out_and_heads_default_to_the_models(front: Front, lvlm: LVLM) -> None:
    metrics, _, samples = run_command(front, "heads=auto", "controls=false", "segmenter=none")
    evaluation = lh.evaluate(lvlm, samples, controls=False, segmenter=None)
    assert evaluation.metrics["controls"] == {} and evaluation.metrics["choices"]["controls"] is None
    assert evaluation.metrics["choices"]["heads"] == metrics["choices"]["heads"]
    for name in ("acc@0.5", "mean_iou", "mean_iou_interval", "energy", "ciou"):
        assert evaluation.metrics[name] == pytest.approx(metrics[name], abs=2e-5)


def test_without_known_heads_each_sample_selects_its_own(
    front: Front, lvlm: LVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, _, samples = run_command(front, "heads=greedy", "controls=false")
    monkeypatch.setattr(LVLM, "ready", ReadyHeads())
    found = lh.evaluate(lvlm, samples, controls=False).metrics
    assert found["mean_iou"] == pytest.approx(metrics["mean_iou"], abs=2e-5)
    assert (found["choices"]["heads"], found["choices"]["k"]) == (metrics["choices"]["heads"], 3)


def test_a_sample_on_which_no_head_passes_is_skipped(
    lvlm: LVLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As by `stage=evaluate heads=greedy`; but an empty list of heads is an error."""
    monkeypatch.setattr(LVLM, "ready", ReadyHeads())
    samples = octopus_samples()
    sums = [lvlm.attend(s.image, s.expression).attention[2:].sum(axis=(2, 3)).max() for s in samples]
    low, middle, _ = sorted(map(float, sums))
    options = CriteriaOptions(tau=(low + middle) / 2)
    with caplog.at_level("WARNING", "localization_heads"):
        found = lh.evaluate(lvlm, samples, criteria=options, controls=False, segmenter=None)
    assert (found.metrics["num_samples"], found.metrics["num_failed"]) == (2, 1)
    assert len(found.samples) == 2 and "is left out: no head passes" in caplog.text
    with pytest.raises(ValueError, match=r"heads=\[\] names no head"):
        lh.ground(lvlm, samples[0].image, "the animal", [])


def octopus_samples() -> list[Sample]:
    """Three expressions for one image in memory; the first has a mask, the others a box."""
    image = load_image(ROOT / "examples" / "images" / "octopus_14.png")
    mask = np.zeros((image.height, image.width), bool)
    mask[5:40, 10:60] = True
    texts = ["the animal", "the octopus", "the purple animal"]
    samples = [Sample(image, text, bbox=(10.0, 5.0, 60.0, 40.0), id=text) for text in texts]
    return [replace(samples[0], bbox=None, mask=mask), *samples[1:]]


def test_an_image_is_encoded_once_for_consecutive_samples(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []

    class Counted(EncodedImage):
        def __init__(self, lvlm: LVLM, image: Image.Image) -> None:
            encoded.append(image)
            super().__init__(lvlm, image)

    samples = octopus_samples()
    rankings = [lh.find_heads(lvlm, [sample], top_n=3) for sample in samples]
    plain = {"controls": False, "segmenter": None}
    singly = [lh.evaluate(lvlm, [sample], HEADS, **plain).samples[0] for sample in samples]
    monkeypatch.setattr(model, "EncodedImage", Counted)
    other = Sample(Image.new("RGB", (64, 64), "white"), "the animal", bbox=(0, 0, 9, 9))
    evaluation = lh.evaluate(lvlm, [*samples, other, other], HEADS, **plain)
    assert len(encoded) == 2
    for scored, expected in zip(evaluation.samples, singly, strict=False):
        assert scored.box == pytest.approx(expected.box, abs=1e-3)
        assert scored.scores["heads"][0].iou == pytest.approx(expected.scores["heads"][0].iou, abs=1e-4)
    ranking = lh.find_heads(lvlm, samples, top_n=3)
    assert len(encoded) == 3 and ranking.num_samples == 3
    *sums, mean_sums = ({head.address: head.attention_sum for head in one.heads} for one in (*rankings, ranking))
    kept_by_all = set.intersection(*(set(one) for one in sums)) & set(mean_sums)
    for address in kept_by_all:
        assert mean_sums[address] == pytest.approx(np.mean([one[address] for one in sums]), abs=1e-5)


def test_samples_are_read_lazily(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator stays only a few samples ahead of the model."""
    leads: list[int] = []
    original, done = LVLM.attend_batch, 0

    def generate() -> Iterator[Sample]:
        for number in range(12):
            leads.append(number - done)
            yield Sample(Image.new("RGB", (64, 64), (number * 9, 90, 9)), "the animal", bbox=(0, 0, 9, 9))

    def counted(self: LVLM, *arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        return original(self, *arguments, **options)

    monkeypatch.setattr(LVLM, "attend_batch", counted)
    lh.evaluate(lvlm, generate(), HEADS, controls=False, segmenter=None)
    assert done == 12 and max(leads) <= PREFETCH + 1


def test_ground_truth_comes_from_box_and_mask() -> None:
    by_mask, by_box, _ = octopus_samples()
    size = by_box.image.size  # type: ignore[union-attr]
    found = truth_of(by_mask, size)
    assert found.box == (10, 5, 60, 40) and found.mask is not None and found.mask.sum() == 50 * 35
    assert truth_of(by_box, size).box == by_box.bbox and truth_of(by_box, size).mask is None
    both = truth_of(replace(by_mask, bbox=(1, 2, 3, 4), ignore=by_mask.mask), size)
    assert both.box == (1, 2, 3, 4) and both.ignored is not None
    assert (both.mask == decode_mask(by_mask, size)).all()


@pytest.mark.parametrize("kind", [list, iter])
def test_boxes_that_are_not_in_pixels_are_refused(lvlm: LVLM, kind: Any) -> None:
    """Before the first forward pass for a sequence, after the last one for an iterator."""
    image = Image.new("RGB", (64, 48), "red")
    samples = [Sample(image, "the dog", id=str(n), bbox=(0.1, 0.2, 0.3, 0.4 + n / 10)) for n in range(2)]
    with pytest.raises(UsageError, match=r"^samples: all 2 boxes lie within the first pixel.*\(0\)"):
        lh.evaluate(lvlm, kind(samples), HEADS, controls=False, segmenter=None)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("the octopus: has neither bbox nor mask", {"bbox": None}),
        ("the octopus: the true box lies outside the image", {"bbox": (9e3, 9e3, 9.1e3, 9.1e3)}),
        ("the octopus: the mask is empty", {"bbox": None, "mask": np.zeros((384, 384), bool)}),
        ("the octopus: the mask is 2 x 2 pixels", {"mask": np.ones((2, 2), bool)}),
    ],
)
def test_a_sample_with_unusable_ground_truth_is_refused(message: str, changes: dict[str, Any], lvlm: LVLM) -> None:
    with pytest.raises(UsageError, match=message):
        lh.evaluate(lvlm, [replace(octopus_samples()[1], **changes)], HEADS)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("at least one sample", {"samples": []}),
        ("there is no L99H0", {"heads": [Head(99, 0)]}),
        ("there is no L0H-1", {"heads": [Head(0, -1)]}),
        (r"bootstrap='?word'?: choose one of expression, image", {"bootstrap": "word"}),
        ("embedded is not known to write boxes", {"native": True}),
    ],
)
def test_wrong_arguments_are_refused(message: str, arguments: dict[str, Any], lvlm: LVLM) -> None:
    with pytest.raises(UsageError, match=message):
        lh.evaluate(lvlm, **{"samples": octopus_samples()[1:2], "heads": HEADS, **arguments})


def test_native_boxes_are_scored(lvlm: LVLM) -> None:
    """Declared to write boxes, the embedded model writes words instead, which is a miss."""
    writer = copy(lvlm)
    writer.spec = replace(lvlm.spec, native_box="paligemma")
    evaluation = lh.evaluate(writer, octopus_samples()[1:2], HEADS)
    assert list(evaluation.metrics["controls"])[-1] == "native"
    assert evaluation.metrics["controls"]["native"]["mean_iou"] == 0
    assert evaluation.metrics["choices"]["native"] == "detect {expression}"


SCRIPT = """\
import localization_heads as lh

lvlm = lh.load_model()
samples = [lh.Sample("cat.jpg", "the cat", bbox=(0, 0, 9, 9))]
ranking: lh.HeadRanking = lh.find_heads(lvlm, samples)
result: lh.Grounding = lh.ground(lvlm, "cat.jpg", "the cat", heads=ranking.top(3))
x0: float = result.box[0]
accuracy = lh.evaluate(lvlm, samples, ranking.top(3)).metrics["acc@0.5"]
head: lh.Head = ranking.top(1)[0]
shape: tuple[int, ...] = result.mask.shape
reveal_type(lh.evaluate(lvlm, samples).samples[0].scores["heads"][0].iou)
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_user_scripts_are_type_checked(tmp_path: Path) -> None:
    """A correct script passes `mypy --strict` with the right types; each of three wrong lines is an error."""
    wrong = SCRIPT + 'lh.ground(lvlm, "cat.png", 3)\nlh.evaluate(lvlm, samples, bootstrap="word")\nresult.bax\n'
    first, last = SCRIPT.count("\n") + 1, wrong.count("\n")
    for name, text in (("right.py", SCRIPT), ("wrong.py", wrong)):
        (tmp_path / name).write_text(text)
    # What the package itself imports takes mypy two minutes to read, and says nothing about a script's types.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,huggingface_hub.*,scipy.*,matplotlib.*,pyarrow.*,cv2.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy"]
    result = subprocess.run(
        [*command, f"--cache-dir={tmp_path / 'cache'}", "right.py", "wrong.py"],
        cwd=tmp_path,
        env={"PATH": "", "MYPYPATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    revealed = result.stdout.replace("builtins.", "")  # mypy's older versions say where a type is from
    assert revealed.count('Revealed type is "float"') == 2, result
    found = [line.split(": error: ")[0] for line in result.stdout.splitlines() if ": error: " in line]
    assert found == [f"wrong.py:{line}" for line in range(first, last + 1)], result.stdout


def test_a_ranking_found_under_other_conditions_is_noted_once(image: Image.Image) -> None:
    """Other weights, prompt or query token; an older ranking does not record its conditions."""
    lvlm = lh.load_model(device="cpu")
    ranking = lh.find_heads(lvlm, [Sample(image, "the dog")])
    assert ranking.found_with == {
        "conv_mode": "referseg", "system": lvlm.system, "query_token": "last", "weights": lvlm.fingerprint,
        "criteria": "paper", "library": f"localization-heads {lh.__version__}",
    }  # fmt: skip
    found = lh.ground(lvlm, image, "the dog", ranking, segmenter=None)
    assert list(found.heads) == ranking.top(3)
    assert lvlm.notes == []
    plain = lh.load_model(device="cpu", conv_mode="plain")
    for heads in (ranking, ranking, replace(ranking, found_with=None), ranking.top(3), [Head(2, 0)]):
        lh.ground(plain, image, "the dog", heads, segmenter=None)
    assert plain.notes == [
        "these heads: found with conv_mode=referseg (here: plain); others may be better here: find them with "
        "stage=find, or ask as it did"
    ]
    lh.ground(plain, image, "the dog", segmenter=None)
    assert len(plain.notes) == 2
    assert plain.notes[1].startswith("no ready list of heads fits: own-tiny (this project, on 1,000 scenes")
    assert "was found with conv_mode=referseg (here: plain); ask as it was found" in plain.notes[1]
    other = lh.load_model(device="cpu")
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    truth = Sample(image, "the dog", bbox=(0, 0, 50, 50))
    lh.evaluate(other, [truth], ranking, segmenter=None, controls=False)
    (note,) = other.notes
    assert f"found with weights={lvlm.fingerprint} (here: {other.fingerprint})" in note
