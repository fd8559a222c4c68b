"""The benchmarks' own metrics: hand-computed values, and plain implementations."""

from __future__ import annotations

import numpy as np
import pytest

from localization_heads.apps.scores import protocol_table
from localization_heads.evaluation.protocols import (
    PROTOCOLS,
    Answer,
    merged_box,
    protocol_metrics,
    protocol_of,
    size_class,
)

TRUE = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)  # IoU exactly 0.5
MOST = (0.0, 0.0, 10.0, 9.6)
OFF = (50.0, 50.0, 60.0, 60.0)


def answer(box=None, *truths, **more):
    facts = more.pop("facts", {})
    return Answer(() if box is None else (box,), truths, facts=facts, **more)


def test_the_protocol_is_the_one_that_all_entries_name():
    assert protocol_of([{"protocol": "ref-l4"}] * 3) == "ref-l4"
    assert protocol_of([{"protocol": "ref-l4"}, {"protocol": "unc"}]) is None
    for facts in ([{"protocol": "of my own"}], [{"protocol": 3}], []):
        assert protocol_of(facts) is None


def test_every_protocol_accepts_an_empty_data_set():
    for name, right in PROTOCOLS.items():
        assert protocol_metrics(name, []) == {"name": name, "right": right, "num_answers": 0}


def test_ref_l4_is_strict_and_groups_by_size():
    large = (0.0, 0.0, 300.0, 300.0)
    found = protocol_metrics(
        "ref-l4", [answer(HALF, TRUE), answer(MOST, TRUE), answer(large, large), answer(None, TRUE)]
    )
    assert found["acc>0.5"] == 0.5 and found["acc>0.9"] == 0.5 and found["acc>0.75"] == 0.5
    assert found["acc>0.5[small]"] == pytest.approx(1 / 3, abs=1e-6) and found["acc>0.5[large]"] == 1.0
    # 0.96 is above each of 0.5, ..., 0.95; so is 1
    assert found["macc>"] == 0.5 and "acc>0.5[medium]" not in found
    assert protocol_metrics("unc", [answer(HALF, TRUE)])["num_answers"] == 1


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (127, 129, "small"),
        (128, 128, "medium"),
        (512, 128, "medium"),
        (512, 129, "large"),
        (1, 4000, "small"),
    ],
)
def test_size_classes_by_hand(width, height, size):
    assert size_class((5, 5, 5 + width, 5 + height)) == size


def test_screenspot_counts_centres_in_the_box_edges_included():
    facts = [
        {"data_type": "icon", "platform": "mobile"},
        {"data_type": "text", "platform": "web"},
        {"data_type": "icon"},
    ]
    answers = [
        answer((5, 5, 15, 15), TRUE, peak=False, facts=facts[0]),  # its centre is the corner (10, 10)
        answer((0, 0, 40, 8), TRUE, peak=True, facts=facts[1]),  # its centre is (20, 4)
        answer(None, TRUE, peak=True, rejected=True, facts=facts[2]),
    ]
    found = protocol_metrics("screenspot", answers)
    assert found["point_in_box"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["peak_in_box"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["point_in_box[icon]"] == 0.5 and found["point_in_box[text]"] == 0.0
    assert found["point_in_box[mobile]"] == 1.0 and found["point_in_box[web]"] == 0.0


def test_grefcoco_by_hand():
    answers = [
        Answer((TRUE, OFF), (OFF, TRUE)),  # perfect
        Answer((TRUE,), (OFF, TRUE)),  # F1 2/3
        Answer((), ()),  # perfect: correctly empty
        Answer((TRUE,), ()),
        Answer((), (TRUE,)),
    ]
    found = protocol_metrics("grefcoco", answers)
    assert found["pr@f1=1"] == 0.4 and found["n_acc"] == 0.5
    assert found["t_acc"] == pytest.approx(2 / 3, abs=1e-6)
    assert "giou" not in found


def test_gres_masks_by_hand():
    """A correctly empty mask has an IoU of 1; pixels predicted for an empty target add to the union only."""
    overlaps = [(8, 10), (0, 0), (0, 5), (0, 20)]
    truths = [(OFF, TRUE), (), (), (TRUE,)]
    boxes = [(TRUE, OFF), (), (TRUE,), ()]
    answers = [Answer(*both, overlap=overlap) for *both, overlap in zip(boxes, truths, overlaps, strict=True)]
    found = protocol_metrics("grefcoco", answers)
    assert found["giou"] == pytest.approx((0.8 + 1 + 0 + 0) / 4)
    assert found["ciou"] == pytest.approx(8 / (10 + 5 + 20), abs=1e-6)
    assert "giou" not in protocol_metrics("grefcoco", [answers[1], answers[2]])


@pytest.mark.parametrize("seed", range(3))
def test_class_means_of_ref_l4_in_plain_loops(seed):
    random = np.random.default_rng(seed)
    names = ["o365_1", "o365_2", "refcoco_37", None]
    answers = [
        answer(box, TRUE, facts={"category": names[kind]} if names[kind] else {})
        for box, kind in ((([HALF, MOST, OFF][i]), k) for i, k in random.integers(0, [3, 4], (30, 2)))
    ]
    found = protocol_metrics("ref-l4", answers)
    accuracies, mean_accuracies = [], []
    for name in names[:3]:
        ious = [one.iou for one in answers if one.facts.get("category") == name]
        accuracies.append(np.mean([iou > 0.5 for iou in ious]))
        mean_accuracies.append(np.mean([iou > t / 100 for t in range(50, 100, 5) for iou in ious]))
    assert found["acc>0.5[class mean]"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert found["macc>[class mean]"] == pytest.approx(np.mean(mean_accuracies), abs=1e-6)


def test_flickr30k_distinguishes_any_box_and_merged_box():
    left, right = (0.0, 0.0, 10.0, 10.0), (30.0, 0.0, 40.0, 10.0)
    around = (0.0, 0.0, 40.0, 10.0)
    assert merged_box([right, left]) == around
    answers = [
        answer(left, left, right, facts={"phrase_type": "people"}),  # any
        answer(around, left, right, facts={"phrase_type": "people"}),  # merged
        answer(left, left, facts={"phrase_type": "scene"}),  # both
    ]
    found = protocol_metrics("flickr30k", answers)
    assert found["any_box"] == found["merged_box"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["any_box[people]"] == 0.5 and found["merged_box[scene]"] == 1.0


def test_groundingme_counts_an_empty_answer_as_wrong_unless_it_rejects():
    first, second = {"subtask_l1": "Rejection", "subtask_l2": "Color"}, {"subtask_l1": "Limited"}
    answers = [
        answer(None, facts=first, rejected=True),
        answer(None, facts=first),  # an empty answer
        answer(OFF, facts=first),
        answer(HALF, TRUE, facts=second),
        answer(None, TRUE, facts=second, rejected=True),
    ]
    found = protocol_metrics("groundingme", answers)
    assert found["acc@0.5"] == 0.4 and found["acc@0.9"] == 0.2
    assert found["acc@0.5[Rejection]"] == pytest.approx(1 / 3, abs=1e-6) == found["acc@0.5[Rejection/Color]"]
    assert found["acc@0.5[Limited]"] == 0.5


def positive(number, confidence, box=TRUE, level=1):
    return answer(box, TRUE, confidence=confidence, facts={"source_id": number, "level": level})


def negative(of, confidence, kind="attribute"):
    facts = {"positive_id": str(of), "negative_cate": "text", "negative_type": kind, "negative_level": 1}
    return answer(TRUE, confidence=confidence, facts=facts)


def test_finecops_by_hand():
    answers = [
        positive(1, 0.9), negative(1, 0.5), negative(1, 0.8), positive(2, 0.4, level=2), negative(2, 0.6),
        positive(3, 0.7, box=OFF), negative(3, 0.1, "object"),
    ]  # fmt: skip
    found = protocol_metrics("finecops-ref", answers)
    assert found["precision@1"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["precision@1[level 1]"] == 0.5 and found["precision@1[level 2]"] == 1.0
    # 1 outranks both of its negatives, 2 is outranked by one; 3 outranks its negative but has a wrong box
    assert found["recall@1[text attribute 1]"] == 0.5 and found["recall@5[text attribute 1]"] == 1.0
    assert found["recall@1[text object 1]"] == 0.0
    # 0.9, 0.4, 0.7 against 0.5, 0.8, 0.6, 0.1: 4 + 1 + 3 of 12 pairs
    assert found["auroc"] == pytest.approx(8 / 12, abs=1e-6)
    # attribute negatives only: 0.9, 0.4 against 0.5, 0.8, 0.6
    assert found["auroc[text attribute 1]"] == 0.5 and found["auroc[text object 1]"] == 1.0


def test_finecops_without_confidences_has_only_precision():
    found = protocol_metrics("finecops-ref", [positive(1, None), negative(1, None)])
    assert found["precision@1"] == 1.0 and not any(name.startswith(("auroc", "recall")) for name in found)


def test_recall_agrees_with_sorting_the_scores():
    """As in the benchmark's code: the positive is among the k highest of its pool, and its box is right."""
    rng = np.random.default_rng(1)
    answers, pools = [], []
    for number in range(60):
        score, others = rng.integers(0, 8) / 8, rng.integers(0, 8, rng.integers(1, 9)) / 8
        box = TRUE if rng.random() < 0.7 else OFF
        answers += [positive(number, score, box), *(negative(number, other) for other in others)]
        pools.append((score, sorted([score, *others], reverse=True), box == TRUE))
    found = protocol_metrics("finecops-ref", answers)
    for k in (1, 5, 10):
        expected = np.mean([score in pool[:k] and right for score, pool, right in pools])
        assert found[f"recall@{k}[text attribute 1]"] == pytest.approx(expected, abs=1e-6)


def test_reasonseg_scores_empty_targets_as_lisa_does():
    """An empty union has an IoU of 1; the cumulative sums include every image."""
    answers = [
        answer(TRUE, TRUE, overlap=(30, 60)),
        answer(None, overlap=(0, 0)),
        answer(TRUE, overlap=(0, 40)),
        answer(TRUE, TRUE),  # has no mask
    ]
    found = protocol_metrics("reasonseg", answers)
    assert found["giou"] == 0.5 and found["ciou"] == 0.3 and found["giou[empty]"] == 0.5


def test_intervals_contain_the_value_and_can_resample_images():
    rng = np.random.default_rng(0)
    answers = [answer(TRUE if rng.random() < 0.5 else OFF, TRUE, image=str(n // 10)) for n in range(100)]
    by_expression = protocol_metrics("ref-l4", answers)
    by_image = protocol_metrics("ref-l4", answers, by_image=True)
    for found in (by_expression, by_image):
        low, high = found["acc>0.5_interval"]
        assert low <= found["acc>0.5"] <= high
    assert by_expression["acc>0.5_interval"] != by_image["acc>0.5_interval"]


def test_the_number_of_kinds_is_limited():
    answers = [answer(TRUE, TRUE, facts={"data_type": f"kind {n}"}) for n in range(500)]
    assert sum("[" in name for name in protocol_metrics("screenspot", answers)) <= 2 * 40


def test_the_table_shows_the_protocol_and_every_metric():
    found = protocol_metrics("ref-l4", [answer(MOST, TRUE, facts={})])
    table = protocol_table(found)
    assert "ref-l4" in table.title and table.row_count == sum(name.endswith("_interval") for name in found)
    for without_metrics in ({}, protocol_metrics("unc", [answer(MOST, TRUE)])):
        assert protocol_table(without_metrics) is None
