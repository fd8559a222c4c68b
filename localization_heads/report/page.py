"""Template, style, scripts and content joined into one page that needs nothing else: no network, no server."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

from localization_heads.report.builder import Report, script_data
from localization_heads.report.markup import Markup, element, join, json_block, plain
from localization_heads.report.samples import samples_section
from localization_heads.report.sections import (
    failures_section,
    heads_section,
    metrics_section,
    run_section,
    summary,
)

SCRIPTS = ("base.js", "colours.js", "charts.js", "grid.js", "table.js", "gallery.js")
"""Joined in this order into one script."""


def render(report: Report) -> str:
    """The whole page. Nothing in the report's texts can become markup or script.

    Its content security policy allows this very style, this very script and pictures in `data:` addresses.
    """
    style, script = _asset("report.css"), "\n".join(_asset(name) for name in SCRIPTS)
    sections = [
        metrics_section(report),
        heads_section(report),
        samples_section(report),
        failures_section(report),
        run_section(report),
    ]
    what = f"{report.stage} · {plain(report.model, 80)}"
    return _filled(
        {
            "policy": _policy(style, script),
            "title": join(f"Localization heads · {what}"),
            "style": style,
            "heading": join(plain(report.model, 80)),
            "subtitle": join(f"{report.stage} · {report.num_entries:,} entries · {report.date}"),
            "navigation": _navigation(report),
            "summary": summary(report),
            "sections": join(*sections),
            "data": json_block(script_data(report)),
            "script": script,
        }
    )


def _filled(parts: dict[str, str]) -> str:
    """The template with its `{{name}}`s replaced, each once: what is put in is not searched again."""
    pieces = []
    for piece in _asset("report.html").split("{{"):
        name, found, rest = piece.partition("}}")
        pieces.append(parts[name] + rest if found else piece)
    return "".join(pieces)


def _navigation(report: Report) -> Markup:
    names = {"metrics": "Metrics"} if report.metrics else {}
    names |= {"heads": "Heads", "samples": "Samples", "failures": "Failures", "run": "The run"}
    return join(*(element("a", {"href": f"#{id}"}, name) for id, name in names.items()))


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _asset(name: str) -> str:
    return (files("localization_heads.report") / "assets" / name).read_text(encoding="utf-8")
