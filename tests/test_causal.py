"""`experiment=causal`: the sets of heads and the numbers by hand, and the command."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from front import Front, one_line, write_data

from localization_heads.evaluation.scores import Score
from localization_heads.experiments import causal
from localization_heads.experiments.study import Study, StudyOptions
from localization_heads.experiments.validation import RecipeScores
from localization_heads.heads.head import Head
from localization_heads.options.groups import CriteriaOptions

ON, OFF = Head(1, 0), Head(1, 1)


@pytest.fixture
def study() -> Study:
    """Two layers of four heads, k = 1, the first layer left out. The second half of the entries says the opposite."""
    sums = np.zeros((4, 2, 4), np.float32)
    sums[:, 0] = 9
    sums[:2, 1] = [0.5, 0.6, 0.1, 0.1]
    sums[2:, 1] = [0.1, 0.1, 0.9, 0.9]
    entropies = np.full((4, 2, 4), 1.0, np.float32)
    entropies[:2, 1, 0] = 0.0
    masses = np.zeros((4, 2, 4), np.float32)
    masses[:2, 1, 1], masses[2:, 1, 3] = 0.9, 1.0
    criteria = CriteriaOptions(exclude_layers=1, tau=0.3)
    options = StudyOptions(k=1, top_n=1, num_trials=1, num_samples=2, criteria=criteria)
    return Study("m", "d", sums, entropies, np.zeros((4, 2, 4), bool), masses=masses, options=options)


def test_heads_come_from_the_first_half(study: Study) -> None:
    sets = causal.head_sets(study)
    assert sets["criteria"] == ((ON,),) and sets["labels"] == sets["attention_sum"] == ((OFF,),)
    assert len(sets["random"]) == 5
    assert {head for heads in sets["random"] for head in heads} <= {Head(1, 2), Head(1, 3)}
    assert sets["all"] == (tuple(Head(1, head) for head in range(4)),)
    unchanged, *conditions = causal.ablation_conditions(study)
    assert unchanged.heads == ()
    assert [one.kind for one in conditions[:3]] == ["criteria", "labels", "attention_sum"]
    assert {(one.kind, one.draw) for one in conditions} == set(causal.recipes(study))


def test_causal_numbers_by_hand(study: Study) -> None:
    """Only the second half is measured; the scores of the first half are all wrong."""
    right, wrong = Score(0.9, True, 1.0), Score(0.1, False, 0.0)
    scores = {key: RecipeScores([wrong, wrong, right, right]) for key in causal.recipes(study)}
    scores["attention_sum", 0] = RecipeScores([wrong, wrong, right, wrong])
    answers = {(one.kind, one.draw): np.array([1.0, 0.5]) for one in causal.ablation_conditions(study)}
    answers["criteria", 0] = np.array([0.0, 0.5])
    answers["random", 2] = np.array([0.5, 0.5])

    found = causal.causal(replace(study, answers=answers), scores)
    numbers = found.numbers
    assert numbers["answers"] == 0.75 and numbers["num"] == 2 and numbers["num_chosen_on"] == 2
    assert numbers["criteria"]["acc@0.5"] == 1 and numbers["attention_sum"]["acc@0.5"] == 0.5
    assert numbers["criteria"]["fall"] == 0.5 and numbers["criteria"]["fall_interval"] == [0, 1]
    assert numbers["random"]["fall"] == pytest.approx(0.05) and numbers["labels"]["fall"] == 0
    assert numbers["more_than_random"][0] == pytest.approx(0.45)
    assert [row[0] for row in found.tables[0].rows] == list(causal.RANKINGS.values())
    assert "these entries do not show" in found.reading  # only two


def test_the_command_writes_numbers_and_a_page(front: Front) -> None:
    front.succeed("stage=experiment", "experiment=causal", "data=scenes", "scenes.count=2", "scenes.size=96")
    found = front.json("experiments/causal.json")["numbers"]
    assert found["num"] == 1 and 0 <= found["all"]["answers"] <= found["answers"] <= 1
    assert len(found["all"]["heads"][0]) == 32
    assert "all heads" in (front.out / "experiments" / "causal.md").read_text()


def test_entries_need_answers(front: Front) -> None:
    write_data(front.folder, 4, bbox=[4, 4, 40, 40])
    result = front.finder("stage=experiment", "experiment=causal", "data_file=data.jsonl")
    assert result.status == 2 and 'has no "answer"' in one_line(result.err)
