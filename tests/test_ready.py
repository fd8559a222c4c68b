"""Ready lists: their files, when heads=auto takes one, what is said of it, and how many a ranking finds again."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from front import Front
from PIL import Image
from tiny_models import save_llava

import localization_heads as lh
from localization_heads.errors import UsageError
from localization_heads.heads import ready
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.ready import ReadyList, choose_ready, ready_list, ready_lists, shared_heads
from localization_heads.lvlm.checkpoints.spec import KNOWN_SHAPES, known_specs
from localization_heads.options.compose import compose_options
from localization_heads.stages.run import ChatRun, Run

PAPER = (Head(14, 24), Head(14, 13), Head(14, 26))
LAYERS_AND_HEADS = {
    "qwen2_5-vl": (28, 28), "qwen3-vl": (36, 32), "internvl": (28, 28), "internvl3_5": (36, 32),
    **{stem: shape[1:3] for stem, shape in KNOWN_SHAPES.items()},
}  # fmt: skip
"""Of the language models: Qwen2.5-7B, Qwen3-8B; the others as `KNOWN_SHAPES` has them."""


def test_every_list_is_of_a_model_and_sound() -> None:
    used = {name: stem for stem, spec in known_specs().items() for name in spec.lists}
    assert set(used) == set(ready_lists())
    for name, one in ready_lists().items():
        layers, heads = LAYERS_AND_HEADS[used[name]]
        assert find_duplicate(one.heads) is None and one.source and one.model
        assert all(head.layer < layers and head.head < heads for head in one.heads)
        assert one.counts in ((), tuple(sorted(one.counts, reverse=True)))
        assert not one.counts or len(one.counts) == len(one.heads)
        assert one.conv_mode in ("referseg", "native_box") and one.query_token in ("last", "answer_span")
    for spec in known_specs().values():
        assert not spec.heads or ready_list(spec.lists[0]).heads == spec.heads


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "find-heads.md").read_text(encoding="utf-8")
    for name, one in ready_lists().items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {len(one.heads)} |" in row
        told = {"native_box": ("model's own", "the same"), "referseg": ("`referseg`",)}[one.conv_mode]
        assert any(word in row for word in told)


def test_lists_as_their_sources_have_them() -> None:
    assert ready_list("paper-llava").heads == PAPER
    fork = ready_list("fork-llava")
    assert (fork.heads[:2], fork.counts[:2]) == ((Head(14, 24), Head(14, 26)), (571, 406))
    assert fork.counts[fork.heads.index(Head(14, 13))] == 89 and sum(fork.counts) == 5000
    visual = {name: one for name, one in ready_lists().items() if name.startswith("vrh-")}
    assert {name: (str(one.heads[0]), len(one.heads)) for name, one in visual.items()} == {
        "vrh-qwen2_5-vl": ("L19H17", 20),
        "vrh-qwen3-vl": ("L20H15", 20),
        "vrh-internvl": ("L16H20", 20),
        "vrh-internvl3_5": ("L21H11", 20),
    }
    # models of one language model share most of them, others none or one
    for one, other in permutations(visual.values(), 2):
        shared = len(set(one.heads) & set(other.heads))
        assert shared >= 15 if one.language_model == other.language_model else shared <= 1


def test_a_list_is_taken_with_its_prompt_and_query_token_alone() -> None:
    names = ("paper-llava", "fork-llava")
    found = choose_ready(PAPER, names, "referseg", "last")
    assert (found.heads, found.of, found.advice) == (PAPER, ready_list("paper-llava"), "")
    assert choose_ready(PAPER, names, "referseg", "last_and_answer").heads == PAPER  # read as of `last`
    assert choose_ready(PAPER, names, None, "last").heads == PAPER
    for asked, said in (
        (("chat", "last"), "found with conv_mode=referseg (here: chat)"),
        (("referseg", "answer_mean"), "found with query_token=last (here: answer_mean)"),
    ):
        refused = choose_ready(PAPER, names, *asked)
        assert refused.heads == () and len(refused.why_not) == 2 and said in refused.advice
        assert refused.advice.endswith("or take it all the same with heads=paper-llava")
    own = (Head(3, 1),)
    assert choose_ready(own, names, "chat", "last").heads == own  # the user's own, of which nothing is known
    assert choose_ready((), (), "chat", "last") == ready.ReadyHeads()
    with pytest.raises(
        UsageError, match="there is no ready list of heads named paper_llava; did you mean paper-llava"
    ):
        choose_ready((), ("paper_llava",), "chat", "last")


def run_of(*words: str) -> Run:
    return Run(
        compose_options("finder", *words),
        next((w[6:] for w in words if w.startswith("model=")), "tiny"),
        words,
    )


def test_options_choose_lists() -> None:
    assert run_of("model=llava").named_heads == PAPER
    assert run_of("model=llava").heads_from == "paper-llava (the paper, arXiv 2503.06287, Fig. 6a)"
    assert run_of("model=llava", "model.name=/a/folder").named_heads == PAPER
    assert run_of("model=llava", "conv_mode=chat").named_heads is None
    fork = run_of("model=llava", "heads=fork-llava", "k=2")
    assert fork.named_heads == (Head(14, 24), Head(14, 26)) and str(fork.heads_from).startswith(
        "fork-llava (a commun"
    )
    qwen = run_of("model=qwen3-vl")
    assert qwen.named_heads is None and qwen.heads_from is None
    assert "vrh-qwen3-vl (Retrieval Heads Meet Vision" in qwen.ready_heads.advice
    assert (
        "found with query_token=answer_span answer_span=box (here: query_token=last)"
        in qwen.ready_heads.advice
    )
    boxes = run_of("model=qwen3-vl", "query_token=answer_span", "answer_span=box", "k=4")
    assert boxes.named_heads == ready_list("vrh-qwen3-vl").heads[:4]
    assert run_of("model=qwen3-vl", "query_token=answer_span", "answer_span='the dog'").named_heads is None
    named = run_of("model=qwen3-vl", "heads=vrh-qwen3-vl")
    assert named.named_heads == (Head(20, 15), Head(21, 10), Head(18, 19))
    assert named.heads_found_with == {"conv_mode": "native_box", "query_token": "answer_span"}
    with pytest.raises(
        UsageError, match=r"heads=vrh: .* or a ready list \(fork-llava, own-tiny, paper-llava"
    ):
        _ = run_of("heads=vrh").named_heads
    with pytest.raises(UsageError, match="there is no ready list of heads named nobody"):
        _ = run_of("model.lists=[nobody]", "model.heads=[]").ready_heads


def test_a_conversation_asks_as_the_heads_were_found() -> None:
    run = ChatRun(
        compose_options("chat", "model=llava", "conv_mode=chat", "query=it"), "llava", ("model=llava",)
    )
    assert run.named_heads == PAPER
    assert (run.heads_found_with or {})["conv_mode"] == "referseg"


def test_overlap_by_hand_and_by_chance() -> None:
    heads = [Head(0, n) for n in range(4)]
    assert shared_heads(heads, heads, 4) == (4, 4, 4.0)
    assert shared_heads(heads[:2], heads[::-1], 4) == (0, 2, 1.0)
    assert shared_heads([], heads, 4) == (0, 0, 0.0)
    every = [shared_heads(heads[:2], order, 4).shared for order in permutations(heads)]
    assert sum(every) / len(every) == shared_heads(heads[:2], heads, 4).chance
    many = [Head(1, n) for n in range(30)]
    assert shared_heads(many, many[5:] + many[:5], 30) == (15, 20, pytest.approx(400 / 30))


@pytest.fixture
def with_list(front: Front, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a random model, for which a list called `theirs` is known."""
    heads = (Head(3, 0), Head(3, 1), Head(2, 2), Head(3, 3), Head(2, 0))
    theirs = ReadyList("theirs", "someone, 2026", "a model", heads, "plain", "last")
    every: dict[str, Any] = {**ready_lists(), "theirs": theirs}
    for module in (ready, "localization_heads.head_choice", "localization_heads.stages.run"):
        target = (
            f"{module}.ready_lists"
            if isinstance(module, str)
            else "localization_heads.heads.ready.ready_lists"
        )
        monkeypatch.setattr(target, lambda: every)
    return save_llava(front.folder / "model")


def test_a_new_ranking_is_compared_with_the_list(front: Front, with_list: Path, image: Image.Image) -> None:
    image.save("one.png")
    lines = [
        {"id": f"e{n}", "prompt": "the red car", "image_path": "one.png", "bbox": [0, 0, 50, 50]}
        for n in (1, 2)
    ]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("data_file=data.jsonl", f"model.name={with_list}", "model.lists=[theirs]", "model.label=random")
    # four layers of four heads, the first two left out
    found = front.finder("stage=find", *words, "criteria.tau=0", "report=false")
    assert found.status == 0, found.err
    ranked = json.loads(Path("outputs/localization_heads/random/heads.json").read_text())["heads"]
    first = {(head["layer"], head["head"]) for head in ranked[:5]}
    shared = len(first & set(ready_list("theirs").heads))
    said = f"theirs (someone, 2026): {shared} of its first 5 heads are among the first 5 found; by chance 3.1"
    assert said in found.out
    labelled = front.finder("stage=find", *words, "heads_by=mass", "report=false")
    assert "theirs (someone, 2026): " in labelled.out
    ground = (
        "stage=evaluate",
        *words,
        "segmenter=none",
        "controls=false",
        "allow_leakage=true",
        "report=false",
    )
    taken = front.finder(*ground, "conv_mode=plain")
    assert "heads=auto: the first 3 of theirs (someone, 2026)" in taken.out
    metrics = json.loads(Path("outputs/localization_heads/random/metrics.json").read_text())["choices"]
    assert (metrics["heads_from"], metrics["heads"]) == ("theirs (someone, 2026)", ["L3H0", "L3H1", "L2H2"])
    lines = Path("outputs/localization_heads/random/predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["heads_from"] for line in lines} == {"theirs (someone, 2026)"}
    # under another prompt the list is left, the ranking just made is taken, and both are said
    other = front.finder(*ground, "conv_mode=referseg")
    assert (
        "heads=auto: no ready list of heads fits: theirs (someone, 2026) was found with conv_mode=plain"
        in other.err
    )
    best = [f"L{head['layer']}H{head['head']}" for head in json.loads(
        Path("outputs/localization_heads/random/heads.json").read_text()
    )["heads"][:3]]  # fmt: skip
    metrics = json.loads(Path("outputs/localization_heads/random/metrics.json").read_text())["choices"]
    assert (metrics["heads_from"], metrics["heads"]) == (None, best)
    lines = Path("outputs/localization_heads/random/predictions.jsonl").read_text().splitlines()
    assert not any("heads_from" in json.loads(line) for line in lines)


def test_heads_that_a_model_lacks(front: Front, image: Image.Image) -> None:
    image.save("one.png")
    refused = front.finder("stage=ground", "image_file=one.png", "query=the car", "heads=vrh-internvl")
    assert refused.status == 2 and "heads: there is no L16H20; the layers are 0 to 5" in refused.err


def test_files_say_how_they_were_made(front: Front, image: Image.Image) -> None:
    """The viewer and `visualize` take known heads as all other stages do: where they fit, else with a note."""
    image.save("a.png")
    words = ("stage=collect", "image_file=a.png", "query=the dog")
    assert front.finder(*words, "save_id=last").status == 0
    assert front.finder(*words, "save_id=other", "query_token=answer_mean").status == 0
    last, other = (f"attention_file={front.out}/attention/{id}.pkl" for id in ("last", "other"))
    for show in (front.visualize, lambda file: front.finder("stage=visualize", file)):
        assert "ready list" not in show(last).err
        assert "no ready list of heads fits: own-tiny" in show(other).err
    data = ("data=scenes", "scenes.count=2", "scenes.size=96", "report=false")
    assert front.finder("stage=find", *data).status == 0
    said = "heads=auto: found with query_token=last (here: answer_mean); others may be better here"
    assert said in front.visualize(other).err
    named = f"heads={front.out}/heads.json"
    assert (
        said.replace("auto", f"{front.out}/heads.json") in front.finder("stage=visualize", other, named).err
    )


def test_python_says_why_no_list_is_taken(image: Image.Image) -> None:
    lvlm = lh.load_model(device="cpu", conv_mode="plain")
    assert lvlm.ready.heads == () and lvlm.ready.advice
    lh.ground(lvlm, image, "the dog", segmenter=None)
    assert lvlm.trace(image, "the dog", max_new_tokens=1).heads == tuple(
        lvlm.pick_own_heads(image, "the dog")
    )
    assert lvlm.notes == [lvlm.ready.advice]
