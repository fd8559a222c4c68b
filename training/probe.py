"""A quick evaluation on validation scenes during training."""

from dataclasses import dataclass

import numpy as np
from transformers import LlavaForConditionalGeneration

from localization_heads.heads.criteria import attention_sum, spatial_entropy
from localization_heads.heads.ranking import rank_heads
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from training.measure import SceneResult, measure


@dataclass(frozen=True)
class Probe:
    """Results on the validation scenes, layers 0 and 1 excluded.

    Args:
        first_right, answer_right: share of answers whose first word, or all of them, are correct.
        top_pointing: mean pointing accuracy of the top 3 heads of the label-free ranking.
        best_pointing, mean_pointing: the best head's, and the mean over all heads.
        lowest_sum: the lowest mean attention sum of a head.
        kept: share of heads whose mean attention sum reaches tau.
    """

    first_right: float
    answer_right: float
    top_pointing: float
    best_pointing: float
    mean_pointing: float
    lowest_sum: float
    kept: float


def probe(model: LlavaForConditionalGeneration, num_samples: int = 60) -> Probe:
    """Evaluate the model on the first `num_samples` validation scenes."""
    size = model.config.vision_config.image_size
    results = measure(model, scene_samples(num_samples, size=size, seeds=VALIDATION_SEEDS))
    maps = np.stack([r.maps for r in results])
    sums = attention_sum(maps)
    ranking = rank_heads(sums, spatial_entropy(maps), num_trials=1)
    top = ranking.heads[:3]
    pointing = pointing_of_heads(results)
    return Probe(
        first_right=float(np.mean([r.answer_correct[0] for r in results])),
        answer_right=float(np.mean([all(r.answer_correct) for r in results])),
        top_pointing=float(np.mean([pointing[:, h.layer, h.head].mean() for h in top])),
        best_pointing=float(pointing.mean(0)[2:].max()),
        mean_pointing=float(pointing[:, 2:].mean()),
        lowest_sum=float(sums.mean(0)[2:].min()),
        kept=float((sums.mean(0)[2:] >= ranking.tau).mean()),
    )


def pointing_of_heads(results: list[SceneResult]) -> np.ndarray:
    """Whether the peak of each head's map lies in the target's box: bool (sample, layer, head)."""
    hits = []
    for result in results:
        grid = result.maps.shape[-1]
        cell = result.scene.image.shape[0] / grid
        row, column = np.divmod(result.maps.reshape(*result.maps.shape[:2], -1).argmax(-1), grid)
        x, y = (column + 0.5) * cell, (row + 0.5) * cell
        x0, y0, x1, y1 = result.target.box
        hits.append((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
    return np.stack(hits)
