"""The table that `stage=evaluate` ends with: a row a method, a column a metric, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

HEADINGS = {
    "acc@0.25": "Acc\n@0.25",
    "acc@0.5": "Acc\n@0.5",
    "acc@0.75": "Acc\n@0.75",
    "mean_iou": "mean\nIoU",
    "pointing": "point-\ning",
    "energy": "energy\nin box",
    "ciou": "cIoU\n(mask)",
    "giou": "gIoU\n(mask)",
}
NAMES = {
    "random_heads": "random heads",
    "all_heads": "all heads",
    "centre_box": "centre box",
    "native": "model's box",
}


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The localization heads first, the controls below, and how far the heads are ahead of random ones."""
    table = Table(
        title=_title(metrics),
        caption=_ahead(metrics),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown = [name for name in HEADINGS if name in metrics]
    table.add_column("")
    for name in shown:
        table.add_column(HEADINGS[name], justify="right")
    methods = {"heads": metrics, **metrics.get("controls", {})}
    for number, (name, row) in enumerate(methods.items()):
        cells = [_cell(row[metric], row[f"{metric}_interval"]) for metric in shown]
        table.add_row(NAMES.get(name, name), *cells, style="" if number else "bold")
    return table


def _title(metrics: Mapping[str, Any]) -> str:
    parts = [f"{metrics['num_samples']} expressions"]
    parts += [f"{metrics['num_masks']} with a mask"] if "num_masks" in metrics else []
    parts += [f"{metrics['num_failed']} failed"] if metrics["num_failed"] else []
    return f"Scores of {', '.join(parts)}"


def _ahead(metrics: Mapping[str, Any]) -> str | None:
    """The paired difference to random heads of the same layers: whether the heads are luck."""
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


def _cell(value: float | None, interval: Sequence[float | None]) -> str:
    """The value, and its interval below."""
    if value is None:
        return "-"
    low, high = (_short(bound) for bound in interval)
    return f"{value:.3f}\n{low}-{high}"


def _short(bound: float | None) -> str:
    """`.36`, `1.0`: as narrow as a bound can be."""
    if bound is None:
        return "?"
    text = f"{bound:.2f}"
    return "1.0" if text == "1.00" else text.removeprefix("0")
