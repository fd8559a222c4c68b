"""Signals and probabilities by hand, and calibration.json: what is refused and why."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_maps import small_maps

from localization_heads.cells import mean_box_iou
from localization_heads.errors import UsageError
from localization_heads.grounding.confidence import (
    MODEL_SIGNALS,
    Calibration,
    Logistic,
    add_confidence,
    entropy,
    signals,
    single_head_boxes,
)
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions

PLAIN = GroundingOptions(sigma=0.0)
HEADS = [Head(0, 0), Head(0, 1)]


def maps(*rows, **more):
    """Each row is a head's map of 1 x 4 cells."""
    return small_maps(*([row] for row in rows), **more)


def test_signals_by_hand():
    seen = maps([4, 0, 0, 0], [2, 2, 0, 0])
    found = ground_maps(seen, HEADS, PLAIN)  # (6, 2, 0, 0), mean 2: the first cell
    assert found.box == (0, 0, 10, 10)
    assert single_head_boxes(seen, found, PLAIN) == ((0, 0, 10, 10), (0, 0, 20, 10))
    given_ = signals(seen, found, PLAIN)
    assert given_ == pytest.approx(
        {
            "mass": 0.75,
            "density": math.log(3),
            "entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4),
            "peak": math.log(3),
            "agreement": 0.75,
            "overlap": math.sqrt(0.5),
            "gain": 0.75,
            "attention L0H0": math.log(4),
            "attention L0H1": math.log(4),
        }
    )


def test_signals_of_answers_and_other_expressions_by_hand():
    seen = maps([1, 0, 0, 0], [1, 0, 0, 0], answer=np.array([[[[1, 1, 0, 0]], [[1, 1, 0, 0]]]], np.float32))
    found = signals(seen, ground_maps(seen, HEADS, PLAIN), PLAIN)
    assert found["answer"] == pytest.approx(math.sqrt(0.5))
    seen = maps(
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        others=(maps([0, 0, 1, 0], [0, 0, 1, 0]), maps([1, 0, 0, 1], [1, 0, 0, 1])),
    )
    box = ground_maps(seen, HEADS, PLAIN)
    found = signals(seen, replace(box, mask_overlap=0.5), PLAIN)
    assert found["gain"] == pytest.approx(1 - (0 + 0.5) / 2)
    assert found["divergence"] == pytest.approx(1 - (0 + math.sqrt(0.5)) / 2)
    assert found["mask"] == 0.5 and "question" not in found
    asked = replace(seen, presence_logit=-2.5, statement_logit=1.5, answer_logprob=-0.25, expression_logprob=-3.0)
    found = signals(asked, box, PLAIN)
    assert [found[name] for name in MODEL_SIGNALS] == [-2.5, 1.5, -0.25, -3.0] and "mask" not in found
    mask_box = replace(box, box=(20, 0, 40, 10))  # not the map's own, in which the gain is measured
    found = signals(seen, mask_box, PLAIN, map_box=(0, 0, 20, 10))
    assert found["gain"] == pytest.approx(1 - (0 + 0.5) / 2) and found["mass"] == 0


def test_a_head_without_positive_cells_has_no_agreement():
    seen = maps([4, 0, 0, 0], [1, 1, 1, 1])
    found = ground_maps(seen, HEADS, PLAIN)
    assert single_head_boxes(seen, found, PLAIN)[1] is None
    assert mean_box_iou(found.box, single_head_boxes(seen, found, PLAIN)) == 0.5


def test_a_map_without_attention_has_signals():
    seen = maps([0, 0, 0, 0], [0, 0, 0, 0])
    found = signals(seen, ground_maps(seen, HEADS, PLAIN), PLAIN)
    assert found["mass"] == 0 and found["entropy"] == 1 and all(map(math.isfinite, found.values()))
    assert entropy(np.array([3.0])) == 1.0


RECIPE = {"model": "embedded", "heads": [[0, 0]], "grounding": {"sigma": 0.5}}
CALIBRATION = Calibration(RECIPE, Logistic(-1.0, {"mass": 2.0}), Logistic(0.0, {"mass": 1.0}), 40, {"auroc": 0.9})


def test_probabilities_by_hand():
    seen = maps([4, 0, 0, 0], [2, 2, 0, 0])
    found = ground_maps(seen, HEADS, PLAIN)
    raw = add_confidence(found, {"agreement": 0.4, "mass": 0.75}, None)
    assert (raw.confidence, raw.presence, raw.calibrated) == (0.4, None, False)
    sure = add_confidence(found, {"mass": 0.75}, CALIBRATION)
    there, right = 1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(-0.5))
    assert sure.presence == pytest.approx(there) and sure.calibrated
    assert sure.confidence == pytest.approx(there * right)
    alone = add_confidence(found, {"mass": 0.75}, replace(CALIBRATION, present=None))
    assert alone.presence is None and alone.confidence == pytest.approx(right)
    assert add_confidence(found, {"entropy": 0.5}, CALIBRATION).confidence is None
    assert Logistic(1e9, {}).probability({}) == 1.0 and Logistic(-1e9, {}).probability({}) < 1e-200


def test_a_calibration_survives_json():
    assert Calibration.from_json(json.loads(json.dumps(CALIBRATION.to_json()))) == CALIBRATION


def test_another_recipe_is_refused_by_name():
    CALIBRATION.check(dict(RECIPE))
    with pytest.raises(
        UsageError, match=r"c\.json was fitted with grounding \{'sigma': 0.5\}, heads \[\[0, 0\]\]: run"
    ):
        CALIBRATION.check({**RECIPE, "heads": [[1, 1]], "grounding": {"sigma": 1.0}}, "c.json")
    with pytest.raises(UsageError, match="query_token None"):
        CALIBRATION.check({**RECIPE, "query_token": "last"})
    assert CALIBRATION.differences({**RECIPE, "zoom": True, "heads": []}) == ["heads", "zoom"]


def test_signals_that_the_calibration_needs_are_no_difference():
    asking, not_asking = ({**RECIPE, "signals": asks} for asks in (True, False))
    assert not replace(CALIBRATION, recipe=asking).differences(not_asking)
    assert replace(CALIBRATION, recipe=not_asking).differences(asking) == ["signals"]
    assert replace(CALIBRATION, recipe=asking).needs_model_signals
    assert not replace(CALIBRATION, recipe=not_asking).needs_model_signals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "of version 1, and this release reads 2: run stage=calibrate again"),
        ({"version": True}, "version"),
        *(({"right": right}, "wrong kind") for right in (
            None, {"intercept": 0, "weights": {"mass": "x"}}, {"intercept": math.inf, "weights": {}},
        )),
        ({"recipe": 3}, "wrong kind"),
        *((key, f"'{key}' is missing") for key in CALIBRATION.to_json()),
    ],
)  # fmt: skip
def test_an_invalid_calibration_is_refused(change, said):
    data = CALIBRATION.to_json()
    if isinstance(change, str):
        del data[change]
    else:
        data |= change
    with pytest.raises(UsageError, match=said):
        Calibration.from_json(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_other_json_is_a_usage_error(value):
    with pytest.raises(UsageError):
        Calibration.from_json(value)
