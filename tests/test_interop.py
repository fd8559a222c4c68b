"""Formats of other tools: head lists, COCO, supervision, FiftyOne, the hub and transformers pipelines."""

import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from front import stub_figures, write_data
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


@pytest.fixture
def mask():
    """5 x 20 pixels of `image`."""
    mask = np.zeros((20, 40), bool)
    mask[5:10, 10:30] = True
    return mask


BOX = (10.0, 5.0, 30.0, 10.0)
"""The box of `mask`."""


def test_scores_round_trip(ranking, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores_of(ranking)))
    assert load_head_list(path) == [head.address for head in ranking.kept]
    assert resolve_heads(str(path), 2) == tuple(ranking.top(2))


@pytest.mark.parametrize(
    ("picture", "name", "image_id"),
    [
        ("coco:581857", "a.png", 581857),
        ("", "COCO_train2014_000000000009.jpg", 9),
        ("", "COCO_train2014_9.jpg", 1),
        ("flickr:7", "7.jpg", 1),
    ],
)
def test_images_keep_their_coco_ids(picture, name, image_id, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    sample = Sample(tmp_path / name, "it", id="a", picture=picture)
    data = to_coco([Prediction("a", (0, 0, 4, 4), 0.5)], {"a": sample})
    assert [image["id"] for image in data["images"]] == [data["annotations"][0]["image_id"]] == [image_id]


def test_head_lists_of_the_published_code_and_of_gaze_heads_are_read(tmp_path):
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


def test_heads_json_is_read(ranking, tmp_path):
    path, _ = save_ranking(ranking, tmp_path)
    assert load_head_list(path) == [head.address for head in ranking.kept]
    assert lh.load_heads(path).top(2) == ranking.top(2)


@pytest.mark.parametrize(
    ("data", "message"),
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
def test_invalid_scores_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        read_scores(data)


def head_entry(layer, head):
    return {
        "layer": layer, "head": head, "selection_frequency": 0.5, "selection_frequency_std": 0, "attention_sum": 0.5,
        "spatial_entropy": None,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["heads.json", "list", "mapping"])
def test_a_duplicate_at_the_end_of_a_long_file_is_found_at_once(form, ranking, tmp_path):
    """Comparing all pairs of heads would take minutes here."""
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


@pytest.mark.parametrize("text", ["14-24", "L14H24", "L14 H24", " l14 - h24 ", "14,24", "14:24", "14  24", "14h24"])
def test_a_heads_name_has_several_forms(text):
    assert Head.parse(text) == Head(14, 24)


@pytest.mark.parametrize(
    "text", ["", "1424", "14--24", "H24", "L14", "14-24-3", "1" * 40_000, " " * 40_000, "14-" + "2" * 40_000]
)
def test_what_is_no_head_is_refused_at_once(text):
    """A quadratic pattern took minutes for 40,000 digits."""
    started = time.process_time()
    with pytest.raises(ValueError, match="names no head") as caught:
        Head.parse(text)
    assert time.process_time() - started < 1 and len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1" * 10_000_000}, "version"),
        ({"tau": [0] * 1_000_000}, "tau"),
        ({"criteria": {"tau": [0] * 1_000_000}}, "criteria: tau cannot be"),
        ({"criteria": {"entropy": "a" * 1_000_000}}, "criteria: entropy cannot be"),
        ({"spread": {"a": "b" * 1_000_000}}, "spread"),
    ],
)
def test_errors_in_heads_json_are_short(change, message, ranking, tmp_path):
    (tmp_path / "heads.json").write_text(json.dumps({**ranking.to_json(), **change}))
    with pytest.raises(UsageError, match=message) as caught:
        load_head_list(tmp_path / "heads.json")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_coco_has_boxes_masks_and_shared_images(image, mask):
    samples = {id: Sample(image, f"the {id}", id=id) for id in ("a", "b", "c")}
    predictions = [
        Prediction("a", BOX, 0.5, encode_mask(mask)),
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


def test_coco_has_every_box_of_an_expression(image):
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


def test_pycocotools_reads_the_export(image, mask, tmp_path):
    prediction = Prediction("a", BOX, 0.5, encode_mask(mask))
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(to_coco([prediction], {"a": Sample(image, "it", id="a")})))
    coco = COCO(str(file))
    (annotation,) = coco.loadAnns(coco.getAnnIds())
    assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)


def test_supervision_has_boxes_masks_and_names(grounding):
    pytest.importorskip("supervision")
    found = detections.to_supervision([grounding, grounding], ["dog", "cat"])
    assert np.allclose(found.xyxy, [grounding.box] * 2)
    assert np.array_equal(found.mask[1], grounding.mask)
    assert found.confidence == pytest.approx([grounding.score] * 2)
    assert list(found["class_name"]) == ["dog", "cat"]
    assert len(detections.to_supervision([])) == 0
    with pytest.raises(ValueError, match="1 expressions for 2"):
        detections.to_supervision([grounding, grounding], ["dog"])


@pytest.mark.parametrize(
    ("extra", "export"),
    [
        ("supervision", lambda: detections.to_supervision([])),
        ("fiftyone", lambda: detections.to_fiftyone([], {})),
    ],
)
def test_a_missing_extra_says_how_to_install_it(extra, export, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(UsageError, match=rf"pip install 'localization-heads\[{extra}\]'"):
        export()


class FakeSample(dict):
    def __init__(self, filepath):
        super().__init__(filepath=filepath)


class FakeDataset:
    def __init__(self, name):
        self.name, self.samples = name, []

    def add_samples(self, samples):
        self.samples += samples


def test_fiftyone_gets_relative_boxes_and_cropped_masks(image, mask, monkeypatch):
    """With fakes of the four classes that are used; the samples were also made with FiftyOne 1.22 itself."""
    classes = {"Dataset": FakeDataset, "Sample": FakeSample, "Detection": SimpleNamespace}
    fake = SimpleNamespace(**classes, Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    samples = {id: Sample(image, id, id=id, bbox=(0.0, 0.0, 40.0, 10.0)) for id in "ab"}
    predictions = [Prediction(id, BOX, 0.5, encode_mask(mask)) for id in "ab"]
    (sample,) = detections.to_fiftyone(predictions, samples, "mine").samples
    first, second = sample["predictions"].detections
    assert (first.label, second.label) == ("a", "b")
    assert first.bounding_box == [0.25, 0.25, 0.5, 0.25]
    assert first.mask.shape == (5, 20) and first.mask.all()
    assert sample["ground_truth"].detections[0].bounding_box == [0.0, 0.0, 1.0, 0.5]


def test_pipeline_output_has_the_format_of_transformers(grounding):
    output = answer_of(grounding, "dog")
    x0, y0, x1, y1 = grounding.box
    assert output["box"] == {"xmin": round(x0), "ymin": round(y0), "xmax": round(x1), "ymax": round(y1)}
    assert output["mask"].mode == "L"
    assert np.array_equal(np.asarray(output["mask"]) == 255, grounding.mask)
    assert (output["label"], output["score"]) == ("dog", grounding.score)


def test_the_pipeline_returns_the_results_of_ground():
    pipe = lh.pipeline()
    path = "examples/images/cat.jpg"
    first, second = pipe(path, ["cat", "the cat"])
    assert first["box"] == answer_of(lh.ground(pipe.lvlm, path, "cat"), "cat")["box"]
    assert [output["label"] for output in pipe(path, "cat; the cat")] == ["cat", second["label"]]
    assert pipe(load_image(path), "cat")["score"] == pytest.approx(first["score"], abs=1e-5)
    assert lh.pipeline(pipe.lvlm).lvlm is pipe.lvlm


class FakeApi:
    """Stands in for `HfApi` and records what is uploaded."""

    error: Exception | None = None

    def __init__(self, token=None):
        self.files = {}

    def create_repo(self, repository, private, exist_ok):
        if self.error:
            raise self.error

    def create_commit(self, repository, additions, commit_message):
        type(self).uploaded = {a.path_in_repo: a.path_or_fileobj for a in additions}
        return SimpleNamespace(commit_url=f"hub/{repository}/commit/1")


def test_pushed_heads_can_be_loaded(ranking, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert lh.push_heads(ranking, "me/heads") == "hub/me/heads/commit/1"
    (tmp_path / "heads.json").write_bytes(FakeApi.uploaded["heads.json"])
    downloads = []

    def download(repository, name, **options):
        downloads.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert lh.load_heads("me/heads").top(3) == ranking.top(3)
    assert resolve_heads("me/heads", 2) == tuple(ranking.top(2))
    assert downloads == [("me/heads", "heads.json")] * 2
    warnings = []
    lvlm = SimpleNamespace(
        attend_batch=None,
        num_layers=99,
        num_heads=99,
        warn_of_other_conditions=lambda *arguments: warnings.append(arguments),
    )
    downloads.clear()
    assert grounder_of(lvlm, "me/heads", CriteriaOptions(), None, None, 2).heads == tuple(ranking.top(2))
    assert len(downloads) == 1 and warnings == [("heads=me/heads", ranking.found_with)]
    card = FakeApi.uploaded["README.md"].decode()
    assert 'base_model: "org/model"' in card
    assert 'lh.load_heads("me/heads")' in card


def test_a_refused_upload_is_one_line(ranking, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "error", OSError("401 Unauthorized\nlong tail"))
    with pytest.raises(WorkError, match=r"me/heads cannot be written \(401 Unauthorized\)"):
        lh.push_heads(ranking, "me/heads")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("localization_heads.lvlm.checkpoints.sources.hub_unreachable_reason", lambda: "no network")
    with pytest.raises(WorkError, match="neither a local file nor available from the hub"):
        lh.load_heads("nobody-at-all/no-such-heads")


@pytest.mark.parametrize("name", ["auto", "greedy", "a/b/c", "../heads", "user/heads.json", "3-4", "user/"])
def test_these_names_are_no_repository(name):
    assert not hub.is_repository(name)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_figures(monkeypatch)


def test_export_writes_predictions_and_heads(front):
    data = write_data(front.folder, 3)
    front.succeed(f"data_file={data}")
    assert "predictions_coco.json" in front.succeed("stage=export", f"data_file={data}").out
    coco = front.json("predictions_coco.json")
    for annotation, line in zip(coco["annotations"], front.lines(), strict=True):
        x, y, width, height = annotation["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(line["bbox"])
        assert annotation["sample_id"] == line["id"]
    ranked = front.json("heads.json")["heads"]
    scores = front.json("heads_scores.json")
    assert scores == [[h["layer"], h["head"], h["selection_frequency"]] for h in ranked]
    gaze = front.json("heads_gaze.json")
    assert [[head["layer"], head["head"], head["score"]] for head in gaze] == scores
    mapping = front.json("heads_sparsemm.json")
    assert list(mapping) == [f"{layer}-{head}" for layer in range(6) for head in range(8)]
    assert all(mapping[f"{layer}-{head}"] == [score] for layer, head, score in scores)
    results = str(front.out / "predictions_coco_results.json")
    loaded = COCO(front.out / "predictions_coco.json").loadRes(results).anns.values()
    assert [entry["bbox"] for entry in loaded] == [entry["bbox"] for entry in coco["annotations"]]
    front.succeed("stage=ground", f"data_file={data}", f"heads={front.out / 'heads_scores.json'}", "k=2")
    assert front.lines()[0]["heads"] == [row[:2] for row in scores[:2]]


def test_export_needs_predictions_of_its_data_file(front):
    assert "run stage=batch first" in front.error("stage=export")
    data = write_data(front.folder, 2)
    front.succeed("stage=ground", f"data_file={data}")
    (front.folder / "other.jsonl").write_text(data.read_text().replace("entry_", "other_"))
    assert "name the data_file" in front.error("stage=export", "data_file=other.jsonl")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0, 0, 5, 0, 5, 5]], "line 1: .*'mask' must be COCO RLE"),
        ({"size": [0, 5], "counts": "0"}, "line 1: .*'size' must be"),
        ({"size": ["a", 5], "counts": "0"}, "line 1: .*'size' must be"),
        ({"size": [10**6, 10**6], "counts": "0"}, "line 1: .*over the limit"),
        ({"size": [5, 5], "counts": "0"}, "the prediction of 'entry_0'"),
        ({"size": [5, 5], "counts": "\x00\xff"}, "the prediction of 'entry_0'"),
    ],
)
def test_a_bad_mask_is_refused_in_one_line(mask, message, front):
    data = write_data(front.folder, 1)
    line = {"id": "entry_0", "bbox": [0, 0, 1, 1], "score": 0.5, "mask": mask, "heads": [], "error": None}
    front.out.mkdir(parents=True, exist_ok=True)
    (front.out / "predictions.jsonl").write_text(json.dumps(line))
    assert re.search(message, front.error("stage=export", f"data_file={data}"))
