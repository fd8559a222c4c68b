"""Ready lists: their files, when heads=auto takes one, and how a new ranking is compared with them."""

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
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.ready import (
    ReadyHeads,
    ReadyList,
    choose_ready,
    ready_list,
    ready_lists,
    shared_heads,
)
from localization_heads.lvlm.checkpoints.spec import KNOWN_SHAPES, known_specs
from localization_heads.options.compose import compose_options
from localization_heads.stages.run import ChatRun, Run

PAPER = (Head(14, 24), Head(14, 13), Head(14, 26))
LAYERS_AND_HEADS = {
    "qwen2_5-vl": (28, 28), "qwen3-vl": (36, 32), "internvl": (28, 28), "internvl3_5": (36, 32),
    **{stem: shape[1:3] for stem, shape in KNOWN_SHAPES.items()},
}  # fmt: skip
"""`(layers, heads)` of the language models: Qwen2.5-7B, Qwen3-8B, and `KNOWN_SHAPES`."""


def test_every_list_belongs_to_a_model_and_is_valid() -> None:
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


def test_the_docs_list_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "find-heads.md").read_text(encoding="utf-8")
    for name, one in ready_lists().items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {len(one.heads)} |" in row
        expected = {"native_box": ("model's own", "the same"), "referseg": ("`referseg`",)}[one.conv_mode]
        assert any(word in row for word in expected)


def test_lists_agree_with_their_sources() -> None:
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


def test_a_list_is_taken_only_with_its_prompt_and_query_token() -> None:
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
    assert choose_ready(own, names, "chat", "last").heads == own  # the user's own
    assert choose_ready((), (), "chat", "last") == ReadyHeads()
    with pytest.raises(UsageError, match="there is no ready list of heads named paper_llava; did you mean paper-llava"):
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
    assert fork.named_heads == (Head(14, 24), Head(14, 26)) and str(fork.heads_from).startswith("fork-llava (a commun")
    qwen = run_of("model=qwen3-vl")
    assert qwen.named_heads is None and qwen.heads_from is None
    assert "vrh-qwen3-vl (Retrieval Heads Meet Vision" in qwen.ready_heads.advice
    assert "found with query_token=answer_span answer_span=box (here: query_token=last)" in qwen.ready_heads.advice
    boxes = run_of("model=qwen3-vl", "query_token=answer_span", "answer_span=box", "k=4")
    assert boxes.named_heads == ready_list("vrh-qwen3-vl").heads[:4]
    assert run_of("model=qwen3-vl", "query_token=answer_span", "answer_span='the dog'").named_heads is None
    named = run_of("model=qwen3-vl", "heads=vrh-qwen3-vl")
    assert named.named_heads == (Head(20, 15), Head(21, 10), Head(18, 19))
    assert named.heads_found_with == {"conv_mode": "native_box", "query_token": "answer_span"}
    with pytest.raises(UsageError, match=r"heads=vrh: .* or a ready list \(fork-llava, own-tiny, paper-llava"):
        _ = run_of("heads=vrh").named_heads
    with pytest.raises(UsageError, match="there is no ready list of heads named nobody"):
        _ = run_of("model.lists=[nobody]", "model.heads=[]").ready_heads


def test_a_conversation_uses_the_prompt_of_its_heads() -> None:
    run = ChatRun(compose_options("chat", "model=llava", "conv_mode=chat", "query=it"), "llava", ("model=llava",))
    assert run.named_heads == PAPER
    assert (run.heads_found_with or {})["conv_mode"] == "referseg"


def test_shared_heads_by_hand_and_by_chance() -> None:
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
    """The folder of a random model, and a ready list for it called `theirs`."""
    heads = (Head(3, 0), Head(3, 1), Head(2, 2), Head(3, 3), Head(2, 0))
    theirs = ReadyList("theirs", "someone, 2026", "a model", heads, "plain", "last")
    every: dict[str, Any] = {**ready_lists(), "theirs": theirs}
    for module in ("heads.ready", "head_choice", "stages.run"):
        monkeypatch.setattr(f"localization_heads.{module}.ready_lists", lambda: every)
    return save_llava(front.folder / "model")


def test_a_new_ranking_is_compared_with_the_list(front: Front, with_list: Path, image: Image.Image) -> None:
    image.save("one.png")
    line = {"prompt": "the red car", "image_path": "one.png", "bbox": [0, 0, 50, 50]}
    Path("data.jsonl").write_text("\n".join(json.dumps({"id": f"e{n}", **line}) for n in (1, 2)))
    words = ("data_file=data.jsonl", f"model.name={with_list}", "model.lists=[theirs]", "model.label=random")
    out = Path("outputs/localization_heads/random")

    def grounded_with() -> tuple[Any, Any, set[Any]]:
        """The source and the names of the heads in metrics.json, and the sources in predictions.jsonl."""
        choices = json.loads((out / "metrics.json").read_text())["choices"]
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        return choices["heads_from"], choices["heads"], {line.get("heads_from") for line in lines}

    # four layers of four heads, of which the first two layers are excluded
    found = front.finder("stage=find", *words, "criteria.tau=0", "report=false")
    assert found.status == 0, found.err
    shared = len(set(ranked_heads(out)[:5]) & set(ready_list("theirs").heads))
    said = f"theirs (someone, 2026): {shared} of its first 5 heads are among the first 5 found; by chance 3.1"
    assert said in found.out
    labelled = front.finder("stage=find", *words, "heads_by=mass", "report=false")
    assert "theirs (someone, 2026): " in labelled.out
    evaluate = (
        "stage=evaluate",
        *words,
        "segmenter=none",
        "controls=false",
        "allow_leakage=true",
        "report=false",
    )
    taken = front.finder(*evaluate, "conv_mode=plain")
    assert "heads=auto: the first 3 of theirs (someone, 2026)" in taken.out
    source = "theirs (someone, 2026)"
    assert grounded_with() == (source, ["L3H0", "L3H1", "L2H2"], {source})
    # with another prompt the heads of the new ranking are taken, and the reason is given
    other = front.finder(*evaluate, "conv_mode=referseg")
    assert f"heads=auto: no ready list of heads fits: {source} was found with conv_mode=plain" in other.err
    best = [str(Head(*head)) for head in ranked_heads(out)[:3]]
    assert grounded_with() == (None, best, {None})


def ranked_heads(folder: Path) -> list[tuple[int, int]]:
    return [(head["layer"], head["head"]) for head in json.loads((folder / "heads.json").read_text())["heads"]]


def test_a_list_of_another_model_is_refused(front: Front, image: Image.Image) -> None:
    image.save("one.png")
    refused = front.finder("stage=ground", "image_file=one.png", "query=the car", "heads=vrh-internvl")
    assert refused.status == 2 and "heads: there is no L16H20; the layers are 0 to 5" in refused.err


def test_viewers_note_heads_found_with_another_prompt(front: Front, image: Image.Image) -> None:
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
    assert said.replace("auto", f"{front.out}/heads.json") in front.finder("stage=visualize", other, named).err


def test_python_says_why_no_list_is_taken(image: Image.Image) -> None:
    lvlm = lh.load_model(device="cpu", conv_mode="plain")
    assert lvlm.ready.heads == () and lvlm.ready.advice
    lh.ground(lvlm, image, "the dog", segmenter=None)
    assert lvlm.trace(image, "the dog", max_new_tokens=1).heads == tuple(lvlm.pick_own_heads(image, "the dog"))
    assert lvlm.notes == [lvlm.ready.advice]
