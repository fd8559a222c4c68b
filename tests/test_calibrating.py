"""Fitting calibrations, and the confidence block of `metrics.json`: hand-computed values and scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

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
    """Right with probability `sigmoid(3 gain - 1 + shift)`, with `gain` standard normal; `agreement` is noise.

    Half of the wrong entries are absent, which doubles the odds of the others: log 2 more.
    """
    rng = np.random.default_rng(seed)
    gain, noise = rng.normal(size=(2, count))
    right = rng.random(count) < 1 / (1 + np.exp(-(3 * gain - 1 + shift)))
    present = right | (rng.random(count) < 0.5) if absent else np.ones(count, dtype=bool)
    pairs = zip(gain.tolist(), noise.tolist(), strict=True)
    signals = [{"gain": 10 * g, "agreement": n, "peak": 7.0} for g, n in pairs]
    return LabelledSignals(signals, right, present, [f"{i // 2}.png" for i in range(count)])


def test_a_fit_recovers_the_weights_in_the_signals_own_units():
    calibration = calibrate(labelled(4000), RECIPE)
    right, present = calibration.right, calibration.present
    assert right.weights["gain"] == pytest.approx(0.3, rel=0.1)
    assert abs(right.weights["agreement"]) < 0.15
    assert right.intercept == pytest.approx(-1 + math.log(2), abs=0.2)
    assert calibration.recipe == RECIPE and calibration.num_labels == 4000
    assert present is not None and set(present.weights) == {"gain", "agreement"}  # the peak is constant


def test_a_fit_maximises_the_penalised_likelihood():
    """Against scipy on the same function of standardised signals."""
    data = labelled(100, absent=False)
    table = np.array([[row["gain"], row["agreement"]] for row in data.signals])
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    sign = np.where(data.right, 1, -1)

    def loss(w):
        return np.logaddexp(0, -sign * (scaled @ w[:2] + w[2])).sum() + 0.5 * (w[:2] ** 2).sum()

    best = minimize(loss, np.zeros(3)).x
    right = calibrate(data, RECIPE).right
    assert right.weights["gain"] == pytest.approx(best[0] / table.std(axis=0)[0], rel=1e-2)
    probabilities = 1 / (1 + np.exp(-(scaled @ best[:2] + best[2])))
    assert [right.probability(row) for row in data.signals] == pytest.approx(probabilities.tolist(), abs=2e-3)


def test_metrics_are_cross_validated():
    """On random labels, metrics on the training entries would be better than chance."""
    rng = np.random.default_rng(1)
    signals = [{f"attention {i}": float(v) for i, v in enumerate(rng.normal(size=20))} for _ in range(80)]
    right = rng.random(80) < 0.5
    noise = LabelledSignals(signals, right, right, [f"{i}" for i in range(80)])
    measured = calibrate(noise, RECIPE).measured
    low, _ = measured["auroc_present_interval"]
    assert measured["auroc_present"] < 0.65 and low < 0.5
    good = calibrate(labelled(), RECIPE).measured
    assert good["auroc_useful"] > 0.85 and good["auroc_right"] > 0.7 and good["ece"] < 0.12
    assert {"auroc_present", "ece_present", "ece_by_chance", "aurc_interval"} <= good.keys()
    assert good["num_right"] + good["num_wrong"] == 400


def test_with_few_images_there_are_only_counts():
    data = replace(labelled(100), images=["a.png"] * 100)
    assert set(calibrate(data, RECIPE).measured) == {"num_right", "num_wrong", "num_absent"}


def test_too_few_labels_are_an_error_with_counts():
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


def test_presence_is_fitted_only_with_absent_entries():
    assert calibrate(labelled(100, absent=False), RECIPE).present is None


def test_fifty_labels_adapt_a_calibration_to_a_new_domain():
    known = calibrate(labelled(2000), RECIPE)
    adapted = recalibrate(labelled(50, shift=3.0, seed=5), known)
    assert adapted.num_labels == 50 and adapted.signal_names == known.signal_names
    test = labelled(2000, shift=3.0, seed=6)
    accuracy = test.right.mean()
    before, after = (np.mean([c.confidence(row) for row in test.signals]) for c in (known, adapted))
    assert abs(after - accuracy) < 0.1 < abs(before - accuracy)


def test_recalibration_maximises_two_penalised_likelihoods_in_turn():
    """Against scipy on both functions as the docstring states them."""
    data = labelled(60, shift=1.0, seed=3, absent=False)
    known = Logistic(-0.5, {"gain": 0.2, "agreement": 0.3})
    table = np.array([[row["gain"], row["agreement"]] for row in data.signals])
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    logits = table @ [0.2, 0.3] - 0.5
    sign = np.where(data.right, 1, -1)

    def first(v):
        return np.logaddexp(0, -sign * (v[0] * logits + v[1])).sum() + 1.5 * ((v[0] - 1) ** 2 + v[1] ** 2)

    slope, shift = minimize(first, [1.0, 0.0]).x

    def second(v):
        adapted = slope * logits + shift + scaled @ v[:2] + v[2]
        return np.logaddexp(0, -sign * adapted).sum() + 5 * (v[:2] ** 2).sum() + 1.5 * v[2] ** 2

    best = minimize(second, np.zeros(3)).x
    expected = 1 / (1 + np.exp(-(slope * logits + shift + scaled @ best[:2] + best[2])))
    right = recalibrate(data, Calibration(RECIPE, known)).right
    assert [right.probability(row) for row in data.signals] == pytest.approx(expected.tolist(), abs=1e-3)
    assert abs(best[:2]).min() > 0.01 and slope != pytest.approx(1, abs=0.01)


def test_a_regression_without_labels_of_both_classes_stays():
    known = calibrate(labelled(2000), RECIPE)
    adapted = recalibrate(labelled(200, absent=False), known)
    assert adapted.present == known.present and adapted.right != known.right


def test_recalibration_never_reverses_the_order():
    data = labelled(200)
    reversed_ = replace(data, right=~data.right, present=np.ones(200, dtype=bool))
    right = recalibrate(reversed_, Calibration(RECIPE, Logistic(-1.0, {"gain": 0.3}))).right
    assert right.weights["gain"] == 0
    assert right.probability(data.signals[0]) == pytest.approx(reversed_.right.mean())


def test_a_missing_signal_is_named():
    with pytest.raises(UsageError, match="no signal question"):
        recalibrate(labelled(100), Calibration(RECIPE, Logistic(0.0, {"question": 1.0})))


def test_a_box_is_right_from_an_iou_of_one_half_with_any_true_box():
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


def test_confidence_metrics_by_hand():
    found = confidence_metrics(CLAIMS)
    assert found["calibrated"] is True
    assert [found[f"num_{name}"] for name in ("answers", "absent", "right")] == [5, 2, 2]
    # confidence / presence of the three present ones: 1 and 0.8 / 0.3 are right, 0.7 / 0.6 is wrong
    assert found["auroc_right"] == 0.5
    assert found["auroc_useful"] == 1.0
    assert found["auroc_present"] == pytest.approx(4 / 6, abs=1e-6)  # presence .9 .6 .3 against .2 .7
    assert found["n_acc"] == 0.5 and found["t_acc"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["aurc"] == pytest.approx(np.mean([0, 0, 1 / 3, 2 / 4, 3 / 5]), abs=1e-6)
    assert found["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.2 + 0.6) / 5, abs=1e-6)
    assert 0 < found["ece_by_chance_interval"][0] < found["ece_by_chance"] < 0.5
    assert found["risk_coverage"] == [[0.2, 0], [0.4, 0], [0.6, 0.333333], [0.8, 0.5], [1.0, 0.6]]
    assert found["reliability"][0] == [0.2, 0.0, 1] and "text_only" not in found


def test_undefined_metrics_are_omitted():
    found = confidence_metrics([claim(0.9, right=True), claim(0.7, right=True)])
    assert not {"auroc_right", "auroc_present", "auroc_useful", "n_acc", "t_acc"} & found.keys()
    assert confidence_metrics([claim(None)]) == {} == confidence_metrics([])


def test_images_are_resampled_as_a_whole():
    """With one image all right and one all wrong, the share of wrong answers is 0, 1/2 or 1."""
    claims = [claim(0.5, right=i < 50, image=f"{i // 50}") for i in range(100)]
    assert confidence_metrics(claims, by_image=True)["aurc_interval"] == [0.0, 1.0]
    low, high = confidence_metrics(claims)["aurc_interval"]
    assert 0.3 < low < high < 0.7


def test_presence_is_predicted_from_words():
    texts = [f"the {'unicorn' if i % 2 else 'dog'} on the {i % 7}" for i in range(60)]
    present, images = [not i % 2 for i in range(60)], [f"{i}" for i in range(60)]
    predicted = predict_presence_from_text(texts, present, images)
    assert predicted is not None and ((predicted > 0.5) == present).all()
    rng = np.random.default_rng(0)
    predicted = predict_presence_from_text(["the dog"] * 60, rng.random(60) < 0.5, images)
    assert predicted is not None and np.ptp(predicted) < 0.2
    assert predict_presence_from_text(texts, present, ["a"] * 60) is None
    assert predict_presence_from_text(texts[:6], present[:6], images[:6]) is None


def test_presence_is_predicted_without_the_image_of_the_expression():
    """The words of each image occur nowhere else, so that they predict nothing once it is held out."""
    images = [f"{i // 10}" for i in range(60)]
    texts = [f"word{image}" for image in images]
    predicted = predict_presence_from_text(texts, [image in "012" for image in images], images)
    assert predicted is not None and ((predicted > 0.4) & (predicted < 0.6)).mean() > 0.3


def test_the_figure_shows_the_metrics(tmp_path):
    block = confidence_metrics(CLAIMS)
    figure = figures.plot_confidence(block, tmp_path / "c.png")
    left, right = figure.axes
    assert f"{block['ece']:.3f}" in left.get_title(loc="left")
    assert f"{block['aurc']:.3f}" in right.get_title(loc="left")
    (points,) = left.collections[-1:]
    assert points.get_offsets().tolist() == [bin[:2] for bin in block["reliability"]]
    assert Image.open(tmp_path / "c.png").size[0] > 800
    assert "uncalibrated" in figures.plot_confidence({**block, "calibrated": False}).axes[0].get_xlabel()
