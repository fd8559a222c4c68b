"""The sheet of many images with their boxes: rendered places, odd shapes, odd texts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image

from localization_heads.attention import Box
from localization_heads.figures.overlay import BoxPanel, plot_boxes

pytestmark = pytest.mark.filterwarnings("error")


def panel(size: tuple[int, int], predicted: Box, truth: Box | None, text: str = "the dog") -> BoxPanel:
    return BoxPanel(
        np.full((size[1] // 10 + 1, size[0] // 10 + 1, 3), 200, np.uint8), size, text, predicted, truth, 0.1
    )


def test_boxes_of_images_of_all_shapes_stand_at_their_pixels(tmp_path: Path) -> None:
    """A small copy of the image is drawn under boxes in the original's pixels."""
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


def test_titles_of_a_full_sheet_do_not_touch() -> None:
    panels = [panel((640, 480), (64, 48, 320, 240), (0, 0, 640, 480), "the dog with the long tail " * 5)] * 16
    figure = plot_boxes(panels, title="worst")
    renderer = RendererAgg(*(int(side * 200) for side in figure.get_size_inches()), 200)
    figure.dpi = 200
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    for first, second in combinations(boxes, 2):
        assert not first.overlaps(second)
