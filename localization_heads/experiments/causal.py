"""`experiment=causal`: do the criteria find the heads that the model needs? Not in the paper.

Compares rankings of heads by how well their heads ground, and by how many answers go wrong without them. Every ranking
chooses its heads on the first half of the entries and is measured on the second.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localization_heads.evaluation.controls import DRAWS
from localization_heads.evaluation.metrics import bootstrap_interval
from localization_heads.experiments.ablation import Condition, make_conditions
from localization_heads.experiments.paper import Finding, Table, percent
from localization_heads.experiments.study import Study, highest, join_names
from localization_heads.experiments.validation import Heads, Recipe, RecipeScores

RANKINGS = {
    "criteria": "criteria",
    "labels": "labels",
    "attention_sum": "attention sum",
    "random": "random",
    "all": "all heads",
}
"""The rows of the tables: the label-free criteria, the attention in the ground truth, the attention sum and, as
controls, random heads of the same layers and all heads."""
UNCHANGED = "none"
"""The condition in which no head is switched off."""


def selection_size(study: Study) -> int:
    """How many entries, from the first on, the heads are chosen on; the others are held out to measure them."""
    return len(study) // 2


def head_sets(study: Study) -> dict[str, tuple[Heads, ...]]:
    """The heads that each ranking chooses on the first half of the entries: one set, or several random ones.

    Random heads avoid those of the other rankings as far as their layers have enough heads.
    """
    assert study.masses is not None
    chosen_on, k = slice(0, selection_size(study)), study.options.k
    exclude = study.options.criteria.exclude_layers
    first_half = replace(
        study,
        sums=study.sums[chosen_on],
        entropies=study.entropies[chosen_on],
        bottom_row=study.bottom_row[chosen_on],
    )
    criteria = first_half.require_heads()
    labels = highest(study.masses[chosen_on].mean(axis=0, dtype=np.float64), k, exclude)
    by_sum = highest(first_half.sums.mean(axis=0, dtype=np.float64), k, exclude)
    listed, size = tuple(dict.fromkeys([*criteria, *labels, *by_sum])), len(criteria)
    conditions = make_conditions(
        listed, by_sum, [size], draws=DRAWS, heads_per_layer=study.shape[1], seed=study.options.seed
    )
    return {
        "criteria": (criteria,),
        "labels": (labels,),
        "attention_sum": (by_sum,),
        "random": tuple(one.heads for one in conditions if one.kind == "random" and one.size == size),
        "all": (study.all_heads,),
    }


def ablation_conditions(study: Study) -> tuple[Condition, ...]:
    """The conditions under which the second half is answered: the unchanged model, then without each set of heads."""
    conditions = [Condition(UNCHANGED, 0, 0, ())]
    for name, sets in head_sets(study).items():
        conditions += [Condition(name, len(heads), draw, heads) for draw, heads in enumerate(sets)]
    return tuple(conditions)


def recipes(study: Study) -> dict[Hashable, Recipe]:
    """Grounding with each set of heads."""
    return {
        (name, draw): Recipe(heads, study.options.grounding)
        for name, sets in head_sets(study).items()
        for draw, heads in enumerate(sets)
    }


def causal(study: Study, scores: Mapping[Any, RecipeScores]) -> Finding:
    """On the second half: how well the heads of each ranking ground, and how far right answers fall without them."""
    assert study.answers is not None
    sets = head_sets(study)
    num_chosen_on = selection_size(study)
    before = study.answers[UNCHANGED, 0]
    numbers: dict[str, Any] = {
        "answers": float(before.mean()),
        "num": len(before),
        "num_chosen_on": num_chosen_on,
    }
    falls = {}
    for name in RANKINGS:
        draws = range(len(sets[name]))
        held_out = [scores[name, draw].scores[num_chosen_on:] for draw in draws]
        accuracy = np.mean([[score.iou >= 0.5 for score in one] for one in held_out], axis=0)
        pointing = np.mean([[score.pointing for score in one] for one in held_out], axis=0)
        without = np.mean([study.answers[name, draw] for draw in draws], axis=0)
        falls[name] = before - without
        numbers[name] = {
            "heads": [[list(head) for head in heads] for heads in sets[name]],
            "acc@0.5": float(accuracy.mean()),
            "acc@0.5_interval": list(bootstrap_interval(accuracy)),
            "pointing": float(pointing.mean()),
            "answers": float(without.mean()),
            "fall": float(falls[name].mean()),
            "fall_interval": list(bootstrap_interval(falls[name])),
        }
    excess = falls["criteria"] - falls["random"]
    numbers["more_than_random"] = [float(excess.mean()), *bootstrap_interval(excess)]
    held_out_entries = f"on the {len(before)} other entries (%)"
    tables = (
        Table(
            ("heads by", "the heads", "Acc@0.5 [95 %]", "pointing"),
            tuple(_grounding_row(name, sets[name], numbers[name]) for name in RANKINGS),
            f"Chosen on {num_chosen_on} entries: localisation {held_out_entries}",
        ),
        Table(
            ("switched off", "answers right", "points lost [95 %]"),
            tuple(_answers_row(name, numbers[name]) for name in RANKINGS),
            f"The same heads switched off: right answers {held_out_entries}",
        ),
    )
    return Finding("causal", "Do the criteria find what matters?", tables, _reading(numbers), numbers)


def _grounding_row(name: str, sets: Sequence[Heads], numbers: Mapping[str, Any]) -> tuple[str, ...]:
    size = len(sets[0])
    heads = f"{len(sets)} sets of {size}" if len(sets) > 1 else join_names(sets[0]) if size <= 10 else str(size)
    accuracy = f"{percent(numbers['acc@0.5'])} {_interval(numbers['acc@0.5_interval'])}"
    return RANKINGS[name], heads, accuracy, percent(numbers["pointing"])


def _answers_row(name: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    fall = f"{percent(numbers['fall'])} {_interval(numbers['fall_interval'])}"
    return RANKINGS[name], percent(numbers["answers"]), fall


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"[{percent(low, 0)}, {percent(high, 0)}]"


def _reading(numbers: Mapping[str, Any]) -> str:
    criteria, random, all_heads = numbers["criteria"], numbers["random"], numbers["all"]
    excess, low, high = numbers["more_than_random"]
    verdict = (
        "the heads that the criteria find are heads that the answers need"
        if low > 0
        else "these entries do not show that the answers need the heads of the criteria more than others"
    )
    return (
        f"As the model is, {percent(numbers['answers'])} % of the answers are right. Without the heads of the "
        f"criteria it is {percent(criteria['answers'])} %, without random heads of the same layers "
        f"{percent(random['answers'])} %, a difference of {percent(excess)} points [{percent(low)}, {percent(high)}]: "
        f"{verdict}. Grounding with all heads, without selection, reaches an Acc@0.5 of "
        f"{percent(all_heads['acc@0.5'])}, with the heads of the criteria {percent(criteria['acc@0.5'])}, with random "
        f"ones {percent(random['acc@0.5'])}."
    )
