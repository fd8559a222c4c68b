"""What the figures have in place of matplotlib's own images, axes and PNGs shows the same."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from localization_heads.figures.panels import Panel, lay
from localization_heads.figures.png import png

rng = np.random.default_rng(0)
PLACE = (0.13, 0.21, 0.7, 0.6)
SMALL = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60)))


@pytest.mark.parametrize("well", [False, True])
def test_a_png_holds_the_pixels_and_what_is_said_of_them(well: bool) -> None:
    pixels = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    read = Image.open(io.BytesIO(png(pixels, 200, {"Inputs": "abc"}, well=well)))
    assert read.mode == "RGB" and (np.asarray(read) == pixels).all()
    assert read.info["Inputs"] == "abc"
    assert read.info["dpi"] == pytest.approx((200, 200), abs=0.01)


def pixels_of(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def by_matplotlib(values: np.ndarray, box: tuple[float, ...], **how: object) -> np.ndarray:
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.add_axes(PLACE)
    x0, y0, x1, y1 = box
    axes.imshow(values, extent=(x0, x1, y1, y0), aspect="auto", **how)
    return framed(figure, axes)


def by_us(values: np.ndarray, box: tuple[float, ...], **how: object) -> np.ndarray:
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.add_axes(Panel(figure, PLACE))
    lay(axes, values, box, **how)
    return framed(figure, axes)


def framed(figure: Figure, axes: object) -> np.ndarray:
    axes.set(xlim=(0, 80), ylim=(60, 0), facecolor="0.9")
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return pixels_of(figure)


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (-20, -9.5, 71.3, 60), (10, 12, 70, 90)], ids=str)
def test_a_picture_lies_where_matplotlib_lays_it(box: tuple[float, ...]) -> None:
    ours, theirs = by_us(SMALL, box), by_matplotlib(SMALL, box)
    assert np.abs(ours - theirs).mean() < 1.5
    assert np.abs(by_us(SMALL[:, ::-1], box) - theirs).mean() > 10  # the comparison sees another picture


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (-20, -9.5, 71.3, 60), (10, 12, 70, 90)], ids=str)
def test_cells_lie_where_matplotlib_lays_them(box: tuple[float, ...]) -> None:
    cells = rng.random((7, 9))
    how = {"cmap": "viridis", "alpha": 0.1 + 0.75 * cells, "norm": Normalize(0, 1)}
    ours, theirs = by_us(cells, box, **how), by_matplotlib(cells, box, interpolation="nearest", **how)
    assert (np.abs(ours - theirs).max(-1) > 3).mean() < 0.015  # an edge may fall on the next pixel
    assert (np.abs(by_us(cells, (0, 0, 60, 60), **how) - theirs).max(-1) > 3).mean() > 0.1


def test_what_lies_beyond_the_axes_is_not_drawn() -> None:
    assert (by_us(SMALL, (100, 0, 180, 60)) == by_us(SMALL, (0, 70, 80, 90))).all()


def test_panels_have_no_ticks_to_make_or_measure() -> None:
    figure = Figure()
    axes = figure.add_axes(Panel(figure, PLACE))
    pixels_of(figure)
    for axis in (axes.xaxis, axes.yaxis):
        assert "majorTicks" not in vars(axis) and "minorTicks" not in vars(axis)
