"""How good are heads from few labels, and does the label-free ranking help? `python -m benchmarks.few_labels [FOLDER]`

Draws a few labelled validation scenes, ranks the heads on them, and prints Acc@0.5 of the first three heads' boxes on
the other scenes (`grounding=sharp`), mean and standard deviation over the draws. FOLDER is another checkpoint of the
embedded model's architecture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

import localization_heads as lh
from localization_heads.cells import box_iou
from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample, load_samples
from localization_heads.evaluation.head_iou import label_scores
from localization_heads.evaluation.judging import truth_of
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.labels import rank_by_score, shrink_scores
from localization_heads.heads.ranking import rank_heads
from localization_heads.heads.record import HeadRanking
from localization_heads.lvlm.model import LVLM
from localization_heads.options.compose import default_grounding
from localization_heads.options.finder_mixins import Shrink
from localization_heads.options.stage_groups import ScenesOptions
from localization_heads.scenes.write import write_scenes

COUNTS = (1, 2, 5, 10, 20, 50)
SHRINKAGES: tuple[tuple[Shrink, float], ...] = (("none", 1), ("ranks", 10), ("scores", 10))
NUM_HEADS = 3

BoxHits = Callable[[Sequence[lh.Head]], NDArray[np.float64]]
"""Of heads: 1 in each scene where the IoU of their box is 0.5 or more, else 0."""


def measure_heads(lvlm: LVLM, samples: Sequence[Sample]) -> tuple[dict[str, NDArray[np.float32]], HeadRanking, BoxHits]:
    """The heads' scores (sample, layer, head) by each label criterion, the label-free ranking, and the box hits."""
    maps, truths, scores, statistics = [], [], [], []
    for sample in samples:
        image = load_image(sample.image)
        maps.append(lvlm.attend(image, sample.expression))
        truths.append(truth_of(sample, image.size))
        scores.append(label_scores(maps[-1], truths[-1]))
        statistics.append(head_statistics(maps[-1].attention))
    ranking = rank_heads(
        np.stack([sample_statistics.attention_sum for sample_statistics in statistics]),
        np.stack([sample_statistics.spatial_entropy for sample_statistics in statistics]),
        top_n=lvlm.spec.top_n,
    )
    options, cache = default_grounding(), dict[tuple[lh.Head, ...], NDArray[np.float64]]()

    def box_hits(heads: Sequence[lh.Head]) -> NDArray[np.float64]:
        key = tuple(sorted(heads))
        if key not in cache:
            boxes = [ground_maps(sample_maps, list(key), options).box for sample_maps in maps]
            hits = [box_iou(box, truth.box) >= 0.5 for box, truth in zip(boxes, truths, strict=True)]
            cache[key] = np.array(hits, float)
        return cache[key]

    stacked = {name: np.stack([sample_scores[name] for sample_scores in scores]) for name in scores[0]}
    return stacked, ranking, box_hits


def draw_accuracies(
    scores: NDArray[np.float32],
    ranking: HeadRanking,
    box_hits: BoxHits,
    count: int,
    shrink: Shrink,
    n0: float,
    draws: int,
) -> list[float]:
    """Acc@0.5 of the first heads on the other scenes, for each of `draws` draws of `count` labelled scenes."""
    rng, accuracies = np.random.default_rng(100 + count), []
    for _ in range(draws):
        drawn = rng.choice(len(scores), count, replace=False)
        mean = scores[drawn].mean(axis=0, dtype=np.float64)
        heads = rank_by_score(shrink_scores(mean, ranking, count, shrink, n0), ranking)[:NUM_HEADS]
        accuracies.append(float(np.delete(box_hits(heads), drawn).mean()))
    return accuracies


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="another checkpoint of this architecture")
    parser.add_argument("--scenes", type=int, default=140)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args(arguments)
    lvlm = lh.load_model(options.folder, like="tiny") if options.folder else lh.load_model()
    file = load_samples(write_scenes(ScenesOptions(count=options.scenes, split="validation", size=192)))
    scores, ranking, box_hits = measure_heads(lvlm, file.entries)
    print(f"without labels: {box_hits(ranking.top(NUM_HEADS)).mean():.2f}\n")  # noqa: T201
    names = [shrink if shrink == "none" else f"{shrink}, n0={n0:g}" for shrink, n0 in SHRINKAGES]
    print(f"| heads_by | labels | {' | '.join(f'shrink={name}' for name in names)} |")  # noqa: T201
    print(f"|{'---|' * (2 + len(SHRINKAGES))}")  # noqa: T201
    for by, values in scores.items():
        for count in (count for count in COUNTS if 2 * count <= len(values)):
            accuracies = [
                draw_accuracies(values, ranking, box_hits, count, *shrinkage, options.draws) for shrinkage in SHRINKAGES
            ]
            cells = " | ".join(f"{np.mean(draws):.2f} ± {np.std(draws):.2f}" for draws in accuracies)
            print(f"| `{by}` | {count} | {cells} |")  # noqa: T201


if __name__ == "__main__":
    main()
