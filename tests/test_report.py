"""report.html: its content, its safety against hostile texts, its size, and its behaviour in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from chromium import Browser, needs_chromium
from front import Calls, Front, fronts, stub_figures, write_data, write_lines
from PIL import Image
from report_samples import HOSTILE, made_card, made_ranking, made_report
from scipy.stats import spearmanr

import localization_heads as lh
from localization_heads.attention import AttentionMaps
from localization_heads.cells import box_iou
from localization_heads.data.images import load_image
from localization_heads.data.masks import encode_mask
from localization_heads.errors import BadEntry
from localization_heads.evaluation.head_iou import box_ious, mean_ious
from localization_heads.evaluation.metrics import spearman
from localization_heads.grounding.ground import ground_maps
from localization_heads.grounding.shapes import fill_polygon
from localization_heads.heads.head import Head
from localization_heads.heads.record import RankedHead
from localization_heads.lvlm.model import LVLM
from localization_heads.options.compose import default_grounding
from localization_heads.options.groups import GroundingOptions
from localization_heads.report import page as page_module
from localization_heads.report.content import Card, Gallery, HeadFacts, Report, outline, thumbnail, tiny_map
from localization_heads.report.page import environment, render
from localization_heads.report.values import script_json, single_line
from localization_heads.stages.outcome import Outcome
from localization_heads.stages.report import _complete_card
from localization_heads.store.attention_files import load_attention
from localization_heads.store.journal import ResultLog
from localization_heads.store.results import Instance, Prediction

DATA = "data_file=data.jsonl"
BOX = [8, 8, 40, 40]
EVALUATE = ("stage=evaluate", DATA, "heads=[2-0,3-1]", "batch_size=2", "worst=0")


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, its texts and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        elif data.strip():
            self.texts.append(data.strip())

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


REPORTS: dict[str, Report] = {}
"""The reports behind the pages that stages have written, by the text of the page (see the fixture `front`)."""


def heads_of(path: Path) -> dict[str, Any] | None:
    """The values that the page at `path` shows of the heads, before they are rounded."""
    facts = REPORTS[path.read_text(encoding="utf-8")].heads
    return None if facts is None else head_facts(facts)


def head_facts(facts: HeadFacts) -> dict[str, Any]:
    def row(rank: int, head: RankedHead) -> dict[str, Any]:
        measured = {
            name: None if values is None or np.isnan(values[head.address]) else float(values[head.address])
            for name, values in (("bottom", facts.bottom_row), ("iou", facts.iou))
        }
        return {
            "layer": head.layer,
            "head": head.head,
            "rank": rank if head.kept else None,
            "kept": head.kept,
            "frequency": head.selection_frequency,
            "sum": head.attention_sum,
            "entropy": head.spatial_entropy,
            **measured,
        }

    rows = [row(rank, head) for rank, head in enumerate(facts.ranking.heads, start=1)]
    layers, heads = facts.shape
    return {"layers": layers, "heads": heads, "used": [list(head) for head in facts.used], "rows": rows}


# ------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("text", [HOSTILE, "</p><script>boom=1</script>", "&lt;", "a" * 5000, "\u202e dlrow", ""])
def test_hostile_text_is_parsed_back_as_text(text: str) -> None:
    """In an element and in an attribute, without characters that no page can hold."""
    clean = single_line(text, 5000)
    page = Page(environment().from_string('<p title="{{ text }}">{{ text }}</p>').render(text=clean))
    assert page.elements == [("p", {"title": clean})]
    assert page.texts == ([clean] if clean else [])
    assert not any(ord(char) < 32 for char in clean)
    clean.encode()


def test_templates_clean_and_escape_every_text() -> None:
    template = environment().from_string("<p>{{ text }}{{ text|single_line(4) }}</p>")
    expected = "<p>&lt;&amp;&gt;\ufffd\ufffd long&lt;&amp;&gt;…</p>"
    assert template.render(text="<&>\x00\ud800 long") == expected


def test_json_cannot_end_its_script_element() -> None:
    block = environment().from_string("{{ value|script_json|safe }}").render(value={"text": HOSTILE})
    assert block == script_json({"text": HOSTILE})
    assert not set("<>&\u2028") & set(block)
    assert json.loads(block) == {"text": HOSTILE}
    with pytest.raises(ValueError, match="Out of range"):
        script_json([float("nan")])


@pytest.mark.parametrize("size", [(640, 480), (64, 48), (1, 1), (3000, 2), (2, 3000)])
def test_thumbnails_are_small_and_show_the_image(size: tuple[int, int]) -> None:
    """Even for noise. The aspect ratio is kept, and the colours of smooth images are."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    smooth = np.zeros_like(noise)
    smooth[..., 0] = np.linspace(40, 220, size[0])
    for pixels in (noise, smooth):
        kind, _, content = thumbnail(Image.fromarray(pixels)).partition(";base64,")
        assert kind in ("data:image/webp", "data:image/jpeg")
        small = Image.open(BytesIO(b64decode(content)))
        assert len(b64decode(content)) <= 8000
        assert min(small.size) >= 1 and max(small.size) <= 224
        if min(size) > 10:
            assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.02)
    if min(size) > 10:
        shown = np.asarray(small.convert("RGB").resize(size), dtype=float)
        assert np.abs(shown - smooth).mean() < 12


def test_tiny_maps_are_scaled_by_the_maximum_inside_the_image() -> None:
    """The strongest cells lie in the padding above the image and do not set the scale."""
    cells = np.array([[9.0, 9.0], [1.0, 2.0]])
    tiny = tiny_map(cells, (0, -10, 20, 10), (20, 10))
    assert (tiny.rows, tiny.columns) == (2, 2)
    assert list(b64decode(tiny.cells)) == [255, 255, 128, 255]
    assert list(b64decode(tiny_map(np.zeros((1, 2)), (0, 0, 2, 1), (2, 1)).cells)) == [0, 0]
    assert list(b64decode(tiny_map(np.array([[np.nan, 1.0]]), (0, 0, 2, 1), (2, 1)).cells)) == [0, 255]


def test_fine_maps_are_averaged_down() -> None:
    values = np.random.default_rng(0).random((96, 64))
    tiny = tiny_map(values, (0, 0, 64, 96), (64, 96))
    blocks = values.reshape(32, 3, 32, 2).mean(axis=(1, 3))
    found = np.frombuffer(b64decode(tiny.cells), np.uint8).reshape(tiny.rows, tiny.columns)
    np.testing.assert_allclose(found, 255 * blocks / blocks.max(), atol=1)


def fill_path(path: str, size: tuple[int, int]) -> np.ndarray:
    """The mask of an SVG path of convex contours without holes."""
    mask = np.zeros((size[1], size[0]), bool)
    for loop in path.strip("MZ").split("ZM"):
        points = np.array([[float(x) for x in point.split()] for point in loop.split("L")])
        mask |= fill_polygon(points, size)
    return mask


@pytest.mark.parametrize("size", [(640, 480), (30, 20), (3000, 400)])
def test_an_outline_encloses_the_mask(size: tuple[int, int]) -> None:
    """Filled, it is the mask but for the tolerance of tracing, also where the mask touches the edge of the image."""
    W, H = size
    y, x = np.mgrid[:H, :W]
    disc = np.hypot((x - 0.3 * W) / W, (y - 0.5 * H) / H) < 0.25
    corner = (x > 0.8 * W) & (y > 0.7 * H)
    path = outline(disc | corner)
    found = fill_path(path, size)
    assert path.count("M") == 2
    assert (found & (disc | corner)).sum() / (found | disc | corner).sum() > 0.93
    assert len(path) < 3000
    coordinates = np.array([float(number) for number in re.findall(r"[\d.]+", path)]).reshape(-1, 2)
    assert (coordinates >= 0).all() and (coordinates <= (W, H)).all()
    assert outline(np.zeros((H, W), bool)) == ""
    assert fill_path(outline(np.ones((H, W), bool)), size).mean() > 0.97


def test_a_gallery_keeps_the_first_and_the_worst_in_any_order() -> None:
    """Compared with sorting all samples; few cards are made."""
    random = np.random.default_rng(3)
    badness = random.integers(0, 12, 60) / 10  # many ties
    card = made_card(0, size=(8, 8), grid=2)
    rest = sorted(range(4, 60), key=lambda i: (-badness[i], i))[:3]
    for order in (range(60), random.permutation(60).tolist(), range(59, -1, -1)):
        gallery = Gallery(7)
        made = []

        def make(place: int, made: list[int] = made) -> Card:
            made.append(place)
            return dataclasses.replace(card, id=str(place))

        for place in order:
            gallery.offer(place, float(badness[place]), lambda place=place: make(place))  # type: ignore[misc]
        assert [int(one.id) for one in gallery.cards] == [0, 1, 2, 3, *sorted(rest)]
        if order == range(60):
            assert len(made) < 30
    empty = Gallery(0)
    empty.offer(1, 1.0, lambda: pytest.fail("there is no room"))
    assert empty.cards == []


def test_the_iou_of_a_head_is_that_of_its_own_boxes() -> None:
    random = np.random.default_rng(0)
    options = GroundingOptions()
    maps = [AttentionMaps(random.random((2, 3, 6, 6), dtype=np.float32), (0, 0, 60, 60), (60, 60)) for _ in range(4)]
    maps[0].attention[1, 2] = 0  # as for a layer that was not run
    truth = (10.0, 10.0, 40.0, 50.0)
    heads = [Head(0, 1), Head(1, 2)]
    means = mean_ious(heads, (2, 3), [box_ious(one, heads, truth, options) for one in maps])
    own = {head: [float(box_iou(ground_maps(one, [head], options).box, truth)) for one in maps] for head in heads}
    assert means[0, 1] == pytest.approx(np.mean(own[Head(0, 1)]))
    assert means[1, 2] == pytest.approx(np.mean(own[Head(1, 2)][1:]))
    assert np.isnan(means[[0, 1], [0, 0]]).all()


def test_spearman() -> None:
    x, y = np.array([0.1, 0.2, 0.2, 0.9]), np.array([0.3, 0.1, 0.5, 0.8])
    ranks = np.array([1, 2.5, 2.5, 4]), np.array([2, 1, 3, 4])
    found = spearman(x, y)
    assert found == pytest.approx((np.corrcoef(*ranks)[0, 1], 0.5))
    many = np.random.default_rng(0).random((2, 9))
    assert spearman(*many) == pytest.approx(tuple(spearmanr(*many)))
    assert spearman(x[:2], y[:2]) is None
    assert spearman(x, np.ones(4)) is None


@pytest.mark.parametrize(
    ("iou", "said"),
    [
        ((0.1, 0.2, 0.3, 0.4), "Spearman's rank correlation: -1.00 over 4 heads (p = 0.083)."),
        ((0.2, 0.1, 0.4, 0.3), "Spearman's rank correlation: -0.60 over 4 heads (p = 0.417)."),
        ((0.2, 0.2, 0.2, 0.2), "No rank correlation over 4 heads: one of the two is the same for all."),
        ((0.2, 0.1, np.nan, np.nan), "No rank correlation over 2 heads: there are too few."),
    ],
)
def test_the_caption_of_the_scatter_plot_counts_the_heads(iou: tuple[float, ...], said: str) -> None:
    ranking = made_ranking()
    measured = np.full((6, 8), np.nan)
    for head, value in zip(ranking.heads, iou, strict=False):
        measured[head.address] = value
    page = Page(render(made_report(heads=HeadFacts(ranking, (6, 8), iou=measured, iou_samples=20))))
    caption = "IoU of the box that each head makes by itself, mean over 20 samples. "
    assert caption + said in page.texts


def test_the_bottom_row_is_explained_if_it_is_shown() -> None:
    facts = made_report().heads
    assert facts is not None
    for shown in (facts, dataclasses.replace(facts, bottom_row=None)):
        text = " ".join(Page(render(made_report(heads=shown))).texts)
        assert ("Bottom row: the share of samples" in text) is (shown.bottom_row is not None)


def test_viridis_of_the_script_is_matplotlibs() -> None:
    script = (Path(lh.__file__).parent / "report/assets/common.js").read_text()
    inside = re.findall(r"VIRIDIS = \[(.*?)\];", script, re.DOTALL)[0]
    anchors = np.array(re.findall(r"\d+", inside), dtype=float).reshape(-1, 3)
    expected = matplotlib.colormaps["viridis"](np.linspace(0, 1, 17))[:, :3] * 255
    assert anchors.shape == (17, 3)
    np.testing.assert_allclose(anchors, expected, atol=1)


# ------------------------------------------------------------------------------------------------------ content


def test_the_page_shows_the_numbers_of_the_report() -> None:
    cards = [made_card(number, size=(64, 48), grid=4) for number in range(3)]
    report = made_report(cards, metrics={"acc@0.5": 0.25, "acc@0.5_interval": [0.2, 0.3], "num_masks": 1234})
    heads = report.heads
    assert heads is not None
    page = Page(render(report))
    texts = {part for text in page.texts for part in (text, *text.split(" · "))}
    assert {"0.250", "[0.20, 0.30]", "1,234", "made_0", "the thing number 2", "2026-01-02 03:04 UTC"} <= texts
    assert {"of 48 heads, 2 layers left out", f"{heads.ranking.tau:.3f}"} <= texts
    assert {"7", "broken.png: no such file"} <= texts

    rows = [row for row in page.of("tr") if "data-layer" in row]
    listed = [Head(int(row["data-layer"] or 0), int(row["data-head"] or 0)) for row in rows]
    assert listed == [head.address for head in heads.ranking.kept]
    assert [row.get("class") for row in rows].count("best") == 3
    values = [float(cell["data-value"] or "nan") for cell in page.of("td") if "data-value" in cell]
    columns = ("rank", "head", "frequency", "sum", "entropy", "bottom", "iou")
    by_head = {(row["layer"], row["head"]): row for row in head_facts(heads)["rows"]}
    expected = [{**by_head[head], "head": 8 * head.layer + head.head} for head in listed]
    flat = [row[column] for row in expected for column in columns]
    assert values == pytest.approx(flat, abs=1e-5)

    maps = page.data["cards"][2]["maps"]
    assert [one["name"] for one in maps] == ["L2H0", "L3H1", "L4H2", "combined"]
    assert maps[3]["cells"] == cards[2].combined.cells  # type: ignore[union-attr]


def test_heads_are_named_without_a_ranking_if_all_cards_share_them() -> None:
    cards = [made_card(number, size=(8, 8), grid=2) for number in range(2)]
    assert "L2H0 L3H1 L4H2" in Page(render(made_report(cards, heads=None))).texts
    cards[1] = dataclasses.replace(cards[1], heads=(Head(5, 5),))
    assert "localization heads" not in Page(render(made_report(cards, heads=None))).texts


def test_controls_and_differences_are_explained() -> None:
    row = {"mean_iou": [0.2, 0.1, 0.3], "difference": {"mean_iou": [0.3, 0.2, 0.4]}}
    page = Page(render(made_report(metrics={"mean_iou": 0.5, "controls": {"random_heads": row}})))
    assert "controls: lead of these heads over each" in page.texts
    assert any("random heads of the same layers" in text for text in page.texts)


def test_error_bars_match_the_numbers() -> None:
    ranking = made_ranking()
    best = dataclasses.replace(ranking.heads[0], selection_frequency=0.98, selection_frequency_std=0.1)
    facts = HeadFacts(dataclasses.replace(ranking, heads=(best, *ranking.heads[1:])), (6, 8))
    page = Page(render(made_report(heads=facts)))
    assert page.of("rect", class_="bar-value")[0]["width"] == "98.0"
    assert page.of("path", class_="bar-error")[0]["d"] == "M88.0 7H100.0M88.0 3.5V10.5M100.0 3.5V10.5"
    assert "98.0 ± 10.0 %" in page.texts


def test_boxes_are_clipped_to_the_image() -> None:
    card = dataclasses.replace(
        made_card(0, size=(64, 48), grid=4), boxes=((-5.0, 3.0, 70.0, 40.0), (1.0, 2.0, 3.0, 4.0)), truths=()
    )
    page = Page(render(made_report([card])))
    line = page.of("rect", class_="line predicted")[0]
    assert [line[name] for name in ("x", "y", "width", "height")] == ["0.0", "3.0", "64.0", "37.0"]
    assert [box["x"] for box in page.of("rect", class_="line predicted")] == ["0.0", "1.0"]
    assert not page.of("rect", class_="line truth")
    assert page.of("svg", class_="picture")[0]["viewbox"] == "0 0 64 48"


@pytest.mark.parametrize("where", ["card", "model", "reason", "option", "metric"])
def test_hostile_text_adds_no_markup(where: str) -> None:
    """The page has the elements, attributes and scripts that it has with a harmless text."""

    def page(text: str) -> Page:
        card = dataclasses.replace(made_card(0, size=(8, 8), grid=2), expression=text, id=text)
        groups = {"controls": {text: {text: text, "d": {text: text}}}, "c": {text: text}}
        changes: dict[str, Any] = {
            "card": {"cards": [card]},
            "model": {"model": text, "no_heads": text, "heads": None},
            "reason": {"failures": [BadEntry(1, text, text), BadEntry(2, text, f"{text}: {text}")]},
            "option": {"options": [(text, text)], "facts": [(text, text)]},
            "metric": {"metrics": {text: text, **groups}},
        }
        html = render(made_report(**changes[where]))
        html.encode()
        return Page(html)

    hostile, harmless = page(HOSTILE), page("harmless")
    assert [(tag, set(attributes)) for tag, attributes in hostile.elements] == [
        (tag, set(attributes)) for tag, attributes in harmless.elements
    ]
    cleaned = single_line(HOSTILE), single_line(HOSTILE, 80)
    assert any(text in shown for text in cleaned for shown in hostile.texts)
    assert len(hostile.scripts) == 2


def test_the_page_requests_nothing() -> None:
    """Its only URLs are `data:` and fragments, and its policy allows only its own style and script."""
    text = render(made_report([made_card(0)]))
    page = Page(text)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name != "style"
            if name in ("href", "src", "action", "srcset", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/"))
    assert "url(http" not in text and "@import" not in text
    policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy


def test_long_texts_and_many_failures_are_truncated() -> None:
    failures = [BadEntry(n, f"id_{n}", f"{n}.png: no such file") for n in range(1, 5001)]
    card = made_card(0, "word " * 100_000, size=(8, 8), grid=2)
    text = render(made_report([card], failures=failures))
    assert len(text) < 250_000
    page = Page(text)
    assert "5,000" in page.texts  # the count of the one reason
    assert "and 4,900 more in predictions.jsonl" in page.texts


def test_a_thousand_samples_stay_below_20_mb() -> None:
    """Even with images of noise, which compress worst, fine maps, both masks and long expressions."""
    base = [made_card(number, grid=64) for number in range(8)]
    texts = [{"id": f"made_{n}", "expression": f"{n} " + "x" * 290} for n in range(1000)]
    cards = [dataclasses.replace(base[n % 8], **text) for n, text in enumerate(texts)]
    assert len(render(made_report(cards)).encode()) < 20_000_000


def test_assets_are_packaged() -> None:
    """Each file is matched by a pattern of package-data."""
    root = Path(lh.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["localization_heads"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assets = set((root / "report/assets").iterdir())
    assert assets and assets <= packaged


# --------------------------------------------------------------------------------------------------- the stages


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Front]:
    def recorded(report: Report) -> str:
        text = render(report)
        REPORTS[text] = report
        return text

    stub_figures(monkeypatch)
    monkeypatch.setattr(page_module, "render", recorded)
    yield from fronts(tmp_path, monkeypatch, capsys)


def test_the_report_of_batch_shows_its_results(front: Front) -> None:
    """The ranking of heads.json, bottom rows and maps of the attention files, and boxes of predictions.jsonl."""
    write_data(front.folder, bbox=BOX)
    result = front.succeed(DATA, "k=2")
    assert f"wrote {front.out}/report.html" in result.out
    page, shown = page_of(front.out / "report.html"), heads_of(front.out / "report.html")
    heads = front.json("heads.json")["heads"]
    ranked = sorted((row for row in shown["rows"] if row["kept"]), key=lambda row: row["rank"])
    assert [(r["layer"], r["head"]) for r in ranked] == [(h["layer"], h["head"]) for h in heads]
    frequencies = [head["selection_frequency"] for head in heads]
    assert [row["frequency"] for row in ranked] == pytest.approx(frequencies, abs=1e-5)
    used = [Head(*head) for head in shown["used"]]
    assert used == [Head(4, 4), Head(5, 6)], "the heads known for the model"

    files = [load_attention(front.out / f"attention/entry_{n}.pkl") for n in range(5)]
    positive = np.array([m.attention > m.attention.mean((2, 3), keepdims=True) for m in files])
    bottom = positive[:, :, :, -1].all(-1).mean(0)
    options = default_grounding()
    for row in shown["rows"]:
        head = Head(row["layer"], row["head"])
        assert row["bottom"] == pytest.approx(bottom[head], abs=1e-5)
        ious = [float(box_iou(ground_maps(maps, [head], options).box, BOX)) for maps in files]
        assert row["iou"] == pytest.approx(np.mean(ious), abs=1e-5)

    cards = page.of("article", class_="card")
    assert len(page.data["cards"]) == 5
    for card, data, maps, line in zip(cards, page.data["cards"], files, front.lines(), strict=True):
        assert float(card["data-iou"] or -1) == pytest.approx(float(box_iou(line["bbox"], BOX)), abs=1e-4)
        assert float(card["data-score"] or -1) == pytest.approx(line["score"], abs=1e-4)
        assert [one["name"] for one in data["maps"]] == [*map(str, used), "combined"]
        expected = tiny_map(maps.attention[used[0]], maps.image_box, maps.image_size)
        assert data["maps"][0]["cells"] == expected.cells
    assert {"k", "2", "torch", "transformers", "data.jsonl", "Python"} <= set(page.texts)


def test_options_of_the_report(front: Front) -> None:
    write_data(front.folder)
    front.succeed(DATA, "report=false")
    assert not (front.out / "report.html").exists()
    front.finder(DATA, "report_samples=3")
    page = page_of(front.out / "report.html")
    assert len(page.of("article", class_="card")) == 3
    assert any(text.startswith("3 of 5 grounded samples: the first 2 ") for text in page.texts)
    front.finder(DATA, "report_samples=0")
    assert "No samples: report_samples=0." in page_of(front.out / "report.html").texts


def test_the_report_of_find_says_why_it_has_no_samples(front: Front) -> None:
    write_data(front.folder)
    front.succeed("stage=find", DATA)
    page = page_of(front.out / "report.html")
    assert page.data["cards"] == []
    rows = heads_of(front.out / "report.html")["rows"]
    assert all(row["bottom"] is not None and row["iou"] is None for row in rows)
    assert sum("find keeps" in text for text in page.texts) == 2


def test_the_report_of_evaluate_shows_metrics_and_the_known_ranking(front: Front) -> None:
    """It says why there is no ranking, and shows heads.json once it exists, next to the heads that were used."""
    mask = np.zeros((48, 64), bool)
    mask[10:30, 10:40] = True
    write_data(front.folder, bbox=BOX, mask=encode_mask(mask))
    options = ("stage=evaluate", DATA, "heads=[2-0,3-1]")
    front.succeed(*options, "controls=false")
    page = page_of(front.out / "report.html")
    assert f"{front.json('metrics.json')['mean_iou']:.3f}" in page.texts
    assert heads_of(front.out / "report.html") is None
    assert any(text.startswith("No ranking: heads.json is not there") for text in page.texts)
    assert len(page.of("path", class_="line truth-mask")) == 5
    assert all(len(card["maps"]) == 3 for card in page.data["cards"])
    assert not (front.out / "statistics").exists()

    front.succeed("stage=find", DATA)
    known = (front.out / "heads.json").read_bytes()
    front.succeed(*options)
    assert (front.out / "heads.json").read_bytes() == known
    page = page_of(front.out / "report.html")
    assert any(text.startswith("The ranking of heads.json, which lists") for text in page.texts)
    heads = heads_of(front.out / "report.html")
    assert heads["used"] == [[2, 0], [3, 1]]
    shape = heads["layers"], heads["heads"]
    assert {(row["layer"], row["head"]) for row in heads["rows"]} <= set(np.ndindex(shape))
    used = [row for row in heads["rows"] if [row["layer"], row["head"]] in heads["used"]]
    assert all(row["iou"] is not None for row in used)


def test_evaluate_ranks_its_own_samples_without_a_heads_file(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `find` does, which then need not run the model. Only `find` writes heads.json."""
    write_data(front.folder, bbox=BOX)
    front.succeed(*EVALUATE)
    assert not (front.out / "heads.json").exists()
    page = page_of(front.out / "report.html")
    own = heads_of(front.out / "report.html")
    text = " ".join(page.texts)
    assert "Ranked on these samples, without their ground truth, because heads.json is not there." in text
    assert "The boxes on this page were made by L2H0 L3H1, which this ranking did not choose." in text
    assert own["used"] == [[2, 0], [3, 1]]
    assert "mean over 5 samples" in text and page.of("div", id="scatter-chart")
    assert len(own["rows"]) == own["layers"] * own["heads"]

    monkeypatch.setattr(LVLM, "attend_batch", lambda *_, **__: pytest.fail("the statistics are stored"))
    front.succeed("stage=find", DATA, "batch_size=2")
    found = heads_of(front.out / "report.html")
    assert all(row.pop("iou") is None for row in found["rows"])
    assert all(row.pop("iou") is not None for row in own["rows"])
    assert {**found, "used": own["used"]} == own


def test_heads_of_a_large_model_are_scored_on_fewer_samples(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localization_heads.stages.report.IOU_HEADS", 10)
    monkeypatch.setattr("localization_heads.stages.report.IOU_SAMPLES_ALL_HEADS", 3)
    write_data(front.folder, bbox=BOX)
    front.succeed(*EVALUATE)
    texts = page_of(front.out / "report.html").texts
    assert any("makes by itself, mean over 3 samples." in text for text in texts)
    assert all(row["iou"] is not None for row in heads_of(front.out / "report.html")["rows"])


@pytest.mark.parametrize("statistics_lost", [False, True])
def test_a_resumed_evaluate_ranks_the_same(front: Front, calls: Calls, statistics_lost: bool) -> None:
    """After a kill between two chunks, even if the stored statistics are lost."""
    write_data(front.folder, bbox=BOX)
    front.succeed(*EVALUATE, "output_dir=whole")
    calls.restart(fail_at=2)
    assert front.finder(*EVALUATE).status == 130
    if statistics_lost:
        next((front.out / "statistics").glob("*.bin")).unlink()
    calls.restart()
    front.succeed(*EVALUATE)
    assert len(calls) == (3 if statistics_lost else 1)
    assert heads_of(front.out / "report.html") == heads_of(Path("whole/tiny/report.html"))


def test_evaluate_ranks_only_usable_samples(front: Front) -> None:
    """If all drawn samples have failed there is no ranking, but there are scores."""
    write_data(front.folder, count=2, bbox=BOX)
    Path("image_0.png").write_bytes(b"no image")
    assert front.finder(*EVALUATE).status == 1
    heads = heads_of(front.out / "report.html")
    assert len(heads["rows"]) == heads["layers"] * heads["heads"]
    draws_first = (s for s in range(9) if np.random.default_rng(s).choice(2, 1, replace=False)[0] == 0)
    options = (f"random_seed={next(draws_first)}", "num_samples=1", "num_trials=1")
    assert front.finder(*EVALUATE, *options).status == 1
    assert heads_of(front.out / "report.html") is None
    assert front.json("metrics.json")["num_samples"] == 1


def test_failures_are_counted_and_listed(front: Front) -> None:
    good = Path(write_data(front.folder, count=2)).read_text().splitlines()
    missing = [{"id": f"gone_{n}", "prompt": "the dog", "image_path": f"gone_{n}.png"} for n in range(3)]
    write_lines(Path("data.jsonl"), [*good, *missing, "{"])
    assert front.finder(DATA).status == 1
    page = page_of(front.out / "report.html")
    assert {"Failures: 4", "of 6 entries", "gone_0", "gone_1", "gone_2"} <= set(page.texts)


def test_a_card_shows_every_box_and_mask() -> None:
    first, second = np.zeros((2, 8, 8), dtype=bool)
    first[:4, :4], second[5:, 5:] = True, True
    boxes = ((0.0, 0.0, 4.0, 4.0), (5.0, 5.0, 8.0, 8.0))
    found = [Instance(box, 0.5, encode_mask(mask)) for box, mask in zip(boxes, (first, second), strict=True)]
    said = Prediction("a", bbox=boxes[0], score=0.5, mask=found[0].mask, boxes=found)
    sample = lh.Sample("a.png", "the dogs", id="a", boxes=boxes[::-1])
    card = _complete_card(made_card(0, size=(8, 8), grid=2), Outcome(sample, said))
    assert (card.boxes, card.truths) == (boxes, boxes[::-1])
    assert (fill_path(card.mask, (8, 8)) == (first | second)).all()
    one = _complete_card(card, Outcome(sample, dataclasses.replace(said, boxes=None)))
    assert one.boxes == boxes[:1] and (fill_path(one.mask, (8, 8)) == first).all()


def test_a_card_survives_json() -> None:
    bare = Card("b", "the dog", (8, 8), "")
    for card in (made_card(3, size=(64, 48)), bare):
        assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_a_card_without_room_among_some_samples_has_none_among_more() -> None:
    """So neither workers nor interrupted runs need make it."""
    random = np.random.default_rng(4)
    card = made_card(0, size=(8, 8), grid=2)
    for _ in range(20):
        badness = (random.integers(0, 9, 40) / 8).tolist()
        some, whole = Gallery(6), Gallery(6)
        order = random.permutation(40).tolist()
        part = [place for place in order[:20] if some.offer(place, badness[place], lambda: card)]
        for place in sorted(order):
            whole.offer(place, badness[place], lambda place=place: dataclasses.replace(card, id=str(place)))  # type: ignore[misc]
        shown = {int(one.id) for one in whole.cards}
        assert shown & set(order[:20]) <= set(part)


def test_a_resumed_evaluate_shows_logged_cards(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their maps and images."""
    write_data(front.folder, bbox=BOX)
    options = ("stage=evaluate", DATA, "worst=0")

    def interrupt(_: ResultLog) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultLog, "finish", interrupt)
        assert front.finder(*options).status == 130
    monkeypatch.setattr(LVLM, "attend_batch", lambda *_, **__: pytest.fail("it is in the log"))
    front.succeed(*options)
    page = page_of(front.out / "report.html")
    assert [len(card["maps"]) for card in page.data["cards"]] == [4] * 5
    assert len(page.of("image")) == 5
    assert len(page.of("rect", class_="line predicted")) == 5


@pytest.mark.parametrize("invalid", [{}, {"point": [1, 2]}, {"prediction": [], "point": 3}, {"card": {}}])
def test_an_invalid_log_entry_is_computed_again(
    front: Front, monkeypatch: pytest.MonkeyPatch, invalid: dict[str, Any]
) -> None:
    write_data(front.folder, count=1, bbox=BOX)
    monkeypatch.setattr(ResultLog, "get", lambda *_: invalid)
    front.succeed("stage=evaluate", DATA, "report=false")
    assert json.loads((front.out / "metrics.json").read_text())["num_samples"] == 1


# ---------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a hostile sample among forty."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    cards = [made_card(number, size=(64, 48)) for number in range(40)]
    cards[3] = dataclasses.replace(cards[3], expression=HOSTILE, id=HOSTILE)
    cards[4] = dataclasses.replace(cards[4], maps=(), combined=None, image="", boxes=(), truths=(), iou=None)
    failures = [BadEntry(1, HOSTILE, HOSTILE)]
    path.write_bytes(render(made_report(cards, failures=failures, model=HOSTILE)).encode())
    return path


CARDS_WITH_MAPS = "[...document.querySelectorAll('.card')].filter(c => c.querySelector('.maps button')).length"


def enter(page: Browser, selector: str, value: str, event: str) -> None:
    """Give the element a value, as a user would."""
    page.run(
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event({event!r})); }})"
        f"(document.querySelector({selector!r}))"
    )


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_without_errors_or_requests(
    chromium: Browser, report_file: Path, width: int, dark: bool
) -> None:
    """It never scrolls sideways, and hostile texts do not run."""
    chromium.open(report_file, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.requests == [report_file.resolve().as_uri()]
    assert chromium.run("typeof boom") == "undefined"
    assert chromium.run("document.documentElement.scrollWidth") <= width
    light = chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark
    shown = chromium.run("document.querySelectorAll('.card h3')[3].textContent")
    assert shown == single_line(HOSTILE)


@needs_chromium
def test_texts_of_charts_are_not_clipped(chromium: Browser, report_file: Path) -> None:
    for width in (360, 1280):
        chromium.open(report_file, width=width)
        assert chromium.run("document.querySelectorAll('.chart svg').length") == 7
        outside = chromium.run(
            """[...document.querySelectorAll('.chart svg')].flatMap(svg => {
                 const frame = svg.getBoundingClientRect();
                 return [...svg.querySelectorAll('text')].filter(text => {
                   const r = text.getBoundingClientRect();
                   return r.left < frame.left - 1 || r.right > frame.right + 1
                     || r.top < frame.top - 2 || r.bottom > frame.bottom + 2;
                 }).map(text => text.textContent); })"""
        )
        assert outside == []


@needs_chromium
@pytest.mark.parametrize(
    ("frequency", "iou"),
    [((0.15, 0.45), (0.4, 0.6)), ((0.02, 0.9), (0.0, 0.5)), ((1.0, 1.0), (0.55, 0.55))],
)
def test_the_scatter_plot_fills_its_axes(
    chromium: Browser, tmp_path: Path, frequency: tuple[float, float], iou: tuple[float, float]
) -> None:
    """Values that differ span more than a third of the chart in each direction; tooltips show each head's numbers."""
    ranking = made_ranking()
    shares = np.linspace(*frequency, len(ranking.kept))
    heads = tuple(
        dataclasses.replace(head, selection_frequency=float(share))
        for head, share in zip(ranking.kept, shares[::-1], strict=True)
    )
    values = np.resize(np.linspace(*iou, 5), (6, 8))
    facts = HeadFacts(dataclasses.replace(ranking, heads=heads), (6, 8), iou=values, iou_samples=9)
    path = tmp_path / "report.html"
    path.write_text(render(made_report(heads=facts)), encoding="utf-8")
    chromium.open(path)
    assert chromium.complaints == []
    found = chromium.run(
        """(svg => ({
             tips: [...svg.querySelectorAll('title')].map(t => t.textContent),
             marks: [...svg.querySelectorAll('title')].map(t => (r => [r.x + r.width / 2, r.y + r.height / 2])(
               t.parentNode.getBoundingClientRect())),
             frame: (r => [r.x, r.y, r.width, r.height])(svg.getBoundingClientRect()),
           }))(document.querySelector('#scatter-chart svg'))"""
    )
    marks, (x, y, width, height) = np.array(found["marks"]), found["frame"]
    assert (marks >= (x, y)).all() and (marks <= (x + width, y + height)).all()
    for span, drawn, length in ((frequency, marks[:, 0], width), (iou, marks[:, 1], height)):
        assert span[0] == span[1] or np.ptp(drawn) > 0.33 * length
    assert sorted(found["tips"]) == sorted(
        f"{one.address}: selected {100 * one.selection_frequency:.1f} %, IoU {100 * values[one.address]:.1f} %"
        for one in heads
    )


@needs_chromium
def test_charts_name_their_statistics(chromium: Browser, report_file: Path) -> None:
    """And the curve names the layers that it covers."""
    chromium.open(report_file)
    for chart, text in {
        "curve-chart": "Heads of layers 2 and up, in ascending order",
        "grid-frequency": "Selection frequency (%)",
        "grid-sum": "Attention sum",
        "grid-iou": "Mean IoU (%)",
    }.items():
        assert text in chromium.run(f"[...document.querySelectorAll('#{chart} text')].map(t => t.textContent)")


@needs_chromium
def test_tooltips_show_each_heads_value_and_the_best_is_brightest(chromium: Browser, report_file: Path) -> None:
    chromium.open(report_file)
    rows = head_facts(made_report().heads)["rows"]
    units = {"frequency": 100, "sum": 1, "entropy": 1, "bottom": 100, "iou": 100}
    for name, unit in units.items():
        cells = chromium.run(
            f"""[...document.querySelectorAll('#grid-{name} title')].map(
                 t => [t.textContent, t.parentNode.getAttribute('fill')])"""
        )
        values = {
            str(Head(r["layer"], r["head"])): None if name == "frequency" and r["layer"] < 2 else r[name] for r in rows
        }
        said = dict(text.split(": ") for text, _ in cells)
        assert said == {head: "no value" if value is None else f"{unit * value:.3g}" for head, value in values.items()}
        best = max(values, key=lambda head: -1 if values[head] is None else values[head])
        fills = {text.split(":")[0]: fill for text, fill in cells}
        assert fills[best] == "#fde725"
        assert [head for head in values if fills[head] == "none"] == [h for h in values if values[h] is None]


@needs_chromium
def test_charts_are_legible_in_light_and_dark(chromium: Browser, report_file: Path) -> None:
    """The figures are drawn in black on white, and recoloured in dark mode."""
    for dark in (False, True):
        chromium.open(report_file, dark=dark)
        colours = chromium.run(
            """(svg => [svg.querySelector('text'), svg.querySelector('path')].map(e => getComputedStyle(e).fill))(
                 document.querySelector('#curve-chart svg'))"""
        )
        text, ground = (np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in colours)
        assert (text - ground > 100) if dark else (ground - text > 100)


@needs_chromium
def test_the_gallery_can_be_sorted_and_filtered(chromium: Browser, report_file: Path) -> None:
    chromium.open(report_file)
    visible = "[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => +c.dataset.number)"
    assert chromium.run(visible) == list(range(40))
    known = [n for n in range(40) if n != 4]  # card 4 has no IoU, and comes last
    for order, sign in (("iou up", 1), ("iou down", -1)):
        enter(chromium, "#gallery-controls select", order, "change")
        chromium.settle()
        assert chromium.run(visible) == [*sorted(known, key=lambda n: sign * (n * 61 % 100)), 4]
    for words, expected in {
        "NUMBER 17": {17}, "made_1": {1, *range(10, 20)}, "onerror": {3}, "nothing": set(),
    }.items():  # fmt: skip
        enter(chromium, "input", words, "input")
        assert set(chromium.run(visible)) == expected
    assert chromium.run("document.querySelector('.count').textContent") == "0 of 40 samples"


@needs_chromium
def test_maps_are_drawn_on_demand_and_laid_over_the_image(chromium: Browser, report_file: Path) -> None:
    """When a card comes near the screen; a button lays the map, in viridis with alpha, over the large image."""
    chromium.open(report_file, height=300)
    assert chromium.run(CARDS_WITH_MAPS) < 20
    chromium.run("document.querySelector('.card').scrollIntoView({behavior: 'instant'})")
    chromium.settle()
    assert 1 <= chromium.run(CARDS_WITH_MAPS) < 40
    chromium.run("document.querySelector('.card .maps button').click()")
    address = chromium.run("document.querySelector('.card .large .map image').getAttribute('href')")
    pixels = np.asarray(Image.open(BytesIO(b64decode(address.partition(",")[2]))))
    cells = np.frombuffer(b64decode(chromium.run("data.cards[0].maps[0].cells")), np.uint8).reshape(24, 24)
    assert pixels.shape == (24, 24, 4)
    np.testing.assert_allclose(pixels[..., 3], 255 * (0.1 + 0.75 * cells / 255), atol=1)
    expected = matplotlib.colormaps["viridis"](cells / 255.0)[..., :3] * 255
    strong = cells > 128  # low cells are nearly clear, and a canvas keeps few of their bits
    np.testing.assert_allclose(pixels[..., :3][strong], expected[strong], atol=9)
    assert chromium.run("document.querySelector('.card .maps button').getAttribute('aria-pressed')") == "true"
    chromium.run("document.querySelector('.card .maps button').click()")
    assert chromium.run("document.querySelector('.card .large .map').childElementCount") == 0


@needs_chromium
def test_the_ranking_is_sorted_by_its_headers(chromium: Browser, report_file: Path) -> None:
    """A second click reverses the order."""
    chromium.open(report_file)
    rows = [row for row in head_facts(made_report().heads)["rows"] if row["kept"]]
    listed = "[...document.querySelectorAll('#ranking tbody tr')].map(r => [+r.dataset.layer, +r.dataset.head])"
    for column, key, sign in ((3, "sum", -1), (4, "entropy", 1), (6, "iou", -1), (6, "iou", 1)):
        chromium.run(f"document.querySelectorAll('#ranking th button')[{column}].click()")
        expected = sorted(rows, key=lambda row: sign * row[key])
        assert chromium.run(listed) == [[row["layer"], row["head"]] for row in expected]
        assert chromium.run("document.querySelectorAll('#ranking th[aria-sort]').length") == 1


@needs_chromium
def test_without_scripts_ranking_and_images_are_visible(chromium: Browser, report_file: Path) -> None:
    chromium.open(report_file, script=False, height=6000)  # distant cards are not rendered
    text = Image.open(BytesIO(b64decode(chromium.call("Page.captureScreenshot")["data"])))
    assert len(np.unique(np.asarray(text.convert("L")))) > 50  # the page is not blank
    tree = json.dumps(chromium.call("Accessibility.getFullAXTree"))
    assert "Scripts are off" in tree and "the thing number 0" in tree and "selection frequency" in tree


@needs_chromium
def test_a_thousand_samples_open_quickly(chromium: Browser, tmp_path: Path) -> None:
    """The bounds suit a busy machine; drawing every map at once would take many times as long."""
    base = [made_card(number) for number in range(8)]
    cards = [dataclasses.replace(base[n % 8], id=f"made_{n}") for n in range(1000)]
    path = tmp_path / "report.html"
    path.write_bytes(render(made_report(cards)).encode())
    chromium.open(path)
    assert chromium.run("document.querySelectorAll('.card').length") == 1000
    assert chromium.run("performance.getEntriesByType('navigation')[0].loadEventEnd") < 10_000
    assert chromium.run("document.querySelectorAll('.maps button').length") < 400


@needs_chromium
def test_printing_draws_every_map(chromium: Browser, report_file: Path) -> None:
    chromium.open(report_file, dark=True)
    content = b64decode(chromium.call("Page.printToPDF", printBackground=True)["data"])
    assert content.startswith(b"%PDF")
    assert chromium.run(CARDS_WITH_MAPS) == 39  # one card has none
    assert chromium.complaints == []


def test_the_thumbnail_of_a_photograph_stays_close_to_it() -> None:
    photo = load_image(Path(lh.__file__).parent.parent / "examples/images/cat.jpg")
    small = Image.open(BytesIO(b64decode(thumbnail(photo).partition(",")[2]))).convert("RGB")
    one, two = (np.asarray(image.resize((64, 48)), float) for image in (photo, small))
    assert np.abs(one - two).mean() < 8
