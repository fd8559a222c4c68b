"""From the maps of a few heads to one box and one mask (Sec. 5, App. B.2 of the paper).

Smooth each head's map, add them up, binarise the sum at its mean, take the convex hulls of the 8-connected
components and keep the largest: its tight box is the answer, its filled hull the pseudo-mask. Choices are
made in cells, where areas are whole numbers and ties exact; the result is in pixels of the original image,
with padding and cropping undone by `AttentionMaps.image_box`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from localization_heads.attention import AttentionMaps, Box
from localization_heads.heads.criteria import binarise, label_components
from localization_heads.heads.head import Head

Component = Literal["largest_hull", "all"]
Point = tuple[float, float]

FLAT = 1e-6
"""A map whose peak is closer than this to its mean, relatively, is flat: it points at nothing."""
SLIVER = 1e-6
"""Pixels: a cell that shows less of the image than this is outside; it touches the border by rounding."""


@dataclass(frozen=True)
class GroundingOptions:
    """How maps become a box. The defaults are the paper's (App. B.2).

    Args:
        kernel_size: taps of the Gaussian kernel, odd; 1 switches smoothing off.
        sigma: its standard deviation in cells; 0 switches smoothing off.
        upsample: repeat each cell that many times along both axes before smoothing. Kernel and sigma then
            count the finer cells.
        component: `"largest_hull"` (paper), or `"all"` active cells (published code).

    Raises:
        ValueError: for a value outside these, naming the option.
    """

    kernel_size: int = 7
    sigma: float = 1.0
    upsample: int = 1
    component: Component = "largest_hull"

    def __post_init__(self) -> None:
        gaussian_kernel(self.kernel_size, self.sigma)
        if isinstance(self.upsample, bool) or not isinstance(self.upsample, int) or self.upsample < 1:
            raise ValueError(f"upsample must be a whole number of at least 1, not {self.upsample!r}")
        if self.component not in get_args(Component):
            raise ValueError(f"component must be largest_hull or all, not {self.component!r}")


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where an expression is in an image. Pictures of it are made when asked for.

    Args:
        box: xyxy floats in image pixels, half-open, inside the image. The whole image if no cell stands out.
        score: share of the combined map's mass on the image that lies in the box, 0 to 1; 0 if no cell
            stands out.
        combined: sum of the smoothed maps, float64 `[h, w]` (finer by `upsample`).
        cells: the cells that the box encloses, bool `[h, w]`.
        heads: whose maps were added.
        image_box: the region of the image, in pixels, that the grid covers.
        image_size: `(W, H)`.
    """

    box: Box
    score: float
    combined: NDArray[np.float64] = field(repr=False)
    cells: NDArray[np.bool_] = field(repr=False)
    heads: tuple[Head, ...]
    image_box: Box
    image_size: tuple[int, int]

    @cached_property
    def polygon(self) -> NDArray[np.float64]:
        """Convex hull of the cells inside the image: vertices `[n, 2]` (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        if not self.cells.any():
            return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        edges = visible_edges(self.image_box, self.image_size, self.cells.shape)
        return np.array(convex_hull(_corners(self.cells, *edges)), dtype=np.float64)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Pseudo-mask: the filled hull, bool `[H, W]`. A pixel belongs if its centre does."""
        return fill_polygon(self.polygon, self.image_size)

    @cached_property
    def heatmap(self) -> NDArray[np.float32]:
        """The combined map on the image's pixels, float32 `[H, W]`, its largest value 1.

        Bilinear between cell centres, constant from the outer centres to the grid's border, 0 on pixels
        that the grid does not cover (centre-cropped images).
        """
        return resample(self.combined, self.image_box, self.image_size)

    @property
    def point(self) -> Point:
        """Centre (x, y), in pixels, of the strongest cell on the image: the pointing game's answer."""
        x_edges, y_edges = visible_edges(self.image_box, self.image_size, self.combined.shape)
        on_image = np.where(_visible(x_edges, y_edges), self.combined, -np.inf)
        row, column = np.unravel_index(np.argmax(on_image), on_image.shape)
        return (
            float(x_edges[column] + x_edges[column + 1]) / 2,
            float(y_edges[row] + y_edges[row + 1]) / 2,
        )


def ground_maps(
    attention: AttentionMaps, heads: Sequence[Head], options: GroundingOptions | None = None
) -> Grounding:
    """The box of an expression from the maps of the given heads (Sec. 5).

    Raises:
        ValueError: for no head, a head that the model does not have, or maps with NaN or infinite values.
    """
    options = options or GroundingOptions()
    maps = np.repeat(np.repeat(_maps_of(attention, heads), options.upsample, -2), options.upsample, -1)
    combined = combine(maps, options.kernel_size, options.sigma)
    x_edges, y_edges = visible_edges(attention.image_box, attention.image_size, combined.shape)
    visible = _visible(x_edges, y_edges)
    cells = _active(combined) & visible
    if options.component == "largest_hull":
        cells = largest_hull(cells, combined)
    box, score = _box_and_score(cells, np.where(visible, combined, 0.0), x_edges, y_edges)
    whole = (0.0, 0.0, float(attention.image_size[0]), float(attention.image_size[1]))
    return Grounding(
        box=box or whole,
        score=score,
        combined=combined,
        cells=cells,
        heads=tuple(Head(*head) for head in heads),
        image_box=attention.image_box,
        image_size=attention.image_size,
    )


def gaussian_kernel(kernel_size: int = 7, sigma: float = 1.0) -> NDArray[np.float64]:
    """`g_i ~ exp(-i^2 / 2 sigma^2)` at `kernel_size` whole steps around 0, adding up to 1.

    Raises:
        ValueError: for an even or non-positive size, or a negative or infinite sigma.
    """
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1:
        raise ValueError(f"kernel_size must be a whole number of at least 1, not {kernel_size!r}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the kernel has a centre, not {kernel_size}")
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a finite number of at least 0, not {sigma!r}")
    if sigma == 0:
        return np.ones(1)
    steps = np.arange(kernel_size) - kernel_size // 2
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def smooth(maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0) -> NDArray[np.float64]:
    """Gaussian smoothing of every map `[..., h, w]` (App. B.2), float64.

    Beyond the border the map is mirrored without repeating the edge cell (`c b | a b c`), what OpenCV and
    torchvision call reflect; grids smaller than the kernel are mirrored again and again.
    """
    kernel = gaussian_kernel(kernel_size, sigma)
    smoothed = np.asarray(maps, dtype=np.float64)
    if kernel.size > 1:
        for axis in (-2, -1):
            smoothed = ndimage.correlate1d(smoothed, kernel, axis=axis, mode="mirror")
    return smoothed


def combine(maps: NDArray[np.floating[Any]], kernel_size: int = 7, sigma: float = 1.0) -> NDArray[np.float64]:
    """`sum_k G * A_k`: the smoothed maps `[k, h, w]` added up to `[h, w]`, not renormalised."""
    return np.asarray(smooth(maps, kernel_size, sigma).sum(axis=0))


def largest_hull(
    cells: NDArray[np.bool_], mass: NDArray[np.floating[Any]] | None = None
) -> NDArray[np.bool_]:
    """The 8-connected component whose convex hull has the largest area (App. B.2).

    The hull is that of the cells' corners, so a single cell has area 1. Of equal hulls the one with more
    `mass` wins, then the one whose first cell comes first, row by row.

    Args:
        cells, mass: `[h, w]`.

    Returns:
        bool `[h, w]`; no cell if `cells` has none.
    """
    labels = label_components(cells)
    best, best_area, best_mass = 0, 0.0, 0.0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        member = labels[rows, columns] == label
        if member.size < best_area:  # the hull lies within the bounding box
            continue
        area = hull_area(member)
        weight = 0.0 if mass is None else float(mass[rows, columns][member].sum())
        # Masses of mirrored components differ by rounding, which must not overrule the order of the cells.
        heavier = weight > best_mass * (1 + 1e-9)
        if area > best_area or (area == best_area and heavier):
            best, best_area, best_mass = label, area, weight
    return np.asarray((labels == best) & cells)


def hull_area(cells: NDArray[np.bool_]) -> float:
    """Area, in cells, of the convex hull of the corners of the active cells `[h, w]`; exact."""
    hull = convex_hull(_corners(cells, np.arange(cells.shape[1] + 1), np.arange(cells.shape[0] + 1)))
    following = [*hull[1:], hull[0]] if hull else []
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(hull, following, strict=True))) / 2


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Vertices of the convex hull, in order around it (Andrew's monotone chain); none on a straight side.

    >>> convex_hull([(0, 0), (2, 0), (1, 0), (2, 2), (1, 1), (0, 2)])
    [(0, 0), (2, 0), (2, 2), (0, 2)]
    """
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    return _chain(ordered)[:-1] + _chain(ordered[::-1])[:-1]


def fill_polygon(polygon: NDArray[np.float64], image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres lie in a convex polygon: bool `[H, W]`.

    A polygon too small to hold any pixel's centre gets the pixel under the middle of its box, so that a
    mask is never empty.

    Args:
        polygon: vertices `[n, 2]` (x, y) in pixels, in order.
        image_size: `(W, H)`.
    """
    W, H = image_size
    y = np.arange(H) + 0.5
    left, right = np.full(H, np.inf), np.full(H, -np.inf)
    for (xa, ya), (xb, yb) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crossed = (min(ya, yb) <= y) & (y < max(ya, yb))  # never true of a horizontal side
        x = xa + (y[crossed] - ya) * (xb - xa) / (yb - ya) if crossed.any() else y[crossed]
        left[crossed] = np.minimum(left[crossed], x)
        right[crossed] = np.maximum(right[crossed], x)
    centres = np.arange(W) + 0.5
    mask = (centres >= left[:, None]) & (centres < right[:, None])
    if not mask.any():
        x, y = (polygon.min(axis=0) + polygon.max(axis=0)) / 2
        mask[min(int(y), H - 1), min(int(x), W - 1)] = True
    return mask


def resample(
    combined: NDArray[np.floating[Any]], image_box: Box, image_size: tuple[int, int]
) -> NDArray[np.float32]:
    """A map `[h, w]` over `image_box` on the pixels of the image, `[H, W]`, scaled to a maximum of 1."""
    x0, y0, x1, y1 = image_box
    columns, next_columns, across, in_x = _between_centres(x0, x1, combined.shape[1], image_size[0])
    rows, next_rows, down, in_y = _between_centres(y0, y1, combined.shape[0], image_size[1])
    cells = combined.astype(np.float32)
    lines = cells[rows] + down[:, None] * (cells[next_rows] - cells[rows])  # (H, w)
    heat = lines[:, columns] + across * (lines[:, next_columns] - lines[:, columns])  # (H, W)
    heat[~in_y] = 0.0
    heat[:, ~in_x] = 0.0
    peak = heat.max()
    return heat / peak if peak > 0 else heat


def visible_edges(
    image_box: Box, image_size: tuple[int, int], grid: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Borders of the grid's columns `[w + 1]` and rows `[h + 1]` in pixels, clipped to the image.

    A cell outside the image has no extent left.
    """
    x0, y0, x1, y1 = image_box
    x_edges = np.linspace(x0, x1, grid[1] + 1)
    y_edges = np.linspace(y0, y1, grid[0] + 1)
    return np.clip(x_edges, 0.0, image_size[0]), np.clip(y_edges, 0.0, image_size[1])


def _visible(x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The cells that show some of the image: bool `[h, w]`."""
    return np.logical_and.outer(np.diff(y_edges) > SLIVER, np.diff(x_edges) > SLIVER)


def _active(combined: NDArray[np.float64]) -> NDArray[np.bool_]:
    """`> mean`, but nothing of a flat map: smoothing leaves rounding on a constant one."""
    mean = combined.mean()
    cells = binarise(combined)
    return cells if combined.max() - mean > FLAT * abs(mean) else np.zeros_like(cells)


def _box_and_score(
    cells: NDArray[np.bool_],
    mass: NDArray[np.float64],
    x_edges: NDArray[np.float64],
    y_edges: NDArray[np.float64],
) -> tuple[Box | None, float]:
    """Tight box of the cells in pixels, and the share of the mass in that block; none without cells."""
    rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
    if rows.size == 0:
        return None, 0.0
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = float(x_edges[left]), float(y_edges[top]), float(x_edges[right]), float(y_edges[bottom])
    total = mass.sum()
    return box, float(mass[top:bottom, left:right].sum() / total) if total > 0 else 0.0


def _maps_of(attention: AttentionMaps, heads: Sequence[Head]) -> NDArray[np.float32]:
    """The maps `[k, h, w]` of the heads."""
    if not heads:
        raise ValueError("grounding needs at least one head")
    for layer, head in heads:
        if not (0 <= layer < attention.num_layers and 0 <= head < attention.num_heads):
            raise ValueError(
                f"no head {Head(layer, head)} among {attention.num_layers} layers of {attention.num_heads}"
            )
    return np.stack([attention.attention[layer, head] for layer, head in heads])


def _corners(cells: NDArray[np.bool_], x_edges: NDArray[Any], y_edges: NDArray[Any]) -> list[Point]:
    """Corners of the outermost active cells of each row: all that the convex hull depends on."""
    corners: list[Point] = []
    for row in np.flatnonzero(cells.any(axis=1)):
        active = np.flatnonzero(cells[row])
        for x in (x_edges[active[0]].item(), x_edges[active[-1] + 1].item()):
            corners += [(x, y_edges[row].item()), (x, y_edges[row + 1].item())]
    return corners


def _chain(ordered: list[Point]) -> list[Point]:
    """The half of the hull that turns left all the way from the first point to the last."""
    chain: list[Point] = []
    for x, y in ordered:
        while len(chain) > 1:
            (ax, ay), (bx, by) = chain[-2:]
            if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                break
            chain.pop()
        chain.append((x, y))
    return chain


def _between_centres(
    start: float, stop: float, cells: int, pixels: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32], NDArray[np.bool_]]:
    """For each pixel centre: the cells on either side, how far it is between them, and if the grid has it."""
    centres = np.arange(pixels) + 0.5
    place = np.clip((centres - start) * cells / (stop - start) - 0.5, 0, cells - 1)
    lower = place.astype(np.intp)
    upper = np.minimum(lower + 1, cells - 1)
    return lower, upper, (place - lower).astype(np.float32), (start <= centres) & (centres <= stop)
