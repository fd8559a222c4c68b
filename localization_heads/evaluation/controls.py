"""Controls that the localization heads are compared with: random heads, all heads, a centre box and an oracle.

Random heads come from the same layers. The oracle grounds the true mask, resampled to the model's grid, in place of an
attention map: the upper bound of the read-out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps, Box
from localization_heads.cells import box_coverage, mask_coverage
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions


def layer_matched(heads: Sequence[Head], shape: tuple[int, int], rng: np.random.Generator) -> tuple[Head, ...]:
    """Distinct random heads, one for each given head and from its layer.

    The given heads themselves are drawn only if the layer has too few others.

    Args:
        shape: `(number of layers, heads per layer)` of the model.

    Raises:
        ValueError: a head is given twice, or the model does not have it.

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
        layer: _draw_in_layer({head.head for head in given if head.layer == layer}, count, shape[1], rng)
        for layer, count in sorted(Counter(head.layer for head in given).items())
    }
    return tuple(Head(head.layer, drawn[head.layer].pop()) for head in given)


def _draw_in_layer(avoid: set[int], count: int, num_heads: int, rng: np.random.Generator) -> list[int]:
    """`count` heads of one layer, from `avoid` only after all others."""
    others = rng.permutation([head for head in range(num_heads) if head not in avoid])
    avoided = rng.permutation(sorted(avoid))
    return [int(head) for head in (*others, *avoided)][:count]


DRAWS = 5
"""Sets of random heads per expression."""
CENTRE = 0.5
"""Width and height of the centre box relative to the image."""

_ONLY = [Head(0, 0)]
"""The head of the maps that `mean_map` and `oracle_map` return."""


def control_groundings(
    maps: AttentionMaps,
    heads: Sequence[Head],
    truth: Truth,
    options: GroundingOptions,
    *,
    exclude_layers: int,
    seed: int = 42,
) -> dict[str, list[Grounding]]:
    """The groundings of every control that has a map, with the same read-out; `random_heads` has one per draw."""
    drawn = random_heads(heads, maps.num_heads, seed=seed)
    return {
        "random_heads": [ground_maps(maps, other, options) for other in drawn],
        "all_heads": [ground_maps(mean_map(maps, exclude_layers), _ONLY, options)],
        "oracle": [ground_maps(oracle_map(maps, truth), _ONLY, options)],
    }


def random_heads(
    chosen: Sequence[Head], num_heads: int, *, draws: int = DRAWS, seed: int = 42
) -> list[tuple[Head, ...]]:
    """`draws` sets of `layer_matched` heads, deterministic for a seed and heads.

    If a layer has too few other heads, the control contains chosen ones, which can only make it stronger.
    """
    rng = np.random.default_rng(seed)
    shape = max(head.layer for head in chosen) + 1, num_heads
    return [layer_matched(chosen, shape, rng) for _ in range(draws)]


def mean_map(maps: AttentionMaps, exclude_layers: int, without: Sequence[Head] = ()) -> AttentionMaps:
    """The mean map over all heads of the layers from `exclude_layers` on, as the single head L0H0.

    Args:
        without: heads to leave out of the mean.
    """
    if not without:
        return _as_one_head(maps, maps.attention[exclude_layers:].mean(axis=(0, 1), dtype=np.float64))
    kept = np.ones(maps.attention.shape[:2], dtype=bool)
    kept[:exclude_layers] = False
    kept[tuple(zip(*without, strict=True))] = False
    return _as_one_head(maps, maps.attention[kept].mean(axis=0, dtype=np.float64))


def oracle_map(maps: AttentionMaps, truth: Truth) -> AttentionMaps:
    """The share of each cell that the true mask (or box, without a mask) covers, as the single head L0H0."""
    if truth.mask is None:
        return _as_one_head(maps, box_coverage(truth.box, maps.image_box, maps.grid))
    return _as_one_head(maps, mask_coverage(truth.mask, maps.image_box, maps.grid))


def centre_box(image_size: tuple[int, int]) -> Box:
    """The centred box with half the width and height of a `(W, H)` image.

    >>> centre_box((640, 480))
    (160.0, 120.0, 480.0, 360.0)
    """
    W, H = image_size
    return W * (1 - CENTRE) / 2, H * (1 - CENTRE) / 2, W * (1 + CENTRE) / 2, H * (1 + CENTRE) / 2


def _as_one_head(maps: AttentionMaps, values: NDArray[np.float64]) -> AttentionMaps:
    return replace(maps, attention=values[None, None].astype(np.float32), answer=None, others=())
