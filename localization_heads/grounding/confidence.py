"""Confidence of a box: signals computed from a grounding, and the calibration that turns them into probabilities.

Two events are separated: the expression refers to something in the image (`presence`), and if it does, the box is
right, with an IoU of at least 0.5. Evidence for one says little about the other, so each has its own logistic
regression, fitted on labelled entries by `stage=calibrate`; the `confidence` that the box is right is their product.
Without a calibration the confidence is the best single raw signal, and marked as uncalibrated (docs/confidence.md).
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
"""Of `calibration.json`."""
UNCALIBRATED_SIGNAL = "agreement"
"""The signal that serves as confidence without a calibration."""
EPSILON = 1e-6
"""Smallest value of which a logarithm is taken."""
MODEL_SIGNALS = ("question", "statement", "first_token", "expression")
"""Signals that take extra prompts to the model (`signals=true`)."""


def signals(
    attention: AttentionMaps, grounding: Grounding, options: GroundingOptions, map_box: Box | None = None
) -> dict[str, float]:
    """Evidence for a box, by name; for all but `entropy`, higher is more certain.

    - `mass`: share of the combined map's mass in the box (the score).
    - `density`: log of `mass` over the share of the image that the box covers.
    - `entropy`: of the combined map over the image's cells, 0 (one cell) to 1 (uniform).
    - `peak`: log of the strongest cell over the mean.
    - `agreement`: mean IoU of the box with each head's own box.
    - `overlap`: mean overlap (Bhattacharyya) of all pairs of heads' maps.
    - `answer`: overlap of the query token's map with that of the answer's tokens, if there is one.
    - `gain`: mass of the map, before any contrast, in the map's own box, minus the mean mass in it of other
      expressions' maps, if there are any; and then `divergence`: 1 minus their mean overlap with the map.
    - `mask`: IoU of the segmenter's mask with the map's own box, if the box may be taken from the mask.
    - `attention L4H6`, for each head: log of its attention sum.
    - With `signals=true`, `question` and `statement`: log-odds of yes against no when the model is asked whether the
      thing is there, and whether the expression holds; `first_token`: log-probability of the first token of the answer;
      `expression`: that of the expression's own tokens after the first (`AttentionMaps.expression_logprob`).

    Args:
        map_box: the box before segmentation; that of the grounding by default.
    """
    box, heads, (W, H) = grounding.box, grounding.heads, grounding.image_size
    visible, mass = grounding.combined[visible_cells(*grounding.edges)], grounding.mass_in(box)
    area = (box[2] - box[0]) * (box[3] - box[1]) / (W * H)
    head_boxes = grounding.own_boxes or single_head_boxes(attention, grounding, options)
    values: dict[str, float | None] = {
        "mass": mass,
        "density": math.log(max(mass, EPSILON) / max(area, EPSILON)),
        "entropy": entropy(visible),
        "peak": math.log(max(float(visible.max()), EPSILON) / max(float(visible.mean()), EPSILON)),
        "agreement": mean_box_iou(box, head_boxes),
        "overlap": _mean_overlap([attention.attention[head] for head in heads]),
    }
    if attention.answer is not None:
        query_map, answer_map = (
            sum_maps(replace(attention, attention=maps, answer=None), heads, options)
            for maps in (attention.attention, attention.answer)
        )
        values["answer"] = _mean_overlap([query_map, answer_map])
    own, *others = (sum_maps(maps, heads, options) for maps in (attention, *attention.others))
    own_mass, *other_masses = (
        mass_inside(combined, grounding.image_box, (W, H), map_box or box) for combined in (own, *others)
    )
    values["gain"] = own_mass - (float(np.mean(other_masses)) if others else 0.0)
    if others:
        values["divergence"] = 1 - float(np.mean([_mean_overlap([own, other]) for other in others]))
    for head in heads:
        total = float(attention.attention[head].sum(dtype=np.float64))
        values[f"attention {head}"] = math.log(max(total, EPSILON))
    from_model = (
        attention.presence_logit,
        attention.statement_logit,
        attention.answer_logprob,
        attention.expression_logprob,
    )
    values |= {"mask": grounding.mask_overlap, **dict(zip(MODEL_SIGNALS, from_model, strict=True))}
    return {name: value for name, value in values.items() if value is not None}


def single_head_boxes(
    attention: AttentionMaps, grounding: Grounding, options: GroundingOptions
) -> tuple[Box | None, ...]:
    """The box of each head alone, by the same read-out; None for a head without a positive cell."""
    groundings = (ground_maps(attention, [head], options) for head in grounding.heads)
    return tuple(alone.box if alone.cells.any() else None for alone in groundings)


def entropy(values: NDArray[np.floating[Any]]) -> float:
    """`-sum p log p / log n` of n cells normalised to a sum of 1: 0 for a single cell, 1 for equal ones.

    >>> entropy(np.array([1.0, 1.0])), entropy(np.array([1.0, 0.0]))
    (1.0, 0.0)
    """
    shares = np.clip(values, 0, None).ravel()
    if shares.size < 2 or not shares.sum() > 0:
        return 1.0
    shares = shares[shares > 0] / shares.sum()
    return abs(float(-(shares * np.log(shares)).sum() / math.log(values.size)))


def _mean_overlap(maps: Sequence[NDArray[np.floating[Any]]]) -> float:
    """Mean Bhattacharyya coefficient over all pairs of maps; 1 for a single map."""
    pairs = pairwise_overlaps(maps)[np.triu_indices(len(maps), 1)]
    return float(pairs.mean()) if pairs.size else 1.0


@dataclass(frozen=True)
class Logistic:
    """`1 / (1 + exp(-(intercept + sum_i weight_i * signal_i)))`."""

    intercept: float
    weights: Mapping[str, float]

    def probability(self, signals: Mapping[str, float]) -> float:
        """The probability given the signals, which must include all that have a weight."""
        return 1 / (1 + math.exp(-min(max(self.logit(signals), -500), 500)))

    def logit(self, signals: Mapping[str, float]) -> float:
        """`intercept + sum_i weight_i * signal_i`."""
        return self.intercept + sum(weight * signals[name] for name, weight in self.weights.items())


@dataclass(frozen=True)
class Calibration:
    """Turns signals into probabilities, for one model, its heads and one recipe (`calibration.json`).

    Args:
        recipe: everything that the signals depend on, as JSON values by name; it is only valid for this recipe.
        right: the probability that the box is right if the expression refers to something in the image.
        present: the probability that it does; None if it was fitted on entries that all were present.
        measured: its metrics on held-out entries, by name.
    """

    recipe: Mapping[str, Any]
    right: Logistic
    present: Logistic | None = None
    num_labels: int = 0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def check(self, recipe: Mapping[str, Any], source: object = "calibration.json") -> None:
        """UsageError, naming the differences, if it was fitted for another recipe."""
        if different := self.differences(recipe):
            named = ", ".join(f"{name} {_shorten(self.recipe.get(name))}" for name in different)
            raise UsageError(
                f"{source} was fitted with {named}: run stage=calibrate again with the options of this run"
            )

    def differences(self, recipe: Mapping[str, Any]) -> list[str]:
        """The names of the recipe's parts that differ from this recipe; empty if it fits.

        `signals` does not count as a difference if the calibration needs it: the run then asks for it.
        """
        recipe = {**recipe, "signals": self.needs_model_signals or recipe.get("signals")}
        names = sorted({*self.recipe, *recipe})
        return [name for name in names if self.recipe.get(name) != recipe.get(name)]

    def presence(self, signals: Mapping[str, float]) -> float | None:
        """The probability that the expression refers to something; None without a `present` regression."""
        return None if self.present is None else self.present.probability(signals)

    def confidence(self, signals: Mapping[str, float]) -> float:
        """P(the box is right) = P(the expression refers to something) * P(the box is right | it does)."""
        presence = self.presence(signals)
        return self.right.probability(signals) * (1.0 if presence is None else presence)

    @property
    def needs_model_signals(self) -> bool:
        """Whether it uses signals from extra prompts to the model (`signals=true`)."""
        return self.recipe.get("signals") is True

    @property
    def signal_names(self) -> set[str]:
        """The names of the signals that it needs."""
        return {*self.right.weights, *(self.present.weights if self.present else ())}

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Read what `to_json` wrote. UsageError for anything else."""
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
    regression = Logistic(float(data["intercept"]), weights)
    if not all(math.isfinite(value) for value in (regression.intercept, *weights.values())):
        raise ValueError
    return regression


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def add_confidence(grounding: Grounding, signals: Mapping[str, float], calibration: Calibration | None) -> Grounding:
    """The grounding with its signals, its confidence and, if the calibration has it, its presence.

    Without a calibration the confidence is the raw signal. It is None if a signal that the calibration needs is
    missing, as for maps from a file without signals from the model.
    """
    grounding = replace(grounding, signals=signals)
    if calibration is None:
        return replace(grounding, confidence=signals[UNCALIBRATED_SIGNAL])
    if not calibration.signal_names <= signals.keys():
        return grounding
    presence, confidence = calibration.presence(signals), calibration.confidence(signals)
    return replace(grounding, confidence=confidence, presence=presence, calibrated=True)


def apply_abstention(grounding: Grounding, least: float | None) -> Grounding:
    """The grounding, marked `absent` if its presence (or if unknown, its confidence) is below `least`.

    Only a calibrated probability can decide this: without a calibration nothing is absent.
    """
    probability = grounding.confidence if grounding.presence is None else grounding.presence
    if least is None or probability is None or not grounding.calibrated:
        return grounding
    return replace(grounding, absent=probability < least)
