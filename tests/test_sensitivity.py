"""Sensitivity (criterion 3): resting heads are told from localization heads, in pure functions and in every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import tiny
from front import Front, stub_figures, write_data
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console

import localization_heads as lh
from localization_heads.apps.heads import ranking_table
from localization_heads.attention import AttentionMaps
from localization_heads.data.samples import load_samples
from localization_heads.errors import UsageError
from localization_heads.experiments.study import Study, StudyOptions
from localization_heads.experiments.tables import ROBUST as ROBUST_ROW
from localization_heads.experiments.tables import criteria_recipes
from localization_heads.figures import plot_sensitivity
from localization_heads.heads.criteria import HeadStatistics, head_statistics
from localization_heads.heads.one_sample import greedy_heads
from localization_heads.heads.ranking import (
    add_sensitivity,
    describe_disagreement,
    rank_heads,
    top_by_paper_criteria,
    top_by_sensitivity,
)
from localization_heads.heads.record import HeadRanking, RankedHead, resting_heads
from localization_heads.heads.sensitivity import (
    PairwiseSensitivity,
    SensitivityStatistics,
    comparison_expressions,
    map_overlap,
    mean_sensitivity,
    sensitivity_statistics,
    swap_left_right,
)
from localization_heads.lvlm.extra_prompts import covers_mirrored_region
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import CriteriaOptions
from localization_heads.report.content import HeadFacts
from localization_heads.report.values import describe_method, ranking_cells, ranking_columns
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from localization_heads.store.statistics import COLUMNS, SENSITIVITY_COLUMNS, StatisticsStore

FAMILIES = ["llava_next", "qwen2_5_vl", "internvl", "gemma3", "mllama", "paligemma", "florence2", "janus"]
ROBUST = CriteriaOptions(sensitivity="siblings")
WORDS = ROBUST.siblings


# --------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([[0.2, 0.2]], [[0.9, 0.0]], 0.5**0.5),
        ([[1.0, 3.0]], [[0.3, 0.1]], 2 * 0.1875**0.5),  # [.25 .75] and [.75 .25]
        ([[0.9, 0.0]], [[0.0, 0.1]], 0),
        ([[0.2, 0.2]], [[0.002, 0.002]], 1),
        ([[0.2, 0.2]], [[0.0, 0.0]], 1),  # an empty map cannot follow the expression
    ],
)
def test_overlap_by_hand(one: Any, other: Any, expected: float) -> None:
    assert float(map_overlap(np.array(one), np.array(other))) == pytest.approx(expected)


def test_maps_of_different_grids_have_no_overlap() -> None:
    with pytest.raises(ValueError, match="different grids"):
        map_overlap(np.ones((1, 2)), np.ones((2, 1)))


def obvious_overlap(one: NDArray[Any], other: NDArray[Any]) -> float:
    total = 0.0
    for p, q in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
        total += (p / float(one.sum()) * q / float(other.sum())) ** 0.5
    return total


def test_sensitivity_of_one_sample_against_loops() -> None:
    rng = np.random.default_rng(0)
    maps, mirrored, *others = rng.random((5, 2, 3, 4, 5)).astype(np.float32)
    other_grid = rng.random((2, 3, 5, 4))  # is skipped
    found = sensitivity_statistics(maps, [*others, other_grid], mirrored)
    for place in np.ndindex(2, 3):
        mean = np.mean([obvious_overlap(maps[place], other[place]) for other in others])
        assert found.sensitivity[place] == pytest.approx(1 - mean, abs=1e-6)
        back = obvious_overlap(maps[place], mirrored[place][:, ::-1])
        assert found.consistency[place] == pytest.approx(back, abs=1e-6)
    assert np.isnan(sensitivity_statistics(maps, [])).all()


def test_pairwise_sensitivity_is_the_mean_over_all_pairs() -> None:
    stacks = np.random.default_rng(1).random((4, 2, 3, 4, 5))
    stacks[1, 0, 0] = 0  # one head has an empty map
    image = PairwiseSensitivity()
    assert image.sensitivity is None
    for stack in stacks:
        image.add(stack)
    pairs = [map_overlap(stacks[i], stacks[j]) for i in range(4) for j in range(i)]
    assert image.sensitivity is not None
    np.testing.assert_allclose(image.sensitivity, 1 - np.mean(pairs, axis=0), atol=1e-12)
    with pytest.raises(ValueError, match="one grid"):
        image.add(stacks[0, :, :, :2])


def test_means_are_weighted_and_leave_out_nan() -> None:
    """.2 drawn once and .8 drawn three times: .65; a head without values has no mean."""
    nan = np.nan
    samples = [
        SensitivityStatistics(np.array([[0.2, nan]]), np.array([[nan, nan]])),
        SensitivityStatistics(np.array([[0.8, nan]]), np.array([[0.5, nan]])),
        SensitivityStatistics(np.array([[0.9, 0.9]]), np.array([[0.9, 0.9]])),
    ]
    found = mean_sensitivity(samples, [1, 3, 0], (1, 2))
    np.testing.assert_allclose(found.sensitivity, [[0.65, nan]], atol=1e-6)
    np.testing.assert_allclose(found.consistency, [[0.5, nan]], atol=1e-6)


def test_swapped_and_comparison_expressions() -> None:
    assert swap_left_right("the LEFT dog, leftmost of two, at the right-hand side") == (
        "the RIGHT dog, rightmost of two, at the left-hand side"
    )
    assert swap_left_right("the rightful bright copyright") == "the rightful bright copyright"
    assert comparison_expressions("the dog", [], WORDS) == ("animal", "thing", "vehicle")
    assert comparison_expressions("an animal", ["a tree"], WORDS) == ("a tree", "thing", "vehicle")
    assert comparison_expressions("a dog", list("abcdef"), WORDS) == ("f", "d", "animal")
    assert comparison_expressions("the thing", [], ["thing"]) == ("thing",)  # nothing else is left


# --------------------------------------------------------------------------------------------- the ranking


def head(number: int, frequency: float, total: float, kept: bool = True) -> RankedHead:
    return RankedHead(0, number, frequency, 0.0, total, 0.5, kept)


def ranking_of(*heads: RankedHead, options: CriteriaOptions = ROBUST) -> HeadRanking:
    return HeadRanking(heads, 0.1, 3, 10, 5, options)


RESTING_RANKING = ranking_of(*(head(n, 0.5, total) for n, total in enumerate([0.8, 0.2, 0.6, 0.1])))
"""Of these sums (mean .425) and of the scores .6 .1 .2 .05, only head 2 rests: .2 < .3 and .6 > .425."""
RESTING = add_sensitivity(
    RESTING_RANKING, SensitivityStatistics(np.array([[0.6, 0.1, 0.2, 0.05]]), np.full((1, 4), np.nan))
)


def test_order_by_hand() -> None:
    """Scores .9 - .5 = .4, .6 (no mirrored image), unknown, and .95 for a head that is not kept."""
    ranking = ranking_of(head(0, 0.9, 0.8), head(1, 0.5, 0.4), head(2, 0.4, 0.3), head(3, 0.0, 0.9, False))
    nan = np.nan
    means = SensitivityStatistics(np.array([[0.5, 0.6, nan, 0.95]]), np.array([[0.9, nan, 0.9, 1.0]]))
    found = add_sensitivity(ranking, means)
    assert [one.head for one in found.heads] == [1, 0, 2, 3]
    assert [one.sensitivity_score for one in found.heads] == pytest.approx([0.6, 0.4, None, 0.95])
    paper = add_sensitivity(replace(ranking, options=CriteriaOptions()), means)
    assert [one.head for one in paper.heads] == [0, 1, 2, 3]  # measured, but not used for the order
    assert top_by_paper_criteria(found, 1) == top_by_sensitivity(paper, 2)[1:] == [lh.Head(0, 0)]
    sentence = describe_disagreement(paper, 1) or ""
    assert "L0H0" in sentence and "L0H1" in sentence
    assert describe_disagreement(paper, 2) is None
    assert describe_disagreement(ranking, 1) is None  # not measured


def test_resting_heads_by_hand_and_in_json() -> None:
    found = RESTING
    assert [one.head for one in resting_heads(found)] == [2]
    assert resting_heads(RESTING_RANKING) == ()
    data = json.loads(json.dumps(found.to_json()))
    assert data["resting"] == [[0, 2]]
    assert data["heads"][0]["sensitivity"] == 0.6
    assert data["criteria"]["siblings"] == list(WORDS)
    read = HeadRanking.from_json(data)
    assert read.to_json() == found.to_json()
    assert read.options == ROBUST
    assert all(len(row) == len(found.csv_header) for row in found.csv_rows())
    plain = ranking_of(head(0, 0.5, 0.5), options=CriteriaOptions())
    assert not {"resting", "sensitivity"} & {*plain.to_json(), *plain.to_json()["heads"][0]}
    assert "sensitivity" not in plain.to_json()["criteria"]
    data["heads"][0]["sensitivity"] = 2
    with pytest.raises(UsageError, match="sensitivity"):
        HeadRanking.from_json(data)


# --------------------------------------------------------------------------------------------- planted heads


@dataclass
class Seen:
    """A real sample: the maps of the expression, of three words, and of the mirrored image (not mirrored back)."""

    own: NDArray[np.float32]
    others: list[NDArray[np.float32]]
    mirrored: NDArray[np.float32]

    @property
    def all(self) -> list[NDArray[np.float32]]:
        return [self.own, *self.others, self.mirrored]


@pytest.fixture(scope="module")
def seen(lvlm: LVLM) -> list[Seen]:
    found = []
    for scene, expression in scene_samples(10, size=256, seeds=VALIDATION_SEEDS):
        image = Image.fromarray(scene.image)
        own, *others = lvlm.encode_image(image).attend([expression.text, *WORDS])
        mirrored = lvlm.attend(ImageOps.mirror(image), swap_left_right(expression.text))
        assert covers_mirrored_region(own, mirrored)
        found.append(Seen(own.attention, [other.attention for other in others], mirrored.attention))
    return found


KINDS = ("place", "salience", "content", "wander")
"""Heads that always attend to one place, to the most salient cell or to some content, or to a random cell."""


def planted(seen: Sequence[Seen], kind: str, seed: int) -> tuple[list[Seen], set[tuple[int, int]]]:
    """The real samples with three to six heads replaced by heads of one kind, which do not localize."""
    rng = np.random.default_rng(seed)
    layers, heads, rows, columns = seen[0].own.shape
    true = {(4, 4), (5, 3), (5, 6)}
    free = [place for place in np.ndindex(layers, heads) if place[0] >= 2 and place not in true]
    places = [free[n] for n in rng.choice(len(free), 3 + seed % 4, replace=False)]
    fixed = {place: tuple(rng.integers(1, [rows, columns])) for place in places}
    found = []
    for one in seen:
        looked = np.mean([one.own, *one.others], axis=(0, 1, 2))
        content = np.mean([maps[2, 1] for maps in (one.own, *one.others)], axis=0)
        stacks = [maps.copy() for maps in one.all]
        for place in places:
            for number, maps in enumerate(stacks):
                spot = {
                    "place": fixed[place],
                    "salience": np.unravel_index(looked[1:, 1:].argmax(), (rows - 1, columns - 1)),
                    "content": np.unravel_index(content[1:, 1:].argmax(), (rows - 1, columns - 1)),
                    "wander": rng.integers(1, [rows, columns]),
                }[kind]
                y, x = (int(value) for value in spot)
                cells = np.full((rows, columns), 1e-6)
                cells[y, x - 1 : x + 1] = 0.35
                # All but a fixed place are mirrored with the image.
                mirror = number == len(stacks) - 1 and kind != "place"
                maps[place] = cells[:, ::-1] if mirror else cells
        found.append(Seen(stacks[0], stacks[1:-1], stacks[-1]))
    return found, set(places)


def ranked(seen: Sequence[Seen], *, mirrored: bool = True) -> HeadRanking:
    statistics = [head_statistics(one.own) for one in seen]
    sums = np.stack([one.attention_sum for one in statistics])
    ranking = rank_heads(sums, np.stack([one.spatial_entropy for one in statistics]), options=ROBUST, top_n=3)
    samples = [sensitivity_statistics(one.own, one.others, one.mirrored if mirrored else None) for one in seen]
    return add_sensitivity(ranking, mean_sensitivity(samples, [1] * len(seen), seen[0].own.shape[:2]))


def test_without_planted_heads_the_known_heads_come_first(seen: list[Seen]) -> None:
    ranking = ranked(seen)
    assert set(ranking.top(3)) == {(4, 4), (5, 3), (5, 6)}
    assert set(top_by_paper_criteria(ranking, 3)) == {(2, 6), (5, 3), (5, 6)}  # ten samples are few
    assert resting_heads(ranking) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_planted_heads_fool_criteria_1_and_2_but_not_sensitivity(seen: list[Seen], kind: str) -> None:
    for seed in range(6):
        stacks, places = planted(seen, kind, seed)
        ranking = ranked(stacks)
        assert len(places & set(top_by_paper_criteria(ranking, 3))) >= 2, seed
        assert set(ranking.top(3)) == {(4, 4), (5, 3), (5, 6)}, seed
        assert places <= {one.address for one in resting_heads(ranking)}, seed
        assert describe_disagreement(ranking, 3) is not None


def test_a_wandering_peak_needs_the_mirrored_image(seen: list[Seen]) -> None:
    """Why `criteria.mirrored` is not 0 by default."""
    stacks, places = planted(seen, "wander", 0)
    assert places & set(ranked(stacks, mirrored=False).top(3))


# --------------------------------------------------------------------------------------------- on disk


def test_a_store_holds_sensitivity_and_another_has_none(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 2, 3, 4)).astype(np.float32)
    values[4, 0] = np.nan  # not measured
    keys = [bytes([n]) * 16 for n in range(2)]

    def opened() -> StatisticsStore:
        return StatisticsStore(
            tmp_path, settings={}, num_layers=3, num_heads=4, columns={**COLUMNS, **SENSITIVITY_COLUMNS}
        )

    opened().append(keys, *values[:3], values[0] > 0.5, *values[3:])
    rows = opened().rows(keys[::-1])
    found = rows.sensitivity_statistics()
    assert found is not None
    for one, (sensitivity, consistency) in zip(found, values[3:, ::-1].swapaxes(0, 1), strict=True):
        np.testing.assert_array_equal(one.sensitivity, sensitivity)
        np.testing.assert_array_equal(one.consistency, consistency)
    plain = StatisticsStore(tmp_path, settings={}, num_layers=3, num_heads=4)
    assert len(plain) == 0
    assert plain.rows([]).sensitivity_statistics() is None
    with pytest.raises(ValueError, match="NaN"):
        opened().append([b"x" * 16], *np.full((3, 1, 3, 4), np.nan), np.ones((1, 3, 4)), *np.ones((2, 1, 3, 4)))


# --------------------------------------------------------------------------------------------- the stages

DATA = ("data_file=data.jsonl", "criteria=robust", "report=false")


@pytest.fixture
def data(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    write_data(front.folder)
    stub_figures(monkeypatch)
    return front


def heads_json(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "heads.json").read_text())
    return found


def test_find_rank_batch_and_python_agree(data: Front, lvlm: LVLM) -> None:
    """heads.json with the sensitivity of each head; the same from disk, in a batch and from Python."""
    result = data.finder("stage=find", *DATA, "criteria.mirrored=2", "output_dir=found")
    assert result.status == 0, result.err
    assert "tivity" in result.out
    found = heads_json("found/tiny")
    assert found["found_with"].get("criteria") is None  # mirrored=2 is no preset
    assert all({"sensitivity", "consistency"} <= head.keys() for head in found["heads"])
    assert isinstance(found["resting"], list)
    bytes_found = Path("found/tiny/heads.json").read_bytes()
    assert data.finder("stage=rank", *DATA, "criteria.mirrored=2", "output_dir=found").status == 0
    assert Path("found/tiny/heads.json").read_bytes() == bytes_found
    assert data.finder("stage=batch", *DATA, "criteria.mirrored=2", "visualize_batch=false").status == 0
    assert (data.out / "heads.json").read_bytes() == bytes_found
    samples = [lh.Sample(one.image, one.expression) for one in load_samples("data.jsonl").entries]
    ranking = lh.find_heads(lvlm, samples, criteria=replace(ROBUST, mirrored=2))
    assert [head["sensitivity"] for head in found["heads"]] == pytest.approx(
        [head.sensitivity for head in ranking.kept], abs=1e-5
    )
    assert [list(head.address) for head in ranking.kept] == [[head["layer"], head["head"]] for head in found["heads"]]


def test_paper_criteria_rank_from_a_store_with_sensitivity_as_from_their_own(data: Front) -> None:
    assert data.finder("stage=find", "data_file=data.jsonl", "output_dir=paper").status == 0
    assert data.finder("stage=find", *DATA).status == 0
    assert data.finder("stage=rank", "data_file=data.jsonl").status == 0
    paper, ranked = heads_json("paper/tiny"), heads_json(data.out)
    assert ranked.pop("resting") is not None
    for head in ranked["heads"]:
        assert head.pop("sensitivity") >= 0
        head.pop("consistency")
    for mine, papers in zip(ranked.pop("heads"), paper.pop("heads"), strict=True):
        assert mine == pytest.approx(papers, abs=2e-6)  # other batches
    assert json.dumps(ranked) == json.dumps(paper)
    wrong = data.finder("stage=rank", *DATA, "output_dir=paper")
    assert wrong.status == 2
    assert "criteria.sensitivity" in wrong.err or "no statistics" in wrong.err


def test_a_killed_find_resumes_with_equal_results(data: Front, calls: Any) -> None:
    assert data.finder("stage=find", *DATA, "batch_size=2", "output_dir=whole").status == 0
    calls.clear()
    calls.fail_at = 2
    assert data.finder("stage=find", *DATA, "batch_size=2").status != 0
    calls.fail_at = None
    assert data.finder("stage=find", *DATA, "batch_size=2").status == 0
    assert (data.out / "heads.json").read_bytes() == Path("whole/tiny/heads.json").read_bytes()
    before = len(calls)
    assert data.finder("stage=find", *DATA, "batch_size=2").status == 0
    assert len(calls) == before  # nothing is asked twice


def test_mirrored_maps_are_compared_only_if_they_cover_the_mirrored_region() -> None:
    """The grid covers x from 0 to 20 of an image of 40 x 20; mirrored, that is x from 20 to 40."""
    half = AttentionMaps(np.ones((1, 1, 2, 2), np.float32), (0, 0, 20, 20), (40, 20))
    assert not covers_mirrored_region(half, half)
    assert covers_mirrored_region(half, replace(half, image_box=(20, 0, 40, 20)))
    assert covers_mirrored_region(half, replace(half, image_box=(21, 0, 41, 20)))  # an odd pixel
    whole = replace(half, image_box=(0, -10, 40, 30))
    assert covers_mirrored_region(whole, whole)


@pytest.mark.parametrize(
    "option",
    ["criteria.siblings=[]", "criteria.siblings=[ ]", "criteria.mirrored=-1", "criteria.sensitivity=flip"],
)
def test_wrong_options_are_refused_by_name(front: Front, option: str) -> None:
    write_data(front.folder)
    result = front.finder("stage=find", *DATA, option)
    assert result.status == 2
    assert option.split("=")[0] in result.err


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, image: Image.Image) -> None:
    """Comparison expressions share the encoded image or not: the overlap is that of maps computed one by one."""
    lvlm, texts = tiny(name), ("the dog", "the red car")
    samples = [lh.Sample(image, text) for text in texts]
    found = lh.find_heads(lvlm, samples, criteria=replace(ROBUST, mirrored=0, exclude_layers=0), top_n=3)
    alone = {text: lvlm.attend(image, text).attention for text in (*texts, *WORDS)}
    first, second = texts
    overlaps = [
        np.mean([map_overlap(alone[text], alone[other]) for other in (rest, *WORDS[:2])], axis=0)
        for text, rest in ((first, second), (second, first))
    ]
    for head in found.heads:
        assert head.sensitivity == pytest.approx(1 - np.mean(overlaps, axis=0)[head.address], abs=1e-4)


def test_heads_that_pass_come_before_the_fallback_whatever_their_sensitivity() -> None:
    """Two of four heads pass; the others are more sensitive, but only fill up."""
    sums = np.array([[0.9, 0.1], [0.2, 0.8]])
    entropy = np.array([[1.0, 0.0], [0.0, 0.5]])
    statistics = HeadStatistics(sums, entropy, entropy, np.ones((2, 2), int), sums < 0)
    options = CriteriaOptions(exclude_layers=0, tau=0.5, fallback="order")
    sensitivity = SensitivityStatistics(np.array([[0.4, 0.9], [0.8, 0.3]]), np.ones((2, 2)))
    assert greedy_heads(statistics, options, 3, sensitivity) == [(0, 0), (1, 1), (0, 1)]
    assert greedy_heads(statistics, options, 2, sensitivity) == [(0, 0), (1, 1)]
    assert greedy_heads(statistics, replace(options, fallback="none"), 3, sensitivity) == [(0, 0), (1, 1)]


def test_a_sample_picks_its_own_heads_by_sensitivity(data: Front, lvlm: LVLM) -> None:
    """Computed from the maps of three words; the heads of the paper's criteria are others."""
    image = Image.open("image_0.png").convert("RGB")
    maps, *others = (lvlm.attend(image, text) for text in ("the dog", *WORDS))
    statistics = head_statistics(maps.attention)
    passing = greedy_heads(statistics, CriteriaOptions(), 99)
    overlaps = np.mean(
        [[[obvious_overlap(*pair) for pair in zip(*layer, strict=True)]
          for layer in zip(maps.attention, other.attention, strict=True)] for other in others], axis=0
    )  # fmt: skip
    expected = sorted(passing, key=lambda head: round(overlaps[head], 6))[:3]
    assert expected != passing[:3]
    result = data.finder("stage=ground", "image_file=image_0.png", "query=the dog", "heads=greedy", "criteria=robust")
    assert result.status == 0, result.err
    (line,) = data.out.glob("attention/*_prediction.jsonl")
    assert json.loads(line.read_text())["heads"] == [list(head) for head in expected]
    assert lvlm.pick_own_heads(image, "the dog", ROBUST) == expected
    paper = lh.ground(lvlm, image, "the dog", heads="greedy")
    assert paper.heads == tuple(passing[:3])
    batch = data.finder("stage=batch", "data_file=data.jsonl", "end_index=1", "heads=greedy", "criteria=robust")
    assert batch.status == 0, batch.err
    assert json.loads((data.out / "predictions.jsonl").read_text())["heads"] == [list(head) for head in expected]


def test_doctor_names_the_heads_that_follow_and_warns_of_others(data: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's first heads are patched, so that they always differ."""
    asked = ("stage=doctor", "image_file=image_0.png", "query=the dog", "doctor.check=false")
    assert "they follow" not in data.finder(*asked).out
    monkeypatch.setattr(
        "localization_heads.heads.ranking.top_by_paper_criteria",
        lambda ranking, k: [ranking.kept[-1].address],
    )
    result = data.finder(*asked, "criteria=robust")
    assert result.status == 0, result.err
    assert "they follow" in result.out
    assert "they rest" in result.out
    assert "criteria=robust" in result.err


def test_tab5_has_a_row_for_sensitivity_if_it_was_measured() -> None:
    """Frequency puts head 2-0 first, sensitivity 2-1; without it the table is the paper's."""
    sums = np.full((4, 3, 2), 0.5, np.float32)
    entropies = np.broadcast_to(np.array([[1, 1], [1, 1], [0.1, 0.2]], np.float32), sums.shape)
    options = StudyOptions(k=1, top_n=1, num_trials=1, criteria=ROBUST)
    study = Study("model", "data", sums, entropies, np.zeros(sums.shape, bool), options=options)
    assert ROBUST_ROW not in criteria_recipes(study)
    means = SensitivityStatistics(np.array([[0, 0], [0, 0], [0.1, 0.9]]), np.full((3, 2), np.nan))
    recipes = criteria_recipes(replace(study, sensitivity=means))
    assert recipes[ROBUST_ROW].heads_of(0) == ((2, 1),)
    assert recipes["both", "fixed"].heads_of(0) == ((2, 0),) == criteria_recipes(study)["both", "fixed"].heads_of(0)


def test_table_and_report_name_resting_heads() -> None:
    found = RESTING
    console = Console(width=100, record=True)
    console.print(ranking_table(found, 3))
    assert "resting: L0H2" in console.export_text()
    facts = HeadFacts(found, (1, 4))
    assert "Resting (much attention, maps that hardly follow the expression): L0H2." in describe_method(facts)
    assert "ranked by it." in describe_method(facts)
    assert "sensitivity" in ranking_columns(facts)
    cells = [ranking_cells(facts, rank, one) for rank, one in enumerate(found.kept, start=1)]
    assert [cell[5].text for cell in cells] == ["0.600", "0.200 (rests)", "0.100", "0.050"]
    assert "sensitivity" not in ranking_columns(HeadFacts(RESTING_RANKING, (1, 4)))


def test_the_figure_names_first_and_resting_heads() -> None:
    (axes,) = plot_sensitivity(RESTING, emphasised=1).axes
    assert {text.get_text() for text in axes.texts} == {"L0H0", "L0H2"}
    assert axes.get_title(loc="left") == "1 of 4 kept heads rest"
    points = [np.asarray(marks.get_offsets()).tolist() for marks in axes.collections[:3]]
    assert points == [[[0.2, 0.1], [0.1, 0.05]], [[0.6, 0.2]], [[0.8, 0.6]]]
