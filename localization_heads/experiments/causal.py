"""Do the criteria find the heads that matter? Rankings side by side, by localisation and by what is lost without them.

Every ranking chooses its heads on the first half of the entries and is measured on the second. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from localization_heads.evaluation.controls import DRAWS
from localization_heads.evaluation.metrics import bootstrap_interval
from localization_heads.experiments.ablation import Condition, conditions
from localization_heads.experiments.paper import Finding, Table, percent
from localization_heads.experiments.study import Study, highest, names
from localization_heads.experiments.validation import Heads, Recipe, Scored

RANKINGS = {
    "criteria": "criteria",
    "labels": "labels",
    "attention_sum": "attention sum",
    "random": "random",
    "all": "all heads",
}
"""The rows of the table: both criteria, without labels; the attention in the truth; the attention sum; random heads of
the same layers; and no choice at all, as a control."""
UNCHANGED = "none"


def split(study: Study) -> int:
    """How many entries the heads are chosen on: the first half."""
    return len(study) // 2


def head_sets(study: Study) -> dict[str, tuple[Heads, ...]]:
    """The heads of each ranking, from the first half of the entries; of `random`, several sets.

    Random heads are none of the other rankings' as far as their layers have others.
    """
    assert study.masses is not None
    half, k = slice(0, split(study)), study.options.k
    exclude = study.options.criteria.exclude_layers
    first = replace(
        study, sums=study.sums[half], entropies=study.entropies[half], bottom_row=study.bottom_row[half]
    )
    criteria = first.needed_heads()
    labels = highest(study.masses[half].mean(axis=0, dtype=np.float64), k, exclude)
    by_sum = highest(first.sums.mean(axis=0, dtype=np.float64), k, exclude)
    listed = tuple(dict.fromkeys([*criteria, *labels, *by_sum]))
    drawn = conditions(
        listed, by_sum, [len(criteria)], draws=DRAWS, num_heads=study.shape[1], seed=study.options.seed
    )
    return {
        "criteria": (criteria,),
        "labels": (labels,),
        "attention_sum": (by_sum,),
        "random": tuple(one.heads for one in drawn if one.kind == "random" and one.number == len(criteria)),
        "all": (study.everyone,),
    }


def switched_off(study: Study) -> tuple[Condition, ...]:
    """What the answers of the second half are measured without: nothing first, then the heads of each set."""
    found = [Condition(UNCHANGED, 0, 0, ())]
    for name, sets in head_sets(study).items():
        found += [Condition(name, len(heads), draw, heads) for draw, heads in enumerate(sets)]
    return tuple(found)


def recipes(study: Study) -> dict[Hashable, Recipe]:
    """Grounding with the heads of each set."""
    return {
        (name, draw): Recipe(heads, study.options.grounding)
        for name, sets in head_sets(study).items()
        for draw, heads in enumerate(sets)
    }


def causal(study: Study, scores: Mapping[Any, Scored]) -> Finding:
    """Localisation with the heads of each ranking, and the fall in right answers without them, on the second half."""
    assert study.answers is not None
    sets = head_sets(study)
    half = split(study)
    before = study.answers[UNCHANGED, 0]
    numbers: dict[str, Any] = {"answers": float(before.mean()), "num": len(before), "num_chosen_on": half}
    lost = {}
    for name in RANKINGS:
        draws = range(len(sets[name]))
        own = [scores[name, draw].scores[half:] for draw in draws]
        accuracy = np.mean([[score.iou >= 0.5 for score in one] for one in own], axis=0)
        pointing = np.mean([[score.pointing for score in one] for one in own], axis=0)
        without = np.mean([study.answers[name, draw] for draw in draws], axis=0)
        numbers[name] = {
            "heads": [[list(head) for head in heads] for heads in sets[name]],
            "acc@0.5": float(accuracy.mean()),
            "acc@0.5_interval": list(bootstrap_interval(accuracy)),
            "pointing": float(pointing.mean()),
            "answers": float(without.mean()),
            "fall": float((before - without).mean()),
            "fall_interval": list(bootstrap_interval(before - without)),
        }
        lost[name] = before - without
    more = lost["criteria"] - lost["random"]
    numbers["more_than_random"] = [float(more.mean()), *bootstrap_interval(more)]
    others = f"on the {len(before)} other entries (%)"
    tables = (
        Table(
            ("heads by", "the heads", "Acc@0.5 [95 %]", "pointing"),
            tuple(_localising(name, sets[name], numbers[name]) for name in RANKINGS),
            f"Chosen on {half} entries: localisation {others}",
        ),
        Table(
            ("switched off", "answers right", "points lost [95 %]"),
            tuple(_lost(name, numbers[name]) for name in RANKINGS),
            f"The same heads switched off: right answers {others}",
        ),
    )
    return Finding("causal", "Do the criteria find what matters?", tables, _reading(numbers), numbers)


def _localising(name: str, sets: Sequence[Heads], found: Mapping[str, Any]) -> tuple[str, ...]:
    count = len(sets[0])
    shown = f"{len(sets)} sets of {count}" if len(sets) > 1 else names(sets[0]) if count <= 10 else str(count)
    accuracy = f"{percent(found['acc@0.5'])} {_bounds(found['acc@0.5_interval'])}"
    return RANKINGS[name], shown, accuracy, percent(found["pointing"])


def _lost(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    fall = f"{percent(found['fall'])} {_bounds(found['fall_interval'])}"
    return RANKINGS[name], percent(found["answers"]), fall


def _bounds(interval: Sequence[float]) -> str:
    low, high = interval
    return f"[{percent(low, 0)}, {percent(high, 0)}]"


def _reading(numbers: Mapping[str, Any]) -> str:
    criteria, random, every = numbers["criteria"], numbers["random"], numbers["all"]
    more, low, high = numbers["more_than_random"]
    verdict = (
        "the heads that the criteria find are heads that the answers need"
        if low > 0
        else "that the answers need the heads of the criteria more than others cannot be told from these entries"
    )
    return (
        f"As the model is, {percent(numbers['answers'])} % of the answers are right. Without the heads of the "
        f"criteria it is {percent(criteria['answers'])} %, without random heads of the same layers "
        f"{percent(random['answers'])} %, a difference of {percent(more)} points [{percent(low)}, {percent(high)}]: "
        f"{verdict}. Grounding with all heads, without any choice, reaches an Acc@0.5 of "
        f"{percent(every['acc@0.5'])}, with the heads of the criteria {percent(criteria['acc@0.5'])}, with random "
        f"ones {percent(random['acc@0.5'])}."
    )
