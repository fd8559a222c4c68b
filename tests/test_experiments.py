"""Every experiment's numbers on a tiny made-up study, against an obvious second implementation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from localization_heads.attention import AttentionMaps
from localization_heads.cells import mask_coverage, visible_edges
from localization_heads.evaluation.head_iou import head_hits, map_ious
from localization_heads.evaluation.scores import Score, Truth
from localization_heads.experiments import paper
from localization_heads.experiments.catalogue import EXPERIMENTS
from localization_heads.experiments.paper import Finding, RungResult, Table, ladder_finding, percent
from localization_heads.experiments.selection import ELBOWS
from localization_heads.experiments.study import Study, StudyOptions, highest
from localization_heads.experiments.tables import criteria_recipes
from localization_heads.experiments.validation import (
    Recipe,
    RecipeScores,
    paired_difference,
    random_sets,
    score_recipes,
)
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head
from localization_heads.options.experiments import ExperimentOptions
from localization_heads.options.groups import CriteriaOptions, GroundingOptions

LAYERS, HEADS, GRID, CELL, SAMPLES = 4, 5, 6, 4, 14
SIZE = GRID * CELL
SHAPE = (LAYERS, HEADS)


def make_sample(seed: int) -> tuple[AttentionMaps, Truth]:
    """Heads of higher index attend more to the object, a rectangle of whole cells whose mask lacks one pixel."""
    rng = np.random.default_rng(seed)
    top, left = (int(value) for value in rng.integers(0, GRID - 2, 2))
    height, width = (int(value) for value in rng.integers(2, GRID - max(top, left) + 1, 2))
    attention = rng.random((LAYERS, HEADS, GRID, GRID)) * rng.random((LAYERS, HEADS, 1, 1))
    weight = np.arange(HEADS)[None, :, None, None] * rng.random((LAYERS, HEADS, 1, 1))
    attention[:, :, top : top + height, left : left + width] += weight
    attention /= attention.sum(axis=(2, 3), keepdims=True)
    attention *= np.linspace(0.05, 0.95, LAYERS * HEADS).reshape(LAYERS, HEADS, 1, 1)
    x0, y0, x1, y1 = (CELL * edge for edge in (left, top, left + width, top + height))
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y0:y1, x0:x1] = True
    mask[y0, x0] = False
    maps = AttentionMaps(attention.astype(np.float32), (0.0, 0.0, SIZE, SIZE), (SIZE, SIZE))
    return maps, Truth((float(x0), float(y0), float(x1), float(y1)), mask)


DATA = [make_sample(seed) for seed in range(SAMPLES)]


def make_study(**options: object) -> Study:
    found = [head_statistics(maps.attention) for maps, _ in DATA]
    return Study(
        model="made up",
        data="rectangles",
        sums=np.stack([one.attention_sum for one in found]),
        entropies=np.stack([one.spatial_entropy for one in found]),
        bottom_row=np.stack([one.bottom_row_focus for one in found]),
        ious=np.stack([map_ious(*sample) for sample in DATA]),
        hits=np.stack([head_hits(*sample) for sample in DATA]),
        num_masks=SAMPLES,
        options=StudyOptions(
            top_n=4,
            criteria=CriteriaOptions(exclude_layers=1),
            sweeps=ExperimentOptions(**options),  # type: ignore[arg-type]
        ),
    )


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


def run_experiment(name: str, study: Study) -> Finding:
    experiment = EXPERIMENTS[name]
    finding = experiment.find(study, score_recipes(experiment.recipes(study), DATA))
    json.dumps(finding.numbers, allow_nan=False)  # valid JSON
    assert finding.reading.endswith(".")
    return finding


# --- the obvious second implementations, in plain loops -----------------------------------------------------------


def chord_elbow(values: NDArray[np.float64]) -> float:
    """The value farthest from the chord between the first and the last of the sorted values."""
    ordered = np.sort(values.ravel())
    chord = ordered[0] + (ordered[-1] - ordered[0]) * np.arange(ordered.size) / (ordered.size - 1)
    return float(ordered[np.argmax(np.abs(ordered - chord))])


def frequencies(study: Study, tau: float, top_n: int) -> dict[Head, float]:
    """Selection frequency over the whole pool."""
    sums = study.sums.astype(np.float64).mean(axis=0)
    kept = [Head(i, j) for i, j in np.ndindex(SHAPE) if i >= 1 and sums[i, j] >= tau]
    marks = dict.fromkeys(kept, 0)
    for s in range(len(study)):
        usable = [head for head in kept if math.isfinite(study.entropies[s][head])]
        usable.sort(key=lambda head: (study.entropies[s][head], -study.sums[s][head], head))
        for head in usable[:top_n]:
            marks[head] += 1
    return {head: count / len(study) for head, count in marks.items()}


def top_heads(study: Study, tau: float, top_n: int, k: int) -> list[Head]:
    sums = study.sums.astype(np.float64).mean(axis=0)
    found = frequencies(study, tau, top_n)
    return sorted(found, key=lambda head: (-found[head], -sums[head], head))[:k]


def slow_score(heads: Sequence[Any], **options: Any) -> tuple[float, float, float]:
    """Acc@0.5, cIoU and pointing with the same heads on every sample, or with a list of heads per sample."""
    per_sample = [heads] * SAMPLES if isinstance(heads[0], Head) else heads
    num_right = num_hits = intersection = union = 0
    for own, (maps, truth) in zip(per_sample, DATA, strict=True):
        found = ground_maps(maps, own, GroundingOptions(**options))
        a, b = found.box, truth.box
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inside = max(w, 0) * max(h, 0)
        whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
        num_right += inside / whole >= 0.5
        x, y = found.point
        num_hits += b[0] <= x < b[2] and b[1] <= y < b[3]
        assert truth.mask is not None
        intersection += int((found.mask & truth.mask).sum())
        union += int((found.mask | truth.mask).sum())
    return num_right / len(DATA), intersection / union, num_hits / len(DATA)


# --- single heads (the IoU of Fig. 6b) ----------------------------------------------------------------------------


def test_head_iou_by_hand() -> None:
    """Two by two cells of 4 x 4 pixels; the one active cell covers 8 of the object's 12 pixels."""
    attention = np.array([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=np.float32)
    mask = np.zeros((8, 8), dtype=bool)
    mask[0:2, 0:6] = True
    maps = AttentionMaps(attention, (0.0, 0.0, 8.0, 8.0), (8, 8))
    assert map_ious(maps, Truth((0, 0, 6, 2), mask))[0, 0] == pytest.approx(8 / (16 + 12 - 8))
    assert map_ious(maps, Truth((0, 0, 6, 2)))[0, 0] == pytest.approx(8 / (16 + 12 - 8))
    flat = replace(maps, attention=np.ones_like(attention))
    assert map_ious(flat, Truth((0, 0, 6, 2), mask))[0, 0] == 0


def test_head_iou_is_that_of_the_upsampled_binary_map() -> None:
    for maps, truth in DATA:
        ious = map_ious(maps, truth)
        assert truth.mask is not None
        for index in np.ndindex(SHAPE):
            own = maps.attention[index]
            active = np.kron(own > own.astype(np.float64).mean(), np.ones((CELL, CELL))).astype(bool)
            expected = (active & truth.mask).sum() / (active | truth.mask).sum()
            assert ious[index] == pytest.approx(expected, abs=1e-6)


def test_head_iou_ignores_padding_and_counts_cropped_parts_as_missed() -> None:
    """An 8 x 4 image in the middle of a padded square: only the two middle rows of cells show it."""
    attention = np.zeros((1, 1, 4, 4), dtype=np.float32)
    attention[..., 0, :] = 1  # padding
    attention[..., 1, 0] = 1  # pixels (0, 0) to (2, 2)
    padded = AttentionMaps(attention, (0.0, -2.0, 8.0, 6.0), (8, 4))
    assert map_ious(padded, Truth((0, 0, 2, 4)))[0, 0] == pytest.approx(4 / 8)
    assert not head_hits(padded, Truth((4, 0, 8, 4)))[0, 0]
    cropped = AttentionMaps(np.array([[[[1, 0]]]], dtype=np.float32), (2.0, 0.0, 6.0, 4.0), (8, 4))
    assert map_ious(cropped, Truth((0, 0, 4, 4)))[0, 0] == pytest.approx(8 / 16)


def test_mask_shares_split_pixels_between_cells_by_area() -> None:
    """Against a mask at twelve times the resolution, whose pixels no cell edge cuts."""
    rng = np.random.default_rng(5)
    mask = rng.random((5, 7)) < 0.5
    x_edges, y_edges = visible_edges((-1.0, 0.0, 8.0, 5.0), (7, 5), (3, 4))
    fine = np.kron(mask, np.ones((12, 12)))
    shares = mask_coverage(mask, (-1.0, 0.0, 8.0, 5.0), (3, 4)) * (9 / 4) * (5 / 3)  # in pixels
    for row, column in np.ndindex(3, 4):
        rows = slice(round(12 * y_edges[row]), round(12 * y_edges[row + 1]))
        columns = slice(round(12 * x_edges[column]), round(12 * x_edges[column + 1]))
        assert shares[row, column] == pytest.approx(fine[rows, columns].sum() / 144)
    assert shares.sum() == pytest.approx(mask.sum())


def test_head_hits_are_the_points_of_single_head_groundings() -> None:
    bare = GroundingOptions(sigma=0)
    for maps, truth in DATA:
        hits = head_hits(maps, truth)
        for index in np.ndindex(SHAPE):
            x, y = ground_maps(maps, [Head(*index)], bare).point
            inside = truth.box[0] <= x < truth.box[2] and truth.box[1] <= y < truth.box[3]
            assert hits[index] == inside


# --- selection ----------------------------------------------------------------------------------------------------


def test_fig3_and_fig6a_agree_with_plain_loops(study: Study) -> None:
    sums = study.sums.astype(np.float64).mean(axis=0)[1:]
    tau = chord_elbow(sums)
    numbers = run_experiment("fig3", study).numbers
    assert numbers["tau"] == pytest.approx(tau)
    assert numbers["kept"] == (sums >= tau).sum() and numbers["considered"] == sums.size
    found = run_experiment("fig6a", study)
    expected = frequencies(study, tau, 4)
    top = top_heads(study, tau, 4, 3)
    assert [Head(*head) for head in found.numbers["top"]] == top
    assert found.numbers["frequency"] == pytest.approx([expected[head] for head in top])
    assert found.numbers["ever_selected"] == sum(value > 0 for value in expected.values())
    assert [row[1] for row in found.tables[0].rows[:3]] == [str(head) for head in top]


def test_fig13_ranks_at_each_tau(study: Study) -> None:
    assert study.ranking.tau is not None
    points = run_experiment("fig13", study).numbers["points"]
    assert [point["value"] for point in points] == pytest.approx([f * study.ranking.tau for f in ELBOWS])
    tops = set()
    for point in points:
        expected = top_heads(study, point["value"], 4, 3)
        assert [Head(*head) for head in point["top"]] == expected
        assert point["shared"] == len(set(expected) & set(study.top()))
        if expected:
            tops.add(tuple(expected))
            assert point["acc@0.5"] == pytest.approx(slow_score(expected)[0], abs=1e-6)
    assert len(tops) > 1  # otherwise the sweep would show nothing


def test_fig13_has_an_empty_row_for_a_tau_that_no_head_reaches() -> None:
    found = run_experiment("fig13", make_study(taus=(0.1, 5.0)))
    assert found.tables[0].rows[-1] == ("5.000", "0", "none", "0 of 3", "-", "-")
    assert found.numbers["points"][-1]["acc@0.5"] is None


def test_fig14_ranks_at_each_n(study: Study) -> None:
    assert study.ranking.tau is not None
    points = run_experiment("fig14", study).numbers["points"]
    assert [point["value"] for point in points] == list(range(1, 15))
    for point in points:
        expected = top_heads(study, study.ranking.tau, int(point["value"]), 3)
        assert [Head(*head) for head in point["top"]] == expected
    assert len({str(point["top"]) for point in points}) > 1


# --- validation ---------------------------------------------------------------------------------------------------


def test_fig6b_is_the_correlation_of_ranks(study: Study) -> None:
    assert study.ranking.tau is not None and study.ious is not None
    numbers = run_experiment("fig6b", study).numbers
    counted = {head: f for head, f in frequencies(study, study.ranking.tau, 4).items() if f >= 0.01}
    iou = study.ious.astype(np.float64).mean(axis=0)
    x, y = stats.rankdata(list(counted.values())), stats.rankdata([iou[head] for head in counted])
    rho = np.corrcoef(x, y)[0, 1]
    assert numbers["num_selected"] == len(counted) > 3
    assert numbers["selected"]["rho"] == pytest.approx(rho)
    exact = stats.permutation_test(
        (x,), lambda permuted: np.corrcoef(permuted, y)[0, 1], permutation_type="pairings", n_resamples=np.inf
    )
    assert numbers["selected"]["p"] == pytest.approx(exact.pvalue)
    of_all = numbers["all"]
    assert numbers["num_all"] == (LAYERS - 1) * HEADS
    t = of_all["rho"] * math.sqrt((numbers["num_all"] - 2) / (1 - of_all["rho"] ** 2))
    assert of_all["p"] == pytest.approx(2 * stats.t.sf(abs(t), numbers["num_all"] - 2))


@pytest.mark.parametrize(
    ("sign", "verdict"),
    [
        (1, "as in the paper's models, heads that are selected more often localise better"),
        (-1, "localise worse"),
        (0, "heads that are selected more often do not clearly localise better"),
    ],
)
def test_fig6b_reading_follows_its_numbers(study: Study, sign: int, verdict: str) -> None:
    """IoUs that rise with the frequency, fall with it, and are random."""
    frequency = np.zeros(SHAPE)
    for head in study.ranking.heads:
        frequency[head.address] = head.selection_frequency
    values = sign * frequency if sign else np.random.default_rng(0).random(SHAPE)
    ious = np.broadcast_to(0.5 + 0.1 * values, study.sums.shape).astype(np.float32)
    assert verdict in run_experiment("fig6b", replace(study, ious=ious)).reading
    constant = run_experiment("fig6b", replace(study, ious=np.full_like(ious, 0.5)))
    assert constant.numbers["selected"] is None and "too few for a correlation" in constant.reading


def test_paired_difference_by_hand() -> None:
    found = paired_difference([1, 1, 0, 1], [[1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    assert found["found"] == 0.75 and found["random"] == 0.5 and found["sets"] == [0.25, 0.25, 1.0]
    assert found["difference"] == 0.25 and found["beaten"] == 2
    low, high = found["interval"]
    differences = [1 / 3, 2 / 3, -1 / 3, 1 / 3]
    assert min(differences) <= low < 0.25 < high <= max(differences)


def test_random_sets_are_reproducible_and_scored_alike(study: Study) -> None:
    sets = random_sets(study)
    assert sets == random_sets(study) and len(sets) == 20 and len(set(sets)) > 1
    numbers = run_experiment("random", study).numbers["REC Acc@0.5"]
    assert numbers["found"] == pytest.approx(slow_score(study.heads)[0])
    assert numbers["sets"] == pytest.approx([slow_score(heads)[0] for heads in sets])


@pytest.mark.parametrize(
    ("better", "verdict"),
    [("found", "larger than chance"), ("random", "random heads do better"), ("", "not significant")],
)
def test_random_reading_follows_its_numbers(study: Study, better: str, verdict: str) -> None:
    right, wrong = Score(1.0, True, 0.5), Score(0.0, False, 0.5)
    good, bad, mixed = (
        RecipeScores([right] * 50),
        RecipeScores([wrong] * 50),
        RecipeScores([wrong, right] * 25),
    )
    found, other = {"found": (good, bad), "random": (bad, good), "": (mixed, mixed)}[better]
    scores = {"found": found, "all": mixed} | {("random", i): other for i in range(20)}
    assert verdict in EXPERIMENTS["random"].find(study, scores).reading


# --- the tables ---------------------------------------------------------------------------------------------------


def test_tab1_to_tab3_are_the_scores_of_the_heads(study: Study) -> None:
    accuracy, ciou, hit = slow_score(study.top())
    first = run_experiment("tab1", study)
    assert first.tables[0].rows == (("ours, made up, Acc@0.5", percent(accuracy)),)
    assert first.tables[0].columns == ("model", "rectangles")
    assert first.numbers["acc@0.5"] == pytest.approx(accuracy) and first.numbers["pointing"] == pytest.approx(hit)
    assert run_experiment("tab2", study).tables[0].rows[0][1] == percent(ciou)
    scored = score_recipes({0: Recipe(study.heads, GroundingOptions())}, DATA)[0].scores
    ious = [np.divide(*one.overlap) for one in scored if one.overlap]
    rows = run_experiment("tab3", study).tables[0].rows
    assert [row[1] for row in rows] == [percent(ciou), percent(float(np.mean(ious)))]


def test_tables_show_the_papers_numbers_for_its_models(study: Study) -> None:
    known = replace(study, model="llava-hf/llava-1.5-7b-hf")
    table = run_experiment("tab1", known).tables[0]
    assert table.columns == ("model", *paper.SPLITS, "rectangles")
    assert table.rows[0] == ("paper, LLaVA-1.5-7B", *map(str, paper.MODELS[known.model].rec or ()), "-")
    assert table.rows[1][1:-1] == ("-",) * 8 and table.rows[1][-1] != "-"

    def of_split(benchmark: str) -> Study:
        sweeps = ExperimentOptions(benchmark=benchmark)  # type: ignore[arg-type]
        return replace(known, options=replace(known.options, sweeps=sweeps))

    table = run_experiment("tab2", of_split("refcoco+-testA")).tables[0]
    assert table.columns == ("model", *paper.SPLITS)
    ours = dict(zip(table.columns, table.rows[1], strict=True))
    assert [name for name, cell in ours.items() if cell != "-"] == ["model", "refcoco+-testA"]
    reason = run_experiment("tab3", of_split("reasonseg-val")).tables[0]
    assert reason.rows[0] == ("paper, LLaVA-1.5-7B", "52.4", "48.7")
    assert run_experiment("fig3", known).tables[0].rows[1][:2] == ("paper, LLaVA-1.5-7B", "0.24")
    assert run_experiment("fig6a", known).tables[0].columns[-1] == "paper's rank"


def test_the_papers_models_have_configs_with_their_heads() -> None:
    from localization_heads.lvlm.checkpoints.spec import find_spec, known_specs

    names = {spec.name for spec in known_specs().values()}
    for name, model in paper.MODELS.items():
        assert name in names
        assert [str(head) for head in find_spec(name).heads] == list(model.heads)
        assert model.rec is None or len(model.rec) == len(paper.SPLITS)
        assert model.res is None or len(model.res) == len(paper.SPLITS)


def test_tab4_adds_heads_in_the_order_of_the_ranking(study: Study) -> None:
    points = run_experiment("tab4", study).numbers["points"]
    for point in points:
        heads = study.top(point["k"])
        assert len(heads) == point["k"] and heads == study.top(5)[: point["k"]]
        assert point["acc@0.5"] == pytest.approx(slow_score(heads)[0], abs=1e-6)
    few = run_experiment("tab4", make_study(ks=(90,)))
    assert few.numbers["points"] == [] and "fewer" in few.reading


def test_tab5_agrees_with_plain_loops(study: Study) -> None:
    sums = study.sums.astype(np.float64)
    heads = [Head(i, j) for i, j in np.ndindex(SHAPE) if i >= 1]
    assert study.ranking.tau is not None

    def lowest(s: int, allowed: Sequence[Head]) -> list[Head]:
        usable = [head for head in allowed if math.isfinite(study.entropies[s][head])]
        return sorted(usable, key=lambda head: (study.entropies[s][head], -study.sums[s][head], head))[:3]

    expected = {
        ("criterion 1", "fixed"): sorted(heads, key=lambda head: -sums.mean(axis=0)[head])[:3],
        ("criterion 2", "fixed"): top_heads(study, 0.0, 4, 3),
        ("both", "fixed"): top_heads(study, study.ranking.tau, 4, 3),
        ("criterion 1", "greedy"): [sorted(heads, key=lambda head: -one[head])[:3] for one in sums],
        ("criterion 2", "greedy"): [lowest(s, heads) for s in range(SAMPLES)],
        ("both", "greedy"): [
            lowest(s, [head for head in heads if one[head] >= chord_elbow(one[1:])]) for s, one in enumerate(sums)
        ],
    }
    recipes, numbers = criteria_recipes(study), run_experiment("tab5", study).numbers
    for name, chosen in expected.items():
        per_sample = chosen if name[1] == "greedy" else [chosen] * SAMPLES
        assert [list(recipes[name].heads_of(s)) for s in range(SAMPLES)] == per_sample, name
        accuracy, ciou, _ = slow_score(chosen)
        assert numbers[", ".join(name)]["acc@0.5"] == pytest.approx(accuracy, abs=1e-6)
        assert numbers[", ".join(name)]["ciou"] == pytest.approx(ciou, abs=1e-6)
    assert len({str(chosen) for chosen in expected.values()}) > 3


def test_all_heads_are_a_control_wherever_heads_are_compared(study: Study) -> None:
    all_heads = [Head(layer, head) for layer in range(1, LAYERS) for head in range(HEADS)]
    accuracy, ciou, _ = slow_score(all_heads)
    criteria = run_experiment("tab5", study).numbers["all heads"]
    assert criteria["acc@0.5"] == pytest.approx(accuracy, abs=1e-6)
    assert criteria["ciou"] == pytest.approx(ciou, abs=1e-6)
    counts, random = run_experiment("tab4", study), run_experiment("random", study)
    assert counts.numbers["all"]["acc@0.5"] == pytest.approx(accuracy, abs=1e-6)
    assert counts.tables[0].columns[-1] == "all heads" and counts.tables[0].rows[1][-1] == percent(ciou)
    assert random.numbers["REC Acc@0.5"]["all"] == pytest.approx(accuracy, abs=1e-6)
    assert random.tables[0].rows[0][-1] == percent(accuracy) and "without selection" in random.reading


def test_tab8_changes_one_thing_at_a_time(study: Study) -> None:
    numbers = run_experiment("tab8", study).numbers
    for name, option in (("sigma", "sigma"), ("kernel", "kernel_size")):
        for point in numbers[name]:
            accuracy = slow_score(study.heads, **{option: point[name]})[0]
            assert point["acc@0.5"] == pytest.approx(accuracy, abs=1e-6)
    bare = [point["acc@0.5"] for point in numbers["sigma"] if point["sigma"] == 0]
    assert bare == [point["acc@0.5"] for point in numbers["kernel"] if point["kernel"] == 1]


def test_named_heads_replace_the_found_ones_except_in_rankings(study: Study) -> None:
    named = replace(study, given_heads=(Head(1, 1),))
    accuracy = slow_score([Head(1, 1)])[0]
    assert run_experiment("tab1", named).numbers["acc@0.5"] == pytest.approx(accuracy, abs=1e-6)
    assert run_experiment("tab4", named).numbers == run_experiment("tab4", study).numbers  # of the ranking


def test_highest_breaks_ties_by_layer_and_head() -> None:
    sums = np.array([[9.0, 9.0], [1.0, 2.0], [2.0, 0.0]])
    assert highest(sums, 3, 1) == (Head(1, 1), Head(2, 0), Head(1, 0))
    assert len(highest(sums, 9, 1)) == 4


def test_equal_recipes_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from localization_heads.experiments import validation

    calls = []

    def spy(*arguments: object) -> object:
        calls.append(arguments)
        return ground_maps(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "ground_maps", spy)
    one, options = (Head(2, 0),), GroundingOptions()
    scores = score_recipes({"a": Recipe(one, options), "b": Recipe(one, options)}, DATA)
    assert len(calls) == SAMPLES and scores["a"] is scores["b"]


def test_entries_without_masks_have_no_res(study: Study) -> None:
    boxes = [(maps, Truth(truth.box)) for maps, truth in DATA]
    scores = score_recipes(EXPERIMENTS["tab2"].recipes(study), boxes)
    found = EXPERIMENTS["tab2"].find(study, scores)
    assert found.tables[0].rows[0][1] == "-" and found.numbers["ciou"] is None


# --- the ladder ---------------------------------------------------------------------------------------------------


def rungs(**accuracies: float) -> list[RungResult]:
    return [
        RungResult(step, name, f"+ {name}", {"acc@0.5": accuracy, "num_samples": 8})
        for step, (name, accuracy) in enumerate(accuracies.items(), start=1)
    ]


def test_the_ladders_gains_by_hand() -> None:
    found = ladder_finding("embedded", rungs(a=0.25, b=0.2, c=0.5))
    assert [row[4] for row in found.tables[0].rows] == ["-", "-5.0", "+30.0"]
    assert [row[2] for row in found.tables[0].rows] == ["8", "8", "8"]
    assert found.reading.endswith('"+ c" (+30.0 points).')
    first, second = rungs(a=0.25, b=0.5)
    fewer = replace(first, metrics={"acc@0.5": 0.25, "num_samples": 6})
    assert "Rungs with fewer expressions" in ladder_finding("x", [fewer, second]).reading
    assert "no rung raises it" in ladder_finding("x", rungs(a=0.25, b=0.2)).reading
    assert "One rung so far" in ladder_finding("x", [first]).reading


def test_the_ladder_shows_reported_numbers_for_the_papers_models_only() -> None:
    assert len(ladder_finding("embedded", rungs(a=0.25)).tables) == 1
    assert len(ladder_finding("llava-hf/llava-1.5-7b-hf", rungs(a=0.25)).tables) == 2


def test_rung_results_survive_json() -> None:
    (rung,) = rungs(a=0.25)
    assert RungResult.from_json(json.loads(json.dumps(rung.to_json()))) == rung


def test_ignore_padding_by_hand() -> None:
    """8 x 4 pixels padded to a square: cell row 1 shows y 0 to 2; without regard to the padding it is y 1 to 2."""
    attention = np.zeros((1, 1, 4, 4), dtype=np.float32)
    attention[..., 1, 1] = 1
    maps = AttentionMaps(attention, (0.0, -2.0, 8.0, 6.0), (8, 4))
    exact = ground_maps(maps, [Head(0, 0)], GroundingOptions(sigma=0))
    wrong = ground_maps(maps, [Head(0, 0)], GroundingOptions(sigma=0, ignore_padding=True))
    assert exact.box == (2.0, 0.0, 4.0, 2.0)
    assert wrong.box == (2.0, 1.0, 4.0, 2.0)
    with pytest.raises(ValueError, match="ignore_padding"):
        GroundingOptions(ignore_padding="yes")  # type: ignore[arg-type]


# --- findings -----------------------------------------------------------------------------------------------------


def test_tables_escape_their_text() -> None:
    text = Table(("a|b", "c"), (("x\ny", "<b>"),), "t").markdown()
    assert text == "**t**\n\n| a\\|b | c |\n| --- | ---: |\n| x y | &lt;b> |\n"
    with pytest.raises(ValueError, match="cells"):
        Table(("a",), (("1", "2"),))
