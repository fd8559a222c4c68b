"""Every experiment by the name that `experiment=` takes, in the order of the paper."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from localization_heads.experiments import selection, tables, validation
from localization_heads.experiments.paper import Finding
from localization_heads.experiments.study import Study
from localization_heads.experiments.validation import Recipe, Scores


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper.

    Args:
        recipes: the recipes to be scored, by name.
        find: computes the finding from the study and these scores.
        needs_truth: whether it needs entries with a true box or mask.
    """

    recipes: Callable[[Study], dict[Hashable, Recipe]]
    find: Callable[[Study, Mapping[Any, Scores]], Finding]
    needs_truth: bool = True


EXPERIMENTS: dict[str, Experiment] = {
    "fig3": Experiment(selection.no_recipes, selection.attention_sums, needs_truth=False),
    "fig6a": Experiment(selection.no_recipes, selection.selection_frequency, needs_truth=False),
    "fig6b": Experiment(selection.no_recipes, validation.frequency_and_iou),
    "random": Experiment(validation.random_recipes, validation.against_random),
    "tab1": Experiment(tables.main_recipes, tables.comprehension),
    "tab2": Experiment(tables.main_recipes, tables.segmentation),
    "tab3": Experiment(tables.main_recipes, tables.reasoning),
    "tab4": Experiment(tables.head_count_recipes, tables.head_count),
    "tab5": Experiment(tables.criteria_recipes, tables.criteria),
    "tab8": Experiment(tables.smoothing_recipes, tables.smoothing),
    "fig13": Experiment(selection.tau_recipes, selection.tau_sweep),
    "fig14": Experiment(selection.n_recipes, selection.n_sweep),
}
