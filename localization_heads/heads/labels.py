"""Heads from labels: how well each head looks at the true object, and the heads ranked by that.

The alternative to the criteria of the paper where entries with true boxes or masks are at hand. A head's score in one
sample comes from its own map: the attention mass in the truth (`mass`), or on all patches that the true box touches
(`vrh`, of the tokens of a generated box: Visual Retrieval Heads, arXiv 2608.27417); IoU and pointing of single heads
are in `evaluation.head_iou`. Its score over several samples is the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box, clip_box
from localization_heads.cells import SLIVER, box_coverage, grid_edges, interval_coverage, mask_coverage
from localization_heads.errors import ArgumentError
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import CHUNK_VALUES, SampleArray, random_draws
from localization_heads.heads.record import HeadRanking
from localization_heads.options.parts import HeadsBy, Shrink

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of labels at which the quality of a ranking is measured."""

Scores = NDArray[np.float64]
"""One number a head, `[layer, head]`."""


def mass_in_truth(
    maps: AttentionMaps, box: Box, mask: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Attention of every head inside the true object: `sum_c a_c |c ∩ truth| / |c|`.

    Not renormalised, so a head that hardly attends to the image scores low wherever it looks.

    Args:
        box: the true box, xyxy in pixels; cut at the image's edge.
        mask: bool `[H, W]`, the true mask, which takes the place of the box.

    Returns:
        float32 `[layer, head]`, 0 to 1.

    >>> attention = np.array([[[[0.25, 0.5]], [[0.0, 0.25]]]], np.float32)  # two heads, a grid of 1 x 2 cells
    >>> mass_in_truth(AttentionMaps(attention, (0, 0, 4, 2), (4, 2)), (1, 0, 4, 2)).tolist()
    [[0.625, 0.25]]
    """
    if mask is not None:
        shares = mask_coverage(mask, maps.image_box, maps.grid)
    else:
        shares = box_coverage(clip_box(box, maps.image_size), maps.image_box, maps.grid)
    return np.asarray(np.einsum("lhyx,yx->lh", maps.attention, shares), dtype=np.float32)


def mass_on_patches(maps: AttentionMaps, box: Box) -> NDArray[np.float32]:
    """Attention of every head on the patches that overlap the true box, each patch as a whole.

    `Theta(l, h)` of one sample in arXiv 2608.27417, if the maps are the mean over the tokens of the generated box.

    >>> attention = np.array([[[[0.25, 0.5]], [[0.0, 0.25]]]], np.float32)
    >>> mass_on_patches(AttentionMaps(attention, (0, 0, 4, 2), (4, 2)), (1, 0, 2, 2)).tolist()
    [[0.25, 0.0]]
    """
    x_edges, y_edges = grid_edges(maps.image_box, maps.grid)
    x0, y0, x1, y1 = clip_box(box, maps.image_size)
    columns = interval_coverage(x_edges, x0, x1) * np.diff(x_edges) > SLIVER
    rows = interval_coverage(y_edges, y0, y1) * np.diff(y_edges) > SLIVER
    touched = np.logical_and.outer(rows, columns).astype(np.float64)
    return np.asarray(np.einsum("lhyx,yx->lh", maps.attention, touched), dtype=np.float32)


def mean_scores(scores: SampleArray, weights: NDArray[np.integer[Any]]) -> Scores:
    """The mean score of every head over each draw: float64 `[draw, layer, head]`.

    Args:
        scores: `[sample, layer, head]`, an array or a view on a file; read in chunks.
        weights: how often each draw holds each sample, `[draw, sample]`; none may be empty.

    >>> mean_scores(np.array([[[0.5, 0.0]], [[0.25, 1.0]]]), np.array([[1, 0], [1, 3]])).tolist()
    [[[0.5, 0.0]], [[0.3125, 0.75]]]
    """
    shape = scores.shape[1:]
    total = np.zeros((len(weights), math.prod(shape)))
    for rows in _chunks(len(scores), total.shape[1]):
        values = np.asarray(scores[rows], dtype=np.float64).reshape(len(rows), -1)
        total += np.einsum("ts,sn->tn", weights[:, rows].astype(np.float64), values)
    means = total / weights.sum(axis=1)[:, None]
    return np.asarray(means.reshape(len(weights), *shape))


def _chunks(samples: int, heads: int) -> Iterator[NDArray[np.intp]]:
    size = max(1, CHUNK_VALUES // heads)
    return (np.arange(start, min(start + size, samples)) for start in range(0, samples, size))


def rank_by_score(scores: Scores, free: HeadRanking) -> list[Head]:
    """Every head of the layers that are not left out, highest score first; equal ones in the label-free order.

    Args:
        free: the label-free ranking of all heads of the model.
    """
    return sorted(_free(free), key=lambda head: -scores[head])


def shrink_scores(scores: Scores, free: HeadRanking, num_labels: int, how: Shrink, n0: float) -> Scores:
    """Scores from few labels, drawn towards the label-free ranking: `w labels + (1 - w) label-free`, w = n / (n + n0).

    Args:
        how: `none` leaves the scores; `ranks` blends the places in both orders, as shares from 1 (first) down to 0
            (last); `scores` blends the scores and the selection frequencies (the sensitivity scores, where those
            rank), each divided by its highest.
        n0: as many labels weigh as much as the label-free ranking.

    Returns:
        `[layer, head]`, the higher the better, 0 for heads of layers that are left out.
    """
    if how == "none":
        return scores
    weight = num_labels / (num_labels + n0)
    if how == "ranks":
        orders = rank_by_score(scores, free), _free(free)
        by_label, label_free = (_places(order, scores.shape) for order in orders)
    else:
        evidence = np.zeros(scores.shape)
        for head in free.heads:
            by_sensitivity = free.options.sensitivity != "none"
            evidence[head.address] = (
                max(head.sensitivity_score or 0.0, 0.0) if by_sensitivity else head.selection_frequency
            )
        by_label, label_free = _to_one(scores), _to_one(evidence)
    blended = weight * by_label + (1 - weight) * label_free
    blended[: free.exclude_layers] = 0
    return blended


def _free(free: HeadRanking) -> list[Head]:
    return [head.address for head in free.heads if head.layer >= free.exclude_layers]


def _places(order: Sequence[Head], shape: tuple[int, ...]) -> Scores:
    places = np.zeros(shape)
    for place, head in enumerate(order):
        places[head] = 1 - place / max(len(order) - 1, 1)
    return places


def _to_one(values: Scores) -> Scores:
    highest = float(values.max(initial=0))
    return values / highest if highest > 0 else values


@dataclass(frozen=True)
class LabelRecipe:
    """How heads are ranked from labels.

    Args:
        by: what scores a head in a sample.
        num_labels: entries drawn for the ranking; None takes all.
        num_trials: draws (or, of all entries, bootstrap resamples) that its spread comes from.
        shrink: as of `shrink_scores`.
        n0: as of `shrink_scores`.
        k: heads that a ranking is judged by.
    """

    by: HeadsBy
    num_labels: int | None = None
    num_trials: int = 5
    seed: int = 42
    shrink: Shrink = "none"
    n0: float = 10.0
    k: int = 3

    def drawn(self, pool: int) -> NDArray[np.int64]:
        """Which entries each draw holds, `[draw, sample]`; a single row of ones if all are taken."""
        return random_draws(pool, self.num_trials, self.num_labels or pool, self.seed)

    def named(self, num_labels: int) -> dict[str, str]:
        """What `found_with` of heads.json says of it."""
        shrink = {} if self.shrink == "none" else {"shrink": f"{self.shrink}, n0={self.n0:g}"}
        return {"heads_by": self.by, "num_labels": str(num_labels), **shrink}

    def order(self, scores: Scores, free: HeadRanking, num_labels: int) -> list[Head]:
        """Every head, best first, by the mean scores over so many labels."""
        return rank_by_score(shrink_scores(scores, free, num_labels, self.shrink, self.n0), free)


def rank_by_labels(scores: SampleArray, free: HeadRanking, recipe: LabelRecipe) -> HeadRanking:
    """The heads ranked by their mean score over the labelled entries of the first draw.

    Only these entries' labels decide; the other draws show how far another choice of as many labels would have scored
    each head (`score_std`). Where all entries are taken, that comes from bootstrap resamples.

    Args:
        scores: of each head in each labelled sample, `[sample, layer, head]`.
        free: the label-free ranking of the same model, all heads: their other numbers, and the order of equal scores.

    Raises:
        ValueError: there is no sample, or fewer than `recipe.num_labels`.
    """
    check_labels(len(scores), recipe)
    draws = recipe.drawn(len(scores))
    size = int(draws[0].sum())
    found = mean_scores(scores, draws[:1])[0]
    again = draws if len(draws) > 1 else _resampled(len(scores), recipe)
    deviation = mean_scores(scores, again).std(axis=0)
    order = recipe.order(found, free, size)
    by_address = {head.address: head for head in free.heads}
    ranked = [
        replace(by_address[head], kept=True, score=float(found[head]), score_std=float(deviation[head]))
        for head in order
    ]
    left_out = [replace(head, kept=False) for head in free.heads if head.layer < free.exclude_layers]
    return replace(
        free,
        heads=(*ranked, *left_out),
        num_samples=size,
        num_trials=recipe.num_trials,
        spread="draws" if len(draws) > 1 else "bootstrap",
    )


def check_labels(pool: int, recipe: LabelRecipe) -> None:
    """ArgumentError if there is no labelled sample, or fewer than the recipe draws."""
    if pool < 1:
        raise ArgumentError("heads cannot be ranked by labels without a labelled sample")
    if recipe.num_labels is not None and recipe.num_labels > pool:
        raise ArgumentError(
            f"num_labels={recipe.num_labels}: only {pool} entries with a true box or mask can be used"
        )


def _resampled(pool: int, recipe: LabelRecipe) -> NDArray[np.int64]:
    rng = np.random.default_rng(recipe.seed)
    drawn = rng.integers(pool, size=(recipe.num_trials, pool))
    return np.stack([np.bincount(row, minlength=pool) for row in drawn])


@dataclass(frozen=True)
class Curve:
    """How good the first heads are that so many labels find, on entries that were not drawn.

    Attributes:
        counts: numbers of labels, rising.
        quality: for each, that of every draw, `[count, draw]`: the mean of the first heads' scores.
        stable: for each, the mean share of the first heads that two draws have in common, 0 to 1; 1 for one draw.
        free: quality of the label-free ranking's first heads on all entries.
        every: that of all heads.
        best: that of the heads that all labels find, on the same entries: an upper bound.
    """

    counts: list[int]
    quality: list[list[float]]
    stable: list[float]
    free: float
    every: float
    best: float


def quality_curve(
    scores: SampleArray,
    quality: SampleArray,
    free: HeadRanking,
    recipe: LabelRecipe,
    pictures: Sequence[str] | None = None,
    counts: Sequence[int] = COUNTS,
) -> Curve:
    """The curve of quality against the number of labels; each draw is judged on the entries that it does not show.

    Args:
        scores: `[sample, layer, head]`, that the heads are ranked by.
        quality: likewise, that the first `recipe.k` of a ranking are judged by.
        pictures: the identity of each sample's image: no draw is judged on an image that it has seen. By default
            each sample is its own.
        counts: those above half of the samples are left out, for too few would remain.
    """
    pool = len(scores)
    names = np.arange(pool).astype(str) if pictures is None else np.array(pictures)
    everything = np.ones((1, pool), dtype=np.int64)
    over_all = mean_scores(quality, everything)[0]

    def judged(order: Sequence[Head], values: Scores) -> float:
        return float(np.mean([values[head] for head in order[: recipe.k]]))

    points: list[tuple[int, list[float], float]] = []
    for count in (count for count in counts if 2 * count <= pool):
        draws = random_draws(pool, recipe.num_trials, count, recipe.seed + count)
        left = np.stack([~np.isin(names, names[draw > 0]) for draw in draws]).astype(np.int64)
        draws, left = draws[left.any(axis=1)], left[left.any(axis=1)]
        if not len(draws):
            break
        orders = [recipe.order(found, free, count) for found in mean_scores(scores, draws)]
        held = mean_scores(quality, left)
        found = [judged(order, values) for order, values in zip(orders, held, strict=True)]
        points.append((count, found, _in_common([order[: recipe.k] for order in orders])))
    allowed = _free(free)
    oracle = rank_by_score(mean_scores(scores, everything)[0], free)
    return Curve(
        counts=[count for count, _, _ in points],
        quality=[found for _, found, _ in points],
        stable=[common for _, _, common in points],
        free=judged(allowed, over_all),
        every=float(np.mean([over_all[head] for head in allowed])),
        best=judged(oracle, over_all),
    )


def _in_common(firsts: Sequence[Sequence[Head]]) -> float:
    """Mean share of heads that two of the lists share.

    >>> _in_common([[Head(1, 1), Head(1, 2)], [Head(1, 1), Head(3, 3)]])
    0.5
    """
    pairs = [
        len(set(one) & set(other)) / max(len(one), 1) for i, one in enumerate(firsts) for other in firsts[:i]
    ]
    return float(np.mean(pairs)) if pairs else 1.0
