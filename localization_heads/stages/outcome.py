"""What stages return: an `Outcome` for each grounded sample, a `Result` for a data set; and the files of outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry
from localization_heads.evaluation.judging import HEADS, Scores
from localization_heads.evaluation.protocols import Answer
from localization_heads.evaluation.scores import Score, f1
from localization_heads.experiments.paper import Finding
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.record import HeadRanking
from localization_heads.located import prediction_of
from localization_heads.report.content import Card
from localization_heads.stages.run import Run
from localization_heads.store.paths import entry_path
from localization_heads.store.results import (
    Prediction,
    write_parquet,
    write_predictions,
)


@dataclass(frozen=True)
class Outcome:
    """A sample with its prediction, small enough to hold a hundred thousand of them in memory.

    Args:
        measured: what else was measured while the maps were in memory, as JSON values; `evaluate` adds scores.
        card: the sample's card in the report, None if the report will not show it.
    """

    sample: Sample
    prediction: Prediction
    measured: Mapping[str, Any] = field(default_factory=dict)
    card: Card | None = None

    @classmethod
    def of(cls, sample: Sample, grounding: Grounding, several: Sequence[Grounding] | None = None) -> Outcome:
        """The outcome of one or several groundings (`prediction_of`), with nothing measured yet."""
        return cls(sample, prediction_of(sample.id, grounding, several))

    @property
    def boxes(self) -> list[Box]:
        """All predicted boxes, the best first."""
        if self.prediction.boxes is not None:
            return [one.bbox for one in self.prediction.boxes]
        return [] if self.prediction.bbox is None else [self.prediction.bbox]

    @property
    def iou(self) -> float | None:
        """IoU of the predicted box with the true box; None without a predicted box or without exactly one true box."""
        if self.sample.bbox is None or len(self.sample.boxes) > 1 or self.prediction.bbox is None:
            return None
        return float(box_iou(self.prediction.bbox, self.sample.bbox))

    @property
    def answer(self) -> Answer:
        """Prediction and ground truth as input to the benchmark's own metric."""
        scores = self.scores.get(HEADS)
        overlap = self.measured.get("overlap", scores[0].overlap if scores else None)
        return Answer(
            boxes=tuple(self.boxes),
            truths=self.sample.true_boxes,
            rejected=self.prediction.absent,
            confidence=self.prediction.confidence,
            peak=scores[0].pointing if scores else None,
            overlap=None if overlap is None else (overlap[0], overlap[1]),
            image=self.sample.image_key,
            facts=self.sample.facts,
        )

    @property
    def scores(self) -> Scores:
        """The scores of every method that `evaluate` measured, by name; empty without exactly one true box."""
        return {
            name: [Score.from_json(score) for score in scores]
            for name, scores in self.measured.get("scores", {}).items()
        }

    def to_json(self) -> dict[str, Any]:
        card = None if self.card is None else self.card.to_json()
        return {"prediction": self.prediction.to_json(), "measured": self.measured, "card": card}

    @classmethod
    def from_json(cls, sample: Sample, data: Mapping[str, Any]) -> Outcome | None:
        """The inverse of `to_json`; None if `data` is anything else, such as an entry logged by another version."""
        try:
            card = None if data["card"] is None else Card.from_json(data["card"])
            return cls(sample, Prediction.from_json(data["prediction"]), {**data["measured"]}, card)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None


@dataclass(frozen=True)
class Result:
    """What a stage over a data set returns: the files written, the entries that failed, and what is printed.

    Args:
        outcomes: of the grounded samples, in file order.
        metrics: the content of `metrics.json`.
    """

    paths: list[Path]
    failures: list[BadEntry]
    outcomes: list[Outcome] = field(default_factory=list)
    ranking: HeadRanking | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def save_predictions(
    run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry], *, single_id: str | None = None
) -> Path:
    """Write a line per entry: grounded samples in file order, then failed entries with the reason -> the file.

    Args:
        single_id: id of the only image that was grounded, whose line gets a file of its own, so that it does not
            replace the `predictions.jsonl` of a data set.
    """
    path = run.folder / "predictions.jsonl"
    if single_id is not None:
        path = entry_path(run.attention_folder, single_id, "_prediction.jsonl")
    failed = [Prediction(id=bad.id or f"line_{bad.line}", error=bad.reason) for bad in failures]
    grounded = [replace(outcome.prediction, heads_from=run.heads_from) for outcome in outcomes]
    write_predictions(path, [*grounded, *failed])
    return path


COLUMNS = {
    "id": "text",
    "image": "text",
    "expression": "text",
    "true_box": "numbers",
    "predicted_box": "numbers",
    "f1": "number",
    "iou": "number",
    "pointing": "number",
    "energy": "number",
    "intersection": "whole",
    "union": "whole",
    "score": "number",
    "heads": "texts",
    "agreement": "number",
    "confidence": "number",
    "present": "number",
    "right": "number",
    "truly_present": "number",
    "native_box": "numbers",
    "native_answer": "text",
    "error": "text",
}
"""The types of the columns of `per_sample.parquet`; `<control>_iou`, `_pointing` and `_energy` are appended."""


def save_per_sample(run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry]) -> Path:
    """Write `per_sample.parquet`, a row per entry: grounded samples in file order, then the failed ones -> the file."""
    path = run.folder / "per_sample.parquet"
    rows = [_row(outcome) for outcome in outcomes]
    controls = {name: "number" for row in rows for name in row if name not in COLUMNS}
    rows += [{"id": bad.id or f"line_{bad.line}", "error": bad.reason} for bad in failures]
    write_parquet(path, {**COLUMNS, **controls}, rows)
    return path


def _row(outcome: Outcome) -> dict[str, Any]:
    sample, prediction, scores = outcome.sample, outcome.prediction, outcome.scores
    native = outcome.measured.get("native", {})
    row = {
        "id": sample.id,
        "image": sample.image_file,
        "expression": sample.expression,
        "true_box": list(sample.bbox or ()),
        "predicted_box": list(prediction.bbox or ()),
        "f1": f1(outcome.boxes, sample.true_boxes),
        "score": prediction.score,
        "heads": [str(head) for head in prediction.heads],
        "agreement": prediction.agreement,
        "confidence": prediction.confidence,
        "present": prediction.presence,
        "right": None if (right := outcome.measured.get("right")) is None else float(right),
        "truly_present": float(not sample.absent),
        "native_box": native.get("box"),
        "native_answer": native.get("answer"),
    }
    for answer in scores.pop(HEADS, ()):
        shared, union = answer.overlap or (None, None)
        row |= {"iou": answer.iou, "pointing": float(answer.pointing), "energy": answer.energy}
        row |= {"intersection": shared, "union": union}
    for name, answers in scores.items():  # random heads answer several times: the mean
        for metric in ("iou", "pointing", "energy"):
            row[f"{name}_{metric}"] = sum(float(getattr(a, metric)) for a in answers) / len(answers)
    return row
