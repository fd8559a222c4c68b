"""Our replacements of matplotlib's images, axes and PNGs show the same; and the sheet of boxes."""

import io
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from localization_heads.attention import Box
from localization_heads.figures.overlay import BoxPanel, plot_boxes
from localization_heads.figures.rendering import encode_png
from localization_heads.figures.sheet import Panel, draw_pixels

pytestmark = pytest.mark.filterwarnings("error")
rng = np.random.default_rng(0)
POSITION = (0.13, 0.21, 0.7, 0.6)
SMALL = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60)))


@pytest.mark.parametrize("compact", [False, True])
def test_png_contains_pixels_text_and_resolution(compact: bool) -> None:
    pixels = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    read = Image.open(io.BytesIO(encode_png(pixels, 200, {"Inputs": "abc"}, compact=compact)))
    assert read.mode == "RGB" and (np.asarray(read) == pixels).all()
    assert read.info["Inputs"] == "abc"
    assert read.info["dpi"] == pytest.approx((200, 200), abs=0.01)


def pixels_of(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def by_matplotlib(values: np.ndarray, box: tuple[float, ...], **options: object) -> np.ndarray:
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.add_axes(POSITION)
    x0, y0, x1, y1 = box
    axes.imshow(values, extent=(x0, x1, y1, y0), aspect="auto", **options)
    return rendered_axes(figure, axes)


def by_us(values: np.ndarray, box: tuple[float, ...], **options: object) -> np.ndarray:
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.add_axes(Panel(figure, POSITION))
    draw_pixels(axes, values, box, **options)
    return rendered_axes(figure, axes)


def rendered_axes(figure: Figure, axes: object) -> np.ndarray:
    axes.set(xlim=(0, 80), ylim=(60, 0), facecolor="0.9")
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return pixels_of(figure)


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (-20, -9.5, 71.3, 60), (10, 12, 70, 90)], ids=str)
def test_images_are_drawn_as_by_matplotlib(box: tuple[float, ...]) -> None:
    ours, theirs = by_us(SMALL, box), by_matplotlib(SMALL, box)
    assert np.abs(ours - theirs).mean() < 1.5
    assert np.abs(by_us(SMALL[:, ::-1], box) - theirs).mean() > 10  # another image differs


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (-20, -9.5, 71.3, 60), (10, 12, 70, 90)], ids=str)
def test_cells_are_drawn_as_by_matplotlib(box: tuple[float, ...]) -> None:
    cells = rng.random((7, 9))
    options = {"cmap": "viridis", "alpha": 0.1 + 0.75 * cells, "norm": Normalize(0, 1)}
    ours, theirs = by_us(cells, box, **options), by_matplotlib(cells, box, interpolation="nearest", **options)
    assert (np.abs(ours - theirs).max(-1) > 3).mean() < 0.015  # an edge may fall on the next pixel
    assert (np.abs(by_us(cells, (0, 0, 60, 60), **options) - theirs).max(-1) > 3).mean() > 0.1


def test_images_beyond_the_axes_are_not_drawn() -> None:
    assert (by_us(SMALL, (100, 0, 180, 60)) == by_us(SMALL, (0, 70, 80, 90))).all()


@pytest.mark.skipif(matplotlib.__version_info__ < (3, 10), reason="older versions always create ticks")
def test_panels_never_create_ticks() -> None:
    figure = Figure()
    axes = figure.add_axes(Panel(figure, POSITION))
    pixels_of(figure)
    for axis in (axes.xaxis, axes.yaxis):
        assert "majorTicks" not in vars(axis) and "minorTicks" not in vars(axis)


# ----------------------------------------------------------------------------------------- the sheet of boxes


def panel(size: tuple[int, int], predicted: Box, truth: Box | None, text: str = "the dog") -> BoxPanel:
    return BoxPanel(
        np.full((size[1] // 10 + 1, size[0] // 10 + 1, 3), 200, np.uint8), size, text, predicted, truth, 0.1
    )


def test_boxes_are_drawn_in_the_pixels_of_the_original(tmp_path: Path) -> None:
    """Over a shrunk copy of images of all shapes."""
    panels = [
        panel((640, 480), (64, 48, 320, 240), (0, 0, 640, 480)),
        panel((100, 900), (0, 0, 50, 900), None, "a very long expression of some thing " * 40),
        panel((3000, 50), (0, 0, 3000, 25), (10, 10, 20, 20), "$x_1$ \u202e\x1b[2J"),
    ]
    figure = plot_boxes(panels, tmp_path / "worst.png", title="The worst 3 of 9 boxes")
    with Image.open(tmp_path / "worst.png") as drawn:
        assert drawn.size[0] > 400
    found = [[p.get_bbox().extents.tolist() for p in axes.patches] for axes in figure.axes]
    assert found[0] == [[64, 48, 320, 240], [0, 0, 640, 480]]
    assert found[1] == [[0, 0, 50, 900]]
    assert [axes.get_xlim()[1] for axes in figure.axes] == [640, 100, 3000]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "IoU 0.10 the dog" and titles[1].endswith("…") and "\n" not in "".join(titles)


def test_titles_of_a_full_sheet_do_not_overlap() -> None:
    panels = [panel((640, 480), (64, 48, 320, 240), (0, 0, 640, 480), "the dog with the long tail " * 5)] * 16
    figure = plot_boxes(panels, title="worst")
    renderer = RendererAgg(*(int(side * 200) for side in figure.get_size_inches()), 200)
    figure.dpi = 200
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    assert len(boxes) == 16
    for first, second in combinations(boxes, 2):
        assert not first.overlaps(second)
