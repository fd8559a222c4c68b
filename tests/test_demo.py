"""The demo: what a question, a click and a slider do; and the page itself in a browser, where there is one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from front import cached_load_model
from PIL import Image
from scipy import ndimage

from localization_heads.apps.demo import drawing, guard
from localization_heads.apps.demo.session import (
    Asked,
    Turns,
    as_json,
    ask,
    example_images,
    number,
    parse_heads,
    split_expressions,
    toggled,
)
from localization_heads.apps.demo.visitors import Visitors
from localization_heads.cells import box_iou
from localization_heads.data.masks import read_mask
from localization_heads.errors import UsageError
from localization_heads.figures.style import VERMILLION
from localization_heads.heads.head import Head
from localization_heads.lvlm.checkpoints import loading
from localization_heads.options.compose import compose_options
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.programs import DemoOptions
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from localization_heads.segmentation.segmenter import GRABCUT
from localization_heads.stages.run import DemoRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@cache
def options() -> DemoOptions:
    found = compose_options("demo", "device=cpu", "open_browser=false")
    assert isinstance(found, DemoOptions)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> DemoRun:
    monkeypatch.setattr(loading, "load_model", cached_load_model)
    return DemoRun(replace(options(), output_dir=str(tmp_path)))


@pytest.fixture
def asked(run: DemoRun) -> Asked:
    image, expression = example_images(1)[0]
    return ask(run, image, f"{expression}; something else")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "what to look for"),
        (" ; \n", "what to look for"),
        ("a;b;c;d;e;f;g", "at most 6"),
        ("y" * 301, "an expression: at most 300 characters, not 301"),
        ("y;" * 903 + "y", "expressions: at most 1,806 characters, not 1,807"),
        (None, "a text, not None"),
    ],
)
def test_texts_that_name_nothing(text, said):
    with pytest.raises(UsageError, match=said):
        split_expressions(text)


def test_a_question_without_an_image(run):
    with pytest.raises(UsageError, match="choose an image"):
        ask(run, None, "the dog")


def test_heads_from_text_and_clicks():
    assert parse_heads("L2H0, 3-1 L2H0") == [Head(2, 0), Head(3, 1)]
    assert toggled([Head(2, 0)], Head(3, 1)) == [Head(2, 0), Head(3, 1)]
    assert toggled([Head(2, 0), Head(3, 1)], Head(2, 0)) == [Head(3, 1)]
    with pytest.raises(UsageError, match="names no head"):
        parse_heads("third")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1" * 20_001, "heads: at most 20,000 characters, not 20,001"),
        ("1" * 20_000, "a head: at most 20 characters, not 20,000"),
        (["L2H0"], "heads: a text"),
        (None, "a text, not None"),
    ],
)
def test_a_heads_field_is_bounded(text, said):
    started = time.monotonic()
    with pytest.raises(UsageError, match=said):
        parse_heads(text)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "value", [float("nan"), 1e400, 10**30, 0, 11, -1, "", "3", None, True, [3], {"k": 3}]
)
def test_numbers_that_no_slider_sends(value):
    with pytest.raises(UsageError, match="k: a number from 1 to 10, not "):
        number("k", value, 1, 10)


def test_numbers_that_a_slider_sends():
    assert (number("k", 1, 1, 10), number("k", 2.5, 1, 10), number("k", 10, 1, 10)) == (1, 2.5, 10)
    with pytest.raises(UsageError) as caught:
        number("k", "9" * 10_000, 1, 10)
    assert len(str(caught.value)) < 100


def header_only(path: Path, width: int, height: int) -> Path:
    """An image that says its size and holds nothing."""
    path.write_bytes(b"P6 %d %d 255\n" % (width, height))
    return path


def test_images_are_refused_by_their_header(run, tmp_path):
    """32 megapixels pass, until they are decoded; a line more does not. Nothing names a place on this machine."""
    for height, said in (
        (8000, "cannot be used: broken"),
        (8001, "4000 x 8001 pixels: at most 32 megapixels"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            ask(run, header_only(tmp_path / "header.ppm", 4000, height), "the dog")
        assert str(tmp_path) not in str(caught.value)
    Image.new("1", (4000, 8001)).save(
        tmp_path / "cut.png"
    )  # in which Pillow looks for camera data by decoding it
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="4000 x 8001 pixels"):
        ask(run, tmp_path / "cut.png", "the dog")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UsageError, match=r"^the image cannot be used: not an image in a known format"):
        ask(run, tmp_path / "text.png", "the dog")


def test_large_images_are_kept_small_and_answered_in_their_own_pixels(run):
    image, expression = example_images(1)[0]
    asked = ask(run, image.resize((4096, 512)), expression)
    assert asked.image.size == (2048, 256)
    assert asked.num_bytes == 3 * 2048 * 256 + 4 * asked.maps[0].attention.size
    answer = asked.answers(asked.ranked[:3], GroundingOptions())[0]
    assert answer.mask.shape == (512, 4096)
    half = drawing.resized(answer, (2048, 128))
    assert half.box == tuple(edge * scale for edge, scale in zip(answer.box, (0.5, 0.25) * 2, strict=True))
    assert half.mask.shape == (128, 2048)
    assert "mask" not in drawing.resized(answer, (20, 20)).__dict__
    assert drawing.draw_boxes(asked.image, [answer], ["the dog"], longest=None).size == (2048, 256)


def test_visitors_take_turns_at_the_model():
    """Two questions of three passes each, the second asked during the first pass of the first."""
    turns, order, begun, go = Turns(), [], threading.Event(), threading.Event()

    def work(name: str) -> None:
        order.append(name)
        begun.set()
        go.wait(10)
        time.sleep(0.15)  # the one before queues again

    def question(name: str) -> None:
        for _ in range(3):
            turns.take(work, name)

    threads = [threading.Thread(target=question, args=(name,)) for name in "AB"]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    time.sleep(0.2)
    go.set()
    for thread in threads:
        thread.join(10)
    assert "".join(order) == "ABABAB"


def test_room_for_images_that_are_asked_about():
    """A second large image waits, a small one passes it by; the fourth question finds no place."""
    turns, entered = Turns(places=3, max_bytes=10), threading.Event()

    def second() -> None:
        with turns.room(8):
            entered.set()

    waiting = threading.Thread(target=second)
    with turns.room(8):
        waiting.start()
        with turns.room(2):
            assert not entered.wait(0.2)
            with pytest.raises(UsageError, match="too many visitors"), turns.room(1):
                pass
    assert entered.wait(10)
    waiting.join()
    with turns.room(100):  # more than there is, but alone
        pass


def test_answers_are_those_of_ground(run, asked):
    import localization_heads as lh

    same = lh.ground(run.lvlm, asked.image, asked.expressions[0], segmenter=None)
    (found, _) = asked.answers(run.lvlm.known_heads, run.options.grounding)
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


@pytest.fixture
def visitors(tmp_path) -> Visitors:
    kept = tmp_path / "examples"
    kept.mkdir()
    return Visitors(tmp_path / "answers", lambda entry: entry == kept, max_bytes=250, limit=3)


def visit(visitors: Visitors, name: str, num_bytes: int = 100, upload: Path | None = None) -> Any:
    """What a question leaves: an answer, a file of it, and the image's file."""
    with visitors.turn(name) as visitor:
        visitor.asked = cast(Asked, SimpleNamespace(num_bytes=num_bytes))
        (visitor.new_folder() / "boxes.png").touch()
        if upload:
            upload.parent.mkdir(exist_ok=True)
            upload.touch()
            visitors.replace_upload(visitor, upload)
    return visitor


def test_the_visitor_who_came_first_makes_room(visitors):
    a, b = visit(visitors, "a"), visit(visitors, "b")
    visit(visitors, "a")
    c = visit(visitors, "c")  # 300 bytes of 250: b, whom we saw last of all, goes
    assert b.asked is None and not b.folder.exists()
    assert a.asked and c.asked and visitors.num_bytes == 200
    with pytest.raises(UsageError, match="press Ground"), visitors.turn("b") as visitor:
        visitor.answer  # noqa: B018
    visit(visitors, "d", 0), visit(visitors, "e", 0)
    assert len(visitors) == 3
    huge = visit(visitors, "huge", 1000)
    assert huge.asked and visitors.num_bytes == 1000, "the last to ask has an answer, however large"


def test_what_ends_with_a_visit(visitors, tmp_path):
    """Answers and images go; not what others use, nor an example."""
    own, shared, example = (tmp_path / name / "a.png" for name in ("one", "two", "examples"))
    a = visit(visitors, "a", upload=own)
    assert visit(visitors, "a", upload=shared) is a
    assert not own.parent.exists(), "another image was chosen"
    visit(visitors, "b", upload=shared)
    visitors.end("a")
    assert a.asked is None and not a.folder.exists() and shared.exists()
    visitors.end("b")
    assert not shared.parent.exists()
    visit(visitors, "c", upload=example)
    visitors.end("c")
    visitors.end("nobody")
    assert example.exists() and not len(visitors) and not list((tmp_path / "answers").iterdir())


def test_a_visit_that_ends_during_its_work(visitors):
    with visitors.turn("a") as visitor:
        visitors.end("a")
        visitor.new_folder()
    assert not visitor.folder.exists()


def test_the_page_closes_when_its_work_is_done(visitors):
    begun = threading.Event()

    def work() -> None:
        with visitors.turn("a") as visitor:
            begun.set()
            time.sleep(0.3)
            visitor.new_folder()

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait(10)
    visitors.close()
    assert list(visitors.folder.iterdir()), "the work was not waited for"
    worker.join()
    with pytest.raises(UsageError, match="closing"), visitors.turn("a"):
        pass


def test_a_visitor_who_sends_more_than_he_waits_for(visitors):
    """Four pieces of work wait, the fifth is refused at once; others are let in."""
    with visitors.turn("a") as visitor:
        visitor.waiting = 4
        with pytest.raises(UsageError, match="still busy"), visitors.turn("a"):
            pass
        with visitors.turn("b"):
            pass
        visitor.waiting = 1


def test_answers_that_nobody_came_back_for(visitors, monkeypatch):
    idle = visit(visitors, "a")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3700)
    visit(visitors, "b")
    assert idle.asked is None and len(visitors) == 1


def test_uploads_make_room_for_the_next(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"1234")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    guard.make_room(tmp_path.iterdir(), max_bytes=8)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["middle", "new"]


@pytest.mark.parametrize(
    ("path", "announced", "chunks", "status"),
    [
        ("/queue/join", 0, [100_000, 100_000], 200),
        ("/queue/join", 0, [100_000, 100_000, 100_000], 413),
        ("/queue/join", 1 << 30, [1], 413),
        ("/upload", 0, [1 << 20] * 3, 200),
        ("/upload", 0, [1 << 20] * 33, 413),
    ],
)
def test_requests_are_bounded(path, announced, chunks, status):
    sent, made_room = [], []
    incoming = iter([{"type": "http.request", "body": bytes(size), "more_body": True} for size in chunks])

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        for _ in chunks:
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    bounded = guard.BoundedRequests(answer, make_room=lambda: made_room.append(True))
    scope = {"type": "http", "path": path, "headers": [(b"content-length", str(announced).encode())]}
    asyncio.run(bounded(scope, receive, send))
    assert sent[0]["status"] == status
    assert bool(made_room) == (path == "/upload") and bounded.coming_in == 0


def test_a_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file"))
    with (
        pytest.raises(UsageError, match=r"^GRADIO_TEMP_DIR=.*file: .*; GRADIO_TEMP_DIR has to"),
        guard.own_folder(),
    ):
        pass
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "new"))
    with guard.own_folder() as folder:
        assert folder.parent == tmp_path / "new"
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "new") and not folder.exists()


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^host=127\.0\.0\.1 port={port}: Address already in use"):
            guard.check_address("127.0.0.1", port)
    guard.check_address("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"^host=203\.0\.113\.1: "):
        guard.check_address("203.0.113.1", None)


PROXIED = {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": "[::1]"}


def test_proxies_and_certificates_are_set_aside(monkeypatch, caplog):
    for name, value in {**PROXIED, "SSL_CERT_FILE": "/none.pem"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with guard.direct_connections():
        assert not {*PROXIED, "SSL_CERT_FILE"} & set(os.environ)
    assert dict(os.environ) == before
    assert not caplog.records
    guard.note_missing_certificates()
    assert caplog.text.count("SSL_CERT_FILE=/none.pem: no such file or folder") == 1


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


def test_the_grid_stands_on_the_ground_of_the_page():
    """Clear where nothing is drawn; the labels are read on gradio's white and on its dark ground."""
    pixels = np.asarray(drawing.draw_grid(np.zeros((6, 8)), []))
    assert pixels[:6, :6].max() == 0 and pixels[drawing.MARGIN, drawing.MARGIN, 3] == 0
    for ground, least in (((255, 255, 255), 4.5), ((39, 39, 42), 3.0)):
        bright, dark = sorted(map(luminance, (ground, drawing.GREY)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
    image = Image.new("RGB", (300, 300), "white")
    together = np.asarray(drawing.draw_boxes(image, [answer] * 3, ["the dog"] * 3))
    for name, colour in enumerate(drawing.COLOURS[:3]):
        filled = (together == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
        rows = np.flatnonzero(filled.sum(1) > 40)
        assert 14 <= len(rows) <= 30 and np.ptp(rows) < 30, name


def test_names_at_the_bottom_and_lines_in_one_place(asked):
    """Six answers with one box: no plate is cut off or covered, and each colour is on the box's line."""
    (answer, *_) = asked.answers([Head(4, 4)], GroundingOptions())
    answer = replace(answer, image_size=(300, 300), box=(100.0, 265.0, 280.0, 299.0))
    image = Image.new("RGB", (300, 300), "white")
    pixels = np.asarray(drawing.draw_boxes(image, [answer] * 6, [""] * 6))
    for name, colour in enumerate(drawing.COLOURS):
        filled = (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
        assert 14 <= (filled[:, 100:140].sum(1) > 15).sum() <= 30, name
        assert filled[:, 278:280].sum() > 2 or filled[296:, 200:].sum() > 4, name


def coloured_box(pixels: np.ndarray, colour: str = VERMILLION) -> tuple[float, float, float, float]:
    """Tight box of the outline drawn in a colour: the columns and rows that it fills for long."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    marked = np.abs(pixels[..., :3].astype(int) - rgb).max(-1) < 40
    rows = np.flatnonzero(marked.sum(1) > 0.5 * marked.sum(1).max())
    columns = np.flatnonzero(marked.sum(0) > 0.5 * marked.sum(0).max())
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def located_example(run: DemoRun) -> tuple[Image.Image, str, tuple[float, ...]]:
    """A scene that the model gets right, with the true box, so that a wrong page cannot hide behind a wrong model."""
    import localization_heads as lh

    for scene, expression in scene_samples(40, seed=3, size=384, seeds=VALIDATION_SEEDS):
        image, truth = Image.fromarray(scene.image), scene.objects[expression.object_index].box
        if box_iou(lh.ground(run.lvlm, image, expression.text).box, truth) > 0.5:
            return image, expression.text, truth
    raise AssertionError("the embedded model gets none of forty scenes right")


@pytest.fixture
def demo_page(run, tmp_path, monkeypatch) -> Iterator[Any]:
    """The page's actions, without a server, after one question of visitor `a`."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from localization_heads.apps.demo.page import build

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with guard.own_folder() as folder:
        page, _ = build(run, folder)
        page.ask(visitor_a, {"path": page.examples[0][0]}, page.examples[0][1], 3)
        yield page


visitor_a = cast(Any, SimpleNamespace(session_hash="a"))
SETTINGS = ("L2H0 L3H1", "", 1.0, "mean", 0.7, "grabcut", False)


def test_redraws_leave_no_folder_behind(demo_page):
    for _ in range(5):
        files = [Path(path) for path in demo_page.redraw(visitor_a, *SETTINGS) if isinstance(path, str)]
    assert [file.name for file in files] == [
        *("boxes_A.png", "map_A.png", "heads.png", "groundings.json", "groundings.png")
    ]
    assert all(file.is_file() for file in files)
    assert len(list(files[0].parents[1].iterdir())) == 2
    demo_page.end(visitor_a)
    assert not list(demo_page.answers.iterdir())
    with pytest.raises(UsageError, match="press Ground"):
        demo_page.redraw(visitor_a, *SETTINGS)
    assert set(demo_page.folder.iterdir()) == demo_page.own


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (2, float("nan"), "sigma: a number from 0 to 3, not nan"),
        (2, None, "sigma: a number"),
        (3, "median", "threshold: one of mean, otsu, top_mass, not 'median'"),
        (3, ["mean"], "threshold: one of"),
        (4, 2, "threshold: a number from 0.05 to 0.95, not 2"),
        (0, "L99H0", "there is no L99H0"),
    ],
)
def test_settings_sent_around_the_page(demo_page, place, value, said):
    settings = [value if n == place else setting for n, setting in enumerate(SETTINGS)]
    with pytest.raises(UsageError, match=said):
        demo_page.redraw(visitor_a, *settings)


def test_masks_are_those_of_the_command_line(demo_page):
    """The same segmenter, unless those of the map are asked for; a large image's are made on the image as kept."""
    import localization_heads as lh

    path, expression = demo_page.examples[0]
    heads = demo_page.visitors._known["a"].asked.ranked[:3]
    names = " ".join(map(str, heads))
    for mask, segmenter in (("grabcut", GRABCUT), ("none", None)):
        *_, file, _ = demo_page.redraw(visitor_a, names, *SETTINGS[1:5], mask, False)
        (entry,) = json.loads(Path(file).read_text())
        found = lh.ground(demo_page.run.lvlm, path, expression, heads=heads, segmenter=segmenter)
        assert np.array_equal(read_mask(entry["mask"], found.image_size), found.mask), mask
        assert entry["bbox"] == pytest.approx(found.box, abs=0.01)
    with Image.open(path) as image:
        large = image.resize((image.width * 12, image.height * 12))
    asked = ask(demo_page.run, large, expression)
    refined = demo_page._refined(asked, asked.answers(heads, demo_page.run.options.grounding)[0], "grabcut")
    assert refined.mask.shape == large.size[::-1] and refined.mask_from == "grabcut"


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            "magic",
            "mask by: one of grabcut, author_hint, none, sam, sam2, sam3, not 'magic'. Until then the masks",
        ),
        (["sam"], "mask by: one of"),
        (
            "sam3",
            "segmenter=sam3: facebook/sam3 is not on this machine; start the page with it once, which fetches",
        ),
    ],
)
def test_a_segmenter_that_cannot_be_had_leaves_the_maps_masks(demo_page, mask, said, monkeypatch):
    import gradio

    warned = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    *_, file, _ = demo_page.redraw(visitor_a, *SETTINGS[:5], mask, False)
    *_, plain, _ = demo_page.redraw(visitor_a, *SETTINGS[:5], "none", False)
    assert (
        Path(file).read_text() == Path(plain).read_text() and warned[0].startswith(said) and len(warned) == 1
    )


def test_another_segmenter_is_loaded_once(run, asked, monkeypatch):
    """The last one stays; the page's own is never loaded again."""
    from localization_heads.apps.demo import session
    from localization_heads.stages import run as stage

    loaded = []

    def load(options):
        loaded.append((options.kind, options.name, options.prompt))

        def segment(image, grounding):
            x0, y0, x1, y1 = map(round, answer.box)
            mask = np.zeros(image.size[::-1], bool)
            mask[y0:y1, x0:x1] = True
            return mask

        return SimpleNamespace(name=options.kind, segment=segment)

    monkeypatch.setattr(session, "checkpoint_folder", lambda _: tmp)
    monkeypatch.setattr(stage, "make_segmenter", load)
    tmp, segmenters = Path(), session.Segmenters(run)
    (answer,) = asked.answers([Head(4, 4)], run.options.grounding)[:1]
    for name in ("author_hint", "author_hint", "grabcut", "author_hint", "sam2"):
        found = segmenters.refine(name, answer, asked.image)
        assert found.mask_from == {"author_hint": "sam"}.get(name, name)
    (first, name, prompt), (second, *_) = loaded[-2:]
    assert (first, name, prompt, second) == ("sam", "facebook/sam-vit-large", ("box", "map"), "sam2")
    assert "grabcut" not in [kind for kind, *_ in loaded[1:]]


def test_clicks_and_images_sent_around_the_page(demo_page, tmp_path):
    for index in (None, [1], [float("nan"), 3], ["a", "b"], [1e300, 1]):
        with pytest.raises(UsageError, match="a click"):
            demo_page.switch(visitor_a, "L2H0", "A", SimpleNamespace(_data={"index": index}))
    with pytest.raises(UsageError, match="a click"):
        demo_page.switch(visitor_a, "L2H0", "A", SimpleNamespace(_data=None))
    for index in (99, -1, "a", None):
        with pytest.raises(UsageError, match="no example"):
            demo_page.choose(SimpleNamespace(_data={"index": index}))
    outside = tmp_path / "secret.png"
    example_images(1)[0][0].save(outside)
    for path in (str(outside), "http://127.0.0.1/a.png", f"{demo_page.folder}/../../secret.png"):
        with pytest.raises(UsageError, match="choose it again"):
            demo_page.ask(visitor_a, {"path": path}, "the dog", 3)


def test_an_answer_is_shown_word_by_word(demo_page, run):
    """As `lvlm.trace` has it; what the browser sends around the page is refused."""
    path, _ = demo_page.examples[0]
    answer, figure, page = demo_page.tracing.trace(
        visitor_a, {"path": path}, " what is in\nthis image? ", "L4H4 L5H6"
    )
    with Image.open(path) as image:
        found = run.lvlm.trace(image.convert("RGB"), "what is in this image?", [(4, 4), (5, 6)])
    assert answer == found.answer
    assert Image.open(figure).width > 100
    text = Path(page).read_text(encoding="utf-8")
    assert all(f">{word.text}<" in text for word in found.words)
    assert "L5H6" in text and "L5H3" not in text
    for heads, said in (("", "switch at least one"), ("L9H9", "there is no L9H9"), ("x", "names no head")):
        with pytest.raises(UsageError, match=said):
            demo_page.tracing.trace(visitor_a, {"path": path}, "what?", heads)
    for image, question, said in (
        (None, "what?", "choose an image first"),
        ({"path": "/etc/passwd"}, "what?", "choose it again"),
        ({"path": path}, 3, "the question: a text, not 3"),
        ({"path": path}, "x" * 301, "at most 300 characters"),
        ({"path": path}, "  ", "the expression is empty"),
        ({"path": path}, "</s>", "control token"),
    ):
        with pytest.raises(UsageError, match=said):
            demo_page.tracing.trace(visitor_a, image, question, "L4H4")


def test_the_page_as_served(run, tmp_path, monkeypatch):
    """Behind a proxy that is not there; large bodies and addresses are refused; its folder is gone afterwards."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    import httpx

    from localization_heads.apps.demo.serving import served

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    for name, value in PROXIED.items():
        monkeypatch.setenv(name, value)
    with (
        served(run, quiet=True) as blocks,
        httpx.Client(base_url=blocks.local_url, trust_env=False) as client,
    ):
        functions = {d["api_name"]: d["id"] for d in reversed(client.get("config").json()["dependencies"])}

        def send(image: Any, text: str = "the dog") -> str:
            body = {"data": [image, text, 3], "fn_index": functions["ask"], "session_hash": "a"}
            answer = client.post("gradio_api/queue/join", json=body)
            if answer.status_code != 200:
                return str(answer.status_code)
            lines = client.get("gradio_api/queue/data", params={"session_hash": "a"}).text
            return next(line for line in lines.splitlines() if '"process_completed"' in line)

        assert send(None, "x" * 300_000) == "413"
        assert client.post("gradio_api/upload", files={"files": bytes((32 << 20) + 1)}).status_code == 413
        for address in ("http://127.0.0.1:9/a.png", "https://example.com/a.png"):
            said = send({"path": address, "meta": {"_type": "gradio.FileData"}})
            assert "addresses are not fetched" in said, said
        upload = client.post("gradio_api/upload", files={"files": ("a.png", b"hello")}).json()[0]
        assert "not an image in a known format" in send(
            {"path": upload, "meta": {"_type": "gradio.FileData"}}
        )
    assert not list((tmp_path / "gradio").iterdir())


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
    """A screenshot of one of the page's images."""
    return np.asarray(Image.open(io.BytesIO(page.locator(f"#{name} img").screenshot())).convert("RGB"))


def test_the_page_in_a_browser(run, browser, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from localization_heads.apps.demo.serving import served

    image, expression, truth = located_example(run)
    image.save(tmp_path / "scene.png")
    asked: list[str] = []
    attend = type(run.lvlm).attend
    monkeypatch.setattr(
        type(run.lvlm), "attend", lambda self, *a, **o: asked.append(a[1]) or attend(self, *a, **o)
    )
    with served(run, quiet=True) as blocks:
        page = browser.new_page(viewport={"width": 1400, "height": 2000})
        trouble: list[str] = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request", lambda r: r.url.startswith(("http://127", "data:", "blob:")) or trouble.append(r.url)
        )
        page.goto(blocks.local_url)
        page.wait_for_selector("#boxes img", timeout=60_000)
        check_upload(page, tmp_path / "scene.png", expression, truth)
        count = len(asked)
        assert asked[-1] == expression
        check_clicks(page)
        check_keys(page)
        assert len(asked) == count, "a click or a key ran the model"
        check_phone(page)
        assert not trouble


def check_upload(page: Any, path: Any, expression: str, truth: tuple[float, ...]) -> None:
    """The box on the screen overlaps the object that was asked for, and the map shines on it."""
    before = page.get_attribute("#boxes img", "src")
    page.click("#image button[aria-label='Remove Image']")
    page.set_input_files("#image input[type=file]", str(path))
    page.wait_for_selector("#image img")
    page.fill("#expression textarea", expression)
    page.click("#ground")
    page.wait_for_function("src => document.querySelector('#boxes img').src !== src", arg=before)
    page.wait_for_timeout(1000)
    pixels = shown(page, "boxes")
    scale = pixels.shape[1] / 384
    assert box_iou(np.array(coloured_box(pixels)) / scale, truth) > 0.4
    heat = shown(page, "heat")
    plain = Image.open(path).convert("RGB").resize(heat.shape[1::-1])
    added = yellow(heat) - yellow(np.asarray(plain))  # where viridis ends, beyond what the image has of it
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
