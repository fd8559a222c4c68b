"""`Beside`: what a model is asked beside an expression. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.heads.sensitivity import Moved, moved
from localization_heads.options.groups import Contrast, CriteriaOptions

MOST_OTHERS = 8
"""Other expressions of an image that one is contrasted with."""
_CLOSING = ".!?。！？ "  # noqa: RUF001


@dataclass(frozen=True)
class Beside:
    """What is asked beside the expressions. By default, nothing.

    Args:
        contrast: which other expressions' maps go into `AttentionMaps.others`: none, one that names nothing
            (background), or those of the same image (siblings).
        signals: fill `answer_logprob`, `expression_logprob`, `presence_logit` and `statement_logit`; and where
            nothing is contrasted, `others` with what the model lists.
        heads: keep the other expressions' maps of these heads alone, as many as the read-out adds; None keeps all.
        words: with `siblings`, for the third criterion: of the image's expressions two are asked, filled up with these
            words (`heads.sensitivity.probes`); without words, all siblings, or what the model lists.
    """

    contrast: Contrast = "none"
    signals: bool = False
    heads: tuple[tuple[int, int], ...] | None = None
    words: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.contrast != "none" or self.signals


NOTHING = Beside()


def beside(
    contrast: Contrast,
    heads: Iterable[Sequence[int]] | None,
    *,
    signals: bool,
    every_head: bool = False,
    words: tuple[str, ...] = (),
) -> Beside:
    """What is asked beside expressions that these heads ground, each image's own if there are none.

    Args:
        every_head: other heads than these will be read too, and the other expressions' maps of all of them are kept.
        words: of the third criterion, by which an image picks its own heads; asked where nothing else is.
    """
    if words and not heads and contrast == "none" and not signals:
        return Beside("siblings", words=words)
    kept = None if every_head or not heads else tuple((layer, head) for layer, head in heads)
    return Beside(contrast, signals, kept)


def is_wanted(criteria: CriteriaOptions) -> bool:
    """Whether the third criterion is to be measured."""
    return criteria.sensitivity != "none"


def probing(criteria: CriteriaOptions) -> Beside:
    """What is asked beside each expression: a few others of the image, on its encoding; nothing if not wanted."""
    return Beside("siblings", words=criteria.siblings) if is_wanted(criteria) else NOTHING


def movement_in(maps: AttentionMaps, mirrored: NDArray[np.float32] | None) -> Moved:
    """The third criterion of every head in one sample, whose other expressions were asked beside it."""
    return moved(maps.attention, [other.attention for other in maps.others], mirrored)


def other_expressions(expression: str, others: Iterable[str]) -> tuple[str, ...]:
    """The first `MOST_OTHERS` expressions that differ from this one by more than marks and capitals, each once.

    >>> other_expressions("the dog", ["the cat", "The dog.", "the cat", "a tree"])
    ('the cat', 'a tree')
    """
    found: dict[str, str] = {}
    for other in others:
        found.setdefault(_plain(other), other)
    found.pop(_plain(expression), None)
    return tuple(found.values())[:MOST_OTHERS]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(_CLOSING)


def covers_mirrored(maps: AttentionMaps, mirrored: AttentionMaps) -> bool:
    """Whether the grid of the mirrored image covers the mirrored region.

    Edges may lie half a cell apart: a padded or cropped image has an odd pixel on one side.
    """
    if maps.attention.shape != mirrored.attention.shape:
        return False
    width, (rows, columns) = maps.image_size[0], maps.grid
    (x0, y0, x1, y1), own = mirrored.image_box, np.array(maps.image_box)
    cell = np.array([(own[2] - own[0]) / columns, (own[3] - own[1]) / rows] * 2)
    return bool((np.abs(np.array([width - x1, y0, width - x0, y1]) - own) <= 0.5 * cell).all())
