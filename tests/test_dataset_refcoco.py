"""RefCOCO from the authors' pickles and from the Parquet of jxu124 and lmms-lab: same data, same ground truth."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco

from localization_heads.data.masks import encode_mask_source, read_mask
from localization_heads.datasets import parquet
from localization_heads.datasets.base import BadRecord, Record
from localization_heads.datasets.parquet import UnreadablePageError, page_sizes
from localization_heads.datasets.source import OFFICIAL_COUNTS, Counts, count_entries, open_source
from localization_heads.errors import UsageError
from localization_heads.store.safe_pickle import loads_pickle
from tests.dataset_files import (
    JXU,
    LMMS,
    Ref,
    as_python2,
    jxu_row,
    lmms_row,
    save_images,
    save_jxu,
    save_lmms,
    save_refer,
    save_rows,
    world,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "train2014", world())


def opened(path, images, dataset="refcoco"):
    source = open_source(dataset, path, images)
    return source, source.index()


def all_records(source, index):
    return list(source.records(sorted({entry.row for entry in index.entries})))


def coco_mask(ref):
    """A second implementation: pycocotools decodes COCO's annotation."""
    width, height = ref.size
    runs = coco.frPyObjects(ref.segmentation, height, width)
    decoded = coco.decode(runs)
    return (decoded.any(axis=2) if decoded.ndim == 3 else decoded).astype(bool)


@pytest.mark.parametrize("save", [save_refer, save_jxu], ids=["pickles", "jxu124"])
def test_unc_formats_give_coco_ground_truth(tmp_path, images, save):
    refs = world()
    save(tmp_path / "data_of", refs)
    source, index = opened(tmp_path / "data_of", images)
    assert not index.failures
    assert {(e.id, e.split, e.picture, e.text) for e in index.entries} == {
        (f"ref{ref.ref_id}_sent{s['sent_id']}", ref.split, f"coco:{ref.image_id}", s["sent"])
        for ref in refs
        for s in ref.sentences()
    }
    by_row = {entry.row: entry.id for entry in index.entries}
    by_id = {ref.ref_id: ref for ref in refs}
    for record in all_records(source, index):
        assert isinstance(record, Record)
        ref = by_id[int(by_row[record.row].split("_")[0].removeprefix("ref"))]
        x, y, width, height = ref.bbox
        assert record.box == (x, y, x + width, y + height)
        assert record.size == ref.size
        assert record.image == images / f"COCO_train2014_{ref.image_id:012d}.jpg"
        assert record.extra == {"ref_id": ref.ref_id, "ann_id": ref.ann_id}
        written = encode_mask_source(record.mask, record.size)
        np.testing.assert_array_equal(coco.decode(written).astype(bool), coco_mask(ref))
        np.testing.assert_array_equal(read_mask(written, ref.size), coco_mask(ref))


def test_sample_data_covers_crowds_and_multipart_objects():
    """A crowd as RLE, and an object in two parts, whose mask differs from its first polygon's."""
    refs = world()
    assert any(ref.iscrowd for ref in refs)
    parts = next(ref for ref in refs if len(ref.segmentation) == 2 and not ref.iscrowd)
    one = read_mask([parts.segmentation[0]], parts.size)
    assert one.sum() < coco_mask(parts).sum()


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python_2_pickles_are_read(protocol):
    """Our reader agrees with Python 3's unpickler."""
    scalars = {"long": "x" * 700, "n": -3, "f": 1.5, "t": (1, None, True), "big": 10**30}
    value = [world()[2].reference(), scalars]
    content = as_python2(pickle.dumps(value, protocol))
    assert (b"U" in content or b"S'" in content) and loads_pickle(content) == pickle.loads(content) == value


def test_python_2_strings_are_utf8_or_latin1():
    assert loads_pickle(b"\x80\x02U\x05caf\xc3\xa9.") == "caf\xe9"
    assert loads_pickle(b"\x80\x02U\x04caf\xe9.") == "caf\xe9"


def test_lmms_rows_become_records(tmp_path):
    refs = [ref for ref in world() if ref.split != "train"]
    save_lmms(tmp_path, refs, shards=2)
    source, index = opened(tmp_path, None)
    assert source.variant == "lmms" and any("8,811" in note for note in source.notes)
    pictures = {entry.split: entry.picture for entry in index.entries}
    assert pictures == {"testA": "coco:30", "testB": "coco:40", "val": "coco:20"}
    assert [e.id for e in index.entries if e.split == "testB"] == ["row1_sent0", "row1_sent1"]
    record = next(r for r in all_records(source, index) if r.extra["file_name"] == refs[0].file_name)
    assert record.box == (10.0, 10.0, 60.0, 44.0)
    assert isinstance(record.image, bytes) and record.image[:2] == b"\xff\xd8"
    np.testing.assert_array_equal(
        read_mask(encode_mask_source(record.mask, (64, 48)), (64, 48)),
        read_mask([refs[0].segmentation[0]], (64, 48)),
    )


def test_records_are_read_from_any_row_group(tmp_path):
    refs = [Ref(n, n, "val", (f"number {n}",)) for n in range(9)]
    save_lmms(tmp_path, refs)
    source, _ = opened(tmp_path, None)
    for rows in ([0], [8], [1, 2, 3], [0, 4, 7], list(range(9)), [3, 8]):
        found = list(source.records(rows))
        assert [r.row for r in found] == rows
        assert [r.extra["file_name"] for r in found] == [refs[n].file_name for n in rows]


def test_split_is_taken_from_the_file_name():
    names = {
        "val-00000-of-00004.parquet": "val", "validation-00000-of-00001-6f1b.parquet": "val", "testA.parquet": "testA",
        "refcoco_train.parquet": "train", "test-00001-of-00002.parquet": "test",
        "default/validation/0000.parquet": "val",
    }  # fmt: skip
    assert {name: parquet.split_from_path(Path(name)) for name in names} == names
    for name in ("0000.parquet", "train-val.parquet", "val/train-test.parquet", "x/0000.parquet"):
        with pytest.raises(UsageError, match="does not contain its split"):
            parquet.split_from_path(Path(name))


def test_jxu_test_split_is_testa_except_for_refcocog(tmp_path, images):
    save_jxu(tmp_path / "a", [Ref(1, 1, "testA", ("x",))])
    for dataset, split in (("refcoco", "testA"), ("refcoco+", "testA"), ("refcocog", "test")):
        _, index = opened(tmp_path / "a", images, dataset)
        assert [entry.split for entry in index.entries] == [split]


def test_dataset_folder_is_found(tmp_path, images):
    """The layout of lichengunc/refer: a folder per data set, and the images beside them."""
    root = tmp_path / "refer"
    save_refer(root / "refcoco", world(), "google")
    save_refer(root / "refcoco", world(), "unc")
    save_refer(root / "refcoco+", world()[:3], "unc")
    save_refer(root / "refcocog", world()[:1], "umd")
    save_images(root / "images/mscoco/images/train2014", world())
    for dataset, number in (("refcoco", len(world())), ("refcoco+", 3), ("refcocog", 1)):
        source, index = opened(root, None, dataset)
        assert count_entries(index.entries).references == number and source.variant == "" and not source.notes
    source, _ = opened(root / "refcoco" / "refs(google).p", None)
    assert source.variant == "google" and any("splits objects" in note for note in source.notes)


@pytest.mark.parametrize("folder", ["", "train2017", "val2017"])
def test_coco_2017_images_are_found(tmp_path, images, folder):
    save_refer(tmp_path / "r", world()[:1])
    (tmp_path / "coco" / folder).mkdir(parents=True)
    image = tmp_path / "coco" / folder / "000000000001.jpg"
    (images / "COCO_train2014_000000000001.jpg").rename(image)
    source, index = opened(tmp_path / "r", tmp_path / "coco")
    assert all_records(source, index)[0].image == image


def test_official_counts_add_up():
    """To the published totals of each data set."""
    totals = {
        "refcoco": Counts(50_000, 142_210),
        "refcoco+": Counts(49_856, 141_564),
        "refcocog": Counts(49_822, 95_010),
    }
    for dataset, total in totals.items():
        parts = [counts for (name, _), counts in OFFICIAL_COUNTS.items() if name == dataset]
        assert (sum(c.references for c in parts), sum(c.expressions for c in parts)) == total


def write_refs(folder, refs):
    """The sample data with these references, as dicts."""
    save_refer(folder, world()).write_bytes(pickle.dumps(refs, 2))


BAD_REFS = {
    "no sentences": {"sentences": []}, "sentences are not a list": {"sentences": "abc"},
    "a sentence is not a dict": {"sentences": ["abc"]},
    "an empty expression": {"sentences": [{"sent_id": 1, "sent": "  ", "raw": ""}]},
    "an expression with a control character": {"sentences": [{"sent_id": 1, "sent": "a\x00b"}]},
    "an overlong expression": {"sentences": [{"sent_id": 1, "sent": "a" * 100_000}]},
    "an id that is a path": {"ref_id": "../../etc/passwd"},
    "a sentence id that is a path": {"sentences": [{"sent_id": "../x", "sent": "cat"}]},
    "an image that is a path": {"image_id": "../x"}, "a negative image": {"image_id": -1},
    "a huge image": {"image_id": 10**40}, "a huge id": {"ref_id": 10**40},
    "an unknown split": {"split": "secret"},
}  # fmt: skip


@pytest.mark.parametrize("change", BAD_REFS.values(), ids=BAD_REFS)
def test_invalid_reference_loses_only_itself(tmp_path, images, change):
    good, bad = world()[0].reference(), {**world()[1].reference(), **change}
    write_refs(tmp_path, [bad, good])
    _, index = opened(tmp_path, images)
    assert {entry.row for entry in index.entries} == {1}
    assert [entry.line for entry in index.failures] == [1]


def test_invalid_sentence_loses_only_itself(tmp_path, images):
    """As in LISA's reader and lmms-eval."""
    bad = world()[0].reference()
    bad["sentences"][1] = {"sent_id": 1, "sent": " ", "raw": ""}
    bad["sentences"].append("abc")
    write_refs(tmp_path, [bad])
    source, index = opened(tmp_path, images)
    assert [entry.id for entry in index.entries] == ["ref0_sent0", "ref0_sent2"]
    assert [(one.line, one.id, one.split) for one in index.failures] == [
        (1, "ref0_sent1", "train"),
        (1, "ref0_number3", "train"),
    ]
    assert index.failures_of("val") == [] and len(index.failures_of("train")) == 2
    assert isinstance(all_records(source, index)[0], Record)


def test_invalid_lmms_expression_loses_only_itself(tmp_path):
    row = {**lmms_row(world()[0]), "answer": ["left man", "", "man"]}
    save_rows(tmp_path / "val-00000-of-00001.parquet", [row], LMMS)
    _, index = opened(tmp_path, None)
    assert [entry.id for entry in index.entries] == ["row0_sent0", "row0_sent2"]
    assert [(bad.id, bad.split) for bad in index.failures] == [("row0_sent1", "val")]


BAD_ANNOTATIONS = {
    "box outside the image": {"bbox": (200.0, 10.0, 5.0, 5.0)},
    "box with swapped corners": {"bbox": (20.0, 10.0, -5.0, 5.0)},
    "empty box": {"bbox": (20.0, 10.0, 0.0, 5.0)},
    "box of text": {"bbox": ("a", 10.0, 5.0, 5.0)},
    "box of three numbers": {"bbox": (20.0, 10.0, 5.0)},
    "box beyond the range of floats": {"bbox": (0, 0, 10**400, 5)},
    "huge box": {"bbox": (0.0, 0.0, 1e300, 1e300)},
    "no size": {"size": (0, 48)},
    "size of text": {"size": ("64", 48)},
    "segmentation of text": {"segmentation": "abc"},
}


@pytest.mark.parametrize("change", BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_invalid_annotation_loses_only_itself(tmp_path, images, change):
    good = world()[0]
    good.image_id = 2
    save_refer(tmp_path, [Ref(1, 1, "val", ("x",), **change), good])
    source, index = opened(tmp_path, images)
    first, second = all_records(source, index)
    assert isinstance(first, BadRecord) and isinstance(second, Record)


def test_missing_or_mismatched_annotation_is_reported(tmp_path, images):
    refs = [ref.reference() for ref in world()[:3]]
    refs[0]["ann_id"] = 5  # does not exist
    refs[1]["image_id"] = 3  # of another image
    refs[2]["ann_id"] = "x"
    write_refs(tmp_path, refs)
    source, index = opened(tmp_path, images)
    reasons = [record.reason for record in all_records(source, index)]
    assert "no such annotation" in reasons[0] and "another image" in reasons[1] and "no such" in reasons[2]


def test_hostile_refs_are_rejected(tmp_path, images):
    path = save_refer(tmp_path, world())
    for content in (b"cos\nsystem\n(S'touch /tmp/x'\ntR.", b"\x80\x02]", b"\x80\x02}.", b"not a pickle", b""):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"refs\(unc\)\.p"):
            opened(tmp_path, images)


def test_refs_bomb_is_rejected(tmp_path, images):
    """Four levels of lists with 60 references to the next: 13,000,000 values in 500 bytes."""
    levels = b"".join(b"](" + (b"h" + bytes([n])) * 60 + b"eq" + bytes([n + 1]) for n in range(4))
    path = save_refer(tmp_path, world())
    path.write_bytes(b"\x80\x02(]q\x00" + levels + b"l.")
    with pytest.raises(UsageError, match="more bytes than the file holds, which a refs file never does"):
        opened(tmp_path, images)


@pytest.mark.parametrize("content", ["", "[]", '{"images": 1}', '{"images": [], "annotations": NaN}', "[" * 10**5])
def test_invalid_instances_are_rejected(tmp_path, images, content):
    save_refer(tmp_path, world())
    (tmp_path / "instances.json").write_text(content)
    source, index = opened(tmp_path, images)
    with pytest.raises(UsageError, match=r"instances\.json"):
        all_records(source, index)


BAD_JXU = {
    "bbox is xywh": {"bbox": [10.0, 10.0, 20.0, 15.5]}, "bbox is NaN": {"bbox": [float("nan")] * 4},
    "bbox is missing": {"bbox": None}, "raw_anns is not JSON": {"raw_anns": "{'segmentation': 1}"},
    "raw_anns is a list": {"raw_anns": "[1]"}, "raw_anns is deep": {"raw_anns": "[" * 10**5},
    "raw_anns is missing": {"raw_anns": None},
    "raw_anns holds NaN": {"raw_anns": '{"bbox": [NaN, 1, 2, 3], "segmentation": []}'},
    "raw_anns holds a number out of range": {"raw_anns": '{"bbox": [1e999, 1, 2, 3], "segmentation": []}'},
    "raw_image_info is not JSON": {"raw_image_info": "x"},
    "raw_image_info has no size": {"raw_image_info": "{}"},
}  # fmt: skip


def test_file_names_in_parquet_are_not_used(tmp_path, images):
    """Only `image_id` determines the image, not the untrusted `file_name` and `image_path`."""
    row = {**jxu_row(world()[0]), "file_name": "../../../etc/passwd", "image_path": "/etc/passwd"}
    row["raw_image_info"] = json.dumps({**world()[0].image(), "file_name": "../../../etc/passwd"})
    save_rows(tmp_path / "train-00000-of-00001.parquet", [row], JXU)
    source, index = opened(tmp_path, images)
    (record,) = all_records(source, index)
    assert record.image == images / "COCO_train2014_000000000001.jpg"


BAD_LMMS = {
    "no bytes": {"image": {"bytes": None, "path": "/etc/passwd"}},
    "no box": {"bbox": [1.0, 2.0]},
    "a box of NaN": {"bbox": [float("nan")] * 4},
}


ROWS = [
    *(pytest.param("train", jxu_row, JXU, change, id=f"jxu: {name}") for name, change in BAD_JXU.items()),
    *(pytest.param("val", lmms_row, LMMS, change, id=f"lmms: {name}") for name, change in BAD_LMMS.items()),
]


@pytest.mark.parametrize(("split", "row_of", "schema", "change"), ROWS)
def test_invalid_row_loses_only_itself(tmp_path, images, split, row_of, schema, change):
    rows = [{**row_of(world()[0]), **change}, row_of(world()[0])]
    save_rows(tmp_path / f"{split}-00000-of-00001.parquet", rows, schema)
    source, index = opened(tmp_path, images)
    first, second = all_records(source, index)
    assert isinstance(first, BadRecord) and isinstance(second, Record)


def test_invalid_lmms_row_is_reported(tmp_path):
    rows = [{**lmms_row(world()[0]), **change} for change in ({"answer": []}, {"file_name": "../x.jpg"}, {})]
    save_rows(tmp_path / "val-00000-of-00001.parquet", rows, LMMS)
    _, index = opened(tmp_path, None)
    assert [bad.line for bad in index.failures] == [1, 2] and {entry.row for entry in index.entries} == {2}


def test_parquet_over_the_limits_is_rejected(tmp_path, monkeypatch):
    save_lmms(tmp_path, world())
    source, index = opened(tmp_path, None)
    for name, limit in (("MAX_ROWS", 0), ("_memory_limit", lambda path: 100)):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, name, limit)
            with pytest.raises(UsageError, match=r"\.parquet"):
                all_records(source, index)


def test_parquet_with_negative_sizes_is_rejected(tmp_path):
    """They could compensate for the size of another column."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": range(60)}), path, use_dictionary=False, compression="none")
    content = path.read_bytes()
    sixty = b"\x16\x78"  # 60 as a varint, in the footer: rows, values, rows of the group
    *head, rows, values, group = content.split(sixty)
    # older versions of pyarrow also write the column metadata before the footer
    assert len(head) in (1, 2)
    path.write_bytes(sixty.join([*head, rows]) + b"\x16\x77" + values + sixty + group)
    with pytest.raises(UsageError, match="row group 0 has sizes below 0"):
        list(parquet.read_columns(path, ["x"]))


def bombs(folder):
    """Small files whose cells expand to gigabytes."""
    once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5000, "i4")), ["a" * (1 << 20)])
    row = pa.ListArray.from_arrays(pa.array([0, 5000], "i4"), once)
    parts = pa.StructArray.from_arrays([row, pa.array([1])], ["tokens", "sent_id"])
    columns = {
        "a text in every row": once,
        "a text repeated in one row": row,
        "a text in a list in a list": pa.ListArray.from_arrays(pa.array([0, 1], "i4"), parts),
        "many rows": pa.array(np.zeros(2_000_000, "i8")),
        "many values in a row": pa.LargeListArray.from_arrays([0, 8_000_000], np.zeros(8_000_000, "i1")),
        "texts that are compressed": pa.array(["a" * (100 << 20)]),
    }
    for name, column in columns.items():
        table = pa.table({"x": column})
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2 << 20)
        assert path.stat().st_size < 1 << 17, name
        yield path


READ_BOMBS = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from localization_heads.datasets import parquet
from localization_heads.errors import UsageError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
for path in map(Path, sys.argv[1:]):
    before = peak()
    for read in (parquet.read_columns(path, ["x"]), parquet.read_row_batches(path, ["x"], [0])):
        try:
            print("read", path.stem, len(list(read)))
        except UsageError as error:
            assert "far more than the file" in str(error), error
    assert peak() - before < 8 * path.stat().st_size + (64 << 20), (path, peak() - before)
"""


def test_parquet_that_expands_beyond_the_limit_is_rejected(tmp_path):
    files = list(map(str, bombs(tmp_path)))
    done = subprocess.run([sys.executable, "-c", READ_BOMBS, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A single row of these is small.
    assert set(done.stdout.splitlines()) == {"read a text in every row 1", "read many rows 1"}


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({3: b"\xfe\xff\xff\x7f"}, "far more than the file"),  # 134 MB
        ({3: b"\xff\xff\xff\x7f"}, "without a readable header"),  # a negative size
        ({0: b"\x00"}, "without a readable header"),  # an empty header
    ],
)
def test_page_with_a_false_size_is_rejected(lie, message, tmp_path):
    """The footer is correct, but the page header claims another size than 32 MB, in the same number of bytes."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [bytes(1 << 25)]}), path, compression="zstd", use_dictionary=False)
    assert len(list(parquet.read_columns(path, ["x"]))) == 1
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    size = content[start + 3 : start + 7]  # after the page type (field and value) and the field of the size
    assert all(byte > 127 for byte in size[:3]) and size[3] < 128
    for offset, value in lie.items():
        content[start + offset : start + offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(parquet.read_columns(path, ["x"]))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_page_sizes_cover_every_page(version, compression, tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"x": [f"{n:09d}" for n in range(20_000)], "y": [[n % 7] * (n % 3) for n in range(20_000)]})
    pq.write_table(table, path, compression=compression, data_page_version=version, data_page_size=5000)
    group = pq.read_metadata(path).row_group(0)
    for column in map(group.column, range(2)):
        start, length = column.dictionary_page_offset, column.total_compressed_size
        sizes = list(page_sizes(io.BytesIO(path.read_bytes()[: start + length]), start, length))
        assert len(sizes) > 3
        assert sum(sizes) <= column.total_uncompressed_size < sum(sizes) + 200 * len(sizes)


PAGE = bytes([0x15, 0, 0x15, 100, 0x15, 2, 0])
"""A page header: type 0, 50 bytes uncompressed, 1 byte compressed."""


@pytest.mark.parametrize(
    ("header", "sizes"),
    [
        (PAGE, [50, 50]),
        (PAGE[:-1] + b"\x10", [50, 50]),  # any field of type 0 ends a struct
        (PAGE[:-1] + b"\x2c\x15\x02\x18\x03abc\x11\x12\x16\x01\x00\x00", [50, 50]),  # a struct of all kinds
        (PAGE[:-1], "cut"),
        (b"", "cut"),
        (PAGE[:-1] + b"\x28\xff\xff\xff\xff\x7f\x00", "a string that extends past the file"),
        (PAGE[:-1] + b"\x16" + b"\xff" * 20 + b"\x00", "an unterminated number"),
        (PAGE[:-1] + b"\x1c" * 3000 + b"\x00" * 3001, "structs in structs"),
        (PAGE[:-1] + b"\xf1" * 4369 + b"\x25\x7f\x00", "a field whose number overflows to 2"),
        (PAGE[:-1] + b"\x05\x04\x7f\x00", "a field with an explicit id"),
        (PAGE[:-1] + b"\x1b\x00\x00", "a map"),
        (PAGE[:4] + bytes([0x15, 0x82, 0x80, 0x80, 0x80, 0x20, 0]), "a compressed size that overflows to 1"),
        (PAGE[:4] + bytes([0x15, 1, 0]), "a negative compressed size"),
        (PAGE[:4] + bytes([0]), "no compressed size"),
        (b"\x18\x80\x80\x80\x01" + bytes(1 << 22) + PAGE, "a header of two megabytes"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else str(value),
)
def test_page_headers_are_unambiguous_or_rejected(header, sizes):
    """Two equal pages of one byte each. An ambiguous header is rejected."""
    file = io.BytesIO((header + b"x") * 2 if isinstance(sizes, list) else header)
    length = len(file.getvalue()) or 1
    if isinstance(sizes, list):
        assert list(page_sizes(file, 0, length)) == sizes
        assert list(page_sizes(file, 0, len(header) + 1)) == sizes  # the next page is in the trailing bytes
        assert list(page_sizes(file, 0, 0)) == sizes
    else:
        with pytest.raises(UnreadablePageError):
            list(page_sizes(file, 0, length))


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"dictionary_pagesize_limit": 2000}])
def test_nested_strings_round_trip_in_every_encoding(options, tmp_path):
    rows = [
        {"s": [{"raw": f"{n % 700} " * (n % 9), "tokens": ["a", None, "b"] * (n % 3)}] * (n % 4), "t": None}
        for n in range(9000)
    ]
    tokens = pa.struct([("raw", pa.string()), ("tokens", pa.list_(pa.string()))])
    schema = pa.schema([("s", pa.list_(tokens)), ("t", pa.string())])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=5000, **options)
    assert list(parquet.read_columns(path, ["s", "t"])) == rows
    wanted = [0, 17, 4999, 5000, 8999]
    found = [(row, batch.to_pylist()) for row, batch in parquet.read_row_batches(path, ["s", "t"], wanted)]
    assert found == [(row, [rows[row]]) for row in wanted]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"x" * 1000])
def test_invalid_parquet_is_rejected(tmp_path, content):
    path = tmp_path / "val-00000-of-00001.parquet"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a parquet file"):
        opened(path, None)


def test_unrecognised_source_lists_what_is_there(tmp_path, images):
    save_refer(tmp_path / "x", world(), "berkeley")
    save_refer(tmp_path / "x", world(), "google")
    with pytest.raises(UsageError, match=r"refs\(berkeley\)\.p, refs\(google\)\.p"):
        open_source("refcoco", tmp_path / "x", images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="found nothing"):
        open_source("refcoco", tmp_path / "empty", images)
    with pytest.raises(UsageError, match="no such file"):
        open_source("refcoco", tmp_path / "gone", images)
    with pytest.raises(UsageError, match="images= is missing"):
        open_source("refcoco", save_jxu(tmp_path / "j", world()), None)
    with pytest.raises(UsageError, match=r"images=.*no such folder"):
        open_source("refcoco", tmp_path / "j", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"columns ann_id.*reasonseg as parquet has"):
        open_source("reasonseg", tmp_path / "j", images)
