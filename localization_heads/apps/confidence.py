"""The printed tables about confidence: of `stage=evaluate` and `stage=calibrate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from localization_heads.grounding.confidence import Calibration, Logistic

ROWS = {
    "auroc_right": "AUROC: right boxes against wrong ones",
    "auroc_present": "AUROC: present against absent",
    "text_only": "  the same from the expression alone",
    "auroc_useful": "AUROC: present and right against all others",
    "aurc": "AURC (lower is better)",
    "ece": "calibration error",
    "ece_by_chance": "  of exact confidences, by chance alone",
    "ece_present": "calibration error of presence",
    "n_acc": "N-acc: absent, and said to be",
    "t_acc": "T-acc: present, and not said to be absent",
}
"""In the order of the table; what is not known is left out."""


def confidence_table(trust: Mapping[str, Any]) -> Table:
    """The block `confidence` of metrics.json: each number with its 95 % interval."""
    raw = "" if trust["calibrated"] else ", uncalibrated (stage=calibrate makes probabilities)"
    absent = f", {trust['num_absent']} absent" if trust["num_absent"] else ""
    title = f"Confidence of {trust['num_answers']} answers, {trust['num_right']} right{absent}{raw}"
    return _table(title, trust)


def calibration_table(found: Calibration) -> Table:
    """How well the fit does on entries that it was not made of, and the signals with their weights."""
    said = found.measured
    counts = f"{said['num_right']} right, {said['num_wrong']} wrong, {said['num_absent']} of them absent"
    caption = f"of a right box: {_signals(found.right)}"
    if found.present is not None:
        caption = f"signals of presence: {_signals(found.present)}; {caption}"
    return _table(f"Calibration on {found.num_labels} entries ({counts}), cross-validated", said, caption)


def _signals(factor: Logistic) -> str:
    return ", ".join(factor.weights) or "none"


def _table(title: str, numbers: Mapping[str, Any], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, label in ROWS.items():
        if numbers.get(name) is not None:
            table.add_row(label, f"{numbers[name]:.3f}", _interval(numbers.get(f"{name}_interval")))
    return table


def _interval(bounds: Sequence[float | None] | None) -> str:
    if not bounds or None in bounds:
        return "-"
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"
