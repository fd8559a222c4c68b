"""Every experiment by the name that `experiment=` takes, in the order of the paper."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from localization_heads.experiments import causal, selection, tables, validation
from localization_heads.experiments.paper import Finding
from localization_heads.experiments.study import Study
from localization_heads.experiments.validation import Recipe, RecipeScores


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper.

    Args:
        find: makes the finding from the study and the scores of `recipes`.
        recipes: the recipes to score, by name.
        needs_truth: whether the entries need a ground-truth box or mask.
    """

    find: Callable[[Study, Mapping[Any, RecipeScores]], Finding]
    recipes: Callable[[Study], dict[Hashable, Recipe]] = lambda study: {}
    needs_truth: bool = True


EXPERIMENTS: dict[str, Experiment] = {
    "fig3": Experiment(selection.attention_sums, needs_truth=False),
    "fig6a": Experiment(selection.selection_frequency, needs_truth=False),
    "fig6b": Experiment(validation.frequency_and_iou),
    "random": Experiment(validation.against_random, validation.random_recipes),
    "tab1": Experiment(tables.comprehension, tables.main_recipes),
    "tab2": Experiment(tables.segmentation, tables.main_recipes),
    "tab3": Experiment(tables.reasoning, tables.main_recipes),
    "tab4": Experiment(tables.head_count, tables.head_count_recipes),
    "tab5": Experiment(tables.criteria, tables.criteria_recipes),
    "tab8": Experiment(tables.smoothing, tables.smoothing_recipes),
    "fig13": Experiment(selection.tau_sweep, selection.tau_recipes),
    "fig14": Experiment(selection.n_sweep, selection.n_recipes),
    "causal": Experiment(causal.causal, causal.recipes),
}
