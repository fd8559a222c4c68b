"""Metrics: hand-computed values, pixel counting, and the libraries of the field."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from localization_heads.cells import box_iou, mass_inside
from localization_heads.evaluation.metrics import (
    NUM_RESAMPLES,
    bootstrap_interval,
    bootstrap_ratios,
    mask_overlap,
    percentile_interval,
    pointing_hit,
)
from localization_heads.evaluation.scores import Score, summarize

boxes = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda c: (min(c[0], c[1]), min(c[2], c[3]), max(c[0], c[1]), max(c[2], c[3]))
)


def fill(box):
    """The box as a mask of 12 x 12 pixels."""
    x0, y0, x1, y1 = box
    mask = np.zeros((12, 12), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def ciou_and_giou(overlaps):
    summary = summarize({"a": [[Score(0.0, False, 0.0, overlap)] for overlap in overlaps]})["a"]
    return summary["ciou"], summary["giou"]


class TestBoxIou:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ((0, 0, 2, 2), (0, 0, 2, 2), 1),
            ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # half-open; with inclusive edges it would be 6 / 12
            ((0, 0, 2, 2), (2, 0, 4, 2), 0),  # touching
            ((0, 0, 4, 1), (0, 0, 1, 4), 1 / 7),
            ((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5), 1 / 3),  # no +1 pixel convention
            ((0, 0, 10, 10), (2, 2, 4, 5), 0.06),
            ((1, 1, 1, 5), (0, 0, 9, 9), 0),
            ((1, 1, 1, 1), (1, 1, 1, 1), 0),
            ((8, 8, 2, 2), (0, 0, 9, 9), 0),  # swapped corners: an empty box
            ((8, 8, 2, 2), (8, 8, 2, 2), 0),
        ],
    )
    def test_by_hand(self, a, b, expected):
        assert box_iou(a, b) == pytest.approx(expected)
        assert box_iou(b, a) == pytest.approx(expected)

    def test_a_box_that_is_not_unpadded_loses_iou(self):
        """A 640x480 image fills rows 80 to 560 of its padded square; the object is its top quarter."""
        truth = (0, 0, 640, 120)
        padded = (0, 80 * 480 / 640, 640, 200 * 480 / 640)
        assert box_iou(padded, truth) == pytest.approx(60 / 150)

    def test_broadcasts(self):
        several = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]])
        assert box_iou(several, several[0]).tolist() == [1, pytest.approx(1 / 3), 0]
        assert box_iou(several[:, None], several[None]).shape == (3, 3)

    @given(boxes, boxes)
    def test_agrees_with_counting_pixels(self, a, b):
        union = (fill(a) | fill(b)).sum()
        expected = (fill(a) & fill(b)).sum() / union if union else 0
        assert box_iou(a, b) == pytest.approx(expected)

    @pytest.mark.parametrize("box", [(0, 0, 1), 3.0, [[0, 0, 1]]])
    def test_refuses_other_shapes(self, box):
        with pytest.raises(ValueError, match="x0, y0, x1, y1"):
            box_iou(box, (0, 0, 1, 1))


class TestMasks:
    def test_overlap(self):
        a, b, empty = fill((0, 0, 4, 4)), fill((2, 0, 6, 4)), fill((0, 0, 0, 0))
        assert mask_overlap(a, b) == (8, 24)
        assert mask_overlap(a.astype(np.uint8) * 255, b.astype(np.uint8) * 255) == (8, 24)
        assert mask_overlap(empty, empty) == (0, 0)
        assert mask_overlap(empty, a) == mask_overlap(a, empty) == (0, 16)

    def test_refuses_masks_of_different_shapes(self):
        with pytest.raises(ValueError, match="one shape"):
            mask_overlap(np.ones((2, 3)), np.ones((3, 2)))

    @pytest.mark.parametrize(
        ("overlaps", "ciou", "giou"),
        [
            ([(90, 100), (0, 10), (1, 2)], 91 / 112, (0.9 + 0 + 0.5) / 3),
            ([(10, 10), (0, 30)], 0.25, 0.5),  # a missed object adds to the union
            ([(0, 0), (1, 4)], 0.25, 1.25 / 2),  # empty truth and empty prediction
            ([(0, 0)], 1, 1),
        ],
    )
    def test_ciou_adds_pixels_and_giou_averages_samples(self, overlaps, ciou, giou):
        assert ciou_and_giou(overlaps) == pytest.approx((ciou, giou), abs=1e-6)


class TestPointing:
    @pytest.mark.parametrize(
        ("point", "hit"),
        [
            ((2, 3), True),
            ((4.99, 7.99), True),
            ((5, 4), False),  # half-open
            ((4, 8), False),
            ((1.99, 4), False),
            ((4, 2), False),  # x and y are not swapped
        ],
    )
    def test_by_hand(self, point, hit):
        assert pointing_hit(point, (2, 3, 5, 8)) is hit
        assert pointing_hit(point, np.array([2.0, 3, 5, 8])) is hit


class TestEnergy:
    @pytest.mark.parametrize(
        ("mass", "image_box", "box", "expected"),
        [
            # 4 x 4 pixels, cells of 2 x 2
            ([[1, 1], [1, 1]], (0, 0, 4, 4), (0, 0, 2, 2), 1 / 4),
            ([[1, 2], [3, 4]], (0, 0, 4, 4), (2, 0, 4, 4), 6 / 10),
            ([[1, 2], [3, 4]], (0, 0, 4, 4), (1, 0, 4, 4), 8 / 10),  # half of the left column
            ([[1, 2], [3, 4]], (0, 0, 4, 4), (-9, -9, 99, 99), 1),
            ([[0, 0], [0, 0]], (0, 0, 4, 4), (0, 0, 4, 4), 0),
            # padding covers the upper row of cells and half of the lower row
            ([[9, 9], [1, 3]], (0, -6, 4, 2), (0, 0, 2, 4), 1 / 4),
            (
                [[9, 9], [1, 3]],
                (0, -6, 4, 2),
                (0, -6, 2, 4),
                1 / 4,
            ),  # a true box that extends beyond the image
            # centre crop: the grid covers the middle of the image only
            ([[1, 3]], (1, 1, 3, 3), (0, 0, 2, 4), 1 / 4),
            ([[1, 3]], (1, 1, 3, 3), (3, 3, 4, 4), 0),
        ],
    )
    def test_by_hand(self, mass, image_box, box, expected):
        assert mass_inside(np.array(mass, float), image_box, (4, 4), box) == pytest.approx(expected)

    @given(
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 4), st.integers(1, 5)),
        st.tuples(st.integers(-6, 3), st.integers(-6, 3)),
        boxes,
    )
    def test_agrees_with_counting_pixels(self, seed, grid, corner, box):
        """Cells of 3 x 2 pixels on an image of 12 x 12."""
        mass = np.random.default_rng(seed).random(grid)
        x0, y0 = corner
        inside = total = 0.0
        for row, column in np.ndindex(grid):
            for y in range(y0 + 2 * row, y0 + 2 * row + 2):
                for x in range(x0 + 3 * column, x0 + 3 * column + 3):
                    if 0 <= x < 12 and 0 <= y < 12:
                        total += mass[row, column] / 6
                        inside += mass[row, column] / 6 * fill(box)[y, x]
        found = mass_inside(mass, (x0, y0, x0 + 3 * grid[1], y0 + 2 * grid[0]), (12, 12), box)
        assert found == pytest.approx(inside / total if total else 0)


class TestAgainstLibraries:
    """pycocotools for boxes, since torchmetrics' box IoU needs torchvision; both for masks."""

    @given(boxes, boxes)
    def test_box_iou_agrees_with_pycocotools(self, a, b):
        if not (fill(a).any() and fill(b).any()):
            return
        xywh = [[float(x0), float(y0), float(x1 - x0), float(y1 - y0)] for x0, y0, x1, y1 in (a, b)]
        assert box_iou(a, b) == pytest.approx(coco.iou([xywh[0]], [xywh[1]], [0])[0, 0])

    def test_mask_ious_agree_with_pycocotools_and_torchmetrics(self):
        from torchmetrics.functional.classification import binary_jaccard_index
        from torchmetrics.functional.segmentation import mean_iou

        rng = np.random.default_rng(5)
        predicted, true = rng.random((2, 7, 9, 11)) < rng.random((2, 7, 1, 1))
        overlaps = [mask_overlap(p, t) for p, t in zip(predicted, true, strict=True)]
        assert all(union for _, union in overlaps)
        rles = [[coco.encode(np.asfortranarray(m, np.uint8)) for m in masks] for masks in (predicted, true)]
        assert [s / u for s, u in overlaps] == pytest.approx(np.diag(coco.iou(*rles, [0] * 7)))
        p, t = torch.from_numpy(predicted).long(), torch.from_numpy(true).long()
        giou = mean_iou(p, t, 2, include_background=False, input_format="index").mean()
        ciou = binary_jaccard_index(p, t)
        assert ciou_and_giou(overlaps) == pytest.approx((float(ciou), float(giou)), abs=1e-6)


class TestBootstrap:
    def test_agrees_with_the_normal_approximation(self):
        hits = np.array([1.0] * 300 + [0.0] * 700)
        low, high = bootstrap_interval(hits)
        half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
        assert low == pytest.approx(0.3 - half, abs=0.003)
        assert high == pytest.approx(0.3 + half, abs=0.003)

    def test_the_interval_of_a_mean_agrees_with_a_plain_loop(self):
        values = np.random.default_rng(1).random(30)
        rng = np.random.default_rng(9)
        means = [values[rng.integers(30, size=30)].mean() for _ in range(NUM_RESAMPLES)]
        expected = np.quantile(means, [0.025, 0.975])
        assert bootstrap_interval(values, seed=9) == pytest.approx(tuple(expected))

    def test_ratios_agree_with_a_plain_loop(self):
        rng = np.random.default_rng(2)
        unions = rng.integers(1, 100, 25)
        shared = rng.integers(0, unions)
        rng = np.random.default_rng(7)
        resamples = [rng.integers(25, size=25) for _ in range(50)]
        expected = [shared[rows].sum() / unions[rows].sum() for rows in resamples]
        ratios = bootstrap_ratios(shared[:, None], unions[:, None], num_resamples=50, seed=7)
        assert ratios[:, 0] == pytest.approx(expected)

    def test_large_sets_are_drawn_in_blocks(self):
        """No block repeats another's draws."""
        values = np.random.default_rng(0).random((300_000, 1))
        means = bootstrap_ratios(values, np.ones_like(values), num_resamples=8)
        assert means.shape == (8, 1)
        assert len(np.unique(means)) == 8
        assert means.std() == pytest.approx(math.sqrt(1 / 12 / 300_000), rel=0.7)

    def test_groups_are_resampled_as_a_whole(self):
        """Three images with 1, 2 and 3 expressions, one of them right in each."""
        right = np.array([1.0, 0, 1, 0, 0, 1])[:, None]
        ratios = bootstrap_ratios(right, np.ones_like(right), groups=[*"abbccc"], num_resamples=300)
        possible = {round(3 / sum(sizes), 9) for sizes in product((1, 2, 3), repeat=3)}
        assert set(np.round(ratios[:, 0], 9).tolist()) == possible

    def test_groups_widen_the_interval_of_correlated_expressions(self):
        hits = np.repeat(np.random.default_rng(1).random(60) < 0.5, 10).astype(float)[:, None]
        images = np.repeat(np.arange(60), 10)
        by_expression, by_image = (
            bootstrap_ratios(hits, np.ones_like(hits), groups=groups).std() for groups in (None, images)
        )
        assert by_image / by_expression == pytest.approx(math.sqrt(10), rel=0.1)

    def test_a_zero_denominator_gives_nan(self):
        assert np.isnan(bootstrap_ratios(np.zeros((0, 2)), np.zeros((0, 2)), num_resamples=3)).all()
        ratios = bootstrap_ratios([[1.0], [0]], [[1.0], [0]], num_resamples=200)
        assert set(np.unique(ratios[~np.isnan(ratios)])) == {1.0}
        assert 0.15 < np.isnan(ratios).mean() < 0.35  # a quarter of the resamples have denominator 0
        assert percentile_interval(ratios) == (1, 1)
        assert all(math.isnan(bound) for bound in percentile_interval([math.nan]))

    def test_one_value_no_value_and_a_fixed_seed(self):
        assert bootstrap_interval([0.4]) == (0.4, 0.4)
        assert all(math.isnan(bound) for bound in bootstrap_interval([]))
        assert bootstrap_interval([0, 1, 1], seed=3) == bootstrap_interval([0, 1, 1], seed=3)
