"""Several objects: F1 by hand and against every matching, duplicates, and the selection of a segmenter's proposals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_maps import grounded

from localization_heads.cells import box_iou, label_components, upsample_to_image
from localization_heads.evaluation.scores import f1, num_matched
from localization_heads.grounding.boxes import non_maximum_suppression
from localization_heads.grounding.ground import Grounding
from localization_heads.grounding.proposals import select_proposals

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


@pytest.mark.parametrize(
    ("boxes", "truths", "value"),
    [
        ([A, B], [B, A], 1.0),
        ([A], [A, B], 2 / 3),
        ([A, B, C], [A], 0.5),
        ([A, A], [A], 2 / 3),  # the second has no match left
        ([], [A], 0.0),
        ([A], [], 0.0),
        ([], [], 1.0),
        ([(0, 0, 10, 5)], [A], 1.0),  # IoU exactly 0.5 is right
        ([(0, 0, 10, 4.9)], [A], 0.0),
    ],
)
def test_by_hand(boxes, truths, value):
    assert f1(boxes, truths) == pytest.approx(value)


def test_agrees_with_every_matching():
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = rng.uniform(0, 20, (7, 2))
        boxes = np.concatenate([start, start + rng.uniform(5, 15, (7, 2))], axis=1)
        found, truths = boxes[:3].tolist(), boxes[3:].tolist()
        best = max(
            sum(float(box_iou(found[i], truths[j])) >= 0.5 for i, j in enumerate(order))
            for order in itertools.permutations(range(4), 3)
        )
        assert num_matched(found, truths) == best


def test_duplicates_are_suppressed():
    assert non_maximum_suppression([A, (0, 0, 10, 9), B, (21, 0, 30, 10), C]) == [0, 2, 4]
    assert non_maximum_suppression([]) == []


def whole(grid: np.ndarray, pixels: int = 1) -> Grounding:
    """A map without smoothing, with cells `pixels` wide."""
    return grounded(grid, image_size=(grid.shape[1] * pixels, grid.shape[0] * pixels))


def masks(*boxes: tuple[int, int, int, int], side: int = 4) -> np.ndarray:
    drawn = np.zeros((len(boxes), side, side), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(drawn, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return drawn


TWO = np.array([[4.0, 4, 0, 0], [0] * 4, [0] * 4, [0, 0, 3, 3]])
"""Two objects; the mean, and so the threshold, is 14 / 16."""


def test_proposals_by_hand():
    """Scores: 6.25 for the first object, 3.125 for its half, 4.5 with two more cells, 4.25 for the other, 0 for all."""
    half, wide, good, other, everything = (0, 0, 1, 1), (0, 0, 2, 2), (0, 0, 2, 1), (2, 3, 4, 4), (0, 0, 4, 4)
    found = select_proposals(whole(TWO), masks(half, wide, good, other, everything), "drawn")
    assert [one.box for one in found] == [good, other]
    assert [one.score for one in found] == pytest.approx([8 / 14, 6 / 14])
    assert [one.mask_from for one in found] == ["drawn", "drawn"]
    assert [one.mask_overlap for one in found] == [1.0, 1.0]
    assert (found[0].mask == masks(good)[0]).all() and (found[1].cells == masks(other)[0]).all()
    without_better = select_proposals(whole(TWO), masks(wide, other), "drawn")
    assert [one.box for one in without_better] == [wide, other]
    assert (without_better[0].cells == masks(good)[0]).all() and without_better[0].mask_overlap == 0.5
    (strongest,) = select_proposals(whole(TWO), masks(good, other), "drawn", least=0.7)
    assert strongest.box == good


def test_a_group_of_objects_is_left_out():
    """Both objects and little between them score more than either, but cover most of two components."""
    grid = np.zeros((4, 8))
    grid[1:3, 0:2] = grid[1:3, 3:5] = 4.0
    both, left, right = masks((0, 1, 5, 3), (0, 1, 2, 3), (3, 1, 5, 3), side=8)[:, :4]
    found = select_proposals(whole(grid), np.array([both, left, right]), "drawn")
    assert [one.box for one in found] == [(0, 1, 2, 3), (3, 1, 5, 3)]
    grid[1:3, 3:5] = 0.55  # less than 0.15 of the other's attention: only one component counts
    assert [one.box for one in select_proposals(whole(grid), np.array([both]), "drawn")] == [(0, 1, 5, 3)]


def test_proposals_without_attention_are_left_out():
    assert select_proposals(whole(np.ones((4, 4))), masks(A := (0, 0, 2, 2)), "drawn") == []
    assert select_proposals(whole(TWO), masks(), "drawn") == []
    assert select_proposals(whole(TWO), masks((0, 1, 4, 3), (1, 1, 1, 1)), "drawn") == []
    assert [one.box for one in select_proposals(whole(TWO, 10), masks(A), "drawn")] == [(0, 0, 20, 20)]


def is_group(found: Grounding, mask: np.ndarray) -> bool:
    """Whether a mask, on cells of 4 x 4 pixels, covers most of two components."""
    labels = label_components(found.combined > found.threshold)
    mass = {n: found.combined[labels == n].sum() for n in range(1, labels.max() + 1)}
    strong = [n for n in mass if mass[n] >= 0.15 * max(mass.values())]
    fine = np.kron(labels, np.ones((4, 4), int))
    return sum((mask & (fine == n)).sum() > 0.5 * (fine == n).sum() for n in strong) > 1


@pytest.mark.parametrize("seed", range(4))
def test_proposals_agree_with_loops_over_pixels_and_pairs(seed):
    rng = np.random.default_rng(seed)
    found = whole(rng.random((5, 5)) ** 4, 4)
    drawn = rng.random((6, 20, 20)) > rng.uniform(0.3, 0.9, (6, 1, 1))
    drawn &= upsample_to_image(rng.random((4, 4)), (0, 0, 20, 20), (20, 20)) > 0.5
    heat = upsample_to_image(found.combined, (0, 0, 20, 20), (20, 20))
    worth = [sum(heat[y, x] - found.threshold for y, x in np.argwhere(mask)) for mask in drawn]
    left, kept = sorted(range(6), key=lambda i: -worth[i]), []
    while left:
        best = left.pop(0)
        if worth[best] > 0 and worth[best] >= 0.15 * max(worth) and not is_group(found, drawn[best]):
            kept.append(best)
            pixels = {tuple(p) for p in np.argwhere(drawn[best])}
            left = [
                i for i in left
                if len(pixels & (own := {tuple(p) for p in np.argwhere(drawn[i])})) <= 0.5 * min(len(own), len(pixels))
            ]  # fmt: skip
    got = select_proposals(found, drawn, "drawn")
    assert [one.mask.tobytes() for one in got] == [drawn[i].tobytes() for i in kept]
