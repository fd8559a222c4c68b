"""The results of stages: `Outcome` of one grounded entry, `Result` of a data set, their files, those of a ranking."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, UsageError
from localization_heads.evaluation.judging import HEADS, Scores
from localization_heads.evaluation.protocols import Answer
from localization_heads.evaluation.scores import Score, f1
from localization_heads.experiments.paper import Finding
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head
from localization_heads.heads.ready import difference
from localization_heads.heads.record import HeadRanking
from localization_heads.located import prediction_of
from localization_heads.report.content import Card
from localization_heads.stages.run import Run
from localization_heads.store.paths import entry_path
from localization_heads.store.results import (
    Prediction,
    load_ranking,
    save_ranking,
    write_parquet,
    write_predictions,
)


@dataclass(frozen=True)
class Outcome:
    """An entry with its prediction; small enough to keep a hundred thousand of them.

    Args:
        measured: what else was found out while its maps were there (`evaluate` adds scores), as JSON values.
        card: its card in the report, if that may show it.
    """

    sample: Sample
    prediction: Prediction
    measured: Mapping[str, Any] = field(default_factory=dict)
    card: Card | None = None

    @classmethod
    def of(cls, sample: Sample, grounding: Grounding, several: Sequence[Grounding] | None = None) -> Outcome:
        """The outcome of a grounding, or of several (`prediction_of`), before anything else is measured."""
        return cls(sample, prediction_of(sample.id, grounding, several))

    @property
    def boxes(self) -> list[Box]:
        """All predicted boxes, the best first."""
        single = [] if self.prediction.bbox is None else [self.prediction.bbox]
        return single if self.prediction.boxes is None else [one.bbox for one in self.prediction.boxes]

    @property
    def iou(self) -> float | None:
        """IoU of the predicted and the one true box, None where there is no such truth or no box."""
        if self.sample.bbox is None or len(self.sample.boxes) > 1 or self.prediction.bbox is None:
            return None
        return float(box_iou(self.prediction.bbox, self.sample.bbox))

    @property
    def answer(self) -> Answer:
        """What was answered, and what is true, for the benchmark's own metric."""
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
        """The scores of every method that `evaluate` has measured; none of an entry without one true box."""
        return {
            name: [Score.from_json(score) for score in scores]
            for name, scores in self.measured.get("scores", {}).items()
        }

    def to_json(self) -> dict[str, Any]:
        card = None if self.card is None else self.card.to_json()
        return {"prediction": self.prediction.to_json(), "measured": self.measured, "card": card}

    @classmethod
    def from_json(cls, sample: Sample, data: Mapping[str, Any]) -> Outcome | None:
        """The inverse of `to_json`; None for anything else, such as the log of another version."""
        try:
            card = None if data["card"] is None else Card.from_json(data["card"])
            return cls(sample, Prediction.from_json(data["prediction"]), {**data["measured"]}, card)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None


@dataclass(frozen=True)
class Result:
    """What a stage over a data set ends with: the files written, the entries that failed, and what is shown.

    Args:
        outcomes: of the entries that were grounded, in file order.
        metrics: the content of `metrics.json`.
    """

    paths: list[Path]
    failures: list[BadEntry]
    outcomes: list[Outcome] = field(default_factory=list)
    ranking: HeadRanking | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def save_predictions(
    run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry], *, alone: str | None = None
) -> Path:
    """Every entry has its line: the grounded ones in file order, then those that failed, with the reason.

    Args:
        alone: id of the one image that was grounded: its lines must not replace a data set's `predictions.jsonl`.
    """
    path = run.folder / "predictions.jsonl"
    if alone is not None:
        path = entry_path(run.attention_folder, alone, "_prediction.jsonl")
    failed = [Prediction(id=bad.id or f"line_{bad.line}", error=bad.reason) for bad in failures]
    done = [replace(outcome.prediction, heads_from=run.heads_from) for outcome in outcomes]
    write_predictions(path, [*done, *failed])
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
"""Each control's `<name>_iou`, `<name>_pointing` and `<name>_energy` follow."""


def save_per_sample(run: Run, outcomes: Sequence[Outcome], failures: Sequence[BadEntry]) -> Path:
    """`per_sample.parquet`: rows in file order, then those of the failed entries, with their id and the reason."""
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


log = logging.getLogger(__name__)

FIRM = 100
"""Samples from which on the first heads hardly change (docs/find-heads.md)."""
FORMER = "heads_before.json"
"""The heads.json that a lesser one has taken the place of."""


def note_ranking(run: Run, ranking: HeadRanking) -> None:
    """Warn of a ranking from few samples, and of a heads.json that it takes the place of."""
    if ranking.num_samples < FIRM:
        log.warning("%d samples: the order of the heads is not firm under %d", ranking.num_samples, FIRM)
    back_up_heads_file(run, ranking)


def back_up_heads_file(run: Run, ranking: HeadRanking) -> None:
    """Keep, and name, a heads.json that was made from more samples or otherwise, before this ranking replaces it."""
    latest = run.folder / "heads.json"
    if not latest.is_file():
        return
    try:
        before = load_ranking(latest)
    except UsageError:
        return
    if reason := _lesser(before, ranking):
        shutil.copyfile(latest, run.folder / FORMER)
        log.warning("heads.json is made anew, and the one before, %s, is now %s", reason, run.folder / FORMER)


def _lesser(before: HeadRanking, after: HeadRanking) -> str | None:
    """What the former ranking has that the new one lacks; None if it is no loss."""
    if before.model != after.model:
        return f"of {before.model or 'another model'}"
    if before.num_samples > after.num_samples:
        return f"from {before.num_samples} samples"
    if (before.options, before.top_n) != (after.options, after.top_n):
        return "under other criteria"
    return difference(before.found_with or {}, after.found_with or {})


def choose_grounding_heads(run: Run, ranking: HeadRanking) -> tuple[Sequence[Head] | None, str]:
    """The heads that a batch grounds with, None where each sample picks its own; and where they come from."""
    if run.options.heads != "auto":
        return run.named_heads, "as heads= says"
    if run.ready_heads.heads:
        return run.ready_heads.heads[: run.options.k], f"known for {run.spec.name} (heads= takes others)"
    return [head.address for head in ranking.kept[: run.options.k]], "the first ones above"


def save_ranking_files(run: Run, ranking: HeadRanking) -> list[Path]:
    """heads.json, heads.csv and the figures of both criteria."""
    from localization_heads import figures

    note_ranking(run, ranking)
    paths = [*save_ranking(ranking, run.folder)]
    shape = tuple(1 + np.max([head.address for head in ranking.heads], axis=0))
    sums, frequency, kept = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for head in ranking.heads:
        sums[head.address], frequency[head.address] = head.attention_sum, head.selection_frequency
        kept[head.address] = head.kept
    marked: dict[str, Any] = {
        "top": [head.address for head in ranking.kept[: run.options.k]],
        "exclude_layers": ranking.exclude_layers,
    }
    frequencies, grid = run.folder / "selection_frequency.png", run.folder / "head_grid.png"
    if ranking.tau is not None:
        elbow = run.folder / "attention_sums.png"
        paths.append(
            run.draw(figures.plot_attention_sums, sums, ranking.tau, path=elbow, kept=kept, **marked)
        )
    paths.append(
        run.draw(figures.plot_selection_frequency, ranking, path=frequencies, emphasised=run.options.k)
    )
    paths.append(run.draw(figures.plot_head_grid, 100 * frequency, path=grid, **marked))
    if ranking.has_sensitivity:
        sensitivity = run.folder / "sensitivity.png"
        paths.append(run.draw(figures.plot_sensitivity, ranking, path=sensitivity, emphasised=run.options.k))
    return paths
