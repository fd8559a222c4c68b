"""Every number of the model card on held-out scenes: python -m training.evaluate MODEL_FOLDER [--json FILE]

Heads are ranked by the paper's recipe, without labels, on twice as many validation scenes; all figures come from
test scenes that nothing was chosen on. Intervals are 95 % bootstrap intervals over the scenes.
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
from training.measure import Measured, measure
from training.talk import talk

RANDOM_DRAWS = 5
TOP_N = 3  # heads that criterion 2 marks in a scene, as model.top_n of config/model/tiny.yaml,
PAPER_N = 10  # and in the paper, of 1,024 heads
PADDED = (0.0, 0.125)  # bars above and below: images of 4:3, padded to a square as LLaVA does


@dataclass(frozen=True)
class Grounded:
    """Values a scene: `iou` as is and with the map upsampled twice before smoothing, and pointing."""

    pointing: np.ndarray
    iou: np.ndarray
    iou_x2: np.ndarray

    def table(self) -> dict[str, np.ndarray]:
        """Metric name -> one value a scene."""
        return {
            "pointing": self.pointing,
            "acc@0.5": self.iou >= 0.5,
            "mean_iou": self.iou,
            "acc@0.5 x2": self.iou_x2 >= 0.5,
            "mean_iou x2": self.iou_x2,
        }


def ground_all(results: list[Measured], heads: list[Head]) -> Grounded:
    """Ground every scene with the same heads, as the tool does."""
    pointing, ious = [], {1: [], 2: []}
    for result in results:
        maps = _maps(result)
        for upsample, values in ious.items():
            found = ground_maps(maps, heads, GroundingOptions(upsample=upsample))
            values.append(float(box_iou(found.box, result.target.box)))
            if upsample == 1:
                pointing.append(pointing_hit(found.point, result.target.box))
    return Grounded(np.array(pointing), np.array(ious[1]), np.array(ious[2]))


def perfect_maps(results: list[Measured]) -> list[Measured]:
    """The same scenes with one map each, of one head: how much of every cell the target's mask fills."""
    perfect = []
    for result in results:
        grid = result.maps.shape[-1]
        cell = result.scene.image.shape[0] // grid
        filled = result.target.mask.reshape(grid, cell, grid, cell).mean((1, 3), dtype=np.float32)
        perfect.append(replace(result, maps=filled[None, None] / filled.sum()))
    return perfect


def rank(results: list[Measured], options: CriteriaOptions | None = None, top_n: int = TOP_N) -> HeadRanking:
    """The paper's label-free ranking."""
    maps = np.stack([r.maps for r in results])
    return rank_heads(attention_sum(maps), spatial_entropy(maps), options=options, top_n=top_n)


def head_mask_iou(results: list[Measured]) -> np.ndarray:
    """Mean of the paper's Fig. 6b over the scenes, `map_ious`: (layer, head)."""
    ious = [map_ious(_maps(result), Truth(result.target.box, result.target.mask)) for result in results]
    return np.mean(ious, axis=0, dtype=np.float64)


def _maps(result: Measured) -> AttentionMaps:
    size = result.scene.image.shape[0]
    return AttentionMaps(result.maps, (0.0, 0.0, float(size), float(size)), (size, size))


def random_heads(results: list[Measured], top: list[Head], seed: int = 0) -> list[Grounded]:
    """Three other heads of the same layers, drawn RANDOM_DRAWS times."""
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
    """All figures as plain values."""
    size = model.config.vision_config.image_size
    ranked_on = measure(model, scene_samples(2 * num_samples, size=size, seeds=VALIDATION_SEEDS))
    ranking = rank(ranked_on)
    top = [head.address for head in ranking.heads[:3]]
    report: dict = {"heads": describe_ranking(ranking), "num_samples": num_samples}
    for name, style in (("in style", None), ("held-out style", HELD_OUT_STYLE)):
        results = measure(model, scene_samples(num_samples, size=size, style=style))
        report[name] = {"top 3": intervals(ground_all(results, top).table()), "answers": answers(results)}
        if style is None:
            report |= compare(results, ranked_on, ranking, top)
            report["by kind"] = by_kind(results, top)
    report["comparisons"] = by_word(measure(model, comparison_samples(num_samples // 2, size)), top)
    padded = measure(model, scene_samples(num_samples, size=size, bars=PADDED))
    report["padded"] = {"top 3": intervals(ground_all(padded, top).table()), "answers": answers(padded)}
    return report


def compare(
    results: list[Measured], ranked_on: list[Measured], ranking: HeadRanking, top: list[Head]
) -> dict:
    """The contrasts: random heads, single heads, all heads, one criterion alone, frequency against IoU."""
    candidates = [h.address for h in ranking.heads if h.layer >= 2]
    iou = head_mask_iou(results)
    oracle = sorted(candidates, key=lambda head: -iou[head])[:3]
    no_sum = rank(ranked_on, CriteriaOptions(tau=0.0))
    many = rank(ranked_on, None, PAPER_N)
    many_no_sum = rank(ranked_on, CriteriaOptions(tau=0.0), PAPER_N)
    by_sum = sorted(candidates, key=lambda h: -np.mean([r.maps[h].sum() for r in ranked_on]))[:3]
    settings = {
        "three best by IoU (oracle)": oracle,
        "best head by IoU (oracle)": oracle[:1],
        "all heads": candidates,
        "criterion 1 only": by_sum,
        "criterion 2 only": [h.address for h in no_sum.heads[:3]],
        f"both, N = {PAPER_N}": [h.address for h in many.heads[:3]],
        f"criterion 2 only, N = {PAPER_N}": [h.address for h in many_no_sum.heads[:3]],
    }
    rows = {name: intervals(ground_all(results, heads).table()) for name, heads in settings.items()}
    rows["a perfect map (the target's mask)"] = intervals(
        ground_all(perfect_maps(results), [Head(0, 0)]).table()
    )
    draws = [draw.table() for draw in random_heads(results, top)]
    rows["layer-matched random 3"] = intervals({k: np.mean([d[k] for d in draws], 0) for k in draws[0]})
    return {
        "contrasts": rows,
        "heads of each": {name: [list(head) for head in heads] for name, heads in settings.items()},
        "frequency and IoU": correlation(ranking, iou),
        f"frequency and IoU, N = {PAPER_N}": correlation(many, iou),
        "frequency by criterion 2 only, and IoU": correlation(no_sum, iou),
        f"frequency by criterion 2 only, and IoU, N = {PAPER_N}": correlation(many_no_sum, iou),
        "attention sum and IoU": sum_correlation(ranking, iou),
    }


def correlation(ranking: HeadRanking, iou: np.ndarray) -> dict:
    """Spearman correlation of selection frequency and mask IoU: as in the paper, and over all candidate heads.

    The paper's: over the heads marked in 1 % of the scenes or more. The other counts every head of the layers that
    are not left out; one that criterion 1 drops is never marked, so its frequency is 0 (ties share their mean rank).
    """
    everyone = [h for h in ranking.heads if h.layer >= 2]
    often = [h for h in everyone if h.selection_frequency >= 0.01]
    return _spearman(often, iou) | {"all": _spearman(everyone, iou)}


def _spearman(heads: list[RankedHead], iou: np.ndarray) -> dict:
    """rho and p, or none where all frequencies are the same."""
    found = spearman([h.selection_frequency for h in heads], [iou[h.address] for h in heads])
    rho, p = found or (None, None)
    return {"rho": rho, "p": p, "heads": len(heads)}


def sum_correlation(ranking: HeadRanking, iou: np.ndarray) -> dict:
    """Spearman correlation of mean attention sum and mask IoU over all candidate heads."""
    heads = [h for h in ranking.heads if h.layer >= 2]
    rho, p = spearman([h.attention_sum for h in heads], [iou[h.address] for h in heads]) or (None, None)
    return {"rho": rho, "p": p, "heads": len(heads)}


def describe_ranking(ranking: HeadRanking) -> dict:
    """tau, and how many candidate heads criterion 1 drops."""
    candidates = [h for h in ranking.heads if h.layer >= 2]
    top = [[h.layer, h.head, h.selection_frequency, h.attention_sum] for h in ranking.heads[:3]]
    below = sum(not h.kept for h in candidates)
    return {"top 3": top, "tau": ranking.tau, "below tau": below, "candidates": len(candidates)}


def answers(results: list[Measured]) -> dict:
    """Shares of answers right: the first word, each word given those before, the whole answer."""
    values = {
        "first word": np.array([r.right[0] for r in results]),
        "words": np.array([np.mean(r.right) for r in results]),
        "whole answer": np.array([all(r.right) for r in results]),
    }
    return intervals(values)


def by_kind(results: list[Measured], top: list[Head]) -> dict:
    """Means for every kind of expression."""
    table = ground_all(results, top).table()
    table["whole answer"] = np.array([all(r.right) for r in results])
    kinds = np.array([r.expression.kind for r in results])
    return {
        kind: {"scenes": int((kinds == kind).sum())}
        | {k: float(v[kinds == kind].mean()) for k, v in table.items()}
        for kind in dict.fromkeys(kinds.tolist())
    }


def comparison_samples(num_samples: int, size: int) -> Iterator[tuple[Scene, Expression]]:
    """Test scenes with two or three things of one name, and a place that tells them apart ("the left dog")."""
    start, produced = TEST_SEEDS.start + 2**20, 0
    for seed in range(start, TEST_SEEDS.stop):
        if produced == num_samples:
            return
        scene = render_scene(seed, size=size, repeats=1.0)
        names = [o.name for o in scene.objects]
        places = [
            e for e in scene.expressions if e.kind == "place" and names.count(names[e.object_index]) > 1
        ]
        if places:
            produced += 1
            yield scene, Random(seed).choice(places)


def by_word(results: list[Measured], top: list[Head]) -> dict:
    """Means over the comparisons, for each of the four places and for all."""
    table = ground_all(results, top).table()
    table["whole answer"] = np.array([all(r.right) for r in results])
    words = np.array([next(w for w in r.expression.text.split() if w in PLACES) for r in results])
    return {
        word: {"scenes": int(rows.sum())} | {k: float(v[rows].mean()) for k, v in table.items()}
        for word, rows in {"all": words != "", **{word: words == word for word in PLACES}}.items()
    }


def intervals(table: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Metric -> mean and both ends of its 95 % bootstrap interval."""
    return {k: [float(np.mean(v)), *map(float, bootstrap_interval(v))] for k, v in table.items()}


def show(report: dict) -> None:
    """Print the report for people."""
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
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model)
    report = evaluate(model, options.num_samples) | {"talk": talk(options.model, options.num_samples // 2)}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


if __name__ == "__main__":
    main()
