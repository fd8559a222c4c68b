"""Figures of one image: the maps of its top heads, the grounding (Sec. 5), and the components of a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import AttentionMaps, Box
from localization_heads.cells import normalised_heatmap
from localization_heads.figures.overlay import (
    BLACK_RIM,
    BOX_WIDTH,
    MAX_SIDE,
    ImageLike,
    draw_box,
    draw_cells,
    draw_image,
    draw_map,
    draw_outline,
    opacity,
    shrink_to_panel,
    visible_cells_index,
)
from localization_heads.figures.sheet import new_sheet, panel_size, save
from localization_heads.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    paper_style,
)
from localization_heads.grounding.ground import Grounding
from localization_heads.grounding.shapes import fill_polygon
from localization_heads.heads.head import Head

if TYPE_CHECKING:
    from localization_heads.heads.criteria import HeadStatistics


MIN_ATTENTION_SUM = 0.005
"""Lower attention sums are printed as 0.00."""
_MIN_LARGE_SIDE = 2 * MAX_SIDE
"""Pixels of a side from which on a figure shows at most half of an image's resolution."""
_MIN_VISIBLE_SHARE = 0.1
"""Share of a side below which the content of a box is hidden by its own edges."""
_HUES = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, YELLOW)
_SHADES = ((0.0, 0.0), (0.45, 1.0), (0.45, 0.0), (0.7, 1.0), (0.65, 0.0))
"""How much of white (1) or black (0) is mixed into the hues, each time that they repeat."""
_MAX_LABELLED = 6
_MIN_LABELLED_SHARE = 0.02  # a smaller component is a cell or two, which a number would hide


def plot_top_maps(
    image: ImageLike | None,
    attention: AttentionMaps,
    heads: Sequence[Head],
    path: str | Path | None = None,
    *,
    grounding: Grounding | None = None,
    truth: Box | None = None,
    expression: str | None = None,
    statistics: HeadStatistics | None = None,
) -> Figure:
    """The image, the maps of `heads` over it, and their combined map with the predicted box.

    Every map is coloured from 0 to its own maximum inside the image, as the colour bar says; cells in the padding are
    not shown. A map with an attention sum of 0.00 is drawn faint, since its colours would look like any other's.

    Args:
        image: `None` draws the maps alone.
        heads: best first; one panel per head.
        grounding: adds the combined map and its box.
        truth: true box in pixels, drawn dashed.
        expression: the title; by default the query of the maps.
        statistics: adds the spatial entropy `H` to the attention sum `S` in the titles.
    """
    size = panel_size(attention.image_size, area=2.4)
    shown = shrink_to_panel(image, max(size))
    panels = (image is not None) + len(heads) + (grounding is not None)
    title = attention.query if expression is None else expression
    with paper_style():
        bar = np.ones_like if image is None else opacity
        figure, sheet = new_sheet(size, panels, title, legend=_box_legend(grounding, truth), bar=bar)
        for axes in sheet:
            draw_image(axes, shown, attention.image_size)
        remaining = iter(sheet)
        if image is not None:
            next(remaining).set_title("image")
        for head, axes in zip(heads, remaining, strict=False):
            attends = attention.attention[head].sum() >= MIN_ATTENTION_SUM
            draw_map(axes, attention.attention[head], attention.image_box, opaque=image is None, faint=not attends)
            axes.set_title(_map_title(attention, head, statistics), color="black" if attends else GREY)
        if grounding is not None:
            draw_map(sheet[-1], grounding.combined, attention.image_box, opaque=image is None)
            sheet[-1].set_title(f"combined: {len(grounding.heads)} heads")
        if sheet:
            _draw_boxes(sheet[-1], grounding, truth)
        return save(figure, path)


def _map_title(attention: AttentionMaps, head: Head, statistics: HeadStatistics | None) -> str:
    """`L14H24  S 0.41  H 0.00`: the head and its two criteria on this sample."""
    if statistics is None:
        return f"{head}  S {attention.attention[head].sum():.2f}"
    entropy = statistics.spatial_entropy[head]
    H = f"{entropy:.2f}" if math.isfinite(entropy) else "∞"
    return f"{head}  S {statistics.attention_sum[head]:.2f}  H {H}"


def _box_legend(grounding: Grounding | None, truth: Box | None) -> list[Line2D]:
    """The legend entries of the boxes, or of their absence."""
    entries = []
    if grounding is not None and grounding.absent:
        probability = grounding.confidence if grounding.presence is None else grounding.presence
        label = f"nothing there (probability that it is: {probability or 0:.2f})"
        entries.append(Line2D([], [], linestyle="none", label=label))
    elif grounding is not None:
        found = bool(grounding.cells.any())
        label = f"predicted box, score {grounding.score:.2f}" if found else "no cell stands out: whole image"
        entries.append(Line2D([], [], color=VERMILLION, linewidth=BOX_WIDTH, label=label))
    if truth is not None:
        entries.append(Line2D([], [], color=SKY, linewidth=BOX_WIDTH, linestyle="--", label="true box"))
    return entries


def _draw_boxes(axes: Axes, grounding: Grounding | None, truth: Box | None) -> None:
    """Draw the predicted box (solid) and the true box (dashed) on top."""
    if grounding is not None and not grounding.absent:
        draw_box(axes, grounding.box, VERMILLION)
    if truth is not None:
        draw_box(axes, truth, SKY, dashed=True)


def plot_grounding(
    image: ImageLike | None,
    grounding: Grounding,
    path: str | Path | None = None,
    *,
    truth: Box | None = None,
    expression: str = "",
) -> Figure:
    """The heat map over the image, the outline of the mask, the box with its score, the true box.

    If the box is too small to be visible in a large image (an icon on a screen), a second panel shows a close-up.

    Args:
        image: `None` draws the heat map alone.
        grounding: its heat map and mask are computed at the drawn size, whatever the size of the image.
        truth: true box in pixels, drawn dashed.
        expression: the title.
    """
    size = panel_size(grounding.image_size, area=14)
    shown = shrink_to_panel(image, max(size))
    heat, mask = _at_drawn_size(grounding)
    legend = _box_legend(grounding, truth)
    label = "pseudo-mask" if grounding.refined is None else f"mask ({grounding.mask_from})"
    if not grounding.absent:
        legend.append(Line2D([], [], color="white", linewidth=1.4, path_effects=BLACK_RIM, label=label))
    close_up, note = None, ""
    if image is not None and not grounding.absent:
        close_up = _close_up_region(grounding.image_size, grounding.box)
    if close_up is not None:
        note = "framed in black, and close up in the second panel: the surroundings of the box"
    with paper_style():
        figure, (axes, *close_up_axes) = new_sheet(
            size, 1 if close_up is None else 2, expression, titled=False, legend=legend, note=note
        )
        draw_image(axes, shown, grounding.image_size)
        draw_map(axes, heat, (0, 0, *grounding.image_size), opaque=image is None)
        if not grounding.absent:
            draw_outline(axes, mask)
        _draw_boxes(axes, grounding, truth)
        if close_up is not None:
            draw_box(axes, close_up, "black")
            cropped = shrink_to_panel(_crop(image, close_up), max(size))
            draw_image(close_up_axes[0], cropped, grounding.image_size, close_up)
            _draw_boxes(close_up_axes[0], grounding, truth)
        return save(figure, path)


def _close_up_region(image_size: tuple[int, int], box: Box) -> Box | None:
    """A region of the image's aspect ratio in which the box takes a third of a side; None if the box is visible as is.

    >>> _close_up_region((3000, 1500), (0, 600, 30, 660))
    (0.0, 540.0, 360.0, 720.0)
    """
    (W, H), (x0, y0, x1, y1) = image_size, box
    share = max((x1 - x0) / W, (y1 - y0) / H)
    if max(W, H) < _MIN_LARGE_SIDE or share >= _MIN_VISIBLE_SHARE:
        return None
    w, h = max(3 * share, 24 / min(W, H)) * W, max(3 * share, 24 / min(W, H)) * H
    left, top = (
        min(max(0.0, (start + end - length) / 2), side - length)
        for start, end, length, side in ((x0, x1, w, W), (y0, y1, h, H))
    )
    return left, top, left + w, top + h


def _crop(image: ImageLike | None, region: Box) -> Image.Image:
    opened = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    x0, y0, x1, y1 = map(round, region)
    return opened.crop((x0, y0, x1, y1))


def _at_drawn_size(grounding: Grounding) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The heat map and the mask `[H, W]` of the image shrunk to at most `MAX_SIDE` pixels a side.

    At the full resolution of a photograph they would take gigabytes without a visible difference.
    """
    W, H = grounding.image_size
    shrink = min(1.0, MAX_SIDE / max(W, H))
    drawn = max(1, round(W * shrink)), max(1, round(H * shrink))
    scale = np.array([drawn[0] / W, drawn[1] / H])
    x0, y0, x1, y1 = np.multiply(grounding.image_box, [*scale, *scale]).tolist()
    heat = normalised_heatmap(grounding.combined, (x0, y0, x1, y1), drawn)
    if grounding.refined is None:
        return heat, fill_polygon(grounding.polygon * scale, drawn)
    rows, columns = (
        ((np.arange(n) + 0.5) / share).astype(int) for n, share in zip(drawn[::-1], scale[::-1], strict=True)
    )
    return heat, grounding.refined[np.ix_(rows, columns)]


def plot_components(
    image: ImageLike | None,
    attention: AttentionMaps,
    head: Head,
    labels: NDArray[np.integer],
    entropy: float,
    path: str | Path | None = None,
    *,
    expression: str | None = None,
) -> Figure:
    """One head's map, its active cells, and their 8-connected components with the area share of each.

    Args:
        image: `None` draws the maps alone.
        labels: `[h, w]`, the component of each cell, from 1; 0 for inactive cells.
        entropy: spatial entropy `H = -sum p ln p` of the components, in nats; infinite without components.
        expression: the title; by default the query of the map.
    """
    size = panel_size(attention.image_size, area=4.8, widest=3.1)
    shown = shrink_to_panel(image, max(size))
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    order = np.argsort(-areas, kind="stable")
    numbers, shares = numbers[order], areas[order] / max(1, areas.sum())
    title = attention.query if expression is None else expression
    with paper_style():
        note = _padding_note(labels, attention)
        figure, (map_axes, binary_axes, component_axes) = new_sheet(size, 3, title, note=note)
        for axes in (map_axes, binary_axes, component_axes):
            draw_image(axes, shown, attention.image_size)
        draw_map(map_axes, attention.attention[head], attention.image_box, opaque=image is None)
        map_axes.set_title(f"{head}  S {attention.attention[head].sum():.2f}")
        draw_cells(binary_axes, _paint(labels, numbers, [(1.0, 1.0, 1.0)]), attention.image_box)
        binary_axes.set_title(f"active: {(labels > 0).mean():.0%} of cells")
        draw_cells(component_axes, _paint(labels, numbers, component_colours(len(numbers))), attention.image_box)
        component_axes.set_title(_component_title(shares, entropy))
        _label_components(component_axes, labels, numbers, shares, attention.image_box, size[0])
        return save(figure, path)


def _padding_note(labels: NDArray[np.integer], attention: AttentionMaps) -> str:
    """A note if the numbers count cells in the padding, which no panel shows."""
    hidden = np.ones(labels.shape, dtype=bool)
    hidden[visible_cells_index(labels.shape, attention.image_box, attention.image_size)] = False
    if not hidden.any():
        return ""
    cells = f"{hidden.sum()} of the {hidden.size} cells are in the padding, {(labels[hidden] > 0).sum()} of them active"
    return f"{cells}: all numbers count them, no panel shows them"


def _component_title(shares: NDArray[np.floating], entropy: float) -> str:
    """`3 components: H = 0.56`."""
    if not len(shares):
        return "no component: H = ∞"
    H = f"{entropy:.2f}" if math.isfinite(entropy) else "∞"
    return f"{len(shares)} component{'s' if len(shares) > 1 else ''}: H = {H}"


def component_colours(count: int) -> list[tuple[float, float, float]]:
    """Colours for the components, largest first: seven hues, then lighter and darker shades of them."""
    colours = []
    for n in range(count):
        share, level = _SHADES[n // len(_HUES) % len(_SHADES)]
        red, green, blue = (c * (1 - share) + level * share for c in to_rgb(_HUES[n % len(_HUES)]))
        colours.append((red, green, blue))
    return colours


def _paint(
    labels: NDArray[np.integer], numbers: NDArray[np.integer], colours: list[tuple[float, float, float]]
) -> NDArray[np.float64]:
    """`[h, w, 4]`: the n-th component in the n-th colour (they repeat), the other cells darkened."""
    cells = np.zeros((*labels.shape, 4))
    cells[..., 3] = 0.65
    for n, number in enumerate(numbers):
        cells[labels == number] = (*colours[n % len(colours)], 0.9)
    return cells


def _label_components(
    axes: Axes,
    labels: NDArray[np.integer],
    numbers: NDArray[np.integer],
    shares: NDArray[np.floating],
    box: Box,
    width: float,
) -> None:
    """Write the area share on the largest components, as far as the texts do not overlap.

    Args:
        box: the region of the image that the cells cover, in pixels.
        width: of the axes, in inches.
    """
    x0, y0, x1, y1 = box
    cell = np.array([(x1 - x0) / labels.shape[1], (y1 - y0) / labels.shape[0]])
    (_, W), (H, _) = axes.get_xlim(), axes.get_ylim()
    text_size = np.array([0.36, 0.17]) * W / width  # pixels of `100%`
    rim = withStroke(linewidth=2, foreground="white")
    placed: list[NDArray[np.floating]] = []
    for number, share in zip(numbers[:_MAX_LABELLED], shares, strict=False):
        centres = np.array([x0, y0]) + (np.argwhere(labels == number)[:, ::-1] + 0.5) * cell  # [cell, (x, y)]
        centres = centres[((centres > 0) & (centres < [W, H])).all(axis=1)]
        if share < _MIN_LABELLED_SHARE or not len(centres):
            continue  # too small, or in the padding
        # The component's cell nearest to its centroid: the centroid of a ring is not on the ring.
        position = centres[np.linalg.norm(centres - centres.mean(0), axis=1).argmin()]
        margin = np.minimum(text_size / 2, [W / 2, H / 2])
        position = np.clip(position, margin, [W, H] - margin)
        if any((abs(position - other) < text_size).all() for other in placed):
            continue
        placed.append(position)
        axes.text(
            position[0],
            position[1],
            f"{share:.0%}",
            ha="center",
            va="center",
            fontweight="bold",
            path_effects=[rim],
            zorder=6,
        )
