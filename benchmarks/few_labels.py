"""How good are heads from few labels, and does the label-free ranking help? `python -m benchmarks.few_labels [FOLDER]`

Boxes of the first three heads on validation scenes that were not drawn, `grounding=sharp`: Acc@0.5, mean and standard
deviation over draws. FOLDER is another checkpoint of the embedded model's architecture.
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
WAYS: tuple[tuple[Shrink, float], ...] = (("none", 1), ("ranks", 10), ("scores", 10))
K = 3

Right = Callable[[Sequence[lh.Head]], NDArray[np.float64]]
"""Whether the box of these heads is right, 0 or 1, in each scene."""


def measured(
    lvlm: LVLM, samples: Sequence[Sample]
) -> tuple[dict[str, NDArray[np.float32]], HeadRanking, Right]:
    """The scores of every head in every scene, the label-free ranking, and what judges heads."""
    maps, truths, scores, statistics = [], [], [], []
    for sample in samples:
        image = load_image(sample.image)
        maps.append(lvlm.attend(image, sample.expression))
        truths.append(truth_of(sample, image.size))
        scores.append(label_scores(maps[-1], truths[-1]))
        statistics.append(head_statistics(maps[-1].attention))
    free = rank_heads(
        np.stack([one.attention_sum for one in statistics]),
        np.stack([one.spatial_entropy for one in statistics]),
        top_n=lvlm.spec.top_n,
    )
    options, known = default_grounding(), dict[tuple[lh.Head, ...], NDArray[np.float64]]()

    def right(heads: Sequence[lh.Head]) -> NDArray[np.float64]:
        key = tuple(sorted(heads))
        if key not in known:
            boxes = [ground_maps(one, list(key), options).box for one in maps]
            known[key] = np.array(
                [box_iou(a, b.box) >= 0.5 for a, b in zip(boxes, truths, strict=True)], float
            )
        return known[key]

    return {name: np.stack([one[name] for one in scores]) for name in scores[0]}, free, right


def accuracies(
    scores: NDArray[np.float32],
    free: HeadRanking,
    right: Right,
    count: int,
    how: Shrink,
    n0: float,
    draws: int,
) -> list[float]:
    """Of each draw of so many labels, Acc@0.5 of its first heads on the other scenes."""
    rng, found = np.random.default_rng(100 + count), []
    for _ in range(draws):
        drawn = rng.choice(len(scores), count, replace=False)
        mean = scores[drawn].mean(axis=0, dtype=np.float64)
        heads = rank_by_score(shrink_scores(mean, free, count, how, n0), free)[:K]
        found.append(float(np.delete(right(heads), drawn).mean()))
    return found


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", nargs="?", help="another checkpoint of this architecture")
    asked.add_argument("--scenes", type=int, default=140)
    asked.add_argument("--draws", type=int, default=20)
    chosen = asked.parse_args(words)
    lvlm = lh.load_model(chosen.folder, like="tiny") if chosen.folder else lh.load_model()
    file = load_samples(write_scenes(ScenesOptions(count=chosen.scenes, split="validation", size=192)))
    scores, free, right = measured(lvlm, file.entries)
    print(f"without labels: {right(free.top(K)).mean():.2f}\n")  # noqa: T201
    names = [how if how == "none" else f"{how}, n0={n0:g}" for how, n0 in WAYS]
    print(f"| heads_by | labels | {' | '.join(f'shrink={name}' for name in names)} |")  # noqa: T201
    print(f"|{'---|' * (2 + len(WAYS))}")  # noqa: T201
    for by, values in scores.items():
        for count in (count for count in COUNTS if 2 * count <= len(values)):
            every = [accuracies(values, free, right, count, *way, chosen.draws) for way in WAYS]
            cells = " | ".join(f"{np.mean(one):.2f} ± {np.std(one):.2f}" for one in every)
            print(f"| `{by}` | {count} | {cells} |")  # noqa: T201


if __name__ == "__main__":
    main()
