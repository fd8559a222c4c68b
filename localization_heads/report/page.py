"""Renders `report.html` from a Jinja2 template that escapes every text, with charts of `figures` as inline SVG."""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from localization_heads.report import values
from localization_heads.report.content import LEAST_FREQUENCY, HeadFacts, Report


def render(report: Report) -> str:
    """The HTML of the page. No text of the report can become markup or script.

    The content security policy of the page allows only its own style and script, by hash, and images in `data:` URLs.
    """
    style, script = asset("report.css"), asset("common.js") + asset("report.js")
    figures = {} if report.heads is None else _head_charts(report.heads)
    figures["trust"] = _confidence_chart(report.metrics.get("confidence"))
    policy, template = policy_of(style, script), environment().get_template("report.html")
    return template.render(report=report, policy=policy, style=style, script=script, **figures)


@cache
def environment() -> Environment:
    """The template environment: it cleans and escapes every text, and raises for undefined names."""
    environment = Environment(
        loader=PackageLoader("localization_heads.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"single_line": values.single_line, "script_json": values.script_json}
    environment.globals["v"] = values
    return environment


def _clean(value: Any) -> Any:
    """Replace control characters and lone surrogates in every text that a template puts out."""
    return values.clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def policy_of(style: str, script: str) -> str:
    """A content security policy that allows only this style and this script."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (files("localization_heads.report") / "assets" / name).read_text(encoding="utf-8")


GRIDS = {
    "frequency": ("Selection frequency (%)", 100),
    "sum": ("Attention sum", 1),
    "entropy": ("Spatial entropy", 1),
    "bottom": ("Bottom row (%)", 100),
    "iou": ("Mean IoU (%)", 100),
}
"""The statistics drawn as grids of layers by heads: the label of the colour bar, and the factor of its unit."""


def _confidence_chart(confidence: Mapping[str, Any] | None) -> str:
    """Reliability diagram and risk-coverage curve as SVG; "" without confidences."""
    from localization_heads import figures

    if not confidence:
        return ""
    label = "Share of right boxes by confidence, and share of wrong boxes by coverage"
    return figures.svg(figures.plot_confidence(confidence), "trust", label)


def _head_charts(facts: HeadFacts) -> dict[str, Any]:
    """The charts of the heads as SVG."""
    from localization_heads import figures

    ranking, exclude = facts.ranking, facts.ranking.exclude_layers
    grids = {key: _by_head(facts, key) for key in GRIDS}
    kept = np.zeros(facts.shape, dtype=bool)
    for head in ranking.kept:
        kept[head.address] = True
    curve = figures.plot_attention_sums(grids["sum"], ranking.tau, kept=kept, top=facts.used, exclude_layers=exclude)
    charts = {"curve": curve}
    points = [
        (head.address, head.selection_frequency, float(grids["iou"][head.address]))
        for head in ranking.heads
        if math.isfinite(grids["iou"][head.address])
    ]
    if points:
        charts["scatter"] = figures.plot_frequency_iou(points, least_frequency=LEAST_FREQUENCY, top=facts.used)
    labels = {
        "curve": "Average attention sums of the heads in ascending order",
        "scatter": "Selection frequency and mean IoU of each head",
    }
    for key, (label, factor) in GRIDS.items():
        if np.isfinite(grids[key]).any():
            charts[key] = figures.plot_head_grid(
                factor * grids[key],
                label=label,
                top=facts.used,
                exclude_layers=exclude if key == "frequency" else 0,
            )
            labels[key] = f"{label}, layers by heads"
    inline = {name: figures.svg(figure, name, labels[name]) for name, figure in charts.items()}
    return {"curve": inline.pop("curve"), "scatter": inline.pop("scatter", ""), "grids": inline}


def _by_head(facts: HeadFacts, key: str) -> NDArray[np.float64]:
    """One statistic of every head, `[layer, head]`, NaN where it is unknown."""
    grid = np.full(facts.shape, np.nan)
    if key in ("bottom", "iou"):
        measured = facts.bottom_row if key == "bottom" else facts.iou
        return grid if measured is None else measured
    name = {"frequency": "selection_frequency", "sum": "attention_sum", "entropy": "spatial_entropy"}[key]
    for head in facts.ranking.heads:
        value = getattr(head, name)
        grid[head.address] = np.nan if value is None else value
    return grid
