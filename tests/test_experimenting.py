"""`stage=experiment` end to end: the model runs once, everything else follows from what it left on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Calls, Front, draw_image, one_line, stub_figures, write_data, write_lines
from PIL import Image

from localization_heads.options.experiments import EXPERIMENTS
from localization_heads.store.attention_files import load_attention

ROOT = Path(__file__).parents[1]
SCENES = ("data=scenes", "scenes.count=12", "scenes.size=128")
EXPERIMENT = ("stage=experiment", *SCENES)
EVALUATE = ("stage=evaluate", *SCENES, "grounding=paper", "visualize_batch=false", "segmenter=none")


def numbers(front: Front, name: str) -> Any:
    return front.json(f"experiments/{name}.json")


def test_all_experiments_in_one_pass(front: Front, calls: Calls) -> None:
    result = front.finder(*EXPERIMENT, "experiment=all")
    assert result.status == 0, result.err
    assert sum(calls.sizes) == 12
    for name in EXPERIMENTS:
        assert numbers(front, name)["samples"] == 12
        text = (front.out / "experiments" / f"{name}.md").read_text()
        assert text.startswith("## ") and "\n| " in text
        assert f"{name}.json" in result.out
    for name in ("fig3", "fig6a", "fig6b", "random", "fig13", "fig14"):
        with Image.open(front.out / "experiments" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5, name
    # Another experiment, other values to sweep over, other heads: the model is not run again.
    again = front.finder(*EXPERIMENT, "experiment=tab4", "experiment.ks=[2]", "heads=[3-1]")
    assert again.status == 0 and sum(calls.sizes) == 12
    assert [point["k"] for point in numbers(front, "tab4")["numbers"]["points"]] == [2]
    assert numbers(front, "tab4")["heads"] == [[3, 1]]


def test_the_numbers_are_those_of_the_other_stages(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads as `find` ranks them, scores as `evaluate` has them."""
    stub_figures(monkeypatch)
    assert front.finder("stage=find", *SCENES).status == 0
    ranked = front.json("heads.json")
    top = [[head["layer"], head["head"]] for head in ranked["heads"][:3]]
    assert front.finder(*EXPERIMENT, "experiment.names=[fig3,fig6a,tab5]").status == 0
    assert numbers(front, "fig6a")["numbers"]["top"] == top
    assert numbers(front, "fig3")["numbers"]["tau"] == pytest.approx(ranked["tau"], abs=1e-6)
    names = ",".join(f"{layer}-{head}" for layer, head in top)
    for heads, key in ((f"heads=[{names}]", "both, fixed"), ("heads=greedy", "both, greedy")):
        assert front.finder(*EVALUATE, heads).status == 0
        metrics = front.json("metrics.json")
        found = numbers(front, "tab5")["numbers"][key]
        for name in ("acc@0.5", "mean_iou", "pointing", "ciou", "giou"):
            assert found[name] == pytest.approx(metrics[name], abs=1e-6), (key, name)


def test_where_no_head_passes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule: no heads on average are no heads, and a sample without heads of its own is not scored."""
    stub_figures(monkeypatch)
    nothing = "criteria.tau=5"  # sums are at most 1
    said = (
        "no head passes criterion 1 on average, so there is none to ground with: lower criteria.tau, or name"
    )
    for name in ("tab1", "tab2", "tab3", "tab8", "random"):
        result = front.finder(*EXPERIMENT, f"experiment={name}", nothing)
        assert result.status == 2 and said in one_line(result.err), (name, result.err)
        assert front.finder(*EXPERIMENT, f"experiment={name}", nothing, "heads=[3-1]").status == 0, name
    for name in ("fig3", "fig6a", "fig6b", "tab4", "tab5", "fig13", "fig14"):
        result = front.finder(*EXPERIMENT, f"experiment={name}", nothing)
        assert result.status == 0, (name, result.err)
    rows = numbers(front, "tab5")["numbers"]
    few = {name: row["samples"] for name, row in rows.items() if row["samples"] < 12}
    assert few == {"both, fixed": 0, "both, greedy": 0}
    greedy = rows["both, greedy"]
    assert greedy["acc@0.5"] is None and greedy["acc@0.5_interval"] == [None, None]
    result = front.finder("stage=find", *SCENES, nothing)
    assert result.status == 0 and "no head passes criterion 1 on average: heads.json lists none" in result.err


def test_greedy_scores_the_entries_that_evaluate_keeps(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that some expressions have heads above, and others not."""
    stub_figures(monkeypatch)
    assert front.finder(*EXPERIMENT, "experiment=tab5").status == 0
    maps = [load_attention(path).attention for path in (front.out / "attention").glob("scene_?????.pkl")]
    highest = sorted(float(one[2:].sum(axis=(2, 3)).max()) for one in maps)
    tau = f"criteria.tau={(highest[5] + highest[6]) / 2}"
    assert front.finder(*EXPERIMENT, "experiment=tab5", tau).status == 0
    found = numbers(front, "tab5")["numbers"]["both, greedy"]
    result = front.finder(*EVALUATE, tau, "heads=greedy")
    assert result.status == 1 and "no head passes the criteria in this sample" in result.out
    metrics = front.json("metrics.json")
    assert found["samples"] == metrics["num_samples"] == 6 and metrics["num_failed"] == 6
    for name in ("acc@0.5", "mean_iou", "pointing", "ciou", "giou"):
        assert found[name] == pytest.approx(metrics[name], abs=1e-6), name
    text = (front.out / "experiments/tab5.md").read_text()
    assert "| both, greedy (6 of 12) |" in text and "in which no head passes, as stage=evaluate does" in text


def test_a_killed_run_goes_on(front: Front, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, and without the samples that were done."""
    stub_figures(monkeypatch)
    whole = [*EXPERIMENT, "experiment=fig6b", "batch_size=4"]
    assert front.finder(*whole).status == 0
    expected = numbers(front, "fig6b")
    calls.restart(fail_at=2)
    assert front.finder(*whole, "output_dir=elsewhere").status == 130
    calls.restart()
    assert front.finder(*whole, "output_dir=elsewhere").status == 0
    assert calls.sizes == [4]
    assert json.loads(Path("elsewhere/tiny/experiments/fig6b.json").read_text()) == expected


def test_entries_without_truth(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no label works without any; what needs one says so."""
    stub_figures(monkeypatch)
    data = f"data_file={write_data(front.folder)}"
    assert front.finder("stage=experiment", "experiment=fig3", data).status == 0
    assert front.finder("stage=experiment", "experiment=fig6a", data).status == 0
    result = front.finder("stage=experiment", "experiment=tab1", data)
    assert result.status == 2 and "needs entries with bbox or mask" in one_line(result.err)


def test_bad_entries_are_put_aside(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)
    image = draw_image(front.folder / "p.png").name
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
    data = f"data_file={write_lines(front.folder / 'data.jsonl', lines)}"
    result = front.finder("stage=experiment", "experiment=all", data)
    assert result.status == 1, result.err
    for id in ("bare", "wrong_mask", "empty_mask", "gone"):
        assert id in result.out
    assert numbers(front, "tab1")["samples"] == 2
    # The tight box of the mask stands for the box that is missing.
    assert numbers(front, "tab2")["numbers"]["ciou"] is not None


@pytest.mark.parametrize(
    ("options", "said"),
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
def test_wrong_use_is_one_line(front: Front, options: list[str], said: str) -> None:
    result = front.finder(*options, *SCENES)
    assert result.status == 2
    assert said in one_line(result.err)


def test_the_ladder_is_one_command(tmp_path: Path) -> None:
    """A Hydra multirun, in a process of its own as a user starts it; a wide image shows what padding does."""
    command = [
        sys.executable, str(ROOT / "localization_heads_finder.py"), "stage=experiment", "experiment=ladder",
        "data=scenes", "scenes.count=6", "scenes.size=128", "scenes.height=88", "device=cpu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/localization_heads/tiny"
    rungs = json.loads((folder / "experiments/ladder.json").read_text())["numbers"]["rungs"]
    assert [rung["name"] for rung in rungs] == ["published", "padding", "hull", "fixed", "masks", "mask_box"]
    assert "rung=points is left out: segmenter=grabcut" in done.stderr
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
    # The square's 128 rows begin 20 above the image's 88; taken as the image's own they are squeezed. Cells in the
    # padding, which only the wrong reading counts, can make its box larger, never smaller.
    for wrong, exact in zip(boxes["published"], boxes["padding"], strict=True):
        top, bottom = (value * 128 / 88 - 20 for value in wrong[1::2])
        assert wrong[0] <= exact[0] and exact[2] <= wrong[2]
        assert top <= exact[1] + 1e-6 and exact[3] <= bottom + 1e-6
        assert 0 <= exact[1] < exact[3] <= 88
    assert not list(tmp_path.glob("multirun*"))


def test_a_ladder_shows_the_rungs_of_the_same_entries_only(front: Front) -> None:
    ladder = ("stage=experiment", "experiment=ladder", "data=scenes", "scenes.size=128")
    assert front.finder(*ladder, "scenes.count=3", "rung=hull").status == 0
    assert front.finder(*ladder, "scenes.count=2", "rung=fixed").status == 0
    assert [rung["name"] for rung in numbers(front, "ladder")["numbers"]["rungs"]] == ["fixed"]
    (front.out / "ladder/hull/rung.json").write_text("[broken")
    assert front.finder(*ladder, "scenes.count=2", "rung=padding").status == 0
    assert [rung["name"] for rung in numbers(front, "ladder")["numbers"]["rungs"]] == ["padding", "fixed"]


def test_wide_scenes_keep_the_object(front: Front) -> None:
    from localization_heads.data.samples import decode_mask, load_samples

    assert front.finder("stage=scenes", *SCENES, "scenes.height=80").status == 0
    (data,) = Path("outputs/scenes").glob("*/scenes.jsonl")
    for sample in load_samples(data).entries:
        with Image.open(sample.image) as image:  # type: ignore[arg-type]
            assert image.size == (128, 80)
        mask = decode_mask(sample, (128, 80))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert sample.bbox == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_the_page_of_experiments_shows_every_one() -> None:
    """`docs/build_experiments.py` made it after the catalogue was last changed, and its figures are there."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name in (*EXPERIMENTS, "ladder"):
        figure_or_table = {"random": "Against random heads", "ladder": "The ladder"}.get(name)
        title = figure_or_table or f"{name[:3].title()}. {name[3:]}:"
        assert f"\n### {title}" in page, name
    linked = set(re.findall(r"\(images/experiments/(\S+\.png)\)", page))
    assert linked == {path.name for path in (ROOT / "docs" / "images" / "experiments").glob("*")}
    assert linked
