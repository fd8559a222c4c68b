"""`stage=experiment` end to end: the model runs once, and experiments are computed from stored statistics and maps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Calls, Front, draw_image, stub_figures, write_data, write_lines
from PIL import Image

from localization_heads.options.experiments import EXPERIMENTS
from localization_heads.store.attention_files import load_attention

ROOT = Path(__file__).parents[1]
SCENES = ("data=scenes", "scenes.count=12", "scenes.size=128")
EXPERIMENT = ("stage=experiment", *SCENES)
EVALUATE = ("stage=evaluate", *SCENES, "grounding=paper", "visualize_batch=false", "segmenter=none")


@pytest.fixture
def quick(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Figures are empty files."""
    stub_figures(monkeypatch)
    return front


def numbers(front: Front, name: str) -> Any:
    return front.json(f"experiments/{name}.json")


def test_all_experiments_in_one_pass(front: Front, calls: Calls) -> None:
    result = front.succeed(*EXPERIMENT, "experiment=all")
    assert sum(calls.sizes) == 12
    for name in EXPERIMENTS:
        assert numbers(front, name)["samples"] == 12
        text = (front.out / "experiments" / f"{name}.md").read_text()
        assert text.startswith("## ") and "\n| " in text
        assert f"{name}.json" in result.out
    for name in ("fig3", "fig6a", "fig6b", "random", "fig13", "fig14"):
        with Image.open(front.out / "experiments" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5, name
    # Another experiment, other sweep values and other heads do not run the model again.
    front.succeed(*EXPERIMENT, "experiment=tab4", "experiment.ks=[2]", "heads=[3-1]")
    assert sum(calls.sizes) == 12
    assert [point["k"] for point in numbers(front, "tab4")["numbers"]["points"]] == [2]
    assert numbers(front, "tab4")["heads"] == [[3, 1]]


def test_numbers_equal_those_of_find_and_evaluate(quick: Front) -> None:
    quick.succeed("stage=find", *SCENES)
    ranked = quick.json("heads.json")
    top = [[head["layer"], head["head"]] for head in ranked["heads"][:3]]
    quick.succeed(*EXPERIMENT, "experiment.names=[fig3,fig6a,tab5]")
    assert numbers(quick, "fig6a")["numbers"]["top"] == top
    assert numbers(quick, "fig3")["numbers"]["tau"] == pytest.approx(ranked["tau"], abs=1e-6)
    names = ",".join(f"{layer}-{head}" for layer, head in top)
    for heads, key in ((f"heads=[{names}]", "both, fixed"), ("heads=greedy", "both, greedy")):
        quick.succeed(*EVALUATE, heads)
        metrics = quick.json("metrics.json")
        found = numbers(quick, "tab5")["numbers"][key]
        for name in ("acc@0.5", "mean_iou", "pointing", "ciou", "giou"):
            assert found[name] == pytest.approx(metrics[name], abs=1e-6), (key, name)


def test_experiments_where_no_head_passes(quick: Front) -> None:
    """Without heads on average there are none to ground with; a sample without heads of its own is not scored."""
    nothing = "criteria.tau=5"  # sums are at most 1
    message = "no head passes criterion 1 on average, so there is none to ground with: lower criteria.tau"
    for name in ("tab1", "tab2", "tab3", "tab8", "random"):
        assert message in quick.error(*EXPERIMENT, f"experiment={name}", nothing)
        quick.succeed(*EXPERIMENT, f"experiment={name}", nothing, "heads=[3-1]")
    for name in ("fig3", "fig6a", "fig6b", "tab4", "tab5", "fig13", "fig14"):
        quick.succeed(*EXPERIMENT, f"experiment={name}", nothing)
    rows = numbers(quick, "tab5")["numbers"]
    few = {name: row["samples"] for name, row in rows.items() if row["samples"] < 12}
    assert few == {"both, fixed": 0, "both, greedy": 0}
    greedy = rows["both, greedy"]
    assert greedy["acc@0.5"] is None and greedy["acc@0.5_interval"] == [None, None]
    result = quick.succeed("stage=find", *SCENES, nothing)
    assert "no head passes criterion 1 on average: heads.json lists none" in result.err


def test_greedy_leaves_out_the_entries_that_evaluate_leaves_out(quick: Front) -> None:
    """With a threshold that half of the expressions have a head above."""
    quick.succeed(*EXPERIMENT, "experiment=tab5")
    maps = [load_attention(path).attention for path in (quick.out / "attention").glob("scene_?????.pkl")]
    highest = sorted(float(one[2:].sum(axis=(2, 3)).max()) for one in maps)
    tau = f"criteria.tau={(highest[5] + highest[6]) / 2}"
    quick.succeed(*EXPERIMENT, "experiment=tab5", tau)
    found = numbers(quick, "tab5")["numbers"]["both, greedy"]
    result = quick.finder(*EVALUATE, tau, "heads=greedy")
    assert result.status == 1 and "no head passes the criteria in this sample" in result.out
    metrics = quick.json("metrics.json")
    assert found["samples"] == metrics["num_samples"] == 6 and metrics["num_failed"] == 6
    for name in ("acc@0.5", "mean_iou", "pointing", "ciou", "giou"):
        assert found[name] == pytest.approx(metrics[name], abs=1e-6), name
    text = (quick.out / "experiments/tab5.md").read_text()
    assert "| both, greedy (6 of 12) |" in text and "in which no head passes, as stage=evaluate does" in text


def test_an_interrupted_run_resumes_with_the_same_numbers(quick: Front, calls: Calls) -> None:
    whole = [*EXPERIMENT, "experiment=fig6b", "batch_size=4"]
    quick.succeed(*whole)
    expected = numbers(quick, "fig6b")
    calls.restart(fail_at=2)
    assert quick.finder(*whole, "output_dir=elsewhere").status == 130
    calls.restart()
    quick.succeed(*whole, "output_dir=elsewhere")
    assert calls.sizes == [4]
    assert json.loads(Path("elsewhere/tiny/experiments/fig6b.json").read_text()) == expected


def test_only_some_experiments_need_ground_truth(quick: Front) -> None:
    data = f"data_file={write_data(quick.folder)}"
    quick.succeed("stage=experiment", "experiment=fig3", data)
    quick.succeed("stage=experiment", "experiment=fig6a", data)
    assert "needs entries with bbox or mask" in quick.error("stage=experiment", "experiment=tab1", data)


def test_bad_entries_fail_alone(quick: Front) -> None:
    image = draw_image(quick.folder / "p.png").name
    entry = {"prompt": "the dog", "image_path": image}
    lines = [
        {**entry, "id": "good", "bbox": [0, 0, 20, 20]},
        {**entry, "id": "masked", "mask": [[5, 5, 30, 5, 30, 30]]},
        {**entry, "id": "bare"},
        {**entry, "id": "wrong_mask", "mask": {"size": [2, 2], "counts": [4]}},
        {**entry, "id": "empty_mask", "mask": {"size": [48, 64], "counts": [48 * 64]}},
        {**entry, "id": "gone", "image_path": "nowhere.png", "bbox": [0, 0, 2, 2]},
        "not json",
    ]
    data = f"data_file={write_lines(quick.folder / 'data.jsonl', lines)}"
    result = quick.finder("stage=experiment", "experiment=all", data)
    assert result.status == 1, result.err
    for id in ("bare", "wrong_mask", "empty_mask", "gone"):
        assert id in result.out
    assert numbers(quick, "tab1")["samples"] == 2
    # A missing box is the tight box of the mask.
    assert numbers(quick, "tab2")["numbers"]["ciou"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage=experiment"], "experiment= is missing: choose one of fig3, fig6a"),
        (["stage=experiment", "experiment=fig4"], "experiment=fig4: did you mean fig14? choose one of all"),
        (
            ["stage=experiment", "experiment=fig3", "heads=greedy"],
            "heads=greedy: experiments rank fixed heads",
        ),
        (["stage=experiment", "experiment=fig3", "heads=[99-0]"], "there is no L99H0"),
        (["stage=experiment", "experiment=fig3", "criteria.exclude_layers=99"], "criteria.exclude_layers=99"),
        (["stage=experiment", "experiment=ladder"], "rung= is missing"),
        (["stage=experiment", "experiment.names=[ladder,fig3]"], "the ladder is a run of its own"),
        (["stage=experiment", "experiment=tab4", "experiment.ks=[]"], "experiment.ks=[]: give a list"),
    ],
)
def test_wrong_use_is_one_line(front: Front, options: list[str], message: str) -> None:
    assert message in front.error(*options, *SCENES)


def test_the_ladder_is_one_command(tmp_path: Path) -> None:
    """A Hydra multirun in a process of its own; with wide images, on which padding matters."""
    command = [
        sys.executable, str(ROOT / "localization_heads_finder.py"), "stage=experiment", "experiment=ladder",
        "data=scenes", "scenes.count=6", "scenes.size=128", "scenes.height=88", "device=cpu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/localization_heads/tiny"
    rungs = json.loads((folder / "experiments/ladder.json").read_text())["numbers"]["rungs"]
    assert [rung["name"] for rung in rungs] == ["published", "padding", "hull", "fixed", "masks", "mask_box"]
    assert "rung=points is skipped: segmenter=grabcut" in done.stderr
    boxes = {}
    for rung in rungs:
        own = folder / "ladder" / rung["name"]
        assert rung["metrics"]["acc@0.5"] == json.loads((own / "metrics.json").read_text())["acc@0.5"]
        lines = (own / "predictions.jsonl").read_text().splitlines()
        boxes[rung["name"]] = [json.loads(line)["bbox"] for line in lines]
    assert boxes["masks"] == boxes["fixed"]
    assert len({str(found) for found in boxes.values()}) == 5
    ciou = {rung["name"]: rung["metrics"]["ciou"] for rung in rungs}
    assert ciou["masks"] == ciou["mask_box"] != ciou["fixed"]
    # The padded square of 128 rows begins 20 rows above the image of 88. The published reading squeezes it into the
    # image and counts cells in the padding, which can make its box larger but never smaller.
    for wrong, exact in zip(boxes["published"], boxes["padding"], strict=True):
        top, bottom = (value * 128 / 88 - 20 for value in wrong[1::2])
        assert wrong[0] <= exact[0] and exact[2] <= wrong[2]
        assert top <= exact[1] + 1e-6 and exact[3] <= bottom + 1e-6
        assert 0 <= exact[1] < exact[3] <= 88
    assert not list(tmp_path.glob("multirun*"))


def test_the_ladder_shows_only_rungs_on_the_same_entries(front: Front) -> None:
    ladder = ("stage=experiment", "experiment=ladder", "data=scenes", "scenes.size=128")
    front.succeed(*ladder, "scenes.count=3", "rung=hull")
    front.succeed(*ladder, "scenes.count=2", "rung=fixed")
    assert [rung["name"] for rung in numbers(front, "ladder")["numbers"]["rungs"]] == ["fixed"]
    (front.out / "ladder/hull/rung.json").write_text("[broken")
    front.succeed(*ladder, "scenes.count=2", "rung=padding")
    assert [rung["name"] for rung in numbers(front, "ladder")["numbers"]["rungs"]] == ["padding", "fixed"]


def test_wide_scenes_keep_the_object(front: Front) -> None:
    from localization_heads.data.samples import decode_mask, load_samples

    front.succeed("stage=scenes", *SCENES, "scenes.height=80")
    (data,) = Path("outputs/scenes").glob("*/scenes.jsonl")
    for sample in load_samples(data).entries:
        with Image.open(sample.image) as image:  # type: ignore[arg-type]
            assert image.size == (128, 80)
        mask = decode_mask(sample, (128, 80))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert sample.bbox == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_the_page_of_experiments_shows_every_experiment() -> None:
    """`docs/build_experiments.py` ran after the catalogue last changed, and its figures exist."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name in (*EXPERIMENTS, "ladder"):
        figure_or_table = {"random": "Against random heads", "ladder": "The ladder"}.get(name)
        title = figure_or_table or f"{name[:3].title()}. {name[3:]}:"
        assert f"\n### {title}" in page, name
    linked = set(re.findall(r"\(images/experiments/(\S+\.png)\)", page))
    assert linked == {path.name for path in (ROOT / "docs" / "images" / "experiments").glob("*")}
    assert linked
