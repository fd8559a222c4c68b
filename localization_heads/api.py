"""The tool from Python: `find_heads` and `ground`, what the commands do without files and options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.grounding.maps import Grounding, GroundingOptions, ground_maps
from localization_heads.heads.analysis import greedy_heads
from localization_heads.heads.criteria import CriteriaOptions, head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking, rank_heads

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM


def find_heads(
    lvlm: LVLM,
    samples: Iterable[Sample],
    *,
    criteria: CriteriaOptions | None = None,
    top_n: int = 10,
    num_trials: int = 5,
    num_samples: int = 1000,
    seed: int = 42,
) -> HeadRanking:
    """Rank a model's heads by selection frequency (Sec. 4), without labels.

    Args:
        samples: pictures with expressions, read one at a time; only a few kilobytes of each are kept.
        top_n: heads marked in each sample (the paper's N).
        num_trials, num_samples: random draws to average over, and their size.

    Raises:
        ValueError: there is no sample.
        UsageError: a picture or an expression that cannot be used.
    """
    criteria = criteria or CriteriaOptions()
    found = [_row(lvlm, sample, criteria) for sample in samples]
    if not found:
        raise ValueError("find_heads needs at least one sample")
    sums, entropies, bottom_row = (np.stack(column) for column in zip(*found, strict=True))
    return rank_heads(
        sums,
        entropies,
        bottom_row=bottom_row,
        options=criteria,
        top_n=top_n,
        num_trials=num_trials,
        num_samples=num_samples,
        seed=seed,
        model=lvlm.name,
    )


def _row(lvlm: LVLM, sample: Sample, criteria: CriteriaOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the ranking needs of a sample, each `[layer, head]`: sums, entropies, bottom-row flags."""
    maps = lvlm.attend(load_image(sample.image), sample.expression)
    statistics = head_statistics(maps.attention, criteria)
    return statistics.attention_sum, statistics.spatial_entropy, statistics.bottom_row_focus


def ground(
    lvlm: LVLM,
    image: Image.Image | str | Path,
    expression: str,
    heads: Sequence[Head] | None = None,
    *,
    options: GroundingOptions | None = None,
) -> Grounding:
    """The box, pseudo-mask and heat map of an expression in a picture (Sec. 5).

    Args:
        image: a picture, a path or an http(s) address.
        heads: whose maps are added; None takes the model's known localization heads, and if there are none,
            the three that this very picture and expression pick (the paper's "greedy" ablation).

    Raises:
        ValueError: a head that the model does not have.
        UsageError: a picture or an expression that cannot be used.
    """
    picture = load_image(image)
    chosen = tuple(heads or lvlm.known_heads)
    last_layer = max(layer for layer, _ in chosen) if chosen else None
    maps = lvlm.attend(picture, expression, last_layer=last_layer)
    if not chosen:
        criteria = CriteriaOptions()
        chosen = tuple(greedy_heads(head_statistics(maps.attention, criteria), criteria, k=3))
    return ground_maps(maps, chosen, options)
