"""The demo: its questions, clicks and sliders, and, if Chromium is installed, the page in a browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    ImageQuestion,
    ModelQueue,
    as_json,
    ask,
    check_number,
    example_images,
    parse_heads,
    split_expressions,
    toggle,
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
def question(run: DemoRun) -> ImageQuestion:
    image, expression = example_images(1)[0]
    return ask(run, image, f"{expression}; something else")


def check_k(value: object) -> float:
    return check_number("k", value, 1, 10)


NOT_A_K = (float("nan"), 1e400, 10**30, 0, 11, -1, "", "3", None, True, [3], {"k": 3}, "9" * 10_000)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (split_expressions, "", "what to look for"),
        (split_expressions, " ; \n", "what to look for"),
        (split_expressions, "a;b;c;d;e;f;g", "at most 6"),
        (split_expressions, "y" * 301, "an expression: at most 300 characters, not 301"),
        (split_expressions, "y;" * 903 + "y", "expressions: at most 1,806 characters, not 1,807"),
        (split_expressions, None, "a text, not None"),
        (parse_heads, "third", "names no head"),
        (parse_heads, "1" * 20_001, "heads: at most 20,000 characters, not 20,001"),
        (parse_heads, "1" * 20_000, "a head: at most 20 characters, not 20,000"),
        (parse_heads, ["L2H0"], "heads: a text"),
        (parse_heads, None, "a text, not None"),
        *((check_k, value, "k: a number from 1 to 10, not ") for value in NOT_A_K),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_an_invalid_field_is_refused_quickly_and_in_a_short_sentence(check, value, message):
    started = time.monotonic()
    with pytest.raises(UsageError, match=message) as caught:
        check(value)
    assert time.monotonic() - started < 1
    assert len(str(caught.value)) < 100


def test_valid_fields_are_read():
    assert [check_k(value) for value in (1, 2.5, 10)] == [1, 2.5, 10]
    assert parse_heads("L2H0, 3-1 L2H0") == [Head(2, 0), Head(3, 1)]
    assert toggle([Head(2, 0)], Head(3, 1)) == [Head(2, 0), Head(3, 1)]
    assert toggle([Head(2, 0), Head(3, 1)], Head(2, 0)) == [Head(3, 1)]


def test_images_are_refused_by_their_header(run, tmp_path):
    """32 megapixels pass until they are decoded; one more row does not. Errors contain no path of this machine."""
    for height, message in (
        (8000, "cannot be used: broken"),
        (8001, "4000 x 8001 pixels: at most 32 megapixels"),
    ):
        (tmp_path / "header.ppm").write_bytes(b"P6 4000 %d 255\n" % height)
        with pytest.raises(UsageError, match=message) as caught:
            ask(run, tmp_path / "header.ppm", "the dog")
        assert str(tmp_path) not in str(caught.value)
    truncated = tmp_path / "truncated.png"  # Pillow reads EXIF data of a PNG by decoding it
    Image.new("1", (4000, 8001)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    with pytest.raises(UsageError, match="4000 x 8001 pixels"):
        ask(run, truncated, "the dog")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UsageError, match=r"^the image cannot be used: not an image in a known format"):
        ask(run, tmp_path / "text.png", "the dog")
    with pytest.raises(UsageError, match="choose an image"):
        ask(run, None, "the dog")


def test_a_large_image_is_stored_small_and_grounded_in_its_own_pixels(run):
    image, expression = example_images(1)[0]
    question = ask(run, image.resize((4096, 512)), expression)
    assert question.image.size == (2048, 256)
    assert question.num_bytes == 3 * 2048 * 256 + 4 * question.maps[0].attention.size
    grounding = question.ground(question.ranked[:3], GroundingOptions())[0]
    assert grounding.mask.shape == (512, 4096)
    half = drawing.resized(grounding, (2048, 128))
    assert half.box == tuple(edge * scale for edge, scale in zip(grounding.box, (0.5, 0.25) * 2, strict=True))
    assert half.mask.shape == (128, 2048)
    assert "mask" not in drawing.resized(grounding, (20, 20)).__dict__
    drawn = drawing.draw_boxes(question.image, [grounding], ["the dog"], longest_side=None)
    assert drawn.size == (2048, 256)


def test_visitors_take_turns_at_the_model():
    """Two questions of three passes each; the second is asked during the first pass of the first."""
    queue, order, begun, go = ModelQueue(), [], threading.Event(), threading.Event()

    def forward_pass(name: str) -> None:
        order.append(name)
        begun.set()
        go.wait(10)
        time.sleep(0.15)  # so that the previous question queues its next pass

    def ask_three(name: str) -> None:
        for _ in range(3):
            queue.run(forward_pass, name)

    threads = [threading.Thread(target=ask_three, args=(name,)) for name in "AB"]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    time.sleep(0.2)
    go.set()
    for thread in threads:
        thread.join(10)
    assert "".join(order) == "ABABAB"


def test_questions_wait_for_memory_for_their_image():
    """A second large image waits, a small one overtakes it, and a fourth question is refused."""
    queue, entered = ModelQueue(max_questions=3, max_bytes=10), threading.Event()

    def second_question() -> None:
        with queue.reserve(8):
            entered.set()

    waiting = threading.Thread(target=second_question)
    with queue.reserve(8):
        waiting.start()
        with queue.reserve(2):
            assert not entered.wait(0.2)
            with pytest.raises(UsageError, match="too many visitors"), queue.reserve(1):
                pass
    assert entered.wait(10)
    waiting.join()
    with queue.reserve(100):  # a single question may exceed the limit
        pass


def test_groundings_are_those_of_ground(run, question):
    import localization_heads as lh

    expected = lh.ground(run.lvlm, question.image, question.expressions[0], segmenter=None)
    (grounding, _) = question.ground(run.lvlm.known_heads, run.options.grounding)
    assert grounding.box == expected.box
    assert list(question.ranked[:3]) == list(run.lvlm.known_heads[:3])
    with pytest.raises(UsageError, match="at least one head"):
        question.ground([], GroundingOptions())
    with pytest.raises(UsageError, match="there is no L99H0"):
        question.ground([Head(99, 0)], GroundingOptions())


def test_the_download_has_the_groundings(question):
    groundings = question.ground(question.ranked[:3], GroundingOptions())
    entries = json.loads(json.dumps(as_json(question, groundings)))
    assert [entry["expression"] for entry in entries] == list(question.expressions)
    assert entries[0]["bbox"] == pytest.approx(groundings[0].box, abs=0.01)
    assert np.array_equal(read_mask(entries[0]["mask"], question.image.size), groundings[0].mask)


@pytest.fixture
def visitors(tmp_path) -> Visitors:
    kept = tmp_path / "examples"
    kept.mkdir()
    return Visitors(tmp_path / "answers", lambda entry: entry == kept, max_bytes=250, limit=3)


def visit(visitors: Visitors, name: str, num_bytes: int = 100, upload: Path | None = None) -> Any:
    """Leave what a question leaves: its state, a file of the answer, and the image's file."""
    with visitors.request(name) as visitor:
        visitor.question = cast(ImageQuestion, SimpleNamespace(num_bytes=num_bytes))
        (visitor.new_folder() / "boxes.png").touch()
        if upload:
            upload.parent.mkdir(exist_ok=True)
            upload.touch()
            visitors.replace_upload(visitor, upload)
    return visitor


def test_the_least_recently_used_visitor_is_dropped(visitors):
    a, b = visit(visitors, "a"), visit(visitors, "b")
    visit(visitors, "a")
    c = visit(visitors, "c")  # 300 of 250 bytes: b, the least recently used, is dropped
    assert b.question is None and not b.folder.exists()
    assert a.question and c.question and visitors.num_bytes == 200
    with pytest.raises(UsageError, match="press Ground"), visitors.request("b") as visitor:
        visitor.require_question()
    visit(visitors, "d", 0), visit(visitors, "e", 0)
    assert len(visitors) == 3
    huge = visit(visitors, "huge", 1000)
    assert huge.question and visitors.num_bytes == 1000, "the last question is kept, whatever its size"


def test_the_files_of_a_visitor_are_removed_at_the_end(visitors, tmp_path):
    """Except an image that another visitor uses, and the examples."""
    own, shared, example = (tmp_path / name / "a.png" for name in ("one", "two", "examples"))
    a = visit(visitors, "a", upload=own)
    assert visit(visitors, "a", upload=shared) is a
    assert not own.parent.exists(), "another image was chosen"
    visit(visitors, "b", upload=shared)
    visitors.end("a")
    assert a.question is None and not a.folder.exists() and shared.exists()
    visitors.end("b")
    assert not shared.parent.exists()
    visit(visitors, "c", upload=example)
    visitors.end("c")
    visitors.end("nobody")
    assert example.exists() and not len(visitors) and not list((tmp_path / "answers").iterdir())


def test_a_page_closed_during_a_request_is_removed_after_it(visitors):
    with visitors.request("a") as visitor:
        visitors.end("a")
        visitor.new_folder()
    assert not visitor.folder.exists()


def test_closing_waits_for_running_requests(visitors):
    begun = threading.Event()

    def request() -> None:
        with visitors.request("a") as visitor:
            begun.set()
            time.sleep(0.3)
            visitor.new_folder()

    worker = threading.Thread(target=request)
    worker.start()
    begun.wait(10)
    visitors.close()
    assert list(visitors.folder.iterdir()), "the request was not waited for"
    worker.join()
    with pytest.raises(UsageError, match="closing"), visitors.request("a"):
        pass


def test_a_fifth_pending_request_of_a_visitor_is_refused(visitors):
    """Immediately, and without an effect on others."""
    with visitors.request("a") as visitor:
        visitor.num_pending = 4
        with pytest.raises(UsageError, match="still busy"), visitors.request("a"):
            pass
        with visitors.request("b"):
            pass
        visitor.num_pending = 1


def test_an_idle_visitor_is_dropped(visitors, monkeypatch):
    idle = visit(visitors, "a")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3700)
    visit(visitors, "b")
    assert idle.question is None and len(visitors) == 1


def test_the_oldest_uploads_are_removed(tmp_path):
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
    assert bool(made_room) == (path == "/upload") and bounded.bytes_in_flight == 0


def test_the_temporary_folder_is_removed_and_an_unusable_one_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file"))
    with (
        pytest.raises(UsageError, match=r"^GRADIO_TEMP_DIR=.*file: .*; GRADIO_TEMP_DIR has to"),
        guard.temporary_folder(),
    ):
        pass
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "new"))
    with guard.temporary_folder() as folder:
        assert folder.parent == tmp_path / "new"
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "new") and not folder.exists()


def test_an_address_that_cannot_be_bound_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^host=127\.0\.0\.1 port={port}: Address already in use"):
            guard.check_address("127.0.0.1", port)
    guard.check_address("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"^host=203\.0\.113\.1: "):
        guard.check_address("203.0.113.1", None)


PROXIED = {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": "[::1]"}


def test_proxies_and_certificates_are_unset(monkeypatch, caplog):
    for name, value in {**PROXIED, "SSL_CERT_FILE": "/none.pem"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with guard.without_proxies():
        assert not {*PROXIED, "SSL_CERT_FILE"} & set(os.environ)
    assert dict(os.environ) == before
    assert not caplog.records
    guard.warn_of_missing_certificates()
    assert caplog.text.count("SSL_CERT_FILE=/none.pem: no such file or folder") == 1


def test_a_pixel_of_the_grid_gives_its_head():
    shape = (6, 8)
    cell = drawing.cell_size(shape)
    for layer, head in np.ndindex(shape):
        x, y = drawing.MARGIN + head * cell, drawing.MARGIN + layer * cell
        assert drawing.head_at(x, y, shape) == drawing.head_at(x + cell - 1, y + cell - 1, shape) == (layer, head)
    assert drawing.head_at(drawing.MARGIN - 1, 60, shape) is None
    assert drawing.head_at(60, drawing.MARGIN + 6 * cell, shape) is None


def test_the_grid_is_transparent_and_its_labels_have_contrast():
    """On gradio's white and on its dark background."""
    pixels = np.asarray(drawing.draw_grid(np.zeros((6, 8)), []))
    assert pixels[:6, :6].max() == 0 and pixels[drawing.MARGIN, drawing.MARGIN, 3] == 0
    for ground, least in (((255, 255, 255), 4.5), ((39, 39, 42), 3.0)):
        bright, dark = sorted(map(luminance, (ground, drawing.GREY)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_grid_frames_the_selected_heads():
    sums = np.zeros((6, 8))
    plain, framed = (np.asarray(drawing.draw_grid(sums, heads)) for heads in ([], [Head(2, 3)]))
    rows, columns = np.nonzero((plain != framed).any(-1))
    for x, y in ((columns.min(), rows.min()), (columns.max(), rows.max())):
        assert drawing.head_at(x, y, sums.shape) == Head(2, 3)


def test_boxes_are_drawn_in_place(question):
    groundings = question.ground(question.ranked[:3], GroundingOptions())[:1]
    drawn = drawing.draw_boxes(question.image, groundings, [""])
    assert box_iou(coloured_box(np.asarray(drawn)), groundings[0].box) > 0.9


@pytest.fixture
def draw_same_box(question) -> Callable[..., Iterator[np.ndarray]]:
    """The pixels of each colour, where several groundings with the same box are drawn over a white image."""
    (grounding, *_) = question.ground([Head(4, 4)], GroundingOptions())

    def draw(box: tuple[float, ...], labels: Sequence[str]) -> Iterator[np.ndarray]:
        groundings = [replace(grounding, image_size=(300, 300), box=box)] * len(labels)
        pixels = np.asarray(drawing.draw_boxes(Image.new("RGB", (300, 300), "white"), groundings, labels))
        for colour in drawing.COLOURS[: len(labels)]:
            yield (pixels == rgb(colour)).all(-1)

    return draw


def test_labels_do_not_cover_each_other(draw_same_box):
    for filled in draw_same_box((4.0, 4.0, 30.0, 30.0), ["the dog"] * 3):
        rows = np.flatnonzero(filled.sum(1) > 40)
        assert 14 <= len(rows) <= 30 and np.ptp(rows) < 30


def test_labels_at_the_bottom_are_whole_and_outlines_in_one_place_share_it(draw_same_box):
    """Six groundings: no label is cut off or covered, and each colour has dashes on the outline."""
    for filled in draw_same_box((100.0, 265.0, 280.0, 299.0), [""] * 6):
        assert 14 <= (filled[:, 100:140].sum(1) > 15).sum() <= 30
        assert filled[:, 278:280].sum() > 2 or filled[296:, 200:].sum() > 4


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def coloured_box(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Tight box of the vermillion outline: the columns and rows that it fills for long."""
    marked = np.abs(pixels[..., :3].astype(int) - rgb(VERMILLION)).max(-1) < 40
    rows = np.flatnonzero(marked.sum(1) > 0.5 * marked.sum(1).max())
    columns = np.flatnonzero(marked.sum(0) > 0.5 * marked.sum(0).max())
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def located_example(run: DemoRun) -> tuple[Image.Image, str, tuple[float, ...]]:
    """A scene that the model grounds correctly, with the true box: a failure is then the page's, not the model's."""
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
    with guard.temporary_folder() as folder:
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
    assert set(demo_page.folder.iterdir()) == demo_page.permanent


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (2, float("nan"), "sigma: a number from 0 to 3, not nan"),
        (2, None, "sigma: a number"),
        (3, "median", "threshold: one of mean, otsu, top_mass, not 'median'"),
        (3, ["mean"], "threshold: one of"),
        (4, 2, "threshold: a number from 0.05 to 0.95, not 2"),
        (0, "L99H0", "there is no L99H0"),
    ],
)
def test_invalid_settings_are_refused(demo_page, index, value, message):
    settings = [value if n == index else setting for n, setting in enumerate(SETTINGS)]
    with pytest.raises(UsageError, match=message):
        demo_page.redraw(visitor_a, *settings)


def test_masks_are_those_of_the_command_line(demo_page):
    """With the same segmenter, or with `none`. Masks of a large image are made on the stored image."""
    import localization_heads as lh

    path, expression = demo_page.examples[0]
    heads = demo_page.visitors._by_session["a"].question.ranked[:3]
    names = " ".join(map(str, heads))
    for mask, segmenter in (("grabcut", GRABCUT), ("none", None)):
        *_, file, _ = demo_page.redraw(visitor_a, names, *SETTINGS[1:5], mask, False)
        (entry,) = json.loads(Path(file).read_text())
        found = lh.ground(demo_page.run.lvlm, path, expression, heads=heads, segmenter=segmenter)
        assert np.array_equal(read_mask(entry["mask"], found.image_size), found.mask), mask
        assert entry["bbox"] == pytest.approx(found.box, abs=0.01)
    with Image.open(path) as image:
        large = image.resize((image.width * 12, image.height * 12))
    question = ask(demo_page.run, large, expression)
    (grounding,) = question.ground(heads, demo_page.run.options.grounding)
    refined = demo_page._refine(question, grounding, "grabcut")
    assert refined.mask.shape == large.size[::-1] and refined.mask_from == "grabcut"


NAMES = "grabcut, author_hint, none, sam, sam2, sam3"


@pytest.mark.parametrize(
    ("mask", "warning"),
    [
        ("magic", f"mask by: one of {NAMES}, not 'magic'. Until then the masks"),
        (["sam"], "mask by: one of"),
        ("sam3", "segmenter=sam3: facebook/sam3 is not on this machine; start the page with it once, which"),
    ],
)
def test_without_a_usable_segmenter_masks_are_pseudo_masks(demo_page, mask, warning, monkeypatch):
    import gradio

    warnings = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    *_, file, _ = demo_page.redraw(visitor_a, *SETTINGS[:5], mask, False)
    *_, plain, _ = demo_page.redraw(visitor_a, *SETTINGS[:5], "none", False)
    assert Path(file).read_text() == Path(plain).read_text()
    assert len(warnings) == 1 and warnings[0].startswith(warning)


def test_a_segmenter_is_loaded_once(run, question, monkeypatch):
    """The last one stays loaded; the page's default is never loaded again."""
    from localization_heads.apps.demo import session
    from localization_heads.stages import run as stage

    loaded = []

    def load(options):
        loaded.append((options.kind, options.name, options.prompt))

        def segment(image, prompt):
            x0, y0, x1, y1 = map(round, grounding.box)
            mask = np.zeros(image.size[::-1], bool)
            mask[y0:y1, x0:x1] = True
            return mask

        return SimpleNamespace(name=options.kind, segment=segment)

    monkeypatch.setattr(session, "checkpoint_folder", lambda _: Path())
    monkeypatch.setattr(stage, "make_segmenter", load)
    segmenters = session.Segmenters(run)
    (grounding, _) = question.ground([Head(4, 4)], run.options.grounding)
    for name in ("author_hint", "author_hint", "grabcut", "author_hint", "sam2"):
        refined = segmenters.refine(name, grounding, question.image)
        assert refined.mask_from == {"author_hint": "sam"}.get(name, name)
    (first, name, prompt), (second, *_) = loaded[-2:]
    assert (first, name, prompt, second) == ("sam", "facebook/sam-vit-large", ("box", "map"), "sam2")
    assert "grabcut" not in [kind for kind, *_ in loaded[1:]]


def test_invalid_clicks_and_images_are_refused(demo_page, tmp_path):
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


def test_an_answer_is_traced(demo_page, run):
    """As by `lvlm.trace`; invalid input is refused."""
    path, _ = demo_page.examples[0]
    answer, figure, page = demo_page.tracing.trace(visitor_a, {"path": path}, " what is in\nthis image? ", "L4H4 L5H6")
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
    """With a proxy that does not exist. Large bodies and addresses are refused; the folder is removed afterwards."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    import httpx

    from localization_heads.apps.demo.serving import background_server

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    for name, value in PROXIED.items():
        monkeypatch.setenv(name, value)
    with (
        background_server(run, quiet=True) as blocks,
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
        assert "not an image in a known format" in send({"path": upload, "meta": {"_type": "gradio.FileData"}})
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
    from localization_heads.apps.demo.serving import background_server

    image, expression, truth = located_example(run)
    image.save(tmp_path / "scene.png")
    asked: list[str] = []
    attend = type(run.lvlm).attend
    monkeypatch.setattr(type(run.lvlm), "attend", lambda self, *a, **o: asked.append(a[1]) or attend(self, *a, **o))
    with background_server(run, quiet=True) as blocks:
        page = browser.new_page(viewport={"width": 1400, "height": 2000})
        trouble: list[str] = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("http://127", "data:", "blob:")) or trouble.append(r.url))
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
    """The box on the screen overlaps the object of the expression, and the map is brightest on it."""
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
    added = yellow(heat) - yellow(np.asarray(plain))  # the bright end of viridis, without the image's own yellow
    y, x = np.unravel_index(np.argmax(ndimage.uniform_filter(added, 25)), added.shape)
    assert truth[0] <= x / scale <= truth[2]
    assert truth[1] <= y / scale <= truth[3]


def yellow(pixels: np.ndarray) -> np.ndarray:
    """How much red and green there is beyond the blue."""
    return pixels[..., 0].astype(float) + pixels[..., 1] - 2.0 * pixels[..., 2]


def check_keys(page: Any) -> None:
    """A slider moved by the keyboard redraws, and Shift+Enter asks, as the page says."""
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
    """On a phone, nothing overflows sideways, and the score is visible."""
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
