"""Scores of single predictions and their summary: hand-computed values and a plain loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.attention import AttentionMaps
from localization_heads.evaluation.scores import (
    METRICS,
    Score,
    Truth,
    score_box,
    score_grounding,
    summarize,
)
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions

HIT, MISS = Score(1.0, True, 0.75, (8, 8)), Score(0.0, False, 0.25, (0, 8))


def ground_values(values: list[list[float]]) -> Grounding:
    """Ground an unsmoothed map over an image of 4 x 4 pixels."""
    attention = np.array(values, np.float32)[None, None]
    maps = AttentionMaps(attention, (0.0, 0.0, 4.0, 4.0), (4, 4))
    return ground_maps(maps, [Head(0, 0)], GroundingOptions(kernel_size=1))


def fill(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((4, 4), bool)
    mask[y0:y1, x0:x1] = True
    return mask


class TestSinglePrediction:
    def test_grounding_by_hand(self) -> None:
        grounding = ground_values([[7, 1], [1, 1]])  # the upper left quarter with 7/10 of the mass
        truth = Truth((0, 0, 4, 2), fill(1, 0, 4, 2))
        assert score_grounding(grounding, truth) == Score(0.5, True, pytest.approx(0.8), (2, 8))
        assert score_grounding(grounding, Truth((2, 2, 4, 4))) == Score(0, False, pytest.approx(0.1), None)

    def test_box_by_hand(self) -> None:
        truth = Truth((0, 0, 4, 2), fill(0, 0, 4, 2))
        assert score_box((0, 0, 2, 4), truth, (4, 4)) == Score(pytest.approx(1 / 3), False, 0.5, (4, 12))
        assert score_box((1, 0, 3, 2), truth, (4, 4)) == Score(0.5, True, 1.0, (4, 8))

    def test_a_missing_box_adds_the_true_mask_to_the_union(self) -> None:
        assert score_box(None, Truth((0, 0, 2, 2), fill(0, 0, 2, 2)), (4, 4)) == Score(0, False, 0, (0, 4))
        assert score_box(None, Truth((0, 0, 2, 2)), (4, 4)) == Score(0, False, 0, None)

    def test_a_box_is_scored_as_a_uniform_map_inside_it(self) -> None:
        """The left half of the image, as a box and as a map."""
        truth = Truth((1, 0, 3, 3), fill(1, 0, 3, 3))
        as_map = score_grounding(ground_values([[1, 0], [1, 0]]), truth)
        as_box = score_box((0, 0, 2, 4), truth, (4, 4))
        assert as_box._replace(pointing=as_map.pointing) == as_map

    @pytest.mark.parametrize("score", [HIT, MISS, Score(1 / 3, True, 0.1)])
    def test_json_round_trip(self, score: Score) -> None:
        assert Score.from_json(json.loads(json.dumps(score))) == score


class TestSummary:
    def test_by_hand(self) -> None:
        first, second = Score(0.8, True, 0.5, (1, 2)), Score(0.5, True, 0.7, (3, 4))
        without_masks = Score(0.3, False, 0.1), Score(0.0, False, 0.3)
        scores = [[score] for score in (first, second, *without_masks)]
        summary = summarize({"heads": scores})["heads"]
        values = {name: value for name, value in summary.items() if not name.endswith("_interval")}
        assert values == {
            "acc@0.5": 0.5, "acc@0.25": 0.75, "acc@0.75": 0.25, "acc@0.9": 0.0, "macc": 0.2,
            "mean_iou": 0.4, "pointing": 0.5, "energy": 0.4, "ciou": 0.666667, "giou": 0.625,
        }  # fmt: skip
        assert summary["acc@0.5_interval"] == [0.0, 1.0]
        assert summary["ciou_interval"] == [0.5, 0.75]  # either sample alone, or both

    def test_several_predictions_are_averaged_per_expression(self) -> None:
        """Four draws for one expression do not count as four expressions."""
        draws = [[HIT, HIT, HIT, MISS], [MISS]]
        summary = summarize({"heads": draws})["heads"]
        assert summary["acc@0.5"] == summary["mean_iou"] == 0.375
        assert summary["giou"] == 0.375
        assert summary["ciou"] == pytest.approx((6 + 0) / 16)
        assert summary["acc@0.5_interval"] == [0.0, 0.75]

    def test_the_difference_is_paired(self) -> None:
        """A constant difference of 0.1 has an interval of zero width, however much the samples vary."""
        rng = np.random.default_rng(0)
        ious = rng.random(40) * 0.9
        methods = {
            "heads": [[Score(iou + 0.1, True, 0.5)] for iou in ious],
            "other": [[Score(iou, False, 0.5)] for iou in ious],
        }
        summary = summarize(methods)
        assert summary["other"]["difference"]["mean_iou"] == pytest.approx([0.1, 0.1, 0.1])
        assert summary["other"]["difference"]["pointing"] == [1, 1, 1]
        assert "difference" not in summary["heads"]
        low, high = summary["other"]["mean_iou_interval"]
        assert high - low > 0.1

    @pytest.mark.parametrize(
        ("overlaps", "ciou", "giou"),
        [
            ([(0, 0)], 1, 1),  # both empty
            ([(0, 0), (8, 8)], 1, 1),
            ([(0, 0), (0, 5), (0, 3)], 0, 1 / 3),  # both empty, a false positive, a miss
        ],
    )
    def test_two_empty_masks_agree(self, overlaps: list[tuple[int, int]], ciou: float, giou: float) -> None:
        summary = summarize({"a": [[Score(0, False, 0, overlap)] for overlap in overlaps]})["a"]
        assert (summary["ciou"], summary["giou"]) == pytest.approx((ciou, giou), abs=1e-6)

    def test_without_masks_there_is_no_ciou(self) -> None:
        assert set(summarize({"a": [[Score(0.5, True, 1)]]})["a"]) == {
            name + end for name in METRICS if name not in ("ciou", "giou") for end in ("", "_interval")
        }

    def test_groups_are_resampled_as_a_whole(self) -> None:
        """With one image all right and one all wrong, the interval over expressions is narrower."""
        scores, images = [[HIT]] * 20 + [[MISS]] * 20, ["a.png"] * 20 + ["b.png"] * 20
        assert summarize({"a": scores}, groups=images)["a"]["acc@0.5_interval"] == [0.0, 1.0]
        low, high = summarize({"a": scores})["a"]["acc@0.5_interval"]
        assert 0.3 < low < 0.5 < high < 0.7

    def test_is_json_and_deterministic(self) -> None:
        ious = np.random.default_rng(0).random((30, 2)).tolist()
        methods = {name: [[Score(iou[i], True, 0.5)] for iou in ious] for i, name in enumerate(("heads", "other"))}
        text = json.dumps(summarize(methods, seed=3), allow_nan=False)
        assert text == json.dumps(summarize(methods, seed=3), allow_nan=False)
        assert text != json.dumps(summarize(methods, seed=4), allow_nan=False)

    @given(
        st.lists(
            st.tuples(st.floats(0, 1), st.booleans(), st.floats(0, 1), st.integers(0, 9), st.integers(0, 9)),
            min_size=1,
            max_size=12,
        )
    )
    def test_agrees_with_a_plain_loop(self, rows: list[tuple[float, bool, float, int, int]]) -> None:
        scores = [Score(iou, hit, energy, (shared, shared + more)) for iou, hit, energy, shared, more in rows]
        summary = summarize({"a": [[score] for score in scores]})["a"]

        def mean(value: Callable[[Score], float]) -> float:
            return sum(value(score) for score in scores) / len(scores)

        shared, unions = zip(*(score.overlap or (0, 0) for score in scores), strict=True)
        expected = {
            **{f"acc@{t}": mean(lambda s, t=t: s.iou >= t) for t in (0.25, 0.5, 0.75, 0.9)},
            "macc": mean(lambda s: sum(100 * s.iou >= at for at in range(50, 100, 5)) / 10),
            "mean_iou": mean(lambda s: s.iou),
            "pointing": mean(lambda s: s.pointing),
            "energy": mean(lambda s: s.energy),
            "ciou": sum(shared) / sum(unions) if sum(unions) else 1,
            "giou": sum(i / u if u else 1 for i, u in zip(shared, unions, strict=True)) / len(scores),
        }
        for name, value in expected.items():
            assert math.isclose(summary[name], value, abs_tol=1e-6), name
            low, high = summary[f"{name}_interval"]
            assert 0 <= low <= high <= 1
