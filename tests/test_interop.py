"""Other tools' forms: heads in and out, COCO, supervision, FiftyOne, the hub, the pipeline."""

import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from front import one_line, stub_figures, write_data
from PIL import Image
from pycocotools.coco import COCO

import localization_heads as lh
from localization_heads import hub
from localization_heads.arguments import grounder_of
from localization_heads.attention import AttentionMaps
from localization_heads.data.images import load_image
from localization_heads.data.masks import encode_mask
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError, WorkError
from localization_heads.grounding.ground import ground_maps
from localization_heads.head_choice import resolve_heads
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import rank_heads
from localization_heads.heads.score_lists import read_scores, scores_of
from localization_heads.interop import detections
from localization_heads.interop.coco import to_coco
from localization_heads.interop.pipeline import answer_of
from localization_heads.options.groups import CriteriaOptions
from localization_heads.store.results import Instance, Prediction, load_head_list, save_ranking


@pytest.fixture
def ranking():
    rng = np.random.default_rng(0)
    return rank_heads(rng.random((6, 4, 3)), rng.random((6, 4, 3)), top_n=4, model="org/model")


@pytest.fixture
def grounding():
    cells = np.zeros((1, 1, 4, 4), np.float32)
    cells[0, 0, 1:3, 2:4] = 1
    return ground_maps(AttentionMaps(cells, (0.0, 0.0, 40.0, 40.0), (40, 40)), [Head(0, 0)])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 20), "white").save(path)
    return path


def test_scores_survive_the_way_out_and_in(ranking, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores_of(ranking)))
    assert load_head_list(path) == [head.address for head in ranking.kept]
    assert resolve_heads(str(path), 2) == tuple(ranking.top(2))


@pytest.mark.parametrize(
    ("picture", "name", "number"),
    [
        ("coco:581857", "a.png", 581857),
        ("", "COCO_train2014_000000000009.jpg", 9),
        ("", "COCO_train2014_9.jpg", 1),
        ("flickr:7", "7.jpg", 1),
    ],
)
def test_cocos_own_ids_of_images(picture, name, number, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    sample = Sample(tmp_path / name, "it", id="a", picture=picture)
    data = to_coco([Prediction("a", (0, 0, 4, 4), 0.5)], {"a": sample})
    assert [image["id"] for image in data["images"]] == [data["annotations"][0]["image_id"]] == [number]


def test_head_lists_of_the_published_code_and_of_gaze_heads(tmp_path):
    first = {"layer": 14, "head": 26, "count": 406, "frequency": 0.406}
    second = {"layer": 14, "head": 24, "frequency": 0.571}
    more = {"directory": "/content", "model_dir": "llava", "top_k": 5, "total_files": 1000}
    august = {**more, "head_frequency": [first, second]}
    gaze = [{"layer": 14, "head": 26, "score": 0.4}, {"layer": 14, "head": 24, "score": 0.6}]
    path = tmp_path / "batch_selected_heads.json"
    for content in (august, gaze):
        path.write_text(json.dumps(content))
        assert resolve_heads(str(path), 2) == ((14, 24), (14, 26))
    path.write_text(json.dumps({"head_frequency": [{"layer": 14, "frequency": 0.5}]}))
    with pytest.raises(UsageError, match=r"batch_selected_heads.json: entry 0 is \[14, None, 0.5\]"):
        resolve_heads(str(path), 1)


def test_heads_json_is_read_as_before(ranking, tmp_path):
    path, _ = save_ranking(ranking, tmp_path)
    assert load_head_list(path) == [head.address for head in ranking.kept]
    assert lh.load_heads(path).top(2) == ranking.top(2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "names no head"),
        ({}, "names no head"),
        ([[1, 2]], "entry 0"),
        ([[1, -2, 0.5]], "entry 0"),
        ([[True, 2, 0.5]], "entry 0"),
        ([[1, 2, float("nan")]], "finite"),
        ([[1, 2, 10**400]], "finite"),
        ([[1, 2, "x"]], "finite"),
        ([{"layer": 1, "head": 2}], "finite"),
        ({"head_frequency": {"layer": 1}}, "finite|names no head"),
        ({"head_frequency": "L1H2"}, "no list of heads"),
        ([[1, 2, 0.1], [1, 2, 0.3]], "twice"),
        ({"one-two": 1.0}, "one-two"),
        ({"1-2": [0.5, None]}, "finite"),
        ({"1-2": []}, "finite"),
        ("L1H2", "no list of heads"),
    ],
)
def test_scores_that_are_none(data, said):
    with pytest.raises(UsageError, match=said):
        read_scores(data)


def head_entry(layer, head):
    return {
        "layer": layer, "head": head, "selection_frequency": 0.5, "selection_frequency_std": 0, "attention_sum": 0.5,
        "spatial_entropy": None,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["heads.json", "list", "mapping"])
def test_a_head_twice_at_the_end_of_a_long_file_is_found_at_once(form, ranking, tmp_path):
    """Comparing every head with every other takes minutes here."""
    heads = [(n, 0) for n in range(40_000)]
    path = tmp_path / "heads.json"
    if form == "heads.json":
        entries = [head_entry(*head) for head in [*heads, heads[-1]]]
        path.write_text(json.dumps({**ranking.to_json(), "heads": entries}))
    elif form == "list":
        path.write_text(json.dumps([[*head, 0.5] for head in [*heads, heads[-1]]]))
    else:
        path.write_text(json.dumps({f"{n}-{h}": 0.5 for n, h in heads} | {"L39999H0": 1}))
    started = time.process_time()
    with pytest.raises(UsageError, match="L39999H0 is listed twice") as caught:
        load_head_list(path)
    assert time.process_time() - started < 3
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["14-24", "L14H24", "L14 H24", " l14 - h24 ", "14,24", "14:24", "14  24", "14h24"]
)
def test_the_forms_of_a_heads_name(text):
    assert Head.parse(text) == Head(14, 24)


@pytest.mark.parametrize(
    "text", ["", "1424", "14--24", "H24", "L14", "14-24-3", "1" * 40_000, " " * 40_000, "14-" + "2" * 40_000]
)
def test_what_names_no_head_is_refused_at_once(text):
    """40,000 digits held a quadratic pattern for minutes."""
    started = time.process_time()
    with pytest.raises(ValueError, match="names no head") as caught:
        Head.parse(text)
    assert time.process_time() - started < 1 and len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "1" * 10_000_000}, "version"),
        ({"tau": [0] * 1_000_000}, "tau"),
        ({"criteria": {"tau": [0] * 1_000_000}}, "criteria: tau cannot be"),
        ({"criteria": {"entropy": "a" * 1_000_000}}, "criteria: entropy cannot be"),
        ({"spread": {"a": "b" * 1_000_000}}, "spread"),
    ],
)
def test_what_is_wrong_in_heads_json_is_said_in_a_short_line(change, said, ranking, tmp_path):
    (tmp_path / "heads.json").write_text(json.dumps({**ranking.to_json(), **change}))
    with pytest.raises(UsageError, match=said) as caught:
        load_head_list(tmp_path / "heads.json")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_coco_boxes_masks_and_shared_images(image):
    mask = np.zeros((20, 40), bool)
    mask[5:10, 10:30] = True
    samples = {id: Sample(image, f"the {id}", id=id) for id in ("a", "b", "c")}
    predictions = [
        Prediction("a", (10.0, 5.0, 30.0, 10.0), 0.5, encode_mask(mask)),
        Prediction("b", (0.0, 0.0, 4.0, 2.0), 0.25),
        Prediction("c", error="broken"),
        Prediction("unknown", (0.0, 0.0, 1.0, 1.0), 1.0),
    ]
    coco = to_coco(predictions, samples)
    assert [(i["width"], i["height"], i["file_name"]) for i in coco["images"]] == [(40, 20, str(image))]
    first, second = coco["annotations"]
    assert first["bbox"] == [10.0, 5.0, 20.0, 5.0]
    assert (first["area"], second["area"]) == (100.0, 8.0)
    assert (first["image_id"], second["image_id"]) == (1, 1)
    assert (second["expression"], second["sample_id"], second["score"]) == ("the b", "b", 0.25)


def test_coco_has_all_boxes_of_an_expression(image):
    boxes = [Instance((0.0, 0.0, 4.0, 2.0), 0.5), Instance((10.0, 0.0, 12.0, 2.0), 0.25)]
    predictions = [
        Prediction("a", (0.0, 0.0, 4.0, 2.0), 0.5, boxes=boxes),
        Prediction("b", (0.0, 0.0, 1.0, 1.0), 0.1),
    ]
    found = to_coco(predictions, {id: Sample(image, f"the {id}s", id=id) for id in "ab"})["annotations"]
    assert [(one["id"], one["sample_id"], one["bbox"], one["score"]) for one in found] == [
        (1, "a", [0.0, 0.0, 4.0, 2.0], 0.5),
        (2, "a", [10.0, 0.0, 2.0, 2.0], 0.25),
        (3, "b", [0.0, 0.0, 1.0, 1.0], 0.1),
    ]


def test_pycocotools_reads_what_is_exported(image, tmp_path):
    from pycocotools.coco import COCO

    mask = np.zeros((20, 40), bool)
    mask[5:10, 10:30] = True
    prediction = Prediction("a", (10.0, 5.0, 30.0, 10.0), 0.5, encode_mask(mask))
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(to_coco([prediction], {"a": Sample(image, "it", id="a")})))
    read = COCO(str(file))
    (annotation,) = read.loadAnns(read.getAnnIds())
    assert np.array_equal(read.annToMask(annotation).astype(bool), mask)


def test_detections_of_supervision_hold_boxes_masks_and_names(grounding):
    pytest.importorskip("supervision")
    found = detections.to_supervision([grounding, grounding], ["dog", "cat"])
    assert np.allclose(found.xyxy, [grounding.box] * 2)
    assert np.array_equal(found.mask[1], grounding.mask)
    assert found.confidence == pytest.approx([grounding.score] * 2)
    assert list(found["class_name"]) == ["dog", "cat"]
    assert len(detections.to_supervision([])) == 0
    with pytest.raises(ValueError, match="1 expressions for 2"):
        detections.to_supervision([grounding, grounding], ["dog"])


def test_a_missing_extra_says_what_to_install(grounding, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UsageError, match=r"pip install 'localization-heads\[supervision\]'"):
        detections.to_supervision([grounding])
    with pytest.raises(UsageError, match=r"pip install 'localization-heads\[fiftyone\]'"):
        detections.to_fiftyone([], {})


class FakeSample(dict):
    def __init__(self, filepath):
        super().__init__(filepath=filepath)


class FakeDataset:
    def __init__(self, name):
        self.name, self.samples = name, []

    def add_samples(self, samples):
        self.samples += samples


def test_fiftyone_gets_relative_boxes_and_cut_masks(image, monkeypatch):
    """Against the four names of the library that we use; the samples were also made with FiftyOne 1.22 itself."""
    kinds = {"Dataset": FakeDataset, "Sample": FakeSample, "Detection": SimpleNamespace}
    fake = SimpleNamespace(**kinds, Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    mask = np.zeros((20, 40), bool)
    mask[5:10, 10:30] = True
    samples = {id: Sample(image, id, id=id, bbox=(0.0, 0.0, 40.0, 10.0)) for id in "ab"}
    predictions = [Prediction(id, (10.0, 5.0, 30.0, 10.0), 0.5, encode_mask(mask)) for id in "ab"]
    (sample,) = detections.to_fiftyone(predictions, samples, "mine").samples
    found = sample["predictions"].detections
    assert [d.label for d in found] == ["a", "b"]
    assert found[0].bounding_box == [0.25, 0.25, 0.5, 0.25]
    assert found[0].mask.shape == (5, 20)
    assert found[0].mask.all()
    assert sample["ground_truth"].detections[0].bounding_box == [0.0, 0.0, 1.0, 0.5]


def test_an_answer_is_what_transformers_pipelines_give(grounding):
    answer = answer_of(grounding, "dog")
    x0, y0, x1, y1 = grounding.box
    assert answer["box"] == {"xmin": round(x0), "ymin": round(y0), "xmax": round(x1), "ymax": round(y1)}
    assert answer["mask"].mode == "L"
    assert np.array_equal(np.asarray(answer["mask"]) == 255, grounding.mask)
    assert (answer["label"], answer["score"]) == ("dog", grounding.score)


def test_the_pipeline_grounds_as_ground_does():
    pipe = lh.pipeline()
    image = "examples/images/cat.jpg"
    one, two = pipe(image, ["cat", "the cat"])
    same = lh.ground(pipe.lvlm, image, "cat")
    assert one["box"] == answer_of(same, "cat")["box"]
    assert two["label"] == "the cat"
    assert pipe(load_image(image), "cat")["score"] == pytest.approx(one["score"], abs=1e-5)
    assert lh.pipeline(pipe.lvlm).lvlm is pipe.lvlm


class FakeApi:
    """The hub's answers, and what it was given."""

    error: Exception | None = None

    def __init__(self, token=None):
        self.files = {}

    def create_repo(self, repository, private, exist_ok):
        if self.error:
            raise self.error
        type(self).made = repository

    def create_commit(self, repository, additions, commit_message):
        type(self).pushed = {a.path_in_repo: a.path_or_fileobj for a in additions}
        return SimpleNamespace(commit_url=f"hub/{repository}/commit/1")


def test_heads_pushed_are_the_heads_loaded(ranking, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert lh.push_heads(ranking, "me/heads") == "hub/me/heads/commit/1"
    (tmp_path / "heads.json").write_bytes(FakeApi.pushed["heads.json"])
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert lh.load_heads("me/heads").top(3) == ranking.top(3)
    assert resolve_heads("me/heads", 2) == tuple(ranking.top(2))
    assert asked == [("me/heads", "heads.json")] * 2
    noted = []
    lvlm = SimpleNamespace(
        attend_batch=None,
        num_layers=99,
        num_heads=99,
        warn_of_other_conditions=lambda *given: noted.append(given),
    )
    asked.clear()
    assert grounder_of(lvlm, "me/heads", CriteriaOptions(), None, None, 2).heads == tuple(ranking.top(2))
    assert len(asked) == 1 and noted == [("heads=me/heads", ranking.found_with)]
    card = FakeApi.pushed["README.md"].decode()
    assert 'base_model: "org/model"' in card
    assert 'lh.load_heads("me/heads")' in card


def test_a_hub_that_refuses_is_one_line(ranking, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "error", OSError("401 Unauthorized\nlong tail"))
    with pytest.raises(WorkError, match=r"me/heads cannot be written \(401 Unauthorized\)"):
        lh.push_heads(ranking, "me/heads")


def test_a_hub_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(
        "localization_heads.lvlm.checkpoints.sources.hub_unreachable_reason", lambda: "no network"
    )
    with pytest.raises(WorkError, match="neither a local file nor available from the hub"):
        lh.load_heads("nobody-at-all/no-such-heads")


@pytest.mark.parametrize("name", ["auto", "greedy", "a/b/c", "../heads", "user/heads.json", "3-4", "user/"])
def test_names_that_are_no_repository(name):
    assert not hub.is_repository(name)


# ------------------------------------------------------------------------------------------------ the command


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
        ([[0, 0, 5, 0, 5, 5]], "line 1: .*'mask' must be COCO RLE"),
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
