"""`stage=prepare` from the command line: data files, sampling, images, leakage, protocols, and their evaluation."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from localization_heads import hub
from localization_heads.data.masks import encode_mask, read_mask
from localization_heads.data.samples import Sample, decode_ignored, load_samples
from localization_heads.datasets import prepare
from localization_heads.datasets.base import IndexEntry
from localization_heads.datasets.leakage import image_keys
from localization_heads.datasets.prepare import draw_entries
from localization_heads.datasets.source import OFFICIAL_COUNTS, Counts
from localization_heads.evaluation.judging import overlap_of_all
from localization_heads.lvlm.checkpoints.spec import compose_spec, find_spec
from localization_heads.stages import run as stages_run
from tests.dataset_files import (
    LMMS,
    RICKY,
    Ref,
    lmms_row,
    ricky_row,
    save_images,
    save_jxu,
    save_lisa,
    save_lmms,
    save_refer,
    save_rows,
    shape,
    world,
)
from tests.front import read_lines

OUT = Path("outputs/datasets")
EVALUATE = ("stage=evaluate", "visualize_batch=false", "worst=0", "report=false")


@pytest.fixture
def front(front):
    save_refer(Path("refer/refcoco"), world())
    save_images(Path("train2014"), world())
    return front


def prepared(front, *options, dataset="refcoco", path="refer"):
    return front.finder("stage=prepare", f"dataset={dataset}", f"dataset_path={path}", "images=train2014", *options)


def lines(name):
    return read_lines(OUT / name)


def corners(low, high):
    return (low, low), (high, low), (high, high), (low, high)


def write_refs(refs):
    """Replace the references by these dicts."""
    Path("refer/refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, 2))


def test_val_is_written_in_full_and_can_be_evaluated(front):
    result = prepared(front)
    assert result.status == 0 and "2 expressions for 1 references" in result.out
    first, second = lines("refcoco-val.jsonl")
    assert first["id"] == "ref10_sent100" and second["prompt"] == "vase"
    assert first["bbox"] == [10.0, 10.0, 60.0, 44.0] and first["picture"] == "coco:20"
    ref = world()[9]
    np.testing.assert_array_equal(read_mask(first["mask"], ref.size), read_mask(ref.segmentation, ref.size))
    file = load_samples(OUT / "refcoco-val.jsonl")
    assert not file.bad and [sample.picture for sample in file.entries] == ["coco:20"] * 2
    result = front.finder(*EVALUATE, f"data_file={OUT}/refcoco-val.jsonl")
    assert result.status == 0
    metrics = front.json("metrics.json")
    assert metrics["num_samples"] == metrics["num_masks"] == 2


def test_boxes_that_are_not_in_pixels_are_rejected(front):
    """Here they are from 0 to 1."""
    refs = [replace(ref, bbox=(0.1, 0.2, 0.3, 0.4)) for ref in world()]
    save_refer(Path("refer/refcoco"), refs)
    result = prepared(front)
    assert result.status == 2
    assert "dataset_path=refer: all 1 boxes lie within the first pixel: they look like 0 to 1" in result.err
    assert not (OUT / "refcoco-val.jsonl").exists()


def test_metadata_records_the_source_files(front):
    prepared(front, "split=train", "num_samples=5", "random_seed=7")
    metadata = json.loads((OUT / "refcoco-train-5-seed7.json").read_text())
    assert metadata["num_samples"] == 5 and metadata["random_seed"] == 7 and metadata["split"] == "train"
    assert (metadata["expressions"], metadata["failed"], metadata["excluded"]) == (5, 0, 0)
    for file, source in zip(metadata["files"], ("refs(unc).p", "instances.json"), strict=True):
        content = (Path("refer/refcoco") / source).read_bytes()
        assert file == {"name": source, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_sample_is_reproducible_across_runs_and_formats(front):
    options = ("split=train", "num_samples=6")
    prepared(front, *options)
    first = (OUT / "refcoco-train-6-seed42.jsonl").read_bytes()
    prepared(front, *options)
    assert (OUT / "refcoco-train-6-seed42.jsonl").read_bytes() == first
    save_jxu(Path("jxu"), world())
    prepared(front, *options, path="jxu")
    assert (OUT / "refcoco-train-6-seed42.jsonl").read_bytes() == first
    prepared(front, *options, "random_seed=1")
    assert (OUT / "refcoco-train-6-seed1.jsonl").read_bytes() != first


def test_samples_are_random_nested_and_ordered():
    entries = [IndexEntry(f"e{n}", "train", "p", "t", n) for n in range(1000)]
    drawn = draw_entries(entries, 100, 42)
    assert len(drawn) == 100 and drawn == sorted(drawn, key=lambda entry: entry.row)
    assert set(draw_entries(entries, 30, 42)) < set(drawn)
    assert draw_entries(list(reversed(entries)), 100, 42) == list(reversed(drawn))
    assert abs(np.mean([entry.row for entry in drawn]) - 500) < 4 * 1000 / np.sqrt(12 * 100)
    overlap = len(set(drawn) & set(draw_entries(entries, 100, 43)))
    assert overlap < 30  # 10 are expected
    assert draw_entries(entries, 2000, 42) == entries


def test_evaluation_split_is_sampled_if_num_samples_is_given(front):
    prepared(front, "num_samples=1")
    assert len(lines("refcoco-val-1-seed42.jsonl")) == 1


def test_missing_images_are_reported_by_reason(front):
    Path("train2014/COCO_train2014_000000000002.jpg").unlink()
    Path("train2014/COCO_train2014_000000000003.jpg").write_bytes(b"not an image")
    Image.new("RGB", (48, 64)).save("train2014/COCO_train2014_000000000004.jpg")
    result = prepared(front, "split=train")
    assert result.status == 1 and "7 expressions could not be used, for 3 reasons" in result.out
    for words in (
        "000000000002.jpg: no such file",
        "not an image in a known format",
        "48 x 64 pixels, the source says 64 x 48",
    ):
        assert words in result.out
    assert len(lines("refcoco-train-1000-seed42.jsonl")) == 18 - 7
    assert json.loads((OUT / "refcoco-train-1000-seed42.json").read_text())["failed"] == 7


def test_no_usable_image_is_an_error_without_output(front):
    Path("empty").mkdir()
    result = prepared(front, "images=empty", "split=train")
    assert result.status == 1 and "none of 18 expressions" in result.err and "no such file" in result.err
    assert not list(OUT.glob("*.json*"))


def test_unofficial_counts_are_reported(front, monkeypatch):
    assert "val has 1 references and 2 expressions here, 3811 and 10834 in papers" in prepared(front).err
    monkeypatch.setitem(OFFICIAL_COUNTS, ("refcoco", "val"), Counts(1, 2))
    assert "in papers" not in prepared(front).err


def test_images_in_parquet_are_written_to_files(front):
    save_lmms(Path("lmms"), [ref for ref in world() if ref.split == "val"] * 2)
    result = prepared(front, path="lmms")
    assert result.status == 0 and "8,811" in result.err
    written = lines("refcoco-lmms-val.jsonl")
    assert len(written) == 4 and len({line["id"] for line in written}) == 4
    (image,) = (OUT / "images").iterdir()
    assert {line["image_path"] for line in written} == {f"images/{image.name}"}
    assert image.stem == hashlib.sha256(image.read_bytes()).hexdigest()[:32]
    assert not load_samples(OUT / "refcoco-lmms-val.jsonl").bad


def test_invalid_image_bytes_are_not_written(front):
    rows = [lmms_row(ref) for ref in world()[9:]]
    rows[0]["image"] = {"bytes": b"#!/bin/sh", "path": "../../run.sh"}
    rows[1]["image"] = {"bytes": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "path": None}
    save_rows(Path("lmms/val-00000-of-00001.parquet"), rows, LMMS)
    result = prepared(front, path="lmms")
    assert result.status == 1 and "3 expressions could not be used" in result.out
    assert len(list((OUT / "images").iterdir())) == 1 and not Path("run.sh").exists()


def test_oversized_image_is_not_decoded(front, monkeypatch):
    save_lmms(Path("lmms"), world())
    monkeypatch.setattr("localization_heads.data.images.MAX_PIXELS", 100)
    result = prepared(front, path="lmms")
    assert result.status == 1 and "over the limit" in result.err and not (OUT / "images").exists()


def test_reasonseg_keeps_ignored_pixels(front):
    shapes = [shape("target", *corners(2, 40)), shape("ignore", *corners(10, 20))]
    save_lisa(Path("rs/val"), "one", {"text": ["what is wet?"], "is_sentence": True, "shapes": shapes})
    assert prepared(front, dataset="reasonseg", path="rs").status == 0
    (line,) = lines("reasonseg-val.jsonl")
    assert line["bbox"] == [2.0, 2.0, 41.0, 41.0] and line["is_sentence"] is True
    (sample,) = load_samples(OUT / "reasonseg-val.jsonl").entries
    assert decode_ignored(sample, (64, 48)).sum() == 11 * 11
    assert read_mask(sample.mask, (64, 48)).sum() == 39 * 39 - 11 * 11


def test_ignored_pixels_are_not_scored(front):
    """If every pixel outside the prediction is ignored, the mask is entirely correct."""
    image, size = Path("train2014/COCO_train2014_000000000001.jpg"), (64, 48)
    everything = {"size": [48, 64], "counts": [0, 48 * 64]}
    line = {"id": "a", "prompt": "the lady", "image_path": str(image), "mask": everything}
    Path("d.jsonl").write_text(json.dumps(line))
    front.finder(*EVALUATE, "data_file=d.jsonl")
    plain = front.json("metrics.json")["ciou"]
    (prediction,) = front.lines()
    predicted = read_mask(prediction["mask"], size)
    assert plain == pytest.approx(predicted.mean(), abs=1e-6) and 0 < plain < 1
    Path("d.jsonl").write_text(json.dumps({**line, "ignore": encode_mask(~predicted)}))
    front.finder(*EVALUATE, "data_file=d.jsonl")
    assert front.json("metrics.json")["ciou"] == 1.0


def test_reasonseg_parquet_is_written(front):
    mask = np.zeros((48, 64), bool)
    mask[5:9, 7:20] = True
    save_rows(Path("ReasonSeg_val/data/test-00000-of-00001.parquet"), [ricky_row("x", "why?", mask)], RICKY)
    result = prepared(front, dataset="reasonseg", path="ReasonSeg_val")
    assert result.status == 0 and "do not mark the regions that LISA ignores" in result.err
    (line,) = lines("reasonseg-parquet-val.jsonl")
    assert line["bbox"] == [7.0, 5.0, 20.0, 9.0]
    np.testing.assert_array_equal(read_mask(line["mask"], (64, 48)), mask)


# --- leakage ---------------------------------------------------------------------------------------------------


def test_training_sample_that_shares_evaluation_images_is_refused(front):
    """As in the google partition, which splits objects rather than images."""
    save_refer(Path("g"), [*world(), Ref(50, 1, "val", ("her hat",))], "google")
    result = prepared(front, "split=train", path="g")
    assert result.status == 2 and "1 of refcoco val" in result.err and "allow_leakage=true" in result.err
    assert not (OUT / "refcoco-google-train-1000-seed42.jsonl").exists()
    result = prepared(front, "split=train", "allow_leakage=true", path="g")
    assert result.status == 0
    assert json.loads((OUT / "refcoco-google-train-1000-seed42.json").read_text())["allow_leakage"] is True


def test_images_of_a_prepared_benchmark_are_refused_or_excluded(front):
    """RefCOCOg's evaluation splits contain training images of RefCOCO."""
    save_refer(Path("refer/refcocog"), [Ref(0, 1, "val", ("a lady",)), Ref(1, 5, "test", ("a thing",))], "umd")
    for split in ("val", "test"):
        assert prepared(front, f"split={split}", dataset="refcocog").status == 0
    result = prepared(front, "split=train")
    assert result.status == 2 and "1 of refcocog-test.jsonl, 1 of refcocog-val.jsonl" in result.err
    exclude = f"exclude=[{OUT}/refcocog-val.jsonl,{OUT}/refcocog-test.jsonl]"
    assert prepared(front, "split=train", exclude).status == 0
    assert {line["picture"] for line in lines("refcoco-train-1000-seed42.jsonl")} == {
        "coco:2", "coco:3", "coco:4", "coco:6",
    }  # fmt: skip
    assert json.loads((OUT / "refcoco-train-1000-seed42.json").read_text())["excluded"] == 3 + 4


def test_exclude_takes_one_prepared_file(front):
    prepared(front)
    assert prepared(front, "split=train", f"exclude={OUT}/refcoco-val.jsonl").status == 0
    Path("own.jsonl").write_text('{"id": "a", "prompt": "x", "image_path": "a.png"}\n')
    result = prepared(front, "split=train", "exclude=own.jsonl")
    assert result.status == 2 and "own.jsonl: line 1 names no image" in result.err
    assert prepared(front, "split=train", "exclude=gone.jsonl").status == 2
    assert prepared(front, "exclude=[outputs/datasets/refcoco-val.jsonl]").status == 2  # nothing remains


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("discovered") / "once"


@pytest.fixture
def discovered(front, kept):
    """Heads found on a prepared training sample, once for all tests and copied for each."""
    if not kept.exists():
        prepared(front, "split=train", "num_samples=4")
        front.finder("stage=find", f"data_file={OUT}/refcoco-train-4-seed42.jsonl", "num_samples=4")
        shutil.copytree("outputs", kept)
    shutil.copytree(kept, "outputs", dirs_exist_ok=True)
    return front


def test_heads_json_records_pictures(discovered):
    names = {line["picture"] for line in lines("refcoco-train-4-seed42.jsonl")}
    assert discovered.json("heads.json")["pictures"] == sorted(names)


def evaluated(front, data_file, *options):
    heads = f"heads={front.out}/heads.json"
    return front.finder(*EVALUATE, f"data_file={data_file}", heads, "k=1", *options)


def test_evaluate_refuses_images_the_heads_were_found_on(discovered):
    prepared(discovered)
    assert evaluated(discovered, OUT / "refcoco-val.jsonl").status == 0
    result = evaluated(discovered, OUT / "refcoco-train-4-seed42.jsonl")
    assert result.status == 2 and "allow_leakage=true" in result.err
    assert "4 of the 4 entries show images" in result.err
    assert evaluated(discovered, OUT / "refcoco-train-4-seed42.jsonl", "allow_leakage=true").status == 0


def test_experiments_refuse_images_the_heads_were_found_on(discovered, monkeypatch):
    data = f"data_file={OUT}/refcoco-train-4-seed42.jsonl"
    rung = ("stage=experiment", "experiment=ladder", "rung=fixed", "k=1", data)
    named = f"heads={discovered.out}/heads.json"
    fig3 = discovered.finder("stage=experiment", "experiment=fig3", data, named)  # uses no ground truth
    assert fig3.status == 0
    # A model without published heads: heads=auto takes its latest heads.json.
    monkeypatch.setattr(stages_run, "find_spec", lambda name: replace(find_spec(name), heads=(), lists=()))
    monkeypatch.setattr(stages_run, "compose_spec", lambda *a: replace(compose_spec(*a), heads=(), lists=()))
    for command in (("stage=experiment", "experiment=tab1", data, named), (*rung, named), rung):
        result = discovered.finder(*command)
        assert result.status == 2 and "4 of the 4 entries show images" in result.err, command
    assert discovered.finder(*rung, "allow_leakage=true", "controls=false").status == 0


def test_leakage_is_checked_for_heads_on_the_hub(discovered, monkeypatch):
    path = discovered.out / "heads.json"
    monkeypatch.setattr(hub, "_download", lambda *_: path)
    result = discovered.finder(
        "stage=evaluate", f"data_file={OUT}/refcoco-train-4-seed42.jsonl", "heads=someone/heads", "k=1"
    )
    assert result.status == 2 and "that someone/heads was found on" in result.err


def test_leakage_is_checked_by_file_content(discovered):
    path = discovered.out / "heads.json"
    content = json.loads(path.read_text())
    for images in ("coco:1", [1], {"a": 1}):
        path.write_text(json.dumps({**content, "pictures": images}))
        result = evaluated(discovered, OUT / "refcoco-train-4-seed42.jsonl")
        assert result.status == 2 and "'pictures' must be a list" in result.err
    del content["pictures"]  # as in files of earlier versions
    path.write_text(json.dumps(content))
    assert evaluated(discovered, OUT / "refcoco-train-4-seed42.jsonl").status == 0


def test_image_keys_identify_copies(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    (tmp_path / "b.png").write_bytes(b"abc")
    (tmp_path / "c.png").write_bytes(b"abd")
    samples = [Sample(tmp_path / f"{name}.png", "x") for name in "abc"]
    samples += [
        Sample(tmp_path / "COCO_train2014_000000000007.jpg", "x"),
        Sample(tmp_path / "a.png", "x", picture="coco:7"),
        Sample("https://example.org/a.png", "x"),
        Sample(tmp_path / "gone.png", "x"),
        Sample(Image.new("RGB", (4, 4)), "x"),
    ]
    a, b, c, coco, named, address, gone, memory = image_keys(samples)
    assert a == b != c and coco == named == "coco:7" and address.startswith("address:")
    assert gone is None and memory is None


# --- wrong use -------------------------------------------------------------------------------------------------


REFCOCO = "dataset=refcoco dataset_path=refer"
USAGE_ERRORS = {
    "dataset=refcoco": "dataset_path",
    "dataset_path=refer": "dataset=",
    "dataset=coco dataset_path=refer": "choose one of refcoco, refcoco+",
    "dataset=refcoco dataset_path=gone images=train2014": "dataset_path=gone: no such file",
    REFCOCO: "images= is missing",
    f"{REFCOCO} images=train2014 split=test": "dataset_path has train (18 expressions)",
    f"{REFCOCO} images=train2014 split=dev": "split=dev",
    f"{REFCOCO} images=train2014 exclude=[1,2]": "exclude",
    "dataset=refcoco dataset_path=train2014 images=train2014": "found COCO_train2014",
    "dataset=refcoco dataset_path=train2014/COCO_train2014_000000000001.jpg images=train2014": "must be a .parquet",
    "dataset=reasonseg dataset_path=refer/refcoco": "LISA's folders",
    "dataset=reasonseg dataset_path=refer protocol=lmms": "it joins expressions of refcoco",
    f"{REFCOCO} protocol=lmms sentence=first": "protocol=lmms joins all of an object",
}


@pytest.mark.parametrize(("options", "message"), USAGE_ERRORS.items())
def test_usage_errors_are_one_line(front, options, message):
    result = front.finder("stage=prepare", *options.split())
    assert result.status == 2 and message in result.err and "Traceback" not in result.err


def test_unusual_partition_is_noted(front):
    result = prepared(front, "split=testB", dataset="refcocog", path="refer/refcoco")
    assert result.status == 0 and "not the partition" in result.err


def test_source_without_references_is_reported(front):
    write_refs([])
    result = prepared(front)
    assert result.status == 2 and "error: dataset_path=refer: it holds no reference" in result.err


def test_duplicate_split_is_rejected(front):
    write_refs([ref.reference() for ref in world()] * 2)
    result = prepared(front)
    assert result.status == 2 and "twice: ref10_sent100" in result.err


def test_failed_write_keeps_the_old_file(front, monkeypatch):
    prepared(front)
    before = (OUT / "refcoco-val.jsonl").read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "encode_mask_source", fail)
    assert prepared(front).status == 130
    assert (OUT / "refcoco-val.jsonl").read_bytes() == before and not list(OUT.glob(".lh-*.tmp"))


# --- protocols -------------------------------------------------------------------------------------------------


def test_failures_of_the_written_split_are_reported(front):
    refs = [ref.reference() for ref in world()]
    refs[0]["sentences"][0] = {"sent_id": 0, "sent": "", "raw": ""}
    refs[1]["sentences"] = []
    write_refs(refs)
    result = prepared(front)
    assert result.status == 0 and "could not be used" not in result.out
    result = prepared(front, "split=train")
    assert result.status == 1 and "2 expressions could not be used, for 2 reasons" in result.out
    assert [line["ref_id"] for line in lines("refcoco-train-1000-seed42.jsonl")].count(0) == 2
    refs[9]["sentences"][0]["sent"] = refs[9]["sentences"][0]["raw"] = " "
    write_refs(refs)
    assert prepared(front).status == 1 and [one["prompt"] for one in lines("refcoco-val.jsonl")] == ["vase"]


def test_unreadable_split_is_reported(front):
    refs = [ref.reference() for ref in world()]
    refs[9]["sentences"] = []
    write_refs(refs)
    result = prepared(front)
    assert result.status == 1 and "no row of val could be read" in result.err


@pytest.mark.parametrize(
    ("options", "name", "prompts", "protocol"),
    [
        (["protocol=lmms"], "refcoco-val-joined", ['"middle vase", "vase"'], "lmms"),
        (["sentence=first"], "refcoco-val-first", ["middle vase"], "unc"),
        (["sentence=longest"], "refcoco-val-longest", ["middle vase"], "unc"),
        ([], "refcoco-val", ["middle vase", "vase"], "unc"),
    ],
)
def test_refcoco_protocols(front, options, name, prompts, protocol):
    assert prepared(front, *options).status == 0
    written = lines(f"{name}.jsonl")
    assert [line["prompt"] for line in written] == prompts
    assert {line["protocol"] for line in written} == {protocol}
    metadata = json.loads((OUT / f"{name}.json").read_text())
    assert metadata["protocol"] == protocol and metadata["expressions"] == len(prompts)
    if protocol == "lmms":
        assert written[0]["id"] == "ref10_joined"
        result = front.finder(*EVALUATE, f"data_file={OUT}/{name}.jsonl")
        metrics = front.json("metrics.json")
        assert result.status == 0 and metrics["choices"]["protocol"] == metrics["protocol"]["name"] == "lmms"
        assert "protocol lmms" in result.out


def test_empty_target_is_scored_by_the_protocol(front):
    for name, label in (("full", "target"), ("none", "ignore")):
        content = {"text": ["what?"], "is_sentence": True, "shapes": [shape(label, *corners(2, 40))]}
        save_lisa(Path("rs/val"), name, content)
    assert prepared(front, dataset="reasonseg", path="rs").status == 0
    full, none = lines("reasonseg-val.jsonl")
    assert none["absent"] is True and none["bbox"] is None and "mask" not in none and full["bbox"]
    data = (*EVALUATE, f"data_file={OUT}/reasonseg-val.jsonl")
    assert front.finder(*data).status == 0
    metrics = front.json("metrics.json")
    scores = metrics["protocol"]
    assert metrics["num_masks"] == 1 and scores["giou[empty]"] == 0.0
    assert scores["giou"] == pytest.approx(metrics["giou"] / 2)


def test_overlap_with_an_empty_target():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 1:5] = True
    grounding = SimpleNamespace(absent=False, mask=mask, image_size=(6, 4))
    sample = Sample("a.png", "x", absent=True, facts={"protocol": "reasonseg"})
    assert overlap_of_all(sample, [grounding]) == (0, 8)
    ignored = replace(sample, ignore=encode_mask(np.eye(4, 6, dtype=bool)))
    assert overlap_of_all(ignored, [grounding]) == (0, 6)
    assert overlap_of_all(sample, [SimpleNamespace(absent=True, image_size=(6, 4))]) == (0, 0)
    assert overlap_of_all(replace(sample, facts={}), [grounding]) is None


def test_overlap_with_all_targets():
    """By hand: of two targets, one is found, and one pixel is wrong."""
    left, right, off = np.zeros((3, 4, 6), bool)
    left[:2, :2], right[2:, 4:], off[0, 5] = True, True, True
    found = [SimpleNamespace(absent=False, mask=mask, image_size=(6, 4)) for mask in (left, off)]
    boxes = ((0, 0, 2, 2), (4, 2, 6, 4))
    sample = Sample("a.png", "x", boxes=boxes, mask=encode_mask(left | right), facts={"protocol": "grefcoco"})
    assert overlap_of_all(sample, found) == (4, 9)
    assert overlap_of_all(sample, [SimpleNamespace(absent=True, image_size=(6, 4))]) == (0, 8)
    assert overlap_of_all(replace(sample, mask=None), found) is None
