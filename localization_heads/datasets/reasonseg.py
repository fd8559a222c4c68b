"""ReasonSeg: LISA's folders of images with JSON files, and the parquet of `Ricky06662/ReasonSeg_*`.

LISA (https://github.com/dvlab-research/LISA, utils/data_processing.py and utils/dataset.py): `<split>/<name>.jpg`
with `<name>.json` beside it, `{"text": [...], "is_sentence": bool, "shapes": [{"label", "points": [[x, y], ...]}]}`,
UTF-8 or cp1252. Shapes are painted by OpenCV (outline and inside) from the largest to the smallest, so a small one lies
on a large one; a label with "ignore" in it paints pixels that do not count, "flag" nothing, any other the target. An
image without a target stays: its IoU is 1 where nothing is predicted, else 0. Evaluation uses the first text of an
image; the training set has up to five.

`Ricky06662/ReasonSeg_val` and `_test` (https://huggingface.co/datasets/Ricky06662/ReasonSeg_test): `image`, `text`,
`mask` (rows of true and false), `image_id`, `ann_id`, `img_height`, `img_width`. Both call their split `test`.
Pixels that LISA ignores are not marked there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localization_heads.cells import tight_box
from localization_heads.data.address import ImageError
from localization_heads.data.images import MAX_PIXELS, image_size
from localization_heads.datasets.base import (
    BadText,
    Entry,
    HeldSource,
    Index,
    Record,
    declared_size,
    entry_or_bad,
)
from localization_heads.datasets.parquet import ParquetSource, image_cell, num_values, read_columns, split_of
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import read_json
from localization_heads.store.paths import check_id

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
MAX_JSON_BYTES = 64 << 20
MAX_SHAPES, MAX_POINTS = 10_000, 100_000
MAX_WORK = 1 << 29
"""Steps that painting the shapes of an image may take: ten that fill one of fifty megapixels."""


class LisaFolders(HeldSource):
    """`train`, `val` and `test` below a folder, or a folder of one of these names."""

    kind = "LISA's folders"
    protocol = "reasonseg"

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        places = [folders[split] for split in SPLITS if split in folders]
        super().__init__([path for place in places for path in sorted(place.glob("*.json"))])

    def name(self, row: int) -> str:
        return self.files[row].stem[:60]

    def load(self) -> list[Path]:
        return self.files

    def row_split(self, file: Path) -> str:
        return next(split for split, folder in self.folders.items() if file.parent == folder)

    def entries(self, row: int, file: Path) -> list[Entry | BadText]:
        split = self.row_split(file)
        try:
            stem = check_id(file.stem)
        except ValueError as error:
            raise BadLineError(str(error)) from error
        texts = _read(file).get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts:
            raise BadLineError("'text' must be a list of instructions")
        asked = texts if split == "train" else texts[:1]
        return [
            entry_or_bad(f"{stem}_sent{n}", split, f"reasonseg:{stem}", text, row)
            for n, text in enumerate(asked)
        ]

    def record(self, row: int, file: Path) -> Record:
        annotation = _read(file)
        names = [file.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png")]
        image = next((name for name in names if name.is_file()), names[0])
        if not image.is_file():
            raise ImageError(image, "no such file")
        size = image_size(image)
        target, ignored = paint_shapes(annotation.get("shapes"), size)
        more = {"is_sentence": bool(annotation.get("is_sentence"))}
        return _record(row, image, size, target, ignored, more)


def _record(
    row: int,
    image: Path | bytes,
    size: tuple[int, int],
    target: NDArray[np.bool_],
    ignored: NDArray[np.bool_] | None = None,
    more: dict[str, Any] | None = None,
) -> Record:
    """A target without a pixel is absent."""
    box = tight_box(target)
    return Record(
        row,
        image,
        size,
        box,
        None if box is None else target,
        ignored if ignored is not None and ignored.any() else None,
        more=more or {},
        absent=box is None,
    )


def _read(file: Path) -> dict[str, Any]:
    data = read_json(file, MAX_JSON_BYTES, encodings=("utf-8", "cp1252"))
    if not isinstance(data, dict):
        raise BadLineError("not a JSON object")
    return data


def paint_shapes(shapes: object, size: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Target and ignored pixels, bool `(H, W)` each, of LISA's shapes in an image of `(W, H)` pixels.

    Outlines belong to a shape. Of shapes of the same area the later one is painted first, as LISA's sort has it.
    One shape is painted at a time, first for its area, then in its turn.
    """
    if not isinstance(shapes, list) or len(shapes) > MAX_SHAPES:
        raise BadLineError("'shapes' must be a list of polygons")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadLineError("the image is over the limit")
    outlines = [(label, points) for label, points in map(_shape, shapes) if label != "flag"]
    if sum(_work(points, size) for _, points in outlines) > MAX_WORK:
        raise BadLineError(f"its shapes take far more than an image of {size[0]} x {size[1]} pixels needs")
    areas = [int(_paint(points, size)[1].sum()) for _, points in outlines]
    target, ignored = np.zeros(size[::-1], bool), np.zeros(size[::-1], bool)
    for number in sorted(range(len(outlines)), key=areas.__getitem__)[::-1]:
        label, points = outlines[number]
        ignores = "ignore" in label
        place, mask = _paint(points, size)
        target[place][mask], ignored[place][mask] = not ignores, ignores
    return target, ignored


def _shape(shape: object) -> tuple[str, list[tuple[int, int]]]:
    """Label in lower case and points, cut to whole pixels as LISA's are."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise BadLineError("a shape needs a label and points")
    points = shape.get("points")
    if not isinstance(points, list) or not 1 <= len(points) <= MAX_POINTS:
        raise BadLineError("a shape needs a label and points")
    return shape["label"].lower(), [_point(point) for point in points]


def _point(point: object) -> tuple[int, int]:
    if not isinstance(point, list) or len(point) != 2:
        raise BadLineError("a point of a shape is not [x, y]")
    for value in point:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_PIXELS:
            raise BadLineError("a point of a shape is not [x, y]")
    return int(point[0]), int(point[1])


def _work(points: list[tuple[int, int]], size: tuple[int, int]) -> int:
    """About how many steps the rasteriser takes: pixels, points in every row, and outlines also beyond the image."""
    left, top, right, bottom = _window(points, size)
    corners = np.array(points, np.int64)
    outline = int(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())
    height = max(0, bottom - top)
    return max(0, right - left) * height + len(points) * height + outline


def _window(points: list[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of the image that a shape can reach: left, top, right, bottom, half-open."""
    xs, ys = zip(*points, strict=True)
    return max(0, min(xs)), max(0, min(ys)), min(size[0], max(xs) + 1), min(size[1], max(ys) + 1)


def _paint(
    points: list[tuple[int, int]], size: tuple[int, int]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """A shape's pixels: the part of the image that it can reach, and a mask of that part."""
    left, top, right, bottom = _window(points, size)
    canvas = np.zeros((max(0, bottom - top), max(0, right - left)), np.uint8)
    if canvas.size:
        moved = np.array(points, np.int32) - np.array([left, top], np.int32)
        cv2.polylines(canvas, [moved], True, 1, 1)
        cv2.fillPoly(canvas, [moved], 1)
    return (slice(top, top + canvas.shape[0]), slice(left, left + canvas.shape[1])), canvas.view(bool)


class ReasonSegParquet(ParquetSource):
    """`Ricky06662/ReasonSeg_*`, with images and masks inside."""

    kind = "parquet of Ricky06662"
    protocol = "reasonseg"
    variant = "parquet"
    index_columns = ("text", "image_id", "img_height", "img_width")
    record_columns = ("image", "mask", "img_height", "img_width")
    batch_size = 1  # a mask has millions of values

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self.notes.append(
            "these masks do not tell the regions that LISA ignores: numbers differ from those on LISA's folders"
        )

    def index(self) -> Index:
        """UsageError if the masks have far more values than the images have pixels; they are then not read."""
        for file in self.files:
            rows = read_columns(file, ("img_height", "img_width"))
            pixels = sum(max(1, (row["img_height"] or 0) * (row["img_width"] or 0)) for row in rows)
            if num_values(file, "mask") > 2 * pixels:
                raise UsageError(f"{file}: its masks hold far more values than its images have pixels")
        return super().index()

    def split(self, file: Path) -> str:
        """The repository's name takes precedence: `ReasonSeg_val` holds `test-00000-of-00001.parquet`."""
        for part in reversed(file.resolve().parts[:-1]):
            if match := re.search(r"ReasonSeg_(train|val|test)\b", part, re.IGNORECASE):
                return match[1].lower()
        return split_of(file)

    def entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[Entry | BadText]:
        split, cells = values
        size = declared_size(cells["img_height"], cells["img_width"])
        if size[0] * size[1] > MAX_PIXELS:
            raise BadLineError(f"an image of {size[0]} x {size[1]} pixels is over the limit")
        name = cells["image_id"]
        known = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100
        image = f"reasonseg:{name}" if known else f"reasonseg:{split}:{row}"
        return [entry_or_bad(f"row{row}_sent0", split, image, cells["text"], row)]

    def record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.select(["image", "img_height", "img_width"]).to_pylist()[0]
        size = declared_size(cells["img_height"], cells["img_width"])
        return _record(row, image_cell(cells["image"]), size, _cell_mask(batch.column("mask"), size))


def _cell_mask(column: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask from a column of lists of rows, without making a Python object of every pixel."""
    rows = column.flatten()
    if len(rows) != size[1] or any(length != size[0] for length in rows.value_lengths().to_pylist()):
        raise BadLineError(f"the mask is not of its image's size, {size[0]} x {size[1]}")
    values = rows.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=bool).reshape(size[1], size[0])
