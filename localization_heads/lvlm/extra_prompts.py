"""`ExtraPrompts`: which prompts about an image a model is asked in addition to the expression itself.

They serve contrastive grounding, confidence signals, and sensitivity (criterion 3). This module only describes them
and needs no torch; `lvlm.asking` runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.heads.sensitivity import SensitivityStatistics, sensitivity_statistics
from localization_heads.options.groups import Contrast, CriteriaOptions

MAX_SIBLINGS = 8
"""Other expressions of the same image that an expression is contrasted with, at most."""
_CLOSING = ".!?。！？ "  # noqa: RUF001


@dataclass(frozen=True)
class ExtraPrompts:
    """The prompts that accompany each expression; by default none. False in a boolean context if there are none.

    Args:
        contrast: which maps go into `AttentionMaps.others`: none, those of a generic word (background), or those of
            the other expressions of the image (siblings).
        signals: fill `answer_logprob`, `expression_logprob`, `presence_logit` and `statement_logit`. Without a
            contrast, `others` then holds the maps of the objects that the model lists.
        heads: keep only these heads' maps in `others`; None keeps all heads.
        comparison_words: with `siblings`, for the sensitivity: at most two siblings are asked, and these words fill
            up the rest (`heads.sensitivity.comparison_expressions`). Without words, all siblings are asked, or the
            objects that the model lists if there are none.
    """

    contrast: Contrast = "none"
    signals: bool = False
    heads: tuple[tuple[int, int], ...] | None = None
    comparison_words: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.contrast != "none" or self.signals


NO_EXTRA_PROMPTS = ExtraPrompts()


def extra_prompts_for(
    contrast: Contrast,
    heads: Iterable[Sequence[int]] | None,
    criteria: CriteriaOptions,
    *,
    signals: bool,
    every_head: bool = False,
) -> ExtraPrompts:
    """The extra prompts for grounding with these heads; without heads, each image picks its own.

    Args:
        criteria: where an image picks its own heads by sensitivity, and nothing else is asked, the prompts for the
            sensitivity are returned.
        every_head: keep all heads' maps of the extra prompts, as heads other than these are read too.
    """
    if measures_sensitivity(criteria) and not heads and contrast == "none" and not signals:
        return sensitivity_prompts(criteria)
    kept = None if every_head or not heads else tuple((layer, head) for layer, head in heads)
    return ExtraPrompts(contrast, signals, kept)


def measures_sensitivity(criteria: CriteriaOptions) -> bool:
    """Whether criterion 3 (sensitivity) is in use."""
    return criteria.sensitivity != "none"


def sensitivity_prompts(criteria: CriteriaOptions) -> ExtraPrompts:
    """The extra prompts that sensitivity needs; none if it is not in use."""
    if not measures_sensitivity(criteria):
        return NO_EXTRA_PROMPTS
    return ExtraPrompts("siblings", comparison_words=criteria.siblings)


def measure_sensitivity(maps: AttentionMaps, mirrored: NDArray[np.float32] | None) -> SensitivityStatistics:
    """Sensitivity and consistency of every head in one sample, from `maps.others` and the mirrored image's maps."""
    return sensitivity_statistics(maps.attention, [other.attention for other in maps.others], mirrored)


def other_expressions(expression: str, others: Iterable[str]) -> tuple[str, ...]:
    """The first `MAX_SIBLINGS` distinct expressions that differ from this one in more than case and punctuation.

    >>> other_expressions("the dog", ["the cat", "The dog.", "the cat", "a tree"])
    ('the cat', 'a tree')
    """
    distinct: dict[str, str] = {}
    for other in others:
        distinct.setdefault(_normalized(other), other)
    distinct.pop(_normalized(expression), None)
    return tuple(distinct.values())[:MAX_SIBLINGS]


def _normalized(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(_CLOSING)


def covers_mirrored_region(maps: AttentionMaps, mirrored: AttentionMaps) -> bool:
    """Whether the mirrored image's grid covers the mirror image of the original grid's region.

    A padded or cropped image can have an odd pixel on one side, so edges may differ by up to half a cell.
    """
    if maps.attention.shape != mirrored.attention.shape:
        return False
    width, (rows, columns) = maps.image_size[0], maps.grid
    (x0, y0, x1, y1), own = mirrored.image_box, np.array(maps.image_box)
    cell = np.array([(own[2] - own[0]) / columns, (own[3] - own[1]) / rows] * 2)
    return bool((np.abs(np.array([width - x1, y0, width - x0, y1]) - own) <= 0.5 * cell).all())
