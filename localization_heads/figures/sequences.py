"""Figures of sequences: the frames of a video with their boxes, and the words of an answer with their maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from localization_heads.figures.overlay import (
    BOX_WIDTH,
    ImageLike,
    draw_box,
    draw_image,
    draw_map,
    opacity,
    shrink_to_panel,
)
from localization_heads.figures.sheet import new_figure, new_sheet, panel_size, save
from localization_heads.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TITLE_SIZE,
    VERMILLION,
    paper_style,
    user_text_style,
    wrap,
)
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.store.results import Prediction

_PAGE_WIDTH = 7.0  # inches
_LEGEND_ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 4,
    "fontsize": 7,
    "borderaxespad": 0.1,
}
MAX_WORDS = 24
"""Panels of the figure; the HTML page has all words."""
_PANEL_AREA = 2.4  # square inches
_WORD_SIZE = 9.0  # points


def draw_prediction(image: Image.Image, prediction: Prediction) -> NDArray[np.uint8]:
    """The image with the predicted box and its score, RGB `[H, W, 3]`; unchanged without a box."""
    pixels = np.array(image)
    if prediction.bbox is None:
        return pixels
    thick = max(2, round(max(image.size) / 320))
    x0, y0, x1, y1 = (round(edge) for edge in prediction.bbox)
    for colour, width in (((255, 255, 255), thick + 2), (_rgb_bytes(VERMILLION), thick)):
        cv2.rectangle(pixels, (x0, y0), (x1 - 1, y1 - 1), colour, width, cv2.LINE_AA)
    text = f"{prediction.score or 0:.2f}"
    size, font = thick / 3.5, cv2.FONT_HERSHEY_SIMPLEX
    (width, height), _ = cv2.getTextSize(text, font, size, max(1, thick // 2))
    left, bottom = min(x0, image.width - width - 4), y0 - 4 if y0 > height + 8 else y0 + height + 6
    cv2.rectangle(pixels, (left, bottom - height - 3), (left + width + 4, bottom + 3), _rgb_bytes(VERMILLION), -1)
    cv2.putText(pixels, text, (left + 2, bottom), font, size, (255, 255, 255), max(1, thick // 2), cv2.LINE_AA)
    return pixels


def _rgb_bytes(colour: str) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


def plot_timeline(
    expression: str,
    predictions: Sequence[Prediction],
    thumbnails: Sequence[tuple[float, Image.Image]],
    size: tuple[int, int],
    path: str | Path | None = None,
) -> Figure:
    """Some frames with their boxes, and the box and its score and confidence over time.

    Args:
        predictions: one per frame, in order; a failed frame leaves a gap.
        thumbnails: `(time in seconds, frame with its box)`.
        size: `(W, H)` of a frame in pixels.
    """
    time = np.array([prediction.time or 0.0 for prediction in predictions])
    boxes = np.array([prediction.bbox or (np.nan,) * 4 for prediction in predictions], dtype=float)  # [frame, 4]
    with paper_style():
        columns = max(1, len(thumbnails))
        thumbnail_height = min(_PAGE_WIDTH / columns * size[1] / size[0], 2.5)
        figure = new_figure(_PAGE_WIDTH, thumbnail_height + 3.1)
        grid = figure.add_gridspec(3, columns, height_ratios=[thumbnail_height, 1.3, 1.0])
        for column, (seconds, image) in enumerate(thumbnails):
            axes = figure.add_subplot(grid[0, column])
            draw_image(axes, image, image.size)
            axes.set_axis_off()
            axes.set_title(f"{seconds:.1f} s", fontsize=7.5)
        box_axes, score_axes = figure.add_subplot(grid[1, :]), figure.add_subplot(grid[2, :])
        _draw_box_extents(box_axes, time, boxes / np.array([*size, *size]))
        _draw_scores(score_axes, time, predictions)
        margin = 0.02 * float(np.ptp(time)) or 0.5
        for axes in (box_axes, score_axes):
            axes.set_xlim(time.min() - margin, time.max() + margin)
        box_axes.tick_params(labelbottom=False)
        lines = wrap(expression, _PAGE_WIDTH - 0.2, TITLE_SIZE)
        figure.suptitle(lines, fontsize=TITLE_SIZE, **user_text_style(lines))
        return save(figure, path)


def _draw_box_extents(axes: Axes, time: NDArray[np.float64], boxes: NDArray[np.float64]) -> None:
    """Draw the horizontal and vertical extents of the box over time, as shares of the frame."""
    for name, colour, first in (("left to right", BLUE, 0), ("top to bottom", ORANGE, 1)):
        start, end = boxes[:, first], boxes[:, first + 2]
        axes.fill_between(time, start, end, color=colour, alpha=0.25, linewidth=0, label=name)
        axes.plot(time, (start + end) / 2, color=colour, linewidth=1.2, marker=".", markersize=3)
    axes.set_ylim(0, 1)
    axes.set_ylabel("box, share\nof the frame")
    axes.legend(**_LEGEND_ABOVE)


def _draw_scores(axes: Axes, time: NDArray[np.float64], predictions: Sequence[Prediction]) -> None:
    """Draw the score, the confidence and, if known, the presence over time; failed frames are marked on the axis."""
    calibrated = any(prediction.calibrated for prediction in predictions)
    confidence_label = "confidence" if calibrated else "confidence (uncalibrated)"
    lines = (
        ("score", VERMILLION, [prediction.score for prediction in predictions]),
        (confidence_label, GREEN, [prediction.confidence for prediction in predictions]),
        ("present", BLUE, [prediction.presence for prediction in predictions]),
    )
    for name, colour, values in lines:
        if any(value is not None for value in values):
            known = np.array([np.nan if value is None else value for value in values], dtype=float)
            axes.plot(time, known, color=colour, linewidth=1.2, marker=".", markersize=3, label=name)
    failed = [seconds for seconds, prediction in zip(time, predictions, strict=True) if prediction.error]
    if failed:
        axes.plot(failed, np.zeros(len(failed)), "x", color=GREY, label="failed", clip_on=False)
    axes.set_ylim(0, 1)
    axes.set_xlabel("time (s)")
    axes.legend(**_LEGEND_ABOVE)


def plot_trace(image: ImageLike | None, trace: Trace, path: str | Path | None = None) -> Figure:
    """The first `MAX_WORDS` words of an answer, each with the combined map and its box.

    The title is the query and the answer, cut to eight lines.

    Args:
        image: `None` draws the maps alone.
    """
    size = panel_size(trace.image_size, area=_PANEL_AREA)
    shown = shrink_to_panel(image, max(size))
    words = trace.words[:MAX_WORDS]
    legend = [Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label="box of the word's map")]
    heads = ", ".join(map(str, trace.heads[:6])) + (" ..." if len(trace.heads) > 6 else "")
    note = f"heads {heads}; the step that {trace.step} each word"
    if num_more := len(trace.words) - len(words):
        note += f"; {num_more} more words are on the page"
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
        for index, (word, axes) in enumerate(zip(words, sheet, strict=False)):
            draw_map(axes, trace.groundings[index].combined, trace.image_box, opaque=image is None)
            if (box := trace.boxes[index]) is not None:
                draw_box(axes, box, VERMILLION)
            text = wrap(word.text, size[0] - 0.05, _WORD_SIZE, max_lines=1)
            axes.set_title(text, fontsize=_WORD_SIZE, **user_text_style(text))
        return save(figure, path)
