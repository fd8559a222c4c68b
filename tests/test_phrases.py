"""Queries that name several objects: their phrases, and how `ground` handles them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from front import Front, draw_image, one_line, read_lines, write_lines
from PIL import Image

from localization_heads import figures
from localization_heads.data import phrases
from localization_heads.data.phrases import noun_phrases, split_phrases
from localization_heads.errors import UsageError
from localization_heads.figures import DetectedObject


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("the dog", ["the dog"]),
        ("the dog; the cat", ["the dog", "the cat"]),
        (" the dog ;; the  red cat; ", ["the dog", "the red cat"]),
        ("the dog; The Dog; a cat", ["the dog", "a cat"]),
        ("the  dog", ["the  dog"]),  # without ; the query is unchanged, whitespace included
        (";", [";"]),
        ("the dog;", ["the dog"]),
    ],
)
def test_query_is_split_at_semicolons(query: str, found: list[str]) -> None:
    assert split_phrases(query) == found
    assert split_phrases(query, by="whole") == [query]


def parsed(words: str, pos: str, heads: list[int], deps: str) -> Any:
    """A parsed text, without a parser."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc

    vocab = spacy.blank("en").vocab
    return Doc(vocab, words=words.split(), pos=pos.split(), heads=heads, deps=deps.split())


def test_pronouns_are_not_noun_phrases() -> None:
    doc = parsed(
        "It shows a brown dog and the cat", "PRON VERB DET ADJ NOUN CCONJ DET NOUN", [1, 1, 4, 4, 1, 4, 7, 4],
        "nsubj ROOT det amod dobj cc det conj",
    )  # fmt: skip
    assert noun_phrases(doc) == ["a brown dog", "the cat"]


def test_position_is_joined_to_its_object() -> None:
    doc = parsed(
        "the dog on the left and a ball on the table", "DET NOUN ADP DET NOUN CCONJ DET NOUN ADP DET NOUN",
        [1, 1, 1, 4, 2, 1, 7, 1, 7, 10, 8], "det ROOT prep det pobj cc det conj prep det pobj",
    )  # fmt: skip
    assert noun_phrases(doc) == ["the dog on the left", "a ball", "the table"]


def test_query_without_noun_phrases_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = parsed("run", "VERB", [0], "ROOT")
    monkeypatch.setattr(phrases, "_load_pipeline", lambda model: lambda text: doc)
    assert split_phrases("run", by="spacy") == ["run"]


def test_missing_pipeline_says_how_to_download_it() -> None:
    pytest.importorskip("spacy")
    with pytest.raises(UsageError, match="python -m spacy download no_such_pipeline"):
        split_phrases("the dog", by="spacy", model="no_such_pipeline")


def test_pipeline_without_a_parser_is_reported(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UsageError, match="no parser"):
        split_phrases("the dog", by="spacy", model=str(tmp_path / "blank"))


def test_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_spacy(name: str, *rest: Any, **more: Any) -> Any:
        if name == "spacy":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_spacy)
    phrases._load_pipeline.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'localization-heads\[phrases\]'"):
        split_phrases("the dog", by="spacy")


@pytest.fixture
def front(front: Front) -> Front:
    draw_image(front.folder / "cat.png")
    return front


def test_each_phrase_gets_a_prediction_and_all_share_a_figure(front: Front) -> None:
    query = "query=the dog; the red ball; the cat"
    result = front.finder("stage=ground", "image_file=cat.png", query, "save_id=zoo")
    assert result.status == 0, result.err
    folder = front.out / "attention"
    lines = read_lines(folder / "zoo_prediction.jsonl")
    assert [line["id"] for line in lines] == ["zoo_1", "zoo_2", "zoo_3"]
    assert all(line["bbox"] and line["mask"] and line["error"] is None for line in lines)
    for name in ("zoo", "zoo_1", "zoo_2", "zoo_3"):
        assert Image.open(folder / f"{name}_grounding.png").size[0] > 100
    alone = front.finder("stage=ground", "image_file=cat.png", "query=the red ball", "save_id=one")
    assert alone.status == 0
    assert read_lines(folder / "one_prediction.jsonl")[0]["bbox"] == pytest.approx(lines[1]["bbox"], abs=1e-3)


def test_phrases_by_whole_does_not_split(front: Front) -> None:
    result = front.finder(
        "stage=ground", "image_file=cat.png", "query=the dog; the cat", "save_id=zoo", "phrases.by=whole"
    )
    assert result.status == 0
    assert [line["id"] for line in read_lines(front.out / "attention" / "zoo_prediction.jsonl")] == ["zoo"]


def test_phrases_in_a_data_file(front: Front) -> None:
    entries = [
        {"id": "a", "prompt": "the dog; the cat", "image_path": "cat.png", "bbox": [0, 0, 9, 9]},
        {"id": "b", "prompt": "the boat", "image_path": "cat.png"},
        {"id": "c", "prompt": "one; two", "image_path": "cat.png"},
        {"id": "c_2", "prompt": "the boat", "image_path": "cat.png"},
    ]
    data = write_lines(front.folder / "data.jsonl", entries)
    options = ("stage=ground", f"data_file={data}", "visualize_limit=1", "batch_size=2")
    result = front.finder(*options)
    assert result.status == 1  # the id c_2 of c's second phrase is taken
    assert "phrases.by=whole" in result.out
    lines = front.lines()
    assert [line["id"] for line in lines] == ["a_1", "a_2", "b", "c_2", "c"]
    assert lines[-1]["error"]
    assert lines[0]["bbox"] and lines[1]["bbox"]
    exported = front.finder("stage=export", f"data_file={data}")
    assert exported.status == 0, exported.err
    coco = front.json("predictions_coco.json")
    assert [one["sample_id"] for one in coco["annotations"]] == ["a_1", "a_2", "b", "c_2"]


def test_unknown_phrases_option_is_reported(front: Front) -> None:
    result = front.finder("stage=ground", "image_file=cat.png", "query=a; b", "phrases.by=magic")
    assert result.status == 2
    assert one_line(result.err).startswith("error: phrases.by=magic: choose one of")


def test_figure_labels_many_objects_at_the_border(tmp_path: Path) -> None:
    import numpy as np

    mask = np.zeros((40, 3000), dtype=bool)
    mask[10:20, 2900:] = True
    objects = [DetectedObject(f"object number {n}", (2990.0, 0.0, 3000.0, 40.0), 0.5, mask) for n in range(9)]
    objects.append(DetectedObject("no mask", (0.0, 0.0, 5.0, 5.0), 0.1))
    figure = figures.plot_several(Image.new("RGB", (3000, 40)), objects, tmp_path / "figure.png")
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == [str(n) for n in range(1, 11)]
    assert "10: no mask (0.10)" in " ".join(figure.get_suptitle().split())
