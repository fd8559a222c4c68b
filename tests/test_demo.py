"""The demo: what a question, a click and a slider do; and the page itself in a browser, where there is one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from front import cached_load_model
from PIL import Image
from scipy import ndimage

from localization_heads.apps.demo import drawing
from localization_heads.apps.demo.session import (
    Asked,
    as_json,
    ask,
    example_pictures,
    parse_heads,
    split_expressions,
    toggled,
)
from localization_heads.data.masks import read_mask
from localization_heads.data.scenes import VALIDATION_SEEDS, scene_samples
from localization_heads.errors import UsageError
from localization_heads.evaluation.metrics import box_iou
from localization_heads.figures.canvas import VERMILLION
from localization_heads.grounding.maps import GroundingOptions
from localization_heads.heads.head import Head
from localization_heads.lvlm import loading
from localization_heads.stages.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@cache
def options() -> dict[str, Any]:
    """The options of `config/demo.yaml`, composed."""
    from hydra import compose, initialize_config_module

    from localization_heads.apps.frontdoor import plain_options

    with initialize_config_module("localization_heads.config", version_base=None):
        return plain_options(compose("demo", overrides=["device=cpu", "open_browser=false"]))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Run:
    monkeypatch.setattr(loading, "load_model", cached_load_model)
    return Run({**options(), "output_dir": str(tmp_path)})


@pytest.fixture
def asked(run: Run) -> Asked:
    picture, expression = example_pictures(1)[0]
    return ask(run, picture, f"{expression}; something else")


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "what to look for"), (" ; \n", "what to look for"), ("a;b;c;d;e;f;g", "at most 6")],
)
def test_texts_that_name_nothing(text, said):
    with pytest.raises(UsageError, match=said):
        split_expressions(text)


def test_a_question_without_a_picture(run):
    with pytest.raises(UsageError, match="choose a picture"):
        ask(run, None, "the dog")


def test_heads_from_text_and_clicks():
    assert parse_heads("L2H0, 3-1 L2H0") == [Head(2, 0), Head(3, 1)]
    assert toggled([Head(2, 0)], Head(3, 1)) == [Head(2, 0), Head(3, 1)]
    assert toggled([Head(2, 0), Head(3, 1)], Head(2, 0)) == [Head(3, 1)]
    with pytest.raises(UsageError, match="names no head"):
        parse_heads("third")


def test_answers_are_those_of_ground(run, asked):
    import localization_heads as lh

    same = lh.ground(run.lvlm, asked.image, asked.expressions[0])
    (found, _) = asked.answers(run.lvlm.known_heads, GroundingOptions())
    assert found.box == same.box
    assert list(asked.ranked[:3]) == list(run.lvlm.known_heads[:3])


def test_no_head_or_one_that_is_not_there(asked):
    with pytest.raises(UsageError, match="at least one head"):
        asked.answers([], GroundingOptions())
    with pytest.raises(UsageError, match="there is no L99H0"):
        asked.answers([Head(99, 0)], GroundingOptions())


def test_the_download_holds_the_answers(asked):
    answers = asked.answers(asked.ranked[:3], GroundingOptions())
    entries = json.loads(json.dumps(as_json(asked, answers)))
    assert [entry["expression"] for entry in entries] == list(asked.expressions)
    assert entries[0]["bbox"] == pytest.approx(answers[0].box, abs=0.01)
    assert np.array_equal(read_mask(entries[0]["mask"], asked.image.size), answers[0].mask)


def test_every_cell_of_the_grid_is_its_head():
    shape = (6, 8)
    cell = drawing.cell_size(shape)
    for layer, head in np.ndindex(shape):
        x, y = drawing.MARGIN + head * cell, drawing.MARGIN + layer * cell
        assert (
            drawing.head_at(x, y, shape)
            == drawing.head_at(x + cell - 1, y + cell - 1, shape)
            == (layer, head)
        )
    assert drawing.head_at(drawing.MARGIN - 1, 60, shape) is None
    assert drawing.head_at(60, drawing.MARGIN + 6 * cell, shape) is None


def test_the_grid_frames_the_heads_that_are_on():
    sums = np.zeros((6, 8))
    plain, framed = (np.asarray(drawing.draw_grid(sums, on)) for on in ([], [Head(2, 3)]))
    rows, columns = np.nonzero((plain != framed).any(-1))
    for x, y in ((columns.min(), rows.min()), (columns.max(), rows.max())):
        assert drawing.head_at(x, y, sums.shape) == Head(2, 3)


def test_boxes_are_drawn_where_they_are(asked):
    answers = asked.answers(asked.ranked[:3], GroundingOptions())[:1]
    drawn = drawing.draw_boxes(asked.image, answers, [""])
    assert box_iou(coloured_box(np.asarray(drawn)), answers[0].box) > 0.9


def test_names_do_not_cover_each_other(asked):
    """Three answers with one box: each name's plate, filled with its colour, is as large as when it stands alone."""
    answer = asked.answers(asked.ranked[:3], GroundingOptions())[0]
    answer = replace(answer, box=(4.0, 4.0, 30.0, 30.0))
    picture = Image.new("RGB", (300, 300), "white")
    together = np.asarray(drawing.draw_boxes(picture, [answer] * 3, ["the dog"] * 3))
    for number, colour in enumerate(drawing.COLOURS[:3]):
        filled = (together == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
        rows = np.flatnonzero(filled.sum(1) > 40)
        assert 14 <= len(rows) <= 30 and np.ptp(rows) < 30, number


def coloured_box(pixels: np.ndarray, colour: str = VERMILLION) -> tuple[float, float, float, float]:
    """Tight box of the outline drawn in a colour: the columns and rows that it fills for long."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    marked = np.abs(pixels[..., :3].astype(int) - rgb).max(-1) < 40
    rows = np.flatnonzero(marked.sum(1) > 0.5 * marked.sum(1).max())
    columns = np.flatnonzero(marked.sum(0) > 0.5 * marked.sum(0).max())
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def located_example(run: Run) -> tuple[Image.Image, str, tuple[float, ...]]:
    """A scene that the model gets right, with the true box, so that a wrong page cannot hide behind a wrong model."""
    import localization_heads as lh

    for scene, expression in scene_samples(40, seed=3, size=384, seeds=VALIDATION_SEEDS):
        picture, truth = Image.fromarray(scene.image), scene.objects[expression.object_index].box
        if box_iou(lh.ground(run.lvlm, picture, expression.text).box, truth) > 0.5:
            return picture, expression.text, truth
    raise AssertionError("the embedded model gets none of forty scenes right")


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    switches = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*switches.split(), "--disable-component-update", "--disable-sync"]
        )
        yield chromium
        chromium.close()


def shown(page: Any, name: str) -> np.ndarray:
    """A screenshot of one of the page's pictures."""
    return np.asarray(Image.open(io.BytesIO(page.locator(f"#{name} img").screenshot())).convert("RGB"))


def test_the_page_in_a_browser(run, browser, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from localization_heads.apps.demo.page import build, launch

    picture, expression, truth = located_example(run)
    picture.save(tmp_path / "scene.png")
    asked: list[str] = []
    attend = type(run.lvlm).attend
    monkeypatch.setattr(
        type(run.lvlm), "attend", lambda self, *a, **o: asked.append(a[1]) or attend(self, *a, **o)
    )
    blocks = build(run)
    try:
        page = browser.new_page(viewport={"width": 1400, "height": 2000})
        trouble: list[str] = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request", lambda r: r.url.startswith(("http://127", "data:", "blob:")) or trouble.append(r.url)
        )
        page.goto(launch(blocks, run, prevent_thread_lock=True, quiet=True))
        page.wait_for_selector("#boxes img", timeout=60_000)
        check_upload(page, tmp_path / "scene.png", expression, truth)
        number = len(asked)
        assert asked[-1] == expression
        check_clicks(page)
        check_keys(page)
        assert len(asked) == number, "a click or a key ran the model"
        check_phone(page)
        assert not trouble
    finally:
        blocks.close()


def check_upload(page: Any, path: Any, expression: str, truth: tuple[float, ...]) -> None:
    """The box on the screen overlaps the object that was asked for, and the map shines on it."""
    before = page.get_attribute("#boxes img", "src")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", str(path))
    page.wait_for_selector("#picture img")
    page.fill("#expression textarea", expression)
    page.click("#ground")
    page.wait_for_function("src => document.querySelector('#boxes img').src !== src", arg=before)
    page.wait_for_timeout(1000)
    pixels = shown(page, "boxes")
    scale = pixels.shape[1] / 384
    assert box_iou(np.array(coloured_box(pixels)) / scale, truth) > 0.4
    heat = shown(page, "heat")
    plain = Image.open(path).convert("RGB").resize(heat.shape[1::-1])
    added = yellow(heat) - yellow(np.asarray(plain))  # where viridis ends, beyond what the picture has of it
    y, x = np.unravel_index(np.argmax(ndimage.uniform_filter(added, 25)), added.shape)
    assert truth[0] <= x / scale <= truth[2]
    assert truth[1] <= y / scale <= truth[3]


def yellow(pixels: np.ndarray) -> np.ndarray:
    """How much red and green there is beyond the blue."""
    return pixels[..., 0].astype(float) + pixels[..., 1] - 2.0 * pixels[..., 2]


def check_keys(page: Any) -> None:
    """A slider that is moved without a pointer redraws too; Shift+Enter asks, as the page says."""
    for slider, changed in (("sigma", "heat"), ("k", "boxes"), ("threshold", "boxes")):
        before = page.get_attribute(f"#{changed} img", "src")
        page.focus(f"#{slider} input[type=range]")
        page.keyboard.press("ArrowLeft")
        source = f"src => document.querySelector('#{changed} img').src !== src"
        page.wait_for_function(source, arg=before, timeout=20_000)
    assert "Shift+Enter" in page.inner_text("body")
    page.fill("#expression textarea", "")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=type what to look for")


def check_phone(page: Any) -> None:
    """Nothing sticks out sideways, and the score is in sight."""
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cells = "[...document.querySelectorAll('#table th, #table td')].map(cell => cell.getBoundingClientRect().right)"
    assert max(page.evaluate(cells)) <= 390


def check_clicks(page: Any) -> None:
    """A click switches a head off and on; the second set appears."""
    names = page.input_value("#heads textarea, #heads input").split()
    cell = drawing.cell_size((6, 8))
    head = Head.parse(names[0])
    wide = page.evaluate("document.querySelector('#grid img').naturalWidth")
    scale = page.locator("#grid img").bounding_box()["width"] / wide
    place = {
        "x": scale * (drawing.MARGIN + (head.head + 0.5) * cell),
        "y": scale * (drawing.MARGIN + (head.layer + 0.5) * cell),
    }
    before = page.get_attribute("#boxes img", "src")
    page.locator("#grid img").click(position=place)
    page.wait_for_function("src => document.querySelector('#boxes img').src !== src", arg=before)
    assert page.input_value("#heads textarea, #heads input").split() == names[1:]
    page.click("#compare input")
    page.wait_for_selector("#boxes_b img", state="visible")
