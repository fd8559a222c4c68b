"""`stage=trace`: its page and figure, their safety and size, and the page in a browser."""

from __future__ import annotations

import itertools
import json
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Browser, needs_chromium
from front import Front, draw_image, write_data
from PIL import Image
from report_samples import HOSTILE
from test_figures import assert_all_text_fits, texts
from test_report import Page

from localization_heads import figures
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import TokenizedText, Trace
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import GroundingOptions
from localization_heads.report.content import embedded
from localization_heads.report.trace import ATTEMPTS, MAX_BYTES, render_trace
from localization_heads.report.values import single_line

IMAGE = ("image_file=cat.png", "query=what is it?")
SIZE = 80, 60
SHARP = GroundingOptions(sigma=0)


def made_trace(words: list[str], *, k: int = 2, grid: int = 6, **changed: Any) -> Trace:
    """A trace with one token per word, each of which attends to one cell, row by row from the left."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    places = tuple((end - len(word) - 1, end - 1) for word, end in zip(words, ends, strict=True))
    rows = np.full((len(words) + 1, k, grid, grid), 1e-4, np.float32)
    for n in range(len(words)):
        rows[n, :, n // grid % grid, n % grid] = np.linspace(0.3, 0.6, k)
    known: dict[str, Any] = {
        "query": "what is it?",
        "spelled": TokenizedText(" ".join(words), places),
        "token_ids": tuple(range(len(words))),
        "heads": tuple(Head(3, n) for n in range(k)),
        "rows": rows,
        "masses": rows.sum(axis=(2, 3)),
        "image_box": (0.0, 0.0, 80.0, 60.0),
        "image_size": SIZE,
        "options": SHARP,
        "model": "made",
        "image_file": "cat.png",
    }
    return Trace(**{**known, **changed})


def noise(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_the_page_shows_the_trace() -> None:
    page = Page(render_trace(made_trace(["a", "dog"]), noise()))
    assert len(page.of("button", role="radio")) == 3
    assert {"what is it?", "the whole answer", "a", "dog", "L3H0", "L3H1"} <= set(page.texts)
    assert {"0 0 13 10", "13 0 27 10", "0.303"} <= set(page.texts)
    whole, first, second = data_of(page)["parts"]
    assert first["box"] == [0, 0, 13.3, 10]
    assert second["masses"] == [0.3035, 0.6035]
    assert len(first["maps"]) == 3  # the combined map, and one per head
    for part, cells in ((first, [0]), (second, [1]), (whole, [0, 1])):
        values = np.frombuffer(b64decode(part["maps"][0]["cells"]), np.uint8)
        assert (values == 255).nonzero()[0].tolist() == cells
        assert values.shape == (36,)


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0])


def test_the_map_of_a_word_is_the_mean_over_its_tokens() -> None:
    """0.4 and 0.2 at one cell, 0.3 and 0 at another: the first gets twice as much."""
    rows = np.zeros((3, 2, 2, 2), np.float32)
    rows[0, 1], rows[1, 1] = [[0.4, 0], [0, 0.3]], [[0.2, 0], [0, 0]]
    trace = made_trace(["owls"], rows=rows, token_ids=(1, 2), spelled=TokenizedText("owls", ((0, 3), (3, 4))))
    word = data_of(Page(render_trace(trace, None)))["parts"][1]
    assert list(b64decode(word["maps"][2]["cells"])) == [255, 0, 0, 128]
    assert not any(b64decode(word["maps"][1]["cells"]))


def test_a_page_without_image_words_or_single_heads() -> None:
    silent = made_trace([])
    assert "The model gave no answer." in Page(render_trace(silent, noise())).texts
    trace = made_trace(["yes"])
    mean = replace(trace, rows=trace.rows.mean(axis=1, keepdims=True))
    page = Page(render_trace(mean, None))
    assert page.of("button", class_="head") == []
    assert page.of("rect", class_="no-image")
    assert "L3H1" in page.texts
    every = np.zeros((2, 5, 4, 6, 6), np.float32)
    every[0, 3, 2, 0, 0], every[0, 1, 0] = 0.5, 0.005
    grid = data_of(Page(render_trace(replace(trace, every=every), None)))["parts"][1]["grid"]
    found = np.frombuffer(b64decode(grid["cells"]), np.uint8).reshape(5, 4)
    assert (grid["rows"], grid["columns"], grid["top"]) == (5, 4, 0.5)
    assert (found[3, 2], found[1, 0], found.astype(int).sum()) == (
        255,
        92,
        347,
    )  # the sum of 36 cells of 0.005, of 0.5


@pytest.mark.parametrize("where", ["query", "answer", "image_file", "model"])
def test_hostile_text_adds_no_markup(where: str) -> None:
    def page(text: str) -> Page:
        spelled = TokenizedText(text, ((0, len(text)),))
        changed: dict[str, Any] = {"spelled": spelled} if where == "answer" else {where: text}
        return Page(render_trace(made_trace(["yes"], **changed), noise()))

    hostile, harmless = page("".join(HOSTILE.split())), page("harmless")
    assert [(tag, set(given)) for tag, given in hostile.elements] == [
        (tag, set(given)) for tag, given in harmless.elements
    ]
    assert len(hostile.scripts) == 2
    said = " ".join(hostile.texts)
    assert single_line("".join(HOSTILE.split()), 60)[:50] in said
    for _, attributes in hostile.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert (value or "").startswith("data:image/jpeg")
    policy = hostile.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_pages_stay_small() -> None:
    """With the longest answer, many heads with fine maps, and a large image of noise."""
    words = [f"w{n}" for n in range(1024)]
    assert len(render_trace(made_trace(words, k=9, grid=33), noise())) < 5_000_000
    shorter = Page(render_trace(made_trace(words[:100], k=12, grid=40), None))
    assert len(data_of(shorter)["parts"][1]["maps"]) == 9
    image = embedded(noise((3000, 2000)), "jpeg", ATTEMPTS, MAX_BYTES)
    assert len(b64decode(image.partition(",")[2])) <= MAX_BYTES


ODD = ["abcdefgh" * 30, "左边的猫", "$\\frac{1}{", "<b>"]


@pytest.mark.parametrize(("size", "words"), [(SIZE, []), ((40, 400), ["yes"]), ((400, 40), ODD), (SIZE, ODD * 8)])
def test_texts_of_the_figure_are_not_clipped(size: tuple[int, int], words: list[str]) -> None:
    trace = made_trace(words, image_size=size, image_box=(0.0, 0.0, *map(float, size)))
    figure = figures.plot_trace(noise(size), trace)
    assert_all_text_fits(figure)
    assert len([axes for axes in figure.axes if axes.get_title()]) == min(len(words), 24)
    assert any("8 more words" in text for text in texts(figure)) is (len(words) == 32)


def test_the_figure_draws_the_box_of_each_word() -> None:
    figure = figures.plot_trace(noise(), made_trace(["a", "dog"]))
    boxes = [tuple(np.round(p.get_bbox().extents, 1)) for axes in figure.axes[:2] for p in axes.patches[:1]]
    assert boxes == [(0, 0, 13.3, 10), (13.3, 0, 26.7, 10)]
    assert "what is it? → a dog" in texts(figure)


# --------------------------------------------------------------------------------------------------- the stage


def test_the_stage_writes_page_and_figure(front: Front) -> None:
    draw_image(front.folder / "cat.png")
    result = front.succeed("stage=trace", *IMAGE, "max_new_tokens=6", "trace.keep=all")
    stem = front.out / "attention" / "cat_what-is-it_trace"
    for suffix in (".html", ".png"):
        assert f"wrote {stem}{suffix}" in result.out
    page = Page(stem.with_suffix(".html").read_text(encoding="utf-8"))
    data = data_of(page)
    assert data["size"] == [64, 48]
    assert [data["parts"][0]["grid"][name] for name in ("rows", "columns")] == [6, 8]
    assert "cat.png" in page.texts
    assert any(text in result.out for text in page.texts)
    assert Image.open(stem.with_suffix(".png")).width > 100


def test_an_interrupted_run_resumes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad entries fail alone; pages are written again only if the options change."""
    write_data(front.folder, 3)
    with (front.folder / "data.jsonl").open("a") as file:
        file.write('{"id": "gone", "prompt": "the dog", "image_path": "no.png"}\n')
    traced: list[str] = []
    trace = LVLM.trace

    def spy(self: LVLM, image: Any, query: str, *arguments: Any, **named: Any) -> Trace:
        if len(traced) == 2:
            raise KeyboardInterrupt
        traced.append(query)
        return trace(self, image, query, *arguments, **named)

    given = ("stage=trace", "data_file=data.jsonl", "max_new_tokens=2")
    with monkeypatch.context() as patch:
        patch.setattr(LVLM, "trace", spy)
        assert front.finder(*given).status != 0
        assert traced == ["the dog", "the red car on the left"]
        pages = [front.out / "attention" / f"entry_{n}_trace.html" for n in range(3)]
        assert [page.is_file() for page in pages] == [True, True, False]
        before = pages[0].read_bytes()
        traced.clear()
        result = front.finder(*given)
    assert result.status == 1  # because of the missing image
    assert "no.png" in result.out + result.err
    assert traced == ["the cat"]
    assert "its page was there already" in result.out
    assert pages[0].read_bytes() == before
    front.succeed(*given, "trace.step=reads", "end_index=1")
    assert pages[0].read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["query=what?"], "image_file= is missing: stage=trace needs image_file and query"),
        ([*IMAGE, "max_new_tokens=5000"], "max_new_tokens=5000"),
        ([*IMAGE, "heads=[9-9]"], "heads: there is no L9H9"),
        ([*IMAGE, "trace.keep=some"], "trace.keep=some: choose one of heads, mean, all"),
        ([*IMAGE, "engine=ray"], "engine=ray: one image cannot be spread"),
    ],
)
def test_wrong_use_ends_with_one_line(front: Front, options: list[str], message: str) -> None:
    draw_image(front.folder / "cat.png")
    assert message in front.error("stage=trace", *options)


# -------------------------------------------------------------------------------------------------- a browser


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_words_can_be_chosen_with_the_keyboard(chromium: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    """The page never scrolls sideways, requests nothing, and runs no hostile text."""
    hostile = "".join(HOSTILE.split())
    path = tmp_path / "trace.html"
    path.write_bytes(render_trace(made_trace([hostile, "dog", "end"], query=HOSTILE), noise()).encode())
    chromium.open(path, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.requests == [path.resolve().as_uri()]
    assert chromium.run("typeof boom") == "undefined"
    assert chromium.run("document.documentElement.scrollWidth") <= width

    def state() -> list[Any]:
        return chromium.run(
            "[document.querySelectorAll('#words [aria-checked=true]').length,"
            " [...words].indexOf(document.activeElement),"
            " document.querySelector('#words [aria-checked=true]').tabIndex,"
            " document.querySelector('#shapes rect.line')?.getAttribute('x'),"
            " document.querySelector('#heads .figure').textContent]"
        )

    chromium.run("document.querySelector('#words [tabindex=\"0\"]').focus()")
    assert state() == [1, 1, 0, "0", "0.303"]
    steps = {
        "ArrowRight": (2, "13.3"),
        "End": (3, "26.7"),
        "ArrowDown": (3, "26.7"),
        "ArrowLeft": (2, "13.3"),
    }
    for key, (word, x) in steps.items():
        chromium.key(key)
        assert state() == [1, word, 0, x, "0.303"], key
    said = chromium.run("document.getElementById('said').textContent")
    assert said.startswith("“dog”: map of all heads together; box 13 0 27 10")
    drawn = "document.querySelector('#map image').getAttribute('href').startsWith('data:image/png')"
    assert chromium.run(drawn)
    chromium.run("document.querySelectorAll('button.head')[2].click()")
    assert chromium.run(drawn)
    assert chromium.run("document.getElementById('said').textContent") == "“dog”: map of L3H1"
    assert chromium.run("document.querySelectorAll('#shapes rect').length") == 0


@needs_chromium
def test_without_scripts_the_words_are_visible(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "trace.html"
    path.write_bytes(render_trace(made_trace(["a", "dog"]), noise()).encode())
    chromium.open(path, script=False)
    shown = chromium.run("document.body.innerText")
    assert "Scripts are off" in shown
    assert "13 0 27 10" in shown
