"""Several wordings of one expression: the templates that make them, and the mean of their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps

ARTICLES = ("the", "a", "an")


def wordings(expression: str, templates: Sequence[str] | None) -> list[str]:
    """An expression in each of the templates, each wording once; without templates, the expression as it is.

    Where a template has an article before the expression, that of the expression is left out.

    >>> wordings("the dog", ["{}", "a {}", "the {}", "please find {}"])
    ['the dog', 'a dog', 'please find the dog']
    """
    if not templates:
        return [expression]
    return list(dict.fromkeys(worded(expression, template) for template in templates))


def worded(expression: str, template: str) -> str:
    """An expression in a template."""
    before = template.partition("{}")[0].split()
    if before and before[-1].lower() in ARTICLES:
        expression = bare(expression)
    return template.replace("{}", expression)


def bare(expression: str) -> str:
    """An expression without its article.

    >>> bare("The dog"), bare("there"), bare("a")
    ('dog', 'there', 'a')
    """
    first, _, rest = expression.strip().partition(" ")
    return rest.strip() if rest.strip() and first.lower() in ARTICLES else expression


def merged(found: Sequence[AttentionMaps], expression: str) -> AttentionMaps:
    """The maps of an expression from those of its wordings: what the model answers is taken of the first.

    Each head's map is the mean of its maps, each scaled to a sum of 1, times the mean of their sums: no wording
    counts for more because it draws more attention, and the criteria still see how much a head attends to the image.
    """
    first = found[0]
    if len(found) == 1:
        return first if first.query == expression else replace(first, query=expression)
    found = [one.at(first.image_index) for one in found]
    answers = [one.answer for one in found if one.answer is not None]
    return replace(
        first,
        attention=mean_of_shapes([one.attention for one in found]),
        answer=mean_of_shapes(answers) if answers else None,
        query=expression,
        images=tuple(merged(each, expression) for each in zip(*(one.images for one in found), strict=True)),
    )


def mean_of_shapes(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`mean_i(A_i / sum A_i) * mean_i(sum A_i)` of maps `[..., h, w]`, float32; one without attention counts as zeros.

    >>> mean_of_shapes([np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])]).tolist()
    [[1.0, 1.0]]
    """
    shapes = np.zeros(maps[0].shape)
    total = np.zeros((*maps[0].shape[:-2], 1, 1))
    for one in maps:
        sums = one.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
        shapes += one / np.where(sums > 0, sums, 1)
        total += sums
    return np.asarray(shapes * total / len(maps) ** 2, dtype=np.float32)
