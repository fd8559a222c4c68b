"""AUROC, risk-coverage and calibration error: hand-computed values and plain implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.evaluation.confidence import (
    aurc,
    auroc,
    calibration_error,
    calibration_error_by_chance,
    reliability,
    risk_coverage,
    with_bootstrap_interval,
)

answer_lists = st.lists(st.tuples(st.integers(0, 10).map(lambda n: n / 10), st.booleans()), min_size=1, max_size=12)


@given(answer_lists)
def test_auroc_agrees_with_counting_pairs(answers):
    values, right = zip(*answers, strict=True)
    pairs = [
        (values[i] > values[j]) + 0.5 * (values[i] == values[j])
        for i, j in itertools.product(range(len(answers)), repeat=2)
        if right[i] and not right[j]
    ]
    assert auroc(values, right) == pytest.approx(np.mean(pairs) if pairs else math.nan, nan_ok=True)


@given(answer_lists)
def test_risk_is_the_expectation_over_all_orders_of_ties(answers):
    values, right = zip(*answers, strict=True)
    order = sorted(range(len(answers)), key=lambda i: -values[i])
    expected, wrong_so_far = [], 0.0
    for i in order:
        group = [j for j in order if values[j] == values[i]]
        wrong_so_far += sum(not right[j] for j in group) / len(group)
        expected.append(wrong_so_far / (len(expected) + 1))
    coverage, risk = risk_coverage(values, right)
    assert risk == pytest.approx(expected) and coverage[-1] == 1
    assert aurc(values, right) == pytest.approx(np.mean(expected))


def test_reliability_and_calibration_error_by_hand():
    confidence = [0.95, 0.85, 0.85, 0.15, 1.0, 0.0]
    right = [True, True, False, False, True, True]
    assert reliability(confidence, right) == [(0.0, 1.0, 1), (0.15, 0.0, 1), (0.85, 0.5, 2), (0.975, 1.0, 2)]
    assert calibration_error(confidence, right) == pytest.approx((1 + 0.15 + 2 * 0.35 + 2 * 0.025) / 6)


def test_perfect_useless_and_undefined():
    assert auroc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert auroc([1, 1, 1], [True, False, True]) == 0.5
    undefined = auroc([1, 2], [True, True]), aurc([], []), calibration_error([], [])
    assert all(map(math.isnan, undefined))


def test_intervals_resample_whole_images():
    confidence, right = [0.9, 0.8, 0.2, 0.1] * 10, [True, False, True, False] * 10
    value, (low, high) = with_bootstrap_interval(auroc, confidence, right)
    assert low < value == 0.75 < high
    assert with_bootstrap_interval(auroc, confidence, right, groups=["a", "a", "b", "b"] * 10)[1][0] <= 0.75
    single, interval = with_bootstrap_interval(auroc, confidence, right, groups=["a"] * 40)
    assert single == 0.75 and all(map(math.isnan, interval))


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        auroc([0.5], [True, False])


def test_the_calibration_error_by_chance():
    """Of two answers of confidence 0.5, half of the time both or neither are right: an error of 0.5."""
    assert calibration_error_by_chance([0.0, 1.0, 1.0]) == (0.0, (0.0, 0.0))
    assert calibration_error_by_chance([0.5]) == (0.5, (0.5, 0.5))
    mean, bounds = calibration_error_by_chance([0.5, 0.5])
    assert mean == pytest.approx(0.25, abs=0.03) and bounds == (0.0, 0.5)
    ten = sum(math.comb(10, k) * 0.3**k * 0.7 ** (10 - k) * abs(k / 10 - 0.3) for k in range(11))
    assert calibration_error_by_chance([0.3] * 10)[0] == pytest.approx(ten, rel=0.06)
    assert math.isnan(calibration_error_by_chance([])[0])
