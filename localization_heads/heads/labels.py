"""Heads from labels: each head is scored by how much it attends to the true object, and heads are ranked by that.

An alternative to the paper's criteria if entries with true boxes or masks are at hand. A head's score in one sample
comes from its own map: the attention mass in the truth (`mass`), or on all patches that the true box touches (`vrh`, of
the tokens of a generated box: Visual Retrieval Heads, arXiv 2608.27417); IoU and pointing of single heads are in
`evaluation.head_iou`. Its score over several samples is the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from localization_heads.options.finder_mixins import HeadsBy, Shrink

LABEL_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of labels for which the quality of a ranking is measured."""

Scores = NDArray[np.float64]
"""One number per head, `[layer, head]`."""


def mass_in_truth(maps: AttentionMaps, box: Box, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Attention of every head inside the true object: `sum_c a_c |c ∩ truth| / |c|`.

    Not renormalised over the image, so a head that hardly attends to the image has a low score.

    Args:
        box: the true box, xyxy in pixels; clipped to the image.
        mask: bool `[H, W]`, the true mask, used instead of the box.

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
    """Attention of every head on the patches that the true box overlaps, however little.

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
        scores: `[sample, layer, head]`, read in chunks.
        weights: how often each draw holds each sample, `[draw, sample]`; no draw may be empty.

    >>> mean_scores(np.array([[[0.5, 0.0]], [[0.25, 1.0]]]), np.array([[1, 0], [1, 3]])).tolist()
    [[[0.5, 0.0]], [[0.3125, 0.75]]]
    """
    shape = scores.shape[1:]
    total = np.zeros((len(weights), math.prod(shape)))
    chunk_size = max(1, CHUNK_VALUES // total.shape[1])
    for start in range(0, len(scores), chunk_size):
        rows = np.arange(start, min(start + chunk_size, len(scores)))
        values = np.asarray(scores[rows], dtype=np.float64).reshape(len(rows), -1)
        total += np.einsum("ts,sn->tn", weights[:, rows].astype(np.float64), values)
    means = total / weights.sum(axis=1)[:, None]
    return np.asarray(means.reshape(len(weights), *shape))


def rank_by_score(scores: Scores, label_free: HeadRanking) -> list[Head]:
    """The heads of all layers that are not excluded, highest score first; ties in the label-free order.

    Args:
        label_free: the label-free ranking of all heads of the model.
    """
    return sorted(_label_free_order(label_free), key=lambda head: -scores[head])


def shrink_scores(scores: Scores, label_free: HeadRanking, num_labels: int, how: Shrink, n0: float) -> Scores:
    """Shrink scores from few labels towards the label-free ranking: `w labels + (1 - w) label_free`, w = n / (n + n0).

    Args:
        how: `none` returns the scores; `ranks` blends the ranks in both orders, as shares from 1 (first) down to 0
            (last); `scores` blends the scores and the selection frequencies (or the sensitivity scores, if the ranking
            is by these), each divided by its maximum.
        n0: number of labels that weigh as much as the label-free ranking.

    Returns:
        `[layer, head]`, the higher the better; 0 for heads of excluded layers.
    """
    if how == "none":
        return scores
    weight = num_labels / (num_labels + n0)
    if how == "ranks":
        by_labels = _rank_shares(rank_by_score(scores, label_free), scores.shape)
        without_labels = _rank_shares(_label_free_order(label_free), scores.shape)
    else:
        by_labels = _scale_to_one(scores)
        without_labels = _scale_to_one(_label_free_scores(label_free, scores.shape))
    blended = weight * by_labels + (1 - weight) * without_labels
    blended[: label_free.exclude_layers] = 0
    return blended


def _label_free_order(label_free: HeadRanking) -> list[Head]:
    return [head.address for head in label_free.heads if head.layer >= label_free.exclude_layers]


def _label_free_scores(label_free: HeadRanking, shape: tuple[int, ...]) -> Scores:
    by_sensitivity = label_free.options.sensitivity != "none"
    scores = np.zeros(shape)
    for head in label_free.heads:
        score = max(head.sensitivity_score or 0.0, 0.0) if by_sensitivity else head.selection_frequency
        scores[head.address] = score
    return scores


def _rank_shares(order: Sequence[Head], shape: tuple[int, ...]) -> Scores:
    shares = np.zeros(shape)
    for rank, head in enumerate(order):
        shares[head] = 1 - rank / max(len(order) - 1, 1)
    return shares


def _scale_to_one(values: Scores) -> Scores:
    highest = float(values.max(initial=0))
    return values / highest if highest > 0 else values


@dataclass(frozen=True)
class LabelRecipe:
    """How heads are ranked from labels.

    Args:
        by: how a head is scored in a sample.
        num_labels: entries drawn for the ranking; None takes all.
        num_trials: draws for the spread; bootstrap resamples if all entries are taken.
        seed: of the draws.
        shrink: how scores are shrunk towards the label-free ranking (`shrink_scores`).
        n0: the number of labels that weigh as much as the label-free ranking.
        k: number of first heads that a ranking is evaluated by.
    """

    by: HeadsBy
    num_labels: int | None = None
    num_trials: int = 5
    seed: int = 42
    shrink: Shrink = "none"
    n0: float = 10.0
    k: int = 3

    def draw(self, pool: int) -> NDArray[np.int64]:
        """How often each draw holds each entry, `[draw, sample]`; a single row of ones if all are taken."""
        return random_draws(pool, self.num_trials, self.num_labels or pool, self.seed)

    def found_with(self, num_labels: int) -> dict[str, str]:
        """Its part of `found_with` in heads.json."""
        shrink = {} if self.shrink == "none" else {"shrink": f"{self.shrink}, n0={self.n0:g}"}
        return {"heads_by": self.by, "num_labels": str(num_labels), **shrink}

    def rank(self, scores: Scores, label_free: HeadRanking, num_labels: int) -> list[Head]:
        """All heads, best first, by their mean scores over `num_labels` labels."""
        return rank_by_score(shrink_scores(scores, label_free, num_labels, self.shrink, self.n0), label_free)


def rank_by_labels(scores: SampleArray, label_free: HeadRanking, recipe: LabelRecipe) -> HeadRanking:
    """The heads ranked by their mean score over the labelled entries of the first draw.

    Only these entries' labels are used for the order. The other draws give `score_std`: how much a head's score depends
    on which entries were labelled. If all entries are taken, it comes from bootstrap resamples.

    Args:
        scores: of each head in each labelled sample, `[sample, layer, head]`.
        label_free: the label-free ranking of all heads of the model, which their other values and the order of ties
            come from.

    Raises:
        ValueError: there is no sample, or fewer than `recipe.num_labels`.
    """
    check_labels(len(scores), recipe)
    draws = recipe.draw(len(scores))
    num_labels = int(draws[0].sum())
    means = mean_scores(scores, draws[:1])[0]
    is_drawn = len(draws) > 1
    deviation = mean_scores(scores, draws if is_drawn else _bootstrap(len(scores), recipe)).std(axis=0)
    by_address = {head.address: head for head in label_free.heads}
    ranked = [
        replace(by_address[head], kept=True, score=float(means[head]), score_std=float(deviation[head]))
        for head in recipe.rank(means, label_free, num_labels)
    ]
    excluded = [replace(head, kept=False) for head in label_free.heads if head.layer < label_free.exclude_layers]
    return replace(
        label_free,
        heads=(*ranked, *excluded),
        num_samples=num_labels,
        num_trials=recipe.num_trials,
        spread="draws" if is_drawn else "bootstrap",
    )


def check_labels(pool: int, recipe: LabelRecipe) -> None:
    """ArgumentError if there is no labelled sample, or fewer than the recipe draws."""
    if pool < 1:
        raise ArgumentError("heads cannot be ranked by labels without a labelled sample")
    if recipe.num_labels is not None and recipe.num_labels > pool:
        raise ArgumentError(f"num_labels={recipe.num_labels}: only {pool} entries with a true box or mask can be used")


def _bootstrap(pool: int, recipe: LabelRecipe) -> NDArray[np.int64]:
    """How often each bootstrap resample holds each entry, `[trial, sample]`."""
    rng = np.random.default_rng(recipe.seed)
    resamples = rng.integers(pool, size=(recipe.num_trials, pool))
    return np.stack([np.bincount(resample, minlength=pool) for resample in resamples])


@dataclass(frozen=True)
class QualityCurve:
    """Quality of the first heads against the number of labels that they were found with, on held-out entries.

    Attributes:
        counts: numbers of labels, ascending.
        quality: for each count, the mean score of the first heads of every draw, `[count, draw]`.
        shared: for each count, the mean share of the first heads that two draws have in common, 0 to 1; 1 for one draw.
        label_free: quality of the label-free ranking's first heads, on all entries.
        all_heads: mean over all heads, on all entries.
        all_labels: quality of the heads that all labels find, on the same entries: an upper bound.
    """

    counts: list[int]
    quality: list[list[float]]
    shared: list[float]
    label_free: float
    all_heads: float
    all_labels: float


def quality_curve(
    scores: SampleArray,
    quality: SampleArray,
    label_free: HeadRanking,
    recipe: LabelRecipe,
    images: Sequence[str] | None = None,
    counts: Sequence[int] = LABEL_COUNTS,
) -> QualityCurve:
    """Quality against the number of labels; each draw is evaluated on entries whose images it does not contain.

    Args:
        scores: `[sample, layer, head]`, that the heads are ranked by.
        quality: `[sample, layer, head]`, that the first `recipe.k` heads are evaluated by.
        images: key of each sample's image; by default every sample has its own image.
        counts: those above half of the samples are left out, as too few would be held out.
    """
    pool = len(scores)
    keys = np.arange(pool).astype(str) if images is None else np.array(images)
    all_samples = np.ones((1, pool), dtype=np.int64)
    mean_quality = mean_scores(quality, all_samples)[0]

    def quality_of(order: Sequence[Head], values: Scores) -> float:
        return float(np.mean([values[head] for head in order[: recipe.k]]))

    points: list[tuple[int, list[float], float]] = []
    for count in (count for count in counts if 2 * count <= pool):
        draws = random_draws(pool, recipe.num_trials, count, recipe.seed + count)
        held_out = np.stack([~np.isin(keys, keys[draw > 0]) for draw in draws]).astype(np.int64)
        usable = held_out.any(axis=1)
        draws, held_out = draws[usable], held_out[usable]
        if not len(draws):
            break
        orders = [recipe.rank(means, label_free, count) for means in mean_scores(scores, draws)]
        held_out_quality = mean_scores(quality, held_out)
        qualities = [quality_of(order, values) for order, values in zip(orders, held_out_quality, strict=True)]
        points.append((count, qualities, _mean_shared([order[: recipe.k] for order in orders])))
    heads = _label_free_order(label_free)
    by_all_labels = rank_by_score(mean_scores(scores, all_samples)[0], label_free)
    return QualityCurve(
        counts=[count for count, _, _ in points],
        quality=[qualities for _, qualities, _ in points],
        shared=[share for _, _, share in points],
        label_free=quality_of(heads, mean_quality),
        all_heads=float(np.mean([mean_quality[head] for head in heads])),
        all_labels=quality_of(by_all_labels, mean_quality),
    )


def _mean_shared(firsts: Sequence[Sequence[Head]]) -> float:
    """Mean share of heads that two of the lists have in common; 1 for a single list.

    >>> _mean_shared([[Head(1, 1), Head(1, 2)], [Head(1, 1), Head(3, 3)]])
    0.5
    """
    shares = [len(set(one) & set(other)) / max(len(one), 1) for i, one in enumerate(firsts) for other in firsts[:i]]
    return float(np.mean(shares)) if shares else 1.0
