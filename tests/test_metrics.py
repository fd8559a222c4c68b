"""Metrics by hand and against counting pixels."""

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


def painted(box):
    """The box as a mask of 12 x 12 pixels."""
    x0, y0, x1, y1 = box
    mask = np.zeros((12, 12), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def mask_metrics(overlaps):
    """cIoU and gIoU of these overlaps."""
    found = summarize({"a": [[Score(0.0, False, 0.0, overlap)] for overlap in overlaps]})["a"]
    return found["ciou"], found["giou"]


class TestBoxIou:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ((0, 0, 2, 2), (0, 0, 2, 2), 1),
            ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # counting both edges: 6 of 12 pixels
            ((0, 0, 2, 2), (2, 0, 4, 2), 0),  # they meet, and share nothing
            ((0, 0, 4, 1), (0, 0, 1, 4), 1 / 7),
            ((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5), 1 / 3),  # no pixel is added to small boxes
            ((0, 0, 10, 10), (2, 2, 4, 5), 0.06),
            ((1, 1, 1, 5), (0, 0, 9, 9), 0),
            ((1, 1, 1, 1), (1, 1, 1, 1), 0),
            ((8, 8, 2, 2), (0, 0, 9, 9), 0),  # corners in the wrong order: an empty box
            ((8, 8, 2, 2), (8, 8, 2, 2), 0),
        ],
    )
    def test_by_hand(self, a, b, expected):
        assert box_iou(a, b) == pytest.approx(expected)
        assert box_iou(b, a) == pytest.approx(expected)

    def test_the_unpadding_example_of_the_method(self):
        # A 640x480 image padded to a square: rows 80 to 560 of 640 hold it. An object of the top quarter,
        # taken from the padded square as if it were the image, is squeezed and shifted.
        truth = (0, 0, 640, 120)
        padded = (0, 80 * 480 / 640, 640, 200 * 480 / 640)
        assert box_iou(padded, truth) == pytest.approx(60 / 150)

    def test_broadcasts(self):
        many = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]])
        assert box_iou(many, many[0]).tolist() == [1, pytest.approx(1 / 3), 0]
        assert box_iou(many[:, None], many[None]).shape == (3, 3)

    @given(boxes, boxes)
    def test_agrees_with_counting_pixels(self, a, b):
        union = (painted(a) | painted(b)).sum()
        expected = (painted(a) & painted(b)).sum() / union if union else 0
        assert box_iou(a, b) == pytest.approx(expected)

    @pytest.mark.parametrize("box", [(0, 0, 1), 3.0, [[0, 0, 1]]])
    def test_refuses_what_is_no_box(self, box):
        with pytest.raises(ValueError, match="x0, y0, x1, y1"):
            box_iou(box, (0, 0, 1, 1))


class TestMasks:
    def test_overlap(self):
        a, b, empty = painted((0, 0, 4, 4)), painted((2, 0, 6, 4)), painted((0, 0, 0, 0))
        assert mask_overlap(a, b) == (8, 24)
        assert mask_overlap(a.astype(np.uint8) * 255, b.astype(np.uint8) * 255) == (8, 24)
        assert mask_overlap(empty, empty) == (0, 0)
        assert mask_overlap(empty, a) == mask_overlap(a, empty) == (0, 16)

    def test_refuses_masks_of_different_images(self):
        with pytest.raises(ValueError, match="one shape"):
            mask_overlap(np.ones((2, 3)), np.ones((3, 2)))

    @pytest.mark.parametrize(
        ("overlaps", "ciou", "giou"),
        [
            ([(90, 100), (0, 10), (1, 2)], 91 / 112, (0.9 + 0 + 0.5) / 3),
            ([(10, 10), (0, 30)], 0.25, 0.5),  # a missing prediction counts its truth
            ([(0, 0), (1, 4)], 0.25, 1.25 / 2),  # no object, and none predicted
            ([(0, 0)], 1, 1),
        ],
    )
    def test_ciou_adds_pixels_and_giou_averages_samples(self, overlaps, ciou, giou):
        assert mask_metrics(overlaps) == pytest.approx((ciou, giou), abs=1e-6)


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
            # the upper row of cells is padding, and the lower one half of it
            ([[9, 9], [1, 3]], (0, -6, 4, 2), (0, 0, 2, 4), 1 / 4),
            ([[9, 9], [1, 3]], (0, -6, 4, 2), (0, -6, 2, 4), 1 / 4),  # a true box that leaves the image
            # the grid covers the middle of the image only (centre crop)
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
        """Cells of 3 x 2 pixels, painted one by one on a 12 x 12 image."""
        mass = np.random.default_rng(seed).random(grid)
        x0, y0 = corner
        inside = total = 0.0
        for row, column in np.ndindex(grid):
            for y in range(y0 + 2 * row, y0 + 2 * row + 2):
                for x in range(x0 + 3 * column, x0 + 3 * column + 3):
                    if 0 <= x < 12 and 0 <= y < 12:
                        total += mass[row, column] / 6
                        inside += mass[row, column] / 6 * painted(box)[y, x]
        found = mass_inside(mass, (x0, y0, x0 + 3 * grid[1], y0 + 2 * grid[0]), (12, 12), box)
        assert found == pytest.approx(inside / total if total else 0)


class TestAgainstOthers:
    """The libraries of the field. torchmetrics' box IoU needs torchvision, which has no CPU build here; its
    segmentation part does not, and COCO's own code does boxes."""

    @given(boxes, boxes)
    def test_box_iou_of_pycocotools(self, a, b):
        if not (painted(a).any() and painted(b).any()):
            return
        wide = [[float(x0), float(y0), float(x1 - x0), float(y1 - y0)] for x0, y0, x1, y1 in (a, b)]
        assert box_iou(a, b) == pytest.approx(coco.iou([wide[0]], [wide[1]], [0])[0, 0])

    def test_masks_of_pycocotools_and_torchmetrics(self):
        from torchmetrics.functional.classification import binary_jaccard_index
        from torchmetrics.functional.segmentation import mean_iou

        rng = np.random.default_rng(5)
        predicted, true = rng.random((2, 7, 9, 11)) < rng.random((2, 7, 1, 1))
        overlaps = [mask_overlap(p, t) for p, t in zip(predicted, true, strict=True)]
        assert all(union for _, union in overlaps)
        runs = [[coco.encode(np.asfortranarray(m, np.uint8)) for m in masks] for masks in (predicted, true)]
        assert [s / u for s, u in overlaps] == pytest.approx(np.diag(coco.iou(*runs, [0] * 7)))
        p, t = torch.from_numpy(predicted).long(), torch.from_numpy(true).long()
        each = mean_iou(p, t, 2, include_background=False, input_format="index")
        whole = binary_jaccard_index(p, t)
        assert mask_metrics(overlaps) == pytest.approx((float(whole), float(each.mean())), abs=1e-6)


class TestBootstrap:
    def test_agrees_with_the_normal_approximation(self):
        hits = np.array([1.0] * 300 + [0.0] * 700)
        low, high = bootstrap_interval(hits)
        half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
        assert low == pytest.approx(0.3 - half, abs=0.003)
        assert high == pytest.approx(0.3 + half, abs=0.003)

    def test_agrees_with_one_resample_at_a_time(self):
        values = np.random.default_rng(1).random(30)
        rng = np.random.default_rng(9)
        means = [values[rng.integers(30, size=30)].mean() for _ in range(NUM_RESAMPLES)]
        expected = np.quantile(means, [0.025, 0.975])
        assert bootstrap_interval(values, seed=9) == pytest.approx(tuple(expected))

    def test_ratios_agree_with_one_resample_at_a_time(self):
        rng = np.random.default_rng(2)
        unions = rng.integers(1, 100, 25)
        shared = rng.integers(0, unions)
        drawn = np.random.default_rng(7)
        expected = []
        for _ in range(50):
            rows = drawn.integers(25, size=25)
            expected.append(shared[rows].sum() / unions[rows].sum())
        found = bootstrap_ratios(shared[:, None], unions[:, None], num_resamples=50, seed=7)
        assert found[:, 0] == pytest.approx(expected)

    def test_large_sets_are_drawn_in_parts(self):
        """More numbers than fit into one step, which must not repeat a draw."""
        values = np.random.default_rng(0).random((300_000, 1))
        means = bootstrap_ratios(values, np.ones_like(values), num_resamples=8)
        assert means.shape == (8, 1)
        assert len(np.unique(means)) == 8
        assert means.std() == pytest.approx(math.sqrt(1 / 12 / 300_000), rel=0.7)

    def test_groups_are_drawn_whole(self):
        """Three images with 1, 2 and 3 expressions: only the sums of whole images can come up."""
        tops = np.array([1.0, 0, 1, 0, 0, 1])[:, None]
        found = bootstrap_ratios(
            tops, np.ones_like(tops), groups=["a", "b", "b", "c", "c", "c"], num_resamples=300
        )
        images = [(1, 1), (1, 2), (1, 3)]
        possible = {
            round(sum(images[i][0] for i in draw) / sum(images[i][1] for i in draw), 9)
            for draw in product(range(3), repeat=3)
        }
        assert set(np.round(found[:, 0], 9).tolist()) == possible

    def test_groups_widen_the_interval_of_expressions_that_go_together(self):
        hits = np.repeat(np.random.default_rng(1).random(60) < 0.5, 10).astype(float)[:, None]
        images = np.repeat(np.arange(60), 10)
        spread = [
            bootstrap_ratios(hits, np.ones_like(hits), groups=groups).std() for groups in (None, images)
        ]
        assert spread[1] / spread[0] == pytest.approx(math.sqrt(10), rel=0.1)

    def test_nothing_to_divide_by(self):
        assert np.isnan(bootstrap_ratios(np.zeros((0, 2)), np.zeros((0, 2)), num_resamples=3)).all()
        found = bootstrap_ratios([[1.0], [0]], [[1.0], [0]], num_resamples=200)
        assert set(np.unique(found[~np.isnan(found)])) == {1.0}
        assert 0.15 < np.isnan(found).mean() < 0.35  # a quarter of the draws hold no denominator
        assert percentile_interval(found) == (1, 1)
        assert all(math.isnan(bound) for bound in percentile_interval([math.nan]))

    def test_edge_cases(self):
        assert bootstrap_interval([0.4]) == (0.4, 0.4)
        assert all(math.isnan(bound) for bound in bootstrap_interval([]))
        assert bootstrap_interval([0, 1, 1], seed=3) == bootstrap_interval([0, 1, 1], seed=3)
