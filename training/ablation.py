"""Ablation of location words in the answers: two short runs from one checkpoint, without and with them.

Usage: python -m training.ablation CHECKPOINT_FOLDER TARGET_FOLDER [--steps N] [--only with|without]

The checkpoint must precede the penalty on attention to the image (`look_from`). Both arms see the same images, mostly
full scenes of 16 x 16 cells, and differ only in the answers. Both are evaluated on scenes of 16 x 16 cells.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from localization_heads.scenes.scene import TRAIN_SEEDS, scene_samples
from training.evaluate import (
    PAPER_N,
    correlation,
    describe_ranking,
    ground_all,
    head_mask_iou,
    intervals,
    rank,
)
from training.measure import measure
from training.recipe import Recipe, Stage
from training.trainer import Trainer, start_from
from training.workers import run

CELLS = 16  # per side
RANKING_SET = 2**18  # index of the scene set for ranking heads, among the training seeds
ARMS = {"without": False, "with": True}  # arm -> whether answers name the place


def arm_recipe(steps: int, answer_places: bool) -> Recipe:
    """The main recipe, restricted to its conversations about scenes of 16 x 16 cells."""
    base = Recipe()
    mix = [0.06, *(_share(canvas) for canvas in base.canvases)]
    return replace(
        base,
        steps=steps,
        stages=(Stage(0, tuple(mix)),),
        rates=((0, 0.01), (99, 1.0), (round(0.33 * steps), 1.0)),
        matrix_rate=0.4 * base.matrix_rate,
        vector_rate=0.4 * base.vector_rate,
        look_from=steps // 7,
        look_steps=steps // 2,
        answer_places=answer_places,
    )


def _share(canvas) -> float:
    if canvas.scene_cells != CELLS or not canvas.text_tokens:
        return 0.0
    return {10: 0.04, 12: 0.15, 16: 0.75}[canvas.cells]


def spread_cells(grid: int, side: int) -> torch.Tensor:
    """Indices of `side` x `side` cells spread evenly over a `grid` x `grid` grid, row by row: (side**2,)."""
    line = ((torch.arange(side) + 0.5) * grid / side).long()
    return (line[:, None] * grid + line).flatten()


def shrink(model: LlavaForConditionalGeneration, side: int) -> LlavaForConditionalGeneration:
    """A copy of the model for images of `side` x `side` cells, which keep position embeddings of the full grid."""
    model = copy.deepcopy(model)
    config = model.config.vision_config
    cells = spread_cells(config.image_size // config.patch_size, side)
    config.image_size = side * config.patch_size
    tower = model.model.vision_tower
    embeddings = (tower.vision_model if hasattr(tower, "vision_model") else tower).embeddings
    table = embeddings.position_embedding.weight.data
    embeddings.position_embedding = nn.Embedding.from_pretrained(torch.cat([table[:1], table[1:][cells]]), freeze=False)
    embeddings.image_size, embeddings.num_patches = config.image_size, side**2
    embeddings.num_positions = side**2 + 1
    embeddings.position_ids = torch.arange(side**2 + 1)[None]
    return model


def evaluate_arm(folder: Path, num_samples: int) -> dict:
    """Scores of an arm's top 3 heads, ranked without labels, on test scenes of 16 x 16 cells."""
    recipe = arm_recipe(**json.loads((folder / "arm.json").read_text()))
    full_model = Trainer(recipe, folder).model.eval()
    model, cells = shrink(full_model, CELLS), spread_cells(recipe.model.grid, CELLS)
    size = model.config.vision_config.image_size
    ranking_results = measure(
        model,
        scene_samples(num_samples, RANKING_SET, size=size, seeds=TRAIN_SEEDS),
        (recipe.model.grid, cells),
    )
    ranking = rank(ranking_results, top_n=PAPER_N)
    top = [head.address for head in ranking.heads[:3]]
    results = measure(model, scene_samples(num_samples, size=size), (recipe.model.grid, cells))
    return {
        "top 3": intervals(ground_all(results, top).table()),
        "heads": describe_ranking(ranking),
        "frequency and IoU": correlation(ranking, head_mask_iou(results)),
    }


def main() -> None:
    """Train each arm, resuming or skipping what is done, then evaluate both."""
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a run, at a step before `look_from`")
    parser.add_argument("target", type=Path, help="folder for both arms and their report.json")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--only", choices=[*ARMS], help="train this arm only, without evaluating")
    options = parser.parse_args()
    for name in [options.only] if options.only else ARMS:
        folder, settings = options.target / name, {"steps": options.steps, "answer_places": ARMS[name]}
        recipe = arm_recipe(**settings)
        start_from(options.checkpoint, recipe, folder)
        (folder / "arm.json").write_text(json.dumps(settings))
        run(recipe, folder)
    if not options.only:
        report = {name: evaluate_arm(options.target / name, options.num_samples) for name in ARMS}
        (options.target / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
