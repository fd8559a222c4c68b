"""Recipes, and how well they ground: every recipe of every experiment in one pass over the maps on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.evaluation.metrics import (
    accuracy_at,
    bootstrap_interval,
    box_iou,
    ciou,
    giou,
    pointing_hit,
)
from localization_heads.evaluation.scores import Truth, rounded
from localization_heads.grounding.maps import Grounding, GroundingOptions, ground_maps
from localization_heads.heads.head import Head

Heads = tuple[Head, ...]
Refine = Callable[[int, Grounding], Grounding]
"""What a segmenter makes of the grounding of the sample of that number."""


@dataclass(frozen=True)
class Recipe:
    """Which heads' maps are added, and how the sum becomes a box.

    Args:
        heads: the same for every sample, or, as a tuple of tuples, each sample's own. A sample without heads is not
            scored.
        segmented: whether the segmenter has its turn, where there is one. Sweeps do without: it would take most of
            their time and blur what they compare.
    """

    heads: Heads | tuple[Heads, ...]
    options: GroundingOptions
    segmented: bool = False

    def of(self, sample: int) -> Heads:
        own = bool(self.heads) and not isinstance(self.heads[0], Head)
        return self.heads[sample] if own else self.heads  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Scores:
    """How well one recipe grounds every sample that it has heads for; arrays are `[sample]`.

    Args:
        iou: IoU of the box with the true one (REC).
        hit: pointing game of the combined map.
        overlap: `[sample with a mask, 2]`: pixels in the intersection and the union of the masks (RES).
    """

    iou: NDArray[np.float64]
    hit: NDArray[np.bool_]
    overlap: NDArray[np.int64]

    def __len__(self) -> int:
        """The samples that are scored."""
        return len(self.iou)

    @property
    def accuracy(self) -> float:
        """REC: Acc@0.5; like every other NaN without samples."""
        return accuracy_at(self.iou)

    @property
    def mean_iou(self) -> float:
        return float(np.mean(self.iou)) if len(self) else np.nan

    @property
    def pointing(self) -> float:
        return float(np.mean(self.hit)) if len(self) else np.nan

    @property
    def ciou(self) -> float:
        """RES: cumulative IoU of the masks; NaN without masks."""
        return ciou(self._pairs)

    @property
    def giou(self) -> float:
        return giou(self._pairs)

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return [(int(shared), int(union)) for shared, union in self.overlap]

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a file; None where undefined."""
        interval = bootstrap_interval(self.iou >= 0.5)
        values = {
            "acc@0.5": self.accuracy,
            "mean_iou": self.mean_iou,
            "pointing": self.pointing,
            "ciou": self.ciou,
            "giou": self.giou,
        }
        plain: dict[str, Any] = {name: rounded(value) for name, value in values.items()}
        return plain | {"acc@0.5_interval": [rounded(bound) for bound in interval]}


def score(
    recipes: Mapping[Any, Recipe],
    samples: Iterable[tuple[AttentionMaps, Truth]],
    refine: Refine | None = None,
) -> dict[Any, Scores]:
    """The scores of every recipe, each sample's maps being read once. Equal recipes are computed once.

    Args:
        samples: in the order of the study; each is the maps of one sample and its truth.
        refine: the segmenter, for the recipes that ask for it.
    """
    different = list(dict.fromkeys(recipes.values()))
    rows = [
        [_score_one(recipe, number, *sample, refine) for recipe in different]
        for number, sample in enumerate(samples)
    ]
    gathered = {recipe: _gather([row[i] for row in rows]) for i, recipe in enumerate(different)}
    return {name: gathered[recipe] for name, recipe in recipes.items()}


_One = tuple[float, bool, tuple[int, int] | None]


def _score_one(
    recipe: Recipe, number: int, maps: AttentionMaps, truth: Truth, refine: Refine | None
) -> _One | None:
    """None where the recipe has no heads for the sample."""
    if not (heads := recipe.of(number)):
        return None
    grounding = ground_maps(maps, heads, recipe.options)
    if refine and recipe.segmented:
        grounding = refine(number, grounding)
    overlap = None if truth.mask is None else truth.overlap(grounding.mask)
    return float(box_iou(grounding.box, truth.box)), pointing_hit(grounding.point, truth.box), overlap


def _gather(every: Sequence[_One | None]) -> Scores:
    rows = [row for row in every if row is not None]
    overlaps = [overlap for _, _, overlap in rows if overlap is not None]
    return Scores(
        iou=np.array([iou for iou, _, _ in rows], dtype=np.float64),
        hit=np.array([hit for _, hit, _ in rows], dtype=bool),
        overlap=np.array(overlaps, dtype=np.int64).reshape(-1, 2),
    )
