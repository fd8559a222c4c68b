"""How sure a box is: signals that a grounding gives away, and the calibration that makes probabilities of them.

Two events are told apart: the expression refers to something in the image (`presence`), and if it does, the box is
right, with an IoU of at least 0.5. What speaks for the one says little of the other, so each is a logistic regression
of its own, fitted on labelled entries by `stage=calibrate`; the `confidence` that the box is right is their product.
Without a calibration it is the raw signal that measured best, and is called uncalibrated (docs/confidence.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.cells import mass_inside, mean_box_iou, visible_cells
from localization_heads.errors import UsageError, shown
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.grounding.maps import pairwise_overlaps, sum_maps
from localization_heads.options.groups import GroundingOptions

VERSION = 2
UNCALIBRATED_SIGNAL = "agreement"
"""The signal that is the confidence where there is no calibration."""
TINY = 1e-6
MODEL_SIGNALS = ("question", "statement", "first_token", "expression")
"""Signals that the model has to be asked for (`signals=true`)."""


def single_head_boxes(
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
    - `gain`: mass of the map, before any contrast, in the map's own box, minus the mean mass of other expressions'
      maps in it, where there are any; and then `divergence`: 1 minus their mean overlap with the map.
    - `mask`: IoU of the segmenter's mask with the map's own box, where the box may be that of the mask.
    - `attention L4H6`, for each head: log of its attention sum, the share of its attention that goes to the image.
    - With `signals=true`, `question` and `statement`: log-odds of yes against no to whether the thing is there, and to
      whether the expression holds; `first_token`: log-probability of the first token that the model answers;
      `expression`: that of the expression's own words after its first (`AttentionMaps.expression_logprob`).

    Args:
        map_box: the box before the segmenter was at work; that of the grounding by default.
    """
    box, (W, H) = grounding.box, grounding.image_size
    shown_cells, mass = grounding.combined[visible_cells(*grounding.edges)], grounding.mass_in(box)
    area = (box[2] - box[0]) * (box[3] - box[1]) / (W * H)
    found = {
        "mass": mass,
        "density": math.log(max(mass, TINY) / max(area, TINY)),
        "entropy": entropy(shown_cells),
        "peak": math.log(max(float(shown_cells.max()), TINY) / max(float(shown_cells.mean()), TINY)),
        "agreement": mean_box_iou(
            box, grounding.own_boxes or single_head_boxes(attention, grounding, options)
        ),
        "overlap": _mean_overlap([attention.attention[head] for head in grounding.heads]),
    }
    if attention.answer is not None:
        sums = [sum_maps(replace(attention, attention=read, answer=None), grounding.heads, options)
                for read in (attention.attention, attention.answer)]  # fmt: skip
        found["answer"] = _mean_overlap(sums)
    own, *others = (sum_maps(one, grounding.heads, options) for one in (attention, *attention.others))
    inside = [mass_inside(one, grounding.image_box, (W, H), map_box or box) for one in (own, *others)]
    found["gain"] = inside[0] - (float(np.mean(inside[1:])) if others else 0.0)
    if others:
        found["divergence"] = 1 - float(np.mean([_mean_overlap([own, other]) for other in others]))
    for head in grounding.heads:
        total = float(attention.attention[head].sum(dtype=np.float64))
        found[f"attention {head}"] = math.log(max(total, TINY))
    said = (
        attention.presence_logit,
        attention.statement_logit,
        attention.answer_logprob,
        attention.expression_logprob,
    )
    more = {"mask": grounding.mask_overlap, **dict(zip(MODEL_SIGNALS, said, strict=True))}
    return found | {name: value for name, value in more.items() if value is not None}


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
    pairs = pairwise_overlaps(maps)[np.triu_indices(len(maps), 1)]
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
        right: the probability that the box is right if the expression refers to something in the image.
        present: that it does; None where no entry was absent.
        measured: how well it does on entries that it was not fitted on, by name.
    """

    recipe: Mapping[str, Any]
    right: Logistic
    present: Logistic | None = None
    num_labels: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def check(self, recipe: Mapping[str, Any], source: object = "calibration.json") -> None:
        """UsageError, naming them, if any part of the recipe is another one."""
        if other := self.differences(recipe):
            named = ", ".join(f"{name} {_brief(self.recipe.get(name))}" for name in other)
            raise UsageError(
                f"{source} was fitted with {named}: run stage=calibrate again with the options of this run"
            )

    def differences(self, recipe: Mapping[str, Any]) -> list[str]:
        """The parts in which it is for another recipe, by name; empty if it is for this one.

        A run that does not ask the model how sure it is does so where this needs it: that is no difference.
        """
        recipe = {**recipe, "signals": self.needs_model_signals or recipe.get("signals")}
        names = sorted({*self.recipe, *recipe})
        return [name for name in names if self.recipe.get(name) != recipe.get(name)]

    def presence(self, found: Mapping[str, float]) -> float | None:
        """The probability that the expression refers to something; None where no entry was absent."""
        return None if self.present is None else self.present.probability(found)

    def confidence(self, found: Mapping[str, float]) -> float:
        """The probability that the box is right: that there is something, times that the box is right if so."""
        there = self.presence(found)
        return self.right.probability(found) * (1.0 if there is None else there)

    @property
    def needs_model_signals(self) -> bool:
        """Whether the model has to be asked how sure it is (`signals=true`)."""
        return self.recipe.get("signals") is True

    @property
    def signal_names(self) -> set[str]:
        """Of the signals that it needs."""
        return {*self.right.weights, *(self.present.weights if self.present else ())}

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """The inverse of `to_json`. UsageError for anything else."""
        try:
            if data["version"] != VERSION or isinstance(data["version"], bool):
                raise UsageError(
                    f"it is of version {shown(data['version'])}, and this release reads {VERSION}: run stage=calibrate "
                    "again"
                )
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


def add_confidence(
    grounding: Grounding, found: Mapping[str, float], calibration: Calibration | None
) -> Grounding:
    """The grounding with its signals, its confidence and, where the calibration knows it, its presence.

    Without a calibration the confidence is the raw signal. It is None where a signal that the calibration weighs could
    not be had, as where the maps are those of a file and the model was not asked how sure it is.
    """
    grounding = replace(grounding, signals=found)
    if calibration is None:
        return replace(grounding, confidence=found[UNCALIBRATED_SIGNAL])
    if not calibration.signal_names <= found.keys():
        return grounding
    presence, confidence = calibration.presence(found), calibration.confidence(found)
    return replace(grounding, confidence=confidence, presence=presence, calibrated=True)


def apply_abstention(grounding: Grounding, least: float | None) -> Grounding:
    """The grounding, `absent` where its presence (where that is not known, its confidence) is below `least`.

    Only a probability can decide that: without a calibration nothing is absent.
    """
    sure = grounding.confidence if grounding.presence is None else grounding.presence
    if least is None or sure is None or not grounding.calibrated:
        return grounding
    return replace(grounding, absent=sure < least)
