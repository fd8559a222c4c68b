"""`per_sample.parquet`: a row an expression, with all that it was scored by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localization_heads.data.jsonl import BadEntry
from localization_heads.evaluation.scores import Score
from localization_heads.stages.outcome import Outcome
from localization_heads.stages.run import Run
from localization_heads.store.parquet import write_parquet

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
