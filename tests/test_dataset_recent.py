"""The newer benchmarks in their published formats: boxes, zero or several targets, hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localization_heads.data.masks import read_mask
from localization_heads.data.samples import load_samples
from localization_heads.datasets.base import BadRecord
from localization_heads.datasets.flickr30k import read_boxes
from localization_heads.datasets.refcoco import target_ids
from localization_heads.datasets.source import OPENERS, open_source
from localization_heads.errors import BadLineError, UsageError
from localization_heads.evaluation.protocols import PROTOCOLS, protocol_of
from tests.dataset_files import image_bytes, save_rows
from tests.recent_files import (
    SCREENSPOT,
    save_finecops,
    save_flickr30k,
    save_grefcoco,
    save_groundingme,
    save_image,
    save_json,
    save_ref_l4,
    save_screenspot,
    save_screenspot_pro,
)

SAVED = {
    "ref-l4": save_ref_l4,
    "grefcoco": save_grefcoco,
    "screenspot": save_screenspot,
    "screenspot-v2": lambda root: save_screenspot(root, "_v2"),
    "screenspot-pro": lambda root: save_screenspot_pro(root, (384, 216)),
    "groundingme": save_groundingme,
    "finecops-ref": save_finecops,
    "flickr30k": save_flickr30k,
}


def read(dataset, path, images=None):
    """The index, and the records by row."""
    source = open_source(dataset, path, images)
    index = source.index()
    rows = sorted({entry.row for entry in index.entries})
    return index, dict(zip(rows, source.records(rows), strict=True))


def test_ref_l4_records(tmp_path):
    index, found = read("ref-l4", save_ref_l4(tmp_path))
    assert [(e.id, e.split, e.picture) for e in index.entries] == [
        ("row0", "val", "coco:20"),
        ("row1", "val", "coco:20"),
        ("row2", "val", "objects365:objects365_v1_00000001"),
    ]
    assert index.entries[0].text == "The caf\xe9's \u201cblue\u201d vase."
    assert found[0].box == (10.0, 10.0, 30.0, 25.5) and found[2].box == (100.0, 50.0, 300.0, 150.0)
    category = {"ori_category_id": "refcoco_1", "category": "o365_1"}  # "person" in COCO and Objects365
    assert found[1].extra == {"source_id": 2, **category, "is_rewrite": True}


def test_image_name_outside_the_data_set_is_rejected(tmp_path):
    for name in ("../../etc/passwd", "/etc/passwd", "a\\..\\b.jpg", "", None):
        index, found = read("ref-l4", save_ref_l4(tmp_path, file_name=name))
        assert 1 not in found or isinstance(found[1], BadRecord), name
        assert len(index.entries) + len(index.failures) == 3


def test_ref_l4_reports_missing_images(tmp_path):
    (save_ref_l4(tmp_path) / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"images= is missing: name the folder of the \(unpacked\) images"):
        open_source("ref-l4", tmp_path, None)
    _, found = read("ref-l4", tmp_path, tmp_path / "elsewhere")
    assert found[0].image.is_file()


def test_grefcoco_has_zero_one_or_several_targets(tmp_path):
    index, found = read("grefcoco", save_grefcoco(tmp_path))
    assert [(e.id, e.split) for e in index.entries] == [
        ("ref0_sent0", "val"), ("ref1_sent10", "val"), ("ref2_sent20", "val"), ("ref3_sent30", "val"),
        ("ref5_sent50", "testA"),
    ]  # fmt: skip
    first, second, both, none = (found[n] for n in range(4))
    assert first.box == (10.0, 10.0, 25.0, 25.5) and second.box == (30.0, 10.0, 45.0, 25.5)
    assert both.boxes == (first.box, second.box) and both.box is None
    expected = read_mask(first.mask, both.size) | read_mask(second.mask, both.size)
    assert (read_mask(both.mask, both.size) == expected).all() and expected.any()
    assert none.absent and not none.boxes and first.mask and not first.absent
    assert {bad.id for bad in index.failures_of("val")} == {"ref1_sent11", ""} and len(index.failures_of("testA")) == 0


@pytest.mark.parametrize("ann_id", [None, "7", [], [-1, 7], [7, -1], -2, [True], 1.5, [[7]]])
def test_invalid_target_ids_are_rejected(ann_id):
    with pytest.raises(BadLineError, match="ann_id must be"):
        target_ids({"ann_id": ann_id})


def test_contradictory_no_target_is_rejected():
    assert target_ids({"ann_id": -1, "no_target": True}) == []
    for ref in ({"ann_id": [-1], "no_target": False}, {"ann_id": 7, "no_target": True}):
        with pytest.raises(BadLineError, match="contradicts"):
            target_ids(ref)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_screenspot_json_boxes_are_xywh(tmp_path, version):
    other = {"": "_v2", "_v2": ""}[version]
    save_screenspot(tmp_path, version)
    save_json(tmp_path / f"screenspot_web{other}.json", "the other version is not read")
    index, found = read(f"screenspot{version.replace('_', '-')}", tmp_path)
    assert {entry.split for entry in index.entries} == {"test"} and len(found) == 3
    assert all(record.box == (30.0, 20.0, 40.0, 40.0) for record in found.values())
    assert [record.extra["platform"] for record in found.values()] == ["desktop", "mobile", "web"]
    assert index.entries[0].picture == "screenspot:desktop_3b0ad239.png"


def test_screenspot_parquet_boxes_are_normalised(tmp_path):
    image = {"bytes": image_bytes((96, 54), 1, "PNG"), "path": None}
    row = {
        "file_name": "a.png",
        "instruction": "close",
        "data_type": "icon",
        "data_source": "ios",
        "image": image,
    }
    boxes = [[0.25, 0.5, 0.5, 1.0], [24.0, 27.0, 48.0, 54.0]]
    save_rows(tmp_path / "test-00000-of-00001.parquet", [{**row, "bbox": box} for box in boxes], SCREENSPOT)
    _, found = read("screenspot", tmp_path)
    assert found[0].box == (24.0, 27.0, 48.0, 54.0)
    assert found[0].extra == {"data_type": "icon", "data_source": "ios"}
    assert isinstance(found[1], BadRecord) and "from 0 to 1" in found[1].reason


def test_screenspot_pro_boxes_are_xyxy(tmp_path):
    index, found = read("screenspot-pro", save_screenspot_pro(tmp_path))
    assert found[0].box == (3000.0, 2000.0, 3040.0, 2030.0) and found[0].size == (3840, 2160)
    assert found[0].image.is_file()
    assert found[0].extra["group"] == "Dev" and found[0].extra["platform"] == "macos"
    assert index.entries[0].text == "refresh the file explorer"


def test_groundingme_rejections_are_absent(tmp_path):
    index, found = read("groundingme", save_groundingme(tmp_path))
    assert found[0].box == (10.0, 10.0, 30.0, 25.5) and found[0].size == (64, 48)
    assert found[1].absent and found[1].box is None and found[1].extra["subtask_l1"] == "Rejection"
    assert isinstance(found[3], BadRecord) and [bad.id for bad in index.failures] == ["row2"]


def test_finecops_negatives_are_absent(tmp_path):
    index, found = read("finecops-ref", save_finecops(tmp_path))
    assert [entry.picture for entry in index.entries] == [
        "gqa:2370799", "gqa:2370799", "gqa:neg_17", "gqa:2370799",
    ]  # fmt: skip
    assert found[0].box == (10.0, 10.0, 30.0, 25.5) and not found[0].absent
    assert found[0].extra["source_id"] == 1
    assert found[1].absent and found[2].absent and found[1].extra["positive_id"] == 1
    assert found[2].image == tmp_path / "final_neg_images" / "neg_17.jpg" and isinstance(found[3], BadRecord)


def test_flickr30k_boxes_count_from_one(tmp_path):
    index, found = read("flickr30k", save_flickr30k(tmp_path))
    assert [(entry.id, entry.text) for entry in index.entries] == [
        ("36979_phrase0", "A girl"),
        ("36979_phrase1", "red shoes"),
        ("36979_phrase4", "Her left foot"),
        ("36979_phrase5", "the ni\xf1a"),
    ]
    girl, shoes, foot, again = found.values()
    assert girl.box == again.box == (0.0, 10.0, 30.0, 25.0)
    assert shoes.boxes == ((4.0, 4.0, 14.0, 14.0), (39.0, 4.0, 49.0, 14.0)) and shoes.box is None
    assert foot.box == shoes.boxes[1] and foot.extra["phrase_type"] == "bodyparts"


BAD_XML = {
    "entities": '<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>',
    "broken": "<annotation>",
    "not a number": "<a><object><name>1</name><bndbox><xmin>x</xmin></bndbox></object></a>",
    "too large": "<a>" + "<b/>" * 300_000 + "</a>",
}


@pytest.mark.parametrize("content", BAD_XML.values(), ids=BAD_XML)
def test_invalid_xml_loses_only_its_image(tmp_path, content):
    root = save_flickr30k(tmp_path)
    (root / "Sentences" / "1.txt").write_text("[/EN#1/people A girl]")
    (root / "Annotations" / "1.xml").write_text(content)
    (root / "val.txt").write_text("1\n36979\n../x\n")
    with pytest.raises(UsageError):
        read_boxes(root / "Annotations" / "1.xml")
    index, found = read("flickr30k", root)
    assert [bad.id for bad in index.failures] == ["1", "../x"] and len(found) == 4


@pytest.mark.parametrize("dataset", OPENERS)
def test_missing_files_are_reported(tmp_path, dataset):
    with pytest.raises(UsageError, match="dataset_path="):
        open_source(dataset, tmp_path, None)
    with pytest.raises(UsageError):
        open_source(dataset, save_image(tmp_path / "a.png"), None)


@pytest.mark.parametrize("dataset", OPENERS)
def test_hostile_json_is_rejected(tmp_path, dataset):
    root = SAVED[dataset](tmp_path)
    files = [file for file in root.rglob("*.json") if file.name != "instances.json"]
    for content in ('{"a": 1}', "[" * 100_000, "[1, null, [], {}]"):
        for file in files:
            file.write_text(content)
        try:
            index, _ = read(dataset, root)
        except UsageError:
            continue
        assert not files or not index.entries


@pytest.mark.parametrize("dataset", OPENERS)
def test_prepare_writes_each_benchmark(front, dataset):
    root = SAVED[dataset](Path("data"))
    images = ("images=data/train2014",) if dataset == "grefcoco" else ()
    result = front.finder("stage=prepare", f"dataset={dataset}", f"dataset_path={root}", *images)
    assert "Traceback" not in result.err and result.status in (0, 1), result.err
    (file,) = Path("outputs/datasets").glob("*.jsonl")
    read_back = load_samples(file)
    assert read_back.samples and not read_back.bad
    protocol = protocol_of([sample.facts for sample in read_back.samples])
    assert protocol in PROTOCOLS and json.loads(file.with_suffix(".json").read_text())["protocol"] == protocol
    assert f"protocol {protocol}" in result.out
    assert result.status == (1 if dataset in ("grefcoco", "groundingme", "finecops-ref") else 0)


def test_evaluate_uses_the_protocol_of_the_file(front):
    """gRefCOCO, with one, several and no targets."""
    save_grefcoco(Path("data"))
    front.finder("stage=prepare", "dataset=grefcoco", "dataset_path=data", "images=data/train2014", "split=val")
    data = "data_file=outputs/datasets/grefcoco-val.jsonl"
    result = front.finder("stage=evaluate", data, "controls=false", "report=false", "visualize_batch=false")
    metrics = front.json("metrics.json")
    found = metrics["protocol"]
    assert metrics["choices"]["protocol"] == found["name"] == "grefcoco" and "Protocol grefcoco" in result.out
    assert found["n_acc"] == 0.0 and found["t_acc"] == 1.0 and found["num_answers"] == 4
    assert 0 <= found["pr@f1=1"] <= 0.75
    assert 0 < found["giou"] < 0.75 and found["giou[empty]"] == 0.0 and found["ciou"] > 0
