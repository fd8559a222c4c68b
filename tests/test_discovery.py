"""`find` and `batch`: the same heads whatever happens on the way, and nothing computed twice."""

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
DATA = "data_file=data.jsonl"
QUIET = (DATA, "report=false")


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """Five entries in `data.jsonl`, and no figures."""
    write_data(front.folder)
    stub_figures(monkeypatch)
    return front


def heads_of(folder: Path | str) -> bytes:
    return (Path(folder) / "heads.json").read_bytes()


def visible(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.parent.name != "statistics"
    }


# ------------------------------------------------------------------------------------------------- the files


def test_batch_writes_what_the_contract_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lvlm: LVLM
) -> None:
    """With its figures; then each file's form."""
    write_data(tmp_path, 3, bbox=[0, 0, 32, 24])
    for front in fronts(tmp_path, monkeypatch, capsys):
        result = front.finder("stage=batch", DATA, "visualize_limit=1", "k=2")
    assert result.status == 0, result.err
    per_entry = {f"attention/entry_{n}{end}" for n in range(3) for end in (".pkl", "_analysis.pkl")}
    drawn = {"attention/entry_0_visualization.png", "attention/entry_0_grounding.png"}
    figures = {"attention_sums.png", "selection_frequency.png", "head_grid.png"}
    assert visible(front.out) == per_entry | drawn | figures | {
        "heads.json", "heads.csv", "predictions.jsonl", "report.html",
    }  # fmt: skip

    heads = json.loads(heads_of(front.out))
    for name, value in {
        "version": 1,
        "model": "embedded",
        "num_samples": 3,
        "num_trials": 5,
        "top_n": 3,
    }.items():
        assert heads[name] == value
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
        found = lh.ground(lvlm, maps.image_file, maps.query, heads=[lh.Head(*head) for head in known])
        assert line["bbox"] == pytest.approx(found.box)
    assert "selection frequency" in result.out
    assert "mean IoU" in result.out
    assert Image.open(front.out / "head_grid.png").width > 100


def test_find_writes_the_ranking_alone_and_agrees_with_batch_and_python(front: Front, lvlm: LVLM) -> None:
    """No attention files; the same heads.json byte for byte; the same ranking from `find_heads`."""
    front.succeed("stage=find", DATA, "output_dir=found")
    assert visible(Path("found/tiny")) == {
        "heads.json", "heads.csv", "attention_sums.png", "selection_frequency.png", "head_grid.png",
        "report.html",
    }  # fmt: skip
    front.succeed("stage=batch", DATA)
    assert heads_of("found/tiny") == heads_of(front.out)
    assert (front.out / "heads.csv").read_bytes() == Path("found/tiny/heads.csv").read_bytes()
    samples = [lh.Sample(f"image_{n}.png", EXPRESSIONS[n]) for n in range(5)]
    ranking = lh.find_heads(lvlm, samples)
    written = json.loads(heads_of(front.out))
    assert [tuple(head.address) for head in ranking.kept] == [
        (head["layer"], head["head"]) for head in written["heads"]
    ]
    assert len(ranking.pictures) == 5 and list(ranking.pictures) == written["pictures"]


def test_the_batch_size_only_rounds(front: Front) -> None:
    """The same heads in the same order; sums equal to 1e-4."""
    found = []
    for size in (1, 2, 8):
        front.succeed("stage=find", *QUIET, f"batch_size={size}", f"output_dir=by_{size}")
        found.append(json.loads(heads_of(f"by_{size}/tiny"))["heads"])
    for other in found[1:]:
        assert [(h["layer"], h["head"]) for h in other] == [(h["layer"], h["head"]) for h in found[0]]
        for one, two in zip(other, found[0], strict=True):
            assert one["attention_sum"] == pytest.approx(two["attention_sum"], abs=1e-4)


def test_trials_draw_only_what_they_need(front: Front, calls: Calls, lvlm: LVLM) -> None:
    """Three trials of two samples, as drawn; samples that no trial draws are not looked at."""
    options = ("stage=find", *QUIET, "num_trials=3", "num_samples=2", "batch_size=1")
    front.succeed(*options)
    assert 2 <= len(calls) < 5
    ranking = json.loads(heads_of(front.out))
    assert (ranking["num_samples"], ranking["num_trials"]) == (2, 3)
    draws = random_draws(5, 3, 2, seed=42)
    found = [lvlm.attend(Image.open(f"image_{n}.png"), EXPRESSIONS[n]).attention for n in range(5)]
    statistics = [head_statistics(attention) for attention in found]
    expected = rank_heads(
        np.stack([one.attention_sum for one in statistics]),
        np.stack([one.spatial_entropy for one in statistics]),
        draws=draws,
        top_n=3,
        num_trials=3,
        num_samples=2,
    )
    listed = [(head["layer"], head["head"], head["selection_frequency"]) for head in ranking["heads"]]
    assert listed == [(*head.address, round(head.selection_frequency, 6)) for head in expected.kept]
    first = heads_of(front.out)
    front.succeed(*options, "output_dir=again")
    assert heads_of("again/tiny") == first
    seeds = set()
    for seed in range(4):
        front.finder(*options, f"random_seed={seed}")
        seeds.add(heads_of(front.out))
    assert len(seeds) > 1


def test_a_range_of_entries(front: Front, calls: Calls) -> None:
    """`start_index` counts from 0, `end_index` is where it stops, -1 goes to the end; bad lines count."""
    ids = []
    for start, end in ((1, 3), (3, -1), (0, 99)):
        options = (f"start_index={start}", f"end_index={end}")  # a range that is given is meant
        front.succeed("stage=batch", *QUIET, *options)
        ids.append([line["id"] for line in front.lines()])
    assert ids == [["entry_1", "entry_2"], ["entry_3", "entry_4"], [f"entry_{n}" for n in range(5)]]
    assert sum(calls.sizes) >= 5
    assert "start_index=5" in front.error("stage=find", *QUIET, "process_all=false", "start_index=5")
    Path("data.jsonl").write_text("nonsense\n" + Path("data.jsonl").read_text())
    result = front.finder("stage=find", *QUIET, "process_all=false", "start_index=0", "end_index=2")
    assert result.status == 1
    assert json.loads(heads_of(front.out))["num_samples"] == 1


def test_visualize_batch_false_draws_no_entry(front: Front) -> None:
    front.succeed("stage=batch", *QUIET, "visualize_batch=false")
    assert not list((front.out / "attention").glob("*.png"))


@pytest.mark.parametrize("format", ["safetensors", "published"])
def test_attention_format_of_a_batch(format: str, front: Front) -> None:
    """The same heads from another format."""
    front.succeed("stage=batch", *QUIET, f"attention_format={format}", "output_dir=st")
    front.succeed("stage=batch", *QUIET)
    assert heads_of("st/tiny") == heads_of(front.out)
    assert Path("st/tiny/predictions.jsonl").read_bytes() == (front.out / "predictions.jsonl").read_bytes()
    ending = "*_metadata.pkl" if format == "published" else "*.safetensors"
    assert len(list(Path("st/tiny/attention").glob(ending))) == 5


def test_a_map_that_the_published_format_has_no_place_for_fails_alone(front: Front) -> None:
    """A wide image whose middle was cut out, between two square ones: named, and the others go on."""
    for name, size in (("square.png", (64, 64)), ("wide.png", (96, 64))):
        Image.new("RGB", size).save(name)
    entries = zip("abc", ("square.png", "wide.png", "square.png"), strict=True)
    write_lines(
        Path("mixed.jsonl"), [{"id": id, "prompt": "the dog", "image_path": image} for id, image in entries]
    )
    crop = ("model.pad_to_square=false", "attention_format=published", "heads=[2-0]", "segmenter=none")
    for _ in range(2):  # the statistics of the failed one are not kept
        result = front.finder("stage=batch", "data_file=mixed.jsonl", "report=false", *crop)
        assert result.status == 1
        (failed,) = [line for line in read_lines(front.out / "predictions.jsonl") if line["error"]]
        assert failed["id"] == "b" and "attention_format=published takes every image as" in failed["error"]
        assert json.loads(heads_of(front.out))["num_samples"] == 2
        assert sorted(path.stem for path in (front.out / "attention").glob("?.pkl")) == ["a", "c"]


# ------------------------------------------------------------------------------------------------- bad input


def bad_data(front: Front) -> None:
    """Two good entries among every kind of bad one; lines 3 to 12 are bad."""
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
def test_bad_entries_are_reported_and_the_rest_goes_on(
    front: Front, calls: Calls, stage: str, size: int
) -> None:
    """Every one with its line; status 1; the heads are those of the good ones alone.

    In predictions.jsonl the good ones come first, then every bad one with its reason; the next run reports the
    same, without the model.
    """
    bad_data(front)
    options = (f"stage={stage}", "data_file=bad.jsonl", f"batch_size={size}")
    result = front.finder(*options)
    assert result.status == 1, result.err
    assert "Traceback" not in result.err
    report = result.out[result.out.index("Entries that failed") :]
    lines = [
        int(row.split()[1]) for row in report.splitlines() if row[:1] == "│" and row.split()[1].isdecimal()
    ]
    assert lines == list(range(3, 13))
    for words in ("not JSON", "path separator", "'prompt' is missing", "control token", "line 1 already"):
        assert words in report
    assert json.loads(heads_of(front.out))["num_samples"] == 2
    assert not Path("x.pkl").exists() and not Path("/etc/x.pkl").exists()
    if stage == "batch":
        predictions = (front.out / "predictions.jsonl").read_bytes()
        rows = [json.loads(line) for line in predictions.splitlines()]
        assert [row["id"] for row in rows[:2]] == ["first", "last"] and not any(r["error"] for r in rows[:2])
        assert len(rows) == 12 and all(row["error"] for row in rows[2:])
        empty = (None, None, None, [])
        assert all((r["bbox"], r["score"], r["mask"], r["heads"]) == empty for r in rows[2:])
        calls.clear()
        again = front.finder(*options)
        assert (again.status, calls, "control token" in again.out) == (1, [], True)
        assert (front.out / "predictions.jsonl").read_bytes() == predictions
    good = [line for line in Path("bad.jsonl").read_text().splitlines() if line]
    write_lines(Path("good.jsonl"), [good[0], good[-1]])
    of_good = ("stage=find", "data_file=good.jsonl", f"batch_size={size}", "output_dir=good")
    front.succeed(*of_good)
    one, two = (json.loads(heads_of(folder))["heads"] for folder in ("good/tiny", front.out))
    assert [(head["layer"], head["head"]) for head in one] == [(head["layer"], head["head"]) for head in two]


def test_where_nothing_is_usable_the_first_reason_is_the_error(front: Front) -> None:
    """Status 1, the first reason and a table of all; an empty file is wrong use."""
    write_lines(Path("bad.jsonl"), ["{", {"id": "a", "prompt": "x", "image_path": "no.png"}])
    for stage in ("batch", "find", "ground"):
        result = front.finder(f"stage={stage}", "data_file=bad.jsonl")
        assert result.status == 1
        assert "line 1: not JSON" in one_line(result.err)
        assert "no.png: no such file" in result.out[result.out.index("Entries that failed") :]
    Path("bad.jsonl").write_text("\n\n")
    assert "bad.jsonl is empty" in front.error("stage=find", "data_file=bad.jsonl")


def test_only_the_culprit_of_a_batch_fails(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot take one sample takes the others of its chunk."""
    original = LVLM.attend_batch

    def picky(self: LVLM, images: Any, expressions: Any, **options: Any) -> Any:
        if "the cat" in expressions:
            raise RuntimeError("the tensor\nis too large")
        return original(self, images, expressions, **options)

    monkeypatch.setattr(LVLM, "attend_batch", picky)
    result = front.finder("stage=batch", *QUIET)
    assert result.status == 1
    lines = front.lines()
    assert [line["id"] for line in lines if line["error"]] == ["entry_2"]
    assert "the model cannot take it: RuntimeError: the tensor is too large" in lines[-1]["error"]
    assert len(lines) == 5


@pytest.mark.parametrize("heads", ["[99-0]", "no.json", "[x]", "[]"])
def test_wrong_heads_are_refused_before_the_work(front: Front, calls: Calls, heads: str) -> None:
    assert "heads" in front.error("stage=batch", *QUIET, f"heads={heads}")
    assert not calls


def test_known_heads_ground_a_batch(front: Front) -> None:
    """Where some are known for the model; the line above the boxes says whose they are."""
    result = front.finder("stage=batch", *QUIET)
    used = {str(line["heads"]) for line in front.lines()}
    assert used == {"[[4, 4], [5, 6], [5, 3]]"}
    assert "boxes below: heads L4H4 L5H6 L5H3, known for embedded" in result.out
    result = front.finder("stage=batch", *QUIET, f"heads={front.out / 'heads.json'}")
    first = [[one["layer"], one["head"]] for one in json.loads(heads_of(front.out))["heads"][:3]]
    assert {str(line["heads"]) for line in front.lines()} == {str(first)}
    assert "as heads= says" in result.out


def test_a_lesser_ranking_does_not_take_the_place_of_a_better_one_unsaid(front: Front) -> None:
    """Fewer samples, or other criteria: the one before stays beside it."""
    assert (
        "5 samples: the order of the heads is not stable below 100" in front.finder("stage=find", *QUIET).err
    )
    whole = heads_of(front.out)
    assert "is replaced" not in front.finder("stage=find", *QUIET).err
    assert not (front.out / "heads_before.json").exists()
    result = front.finder("stage=find", *QUIET, "end_index=4")
    assert "the previous one, from 5 samples, is kept as" in result.err
    assert (front.out / "heads_before.json").read_bytes() == whole
    assert "is replaced" not in front.finder("stage=find", *QUIET).err, "more samples are no loss"
    assert "under other criteria" in front.finder("stage=find", *QUIET, "criteria.exclude_layers=1").err


def test_named_heads_ground_a_batch(front: Front) -> None:
    """A list, and each sample's own; the ranking does not depend on them."""
    front.succeed("stage=batch", *QUIET, "heads=[2-0,3-1]")
    ranking = heads_of(front.out)
    assert {str(line["heads"]) for line in front.lines()} == {"[[2, 0], [3, 1]]"}
    front.succeed("stage=batch", *QUIET, "heads=greedy", "k=1")
    assert all(len(line["heads"]) == 1 for line in front.lines())
    assert heads_of(front.out) == ranking


def test_a_criterion_that_keeps_no_head(front: Front) -> None:
    """heads.json is empty, no sample gets a box of heads that nobody chose, and nothing breaks."""
    result = front.finder("stage=batch", *QUIET, "criteria.tau=2", "heads=greedy")
    assert result.status == 1, result.err
    assert json.loads(heads_of(front.out))["heads"] == []
    lines = front.lines()
    assert lines and not any(line["bbox"] for line in lines)
    assert all("no head passes the criteria" in line["error"] for line in lines)
    assert "criteria.exclude_layers=99" in front.error("stage=find", *QUIET, "criteria.exclude_layers=99")


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("stage", "fail_at"), [("batch", 0), ("batch", 2), ("find", 1)])
def test_interrupted_and_resumed(front: Front, calls: Calls, stage: str, fail_at: int) -> None:
    """Ctrl-C keeps the finished chunks; only the others are computed; heads.json is the same byte for byte."""
    options = (f"stage={stage}", *QUIET, "batch_size=2")
    front.succeed(*options, "output_dir=whole")
    assert calls.sizes == [2, 2, 1]
    calls.restart(fail_at)
    assert "what was finished is kept" in front.error(*options, status=130)
    done = visible(front.out)
    if stage == "batch":
        assert len([name for name in done if name.endswith("_analysis.pkl")]) == 2 * fail_at
    assert "heads.json" not in done
    calls.restart()
    front.succeed(*options)
    assert calls.sizes == [2, 2, 1][fail_at:]
    assert heads_of(front.out) == heads_of("whole/tiny")
    if stage == "batch":
        whole = Path("whole/tiny/predictions.jsonl").read_bytes()
        assert (front.out / "predictions.jsonl").read_bytes() == whole
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

# Imported and loaded once; every child below is a copy of this process, which has not computed anything.
torch.set_num_threads(1)
loaded = loading.load_model(device="cpu")

def run(options, moment, sent):
    loading.load_model = lambda *arguments, **named: loaded
    for name in figures.__all__:
        setattr(figures, name, lambda *arguments, **named: None)
    fsync, count = os.fsync, [0]
    def counted(descriptor):
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), getattr(signal, sent))
        fsync(descriptor)
    os.fsync = counted
    sys.argv = ["finder", "device=cpu", *options]
    os._exit(finder())

statuses = []
for folder, options, moment, sent in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run([*options, "output_dir=" + folder], moment, sent)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


WRITTEN = {
    "batch": ("heads.json", "predictions.jsonl", "report.html"),
    "find": ("heads.json", "report.html"),
    "evaluate": ("metrics.json", "predictions.jsonl", "report.html"),
}


def written(folder: str, stage: str) -> dict[str, str]:
    """What a run leaves for people, but for its folder's name and the minute."""
    texts = {name: Path(folder, "tiny", name).read_text() for name in WRITTEN[stage]}
    return {
        name: re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "now", text.replace(folder, "folder"))
        for name, text in texts.items()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_stopped_at_any_moment_and_resumed(front: Front, calls: Calls) -> None:
    """kill -9, SIGTERM or Ctrl-C in the middle of a write, early and late: the next run ends with the same bytes."""
    write_data(front.folder, bbox=[8, 8, 40, 40])
    moments = [
        *(("batch", moment, "SIGKILL") for moment in (1, 9, 14)),
        ("find", 5, "SIGKILL"),
        *(("evaluate", 5, sent) for sent in ("SIGKILL", "SIGTERM", "SIGINT")),
        ("evaluate", 8, "SIGKILL"),
    ]
    options = [DATA, "batch_size=2", "num_threads=1", "report_samples=4"]
    jobs = [
        (f"stopped_{stage}_{moment}_{sent}", [f"stage={stage}", *options], moment, sent)
        for stage, moment, sent in moments
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
    for stage in WRITTEN:
        front.succeed(f"stage={stage}", *options, f"output_dir=whole_{stage}")
        whole[stage] = written(f"whole_{stage}", stage)
    computed = []
    for (folder, its_options, _, _), (stage, _, _) in zip(jobs, moments, strict=True):
        calls.clear()
        front.succeed(*its_options, f"output_dir={folder}")
        computed.append(sum(calls.sizes))
        assert written(folder, stage) == whole[stage], folder
        assert not list(Path(folder).rglob("*.tmp")), "leftovers of the killed run"
    assert computed[0] == 5
    assert 0 < computed[1] < 5


def test_a_torn_record_is_made_again(front: Front, calls: Calls) -> None:
    """A write that a power cut left half done costs its chunk and nothing else."""
    options = ("stage=find", *QUIET, "batch_size=2")
    front.succeed(*options)
    before = heads_of(front.out)
    (store,) = (front.out / "statistics").glob("*.bin")
    os.truncate(store, store.stat().st_size - 7)
    calls.clear()
    front.succeed(*options)
    assert calls.sizes == [1]
    assert heads_of(front.out) == before


# ------------------------------------------------------------------------------------------ what must not mix


@pytest.mark.parametrize("stage", ["batch", "find"])
def test_an_edited_prompt_or_image_is_recomputed(front: Front, calls: Calls, stage: str) -> None:
    """Under the same id; only the chunk of the edited entry."""
    options = (f"stage={stage}", *QUIET, "batch_size=1")
    front.succeed(*options)
    before = heads_of(front.out)
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
    assert heads_of(front.out) == heads_of("fresh/tiny") != before
    if stage == "batch":
        for name in ("entry_1.pkl", "entry_3.pkl"):
            one, two = (
                load_attention(folder / "attention" / name) for folder in (front.out, Path("fresh/tiny"))
            )
            np.testing.assert_array_equal(one.attention, two.attention)


@pytest.mark.parametrize(
    "other",
    ["criteria=published", "model.pad_to_square=false", "model.dtype=bfloat16", "model.system=Look."],
)
def test_other_options_do_not_mix(front: Front, other: str) -> None:
    """There and back again in one folder: each time the files are those of a fresh folder."""
    names = ("heads.json", "predictions.jsonl", "heads.csv", "attention/entry_2.pkl")
    fresh = {}
    for label, options in (("plain", []), ("other", [other])):
        front.succeed("stage=batch", *QUIET, *options, f"output_dir={label}")
        fresh[label] = Path(label) / "tiny"
    for label, options in (("plain", []), ("other", [other]), ("plain", [])):
        front.succeed("stage=batch", *QUIET, *options)
        for name in (*names, "attention/entry_2_analysis.pkl"):
            assert (front.out / name).read_bytes() == (fresh[label] / name).read_bytes(), (label, name)
    assert heads_of(fresh["plain"]) != heads_of(fresh["other"])


def test_criteria_that_only_rank_reuse_the_statistics(front: Front, calls: Calls) -> None:
    """Another elbow needs no model; the analyses on disk follow all the same."""
    front.succeed("stage=batch", *QUIET)
    path = front.out / "attention/entry_0_analysis.pkl"
    before = pickle.loads(path.read_bytes())
    calls.clear()
    front.succeed("stage=batch", *QUIET, "criteria.tau=0", "criteria.exclude_layers=0")
    assert calls == []
    after = pickle.loads(path.read_bytes())
    assert all(row["above_threshold"] for row in after)
    assert not all(row["above_threshold"] for row in before)


def test_a_damaged_attention_file_is_made_again(front: Front, calls: Calls) -> None:
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
def test_the_folder_is_locked_during_the_work(
    front: Front, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A second run is refused where it counts, and the first one goes on unharmed."""
    original, refused = LVLM.attend_batch, []

    def meanwhile(self: LVLM, *arguments: Any, **options: Any) -> Any:
        with pytest.raises(UsageError, match="another run is working") as caught, RunLock(front.out):
            pass
        refused.append(caught)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LVLM, "attend_batch", meanwhile)
    front.succeed(f"stage={stage}", *QUIET, "batch_size=5")
    assert len(refused) == 1
    with RunLock(front.out):
        pass


def test_a_true_box_outside_its_image_is_reported(front: Front) -> None:
    """Boxes written as x, y, width, height or in another image's pixels would only look like a bad model."""
    write_data(front.folder, 2)
    entries = read_lines("data.jsonl")
    entries[1] |= {"bbox": [1000.0, 1000.0, 1010.0, 1010.0]}
    write_lines(Path("data.jsonl"), entries)
    result = front.finder("stage=batch", "data_file=data.jsonl", "visualize_batch=false")
    assert result.status == 1
    assert "lies outside the image" in result.out
