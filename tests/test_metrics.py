"""Metrics by hand and against counting pixels."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.evaluation.metrics import (
    accuracy_at,
    bootstrap_interval,
    box_iou,
    ciou,
    giou,
    mask_iou,
    mask_overlap,
    pointing_hit,
    summarize,
)

boxes = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda c: (min(c[0], c[1]), min(c[2], c[3]), max(c[0], c[1]), max(c[2], c[3]))
)


def painted(box):
    """The box as a mask of 12 x 12 pixels."""
    x0, y0, x1, y1 = box
    mask = np.zeros((12, 12), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


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
        # A 640x480 picture padded to a square: rows 80 to 560 of 640 hold it. An object of the top quarter,
        # taken from the padded square as if it were the picture, is squeezed and shifted.
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
    def test_overlap_and_iou(self):
        a, b = painted((0, 0, 4, 4)), painted((2, 0, 6, 4))
        assert mask_overlap(a, b) == (8, 24)
        assert mask_iou(a, b) == pytest.approx(1 / 3)
        assert mask_iou(a.astype(np.uint8) * 255, b.astype(np.uint8) * 255) == pytest.approx(1 / 3)

    def test_empty_masks(self):
        empty, full = painted((0, 0, 0, 0)), painted((0, 0, 3, 3))
        assert mask_iou(empty, empty) == 1
        assert mask_iou(empty, full) == mask_iou(full, empty) == 0

    def test_refuses_masks_of_different_pictures(self):
        with pytest.raises(ValueError, match="one shape"):
            mask_overlap(np.ones((2, 3)), np.ones((3, 2)))

    def test_ciou_adds_pixels_and_giou_averages_samples(self):
        overlaps = [(90, 100), (0, 10), (1, 2)]
        assert ciou(overlaps) == pytest.approx(91 / 112)
        assert giou(overlaps) == pytest.approx((0.9 + 0 + 0.5) / 3)

    def test_a_missing_prediction_counts_its_truth(self):
        assert ciou([(10, 10), (0, 30)]) == 0.25
        assert giou([(10, 10), (0, 30)]) == 0.5

    def test_no_object_and_no_prediction(self):
        assert giou([(0, 0), (1, 4)]) == pytest.approx(1.25 / 2)
        assert ciou([(0, 0), (1, 4)]) == 0.25
        assert ciou([(0, 0)]) == 1
        assert math.isnan(ciou([]))
        assert math.isnan(giou([]))


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
    def test_box_and_mask_agree(self, point, hit):
        assert pointing_hit(point, (2, 3, 5, 8)) is hit
        assert pointing_hit(point, painted((2, 3, 5, 8))) is hit

    def test_box_as_an_array(self):
        assert pointing_hit((3, 4), np.array([2.0, 3, 5, 8]))

    @pytest.mark.parametrize("point", [(-0.5, 3), (3, -0.5), (12, 3), (3, 12.0)])
    def test_outside_the_picture_is_a_miss(self, point):
        assert not pointing_hit(point, np.ones((12, 12), dtype=bool))


class TestSummary:
    def test_accuracy_includes_the_threshold(self):
        assert accuracy_at([0.5, 0.49999, 1.0, 0.0]) == 0.5
        assert accuracy_at([0.5, 0.3, 0.75], 0.75) == pytest.approx(1 / 3)
        assert math.isnan(accuracy_at([]))

    def test_by_hand(self):
        summary = summarize(
            [0.8, 0.5, 0.3, 0.0], pointing=[True, True, False], overlaps=[(1, 2), (3, 4)], num_failed=2
        )
        interval = summary.pop("acc@0.5_interval")
        assert summary == {
            "acc@0.5": 0.5,
            "acc@0.25": 0.75,
            "acc@0.75": 0.25,
            "mean_iou": 0.4,
            "pointing": 0.666667,
            "ciou": 0.666667,
            "giou": 0.625,
            "num_masks": 2,
            "num_samples": 4,
            "num_failed": 2,
        }
        assert interval == [0.0, 1.0]

    def test_nothing_to_report_is_null_and_valid_json(self):
        summary = json.loads(json.dumps(summarize([], num_failed=3), allow_nan=False))
        assert summary["acc@0.5"] is summary["mean_iou"] is summary["pointing"] is None
        assert summary["acc@0.5_interval"] == [None, None]
        assert (summary["num_samples"], summary["num_failed"]) == (0, 3)
        assert not {"ciou", "num_masks"} & set(summary)

    def test_takes_arrays(self):
        summary = summarize(np.array([0.6, 0.2]), pointing=np.array([True, False]))
        assert summary["pointing"] == summary["acc@0.5"] == 0.5

    @pytest.mark.parametrize("iou", [math.nan, -0.1, 1.1])
    def test_refuses_what_is_no_iou(self, iou):
        with pytest.raises(ValueError, match="between 0 and 1"):
            summarize([0.5, iou])


class TestBootstrap:
    def test_agrees_with_the_normal_approximation(self):
        hits = np.array([1.0] * 300 + [0.0] * 700)
        low, high = bootstrap_interval(hits, num_resamples=4000)
        half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
        assert low == pytest.approx(0.3 - half, abs=0.003)
        assert high == pytest.approx(0.3 + half, abs=0.003)

    def test_confidence_widens_it(self):
        values = np.random.default_rng(0).random(50)
        narrow = bootstrap_interval(values, confidence=0.5)
        wide = bootstrap_interval(values, confidence=0.99)
        assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]

    def test_agrees_with_one_resample_at_a_time(self):
        values = np.random.default_rng(1).random(30)
        rng = np.random.default_rng(9)
        means = [values[rng.integers(30, size=30)].mean() for _ in range(200)]
        expected = np.quantile(means, [0.025, 0.975])
        assert bootstrap_interval(values, num_resamples=200, seed=9) == pytest.approx(tuple(expected))

    def test_edge_cases(self):
        assert bootstrap_interval([0.4]) == (0.4, 0.4)
        assert all(math.isnan(bound) for bound in bootstrap_interval([]))
        assert bootstrap_interval([0, 1, 1], seed=3) == bootstrap_interval([0, 1, 1], seed=3)
