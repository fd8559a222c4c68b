"""Random heads to compare with: what would any heads of the same layers have found?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from localization_heads.heads.head import Head


def layer_matched(
    heads: Sequence[Head], shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Head, ...]:
    """As many different random heads as were given, each from the layer of the one whose place it takes.

    None of them is a given head, unless a layer has too few others: the rest then comes from the given ones.

    Args:
        shape: `(layers, heads a layer)` of the model.

    Raises:
        ValueError: a head is named twice, or the model does not have it.

    >>> drawn = layer_matched([Head(2, 0), Head(3, 1)], (4, 8), np.random.default_rng(0))
    >>> [head.layer for head in drawn], {Head(2, 0), Head(3, 1)} & {*drawn}
    ([2, 3], set())
    """
    given = [Head(*head) for head in heads]
    for head in given:
        if not (0 <= head.layer < shape[0] and 0 <= head.head < shape[1]):
            raise ValueError(f"no head {head} among {shape[0]} layers of {shape[1]}")
    if len(set(given)) < len(given):
        raise ValueError("each head can be named once")
    drawn = {
        layer: _of_layer({head.head for head in given if head.layer == layer}, count, shape[1], rng)
        for layer, count in sorted(Counter(head.layer for head in given).items())
    }
    return tuple(Head(head.layer, drawn[head.layer].pop()) for head in given)


def _of_layer(taken: set[int], count: int, num_heads: int, rng: np.random.Generator) -> list[int]:
    """`count` heads of one layer, the others first."""
    others = [int(head) for head in rng.permutation([head for head in range(num_heads) if head not in taken])]
    spare = [int(head) for head in rng.permutation(sorted(taken))]
    return (others + spare)[:count]
