"""Printed tables of numbers: metrics, a benchmark's protocol, confidence, calibration, experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from localization_heads.apps.tables import cell
from localization_heads.errors import printable
from localization_heads.grounding.confidence import Calibration, Logistic

if TYPE_CHECKING:
    from localization_heads.experiments.paper import Table as FindingTable


HEADINGS = {
    "acc@0.25": "Acc\n@0.25",
    "acc@0.5": "Acc\n@0.5",
    "acc@0.75": "Acc\n@0.75",
    "acc@0.9": "Acc\n@0.9",
    "macc": "mAcc",
    "mean_iou": "mean\nIoU",
    "pointing": "point-\ning",
    "energy": "energy\nin box",
    "ciou": "cIoU\n(mask)",
    "giou": "gIoU\n(mask)",
    "f1@0.5": "F1\n@0.5",
    "pr@f1=1": "Pr\n@F1=1",
}


METHOD_NAMES = {
    "random_heads": "random heads",
    "all_heads": "all heads",
    "centre_box": "centre box",
    "native": "model's box",
    "single_box": "best box alone",
}


ONE_LINE_INTERVALS = 8
"""Up to this many metrics, an interval fits on one line in 80 columns."""


MAX_COLUMNS = 10
"""Metrics that fit in 80 columns with each interval on two lines."""


MAX_SHORT_CELL = 14
"""Columns whose cells have at most this many characters are not folded."""


HEADING_WIDTH = 16
"""Width at which the headings of such columns are folded."""


def metrics_table(metrics: Mapping[str, Any]) -> Group:
    """The scores of `stage=evaluate`: a row per method, a column per metric, with the 95 % interval below each value.

    The localization heads come first, then the controls; the caption gives the difference from random heads. Metrics
    that do not fit in 80 columns are split into two tables.
    """
    shown = [name for name in HEADINGS if name in metrics]
    half = -(-len(shown) // 2)
    parts = [shown] if len(shown) <= MAX_COLUMNS else [shown[:half], shown[half:]]
    tables = [_scores_table(metrics, part) for part in parts]
    tables[0].title, tables[-1].caption = _title(metrics), _difference_caption(metrics)
    return Group(*tables)


def _scores_table(metrics: Mapping[str, Any], shown: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in shown:
        table.add_column(HEADINGS[name], justify="right")
    single = {"single_box": metrics["single_box"]} if "single_box" in metrics else {}
    methods = {"heads": metrics, **single, **metrics.get("controls", {})}
    for number, (name, row) in enumerate(methods.items()):
        is_narrow = len(shown) > ONE_LINE_INTERVALS
        cells = [_score_cell(row.get(metric), row.get(f"{metric}_interval", ()), is_narrow) for metric in shown]
        table.add_row(METHOD_NAMES.get(name, name), *cells, style="" if number else "bold")
    return table


def _title(metrics: Mapping[str, Any]) -> str:
    parts = [f"{metrics.get('num_answers', metrics['num_samples'])} expressions"]
    parts += [f"{metrics['num_samples']} with one true box"] if "num_answers" in metrics else []
    parts += [f"{metrics['num_masks']} with a mask"] if "num_masks" in metrics else []
    parts += [f"{metrics['num_failed']} failed"] if metrics["num_failed"] else []
    read_out = metrics.get("choices", {}).get("read_out")
    parts += [f"grounding={read_out}"] if read_out else []
    parts += [f"protocol {protocol}"] if (protocol := metrics.get("choices", {}).get("protocol")) else []
    return f"Scores of {', '.join(parts)}"


def _difference_caption(metrics: Mapping[str, Any]) -> str | None:
    """The paired difference from random heads of the same layers, with its interval."""
    random = metrics.get("controls", {}).get("random_heads")
    if random is None:
        return None
    difference = random["difference"]
    parts = [
        f"{name} {value:+.3f} ({low:+.2f} to {high:+.2f})"
        for metric, name in (("acc@0.5", "Acc@0.5"), ("mean_iou", "mean IoU"))
        for value, low, high in [difference[metric]]
    ]
    return f"95 % intervals; heads ahead of random heads: {', '.join(parts)}"


def _score_cell(value: float | None, interval: Sequence[float | None], is_narrow: bool) -> str:
    """The value with its interval below, on two lines in a narrow column."""
    if value is None:
        return "-"
    low, high = (_bound_text(bound) for bound in interval)
    return f"{value:.3f}\n{low}-\n{high}" if is_narrow else f"{value:.3f}\n{low}-{high}"


def _bound_text(bound: float | None) -> str:
    """A bound in three characters: `.36`, `1.0`."""
    if bound is None:
        return "?"
    text = f"{bound:.2f}"
    return "1.0" if text == "1.00" else text.removeprefix("0")


def finding_table(finding: FindingTable) -> Table:
    """A table of an experiment, in the paper's layout."""
    table = Table(title=cell(finding.title) if finding.title else None)
    for index, column in enumerate(finding.columns):
        is_short = all(len(row[index]) <= MAX_SHORT_CELL for row in finding.rows)
        heading = cell(column)
        if is_short:  # rich does not fold a heading with no_wrap, but truncates the neighbouring columns
            heading = fill(heading, HEADING_WIDTH)
        table.add_column(heading, justify="right" if index else "left", overflow="fold", no_wrap=is_short)
    for row in finding.rows:
        table.add_row(*(cell(text) for text in row))
    return table


def protocol_table(protocol: Mapping[str, Any]) -> Table | None:
    """The block `protocol` of `metrics.json`: each number with its 95 % interval. None if it has no numbers."""
    numbers = [name for name in protocol if f"{name}_interval" in protocol]
    if not numbers:
        return None
    table = Table(title=f"Protocol {protocol['name']}", caption=escape(str(protocol["right"])))
    table.add_column("", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for name in numbers:
        low, high = protocol[f"{name}_interval"]
        shown = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        table.add_row(escape(printable(name)), f"{protocol[name]:.3f}", shown)
    return table


CONFIDENCE_ROWS = {
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
"""Labels in the order of the table; a value that is not known is left out."""


def confidence_table(confidence: Mapping[str, Any]) -> Table:
    """The block `confidence` of metrics.json: each number with its 95 % interval."""
    raw = "" if confidence["calibrated"] else ", uncalibrated (stage=calibrate makes probabilities)"
    absent = f", {confidence['num_absent']} absent" if confidence["num_absent"] else ""
    title = f"Confidence of {confidence['num_answers']} answers, {confidence['num_right']} right{absent}{raw}"
    return _confidence_table(title, confidence)


def calibration_table(calibration: Calibration) -> Table:
    """The cross-validated numbers of a calibration, and the names of its signals."""
    numbers = calibration.measured
    counts = f"{numbers['num_right']} right, {numbers['num_wrong']} wrong, {numbers['num_absent']} of them absent"
    caption = f"of a right box: {_signals(calibration.right)}"
    if calibration.present is not None:
        caption = f"signals of presence: {_signals(calibration.present)}; {caption}"
    return _confidence_table(
        f"Calibration on {calibration.num_labels} entries ({counts}), cross-validated", numbers, caption
    )


def _signals(factor: Logistic) -> str:
    return ", ".join(factor.weights) or "none"


def _confidence_table(title: str, numbers: Mapping[str, Any], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, label in CONFIDENCE_ROWS.items():
        if numbers.get(name) is not None:
            table.add_row(label, f"{numbers[name]:.3f}", _interval(numbers.get(f"{name}_interval")))
    return table


def _interval(bounds: Sequence[float | None] | None) -> str:
    if not bounds or None in bounds:
        return "-"
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"
