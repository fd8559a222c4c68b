"""`find` and `batch`: their files, bad input, resumed runs, and results that must not be mixed up."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import (
    EXPRESSIONS,
    Calls,
    Front,
    draw_image,
    fronts,
    one_line,
    read_lines,
    stub_figures,
    write_data,
    write_lines,
)
from PIL import Image

import localization_heads as lh
from localization_heads.data.masks import read_mask
from localization_heads.errors import UsageError
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.ranking import random_draws, rank_heads
from localization_heads.lvlm.model import LVLM
from localization_heads.store.attention_files import load_attention
from localization_heads.store.files import RunLock

ROOT = Path(__file__).parents[1]
HEAD_KEYS = [
    "layer", "head", "selection_frequency", "selection_frequency_std", "attention_sum", "spatial_entropy",
]  # fmt: skip
RANKING_FILES = {
    "heads.json", "heads.csv", "attention_sums.png", "selection_frequency.png", "head_grid.png",
}  # fmt: skip
DATA = "data_file=data.jsonl"
QUIET = (DATA, "report=false")


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Five entries in `data.jsonl`, and no figures."""
    write_data(front.folder)
    stub_figures(monkeypatch)
    return front


def heads_file(folder: Path | str) -> bytes:
    return (Path(folder) / "heads.json").read_bytes()


def listed_heads(folder: Path | str) -> list[tuple[int, int]]:
    return [(head["layer"], head["head"]) for head in json.loads(heads_file(folder))["heads"]]


def visible_files(folder: Path) -> set[str]:
    """All files but hidden ones and stored statistics."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.parent.name != "statistics"
    }


# ------------------------------------------------------------------------------------------------- the files


def test_batch_writes_what_the_contract_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lvlm: LVLM
) -> None:
    """Which files, real figures included, and the form of each."""
    write_data(tmp_path, 3, bbox=[0, 0, 32, 24])
    for front in fronts(tmp_path, monkeypatch, capsys):
        result = front.succeed("stage=batch", DATA, "visualize_limit=1", "k=2")
    per_entry = {f"attention/entry_{n}{suffix}" for n in range(3) for suffix in (".pkl", "_analysis.pkl")}
    drawn = {"attention/entry_0_visualization.png", "attention/entry_0_grounding.png"}
    assert visible_files(front.out) == per_entry | drawn | RANKING_FILES | {
        "predictions.jsonl",
        "report.html",
    }

    heads = json.loads(heads_file(front.out))
    expected = {"version": 1, "model": "embedded", "num_samples": 3, "num_trials": 5, "top_n": 3}
    assert expected.items() <= heads.items()
    assert heads["exclude_layers"] == 2
    assert isinstance(heads["tau"], float)
    assert all(list(head) == HEAD_KEYS for head in heads["heads"])
    ranks = [(-head["selection_frequency"], -head["attention_sum"]) for head in heads["heads"]]
    assert ranks == sorted(ranks)
    assert all(head["attention_sum"] >= heads["tau"] - 1e-6 for head in heads["heads"])
    assert all(2 <= head["layer"] < lvlm.num_layers for head in heads["heads"])

    table = (front.out / "heads.csv").read_text().splitlines()
    assert len(table) == 1 + lvlm.num_layers * lvlm.num_heads
    assert table[0].startswith("rank,layer,head,selection_frequency")

    known = [[4, 4], [5, 6]]
    for number, line in enumerate(front.lines()):
        assert list(line)[:6] == ["id", "bbox", "score", "mask", "heads", "error"]
        assert (line["id"], line["heads"], line["error"]) == (f"entry_{number}", known, None)
        assert [type(x) for x in line["bbox"]] == [float] * 4
        assert read_mask(line["mask"], (64, 48)).any()
        maps = load_attention(front.out / f"attention/entry_{number}.pkl")
        grounding = lh.ground(lvlm, maps.image_file, maps.query, heads=[lh.Head(*head) for head in known])
        assert line["bbox"] == pytest.approx(grounding.box)
    assert "selection frequency" in result.out
    assert "mean IoU" in result.out
    assert Image.open(front.out / "head_grid.png").width > 100


def test_find_batch_and_python_rank_the_same(front: Front, lvlm: LVLM) -> None:
    """`find` writes the same heads.json and heads.csv as `batch`, and no attention files."""
    front.succeed("stage=find", DATA, "output_dir=found")
    assert visible_files(Path("found/tiny")) == RANKING_FILES | {"report.html"}
    front.succeed("stage=batch", DATA)
    for name in ("heads.json", "heads.csv"):
        assert (front.out / name).read_bytes() == Path("found/tiny", name).read_bytes()
    ranking = lh.find_heads(lvlm, [lh.Sample(f"image_{n}.png", EXPRESSIONS[n]) for n in range(5)])
    assert [tuple(head.address) for head in ranking.kept] == listed_heads(front.out)
    assert len(ranking.pictures) == 5
    assert list(ranking.pictures) == json.loads(heads_file(front.out))["pictures"]


def test_the_batch_size_changes_only_rounding(front: Front) -> None:
    sums = []
    for size in (1, 2, 8):
        front.succeed("stage=find", *QUIET, f"batch_size={size}", f"output_dir=by_{size}")
        assert listed_heads(f"by_{size}/tiny") == listed_heads("by_1/tiny")
        sums.append([head["attention_sum"] for head in json.loads(heads_file(f"by_{size}/tiny"))["heads"]])
    assert sums[1] == pytest.approx(sums[0], abs=1e-4)
    assert sums[2] == pytest.approx(sums[0], abs=1e-4)


def test_trials_run_only_the_samples_they_draw(front: Front, calls: Calls, lvlm: LVLM) -> None:
    options = ("stage=find", *QUIET, "num_trials=3", "num_samples=2", "batch_size=1")
    front.succeed(*options)
    assert 2 <= len(calls) < 5
    ranking = json.loads(heads_file(front.out))
    assert (ranking["num_samples"], ranking["num_trials"]) == (2, 3)
    maps = [lvlm.attend(Image.open(f"image_{n}.png"), EXPRESSIONS[n]).attention for n in range(5)]
    statistics = [head_statistics(attention) for attention in maps]
    expected = rank_heads(
        np.stack([one.attention_sum for one in statistics]),
        np.stack([one.spatial_entropy for one in statistics]),
        draws=random_draws(5, 3, 2, seed=42),
        top_n=3,
        num_trials=3,
        num_samples=2,
    )
    listed = [(head["layer"], head["head"], head["selection_frequency"]) for head in ranking["heads"]]
    assert listed == [(*head.address, round(head.selection_frequency, 6)) for head in expected.kept]
    front.succeed(*options, "output_dir=again")
    assert heads_file("again/tiny") == heads_file(front.out)
    by_seed = set()
    for seed in range(4):
        front.finder(*options, f"random_seed={seed}")
        by_seed.add(heads_file(front.out))
    assert len(by_seed) > 1


def test_a_range_of_entries(front: Front, calls: Calls) -> None:
    """`start_index` counts from 0, `end_index` is excluded, -1 means the end, and bad lines count."""
    ids = []
    for start, end in ((1, 3), (3, -1), (0, 99)):  # a given range applies although process_all=true
        front.succeed("stage=batch", *QUIET, f"start_index={start}", f"end_index={end}")
        ids.append([line["id"] for line in front.lines()])
    assert ids == [["entry_1", "entry_2"], ["entry_3", "entry_4"], [f"entry_{n}" for n in range(5)]]
    assert sum(calls.sizes) >= 5
    assert "start_index=5" in front.error("stage=find", *QUIET, "process_all=false", "start_index=5")
    Path("data.jsonl").write_text("nonsense\n" + Path("data.jsonl").read_text())
    result = front.finder("stage=find", *QUIET, "process_all=false", "start_index=0", "end_index=2")
    assert result.status == 1
    assert json.loads(heads_file(front.out))["num_samples"] == 1


def test_visualize_batch_false_draws_no_figures_of_entries(front: Front) -> None:
    front.succeed("stage=batch", *QUIET, "visualize_batch=false")
    assert not list((front.out / "attention").glob("*.png"))


@pytest.mark.parametrize(("format", "files"), [("safetensors", "*.safetensors"), ("published", "*_metadata.pkl")])
def test_the_attention_format_does_not_change_the_results(format: str, files: str, front: Front) -> None:
    front.succeed("stage=batch", *QUIET, f"attention_format={format}", "output_dir=other")
    front.succeed("stage=batch", *QUIET)
    for name in ("heads.json", "predictions.jsonl"):
        assert Path("other/tiny", name).read_bytes() == (front.out / name).read_bytes()
    assert len(list(Path("other/tiny/attention").glob(files))) == 5


def test_maps_that_the_published_format_cannot_hold_fail_alone(front: Front) -> None:
    """Those of a wide image that was cropped, between two square ones."""
    for name, size in (("square.png", (64, 64)), ("wide.png", (96, 64))):
        Image.new("RGB", size).save(name)
    images = {"a": "square.png", "b": "wide.png", "c": "square.png"}
    entries = [{"id": id, "prompt": "the dog", "image_path": image} for id, image in images.items()]
    write_lines(Path("mixed.jsonl"), entries)
    crop = ("model.pad_to_square=false", "attention_format=published", "heads=[2-0]", "segmenter=none")
    for _ in range(2):  # no statistics of the failed entry are stored
        result = front.finder("stage=batch", "data_file=mixed.jsonl", "report=false", *crop)
        assert result.status == 1
        (failed,) = [line for line in front.lines() if line["error"]]
        assert failed["id"] == "b" and "attention_format=published assumes images padded" in failed["error"]
        assert json.loads(heads_file(front.out))["num_samples"] == 2
        assert sorted(path.stem for path in (front.out / "attention").glob("?.pkl")) == ["a", "c"]


# ------------------------------------------------------------------------------------------------- bad input


def write_bad_data() -> None:
    """Two good entries and every kind of bad one; lines 3 to 12 are bad."""
    Path("text.png").write_text("hello")
    Path("cut.png").write_bytes(Path("image_0.png").read_bytes()[:200])
    good = {"id": "first", "prompt": "the dog", "image_path": "image_0.png"}
    bad: list[Any] = [
        "{not json", '"a text"', {**good, "id": "../x"}, {**good, "id": "/etc/x"},
        {"id": "no_prompt", "image_path": "image_0.png"}, {**good, "id": "missing", "image_path": "no.png"},
        {**good, "id": "text", "image_path": "text.png"}, {**good, "id": "cut", "image_path": "cut.png"},
        {**good, "id": "token", "prompt": "the <s> dog"}, good,
    ]  # fmt: skip
    write_lines(Path("bad.jsonl"), [good, "", *bad, {**good, "id": "last", "prompt": "the cat"}])


@pytest.mark.parametrize(("stage", "size"), [("batch", 8), ("find", 1)])
def test_bad_entries_are_reported_and_the_rest_goes_on(front: Front, calls: Calls, stage: str, size: int) -> None:
    """Each with its line number; the ranking is that of the good entries.

    `predictions.jsonl` lists the good entries first, then the bad ones with their reasons. The next run reports the
    same without running the model.
    """
    write_bad_data()
    options = (f"stage={stage}", "data_file=bad.jsonl", f"batch_size={size}")
    result = front.finder(*options)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    report = result.out[result.out.index("Entries that failed") :]
    rows = [row.split() for row in report.splitlines() if row[:1] == "│"]
    assert [int(row[1]) for row in rows if row[1].isdecimal()] == list(range(3, 13))
    for words in ("not JSON", "path separator", "'prompt' is missing", "control token", "used on line 1"):
        assert words in report
    assert json.loads(heads_file(front.out))["num_samples"] == 2
    assert not Path("x.pkl").exists() and not Path("/etc/x.pkl").exists()
    if stage == "batch":
        predictions = (front.out / "predictions.jsonl").read_bytes()
        lines = [json.loads(line) for line in predictions.splitlines()]
        assert [line["id"] for line in lines[:2]] == ["first", "last"]
        assert [bool(line["error"]) for line in lines] == [False] * 2 + [True] * 10
        empty = (None, None, None, [])
        assert all((r["bbox"], r["score"], r["mask"], r["heads"]) == empty for r in lines[2:])
        calls.clear()
        again = front.finder(*options)
        assert (again.status, calls, "control token" in again.out) == (1, [], True)
        assert (front.out / "predictions.jsonl").read_bytes() == predictions
    good = [line for line in Path("bad.jsonl").read_text().splitlines() if line]
    write_lines(Path("good.jsonl"), [good[0], good[-1]])
    front.succeed("stage=find", "data_file=good.jsonl", f"batch_size={size}", "output_dir=good")
    assert listed_heads("good/tiny") == listed_heads(front.out)


def test_without_a_usable_entry_the_first_reason_is_the_error(front: Front) -> None:
    """Status 1 and a table of all reasons; an empty data file is wrong use."""
    write_lines(Path("bad.jsonl"), ["{", {"id": "a", "prompt": "x", "image_path": "no.png"}])
    for stage in ("batch", "find", "ground"):
        result = front.finder(f"stage={stage}", "data_file=bad.jsonl")
        assert result.status == 1
        assert "line 1: not JSON" in one_line(result.err)
        assert "no.png: no such file" in result.out[result.out.index("Entries that failed") :]
    Path("bad.jsonl").write_text("\n\n")
    assert "bad.jsonl is empty" in front.error("stage=find", "data_file=bad.jsonl")


def test_only_the_sample_that_breaks_a_batch_fails(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LVLM.attend_batch

    def picky(self: LVLM, images: Any, expressions: Any, **options: Any) -> Any:
        if "the cat" in expressions:
            raise RuntimeError("the tensor\nis too large")
        return original(self, images, expressions, **options)

    monkeypatch.setattr(LVLM, "attend_batch", picky)
    assert front.finder("stage=batch", *QUIET).status == 1
    lines = front.lines()
    assert [line["id"] for line in lines if line["error"]] == ["entry_2"]
    assert "the model cannot take it: RuntimeError: the tensor is too large" in lines[-1]["error"]
    assert len(lines) == 5


@pytest.mark.parametrize("heads", ["[99-0]", "no.json", "[x]", "[]"])
def test_wrong_heads_are_refused_before_the_model_runs(front: Front, calls: Calls, heads: str) -> None:
    assert "heads" in front.error("stage=batch", *QUIET, f"heads={heads}")
    assert not calls


def test_heads_that_ground_a_batch(front: Front) -> None:
    """Known ones, those of a file or a list, or each sample's own. The output names them; the ranking ignores them."""
    result = front.succeed("stage=batch", *QUIET)
    ranking = heads_file(front.out)
    assert heads_used(front) == {"[[4, 4], [5, 6], [5, 3]]"}
    assert "boxes below: heads L4H4 L5H6 L5H3, known for embedded" in result.out
    result = front.succeed("stage=batch", *QUIET, f"heads={front.out / 'heads.json'}")
    assert heads_used(front) == {str([list(head) for head in listed_heads(front.out)[:3]])}
    assert "as heads= says" in result.out
    front.succeed("stage=batch", *QUIET, "heads=[2-0,3-1]")
    assert heads_used(front) == {"[[2, 0], [3, 1]]"}
    front.succeed("stage=batch", *QUIET, "heads=greedy", "k=1")
    assert all(len(line["heads"]) == 1 for line in front.lines())
    assert heads_file(front.out) == ranking


def heads_used(front: Front) -> set[str]:
    return {str(line["heads"]) for line in front.lines()}


def test_a_better_heads_file_is_backed_up(front: Front) -> None:
    """One with more samples, or made under other criteria."""
    warning = front.finder("stage=find", *QUIET).err
    assert "5 samples: the order of the heads is not stable below 100" in warning
    whole, backup = heads_file(front.out), front.out / "heads_before.json"
    assert "is replaced" not in front.finder("stage=find", *QUIET).err
    assert not backup.exists()
    warning = front.finder("stage=find", *QUIET, "end_index=4").err
    assert "the previous one, from 5 samples, is kept as" in warning
    assert backup.read_bytes() == whole
    assert "is replaced" not in front.finder("stage=find", *QUIET).err, "it had fewer samples"
    assert "under other criteria" in front.finder("stage=find", *QUIET, "criteria.exclude_layers=1").err


def test_criteria_that_keep_no_head(front: Front) -> None:
    """heads.json lists none, and each sample fails for want of heads."""
    assert front.finder("stage=batch", *QUIET, "criteria.tau=2", "heads=greedy").status == 1
    assert listed_heads(front.out) == []
    lines = front.lines()
    assert len(lines) == 5 and not any(line["bbox"] for line in lines)
    assert all("no head passes the criteria" in line["error"] for line in lines)
    assert "criteria.exclude_layers=99" in front.error("stage=find", *QUIET, "criteria.exclude_layers=99")


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("stage", "fail_at"), [("batch", 0), ("batch", 2), ("find", 1)])
def test_an_interrupted_run_resumes(front: Front, calls: Calls, stage: str, fail_at: int) -> None:
    """Ctrl-C keeps the finished chunks; the others are computed later, with the same results byte for byte."""
    options = (f"stage={stage}", *QUIET, "batch_size=2")
    front.succeed(*options, "output_dir=whole")
    assert calls.sizes == [2, 2, 1]
    calls.restart(fail_at)
    assert "what was finished is kept" in front.error(*options, status=130)
    done = visible_files(front.out)
    if stage == "batch":
        assert len([name for name in done if name.endswith("_analysis.pkl")]) == 2 * fail_at
    assert "heads.json" not in done
    calls.restart()
    front.succeed(*options)
    assert calls.sizes == [2, 2, 1][fail_at:]
    for name in ("heads.json", "predictions.jsonl") if stage == "batch" else ("heads.json",):
        assert (front.out / name).read_bytes() == Path("whole/tiny", name).read_bytes()
    calls.clear()
    front.succeed(*options)
    assert calls == []


KILLER = """
import json, os, signal, sys
from pathlib import Path
import torch
from localization_heads import figures
from localization_heads.apps.finder import finder
from localization_heads.lvlm.checkpoints import loading

# The model is loaded once; every child is a fork of this process, which has not computed anything.
torch.set_num_threads(1)
model = loading.load_model(device="cpu")

def run(options, write, name):
    loading.load_model = lambda *arguments, **named: model
    for figure in figures.__all__:
        setattr(figures, figure, lambda *arguments, **named: None)
    fsync, count = os.fsync, [0]
    def counted(descriptor):
        count[0] += 1
        if count[0] == write:
            os.kill(os.getpid(), getattr(signal, name))
        fsync(descriptor)
    os.fsync = counted
    sys.argv = ["finder", "device=cpu", *options]
    os._exit(finder())

statuses = []
for folder, options, write, name in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run([*options, "output_dir=" + folder], write, name)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


MAIN_FILES = {
    "batch": ("heads.json", "predictions.jsonl", "report.html"),
    "find": ("heads.json", "report.html"),
    "evaluate": ("metrics.json", "predictions.jsonl", "report.html"),
}


def normalized_files(folder: str, stage: str) -> dict[str, str]:
    """The main files of a run, without its folder's name and the date."""
    texts = {name: Path(folder, "tiny", name).read_text() for name in MAIN_FILES[stage]}
    return {
        name: re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "now", text.replace(folder, "folder"))
        for name, text in texts.items()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_resumes(front: Front, calls: Calls) -> None:
    """kill -9, SIGTERM or Ctrl-C during a write, early and late: the next run ends with the same bytes."""
    write_data(front.folder, bbox=[8, 8, 40, 40])
    kills = [  # stage, number of the write, signal
        *(("batch", write, "SIGKILL") for write in (1, 9, 14)),
        ("find", 5, "SIGKILL"),
        *(("evaluate", 5, signal) for signal in ("SIGKILL", "SIGTERM", "SIGINT")),
        ("evaluate", 8, "SIGKILL"),
    ]
    options = [DATA, "batch_size=2", "num_threads=1", "report_samples=4"]
    jobs = [
        (f"stopped_{stage}_{write}_{signal}", [f"stage={stage}", *options], write, signal)
        for stage, write, signal in kills
    ]
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    statuses = {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": 130}
    assert json.loads(ended.stdout.splitlines()[-1]) == [statuses[job[3]] for job in jobs], ended.stderr
    whole = {}
    for stage in MAIN_FILES:
        front.succeed(f"stage={stage}", *options, f"output_dir=whole_{stage}")
        whole[stage] = normalized_files(f"whole_{stage}", stage)
    computed = []
    for (folder, its_options, _, _), (stage, _, _) in zip(jobs, kills, strict=True):
        calls.clear()
        front.succeed(*its_options, f"output_dir={folder}")
        computed.append(sum(calls.sizes))
        assert normalized_files(folder, stage) == whole[stage], folder
        assert not list(Path(folder).rglob("*.tmp")), "leftovers of the killed run"
    assert computed[0] == 5
    assert 0 < computed[1] < 5


def test_a_torn_record_costs_only_its_chunk(front: Front, calls: Calls) -> None:
    """As after a power cut in the middle of a write."""
    options = ("stage=find", *QUIET, "batch_size=2")
    front.succeed(*options)
    before = heads_file(front.out)
    (store,) = (front.out / "statistics").glob("*.bin")
    os.truncate(store, store.stat().st_size - 7)
    calls.clear()
    front.succeed(*options)
    assert calls.sizes == [1]
    assert heads_file(front.out) == before


# ------------------------------------------------------------------------------------- reused and recomputed


@pytest.mark.parametrize("stage", ["batch", "find"])
def test_an_edited_prompt_or_image_is_recomputed(front: Front, calls: Calls, stage: str) -> None:
    """Under the same id, and only its chunk."""
    options = (f"stage={stage}", *QUIET, "batch_size=1")
    front.succeed(*options)
    before = heads_file(front.out)
    entries = read_lines("data.jsonl")
    entries[1]["prompt"] = "a blue house"
    write_lines(Path("data.jsonl"), entries)
    calls.clear()
    front.succeed(*options)
    assert calls == [["a blue house"]]
    draw_image(Path("image_3.png"), 99)
    calls.clear()
    front.succeed(*options)
    assert calls == [[entries[3]["prompt"]]]
    front.succeed(*options, "output_dir=fresh")
    assert heads_file(front.out) == heads_file("fresh/tiny") != before
    for name in ("entry_1.pkl", "entry_3.pkl") if stage == "batch" else ():
        one, two = (load_attention(f / "attention" / name) for f in (front.out, Path("fresh/tiny")))
        np.testing.assert_array_equal(one.attention, two.attention)


@pytest.mark.parametrize(
    "other",
    ["criteria=published", "model.pad_to_square=false", "model.dtype=bfloat16", "model.system=Look."],
)
def test_results_of_other_options_do_not_mix(front: Front, other: str) -> None:
    """There and back again in one folder: the files are always those of a fresh folder."""
    names = ("heads.json", "predictions.jsonl", "heads.csv", "attention/entry_2.pkl")
    choices = {"plain": [], "other": [other]}
    for label, options in choices.items():
        front.succeed("stage=batch", *QUIET, *options, f"output_dir={label}")
    for label in ("plain", "other", "plain"):
        front.succeed("stage=batch", *QUIET, *choices[label])
        for name in (*names, "attention/entry_2_analysis.pkl"):
            assert (front.out / name).read_bytes() == Path(label, "tiny", name).read_bytes(), (label, name)
    assert heads_file("plain/tiny") != heads_file("other/tiny")


def test_criteria_of_the_ranking_need_no_model(front: Front, calls: Calls) -> None:
    """The stored statistics are ranked again, and the analyses on disk follow the new criteria."""
    front.succeed("stage=batch", *QUIET)
    path = front.out / "attention/entry_0_analysis.pkl"
    before = pickle.loads(path.read_bytes())
    calls.clear()
    front.succeed("stage=batch", *QUIET, "criteria.tau=0", "criteria.exclude_layers=0")
    assert calls == []
    after = pickle.loads(path.read_bytes())
    assert all(row["above_threshold"] for row in after)
    assert not all(row["above_threshold"] for row in before)


def test_damaged_or_missing_files_are_written_again(front: Front, calls: Calls) -> None:
    options = ("stage=batch", *QUIET, "batch_size=1")
    front.succeed(*options)
    before = (front.out / "attention/entry_1.pkl").read_bytes()
    (front.out / "attention/entry_1.pkl").write_bytes(before[:100])
    (front.out / "attention/entry_2_analysis.pkl").unlink()
    calls.clear()
    front.succeed(*options)
    assert calls == [[EXPRESSIONS[1]], [EXPRESSIONS[2]]]
    assert (front.out / "attention/entry_1.pkl").read_bytes() == before


@pytest.mark.parametrize("stage", ["batch", "find", "ground"])
def test_the_folder_is_locked_while_a_run_works(front: Front, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A second run is refused, the first goes on unharmed, and the lock is released."""
    original, refused = LVLM.attend_batch, []

    def try_to_lock(self: LVLM, *arguments: Any, **options: Any) -> Any:
        with pytest.raises(UsageError, match="another run is working") as caught, RunLock(front.out):
            pass
        refused.append(caught)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LVLM, "attend_batch", try_to_lock)
    front.succeed(f"stage={stage}", *QUIET, "batch_size=5")
    assert len(refused) == 1
    with RunLock(front.out):
        pass


def test_a_true_box_outside_its_image_is_reported(front: Front) -> None:
    """As x, y, width, height or in pixels of another image, it would only look like a bad model."""
    write_data(front.folder, 2)
    entries = read_lines("data.jsonl")
    entries[1] |= {"bbox": [1000.0, 1000.0, 1010.0, 1010.0]}
    write_lines(Path("data.jsonl"), entries)
    result = front.finder("stage=batch", "data_file=data.jsonl", "visualize_batch=false")
    assert result.status == 1
    assert "lies outside the image" in result.out
