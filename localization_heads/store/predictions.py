"""`predictions.jsonl`: a line an entry, what was found for it or why nothing was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.attention import Box
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.store.atomic import atomic_write


@dataclass(frozen=True)
class Prediction:
    """One line of `predictions.jsonl`.

    Args:
        bbox: xyxy in pixels of the image, or None where there is none.
        mask: COCO RLE with its counts as text (see `encode_mask`), or None.
        error: why the entry failed, or None.
    """

    id: str
    bbox: Box | None = None
    score: float | None = None
    mask: Mapping[str, Any] | None = None
    heads: Sequence[Head] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "bbox": None if self.bbox is None else [float(x) for x in self.bbox],
            "score": None if self.score is None else float(self.score),
            "mask": self.mask,
            "heads": [[int(layer), int(head)] for layer, head in self.heads],
            "error": self.error,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_json`; raises ValueError, KeyError or TypeError for anything else."""
        box = line["bbox"]
        if box is not None:
            x0, y0, x1, y1 = (float(x) for x in box)
            box = (x0, y0, x1, y1)
        score = line.get("score")
        return cls(
            id=str(line["id"]),
            bbox=box,
            score=None if score is None else float(score),
            mask=line.get("mask"),
            heads=tuple(Head(int(layer), int(head)) for layer, head in line.get("heads") or ()),
            error=line.get("error"),
        )


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write the whole file atomically, in the order given."""
    with atomic_write(path) as file:
        for prediction in predictions:
            text = json.dumps(prediction.to_json(), ensure_ascii=False, allow_nan=False)
            file.write(text.encode() + b"\n")


def read_predictions(path: str | Path) -> Iterator[Prediction]:
    """Yield the lines of a `predictions.jsonl`. UsageError, naming file and line, for one that is none."""
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Prediction.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise UsageError(f"{path}, line {number}: not a prediction") from error
