"""Miniature benchmarks in their exact published formats: the same sample data (`world`), written in each of them."""

from __future__ import annotations

import json
import pickle
import pickletools
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 25.5, 10.0, 25.5]


@dataclass
class Ref:
    """An object with its expressions; the image is `size` pixels wide and high."""

    ref_id: int
    image_id: int
    split: str
    texts: tuple[str, ...]
    segmentation: Any = field(default_factory=lambda: [list(SQUARE)])
    bbox: Any = (10.0, 10.0, 20.0, 15.5)  # xywh
    size: tuple[int, int] = (64, 48)
    iscrowd: int = 0

    @property
    def ann_id(self) -> int:
        return 1000 + self.ref_id

    @property
    def file_name(self) -> str:
        return f"COCO_train2014_{self.image_id:012d}_{self.ann_id}.jpg"

    def sentences(self) -> list[dict[str, Any]]:
        return [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": 10 * self.ref_id + n, "sent": text}
            for n, text in enumerate(self.texts)
        ]

    def reference(self) -> dict[str, Any]:
        return {
            "sent_ids": [sentence["sent_id"] for sentence in self.sentences()], "file_name": self.file_name,
            "ann_id": self.ann_id, "ref_id": self.ref_id, "image_id": self.image_id, "split": self.split,
            "sentences": self.sentences(), "category_id": 1,
        }  # fmt: skip

    def annotation(self) -> dict[str, Any]:
        return {
            "segmentation": self.segmentation, "area": 310.0, "iscrowd": self.iscrowd,
            "image_id": self.image_id, "bbox": list(self.bbox), "category_id": 1, "id": self.ann_id,
        }  # fmt: skip

    def image(self) -> dict[str, Any]:
        return {
            "license": 3, "file_name": f"COCO_train2014_{self.image_id:012d}.jpg",
            "coco_url": f"http://mscoco.org/images/{self.image_id}", "height": self.size[1],
            "width": self.size[0], "date_captured": "2013-11-17 05:37:38",
            "flickr_url": "http://farm1.staticflickr.com/73/1_z.jpg", "id": self.image_id,
        }  # fmt: skip


def world() -> list[Ref]:
    """Sample data with UNC's splits: six training images, one per other split; a crowd, and an object in two parts."""
    two_parts = [list(SQUARE), [40.0, 30.0, 60.0, 30.0, 60.0, 44.0]]
    crowd = {"size": [48, 64], "counts": [48 * 10 + 5, 20, 48 * 64 - 48 * 10 - 25]}
    return [
        Ref(0, 1, "train", ("the lady with the blue shirt", "lady w back to us", "blue shirt")),
        Ref(1, 2, "train", ("left man",), two_parts, (10.0, 10.0, 50.0, 34.0)),
        Ref(2, 3, "train", ("caf\xe9 on the right", "right one"), crowd, (10.0, 5.0, 1.0, 20.0), iscrowd=1),
        *(Ref(3 + n, 4 + n % 3, "train", (f"thing {n} a", f"thing {n} b")) for n in range(6)),
        Ref(10, 20, "val", ("middle vase", "vase"), two_parts, (10.0, 10.0, 50.0, 34.0)),
        Ref(11, 30, "testA", ("boy",)),
        Ref(12, 40, "testB", ("dog", "the dog")),
    ]


def save_images(folder: Path, refs: list[Ref]) -> Path:
    """The images of COCO's train2014 that the references need."""
    folder.mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (folder / f"COCO_train2014_{ref.image_id:012d}.jpg").write_bytes(image_bytes(ref.size, ref.image_id))
    return folder


def image_bytes(size: tuple[int, int], seed: int = 0, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def save_refer(folder: Path, refs: list[Ref], partition: str = "unc", *, protocol: int = 2) -> Path:
    """`refs(unc).p` as written by Python 2, and `instances.json`, which also has an annotation without a reference."""
    folder.mkdir(parents=True, exist_ok=True)
    annotated = [*refs, Ref(900, 999, "train", ("without a reference",))]
    instances = {
        "info": {"version": "1.0"},
        "images": list({ref.image_id: ref.image() for ref in annotated}.values()),
        "annotations": [ref.annotation() for ref in annotated],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    path = folder / f"refs({partition}).p"
    path.write_bytes(as_python2(pickle.dumps([ref.reference() for ref in refs], protocol)))
    return path


def as_python2(content: bytes) -> bytes:
    """Rewrite a pickle of protocol 0 to 2 as Python 2 would: ASCII strings as `str`, others as `unicode`."""
    steps = list(pickletools.genops(content))
    ends = [*(position for _, _, position in steps[1:]), len(content)]
    parts = []
    for (opcode, argument, position), end in zip(steps, ends, strict=True):
        part = content[position:end]
        if opcode.name in ("BINUNICODE", "UNICODE") and argument.isascii():
            text = argument.encode()
            if opcode.name == "UNICODE":
                part = b"S" + repr(argument).encode() + b"\n"
            elif len(text) < 256:
                part = b"U" + bytes([len(text)]) + text
            else:
                part = b"T" + len(text).to_bytes(4, "little") + text
        parts.append(part)
    return b"".join(parts)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TYPES = {
    "text": pa.string(), "texts": pa.list_(pa.string()), "int": pa.int64(), "ints": pa.list_(pa.int64()),
    "int8": pa.int8(), "float": pa.float64(), "floats": pa.list_(pa.float64()), "floats32": pa.list_(pa.float32()),
    "bool": pa.bool_(), "mask": pa.list_(pa.list_(pa.bool_())), "image": IMAGE,
}  # fmt: skip


def columns(names: str) -> list[tuple[str, pa.DataType]]:
    """Parse `name:type name:type ...`."""
    return [(name, TYPES[kind]) for name, kind in (pair.split(":") for pair in names.split())]


TYPES["sentences"] = pa.list_(pa.struct(columns("raw:text sent:text sent_id:int tokens:texts")))
JXU = pa.schema(
    columns(
        "sent_ids:ints file_name:text ann_id:int ref_id:int image_id:int split:text sentences:sentences "
        "category_id:int raw_anns:text raw_image_info:text raw_sentences:text image_path:text bbox:floats "
        "captions:texts global_image_id:text anns_id:text"
    )
)
LMMS = pa.schema(
    columns(
        "question_id:text image:image question:text answer:texts segmentation:floats32 bbox:floats32 iscrowd:int8 "
        "file_name:text"
    )
)
RICKY = pa.schema(columns("image:image text:text mask:mask image_id:text ann_id:text img_height:int img_width:int"))


def jxu_row(ref: Ref) -> dict[str, Any]:
    x, y, width, height = ref.bbox
    return {
        **ref.reference(),
        "raw_anns": json.dumps(ref.annotation()),
        "raw_image_info": json.dumps(ref.image()),
        "raw_sentences": json.dumps(ref.sentences()),
        "image_path": f"coco/train2014/COCO_train2014_{ref.image_id:012d}.jpg",
        "bbox": [x, y, x + width, y + height],
        "captions": list(ref.texts),
        "global_image_id": f"coco.{ref.image_id}",
        "anns_id": str(ref.ann_id),
    }


def save_jxu(folder: Path, refs: list[Ref]) -> Path:
    """`data/train-00000-of-00001-<hash>.parquet`, `validation`, `test` (testA) and `testB`."""
    names = {"train": "train", "val": "validation", "testA": "test", "test": "test", "testB": "testB"}
    for split in sorted({ref.split for ref in refs}):
        rows = [jxu_row(ref) for ref in refs if ref.split == split]
        save_rows(folder / "data" / f"{names[split]}-00000-of-00001-0a1b2c3d4e5f6a7b.parquet", rows, JXU)
    return folder


def lmms_row(ref: Ref) -> dict[str, Any]:
    polygons = ref.segmentation if isinstance(ref.segmentation, list) else [list(SQUARE)]
    return {
        "question_id": str(ref.ref_id),
        "image": {"bytes": image_bytes(ref.size, ref.image_id), "path": ref.file_name},
        "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
        "answer": list(ref.texts), "segmentation": polygons[0], "bbox": list(ref.bbox),
        "iscrowd": ref.iscrowd, "file_name": ref.file_name,
    }  # fmt: skip


def save_lmms(folder: Path, refs: list[Ref], *, shards: int = 1) -> Path:
    """`data/val-00000-of-00002.parquet` and so on; small row groups."""
    for split in sorted({ref.split for ref in refs} - {"train"}):
        rows = [lmms_row(ref) for ref in refs if ref.split == split]
        for shard in range(shards):
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            save_rows(folder / "data" / name, rows[shard::shards], LMMS, row_group_size=2)
    return folder


def ricky_row(name: str, text: str, mask: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    height, width = mask.shape
    return {
        "image": {"bytes": image_bytes((width, height), seed), "path": None}, "text": text,
        "mask": mask.tolist(), "image_id": name, "ann_id": name, "img_height": height, "img_width": width,
    }  # fmt: skip


def save_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [{name: row.get(name) for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(known, schema), path, **options)
    return path


def save_lisa(folder: Path, name: str, entry: dict[str, Any], size: tuple[int, int] = (64, 48)) -> Path:
    """`<name>.jpg` and `<name>.json`, as in `ReasonSeg/val`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jpg").write_bytes(image_bytes(size, len(name)))
    path = folder / f"{name}.json"
    path.write_text(json.dumps(entry, ensure_ascii=False), encoding=entry.get("encoding", "utf-8"))
    return path


def shape(label: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {
        "label": label, "labels": [label], "points": [list(point) for point in points], "shape_type": "polygon",
        "image_name": "x.jpg", "group_id": None, "group_ids": [None], "flags": {},
    }  # fmt: skip
