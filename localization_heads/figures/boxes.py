"""Many pictures with their predicted and true boxes on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from localization_heads.attention import Box
from localization_heads.figures.canvas import SKY, VERMILLION, paper_style, save
from localization_heads.figures.overlay import BOX_WIDTH, Picture, draw_box, draw_image, prepare
from localization_heads.figures.sheet import new_sheet, panel_size
from localization_heads.figures.text import wrap

_AREA = 5.2  # square inches: four panels a row
_PANEL_FONT = 8.0  # points


@dataclass(frozen=True)
class BoxPanel:
    """One picture of the sheet.

    Args:
        image: the picture, at any resolution.
        image_size: `(W, H)` of the original, in whose pixels the boxes are.
        text: what was asked; cut to one line.
    """

    image: Picture
    image_size: tuple[int, int]
    text: str
    predicted: Box
    truth: Box | None
    iou: float


def plot_boxes(panels: Sequence[BoxPanel], path: str | Path | None = None, *, title: str = "") -> Figure:
    """Each picture with the predicted box, solid, and the true one, dashed; its IoU and expression above it."""
    size = panel_size((1, 1), area=_AREA)
    legend = [
        Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label="predicted box"),
        Line2D([], [], color=SKY, linewidth=BOX_WIDTH, linestyle="--", label="true box"),
    ]
    with paper_style():
        figure, sheet = new_sheet(size, len(panels), title, legend=legend)
        for axes, panel in zip(sheet, panels, strict=True):
            draw_image(axes, prepare(panel.image, max(size)), panel.image_size)
            draw_box(axes, panel.predicted, VERMILLION)
            if panel.truth is not None:
                draw_box(axes, panel.truth, SKY, dashed=True)
            label = wrap(f"IoU {panel.iou:.2f}  {panel.text}", size[0] - 0.05, _PANEL_FONT, max_lines=1)
            axes.set_title(label, fontsize=_PANEL_FONT, parse_math=False)
        return save(figure, path)
