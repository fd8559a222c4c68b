"""What came of one grounded entry, and the `predictions.jsonl` of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.data.masks import encode_mask
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry
from localization_heads.evaluation.metrics import box_iou
from localization_heads.evaluation.scores import Score
from localization_heads.grounding.ground import Grounding
from localization_heads.grounding.shapes import Point
from localization_heads.stages.run import Run
from localization_heads.store.paths import entry_path
from localization_heads.store.results import Prediction, write_parquet, write_predictions


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


COLUMNS = {
    "id": "text",
    "image": "text",
    "expression": "text",
    "true_box": "numbers",
    "predicted_box": "numbers",
    "iou": "number",
    "pointing": "number",
    "energy": "number",
    "intersection": "whole",
    "union": "whole",
    "score": "number",
    "heads": "texts",
    "native_box": "numbers",
    "native_answer": "text",
    "error": "text",
}
"""Each control's `<name>_iou`, `<name>_pointing` and `<name>_energy` follow."""


def save_per_sample(run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry]) -> Path:
    """Rows in file order, then those that failed, with the reason and nothing else."""
    path = run.folder / "per_sample.parquet"
    rows = [_row(outcome) for outcome in outcomes]
    controls = {name: "number" for name in rows[0] if name not in COLUMNS}
    rows += [{"id": bad.id or f"line_{bad.line}", "error": bad.reason} for bad in failures]
    write_parquet(path, {**COLUMNS, **controls}, rows)
    return path


def _row(outcome: Outcome) -> dict[str, Any]:
    measured = outcome.measured or {}
    scores = {name: [Score.from_json(s) for s in found] for name, found in measured["scores"].items()}
    heads, *_ = scores.pop("heads")
    shared, union = heads.overlap or (None, None)
    native = measured.get("native", {})
    row = {
        "id": outcome.sample.id,
        "image": outcome.sample.image_file,
        "expression": outcome.sample.expression,
        "true_box": list(outcome.sample.bbox or ()),
        "predicted_box": list(outcome.prediction.bbox or ()),
        "iou": heads.iou,
        "pointing": float(heads.pointing),
        "energy": heads.energy,
        "intersection": shared,
        "union": union,
        "score": outcome.prediction.score,
        "heads": [str(head) for head in outcome.prediction.heads],
        "native_box": native.get("box"),
        "native_answer": native.get("answer"),
    }
    for name, answers in scores.items():  # random heads answer several times: the mean
        for field in ("iou", "pointing", "energy"):
            row[f"{name}_{field}"] = sum(float(getattr(a, field)) for a in answers) / len(answers)
    return row
