"""`stage=export` after a batch, and without one."""

import json
import re

import pytest
from front import one_line, stub_figures, write_data
from pycocotools.coco import COCO


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)


def test_export_after_a_batch(front):
    data = write_data(front.folder, 3)
    assert front.finder(f"data_file={data}").status == 0
    result = front.finder("stage=export", f"data_file={data}")
    assert result.status == 0, result.err
    assert "predictions_coco.json" in result.out
    coco = front.json("predictions_coco.json")
    lines = front.lines()
    for annotation, line in zip(coco["annotations"], lines, strict=True):
        x, y, width, height = annotation["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(line["bbox"])
        assert annotation["sample_id"] == line["id"]
    ranked = front.json("heads.json")["heads"]
    scores = front.json("heads_scores.json")
    assert scores == [[h["layer"], h["head"], h["selection_frequency"]] for h in ranked]
    objects = front.json("heads_gaze.json")
    assert [[one["layer"], one["head"], one["score"]] for one in objects] == scores
    mapping = front.json("heads_sparsemm.json")
    assert list(mapping) == [f"{layer}-{head}" for layer in range(6) for head in range(8)], (
        "every head, in order"
    )
    assert all(mapping[f"{layer}-{head}"] == [score] for layer, head, score in scores)
    loaded = COCO(front.out / "predictions_coco.json").loadRes(
        str(front.out / "predictions_coco_results.json")
    )
    assert [one["bbox"] for one in loaded.anns.values()] == [one["bbox"] for one in coco["annotations"]]
    heads = front.out / "heads_scores.json"
    again = front.finder("stage=ground", f"data_file={data}", f"heads={heads}", "k=2")
    assert again.status == 0, again.err
    first = json.loads((front.out / "predictions.jsonl").read_text().splitlines()[0])
    assert first["heads"] == [row[:2] for row in scores[:2]]


def test_export_of_nothing(front):
    result = front.finder("stage=export")
    assert result.status == 2
    assert "run stage=batch first" in one_line(result.err)


def test_export_with_another_data_file(front):
    data = write_data(front.folder, 2)
    assert front.finder("stage=ground", f"data_file={data}").status == 0
    (front.folder / "other.jsonl").write_text(data.read_text().replace("entry_", "other_"))
    result = front.finder("stage=export", "data_file=other.jsonl")
    assert result.status == 2
    assert "name the data_file" in one_line(result.err)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[0, 0, 5, 0, 5, 5]], "line 1: .*'mask' must be run lengths"),
        ({"size": [0, 5], "counts": "0"}, "line 1: .*'size' must be"),
        ({"size": ["a", 5], "counts": "0"}, "line 1: .*'size' must be"),
        ({"size": [10**6, 10**6], "counts": "0"}, "line 1: .*over the limit"),
        ({"size": [5, 5], "counts": "0"}, "the prediction of 'entry_0'"),
        ({"size": [5, 5], "counts": "\x00\xff"}, "the prediction of 'entry_0'"),
    ],
)
def test_export_of_bad_masks_is_one_line(mask, said, front):
    data = write_data(front.folder, 1)
    line = {"id": "entry_0", "bbox": [0, 0, 1, 1], "score": 0.5, "mask": mask, "heads": [], "error": None}
    front.out.mkdir(parents=True, exist_ok=True)
    (front.out / "predictions.jsonl").write_text(json.dumps(line))
    result = front.finder("stage=export", f"data_file={data}")
    assert result.status == 2
    assert re.search(said, one_line(result.err))
