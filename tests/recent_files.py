"""Miniature Ref-L4, gRefCOCO, ScreenSpot, GroundingME, FineCops-Ref and Flickr30k Entities, in their exact formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.dataset_files import Ref, columns, image_bytes, save_images, save_rows

REF_L4 = pa.schema(
    columns(
        "id:int caption:text bbox:floats bbox_area:float bbox_id:text ori_category_id:text image_id:text height:int "
        "width:int file_name:text is_rewrite:bool"
    )
)
GROUNDINGME = pa.schema(
    columns("id:text image:image description:text bbox:floats height:int width:int subtask_l1:text subtask_l2:text")
)
SCREENSPOT = pa.schema(
    columns("file_name:text bbox:floats instruction:text data_type:text data_source:text image:image")
)


def save_image(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(size, len(path.name), "PNG" if path.suffix == ".png" else "JPEG"))
    return path


def save_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def save_ref_l4(root: Path, split: str = "val", **change: Any) -> Path:
    """Two captions of one object of COCO, and one of Objects365 (the image of which is 600 pixels wide)."""
    coco, objects = "COCO_train2014_000000000020.jpg", "objects365_v1_00000001.jpg"
    save_image(root / "images" / coco)
    save_image(root / "images" / objects, (600, 400))
    common = {"bbox": [10.0, 10.0, 20.0, 15.5], "file_name": coco, "ori_category_id": "refcoco_1"}
    far = {"bbox": [100.0, 50.0, 200.0, 100.0], "file_name": objects, "ori_category_id": "o365_12"}
    rows: list[dict[str, Any]] = [
        {"id": 1, "caption": "The caf\xe9's \u201cblue\u201d vase.", "is_rewrite": False, **common},
        {"id": 2, "caption": "A vase that is blue.", "is_rewrite": True, **common, **change},
        {"id": 3, "caption": "A boat.", "is_rewrite": False, **far},
    ]
    save_rows(root / f"ref-l4-{split}.parquet", rows, REF_L4)
    return root


def grefs() -> tuple[list[Ref], list[dict[str, Any]]]:
    """One target as a number, one in a list, two, and none: `(objects, references)`."""
    objects = [Ref(n, 20, "val", ("x",), bbox=(10.0 + 20 * n, 10.0, 15.0, 15.5)) for n in range(2)]

    def ref(number: int, ann_id: Any, *texts: str, **extra: Any) -> dict[str, Any]:
        sentences = [{"sent_id": 10 * number + n, "sent": text, "raw": text} for n, text in enumerate(texts)]
        common = {"ref_id": number, "image_id": 20, "split": "val", "sentences": sentences}
        return {**common, "ann_id": ann_id, **extra}

    one, two = (one.ann_id for one in objects)
    references = [
        ref(0, one, "left vase", category_id=1),
        ref(1, [two], "right vase", "", category_id=[1], no_target=False),
        ref(2, [one, two], "both vases", category_id=[1, 1], no_target=False),
        ref(3, [-1], "the zebra", category_id=[-1], no_target=True),
        ref(4, [one, -1], "contradiction", no_target=False),
        ref(5, [-1], "elsewhere", split="testA", no_target=True),
    ]
    return objects, references


def save_grefcoco(root: Path) -> Path:
    objects, references = grefs()
    save_json(root / "grefcoco" / "grefs(unc).json", references)
    content = {"images": [objects[0].image()], "annotations": [one.annotation() for one in objects]}
    save_json(root / "grefcoco" / "instances.json", content)
    save_images(root / "train2014", objects)
    return root


def save_screenspot(root: Path, version: str = "") -> Path:
    """JSON with boxes as x, y, width, height."""
    for platform, size in (("mobile", (48, 96)), ("desktop", (96, 54)), ("web", (96, 54))):
        name = f"{platform}_3b0ad239.png"
        save_image(root / "screenspotv2_image" / name, size)
        entry = {
            "img_filename": name, "bbox": [30, 20, 10, 20], "instruction": f"close \xab{platform}\xbb",
            "data_type": "icon" if platform == "web" else "text", "data_source": "shop",
        }  # fmt: skip
        save_json(root / f"screenspot_{platform}{version}.json", [entry])
    return root


def save_screenspot_pro(root: Path, size: tuple[int, int] = (3840, 2160)) -> Path:
    """One application with a screenshot of 4K, boxes as x0, y0, x1, y1."""
    save_image(root / "images" / "vscode_mac" / "screenshot_1.png", size)
    x, y = size[0] * 25 // 32, size[1] * 25 // 27
    entry = {
        "img_filename": "vscode_mac/screenshot_1.png", "bbox": [x, y, x + 40, y + 30],
        "instruction": "refresh the file explorer", "instruction_cn": "\u5237\u65b0",
        "id": "vscode_macos_0", "application": "vscode", "platform": "macos", "img_size": list(size),
        "ui_type": "icon", "group": "Dev",
    }  # fmt: skip
    save_json(root / "annotations" / "vscode_macos.json", [entry])
    return root


def save_groundingme(root: Path) -> Path:
    image = {"bytes": image_bytes((64, 48), 3), "path": "a.jpg"}
    common = {"image": image, "height": 48, "width": 64}
    found = {"bbox": [10.0, 10.0, 30.0, 25.5], "subtask_l1": "Spatial", "subtask_l2": "Counting"}
    rejected = {"subtask_l1": "Rejection", "subtask_l2": "Color"}
    rows: list[dict[str, Any]] = [
        {"id": "0", "description": "the left cup", **common, **found},
        {"id": "1", "description": "the green cup", **common, **rejected},
        {"id": "2", "description": "  ", **common, **found},
        {"id": "3", "description": "a cup without a box", **common, **found, "bbox": None},
    ]
    save_rows(root / "data" / "test-00000-of-00001.parquet", rows, GROUNDINGME)
    return root


def save_finecops(root: Path) -> Path:
    """A positive, a negative text on its image, and a negative image."""
    save_image(root / "images" / "2370799.jpg")
    save_image(root / "final_neg_images" / "neg_17.jpg")
    size = {"height": 48, "width": 64}
    images = [
        {"id": 1, "file_name": "2370799.jpg", "caption": "the man left of the bus", **size},
        {"id": 2, "file_name": "2370799.jpg", "caption": "the man right of the bus", **size},
        {"id": 3, "file_name": "neg_17.jpg", "caption": "the man left of the bus", **size},
        {"id": 4, "file_name": "2370799.jpg", "caption": "without an annotation", **size},
    ]
    box = {"bbox": [10.0, 10.0, 20.0, 15.5], "tuple_type": "1_hop", "level": 2}
    negative = {**box, "negative_level": 1, "positive_id": 1}
    annotations = [
        {"id": 11, "image_id": 1, **box},
        {"id": 12, "image_id": 2, **negative, "negative_type": "relation", "negative_cate": "text"},
        {"id": 13, "image_id": 3, **negative, "negative_type": "object", "negative_cate": "image"},
    ]
    save_json(root / "test_expression_all_coco_format.json", {"images": images, "annotations": annotations})
    save_json(root / "test_expression_pos_coco_format.json", {"images": images[:1], "annotations": annotations[:1]})
    return root


XML = """<annotation><filename>36979.jpg</filename>
<size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>31</xmax><ymax>26</ymax></bndbox></object>
<object><name>2</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>15</xmax><ymax>15</ymax></bndbox></object>
<object><name>2</name><name>3</name><bndbox><xmin>40</xmin><ymin>5</ymin><xmax>50</xmax><ymax>15</ymax></bndbox></object>
<object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""
SENTENCES = """[/EN#1/people A girl] in [/EN#2/clothing red shoes] on [/EN#4/scene a street] near [/EN#0/notvisual it] .
[/EN#3/bodyparts/people Her left foot] and [/EN#1/people the ni\xf1a] .
"""


def save_flickr30k(root: Path) -> Path:
    for folder, name, content in (("Sentences", "36979.txt", SENTENCES), ("Annotations", "36979.xml", XML)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(content, encoding="utf-8")
    (root / "val.txt").write_text("36979\n")
    (root / "test.txt").write_text("")
    save_image(root / "flickr30k-images" / "36979.jpg")
    return root
