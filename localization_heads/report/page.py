"""The gallery's part of the page: a card a sample, readable without scripts; its maps are drawn by one."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

from localization_heads.attention import Box
from localization_heads.report.content import Report, script_data
from localization_heads.report.gallery import Card
from localization_heads.report.sections import (
    failures_section,
    heads_section,
    metrics_section,
    run_section,
    section,
    summary,
)
from localization_heads.report.tables import Markup, element, join, json_block, plain


def samples_section(report: Report) -> Markup:
    if not report.cards:
        return section("samples", "Samples", element("p", {"class": "missing"}, report.no_cards))
    controls = element("div", {"class": "controls script", "id": "gallery-controls"})
    cards = [_card(number, card) for number, card in enumerate(report.cards)]
    gallery = element("div", {"class": "gallery", "id": "gallery"}, *cards)
    return section("samples", "Samples", _legend(report), controls, gallery, intro=_which(report))


def _which(report: Report) -> str:
    shown, all = len(report.cards), report.num_grounded
    if shown >= all:
        return f"All {all:,} grounded samples." if all > 1 else ""
    worst = "lowest IoU" if any(card.iou is not None for card in report.cards) else "lowest score"
    return (
        f"{shown:,} of {all:,} grounded samples: the first {shown - shown // 2:,} of the data set "
        f"and, of the others, the {shown // 2:,} with the {worst}."
    )


def _legend(report: Report) -> Markup:
    """Only what is drawn somewhere."""
    cards = report.cards
    drawn = {
        "predicted": "predicted box",
        "mask": "predicted mask" if any(card.mask for card in cards) else "",
        "truth": "true box" if any(card.truth for card in cards) else "",
        "truth-mask": "true mask" if any(card.truth_mask for card in cards) else "",
    }
    entries = [
        element("li", None, element("span", {"class": f"key {kind}"}), label)
        for kind, label in drawn.items()
        if label
    ]
    return element("ul", {"class": "legend", "aria-label": "Legend"}, *entries)


def _card(number: int, card: Card) -> Markup:
    expression = plain(card.expression, 600)
    facts = [
        ("IoU", card.iou, "The overlap of the predicted and the true box"),
        ("score", card.score, "Share of the combined map's mass that lies in the box"),
    ]
    values = [
        element(
            "div",
            {"title": title},
            element("dt", None, name),
            element("dd", None, f"{value:.2f}"),
            _meter(value),
        )
        for name, value, title in facts
        if value is not None
    ]
    head = element(
        "header",
        None,
        element("h3", None, element("bdi", None, expression)),
        element("p", {"class": "id"}, element("bdi", None, plain(card.id, 120))),
        element("dl", {"class": "values"}, *values),
    )
    attributes = {
        "class": "card",
        "data-number": number,
        "data-iou": None if card.iou is None else f"{card.iou:.4f}",
        "data-score": None if card.score is None else f"{card.score:.4f}",
    }
    large = element("div", {"class": "large"}, _picture(number, card, expression))
    return element("article", attributes, head, large, element("div", {"class": "maps script"}))


def _meter(value: float) -> Markup:
    rail = element("rect", {"class": "bar-rail", "width": 100, "height": 4})
    bar = element("rect", {"class": "bar-value", "width": f"{100 * value:.0f}", "height": 4})
    view = {"class": "meter", "viewBox": "0 0 100 4", "preserveAspectRatio": "none", "aria-hidden": "true"}
    return element("svg", view, rail, bar)


def _picture(number: int, card: Card, expression: str) -> Markup:
    """The thumbnail in pixels of the image, boxes and outlines over it."""
    W, H = card.image_size
    size = {"width": W, "height": H}
    if card.picture:
        picture = element(
            "image", {"id": f"picture-{number}", "href": card.picture, "preserveAspectRatio": "none", **size}
        )
    else:
        picture = element("rect", {"id": f"picture-{number}", "class": "no-picture", **size})
    shapes = [
        *_path("truth-mask", card.truth_mask),
        *_path("mask", card.mask),
        *_box("truth", card.truth, card.image_size),
        *_box("predicted", card.box, card.image_size),
    ]
    described = f"{expression}: {_where('predicted box', card.box)}{_where('; true box', card.truth)}"
    if not card.picture:
        described += "; the picture cannot be opened"
    view = {"class": "picture", "viewBox": f"0 0 {W} {H}", "role": "img", "aria-label": described}
    overlay = element("g", {"class": "shapes"}, *shapes)
    return element("svg", view, picture, element("g", {"class": "map"}), overlay)


def _path(kind: str, path: str) -> list[Markup]:
    """A rim first, so that the line stands out from any picture."""
    return [element("path", {"class": f"{part} {kind}", "d": path}) for part in ("rim", "line") if path]


def _box(kind: str, box: Box | None, image_size: tuple[int, int]) -> list[Markup]:
    if box is None:
        return []
    W, H = image_size
    x0, x1 = (min(max(x, 0.0), W) for x in box[0::2])
    y0, y1 = (min(max(y, 0.0), H) for y in box[1::2])
    place = {"x": f"{x0:.1f}", "y": f"{y0:.1f}", "width": f"{x1 - x0:.1f}", "height": f"{y1 - y0:.1f}"}
    return [element("rect", {"class": f"{part} {kind}", **place}) for part in ("rim", "line")]


def _where(name: str, box: Box | None) -> str:
    return "" if box is None else f"{name} {' '.join(f'{edge:.0f}' for edge in box)}"


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
