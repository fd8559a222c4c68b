"""`stage=rank attention_files=`: heads ranked over attention files of every format, without a model."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Front, stub_figures
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.ranking import rank_heads
from localization_heads.heads.sensitivity import map_overlap
from localization_heads.stages import rank_files
from localization_heads.store.attention_files import save_attention

ROOT = Path(__file__).parents[1]
MODEL = "org/some-model"
OUT = Path("outputs/localization_heads/org--some-model")


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    stub_figures(monkeypatch)
    Path("files").mkdir()
    return front


def stack(number: int, grid: tuple[int, int] = (5, 5), heads: int = 4) -> NDArray[np.float32]:
    """Four layers; the sums differ from head to head."""
    rng = np.random.default_rng(number)
    maps = rng.random((4, heads, *grid)) ** 6
    return (maps / maps.sum((2, 3), keepdims=True) * np.linspace(0.05, 0.9, 4 * heads).reshape(4, heads, 1, 1)).astype(
        np.float32
    )  # fmt: skip


def write_ours(name: str, maps: NDArray[np.float32], image: str, query: str, model: str = MODEL) -> None:
    height, width = maps.shape[2:]
    known: dict[str, Any] = {"image_file": image, "query": query, "model": model, "id": Path(name).stem}
    known["asked"] = {"query_token": "last"}
    save_attention(AttentionMaps(maps, (0, 0, width, height), (width, height), **known), Path("files") / name)


def tensor(maps: NDArray[np.float32]) -> Any:
    import torch

    return torch.from_numpy(maps.reshape(*maps.shape[:2], 1, -1).copy())


def write_june(name: str, maps: NDArray[np.float32], image: str, query: str) -> None:
    """In the format of the published code of June 2025."""
    path = Path("files") / f"{name}.pkl"
    path.write_bytes(pickle.dumps(tensor(maps)))
    metadata = {"image_file": image, "query": query, "image_size": (50, 40)}
    path.with_name(f"{name}_metadata.pkl").write_bytes(pickle.dumps(metadata))


def write_august(name: str, maps: NDArray[np.float32], image: str, query: str) -> None:
    meta = {"image_file": image, "query": query, "image_size": (50, 40), "patch_size": maps.shape[3]}
    content = pickle.dumps({"attn": tensor(maps), "meta": meta})
    (Path("files") / f"{name}.pkl.gz").write_bytes(gzip.compress(content))


def heads_json(folder: Path = OUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "heads.json").read_text())
    return found


def test_files_of_every_format_and_grid_are_ranked_like_their_maps(front: Front) -> None:
    """Seven files of three images; the sensitivity is the mean over all pairs of an image's files."""
    maps = [stack(n, (4, 6) if n == 2 else (5, 5)) for n in range(7)]
    write_ours("a.pkl", maps[0], "one.jpg", "the dog")
    write_ours("b.safetensors", maps[1], "one.jpg", "the cat")
    write_ours("c.pkl", maps[2], "wide.jpg", "the tree")
    write_june("d", maps[3], "two.jpg", "a car")
    write_june("e", maps[4], "two.jpg", "a bus")
    write_june("f", maps[5], "two.jpg", "A car.")  # the same query: no other expression
    write_august("g", maps[6], "two.jpg", "a man")
    (Path("files") / "a_analysis.pkl").write_bytes(b"ignored")
    front.succeed("stage=rank", "attention_files=files", "top_n=3", "num_trials=2")
    statistics = [head_statistics(one) for one in maps]
    sums, entropies = (
        np.stack([getattr(one, name) for one in statistics]) for name in ("attention_sum", "spatial_entropy")
    )
    ranking = rank_heads(sums, entropies, top_n=3, num_trials=2)
    found = heads_json()
    assert (found["model"], found["num_samples"], found["top_n"]) == (MODEL, 7, 3)
    assert [[head["layer"], head["head"]] for head in found["heads"]] == [list(one.address) for one in ranking.kept]
    two = np.mean([map_overlap(maps[i], maps[j]) for i, j in ((3, 4), (3, 6), (4, 6))], axis=0)
    expected = 1 - (2 * map_overlap(maps[0], maps[1]) + 3 * two) / 5
    for head in found["heads"]:
        place = head["layer"], head["head"]
        assert head["selection_frequency"] == pytest.approx(
            next(one.selection_frequency for one in ranking.kept if one.address == place), abs=1e-6
        )
        assert head["sensitivity"] == pytest.approx(expected[place], abs=1e-5)
    front.succeed("stage=rank", "attention_files=files/*", "top_n=3", "criteria=robust")
    order = [head["sensitivity"] for head in heads_json()["heads"]]
    assert order == sorted(order, reverse=True)
    assert heads_json()["found_with"]["criteria"] == "robust"
    assert "query_token" not in heads_json()["found_with"]  # files of the published code do not say


def test_broken_files_are_reported_and_the_rest_is_ranked(front: Front) -> None:
    for n in range(3):
        write_ours(f"{n}.pkl", stack(n), f"{n}.jpg", "it")
    (Path("files") / "bad.pkl").write_bytes(b"no pickle")
    write_ours("nan.pkl", stack(3), "3.jpg", "it")
    broken = pickle.loads((Path("files") / "nan.pkl").read_bytes())
    broken["attention"][0, 0, 0, 0] = np.nan
    (Path("files") / "nan.pkl").write_bytes(pickle.dumps(broken))
    result = front.finder("stage=rank", "attention_files=files")
    assert result.status == 1
    assert "bad.pkl" in result.out
    assert "nan.pkl" in result.out
    assert heads_json()["num_samples"] == 3
    for path in Path("files").glob("[0-9].pkl"):
        path.unlink()
    assert front.finder("stage=rank", "attention_files=files").status == 1


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        ("none", [], "no attention file there"),
        ("heads", [], "4 layers of 3 heads"),
        ("model", [], "other/model"),
        ("nameless", [], "name it, as in model=llava"),
        ("named", ["model=llava"], "leave out model="),
        ("alone", ["criteria=robust"], "criteria=paper"),
        ("stage", [], "stage=rank"),
    ],
)
def test_what_cannot_be_ranked_is_one_line(front: Front, wrong: str, options: list[str], message: str) -> None:
    if wrong != "none":
        write_ours("a.pkl", stack(0), "a.jpg", "it", model="" if wrong == "nameless" else MODEL)
    if wrong in ("heads", "model"):
        other = "other/model" if wrong == "model" else MODEL
        write_ours("b.pkl", stack(1, heads=3 if wrong == "heads" else 4), "b.jpg", "it", model=other)
    stage = "find" if wrong == "stage" else "rank"
    result = front.finder(f"stage={stage}", "attention_files=files", *options)
    assert result.status == 2, result.out
    assert message in result.err
    assert not list(Path().glob("outputs/**/heads.json"))


def test_needs_neither_torch_nor_the_model(front: Front) -> None:
    for n in range(3):
        write_ours(f"{n}.safetensors" if n else "0.pkl", stack(n), "one.jpg", f"thing {n}")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from localization_heads.apps.finder import finder\n"
        "sys.argv = ['finder', 'stage=rank', 'attention_files=files', 'criteria=robust']; sys.exit(finder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert heads_json()["criteria"]["sensitivity"] == "siblings"


@pytest.mark.parametrize("place", [2, 8], ids=["while collecting", "while comparing"])
def test_an_interrupted_ranking_resumes(front: Front, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Five files, three of them of one image; the results equal those of an uninterrupted run, to the byte."""
    for n in range(5):
        write_ours(f"{n}.pkl", stack(n), "two.jpg" if n > 2 else "one.jpg", f"thing {n}")
    words = ("stage=rank", "attention_files=files", "criteria=robust", "criteria.mirrored=0")
    front.succeed(*words)
    assert heads_json()["found_with"]["query_token"] == "last"
    whole = [(OUT / name).read_bytes() for name in ("heads.json", "heads.csv")]
    loaded: list[str] = []
    load = rank_files.load_attention

    def interrupt(path: Path) -> AttentionMaps:
        if len(loaded) == place:
            raise KeyboardInterrupt
        loaded.append(path.name)
        return load(path)

    with monkeypatch.context() as patch:
        patch.setattr(rank_files, "load_attention", interrupt)
        assert front.finder(*words).status not in (0, 1, 2)
    again: list[str] = []
    monkeypatch.setattr(rank_files, "load_attention", lambda path: (again.append(path.name), load(path))[1])
    (OUT / "heads.json").unlink()
    front.succeed(*words)
    names = [f"{n}.pkl" for n in range(5)]
    assert again == ([*names[2:], *names] if place == 2 else names[3:])
    assert [(OUT / name).read_bytes() for name in ("heads.json", "heads.csv")] == whole
    assert not list(Path("outputs/localization_heads").glob(".rank*"))
