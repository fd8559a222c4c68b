"""The words of an answer with their maps, one panel a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from localization_heads.figures.letters import as_typed, wrap
from localization_heads.figures.overlay import (
    BOX_WIDTH,
    ImageLike,
    draw_box,
    draw_image,
    draw_map,
    opacity,
    shrink_to_panel,
)
from localization_heads.figures.sheet import new_sheet, panel_size, save
from localization_heads.figures.style import VERMILLION, paper_style
from localization_heads.lvlm.answers.trace import Trace

MOST_WORDS = 24
"""Panels of a figure; the page has all words."""
_AREA = 2.4  # square inches of a panel
_FONT = 9.0  # points


def plot_trace(image: ImageLike | None, trace: Trace, path: str | Path | None = None) -> Figure:
    """The first `MOST_WORDS` words of an answer in its order, each with the combined map and its box.

    The title is the query and the answer, whole, as far as eight lines hold it.

    Args:
        image: `None` draws the maps alone.
    """
    size = panel_size(trace.image_size, area=_AREA)
    shown = shrink_to_panel(image, max(size))
    words = trace.words[:MOST_WORDS]
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label="box of the word's map")]
    heads = ", ".join(map(str, trace.heads[:6])) + (" ..." if len(trace.heads) > 6 else "")
    note = f"heads {heads}; the step that {trace.step} each word"
    if left := len(trace.words) - len(words):
        note += f"; {left} more words are on the page"
    with paper_style():
        figure, sheet = new_sheet(
            size,
            max(1, len(words)),
            f"{trace.query[:400]} → {trace.answer or '(no answer)'}",
            legend=legend if words else (),
            bar=(np.ones_like if image is None else opacity) if words else None,
            note=note,
        )
        for axes in sheet:
            draw_image(axes, shown, trace.image_size)
        for number, (word, axes) in enumerate(zip(words, sheet, strict=False)):
            _draw_word(axes, trace, number, opaque=image is None)
            text = wrap(word.text, size[0] - 0.05, _FONT, max_lines=1)
            axes.set_title(text, fontsize=_FONT, **as_typed(text))
        return save(figure, path)


def _draw_word(axes: Axes, trace: Trace, number: int, *, opaque: bool) -> None:
    draw_map(axes, trace.groundings[number].combined, trace.image_box, opaque=opaque)
    if (box := trace.boxes[number]) is not None:
        draw_box(axes, box, VERMILLION)
