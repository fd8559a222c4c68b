"""The numbers that the paper reports, the form of our results (`Finding`), and the table of the ladder.

Numbers that are missing here are missing in our copy of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """A table of text cells, with names in the first column and numbers in the others."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"every row of {self.title or 'the table'} must have {len(self.columns)} cells")

    def markdown(self) -> str:
        """The table as GitHub markdown, with escaped cells."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        text = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
        return f"**{_escape(self.title)}**\n\n{text}\n" if self.title else f"{text}\n"


@dataclass(frozen=True)
class Finding:
    """The result of an experiment: tables and sentences for people, numbers for programs.

    Args:
        name: as in `experiment=`.
        title: what the paper calls it, with the number of its figure or table.
        reading: the numbers in sentences.
        numbers: JSON values, for `<name>.json` and for the figure.
    """

    name: str
    title: str
    tables: tuple[Table, ...]
    reading: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self, image: str | None = None) -> str:
        """The finding as a markdown section; `image` is the path of its figure, relative to the page."""
        parts = [f"## {self.title}", self.reading]
        if image:
            parts.append(f"![{_escape(self.title)}]({image})")
        return "\n\n".join([*parts, *(table.markdown().rstrip("\n") for table in self.tables)]) + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, as papers print it; a dash for None and NaN.

    >>> percent(0.8652), percent(None)
    ('86.5', '-')
    """
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def format_reported(value: float | None) -> str:
    """A number from the paper, which is already in percent."""
    return MISSING if value is None else f"{value:.1f}"


def above_or_below(ours: float, other: float) -> str:
    """`above`, `below` or `equal to`, with both rounded as they are printed.

    >>> above_or_below(0.5, 0.3), above_or_below(0.3001, 0.3002)
    ('above', 'equal to')
    """
    if round(1000 * ours) == round(1000 * other):
        return "equal to"
    return "above" if ours > other else "below"


def two_decimals(value: float) -> str:
    """Two decimals; a zero has no sign.

    >>> two_decimals(-0.001), two_decimals(0.614)
    ('0.00', '0.61')
    """
    return f"{round(value, 2) + 0.0:.2f}"


def format_p_value(p: float) -> str:
    """`p = 0.023`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


SPLITS = (
    *("refcoco-val", "refcoco-testA", "refcoco-testB", "refcoco+-val", "refcoco+-testA", "refcoco+-testB"),
    *("refcocog-val", "refcocog-test"),
)
"""The columns of the paper's REC and RES tables (UNC splits of RefCOCO and RefCOCO+, UMD splits of RefCOCOg)."""

REASON_SPLITS = ("reasonseg-val", "reasonseg-test")


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper, with the numbers that the paper reports for it.

    Args:
        rec, res: Acc@0.5 and cIoU on each of `SPLITS`; None where our copy has no numbers.
        reasonseg: cIoU on each of `REASON_SPLITS`.
        heads: the three localization heads (Fig. 6a).
        tau: the threshold of criterion 1 (Fig. 3).
    """

    name: str
    rec: tuple[float, ...] | None = None
    res: tuple[float, ...] | None = None
    reasonseg: tuple[float, float] | None = None
    heads: tuple[str, ...] = ()
    tau: float | None = None


MODELS: dict[str, PaperModel] = {
    "llava-hf/llava-1.5-7b-hf": PaperModel(
        "LLaVA-1.5-7B",
        rec=(86.5, 89.8, 80.2, 80.1, 86.3, 71.9, 82.3, 83.0),
        res=(74.2, 76.5, 70.4, 62.5, 65.2, 56.0, 64.2, 68.1),
        reasonseg=(52.4, 48.7),
        heads=("L14H24", "L14H13", "L14H26"),
        tau=0.24,
    ),
    "llava-hf/llava-1.5-13b-hf": PaperModel(
        "LLaVA-1.5-13B",
        rec=(87.2, 90.0, 83.3, 82.7, 88.5, 74.0, 84.3, 85.5),
        res=(76.1, 78.9, 72.8, 64.1, 67.1, 57.3, 67.7, 69.0),
        reasonseg=(60.5, 49.9),
        heads=("L15H39", "L16H30", "L7H2"),
    ),
    "deepseek-community/deepseek-vl-7b-chat": PaperModel(
        "DeepSeek-VL-7B",
        rec=(85.3, 87.2, 81.0, 77.8, 83.9, 73.5, 81.1, 82.8),
        res=(73.9, 76.6, 70.7, 63.1, 66.1, 56.5, 64.0, 68.9),
    ),
    "deepseek-community/deepseek-vl-1.3b-chat": PaperModel(
        "DeepSeek-VL-1.3B",
        rec=(73.2, 77.7, 70.7, 62.0, 66.7, 57.1, 65.2, 69.3),
        res=(56.3, 57.0, 52.7, 51.2, 55.5, 49.2, 52.3, 55.8),
    ),
}
"""By the Hugging Face id of the converted checkpoint."""

HEAD_COUNT_RES = {1: 64.5, 2: 66.0, 3: 67.1, 4: 65.4, 5: 58.9}
"""Tab. 4: RES by the number of heads, averaged over the paper's ten models."""

CRITERIA = {
    ("criterion 1", "fixed"): (23.9, 19.3),
    ("criterion 2", "fixed"): (31.3, 25.7),
    ("both", "fixed"): (87.2, 76.1),
    ("both", "greedy"): (67.4, 63.8),
}
"""Tab. 5: (REC, RES) of LLaVA-1.5-13B on RefCOCO val, by criterion and by whether heads are fixed or greedy."""

SMOOTHING_SIGMA = {0.0: 85.5, 0.8: 87.2, 1.0: 87.2, 1.8: 84.3}
"""Tab. 8: REC of LLaVA-1.5-13B on RefCOCO val by sigma, with a kernel of 7."""

SMOOTHING_KERNEL = {1: 85.5, 7: 87.2}
"""Tab. 8: the same by kernel size, with a sigma of 1."""

MIN_RHO = 0.7
"""Fig. 6b: the Spearman correlation of every model of the paper is above this, with p < 0.001."""

REPORTED = (
    ("the paper, LLaVA-1.5-7B, RefCOCO val", 86.5),
    ("a reader's re-implementation of the paper, same", 46.0),
    ("the same reader with the published code's box, same", 26.0),
)
"""REC Acc@0.5 in percent that the paper and others report (issue 13 of the published code's repository)."""

LADDER_METRICS = ("acc@0.5", "mean_iou", "pointing", "ciou")


@dataclass(frozen=True)
class RungResult:
    """One rung of the ladder with the metrics of its `metrics.json`."""

    step: int
    name: str
    about: str
    metrics: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        kept = (*LADDER_METRICS, "acc@0.5_interval", "num_samples")
        metrics = {name: self.metrics[name] for name in kept if name in self.metrics}
        return {"step": self.step, "name": self.name, "about": self.about, "metrics": metrics}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RungResult:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        metrics = {str(name): value for name, value in data["metrics"].items()}
        return cls(int(data["step"]), str(data["name"]), str(data["about"]), metrics)


def ladder_finding(model: str, rungs: Sequence[RungResult]) -> Finding:
    """The table of the rungs, each with its gain over the previous one."""
    rows, previous = [], None
    for rung in rungs:
        accuracy = rung.metrics.get("acc@0.5")
        gain = MISSING if previous is None or accuracy is None else f"{100 * (accuracy - previous):+.1f}"
        low, high = rung.metrics.get("acc@0.5_interval") or (None, None)
        with_interval = percent(accuracy) if low is None else f"{percent(accuracy)} [{percent(low)}, {percent(high)}]"
        others = (percent(rung.metrics.get(name)) for name in LADDER_METRICS[1:])
        count = str(rung.metrics.get("num_samples", MISSING))
        rows.append((rung.about, f"rung={rung.name}", count, with_interval, gain, *others))
        previous = accuracy
    columns = ("rung", "option", "expressions", "Acc@0.5 [95 %]", "gain", "mean IoU", "pointing", "cIoU")
    tables = [Table(columns, tuple(rows), model)]
    if model in MODELS:
        reported = tuple((source, format_reported(value)) for source, value in REPORTED)
        tables.append(Table(("reported elsewhere", "REC Acc@0.5"), reported))
    numbers = {"rungs": [rung.to_json() for rung in rungs]}
    return Finding("ladder", "The ladder", tuple(tables), _reading(rungs), numbers)


def _reading(rungs: Sequence[RungResult]) -> str:
    scored = [rung for rung in rungs if rung.metrics.get("acc@0.5") is not None]
    if len(scored) < 2:
        return "One rung so far; the gain of the next is over this one."
    accuracy = [rung.metrics["acc@0.5"] for rung in scored]
    gains = [after - before for before, after in pairwise(accuracy)]
    largest = max(range(len(gains)), key=lambda i: gains[i])
    steps = f"from {percent(accuracy[0])} ({scored[0].about}) to {percent(accuracy[-1])} ({scored[-1].about})"
    if gains[largest] <= 0:
        return f"Acc@0.5 goes {steps}; no rung raises it.{_count_warning(scored)}"
    return (
        f'Acc@0.5 goes {steps}; the rung that raises it most is "{scored[largest + 1].about}" '
        f"({100 * gains[largest]:+.1f} points).{_count_warning(scored)}"
    )


def _count_warning(rungs: Sequence[RungResult]) -> str:
    """A sentence for the reading if the rungs were scored on different numbers of expressions, else nothing."""
    if len({rung.metrics.get("num_samples") for rung in rungs}) < 2:
        return ""
    return (
        " Rungs with fewer expressions are scored on those alone that they ground: in the others no head passes "
        "their criteria."
    )
