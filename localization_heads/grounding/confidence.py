"""How sure a box is: signals that a grounding gives away, and the calibration that makes probabilities of them.

Two events are told apart: the expression refers to something in the image (`presence`), and the box is right, with an
IoU of at least 0.5 (`confidence`); an expression that refers to nothing has no right box. Each is a logistic
regression on the signals, fitted on labelled entries by `stage=calibrate`. Without one, the confidence is the raw
signal that measured best, and is called uncalibrated (docs/grounding.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.cells import agreement, box_iou, mass_inside, visible_cells, visible_edges
from localization_heads.errors import UsageError, shown
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.grounding.maps import added, map_overlaps
from localization_heads.options.groups import GroundingOptions

VERSION = 1
RAW = "agreement"
"""The signal that is the confidence where there is no calibration."""
TINY = 1e-6


def own_boxes(
    attention: AttentionMaps, grounding: Grounding, options: GroundingOptions
) -> tuple[Box | None, ...]:
    """The box of each head's map alone, by the same read-out; None where its map points at nothing."""
    alone = (ground_maps(attention, [head], options) for head in grounding.heads)
    return tuple(found.box if found.cells.any() else None for found in alone)


def signals(
    attention: AttentionMaps, grounding: Grounding, options: GroundingOptions, map_box: Box | None = None
) -> dict[str, float]:
    """What speaks for a box, by name; higher is surer but for `entropy`.

    - `mass`: share of the combined map's mass in the box (the score).
    - `density`: log of `mass` over the share of the image that the box covers.
    - `entropy`: of the combined map over the image's cells, 0 (one cell) to 1 (all equal).
    - `peak`: log of the strongest cell over the mean.
    - `agreement`: mean IoU of the box with the single heads' own.
    - `overlap`: mean overlap (Bhattacharyya) of the heads' maps with each other.
    - `answer`: overlap of the query token's map with that of the answer's tokens, where these were read.
    - `gain`: `mass` minus the mean mass of other expressions in the box, and `divergence`: 1 minus their mean overlap
      with the map, where there are any.
    - `mask`: IoU of the box with the map's own, where the segmenter's mask made it.
    - `question`: log-odds of yes against no, where the model was asked whether the image shows this, and `first_token`:
      log-probability of the first token that it answers (`signals=true`).
    """
    box, (W, H) = grounding.box, grounding.image_size
    shown_cells = grounding.combined[
        visible_cells(*visible_edges(grounding.image_box, (W, H), grounding.combined.shape))
    ]
    mass = mass_inside(grounding.combined, grounding.image_box, (W, H), box)
    area = (box[2] - box[0]) * (box[3] - box[1]) / (W * H)
    found = {
        "mass": mass,
        "density": math.log(max(mass, TINY) / max(area, TINY)),
        "entropy": entropy(shown_cells),
        "peak": math.log(max(float(shown_cells.max()), TINY) / max(float(shown_cells.mean()), TINY)),
        "agreement": agreement(box, grounding.own_boxes or own_boxes(attention, grounding, options)),
        "overlap": _mean_overlap([attention.attention[head] for head in grounding.heads]),
    }
    if attention.answer is not None:
        sums = [added(replace(attention, attention=read, answer=None), grounding.heads, options)
                for read in (attention.attention, attention.answer)]  # fmt: skip
        found["answer"] = _mean_overlap(sums)
    if attention.others:
        own = added(attention, grounding.heads, options)
        others = [added(other, grounding.heads, options) for other in attention.others]
        inside = [mass_inside(one, grounding.image_box, (W, H), box) for one in (own, *others)]
        found["gain"] = inside[0] - float(np.mean(inside[1:]))
        found["divergence"] = 1 - float(np.mean([_mean_overlap([own, other]) for other in others]))
    if map_box is not None:
        found["mask"] = float(box_iou(box, map_box))
    asked = {"question": attention.presence_logit, "first_token": attention.answer_logprob}
    found |= {name: value for name, value in asked.items() if value is not None}
    return found


def entropy(values: NDArray[np.floating[Any]]) -> float:
    """`-sum p log p / log n` of n cells scaled to a sum of 1: 0 of a single cell, 1 of equal ones.

    >>> entropy(np.array([1.0, 1.0])), entropy(np.array([1.0, 0.0]))
    (1.0, 0.0)
    """
    shares = np.clip(values, 0, None).ravel()
    if shares.size < 2 or not shares.sum() > 0:
        return 1.0
    shares = shares[shares > 0] / shares.sum()
    return abs(float(-(shares * np.log(shares)).sum() / math.log(values.size)))


def _mean_overlap(maps: Sequence[NDArray[np.floating[Any]]]) -> float:
    """Mean Bhattacharyya coefficient over all pairs of maps; 1 for a single one."""
    pairs = map_overlaps(maps)[np.triu_indices(len(maps), 1)]
    return float(pairs.mean()) if pairs.size else 1.0


@dataclass(frozen=True)
class Logistic:
    """`1 / (1 + exp(-(intercept + sum_i weight_i * signal_i)))`."""

    intercept: float
    weights: Mapping[str, float]

    def probability(self, found: Mapping[str, float]) -> float:
        """Of signals, which must have all that there are weights for."""
        return 1 / (1 + math.exp(-min(max(self.total(found), -500), 500)))

    def total(self, found: Mapping[str, float]) -> float:
        """`intercept + sum_i weight_i * signal_i`."""
        return self.intercept + sum(weight * found[name] for name, weight in self.weights.items())


@dataclass(frozen=True)
class Calibration:
    """What makes probabilities of signals, for one model, its heads and one recipe (`calibration.json`).

    Args:
        recipe: all that the signals depend on, as JSON values by name; another recipe's signals mean other things.
        right: the probability that the box is right.
        present: that the expression refers to something in the image; None where no entry was absent.
        measured: how well it does on entries that it was not fitted on, by name.
    """

    recipe: Mapping[str, Any]
    right: Logistic
    present: Logistic | None = None
    num_labels: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def check(self, recipe: Mapping[str, Any], source: object = "calibration.json") -> None:
        """UsageError, naming them, if any part of the recipe is another one."""
        names = sorted({*self.recipe, *recipe})
        other = [name for name in names if self.recipe.get(name) != recipe.get(name)]
        if other:
            named = ", ".join(f"{name} {_brief(self.recipe.get(name))}" for name in other)
            raise UsageError(
                f"{source} was fitted with {named}: run stage=calibrate again with the options of this run"
            )

    def fits(self, recipe: Mapping[str, Any]) -> bool:
        """Whether it is for this recipe."""
        return dict(self.recipe) == dict(recipe)

    @property
    def names(self) -> set[str]:
        """Of the signals that it needs."""
        return {*self.right.weights, *(self.present.weights if self.present else ())}

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """The inverse of `to_json`. UsageError for anything else."""
        try:
            if data["version"] != VERSION or isinstance(data["version"], bool):
                raise UsageError(f"version {shown(data['version'])} is unknown: this tool reads {VERSION}")
            present = data["present"]
            return cls(
                dict(data["recipe"]),
                _logistic(data["right"]),
                None if present is None else _logistic(present),
                int(data["num_labels"]),
                dict(data["measured"]),
            )
        except KeyError as error:
            raise UsageError(f"it is no calibration: {error} is missing") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError("it is no calibration: a value is of the wrong kind") from error


def _logistic(data: Any) -> Logistic:
    weights = {str(name): float(weight) for name, weight in data["weights"].items()}
    found = Logistic(float(data["intercept"]), weights)
    if not all(math.isfinite(value) for value in (found.intercept, *weights.values())):
        raise ValueError
    return found


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def judged(grounding: Grounding, found: Mapping[str, float], calibration: Calibration | None) -> Grounding:
    """The grounding with its signals, its confidence and, where the calibration knows it, its presence.

    Without a calibration the confidence is the raw signal. It is None where a signal that the calibration weighs could
    not be had, as `gain` where the image has no other expression.
    """
    grounding = replace(grounding, signals=found)
    if calibration is None:
        return replace(grounding, confidence=found[RAW])
    if not calibration.names <= found.keys():
        return grounding
    presence = None if calibration.present is None else calibration.present.probability(found)
    return replace(
        grounding, confidence=calibration.right.probability(found), presence=presence, calibrated=True
    )


def abstained(grounding: Grounding, least: float | None) -> Grounding:
    """The grounding, `absent` where its presence (where that is not known, its confidence) is below `least`.

    Only a probability can decide that: without a calibration nothing is absent.
    """
    sure = grounding.confidence if grounding.presence is None else grounding.presence
    if least is None or sure is None or not grounding.calibrated:
        return grounding
    return replace(grounding, absent=sure < least)
