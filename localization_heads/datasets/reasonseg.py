"""ReasonSeg, as LISA's folders of images with JSON files, or as Parquet of `Ricky06662/ReasonSeg_*`.

LISA (https://github.com/dvlab-research/LISA, utils/data_processing.py and utils/dataset.py): `<split>/<name>.jpg`
with `<name>.json` beside it, `{"text": [...], "is_sentence": bool, "shapes": [{"label", "points": [[x, y], ...]}]}`,
UTF-8 or cp1252. OpenCV paints the shapes, outline and interior, from the largest to the smallest, so small shapes lie
on top. A label that contains "ignore" marks pixels that are not scored, "flag" is skipped, and any other label is the
target. Images without a target are kept: their IoU is 1 if nothing is predicted, else 0. Evaluation uses the first
text of an image; the training set has up to five.

`Ricky06662/ReasonSeg_val` and `_test` (https://huggingface.co/datasets/Ricky06662/ReasonSeg_test): `image`, `text`,
`mask` (rows of booleans), `image_id`, `ann_id`, `img_height`, `img_width`. Both name their split `test`. The pixels
that LISA ignores are not marked.
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
    BadExpression,
    Index,
    IndexEntry,
    InMemorySource,
    Record,
    declared_size,
    make_entry,
)
from localization_heads.datasets.parquet import (
    ParquetSource,
    count_values,
    image_bytes,
    read_columns,
    split_from_path,
)
from localization_heads.errors import BadLineError, UsageError
from localization_heads.store.files import read_json
from localization_heads.store.paths import check_id

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test")
MAX_JSON_BYTES = 64 << 20
MAX_SHAPES, MAX_POINTS = 10_000, 100_000
MAX_PAINTING_COST = 1 << 29
"""Steps for painting an image's shapes: enough for ten that each fill fifty megapixels."""


class LisaFolders(InMemorySource):
    """LISA's folders `train`, `val` and `test`, or one of them."""

    kind = "LISA's folders"
    protocol = "reasonseg"

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        ordered = [folders[split] for split in SPLITS if split in folders]
        super().__init__([path for folder in ordered for path in sorted(folder.glob("*.json"))])

    def row_name(self, row: int) -> str:
        return self.files[row].stem[:60]

    def load_rows(self) -> list[Path]:
        return self.files

    def row_split(self, file: Path) -> str:
        return next(split for split, folder in self.folders.items() if file.parent == folder)

    def row_entries(self, row: int, file: Path) -> list[IndexEntry | BadExpression]:
        split = self.row_split(file)
        try:
            stem = check_id(file.stem)
        except ValueError as error:
            raise BadLineError(str(error)) from error
        texts = _read_annotation(file).get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts:
            raise BadLineError("'text' must be a list of instructions")
        used_texts = texts if split == "train" else texts[:1]
        return [
            make_entry(f"{stem}_sent{n}", split, f"reasonseg:{stem}", text, row) for n, text in enumerate(used_texts)
        ]

    def make_record(self, row: int, file: Path) -> Record:
        annotation = _read_annotation(file)
        names = [file.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png")]
        image = next((name for name in names if name.is_file()), names[0])
        if not image.is_file():
            raise ImageError(image, "no such file")
        size = image_size(image)
        target, ignored = paint_shapes(annotation.get("shapes"), size)
        extra = {"is_sentence": bool(annotation.get("is_sentence"))}
        return _target_record(row, image, size, target, ignored, extra)


def _target_record(
    row: int,
    image: Path | bytes,
    size: tuple[int, int],
    target: NDArray[np.bool_],
    ignored: NDArray[np.bool_] | None = None,
    extra: dict[str, Any] | None = None,
) -> Record:
    """A record with the box of the target mask; an empty target is absent."""
    box = tight_box(target)
    return Record(
        row,
        image,
        size,
        box,
        None if box is None else target,
        ignored if ignored is not None and ignored.any() else None,
        extra=extra or {},
        absent=box is None,
    )


def _read_annotation(file: Path) -> dict[str, Any]:
    data = read_json(file, MAX_JSON_BYTES, encodings=("utf-8", "cp1252"))
    if not isinstance(data, dict):
        raise BadLineError("not a JSON object")
    return data


def paint_shapes(shapes: object, size: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rasterise LISA's shapes for an image of `(W, H)` pixels: target and ignored pixels, bool `(H, W)` each.

    Outlines belong to a shape. Of shapes with the same area the later one is painted first, as in LISA's sort. Each
    shape is rasterised twice, first for its area and then to be painted, so that only one mask is in memory at a time.
    """
    if not isinstance(shapes, list) or len(shapes) > MAX_SHAPES:
        raise BadLineError("'shapes' must be a list of polygons")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadLineError("the image is over the limit")
    outlines = [(label, points) for label, points in map(_parse_shape, shapes) if label != "flag"]
    if sum(_painting_cost(points, size) for _, points in outlines) > MAX_PAINTING_COST:
        raise BadLineError(f"its shapes take far more than an image of {size[0]} x {size[1]} pixels needs")
    areas = [int(_paint_shape(points, size)[1].sum()) for _, points in outlines]
    target, ignored = np.zeros(size[::-1], bool), np.zeros(size[::-1], bool)
    for number in sorted(range(len(outlines)), key=areas.__getitem__)[::-1]:
        label, points = outlines[number]
        is_ignored = "ignore" in label
        window, mask = _paint_shape(points, size)
        target[window][mask], ignored[window][mask] = not is_ignored, is_ignored
    return target, ignored


def _parse_shape(shape: object) -> tuple[str, list[tuple[int, int]]]:
    """The label in lower case, and the points truncated to whole pixels as in LISA."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise BadLineError("a shape needs a label and points")
    points = shape.get("points")
    if not isinstance(points, list) or not 1 <= len(points) <= MAX_POINTS:
        raise BadLineError("a shape needs a label and points")
    return shape["label"].lower(), [_parse_point(point) for point in points]


def _parse_point(point: object) -> tuple[int, int]:
    if not isinstance(point, list) or len(point) != 2:
        raise BadLineError("a point of a shape is not [x, y]")
    for value in point:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_PIXELS:
            raise BadLineError("a point of a shape is not [x, y]")
    return int(point[0]), int(point[1])


def _painting_cost(points: list[tuple[int, int]], size: tuple[int, int]) -> int:
    """Approximate steps of the rasteriser: area, points times rows, and the outline, also outside the image."""
    left, top, right, bottom = _clipped_bounds(points, size)
    corners = np.array(points, np.int64)
    outline = int(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())
    height = max(0, bottom - top)
    return max(0, right - left) * height + len(points) * height + outline


def _clipped_bounds(points: list[tuple[int, int]], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The bounding box of a shape, clipped to the image: left, top, right, bottom, half-open."""
    xs, ys = zip(*points, strict=True)
    return max(0, min(xs)), max(0, min(ys)), min(size[0], max(xs) + 1), min(size[1], max(ys) + 1)


def _paint_shape(points: list[tuple[int, int]], size: tuple[int, int]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Rasterise a shape: the window of the image that contains it, and its mask within the window."""
    left, top, right, bottom = _clipped_bounds(points, size)
    canvas = np.zeros((max(0, bottom - top), max(0, right - left)), np.uint8)
    if canvas.size:
        shifted = np.array(points, np.int32) - np.array([left, top], np.int32)
        cv2.polylines(canvas, [shifted], True, 1, 1)
        cv2.fillPoly(canvas, [shifted], 1)
    return (slice(top, top + canvas.shape[0]), slice(left, left + canvas.shape[1])), canvas.view(bool)


class ReasonSegParquet(ParquetSource):
    """`Ricky06662/ReasonSeg_*`, which contains images and masks."""

    kind = "parquet of Ricky06662"
    protocol = "reasonseg"
    variant = "parquet"
    index_columns = ("text", "image_id", "img_height", "img_width")
    record_columns = ("image", "mask", "img_height", "img_width")
    batch_size = 1  # a mask has millions of values

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self.notes.append(
            "these masks do not mark the regions that LISA ignores: scores differ from those on LISA's folders"
        )

    def index(self) -> Index:
        """List all expressions. UsageError, without reading masks, if these are far larger than their images."""
        for file in self.files:
            rows = read_columns(file, ("img_height", "img_width"))
            pixels = sum(max(1, (row["img_height"] or 0) * (row["img_width"] or 0)) for row in rows)
            if count_values(file, "mask") > 2 * pixels:
                raise UsageError(f"{file}: its masks hold far more values than its images have pixels")
        return super().index()

    def file_split(self, file: Path) -> str:
        """The repository's name takes precedence: `ReasonSeg_val` holds `test-00000-of-00001.parquet`."""
        for part in reversed(file.resolve().parts[:-1]):
            if match := re.search(r"ReasonSeg_(train|val|test)\b", part, re.IGNORECASE):
                return match[1].lower()
        return split_from_path(file)

    def row_entries(self, row: int, values: tuple[str, dict[str, Any]]) -> list[IndexEntry | BadExpression]:
        split, cells = values
        size = declared_size(cells["img_height"], cells["img_width"])
        if size[0] * size[1] > MAX_PIXELS:
            raise BadLineError(f"an image of {size[0]} x {size[1]} pixels is over the limit")
        name = cells["image_id"]
        is_valid = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100
        image = f"reasonseg:{name}" if is_valid else f"reasonseg:{split}:{row}"
        return [make_entry(f"row{row}_sent0", split, image, cells["text"], row)]

    def make_record(self, row: int, batch: pa.RecordBatch) -> Record:
        cells = batch.select(["image", "img_height", "img_width"]).to_pylist()[0]
        size = declared_size(cells["img_height"], cells["img_width"])
        return _target_record(row, image_bytes(cells["image"]), size, _mask_from_column(batch.column("mask"), size))


def _mask_from_column(column: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Convert a column of lists of rows to a mask, without creating a Python object per pixel."""
    rows = column.flatten()
    if len(rows) != size[1] or any(length != size[0] for length in rows.value_lengths().to_pylist()):
        raise BadLineError(f"the mask is not of its image's size, {size[0]} x {size[1]}")
    values = rows.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=bool).reshape(size[1], size[0])
