"""Figures: rendered pixels at positions computed by hand, texts and whether they fit, SVG and files."""

from __future__ import annotations

import itertools
import logging
import math
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from localization_heads import figures
from localization_heads.attention import AttentionMaps
from localization_heads.cells import label_components
from localization_heads.figures.rendering import _clean_element
from localization_heads.figures.sample import component_colours
from localization_heads.figures.style import VERMILLION, drawable, font_families, wrap
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import head_statistics, keep_heads, spatial_entropy
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import rank_heads
from localization_heads.heads.record import HeadRanking, RankedHead

pytestmark = pytest.mark.filterwarnings("error")

HOSTILE = {
    "mathematics": r"the $\frac{1}{ cup_of_ $5 coffee^2 \left( $",
    "mathtext": r"$a_b$ \frac $\frac$",
    "long": "the man in the very long sentence " * 40,
    "one word": "abcdefgh" * 100,
    "scripts": "左边的猫 🐱👩‍🚀 قطة बिल्ली \U0010fffd \ud800",
    "control": "a\x00b\x1b[31m\r\nc\u202e d\u2028e",
    "empty": "",
}


def maps_of(size: tuple[int, int], *, grid: int = 6, box=None, seed: int = 0, query: str = "the cat"):
    """Maps of 4 layers x 6 heads with one bright cell over noise."""
    attention = np.random.default_rng(seed).random((4, 6, grid, grid)).astype(np.float32) * 0.005
    attention[:, :, grid // 3, grid // 2] += 0.3
    return AttentionMaps(attention, box or (0.0, 0.0, *map(float, size)), size, query=query)


def noise_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rendered(figure) -> np.ndarray:
    """The figure at 100 dpi: `[H, W, 3]`, 0 to 1."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def colour_at(figure, axes, x: float, y: float) -> np.ndarray:
    """The colour drawn at pixel (x, y) of the image that the axes show."""
    pixels = rendered(figure)
    column, row = axes.transData.transform((x, y))
    return pixels[int(pixels.shape[0] - row), int(column)]


def is_bright_yellow(colour: np.ndarray) -> bool:
    """Whether it is the top of the colour map, over any image."""
    red, green, blue = colour
    return bool(red > 0.6 and green > 0.6 and blue < 0.45)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_all_text_fits(figure) -> None:
    """Everything drawn lies within the figure, and no two titles overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # in inches, without clipped artists
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= -0.05, drawn
    assert drawn.x1 <= width + 0.05 and drawn.y1 <= height + 0.05, drawn
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    titles += [figure._suptitle] if figure._suptitle and figure._suptitle.get_text() else []
    for one, other in itertools.combinations(titles, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


@pytest.fixture(autouse=True)
def _pyplot_stays_empty():
    before = dict(matplotlib.rcParams)
    yield
    assert Gcf.get_all_fig_managers() == []
    assert dict(matplotlib.rcParams) | {"backend": before["backend"]} == before


# -- maps on the image ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((60, 60), (0, 0, 60, 60)),
        ((60, 40), (0, -10, 60, 50)),  # padded above and below: a cell is 10 x 10 pixels
        ((40, 80), (-20, 0, 60, 80)),  # padded left and right
        ((80, 60), (10, 0, 70, 60)),  # centre crop: the grid covers less than the image
        ((600, 60), (0, -270, 600, 330)),
    ],
)
def test_a_hot_cell_is_drawn_on_its_pixels(size, box):
    maps = maps_of(size, box=box)
    maps.attention[:] = 0.002
    row, column = 3, 2
    maps.attention[2, 1, row, column] = 0.9
    black = Image.new("RGB", size)
    figure = figures.plot_top_maps(black, maps, [Head(2, 1)])
    axes = figure.axes[1]
    assert axes.get_title() == f"L2H1  S {0.9 + 35 * 0.002:.2f}"
    assert axes.get_xlim() == (0, size[0])
    assert axes.get_ylim() == (size[1], 0)
    width, height = (box[2] - box[0]) / 6, (box[3] - box[1]) / 6
    left, top = box[0] + column * width, box[1] + row * height
    for x, y, hot in [
        (left + 0.5 * width, top + 0.5 * height, True),
        (left + 0.1 * width, top + 0.1 * height, True),
        (left + 0.9 * width, top + 0.9 * height, True),
        (left - 0.1 * width, top + 0.5 * height, False),
        (left + 1.1 * width, top + 0.5 * height, False),
        (left + 0.5 * width, top - 0.1 * height, False),
        (left + 0.5 * width, top + 1.1 * height, False),
    ]:
        if 0 < x < size[0] and 0 < y < size[1]:
            assert is_bright_yellow(colour_at(figure, axes, x, y)) == hot, (x, y)


def test_cells_in_the_padding_neither_show_nor_dim_the_others():
    maps = maps_of((60, 40), box=(0, -10, 60, 50))
    maps.attention[:] = 0.0
    maps.attention[2, 1, 0, 3] = 0.9  # a sink in the padding above
    maps.attention[2, 1, 2, 3] = 0.1  # the maximum inside: x 30 to 40, y 10 to 20
    figure = figures.plot_top_maps(Image.new("RGB", (60, 40)), maps, [Head(2, 1)])
    assert is_bright_yellow(colour_at(figure, figure.axes[1], 35, 15))
    assert not is_bright_yellow(colour_at(figure, figure.axes[1], 35, 2))


@pytest.mark.parametrize("colour", ["orange", "white", "black", "blue", "green"])
def test_the_image_keeps_its_colours_without_attention(colour):
    maps = maps_of((60, 60))
    maps.attention[:] = 0.0
    maps.attention[:, :, 3, 2] = 0.5
    image = Image.new("RGB", (60, 60), colour)
    grounding = ground_maps(maps, [Head(2, 1)])
    figure = figures.plot_top_maps(image, maps, [Head(2, 1)], grounding=grounding)
    overlay = figures.plot_grounding(image, grounding)
    for drawn, axes in [(figure, figure.axes[1]), (figure, figure.axes[2]), (overlay, overlay.axes[0])]:
        assert colour_at(drawn, axes, 56, 4) == pytest.approx(to_rgb(colour), abs=0.12)
    assert colour_at(figure, figure.axes[1], 25, 35) == pytest.approx((0.99, 0.91, 0.14), abs=0.2)


def test_the_colour_bar_has_the_opacity_of_the_maps():
    maps = maps_of((60, 60))
    for image, least in [(noise_image((60, 60)), 0.1), (None, 1.0)]:
        bar = figures.plot_top_maps(image, maps, [Head(2, 1)]).axes[-1]
        assert bar.images[0].get_alpha().min() == pytest.approx(least)
        assert np.asarray(bar.images[0].get_array())[0, [0, -1]].tolist() == [0, 1]


def test_the_image_is_drawn_upright_and_undimmed_in_the_first_panel():
    image = Image.new("RGB", (50, 40), "blue")
    image.paste("red", (0, 0, 25, 20))
    figure = figures.plot_top_maps(image, maps_of((50, 40)), [Head(2, 0)])
    assert colour_at(figure, figure.axes[0], 10, 10) == pytest.approx((1, 0, 0), abs=0.02)
    assert colour_at(figure, figure.axes[0], 40, 10) == pytest.approx((0, 0, 1), abs=0.02)
    assert colour_at(figure, figure.axes[0], 10, 30) == pytest.approx((0, 0, 1), abs=0.02)
    assert image.size == (50, 40)


def test_a_small_box_in_a_large_image_has_a_close_up():
    """At its own pixels, in a second panel; a large box needs none."""
    maps = maps_of((3000, 2000), grid=100)
    maps.attention[:] = 0.0
    maps.attention[:, :, 1, 97] = 0.5
    image = Image.new("RGB", (3000, 2000), "black")
    grounding = ground_maps(maps, [Head(2, 0)])
    figure = figures.plot_grounding(image, grounding, expression="the icon " * 20)
    _, close = figure.axes
    (left, right), (bottom, top) = close.get_xlim(), close.get_ylim()
    x0, y0, x1, y1 = grounding.box
    assert left <= x0 < x1 <= right <= 3000
    assert 0 <= top <= y0 < y1 <= bottom
    assert right - left == pytest.approx(3 * max(x1 - x0, 1.5 * (y1 - y0)), rel=1e-3)
    for x, y in [(x0, (y0 + y1) / 2), ((x0 + x1) / 2, y1)]:
        assert colour_at(figure, close, x, y) == pytest.approx(to_rgb(VERMILLION), abs=0.1)
    assert_all_text_fits(figure)
    maps.attention[:] = 0.5
    assert len(figures.plot_grounding(image, ground_maps(maps, [Head(2, 0)])).axes) == 1
    assert len(figures.plot_grounding(None, grounding).axes) == 1


@pytest.mark.parametrize("plot", ["top maps", "grounding"])
def test_boxes_are_drawn_at_their_pixels(plot):
    maps = maps_of((100, 80), grid=10)
    grounding = ground_maps(maps, [Head(2, 0), Head(3, 1)])
    x0, y0, x1, y1 = grounding.box
    image = Image.new("RGB", (100, 80), "black")
    if plot == "top maps":
        figure = figures.plot_top_maps(image, maps, grounding.heads, grounding=grounding, truth=(70, 60, 95, 75))
        axes = figure.axes[3]
        assert axes.get_title() == "combined: 2 heads"
    else:
        figure = figures.plot_grounding(image, grounding, truth=(70, 60, 95, 75), expression="it")
        axes = figure.axes[0]
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    for x, y in [(x0, middle_y), (x1, middle_y), (middle_x, y0), (middle_x, y1)]:
        assert colour_at(figure, axes, x, y) == pytest.approx(to_rgb(VERMILLION), abs=0.1), (x, y)
    solid, dashed = axes.patches[-2:]
    assert solid.get_linestyle() == "-"
    assert dashed.get_bbox().bounds == (70, 60, 25, 15)
    assert dashed.get_linestyle() != "-"
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == [f"predicted box, score {grounding.score:.2f}", "true box"]
    assert ("pseudo-mask" in labels) == (plot == "grounding")


def test_a_flat_map_is_labelled_as_such():
    maps = AttentionMaps(np.full((4, 6, 6, 6), 0.01, dtype=np.float32), (0, 0, 60, 60), (60, 60))
    figure = figures.plot_grounding(None, ground_maps(maps, [Head(2, 0)]))
    assert figure.legends[0].get_texts()[0].get_text() == "no cell stands out: whole image"


def test_a_box_beyond_the_image_is_cut_at_its_edge():
    maps = maps_of((50, 40))
    figure = figures.plot_top_maps(None, maps, [Head(2, 0)], truth=(-30, -10, 500, 20))
    assert figure.axes[0].patches[-1].get_bbox().extents.tolist() == [0, 0, 50, 20]


@pytest.mark.parametrize("size", [(100, 80), (2400, 1800), (2000, 90)])
def test_shrunk_heat_map_and_mask_agree_with_those_at_full_size(size):
    box = (-0.1 * size[0], 0, 1.1 * size[0], size[1])  # padded left and right
    grounding = ground_maps(maps_of(size, grid=10, box=box), [Head(2, 0), Head(3, 1)])
    figure = figures.plot_grounding(None, grounding)
    heat = np.asarray(figure.axes[0].images[0].get_array())
    height, width = heat.shape
    step = max(1.0, max(size) / 1200)
    assert (width, height) == (round(size[0] / step), round(size[1] / step))
    rows = ((np.arange(height) + 0.5) * size[1] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * size[0] / width).astype(int)
    assert heat == pytest.approx(grounding.heatmap[np.ix_(rows, columns)], abs=0.06)
    (outline,) = [artist for artist in figure.axes[0].collections if hasattr(artist, "get_paths")]
    ys, xs = np.nonzero(grounding.mask)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    tolerance = 0.2 if step == 1 else step + 0.2
    assert outline.get_paths()[0].get_extents().extents == pytest.approx(expected, abs=tolerance)


def test_no_array_has_the_size_of_a_huge_image():
    size = (20_000, 20_000)
    grounding = ground_maps(maps_of(size, grid=24), [Head(2, 0)])
    tracemalloc.start()
    try:
        figures.plot_grounding(None, grounding)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150e6  # one byte per pixel would be 400e6
    assert {"heatmap", "mask"}.isdisjoint(vars(grounding))


def test_a_head_that_does_not_attend_is_drawn_faint():
    """Its map is scaled to its own maximum, like every map, and would look like the others."""
    attention = np.full((1, 2, 6, 6), 0.02, dtype=np.float32)
    attention[0, 1] = 0.0001
    maps = AttentionMaps(attention, image_size=(60, 60), image_box=(0, 0, 60, 60))
    figure = figures.plot_top_maps(Image.new("RGB", (60, 60)), maps, [Head(0, 0), Head(0, 1)])
    _, attending, inactive, _ = figure.axes  # the image first, the colour bar last
    assert to_rgb(inactive.title.get_color()) != to_rgb(attending.title.get_color()) == (0, 0, 0)
    bright, faint = (colour_at(figure, axes, 25, 25).sum() for axes in (attending, inactive))
    assert faint < 0.4 * bright


def test_titles_name_both_criteria():
    maps = maps_of((60, 60))
    maps.attention[3, 2] = 1 / 36  # constant: no component, infinite entropy
    statistics = head_statistics(maps.attention)
    figure = figures.plot_top_maps(None, maps, [Head(2, 1), Head(3, 2)], statistics=statistics)
    S, H = statistics.attention_sum[2, 1], statistics.spatial_entropy[2, 1]
    assert figure.axes[0].get_title() == f"L2H1  S {S:.2f}  H {H:.2f}"
    assert figure.axes[1].get_title() == "L3H2  S 1.00  H ∞"
    assert "each map's maximum" in texts(figure)


@pytest.mark.parametrize("k", [0, 1, 3, 20])
@pytest.mark.parametrize("size", [(64, 48), (30, 200), (400, 50), (1, 1), (7, 3)])
def test_every_shape_and_number_of_heads_fits(size, k):
    """Both with and without the image, for each shape and each number."""
    maps, with_image = maps_of(size), (size[0] + k) % 2 == 0
    heads = [Head(*divmod(n + 4, 6)) for n in range(k)]
    grounding = ground_maps(maps, heads) if heads else None
    image = noise_image(size) if with_image else None
    figure = figures.plot_top_maps(image, maps, heads, grounding=grounding, statistics=head_statistics(maps.attention))
    assert_all_text_fits(figure)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == with_image + k + (k > 0)
    assert [title.split()[0] for title in titles[with_image : with_image + k]] == [str(head) for head in heads]
    assert figure.get_size_inches()[0] < 11


# -- user text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_expressions_are_drawn_literally(expression, tmp_path):
    maps = maps_of((60, 40), query=expression)
    grounding = ground_maps(maps, [Head(2, 0)])
    labels = label_components(maps.attention[2, 0] > 0.1)
    drawn = [
        figures.plot_top_maps(None, maps, [Head(2, 0)], tmp_path / "a.png", grounding=grounding),
        figures.plot_components(None, maps, Head(2, 0), labels, 0.0, tmp_path / "b.png"),
        figures.plot_grounding(None, grounding, tmp_path / "c.png", expression=expression),
    ]
    for figure in drawn:
        assert_all_text_fits(figure)
        shown = figure._suptitle.get_text() if figure._suptitle else ""
        whole = drawable(expression).replace(" ", "")
        assert whole.startswith(shown.replace("\n", "").replace(" ", "").removesuffix("…"))
        assert shown.count("\n") < 8
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("a cat", "a cat"),
        ("  a\tcat\r\non\x00it ", "a cat on it"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),
        ("\U0010fffd", "□"),
        ("a\ud800", "a□"),
        ("", ""),
    ],
)
def test_drawable_text(text, drawn):
    assert drawable(text) == drawn


def test_missing_glyphs_come_from_another_font():
    """The APL quad is not in DejaVu Sans, but in DejaVu Sans Mono, which matplotlib also ships."""
    assert drawable("the \u2338 cat") == "the \u2338 cat"
    first, *others = font_families("the \u2338 cat")
    assert first == "DejaVu Sans" and len(others) == 1
    assert font_families("the cat") == ["DejaVu Sans"]
    figure = figures.plot_grounding(None, ground_maps(maps_of((60, 60)), [Head(2, 0)]), expression="\u2338")
    assert figure._suptitle.get_fontfamily() == [first, *others]
    rendered(figure)  # matplotlib warns about missing glyphs


def test_wrap_breaks_between_words():
    text = "the small brown dog with a red collar next to the old well-known fountain " * 3
    lines = wrap(text, 2.0, 10, max_lines=99).split("\n")
    assert " ".join(lines).replace("- ", "-") == text.strip()
    assert len(lines) > 3


def test_wrap_breaks_long_words_and_marks_omitted_text():
    lines = wrap("x" * 1000, 1.0, 10, max_lines=3).split("\n")
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert set("".join(lines)) == {"x", "…"}


# -- components ---------------------------------------------------------------------------------------------


def test_components_show_their_shares_and_entropy():
    maps = maps_of((80, 80), grid=8)
    maps.attention[2, 1] = 0.001
    maps.attention[2, 1, :3, :2] = 0.1  # 6 cells
    maps.attention[2, 1, 5:7, 6:7] = 0.1  # 2 cells
    labels = label_components(maps.attention[2, 1] > 0.05) + 7  # numbers continue across a stack of maps
    labels[labels == 7] = 0
    entropy = float(spatial_entropy(maps.attention[2, 1]))
    assert entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    figure = figures.plot_components(Image.new("RGB", (80, 80)), maps, Head(2, 1), labels, entropy)
    left, middle, right = figure.axes
    assert left.get_title().startswith("L2H1")
    assert middle.get_title() == "active: 12% of cells"
    assert right.get_title() == "2 components: H = 0.56"
    assert [text.get_text() for text in right.texts] == ["75%", "25%"]
    large, small = component_colours(2)
    assert colour_at(figure, right, 2, 2) == pytest.approx(np.array(large) * 0.9, abs=0.03)
    assert colour_at(figure, right, 61, 69) == pytest.approx(np.array(small) * 0.9, abs=0.03)
    assert colour_at(figure, right, 40, 40) == pytest.approx((0, 0, 0), abs=0.03)
    assert colour_at(figure, middle, 61, 69) == pytest.approx((0.9, 0.9, 0.9), abs=0.03)


def test_the_share_of_a_ring_is_written_on_the_ring():
    maps = maps_of((90, 90), grid=9)
    labels = np.zeros((9, 9), dtype=np.int32)
    labels[1:8, 1:8] = 1
    labels[2:7, 2:7] = 0
    figure = figures.plot_components(None, maps, Head(2, 0), labels, 0.0)
    (share,) = figure.axes[2].texts
    column, row = (int(place // 10) for place in share.get_position())
    assert share.get_text() == "100%"
    assert labels[row, column] == 1


def test_only_the_largest_components_are_labelled_without_overlaps():
    labels = np.zeros((24, 24), dtype=np.int32)
    labels[::3, ::3] = np.arange(1, 65).reshape(8, 8)
    labels[1, 1:9:3] = labels[0, 0:9:3]  # three of two cells
    figure = figures.plot_components(noise_image((240, 240)), maps_of((240, 240), grid=24), Head(2, 0), labels, 4.1)
    names = figure.axes[2].texts
    assert 1 <= len(names) <= 6
    rendered(figure)
    for one, other in itertools.combinations(names, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())
    assert figure.axes[2].get_title() == "64 components: H = 4.10"
    assert len(set(component_colours(35))) == 35
    assert_all_text_fits(figure)


def test_a_note_counts_cells_in_the_padding():
    maps = maps_of((60, 40), box=(0, -10, 60, 50))  # the first and the last of six rows are in the padding
    labels = np.zeros((6, 6), dtype=np.int32)
    labels[0, :3] = 1
    labels[2, 2] = 2
    figure = figures.plot_components(None, maps, Head(2, 0), labels, 0.56)
    (note,) = [text for text in texts(figure) if "padding" in text]
    assert note.replace("\n", " ").startswith("12 of the 36 cells are in the padding, 3 of them active")
    assert_all_text_fits(figure)
    boxes = [text.get_window_extent() for text in figure.texts if "padding" in text.get_text()]
    assert not any(axes.get_window_extent().overlaps(boxes[0]) for axes in figure.axes)
    for box in [(0, 0, 60, 40), (10, 0, 50, 40), (-1e-9, 0, 60, 40 + 1e-9)]:  # no padding
        figure = figures.plot_components(None, maps_of((60, 40), box=box), Head(2, 0), labels, 0.56)
        assert not [text for text in texts(figure) if "padding" in text]


def test_a_map_without_components():
    labels = np.zeros((6, 6), dtype=np.int32)
    figure = figures.plot_components(None, maps_of((60, 60)), Head(2, 0), labels, math.inf)
    assert figure.axes[2].get_title() == "no component: H = ∞"
    assert_all_text_fits(figure)


# -- the whole model ----------------------------------------------------------------------------------------


def sums_with_an_elbow(layers: int = 12, heads: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).beta(0.5, 8, (layers, heads)).astype(np.float32)


def test_attention_sums_are_sorted_and_the_elbow_is_marked():
    sums = sums_with_an_elbow()
    sums[0, 0] = 5.0  # in an excluded layer, which is not drawn
    kept = keep_heads(sums)
    tau = float(sums[kept].min())
    top = [Head(*index) for index in np.argwhere(kept)[:3].tolist()]
    figure = figures.plot_attention_sums(sums, tau, kept=kept, top=[*top, Head(1, 1)])
    (axes,) = figure.axes
    curve = axes.lines[0]
    assert curve.get_ydata() == pytest.approx(np.sort(sums[2:].ravel()))
    assert axes.get_title(loc="left") == f"{kept.sum()} of 80 heads kept"
    assert axes.get_xlabel() == "Heads of layers 2 and up, in ascending order"  # 80 of 96
    shown = texts(figure)
    assert f"τ = {tau:.2f}" in shown
    assert {str(head) for head in top} < set(shown)
    assert "L1H1" not in shown
    (place,) = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert place == pytest.approx([80 - kept.sum() + 1])  # the lowest kept head, from 1
    (shade,) = [patch for patch in axes.patches if patch.get_alpha()]
    corners = np.reshape(shade.get_xy(), (-1, 2))  # of a rectangle the first, of matplotlib 3.8's polygon all
    assert corners[:, 0].min() == 80 - kept.sum() + 0.5
    diamonds = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert sorted(diamonds) == pytest.approx(sorted(float(sums[head]) for head in top))
    assert_all_text_fits(figure)


LIKE_LLAVA = 0.7 * np.random.default_rng(0).permutation(np.linspace(0.02, 1, 1024) ** 4).reshape(32, 32)
LIKE_EMBEDDED = 1 - 0.3 * np.random.default_rng(0).beta(0.5, 2.5, (6, 8))
EARLY_ELBOW = np.concatenate([[0.81, 0.92], np.linspace(0.944, 0.99, 46)]).reshape(6, 8)[::-1].copy()


@pytest.mark.parametrize(
    ("sums", "tau", "bottom"),
    [
        (LIKE_LLAVA, 0.2, 0.0),
        (LIKE_EMBEDDED, 0.97, LIKE_EMBEDDED[2:].min()),
        (LIKE_EMBEDDED, 0.4, 0.0),  # the threshold is far below
        (np.full((4, 4), 0.9), 0.9, 0.0),
    ],
)
def test_the_axis_of_sums_starts_near_the_lowest_sum(sums, tau, bottom):
    (axes,) = figures.plot_attention_sums(sums, tau).axes
    lowest, highest = axes.get_ylim()
    assert lowest == pytest.approx(bottom, abs=0.1 * (highest - lowest))
    assert lowest <= bottom
    assert lowest == 0 or bottom > 0
    assert highest > sums.max()


@pytest.mark.parametrize(("sums", "tau"), [(LIKE_LLAVA, 0.2), (LIKE_EMBEDDED, 0.97), (EARLY_ELBOW, 0.944)])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_names_and_their_lines_stay_off_the_curve(sums, tau, count):
    best = [Head(*index) for index in np.argwhere(sums >= tau).tolist() if index[0] >= 2]
    top = [best[n] for n in np.linspace(0, len(best) - 1, count).astype(int)]
    figure = figures.plot_attention_sums(sums, tau, top=top)
    rendered(figure)
    (axes,) = figure.axes
    curve = axes.transData.transform(axes.lines[0].get_xydata())  # in dots
    names = [text for text in axes.texts if text.get_text().startswith("L")]
    assert len(names) == count
    boxes = [Text.get_window_extent(name) for name in names]  # without the annotation's line
    (tau_label,) = [text for text in axes.texts if "τ" in text.get_text()]
    for box in [*boxes, Text.get_window_extent(tau_label)]:
        for x, y in curve[(curve[:, 0] > box.x0) & (curve[:, 0] < box.x1)]:
            assert not box.y0 - 2 < y < box.y1 + 2, (x, y, box)
    level = axes.transData.transform((0, tau))[1]
    assert not any(box.y0 + 0.2 * box.height < level < box.y1 - 1 for box in boxes)  # below: room for descenders
    for name in names:
        start, end = name.arrow_patch.get_path().vertices[[0, -1]]  # including the shrunk ends
        for share in np.linspace(0.05, 0.95, 50):
            x, y = start + share * (end - start)
            above = y - np.interp(x, *curve.T)
            assert (above > -1) if sums is LIKE_LLAVA else (above < 1), (name, share)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert_all_text_fits(figure)


@pytest.mark.parametrize(
    ("sums", "tau"),
    [
        (np.zeros((4, 4)), 0.0),
        (np.full((3, 1), 0.2), 0.2),
        (np.ones((2, 4)), 0.5),  # all layers are excluded
        (sums_with_an_elbow(), None),  # the rule has no tau
        (sums_with_an_elbow(), 2.0),  # above every head
        (sums_with_an_elbow(80, 64) / 1000, 0.0002),
    ],
)
def test_degenerate_attention_sums_are_drawn(sums, tau):
    top = [Head(*index) for index in np.argwhere(sums >= 0).tolist()][-20:]
    figure = figures.plot_attention_sums(sums, tau, top=top)
    assert_all_text_fits(figure)
    labels = [text for text in texts(figure) if "τ" in text]
    assert labels == ([] if tau is None or len(sums) == 2 else [f"τ = {tau:.2f}" if tau >= 0.1 else f"τ = {tau:.2g}"])


def ranking_of(count: int, *, trials: int = 5) -> HeadRanking:
    heads = tuple(RankedHead(14 + n % 3, 31 - n, 0.8 * 0.9**n, 0.01 * (n % 4), 0.3, 0.1 * n) for n in range(count))
    return HeadRanking(heads=heads, tau=0.24, top_n=10, num_samples=1000, num_trials=trials)


def test_selection_frequency_bars_are_in_ranked_order():
    figure = figures.plot_selection_frequency(ranking_of(30), top=15)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([80 * 0.9**n for n in range(15)])
    assert [label.get_text() for label in axes.get_xticklabels()][:4] == [
        "L14H31", "L15H30", "L16H29", "L14H28",
    ]  # fmt: skip
    segments = axes.collections[0].get_segments()
    assert segments[1][:, 1] == pytest.approx([71, 73])
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert len(set(colours[:3])) == len(set(colours[3:])) == 1
    assert colours[0] != colours[3]
    assert "± s.d. over 5 draws of 1,000 samples" in texts(figure)
    assert_all_text_fits(figure)


def test_heads_of_excluded_layers_have_no_bar():
    heads = (RankedHead(2, 0, 0.8, 0.01, 0.3, 0.1), RankedHead(1, 0, 0.0, 0.0, 0.3, 0.1))
    ranking = HeadRanking(heads=heads, tau=0.24, top_n=10, num_samples=9, num_trials=1)
    (axes,) = figures.plot_selection_frequency(ranking).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["L2H0"]


def test_error_bars_stay_within_0_and_100_percent():
    heads = tuple(RankedHead(2, n, share, 0.08, 0.5, 0.3) for n, share in enumerate((0.98, 0.03)))
    figure = figures.plot_selection_frequency(HeadRanking(heads, 0.1, 10, 20, 5))
    ends = [segment[:, 1] for segment in figure.axes[0].collections[0].get_segments()]
    assert np.array(ends) == pytest.approx(np.array([[90, 100], [0, 11]]))


@pytest.mark.parametrize("pool", [18, 19])
def test_the_caption_names_draws_or_bootstrap_resamples(pool):
    """18 samples can be drawn from 18 in one way only, so their spread is from the bootstrap."""
    sums, entropies = np.random.default_rng(0).random((2, pool, 4, 3))
    figure = figures.plot_selection_frequency(rank_heads(sums, entropies, num_samples=18))
    trials = "bootstrap resamples" if pool == 18 else "draws"
    assert f"± s.d. over 5 {trials} of 18 samples" in texts(figure)
    assert_all_text_fits(figure)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_any_number_of_ranked_heads_fits(count):
    figure = figures.plot_selection_frequency(ranking_of(count, trials=1), top=40)
    assert len(figure.axes[0].patches) == count
    assert not figure.axes[0].collections  # one draw has no spread
    assert_all_text_fits(figure)


@pytest.mark.parametrize("shape", [(6, 4), (32, 32), (80, 64), (3, 1)])
def test_the_head_grid_shows_the_values_of_considered_layers(shape):
    values = np.arange(math.prod(shape), dtype=float).reshape(shape)
    figure = figures.plot_head_grid(values, top=[Head(2, 0)], exclude_layers=2)
    axes = figure.axes[0]
    cells = axes.collections[0].get_array()
    assert np.array_equal(np.ma.getdata(cells)[2:], values[2:])
    assert np.ma.getmaskarray(np.ma.masked_invalid(cells))[:2].all()
    assert axes.patches[0].get_xy() == (-0.5, 1.5)
    assert_all_text_fits(figure)


def drawn_charts() -> dict:
    sums = sums_with_an_elbow(6, 8)
    top = [Head(*index) for index in np.argwhere(sums >= np.sort(sums[2:].ravel())[-3]).tolist() if index[0] >= 2]
    points = [(Head(*index), float(sums[index]), 1 - float(sums[index])) for index in np.ndindex(sums.shape)]
    return {
        "curve": figures.plot_attention_sums(sums, 0.1, top=top),
        "scatter": figures.plot_frequency_iou(points, least_frequency=0.05, top=top),
        "grid": figures.plot_head_grid(sums, top=top, exclude_layers=2),
    }


def test_svg_is_reproducible_and_embeddable():
    """The same text each time, ids unique within a page, and no inline styles."""
    one, two = ([figures.svg(figure, name) for name, figure in drawn_charts().items()] for _ in range(2))
    assert one == two
    ids = [id for text in one for id in re.findall(r' id="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 3
    for text in one:
        root = ElementTree.fromstring(text)
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', text)) == set(re.findall(r' id="([^"]+)"', text))
        assert not [element for element in root.iter() if "style" in element.attrib or element.tag.endswith("style")]
        assert root.get("role") == "img" and "L" in "".join(root.itertext())


def test_svg_marks_have_tooltips_with_their_heads():
    charts = {name: figures.svg(figure, name) for name, figure in drawn_charts().items()}
    tips = {name: re.findall(r"<title>(L\d+H\d+): ([^<]+)</title>", text) for name, text in charts.items()}
    heads = [f"L{layer}H{head}" for layer in range(6) for head in range(8)]
    assert [head for head, _ in tips["grid"]] == heads
    assert [tip for _, tip in tips["grid"]][:16] == ["no value"] * 16
    assert sorted(head for head, _ in tips["scatter"]) == sorted(heads)
    assert {head for head, _ in tips["curve"]} == set(heads[16:])
    assert all(re.fullmatch(r"S = 0\.\d{3}", tip) for _, tip in tips["curve"])


def test_svg_splits_the_font_shorthand_of_matplotlib_3_8() -> None:
    """`font` is not an SVG attribute: all text would have one size."""
    element = ElementTree.Element("text", style="font: italic 700 8.5px 'DejaVu Sans', sans-serif; fill: #000")
    _clean_element(element, set())
    assert element.attrib == {
        "font-style": "italic", "font-weight": "700", "font-size": "8.5px", "fill": "#000"
    }  # fmt: skip


def test_a_very_large_head_grid_is_rasterized():
    text = figures.svg(figures.plot_head_grid(np.random.default_rng(0).random((64, 64))), "grid")
    assert "<title>" not in text and len(text) < 100_000


# -- files and windows --------------------------------------------------------------------------------------


def test_png_files_are_smaller_than_a_megabyte(tmp_path):
    """Even those of noise, which compresses worst."""
    maps = maps_of((2000, 1500), grid=24)
    heads = [Head(*divmod(n + 4, 6)) for n in range(20)]
    image = noise_image((2000, 1500))
    figures.plot_top_maps(image, maps, heads, tmp_path / "sub" / "20.png", grounding=ground_maps(maps, heads))
    figures.plot_grounding(np.asarray(image), ground_maps(maps, heads), tmp_path / "1.png", expression="noise")
    for path in (tmp_path / "sub" / "20.png", tmp_path / "1.png"):
        assert path.stat().st_size < 1_000_000
        with Image.open(path) as file:
            assert min(file.size) > 400
            file.load()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.png", "20.png", "sub"]


def test_the_suffix_chooses_the_format(tmp_path):
    figures.plot_head_grid(np.ones((3, 3)), tmp_path / "grid.pdf")
    assert (tmp_path / "grid.pdf").read_bytes().startswith(b"%PDF")


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.plot_head_grid(np.ones((3, 3)), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_users_matplotlib_style_is_ignored(tmp_path):
    def image() -> bytes:
        figures.plot_attention_sums(sums_with_an_elbow(), 0.1, tmp_path / "sums.png", top=[Head(3, 3)])
        return (tmp_path / "sums.png").read_bytes()

    plain = image()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert image() == plain


def test_threads_draw_the_same_figures():
    def draw(seed: int) -> bytes:
        maps = maps_of((60, 40), seed=seed)
        return rendered(figures.plot_top_maps(noise_image((60, 40)), maps, [Head(2, 1)])).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == [draw(seed) for seed in range(8)]


def test_drawing_does_not_import_pyplot():
    program = """
import sys, numpy
from localization_heads import figures
figures.plot_head_grid(numpy.ones((3, 3)))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_show_without_a_display_logs_one_line(caplog):
    figure = figures.plot_head_grid(np.ones((3, 3)))
    with caplog.at_level(logging.INFO), matplotlib.rc_context({"backend": "agg"}):
        assert figures.show(figure, figure) is False
    assert len(caplog.records) == 1 and "no window" in caplog.text


def test_show_moves_figures_into_pyplot_windows(monkeypatch):
    import matplotlib.pyplot as plt

    drawn = [figures.plot_head_grid(np.ones((3, 3))), figures.plot_head_grid(np.zeros((2, 2)))]
    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "qtagg")
    monkeypatch.setattr(plt, "show", lambda: shown.extend(m.canvas.figure for m in Gcf.get_all_fig_managers()))
    assert figures.show(*drawn) is True
    assert shown == drawn
