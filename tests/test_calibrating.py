"""Fitting calibrations, and what the confidences of many answers are worth: numbers by hand and by another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from localization_heads import figures
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.evaluation.calibrating import LabelledSignals, calibrate, recalibrate
from localization_heads.evaluation.confidence import (
    Claim,
    confidence_metrics,
    is_right,
    predict_presence_from_text,
)
from localization_heads.grounding.confidence import Calibration, Logistic

RECIPE = {"model": "m", "heads": [[0, 0]]}


def labelled(count: int = 400, shift: float = 0.0, absent: bool = True, seed: int = 0) -> LabelledSignals:
    """Right with probability `sigmoid(3 gain - 1 + shift)`, where `gain` is standard normal; `agreement` says nothing.

    Half of the wrong ones are absent, so that a right one is twice as likely among the others: log 2 more.
    """
    rng = np.random.default_rng(seed)
    gain, noise = rng.normal(size=(2, count))
    right = rng.random(count) < 1 / (1 + np.exp(-(3 * gain - 1 + shift)))
    present = right | (rng.random(count) < 0.5) if absent else np.ones(count, dtype=bool)
    rows = [
        {"gain": 10 * g, "agreement": n, "peak": 7.0}
        for g, n in zip(gain.tolist(), noise.tolist(), strict=True)
    ]
    return LabelledSignals(rows, right, present, [f"{i // 2}.png" for i in range(count)])


def test_the_weights_are_found_again_in_the_signals_own_units():
    found = calibrate(labelled(4000), RECIPE)
    assert found.right.weights["gain"] == pytest.approx(0.3, rel=0.1)
    assert abs(found.right.weights["agreement"]) < 0.15
    assert found.right.intercept == pytest.approx(-1 + math.log(2), abs=0.2)
    assert found.present is not None and found.recipe == RECIPE and found.num_labels == 4000
    assert set(found.present.weights) == {"gain", "agreement"}  # the peak never changes


def test_a_fit_is_the_penalised_maximum_of_the_likelihood():
    """Against scipy, which minimises the same function over standardised signals."""
    from scipy.optimize import minimize

    data = labelled(100, absent=False)
    table = np.array([[row["gain"], row["agreement"]] for row in data.signals])
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    sign = np.where(data.right, 1, -1)

    def loss(w):
        return np.logaddexp(0, -sign * (scaled @ w[:2] + w[2])).sum() + 0.5 * (w[:2] ** 2).sum()

    best = minimize(loss, np.zeros(3)).x
    found = calibrate(data, RECIPE).right
    assert found.weights["gain"] == pytest.approx(best[0] / table.std(axis=0)[0], rel=1e-2)
    probabilities = 1 / (1 + np.exp(-(scaled @ best[:2] + best[2])))
    assert [found.probability(row) for row in data.signals] == pytest.approx(probabilities.tolist(), abs=2e-3)


def test_the_measured_numbers_are_of_entries_left_out():
    """Labels that are noise: a fit that is measured on its own entries would find order in them."""
    rng = np.random.default_rng(1)
    rows = [{f"attention {i}": float(v) for i, v in enumerate(rng.normal(size=20))} for _ in range(80)]
    right = rng.random(80) < 0.5
    noise = LabelledSignals(rows, right, right, [f"{i}" for i in range(80)])
    measured = calibrate(noise, RECIPE).measured
    low, _ = measured["auroc_present_interval"]
    assert measured["auroc_present"] < 0.65 and low < 0.5
    good = calibrate(labelled(), RECIPE).measured
    assert good["auroc_useful"] > 0.85 and good["auroc_right"] > 0.7 and good["ece"] < 0.12
    assert {"auroc_present", "ece_present", "ece_by_chance", "aurc_interval"} <= good.keys()
    assert good["num_right"] + good["num_wrong"] == 400


def test_of_few_images_only_the_counts_are_known():
    data = labelled(100)
    crowded = LabelledSignals(data.signals, data.right, data.present, ["a.png"] * 100)
    assert set(calibrate(crowded, RECIPE).measured) == {"num_right", "num_wrong", "num_absent"}


def test_too_few_labels_are_counted():
    data = labelled(100)
    absent = np.flatnonzero(~data.present)[:19]
    wrong = np.flatnonzero(data.present & ~data.right)[:11]
    few = data.subset(np.array([*np.flatnonzero(data.right)[:19], *wrong, *absent]))
    with pytest.raises(UsageError, match=r"at least 20 .* right and 20 .* wrong; there are 19 and 11: add"):
        calibrate(few, RECIPE)
    known = calibrate(data, RECIPE)
    fewer = data.subset(np.array([*np.flatnonzero(data.right)[:30], *np.flatnonzero(~data.right)[:9]]))
    with pytest.raises(UsageError, match=r"calibrate_from needs at least 10 .* there are 30 and 9"):
        recalibrate(fewer, known)


def test_presence_needs_absent_entries():
    assert calibrate(labelled(100, absent=False), RECIPE).present is None


def test_fifty_labels_bring_a_calibration_to_a_new_domain():
    known = calibrate(labelled(2000), RECIPE)
    elsewhere = labelled(50, shift=3.0, seed=5)
    again = recalibrate(elsewhere, known)
    assert again.num_labels == 50 and again.signal_names == known.signal_names
    test = labelled(2000, shift=3.0, seed=6)
    share = test.right.mean()
    before, after = (np.mean([c.confidence(row) for row in test.signals]) for c in (known, again))
    assert abs(after - share) < 0.1 < abs(before - share)


def test_a_fit_again_is_two_penalised_maxima_one_after_the_other():
    """Against scipy, which minimises both functions as they are written in the docstring."""
    from scipy.optimize import minimize

    data = labelled(60, shift=1.0, seed=3, absent=False)
    known = Logistic(-0.5, {"gain": 0.2, "agreement": 0.3})
    table = np.array([[row["gain"], row["agreement"]] for row in data.signals])
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    old = table @ [0.2, 0.3] - 0.5
    sign = np.where(data.right, 1, -1)

    def first(v):
        return np.logaddexp(0, -sign * (v[0] * old + v[1])).sum() + 1.5 * ((v[0] - 1) ** 2 + v[1] ** 2)

    slope, shift = minimize(first, [1.0, 0.0]).x

    def second(v):
        sums = slope * old + shift + scaled @ v[:2] + v[2]
        return np.logaddexp(0, -sign * sums).sum() + 5 * (v[:2] ** 2).sum() + 1.5 * v[2] ** 2

    best = minimize(second, np.zeros(3)).x
    expected = 1 / (1 + np.exp(-(slope * old + shift + scaled @ best[:2] + best[2])))
    again = recalibrate(data, Calibration(RECIPE, known)).right
    assert [again.probability(row) for row in data.signals] == pytest.approx(expected.tolist(), abs=1e-3)
    assert abs(best[:2]).min() > 0.01 and slope != pytest.approx(1, abs=0.01)


def test_a_factor_without_labels_of_both_kinds_stays():
    """Eight of ten present boxes are right, and too few absent entries to say more of presence."""
    known = calibrate(labelled(2000), RECIPE)
    data = labelled(200, absent=False)
    again = recalibrate(data, known)
    assert again.present == known.present and again.right != known.right


def test_a_new_domain_never_turns_the_order_around():
    data = labelled(200)
    backwards = LabelledSignals(data.signals, ~data.right, np.ones(200, dtype=bool), data.images)
    again = recalibrate(backwards, Calibration(RECIPE, Logistic(-1.0, {"gain": 0.3})))
    assert again.right.weights["gain"] == 0
    assert again.right.probability(data.signals[0]) == pytest.approx(backwards.right.mean())


def test_a_signal_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no signal question"):
        recalibrate(labelled(100), Calibration(RECIPE, Logistic(0.0, {"question": 1.0})))


def test_right_is_an_overlap_of_a_half_with_any_true_box():
    sample = Sample("a.png", "the dogs", boxes=((0, 0, 2, 2), (8, 8, 10, 10)))
    assert is_right(sample, (8, 8, 10, 9)) and not is_right(sample, (0, 0, 10, 10))
    assert not is_right(Sample("a.png", "the dog", absent=True), (0, 0, 1, 1))


def claim(confidence, right=False, present=True, absent=False, presence=None, image="a", text="the dog"):
    return Claim(confidence, presence, True, absent, right, present, image, text)


CLAIMS = [
    claim(0.9, right=True, presence=0.9, image="a"),
    claim(0.7, presence=0.6, image="a"),
    claim(0.8, right=True, presence=0.3, absent=True, image="b"),
    claim(0.2, present=False, presence=0.2, absent=True, image="b"),
    claim(0.6, present=False, presence=0.7, image="c"),
]


def test_the_block_by_hand():
    found = confidence_metrics(CLAIMS)
    assert (found["num_answers"], found["num_absent"], found["num_right"], found["calibrated"]) == (
        5,
        2,
        2,
        True,
    )
    # of confidence / presence, among the three that are present: 1 and 0.8 / 0.3 against 0.7 / 0.6
    assert found["auroc_right"] == 0.5
    assert found["auroc_useful"] == 1.0
    assert found["auroc_present"] == pytest.approx(4 / 6, abs=1e-6)  # .9 .6 .3 against .2 .7
    assert found["n_acc"] == 0.5 and found["t_acc"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["aurc"] == pytest.approx(np.mean([0, 0, 1 / 3, 2 / 4, 3 / 5]), abs=1e-6)
    assert found["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.2 + 0.6) / 5, abs=1e-6)
    assert 0 < found["ece_by_chance_interval"][0] < found["ece_by_chance"] < 0.5
    assert found["risk_coverage"] == [[0.2, 0], [0.4, 0], [0.6, 0.333333], [0.8, 0.5], [1.0, 0.6]]
    assert found["reliability"][0] == [0.2, 0.0, 1] and "text_only" not in found


def test_what_cannot_be_said_is_left_out():
    found = confidence_metrics([claim(0.9, right=True), claim(0.7, right=True)])
    assert not {"auroc_right", "auroc_present", "auroc_useful", "n_acc", "t_acc"} & found.keys()
    assert confidence_metrics([claim(None)]) == {} == confidence_metrics([])


def test_images_are_resampled_whole():
    """Two images whose expressions all agree: resampled by image, the share of wrong ones is 0, 1/2 or 1."""
    claims = [claim(0.5, right=i < 50, image=f"{i // 50}") for i in range(100)]
    assert confidence_metrics(claims, by_image=True)["aurc_interval"] == [0.0, 1.0]
    low, high = confidence_metrics(claims)["aurc_interval"]
    assert 0.3 < low < high < 0.7


def test_words_that_give_absence_away_are_found_out():
    texts = [f"the {'unicorn' if i % 2 else 'dog'} on the {i % 7}" for i in range(60)]
    present, images = [not i % 2 for i in range(60)], [f"{i}" for i in range(60)]
    found = predict_presence_from_text(texts, present, images)
    assert found is not None and ((found > 0.5) == present).all()
    rng = np.random.default_rng(0)
    blind = predict_presence_from_text(["the dog"] * 60, rng.random(60) < 0.5, images)
    assert blind is not None and np.ptp(blind) < 0.2
    assert predict_presence_from_text(texts, present, ["a"] * 60) is None
    assert predict_presence_from_text(texts[:6], present[:6], images[:6]) is None


def test_an_expression_is_judged_without_its_image():
    """The same words on one image are all present, on the others absent: without that image they are absent."""
    images = [f"{i // 10}" for i in range(60)]
    texts = [f"word{image}" for image in images]
    found = predict_presence_from_text(texts, [image in "012" for image in images], images)
    assert found is not None and ((found > 0.4) & (found < 0.6) | (found == 0.5)).mean() > 0.3


def test_the_figure_shows_points_and_numbers(tmp_path):
    trust = confidence_metrics(CLAIMS)
    figure = figures.plot_confidence(trust, tmp_path / "c.png")
    left, right = figure.axes
    assert f"{trust['ece']:.3f}" in left.get_title(loc="left")
    assert f"{trust['aurc']:.3f}" in right.get_title(loc="left")
    (marks,) = left.collections[-1:]
    assert marks.get_offsets().tolist() == [bin[:2] for bin in trust["reliability"]]
    assert Image.open(tmp_path / "c.png").size[0] > 800
    assert "uncalibrated" in figures.plot_confidence({**trust, "calibrated": False}).axes[0].get_xlabel()
