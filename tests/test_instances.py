"""F1 of several boxes: by hand, and against trying every matching where the greedy one is the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from localization_heads.cells import box_iou
from localization_heads.evaluation.instances import f1, num_matched
from localization_heads.grounding.instances import suppressed

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


@pytest.mark.parametrize(
    ("boxes", "truths", "value"),
    [
        ([A, B], [B, A], 1.0),
        ([A], [A, B], 2 / 3),
        ([A, B, C], [A], 0.5),
        ([A, A], [A], 2 / 3),  # the second finds nothing left
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
    assert suppressed([A, (0, 0, 10, 9), B, (21, 0, 30, 10), C]) == [0, 2, 4]
    assert suppressed([]) == []
