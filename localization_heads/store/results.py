"""Read and write result files: rankings (`heads.json`, `heads.csv`), `predictions.jsonl` and parquet tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from localization_heads.attention import Box
from localization_heads.data.masks import rle_size
from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.score_lists import read_scores
from localization_heads.store.files import atomic_write, parse_json, read_json, write_csv, write_json

_MAX_RANKING_BYTES = 32 << 20  # bytes; 100,000 heads take 20 MB


def save_ranking(ranking: HeadRanking, folder: Path) -> tuple[Path, Path]:
    """Write `heads.json` (the kept heads) and `heads.csv` (all heads) to `folder`; returns both paths."""
    json_path, csv_path = folder / "heads.json", folder / "heads.csv"
    write_csv(csv_path, ranking.csv_header, ranking.csv_rows())
    write_json(json_path, ranking.to_json())
    return json_path, csv_path


def load_frequencies(path: str | Path) -> dict[Head, float]:
    """The selection frequency of every head in a `heads.csv`. UsageError, naming the file, if it is not one."""
    import csv

    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {Head(int(row["layer"]), int(row["head"])): float(row["selection_frequency"]) for row in rows}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a heads.csv ({type(error).__name__}: {error})") from error


def load_ranking(path: str | Path) -> HeadRanking:
    """Read a `heads.json`. UsageError, naming the file, if it is not one."""
    data = _read_ranking_json(Path(path))
    try:
        return HeadRanking.from_json(data)
    except UsageError as error:
        raise UsageError(f"heads={path}: {error}") from error


def is_ranking(path: str | Path) -> bool:
    """Whether a JSON file is a `heads.json` rather than another tool's scores. UsageError if it is not JSON."""
    data = _read_ranking_json(Path(path))
    return isinstance(data, dict) and "heads" in data


def load_head_list(path: str | Path) -> list[Head]:
    """Heads, best first, from a `heads.json` or from another tool's scores (`heads.score_lists.read_scores`).

    Raises:
        UsageError: the file is neither; the message names it.
    """
    if is_ranking(path):
        return [head.address for head in load_ranking(path).kept]
    try:
        return [head for head, _ in read_scores(_read_ranking_json(Path(path)))]
    except UsageError as error:
        raise UsageError(f"heads={path}: {error}") from error


def _read_ranking_json(path: Path) -> Any:
    try:
        return read_json(path, _MAX_RANKING_BYTES)
    except UsageError as error:
        raise UsageError(f"heads={error}") from error


MAX_LINE_BYTES = 64 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Instance:
    """One of several objects that match an expression, with box, score and mask as in `Prediction`.

    Args:
        confidence: probability that the box is right, or None.
    """

    bbox: Box
    score: float
    mask: Mapping[str, Any] | None = None
    confidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "bbox": _box_to_json(self.bbox),
            "score": float(self.score),
            "confidence": _optional(float, self.confidence),
            "mask": self.mask,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Instance:
        """The inverse of `to_json`; raises as `Prediction.from_json` does."""
        return cls(
            _parse_box(data["bbox"]),
            _parse_number(data["score"]),
            _optional(_parse_mask, data.get("mask")),
            _optional(_parse_number, data.get("confidence")),
        )


@dataclass(frozen=True)
class ImageShare:
    """One image of a multi-image prompt.

    Args:
        attention: its share of the heads' attention to all images, 0 to 1.
        found: its box; None for images without one, if only the image with the largest share gets a box.
    """

    attention: float
    found: Instance | None = None

    def to_json(self) -> dict[str, Any]:
        found = {"bbox": None} if self.found is None else self.found.to_json()
        return {"attention": float(self.attention), **found}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageShare:
        """The inverse of `to_json`; raises as `Prediction.from_json` does."""
        return cls(_parse_number(data["attention"]), None if data["bbox"] is None else Instance.from_json(data))


@dataclass(frozen=True)
class Prediction:
    """One line of `predictions.jsonl`.

    Args:
        bbox: xyxy in pixels of the image, or None.
        mask: COCO RLE with its counts as text (see `encode_mask`), or None.
        error: why the entry failed, or None.
        boxes: all objects that match the expression, best first (`instances=all`); None if only one was requested.
        agreement: mean IoU of the box with the boxes of the single heads, or None if it was not requested.
        confidence: the probability that the box is right if `calibrated`, else a raw signal; or None.
        presence: the probability that the expression refers to something in the image (JSON key `present`), or None.
        absent: the grounding abstained (`abstain`): nothing in the image matches, and there is no box.
        frame: number of the video frame, from 0; None for an image.
        time: of the frame, in seconds from the start.
        raw_bbox: the frame's box before temporal smoothing; None if it was not smoothed.
        image_index: the image of a multi-image prompt that the box is in, from 0; None for a single image.
        images: every image of such a prompt, in order.
        heads_from: the published list that the heads come from, and its source; None for other heads.
    """

    id: str
    bbox: Box | None = None
    score: float | None = None
    mask: Mapping[str, Any] | None = None
    heads: Sequence[Head] = ()
    error: str | None = None
    boxes: Sequence[Instance] | None = None
    agreement: float | None = None
    confidence: float | None = None
    calibrated: bool = False
    presence: float | None = None
    absent: bool = False
    frame: int | None = None
    time: float | None = None
    raw_bbox: Box | None = None
    image_index: int | None = None
    images: Sequence[ImageShare] = ()
    heads_from: str | None = None

    def to_json(self) -> dict[str, Any]:
        boxes = {} if self.boxes is None else {"boxes": [one.to_json() for one in self.boxes]}
        return {
            "id": self.id,
            "bbox": _optional(_box_to_json, self.bbox),
            "score": _optional(float, self.score),
            "mask": self.mask,
            "heads": [[int(layer), int(head)] for layer, head in self.heads],
            "error": self.error,
            **boxes,
            "agreement": _optional(float, self.agreement),
            "confidence": _optional(float, self.confidence),
            "calibrated": self.calibrated,
            "present": _optional(float, self.presence),
            "absent": self.absent,
            **({} if self.heads_from is None else {"heads_from": self.heads_from}),
            **self._in_video(),
            **self._among_images(),
        }

    def _among_images(self) -> dict[str, Any]:
        if self.image_index is None:
            return {}
        return {"image_index": self.image_index, "images": [one.to_json() for one in self.images]}

    def _in_video(self) -> dict[str, Any]:
        if self.frame is None:
            return {}
        raw_box = {} if self.raw_bbox is None else {"raw_bbox": _box_to_json(self.raw_bbox)}
        return {"frame": self.frame, "time": _optional(float, self.time), **raw_box}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or OverflowError for invalid data.

        Only the format of the mask is checked here; its content is checked when it is decoded.
        """
        box, error, boxes, origin = line["bbox"], line.get("error"), line.get("boxes"), line.get("heads_from")
        calibrated, absent = line.get("calibrated", False), line.get("absent", False)
        if not isinstance(calibrated, bool) or not isinstance(absent, bool):
            raise ValueError("'calibrated' and 'absent' must be true or false")
        if not isinstance(line["id"], str) or not all(isinstance(text, str | None) for text in (error, origin)):
            raise ValueError("'id', 'error' and 'heads_from' must be text")
        return cls(
            id=line["id"],
            bbox=_optional(_parse_box, box),
            score=_optional(_parse_number, line.get("score")),
            mask=_optional(_parse_mask, line.get("mask")),
            heads=tuple(Head(int(layer), int(head)) for layer, head in line.get("heads") or ()),
            error=error,
            boxes=None if boxes is None else [Instance.from_json(one) for one in boxes],
            agreement=_optional(_parse_number, line.get("agreement")),
            confidence=_optional(_parse_number, line.get("confidence")),
            calibrated=calibrated,
            presence=_optional(_parse_number, line.get("present")),
            absent=absent,
            frame=_optional(_parse_integer, line.get("frame")),
            time=_optional(_parse_number, line.get("time")),
            raw_bbox=_optional(_parse_box, line.get("raw_bbox")),
            image_index=_optional(_parse_integer, line.get("image_index")),
            images=tuple(ImageShare.from_json(one) for one in line.get("images") or ()),
            heads_from=origin,
        )


def _parse_box(value: Any) -> Box:
    x0, y0, x1, y1 = (_parse_number(x) for x in value)
    return x0, y0, x1, y1


def _parse_mask(value: Any) -> Mapping[str, Any]:
    """A COCO RLE whose format is valid."""
    if not (isinstance(value, dict) and isinstance(value.get("counts"), str)):
        raise ValueError("'mask' must be COCO RLE with its counts as text")
    rle_size(value)
    return value


def _box_to_json(box: Box) -> list[float]:
    return [float(x) for x in box]


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    """Apply `read`, but keep None."""
    return None if value is None else read(value)


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shown(value)} is not a number")
    return float(value)


def _parse_integer(value: object) -> int:
    return int(_parse_number(value))


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write the predictions atomically, in the order given."""
    with atomic_write(path) as file:
        for prediction in predictions:
            text = json.dumps(prediction.to_json(), ensure_ascii=False, allow_nan=False)
            file.write(text.encode() + b"\n")


def read_predictions(path: str | Path) -> Iterator[Prediction]:
    """Yield the predictions in a `predictions.jsonl`. UsageError, naming file and line, for an invalid line."""
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            try:
                yield _parse_prediction(line)
            except (ValueError, UsageError) as error:
                raise UsageError(f"{path}, line {number}: not a prediction ({error})") from error


def _parse_prediction(line: bytes) -> Prediction:
    """Parse a line. Raises ValueError or UsageError."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MB")
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    try:
        return Prediction.from_json(value)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (TypeError, OverflowError) as error:
        raise ValueError("a value of the wrong type") from error


def write_parquet(path: Path, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as parquet; missing values are null.

    Args:
        columns: name -> `text`, `number` (float64), `whole` (int64), or `texts`, `numbers` for lists of them.
    """
    import pyarrow as pa
    from pyarrow import parquet

    types = {"text": pa.string(), "number": pa.float64(), "whole": pa.int64()}
    types |= {"texts": pa.list_(pa.string()), "numbers": pa.list_(pa.float64())}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    with atomic_write(path) as file:
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), file)
