"""The ladder's table: how Acc@0.5 goes up from the published code's box to the paper's, rung by rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from localization_heads.experiments import paper
from localization_heads.experiments.finding import MISSING, Finding, Table, percent, printed

REPORTED = (
    ("the paper, LLaVA-1.5-7B, RefCOCO val", 86.5),
    ("a reader's re-implementation of the paper, same", 46.0),
    ("the same reader with the published code's box, same", 26.0),
)
"""What others report, in percent (issue 13 of the published code's repository); the first is the paper's."""

METRICS = ("acc@0.5", "mean_iou", "pointing", "ciou")


@dataclass(frozen=True)
class Climbed:
    """One rung with its `metrics.json`."""

    step: int
    name: str
    about: str
    metrics: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        kept = (*METRICS, "acc@0.5_interval", "num_samples")
        metrics = {name: self.metrics[name] for name in kept if name in self.metrics}
        return {"step": self.step, "name": self.name, "about": self.about, "metrics": metrics}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Climbed:
        """The inverse of `to_json`; KeyError, TypeError or ValueError for anything else."""
        metrics = {str(name): value for name, value in data["metrics"].items()}
        return cls(int(data["step"]), str(data["name"]), str(data["about"]), metrics)


def ladder_finding(model: str, rungs: Sequence[Climbed]) -> Finding:
    """The table of the rungs, in order, with the gain of each over the one before."""
    rows, before = [], None
    for rung in rungs:
        accuracy = rung.metrics.get("acc@0.5")
        gain = MISSING if before is None or accuracy is None else f"{100 * (accuracy - before):+.1f}"
        low, high = rung.metrics.get("acc@0.5_interval") or (None, None)
        shown = percent(accuracy) if low is None else f"{percent(accuracy)} [{percent(low)}, {percent(high)}]"
        others = (percent(rung.metrics.get(name)) for name in METRICS[1:])
        count = str(rung.metrics.get("num_samples", MISSING))
        rows.append((rung.about, f"rung={rung.name}", count, shown, gain, *others))
        before = accuracy
    columns = ("rung", "option", "expressions", "Acc@0.5 [95 %]", "gain", "mean IoU", "pointing", "cIoU")
    tables = [Table(columns, tuple(rows), model)]
    if model in paper.MODELS:
        reported = tuple((who, printed(value)) for who, value in REPORTED)
        tables.append(Table(("reported elsewhere", "REC Acc@0.5"), reported))
    numbers = {"rungs": [rung.to_json() for rung in rungs]}
    return Finding("ladder", "The ladder", tuple(tables), _reading(rungs), numbers)


def _reading(rungs: Sequence[Climbed]) -> str:
    known = [rung for rung in rungs if rung.metrics.get("acc@0.5") is not None]
    if len(known) < 2:
        return "One rung so far; the gain of the next is over this one."
    accuracy = [rung.metrics["acc@0.5"] for rung in known]
    gains = [after - before for before, after in pairwise(accuracy)]
    largest = max(range(len(gains)), key=lambda i: gains[i])
    steps = f"from {percent(accuracy[0])} ({known[0].about}) to {percent(accuracy[-1])} ({known[-1].about})"
    if gains[largest] <= 0:
        return f"Acc@0.5 goes {steps}; no rung raises it.{_counts(known)}"
    return (
        f'Acc@0.5 goes {steps}; the rung that raises it most is "{known[largest + 1].about}" '
        f"({100 * gains[largest]:+.1f} points).{_counts(known)}"
    )


def _counts(rungs: Sequence[Climbed]) -> str:
    """A warning where rungs could ground different numbers of expressions."""
    if len({rung.metrics.get("num_samples") for rung in rungs}) < 2:
        return ""
    return (
        " Rungs with fewer expressions are scored on those alone that they ground: in the others no head passes "
        "their criteria."
    )
