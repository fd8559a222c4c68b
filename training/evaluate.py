"""All numbers of the model card: python -m training.evaluate MODEL_FOLDER [--json FILE]

Heads are ranked by the paper's method, without labels, on validation scenes, and scored on half as many test scenes, on
which nothing was selected. Intervals are 95 % bootstrap intervals over the scenes.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from localization_heads.attention import AttentionMaps
from localization_heads.cells import box_iou
from localization_heads.evaluation.head_iou import map_ious
from localization_heads.evaluation.metrics import bootstrap_interval, pointing_hit, spearman
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import attention_sum, spatial_entropy
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking, RankedHead, rank_heads
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.scenes.expressions import PLACES, Expression
from localization_heads.scenes.scene import (
    HELD_OUT_STYLE,
    TEST_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    render_scene,
    scene_samples,
)
from training.measure import SceneResult, measure
from training.talk import talk

RANDOM_DRAWS = 5
TOP_N = 3  # heads selected per scene, as model.top_n in config/model/tiny.yaml
PAPER_N = 10  # the paper's N, for 1,024 heads
PADDED = (0.0, 0.125)  # bars above and below: 4:3 images, padded to a square as LLaVA does


@dataclass(frozen=True)
class Grounded:
    """One value per scene: the pointing hit, and the box IoU without and with the map upsampled by 2."""

    pointing: np.ndarray
    iou: np.ndarray
    iou_x2: np.ndarray

    def table(self) -> dict[str, np.ndarray]:
        """Metric -> one value per scene."""
        return {
            "pointing": self.pointing,
            "acc@0.5": self.iou >= 0.5,
            "mean_iou": self.iou,
            "acc@0.5 x2": self.iou_x2 >= 0.5,
            "mean_iou x2": self.iou_x2,
        }


def ground_all(results: list[SceneResult], heads: list[Head]) -> Grounded:
    """Ground every scene with the same heads."""
    pointing, ious = [], {1: [], 2: []}
    for result in results:
        maps = _maps(result)
        for upsample, values in ious.items():
            grounding = ground_maps(maps, heads, GroundingOptions(upsample=upsample))
            values.append(float(box_iou(grounding.box, result.target.box)))
            if upsample == 1:
                pointing.append(pointing_hit(grounding.point, result.target.box))
    return Grounded(np.array(pointing), np.array(ious[1]), np.array(ious[2]))


def perfect_maps(results: list[SceneResult]) -> list[SceneResult]:
    """The same scenes, each with a single map: the share of each cell that the target's mask covers."""
    perfect = []
    for result in results:
        grid = result.maps.shape[-1]
        cell = result.scene.image.shape[0] // grid
        coverage = result.target.mask.reshape(grid, cell, grid, cell).mean((1, 3), dtype=np.float32)
        perfect.append(replace(result, maps=coverage[None, None] / coverage.sum()))
    return perfect


def rank(results: list[SceneResult], options: CriteriaOptions | None = None, top_n: int = TOP_N) -> HeadRanking:
    """The paper's label-free ranking."""
    maps = np.stack([r.maps for r in results])
    return rank_heads(attention_sum(maps), spatial_entropy(maps), options=options, top_n=top_n)


def head_mask_iou(results: list[SceneResult]) -> np.ndarray:
    """Each head's mean IoU of its binarised map with the true mask, as in the paper's Fig. 6b: (layer, head)."""
    ious = [map_ious(_maps(result), Truth(result.target.box, result.target.mask)) for result in results]
    return np.mean(ious, axis=0, dtype=np.float64)


def _maps(result: SceneResult) -> AttentionMaps:
    size = result.scene.image.shape[0]
    return AttentionMaps(result.maps, (0.0, 0.0, float(size), float(size)), (size, size))


def random_heads(results: list[SceneResult], top: list[Head], seed: int = 0) -> list[Grounded]:
    """Groundings with random other heads of the same layers as `top`, one for each of RANDOM_DRAWS draws."""
    rng = np.random.default_rng(seed)
    num_heads = results[0].maps.shape[1]
    draws = []
    for _ in range(RANDOM_DRAWS):
        heads: list[Head] = []
        for layer, _ in top:
            free = [Head(layer, h) for h in range(num_heads) if Head(layer, h) not in (*top, *heads)]
            heads.append(free[rng.integers(len(free))])
        draws.append(ground_all(results, heads))
    return draws


def evaluate(model: LlavaForConditionalGeneration, num_samples: int = 1000) -> dict:
    """The report: all numbers of the model card that need no generated answers."""
    size = model.config.vision_config.image_size
    ranking_results = measure(model, scene_samples(2 * num_samples, size=size, seeds=VALIDATION_SEEDS))
    ranking = rank(ranking_results)
    top = [head.address for head in ranking.heads[:3]]
    report: dict = {"heads": describe_ranking(ranking), "num_samples": num_samples}
    for name, style in (("in style", None), ("held-out style", HELD_OUT_STYLE)):
        results = measure(model, scene_samples(num_samples, size=size, style=style))
        report[name] = {"top 3": intervals(ground_all(results, top).table()), "answers": answers(results)}
        if style is None:
            report |= compare(results, ranking_results, ranking, top)
            report["by kind"] = by_kind(results, top)
    report["comparisons"] = by_place_word(measure(model, comparison_samples(num_samples // 2, size)), top)
    padded = measure(model, scene_samples(num_samples, size=size, bars=PADDED))
    report["padded"] = {"top 3": intervals(ground_all(padded, top).table()), "answers": answers(padded)}
    return report


def compare(
    results: list[SceneResult], ranking_results: list[SceneResult], ranking: HeadRanking, top: list[Head]
) -> dict:
    """Scores of other sets of heads (random, oracle, all, one criterion alone), and frequency against IoU."""
    candidates = [h.address for h in ranking.heads if h.layer >= 2]
    iou = head_mask_iou(results)
    oracle = sorted(candidates, key=lambda head: -iou[head])[:3]
    no_sum = rank(ranking_results, CriteriaOptions(tau=0.0))
    ranking_paper_n = rank(ranking_results, None, PAPER_N)
    no_sum_paper_n = rank(ranking_results, CriteriaOptions(tau=0.0), PAPER_N)
    by_sum = sorted(candidates, key=lambda h: -np.mean([r.maps[h].sum() for r in ranking_results]))[:3]
    settings = {
        "three best by IoU (oracle)": oracle,
        "best head by IoU (oracle)": oracle[:1],
        "all heads": candidates,
        "criterion 1 only": by_sum,
        "criterion 2 only": [h.address for h in no_sum.heads[:3]],
        f"both, N = {PAPER_N}": [h.address for h in ranking_paper_n.heads[:3]],
        f"criterion 2 only, N = {PAPER_N}": [h.address for h in no_sum_paper_n.heads[:3]],
    }
    rows = {name: intervals(ground_all(results, heads).table()) for name, heads in settings.items()}
    rows["a perfect map (the target's mask)"] = intervals(ground_all(perfect_maps(results), [Head(0, 0)]).table())
    draws = [draw.table() for draw in random_heads(results, top)]
    rows["layer-matched random 3"] = intervals({k: np.mean([d[k] for d in draws], 0) for k in draws[0]})
    return {
        "contrasts": rows,
        "heads of each": {name: [list(head) for head in heads] for name, heads in settings.items()},
        "frequency and IoU": correlation(ranking, iou),
        f"frequency and IoU, N = {PAPER_N}": correlation(ranking_paper_n, iou),
        "frequency by criterion 2 only, and IoU": correlation(no_sum, iou),
        f"frequency by criterion 2 only, and IoU, N = {PAPER_N}": correlation(no_sum_paper_n, iou),
        "attention sum and IoU": sum_correlation(ranking, iou),
    }


def correlation(ranking: HeadRanking, iou: np.ndarray) -> dict:
    """Spearman correlation of selection frequency and mask IoU: as in the paper, and over all candidate heads.

    The paper's: over the heads selected in 1 % of the scenes or more. The other counts every head of the layers
    that are not excluded; one that criterion 1 drops is never selected, so its frequency is 0 (ties share their mean
    rank).
    """
    candidates = [h for h in ranking.heads if h.layer >= 2]
    frequent = [h for h in candidates if h.selection_frequency >= 0.01]
    return _spearman(frequent, iou) | {"all": _spearman(candidates, iou)}


def _spearman(heads: list[RankedHead], iou: np.ndarray) -> dict:
    """rho and p of selection frequency and IoU; None if all frequencies are equal."""
    rho, p = spearman([h.selection_frequency for h in heads], [iou[h.address] for h in heads]) or (None, None)
    return {"rho": rho, "p": p, "heads": len(heads)}


def sum_correlation(ranking: HeadRanking, iou: np.ndarray) -> dict:
    """Spearman correlation of mean attention sum and mask IoU over all candidate heads."""
    heads = [h for h in ranking.heads if h.layer >= 2]
    rho, p = spearman([h.attention_sum for h in heads], [iou[h.address] for h in heads]) or (None, None)
    return {"rho": rho, "p": p, "heads": len(heads)}


def describe_ranking(ranking: HeadRanking) -> dict:
    """The top 3 heads, tau, and the number of candidate heads below it."""
    candidates = [h for h in ranking.heads if h.layer >= 2]
    top = [[h.layer, h.head, h.selection_frequency, h.attention_sum] for h in ranking.heads[:3]]
    below = sum(not h.kept for h in candidates)
    return {"top 3": top, "tau": ranking.tau, "below tau": below, "candidates": len(candidates)}


def answers(results: list[SceneResult]) -> dict:
    """Accuracy of the answers: the first word, each word given the true ones before it, the whole answer."""
    values = {
        "first word": np.array([r.answer_correct[0] for r in results]),
        "words": np.array([np.mean(r.answer_correct) for r in results]),
        "whole answer": np.array([all(r.answer_correct) for r in results]),
    }
    return intervals(values)


def by_kind(results: list[SceneResult], top: list[Head]) -> dict:
    """Mean scores by kind of expression."""
    table = ground_all(results, top).table()
    table["whole answer"] = np.array([all(r.answer_correct) for r in results])
    kinds = np.array([r.expression.kind for r in results])
    return {
        kind: {"scenes": int((kinds == kind).sum())} | {k: float(v[kinds == kind].mean()) for k, v in table.items()}
        for kind in dict.fromkeys(kinds.tolist())
    }


def comparison_samples(num_samples: int, size: int) -> Iterator[tuple[Scene, Expression]]:
    """Test scenes with several objects of one name, and an expression that tells them apart ("the left dog")."""
    start, produced = TEST_SEEDS.start + 2**20, 0
    for seed in range(start, TEST_SEEDS.stop):
        if produced == num_samples:
            return
        scene = render_scene(seed, size=size, repeats=1.0)
        names = [o.name for o in scene.objects]
        places = [e for e in scene.expressions if e.kind == "place" and names.count(names[e.object_index]) > 1]
        if places:
            produced += 1
            yield scene, Random(seed).choice(places)


def by_place_word(results: list[SceneResult], top: list[Head]) -> dict:
    """Mean scores over the comparisons, for all of them and by place (left, right, ...)."""
    table = ground_all(results, top).table()
    table["whole answer"] = np.array([all(r.answer_correct) for r in results])
    words = np.array([next(w for w in r.expression.text.split() if w in PLACES) for r in results])
    return {
        word: {"scenes": int(rows.sum())} | {k: float(v[rows].mean()) for k, v in table.items()}
        for word, rows in {"all": words != "", **{word: words == word for word in PLACES}}.items()
    }


def intervals(table: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Metric -> mean and both ends of its 95 % bootstrap interval."""
    return {k: [float(np.mean(v)), *map(float, bootstrap_interval(v))] for k, v in table.items()}


def show(report: dict) -> None:
    """Print the report."""
    console = Console()
    groups = {"in style, top 3": report["in style"]["top 3"], **report["contrasts"]}
    for name in ("held-out style", "padded"):
        groups[f"{name}, top 3"] = report[name]["top 3"]
    table = Table("heads", *next(iter(groups.values())))
    for name, row in groups.items():
        table.add_row(name, *(f"{mean:.3f} [{low:.2f}, {high:.2f}]" for mean, low, high in row.values()))
    console.print(table)
    for key in report:
        if "IoU" in key or key == "heads":
            console.print(key, report[key])
    for style in ("in style", "held-out style"):
        console.print(style, report[style]["answers"])
    for kind, (share, number) in report["talk"].items():
        console.print(f"{kind}: {share:.2f} of {number} right")
    for kind, row in (report["by kind"] | report["comparisons"]).items():
        console.print(kind, {k: round(v, 2) for k, v in row.items()})


def main() -> None:
    """Parse the options, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the report as JSON")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model)
    report = evaluate(model, options.num_samples) | {"talk": talk(options.model, options.num_samples // 2)}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
