"""`stage=evaluate` as a command: metrics and controls, per-sample rows, failures, resuming, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from front import EXPRESSIONS, Calls, Front, draw_image, one_line, stub_figures, write_lines
from PIL import Image

import localization_heads as lh
from localization_heads.cells import mass_inside
from localization_heads.data.masks import encode_mask, read_mask
from localization_heads.evaluation.controls import centre_box, mean_map, oracle_map, random_heads
from localization_heads.evaluation.metrics import mask_overlap, pointing_hit
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.heads.ready import ReadyHeads
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import GroundingOptions
from localization_heads.stages.evaluate import worst_outcomes
from localization_heads.stages.outcome import Outcome
from localization_heads.store.results import Prediction

CONTROLS = ["random_heads", "all_heads", "centre_box", "oracle"]
DATA = ("data_file=data.jsonl", "heads=[2-0,3-1]")
OPTIONS = ("stage=evaluate", *DATA, "visualize_batch=false", "report=false")


@pytest.fixture
def quick(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Figures are empty files."""
    stub_figures(monkeypatch)
    return front


def write_truths(count: int = 5, masks: bool = True) -> list[dict[str, Any]]:
    """`data.jsonl`: two expressions per image with random boxes, and a mask for every other one."""
    rng = np.random.default_rng(3)
    entries = []
    for number in range(count):
        image = draw_image(Path(f"image_{number // 2}.png"), number // 2)
        x0, y0 = rng.integers(0, 40), rng.integers(0, 30)
        box = [int(x0), int(y0), int(x0 + rng.integers(8, 24)), int(y0 + rng.integers(8, 18))]
        entry = {
            "id": f"entry_{number}", "prompt": EXPRESSIONS[number], "image_path": image.name, "bbox": box,
        }  # fmt: skip
        if masks and number % 2 == 0:
            mask = np.zeros((48, 64), bool)
            mask[box[1] : box[3], box[0] : box[2]] = rng.random((box[3] - box[1], box[2] - box[0])) < 0.8
            entry["mask"] = encode_mask(mask)
        entries.append(entry)
    write_lines(Path("data.jsonl"), entries)
    return entries


def read_rows(front: Front) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(front.out / "per_sample.parquet").to_pylist()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------- numbers


def test_rows_and_metrics_agree_with_a_second_implementation(quick: Front, lvlm: LVLM) -> None:
    """From the maps of one expression at a time."""
    entries = write_truths()
    quick.succeed(*OPTIONS, "batch_size=1", "segmenter=none", "grounding=paper")
    rows, metrics = read_rows(quick), quick.json("metrics.json")
    assert [row["id"] for row in rows] == [entry["id"] for entry in entries]
    heads, options = [Head(2, 0), Head(3, 1)], GroundingOptions()
    for entry, row in zip(entries, rows, strict=True):
        image = Image.open(entry["image_path"])
        maps, box = lvlm.attend(image, entry["prompt"]), tuple(map(float, entry["bbox"]))
        mask = read_mask(entry["mask"], image.size) if "mask" in entry else None
        found = ground_maps(maps, heads, options)
        assert row["image"] == entry["image_path"] and row["expression"] == entry["prompt"]
        assert tuple(row["true_box"]) == box and tuple(row["predicted_box"]) == pytest.approx(found.box)
        assert row["iou"] == pytest.approx(iou(found.box, box))
        assert row["pointing"] == pointing_hit(found.point, box)
        assert row["energy"] == pytest.approx(mass_inside(found.combined, maps.image_box, image.size, box), abs=1e-6)
        assert row["score"] == pytest.approx(found.score, abs=1e-6) and row["heads"] == ["L2H0", "L3H1"]
        expected = (None, None) if mask is None else mask_overlap(found.mask, mask)
        assert (row["intersection"], row["union"]) == expected
        random = [ground_maps(maps, other, options) for other in random_heads(heads, lvlm.num_heads, seed=42)]
        assert row["random_heads_iou"] == pytest.approx(np.mean([iou(one.box, box) for one in random]))
        hits = [pointing_hit(one.point, box) for one in random]
        assert row["random_heads_pointing"] == pytest.approx(np.mean(hits))
        controls = {"all_heads": mean_map(maps, 2), "oracle": oracle_map(maps, Truth(box, mask))}
        for name, control in controls.items():
            one = ground_maps(control, [Head(0, 0)], options)
            assert row[f"{name}_iou"] == pytest.approx(iou(one.box, box)), name
            assert row[f"{name}_pointing"] == pointing_hit(one.point, box), name
        assert row["centre_box_iou"] == pytest.approx(iou(centre_box(image.size), box))
        assert row["error"] is row["native_box"] is row["native_answer"] is None
    for metric, column in (("mean_iou", "iou"), ("pointing", "pointing"), ("energy", "energy")):
        assert metrics[metric] == pytest.approx(np.mean([row[column] for row in rows]), abs=1e-6)
        for name in CONTROLS:
            values = [row[f"{name}_{column}"] for row in rows]
            assert metrics["controls"][name][metric] == pytest.approx(np.mean(values), abs=1e-6)
    for threshold in (0.25, 0.5, 0.75):
        assert metrics[f"acc@{threshold}"] == np.mean([row["iou"] >= threshold for row in rows])
    shared, union = np.array([(r["intersection"], r["union"]) for r in rows if r["union"] is not None]).T
    assert metrics["ciou"] == pytest.approx(shared.sum() / union.sum(), abs=1e-6)
    assert metrics["giou"] == pytest.approx(np.mean(shared / union), abs=1e-6)
    assert (metrics["num_samples"], metrics["num_masks"], metrics["num_failed"]) == (5, 3, 0)


def iou(a: Any, b: Any) -> float:
    """By counting sixths of pixels: cell edges lie on thirds of them (64 pixels, 24 cells)."""
    cells = []
    for x0, y0, x1, y1 in (a, b):
        x, y = (np.arange(64 * 6) + 0.5) / 6, (np.arange(48 * 6) + 0.5) / 6
        cells.append(((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1)))
    return float((cells[0] & cells[1]).sum() / (cells[0] | cells[1]).sum())


def test_printed_controls_and_recorded_choices(quick: Front) -> None:
    write_truths()
    result = quick.succeed(*OPTIONS, "grounding=paper", "grounding.sigma=0.8", "bootstrap=image")
    for text in ("heads", "random heads", "all heads", "centre box", "oracle", "ahead of random heads"):
        assert text in result.out
    metrics = quick.json("metrics.json")
    assert list(metrics["controls"]) == CONTROLS
    assert all("difference" in row for row in metrics["controls"].values())
    choices = metrics["choices"]
    assert choices["heads"] == ["L2H0", "L3H1"] and choices["k"] == 2
    assert choices["grounding"]["sigma"] == 0.8
    assert (choices["query_token"], choices["conv_mode"]) == ("last", "referseg")
    assert "images" in choices["bootstrap"]
    assert (choices["model"], choices["data_file"], choices["native"]) == ("embedded", "data.jsonl", None)
    by_image = metrics["mean_iou_interval"]
    quick.succeed(*OPTIONS, "grounding=paper", "grounding.sigma=0.8")
    assert quick.json("metrics.json")["mean_iou_interval"] != by_image


def test_greedy_heads_are_those_of_each_sample(quick: Front) -> None:
    write_truths(3)
    quick.succeed(*OPTIONS, "criteria=published_august", "grounding=published", "heads=greedy", "k=5")
    assert all(1 <= len(row["heads"]) <= 5 for row in read_rows(quick))
    choices = quick.json("metrics.json")["choices"]
    assert (choices["criteria"]["means"], choices["criteria"]["bottom_row_above"]) == (2, 0.05)
    assert (choices["grounding"]["means"], choices["grounding"]["margin"]) == (1, 0)
    assert (choices["grounding"]["component"], choices["grounding"]["border"]) == ("all", "repeat")
    quick.succeed(*OPTIONS, "heads=greedy", "k=2")
    assert "own" in quick.json("metrics.json")["choices"]["heads"]
    assert all(len(row["heads"]) == 2 for row in read_rows(quick))


def test_only_the_controls_need_all_layers(quick: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `controls=false` the metrics are the same, and the forward pass stops at the deepest head."""
    write_truths()
    stops: list[Any] = []
    original = LVLM.attend_batch

    def spy(self: LVLM, *arguments: Any, last_layer: int | None = None, **named: Any) -> Any:
        stops.append(last_layer)
        return original(self, *arguments, last_layer=last_layer, **named)

    monkeypatch.setattr(LVLM, "attend_batch", spy)
    quick.succeed(*OPTIONS, "worst=0")
    assert set(stops) == {None}
    whole = quick.json("metrics.json")
    stops.clear()
    quick.succeed(*OPTIONS, "worst=0", "controls=false")
    assert set(stops) == {3}
    bare = quick.json("metrics.json")
    assert bare["controls"] == {} and bare["choices"]["controls"] is None
    for name in ("acc@0.5", "mean_iou", "mean_iou_interval", "pointing", "energy", "ciou"):
        assert bare[name] == whole[name]
    assert not [name for name in read_rows(quick)[0] if name.startswith("oracle")]


# -------------------------------------------------------------------------------------------------- files


def test_an_interrupted_run_resumes_with_the_same_bytes(quick: Front, calls: Calls) -> None:
    write_truths()
    options = (*OPTIONS, "batch_size=2")
    quick.succeed(*options, "output_dir=whole")
    calls.restart(fail_at=2)
    assert quick.finder(*options).status == 130
    assert not (quick.out / "metrics.json").exists()
    done = sum(calls.sizes)
    calls.restart()
    quick.succeed(*options, "worst=0")
    assert sum(calls.sizes) == 5 - done  # the last chunk alone
    for name in ("metrics.json", "per_sample.parquet", "predictions.jsonl"):
        assert (quick.out / name).read_bytes() == Path("whole/tiny", name).read_bytes(), name
    assert not list(quick.out.glob(".evaluate-*"))


def test_edited_ground_truth_is_scored_again(quick: Front, calls: Calls) -> None:
    """When an interrupted run resumes, it must not mix in scores against the old truth."""
    entries = write_truths()
    options = (*OPTIONS, "batch_size=2", "worst=0")
    calls.restart(fail_at=2)
    assert quick.finder(*options).status == 130
    calls.restart()
    entries[0]["bbox"] = [0, 0, 64, 48]
    write_lines(Path("data.jsonl"), entries)
    quick.succeed(*options)
    x0, y0, x1, y1 = read_rows(quick)[0]["predicted_box"]
    assert read_rows(quick)[0]["iou"] == pytest.approx((x1 - x0) * (y1 - y0) / (64 * 48))


def test_drawings_of_the_worst_boxes_replace_those_of_the_last_run(front: Front) -> None:
    entries = write_truths()
    front.succeed(*OPTIONS, "worst=2")
    rows = {row["id"]: row for row in read_rows(front)}
    order = sorted(rows, key=lambda id: (rows[id]["iou"], rows[id]["energy"]))
    bad = [id for id in order if rows[id]["iou"] < 0.5]
    assert len(bad) >= 3
    folder = front.out / "failures"
    assert set(files_of(folder)) == {f"001_{bad[0]}.png", f"002_{bad[1]}.png", "worst.png"}
    assert all(Image.open(path).size[0] > 100 for path in folder.glob("*.png"))
    front.succeed(*OPTIONS, "worst=1")
    assert set(files_of(folder)) == {f"001_{bad[0]}.png", "worst.png"}
    front.succeed(*OPTIONS, "worst=0")
    assert files_of(folder) == {}
    for entry in entries:
        entry["bbox"], entry["mask"] = rows[entry["id"]]["predicted_box"], None
    write_lines(Path("data.jsonl"), entries)
    result = front.succeed(*OPTIONS, "worst=5")
    assert "failures" not in result.out
    assert files_of(folder) == {}
    assert not [path for path in front.out.iterdir() if path.name.endswith(".tmp")]


def test_worst_outcomes_are_sorted_and_below_an_iou_of_a_half() -> None:
    def made(id: str, width: float, energy: float) -> Outcome:
        """A prediction of IoU `width / 10`."""
        prediction = Prediction(id=id, bbox=(0.0, 0.0, width, 1.0), heads=(Head(2, 0),))
        sample = lh.Sample("cat.png", "the cat", id=id, bbox=(0.0, 0.0, 10.0, 1.0))
        return Outcome(sample, prediction, {"scores": {"heads": [[width / 10, False, energy, None]]}})

    outcomes = [
        made("half", 5, 0.0), made("fair", 4, 0.9), made("zero", 0, 0.3), made("zero_far", 0, 0.1),
        made("zero_too", 0, 0.3), made("good", 9, 0.0),
    ]  # fmt: skip
    assert [o.sample.id for o in worst_outcomes(outcomes, 9)] == ["zero_far", "zero", "zero_too", "fair"]
    assert [o.sample.id for o in worst_outcomes(outcomes, 2)] == ["zero_far", "zero"]
    assert worst_outcomes(outcomes, 0) == []


def test_drawn_boxes_are_those_that_were_scored(quick: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their forward pass is repeated without their batch, and may round differently."""
    from localization_heads import figures

    drawn: list[tuple[str, Any, Any]] = []

    def record(image: Any, grounding: Any, path: Path, *, truth: Any, expression: str) -> None:
        drawn.append((path.name, grounding, truth))

    monkeypatch.setattr(figures, "plot_grounding", record)
    write_truths()
    quick.succeed(*OPTIONS)
    rows = {row["id"]: row for row in read_rows(quick)}
    assert len(drawn) >= 3
    for name, grounding, truth in drawn:
        row = rows[name[4:-4]]
        assert list(grounding.box) == row["predicted_box"] and grounding.score == row["score"]
        assert list(truth) == row["true_box"]
        assert [str(head) for head in grounding.heads] == row["heads"]


def test_failed_entries_have_rows_with_their_errors(quick: Front) -> None:
    entries = write_truths(2)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    Image.new("L", (7, 7), 255).save("mask.png")
    good = entries[1]
    lines: list[Any] = [
        *entries,
        {**good, "id": "other_mask", "mask": "mask.png"},
        {**good, "id": "broken", "image_path": "broken.png"},
        {**good, "id": "outside", "bbox": [500, 500, 600, 600]},
        "{not json",
        {**good, "id": "bare", "bbox": None},
    ]
    write_lines(Path("data.jsonl"), lines)
    assert quick.finder(*OPTIONS).status == 1
    rows = read_rows(quick)
    names = ["entry_0", "entry_1", "other_mask", "broken", "outside", "line_6", "bare"]
    assert [row["id"] for row in rows] == names
    assert "there is nothing to score against" in rows[-1]["error"]
    assert "7 x 7" in rows[2]["error"] and "outside the image" in rows[4]["error"]
    assert all(row["error"] and row["iou"] is None for row in rows[2:])
    assert all(row["error"] is None for row in rows[:2])
    metrics = quick.json("metrics.json")
    assert (metrics["num_samples"], metrics["num_failed"]) == (2, 5)
    assert [line["id"] for line in quick.lines()] == names


def test_errors_without_any_usable_entry(quick: Front) -> None:
    """Missing images and missing boxes have errors of their own."""
    (entry,) = write_truths(1)
    gone = {**entry, "id": "gone", "image_path": "gone.png"}
    write_lines(Path("data.jsonl"), [gone, "{not json"])
    assert "no entry could be used; the first: line 1 (gone): gone.png" in quick.error(*OPTIONS, status=1)
    bare = {name: entry[name] for name in ("id", "prompt", "image_path")}
    write_lines(Path("data.jsonl"), [gone, bare])
    assert "needs entries with bbox or mask; the first: line 2 (entry_0)" in quick.error(*OPTIONS)


def test_a_link_in_place_of_the_failures_folder_is_replaced(quick: Front) -> None:
    """The target of the link is left alone."""
    write_truths(2)
    quick.out.mkdir(parents=True)
    precious = Path("precious")
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (quick.out / "failures").symlink_to(precious.resolve())
    quick.succeed(*OPTIONS)
    assert (precious / "thesis.tex").read_text() == "x"
    assert not (quick.out / "failures").is_symlink()


# -------------------------------------------------------------------------------------------- the model's box


def test_native_boxes_are_scored_as_a_control(quick: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes the true box of every other expression, and no box for the rest."""
    entries = write_truths()
    boxes = {entry["prompt"]: entry["bbox"] for entry in entries}
    asked: list[str] = []

    def answer(self: Any, form: Any, image: Any, expression: str) -> Any:
        asked.append(expression)
        x0, y0, x1, y1 = boxes[expression]
        return ((x0, y0, x1, y1), "yes") if list(boxes).index(expression) % 2 == 0 else (None, "I see none")

    monkeypatch.setattr("localization_heads.stages.evaluate.generate_box", answer)
    quick.succeed(*OPTIONS, "worst=0")
    assert not asked  # the embedded model writes no boxes
    assert "native" not in quick.json("metrics.json")["controls"]
    quick.succeed(*OPTIONS, "worst=0", "model.native_box=llava", "model.conv_mode=chat")
    assert sorted(asked) == sorted(boxes)
    metrics = quick.json("metrics.json")
    assert metrics["controls"]["native"]["acc@0.5"] == metrics["controls"]["native"]["mean_iou"] == 0.6
    assert metrics["choices"]["native"].startswith("Please provide")
    rows = read_rows(quick)
    assert [row["native_answer"] for row in rows] == ["yes", "I see none", "yes", "I see none", "yes"]
    assert rows[0]["native_box"] == entries[0]["bbox"] and rows[1]["native_box"] is None
    asked.clear()
    native = (*OPTIONS, "worst=0", "model.native_box=llava")
    quick.succeed(*native, "native=false")
    quick.succeed(*native, "controls=false")
    assert not asked
    quick.succeed(*native, "controls=false", "native=true")
    assert len(asked) == 5 and list(quick.json("metrics.json")["controls"]) == ["native"]


def test_answers_without_a_box_are_misses(quick: Front) -> None:
    """The embedded model, asked in the format of LLaVA, writes words."""
    write_truths(2)
    quick.succeed(*OPTIONS, "worst=0", "model.native_box=llava")
    assert quick.json("metrics.json")["controls"]["native"]["mean_iou"] == 0
    assert all(isinstance(row["native_answer"], str) for row in read_rows(quick))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("controls=maybe", "controls"),
        ("native=yes\\ please", "native"),
        ("native=true", "native=true: embedded is not known to write boxes"),
        ("bootstrap=word", "bootstrap"),
        ("worst=-1", "worst"),
        ("model.native_box=gpt", "model.native_box"),
    ],
)
def test_wrong_options_are_one_line(quick: Front, option: str, message: str) -> None:
    write_truths(1)
    assert message in quick.error(*OPTIONS, option)


# ------------------------------------------------------------------------------------------ no head passes


@pytest.mark.parametrize(
    ("scale", "message"),
    [((1, 1), "they look like 0 to 1, such as"), ((1000, 1000), "they look like 0 to 1000")],
)
def test_boxes_that_are_not_in_pixels_are_an_error(quick: Front, scale: tuple[int, int], message: str) -> None:
    """They would all score 0."""
    entries = write_truths(masks=False)
    for entry in entries:
        entry["bbox"] = [x / side * n for x, side, n in zip(entry["bbox"], (64, 48) * 2, scale * 2, strict=True)]
    write_lines(Path("data.jsonl"), entries)
    error = quick.error(*OPTIONS)
    assert message in error and "of 64 x 48 pixels (line 1 (entry_0))" in error


def test_no_head_passes(quick: Front, lvlm: LVLM) -> None:
    """An error for a single image, and a failed entry in a data set."""
    write_truths(2)
    no_heads = ("heads=greedy", "criteria.tau=2", "visualize_batch=false")
    single = ("image_file=image_0.png", "query=the dog")
    for stage in ("ground", "pipeline"):
        assert "no head passes the criteria" in quick.error(f"stage={stage}", *single, *no_heads)
    for stage in ("ground", "evaluate"):
        result = quick.finder(f"stage={stage}", "data_file=data.jsonl", *no_heads)
        assert result.status == 1
        assert "no head passes the criteria" in result.out
    result = quick.finder("stage=batch", "data_file=data.jsonl", *no_heads)
    assert result.status == 1, result.err
    assert result.out.count("no head passes") == 2
    lines = quick.lines()
    assert all(line["bbox"] is None and "no head passes" in line["error"] for line in lines)


def test_no_head_passes_in_the_viewer_and_from_python(
    quick: Front, lvlm: LVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localization_heads import locating
    from localization_heads.options.groups import CriteriaOptions
    from localization_heads.stages import visualize

    write_truths(1)
    monkeypatch.setattr(visualize, "heads_for_file", lambda *_: None)
    quick.succeed("stage=collect", "image_file=image_0.png", "query=the dog", "save_id=x")
    result = quick.visualize(f"attention_file={quick.out}/attention/x.pkl", "criteria.tau=2")
    assert result.status == 2
    assert "no head passes the criteria" in one_line(result.err)
    monkeypatch.setattr(LVLM, "ready", ReadyHeads())
    monkeypatch.setattr(locating, "CriteriaOptions", lambda: CriteriaOptions(tau=2.0))
    with pytest.raises(lh.errors.UsageError, match="no head passes the criteria"):
        lh.ground(lvlm, "image_0.png", "the dog")


def test_a_wrong_option_fails_the_run_and_not_every_entry(quick: Front) -> None:
    write_truths(2)
    for heads in ("heads=greedy", "heads=[2-0]"):
        option = "criteria.exclude_layers=99"
        assert option in quick.error("stage=evaluate", "data_file=data.jsonl", heads, option)
    Path("folder").mkdir()
    assert "segmenter.name=folder" in quick.error(*OPTIONS, "segmenter=sam", "segmenter.name=folder")
