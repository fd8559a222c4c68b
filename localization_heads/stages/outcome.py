"""What came of one grounded entry, and the `predictions.jsonl` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.data.jsonl import BadEntry
from localization_heads.data.masks import encode_mask
from localization_heads.data.samples import Sample
from localization_heads.evaluation.metrics import box_iou
from localization_heads.grounding.hull import Point
from localization_heads.grounding.maps import Grounding
from localization_heads.stages.run import Run
from localization_heads.store.paths import entry_path
from localization_heads.store.predictions import Prediction, write_predictions


@dataclass(frozen=True)
class Outcome:
    """An entry with its prediction; small enough to keep a hundred thousand of them.

    Args:
        point: centre (x, y) of the strongest cell, in pixels: the pointing game's answer.
        measured: what `evaluate` adds, as JSON values.
    """

    sample: Sample
    prediction: Prediction
    point: Point
    measured: Mapping[str, Any] | None = None

    @property
    def iou(self) -> float | None:
        """IoU of the predicted and the true box, None where no truth is known."""
        if self.sample.bbox is None or self.prediction.bbox is None:
            return None
        return float(box_iou(self.prediction.bbox, self.sample.bbox))

    def to_json(self) -> dict[str, Any]:
        known = {} if self.measured is None else {"measured": self.measured}
        return {"prediction": self.prediction.to_json(), "point": list(self.point), **known}

    @classmethod
    def from_json(cls, sample: Sample, data: Mapping[str, Any]) -> Outcome:
        x, y = data["point"]
        prediction = Prediction.from_json(data["prediction"])
        return cls(sample, prediction, (float(x), float(y)), data.get("measured"))


def outcome_of(sample: Sample, grounding: Grounding) -> Outcome:
    """The mask of a prediction is the segmenter's; without one, the filled hull of the chosen component."""
    prediction = Prediction(
        id=sample.id,
        bbox=grounding.box,
        score=grounding.score,
        mask=encode_mask(grounding.mask),
        heads=grounding.heads,
    )
    return Outcome(sample, prediction, grounding.point)


def save_predictions(
    run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry], *, alone: str | None = None
) -> Path:
    """Every entry has its line: those that worked in file order, then those that failed, with the reason.

    Args:
        alone: id of the one entry that is no data set: its lines must not replace a data set's predictions.jsonl.
    """
    path = run.folder / "predictions.jsonl"
    if alone is not None:
        path = entry_path(run.attention_folder, alone, "_prediction.jsonl")
    failed = [Prediction(id=bad.id or f"line_{bad.line}", error=bad.reason) for bad in failures]
    write_predictions(path, [*(outcome.prediction for outcome in outcomes), *failed])
    return path
