"""Train the embedded model: python -m training [--folder runs/main] [--workers 3] [--steps 6000] ...

After an interruption, the same command resumes from the last checkpoint.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from training.recipe import Recipe
from training.trainer import start_from
from training.workers import run


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/main"), help="folder of the checkpoint and the log")
    for name in ("steps", "workers", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe(), name))
    parser.add_argument("--device", default="cpu", help="on a GPU, one process trains the batches of all workers")
    parser.add_argument("--loaders", type=int, default=8, help="data-loading processes for a GPU (8)")
    parser.add_argument("--answer-places", action="store_true", help="ablation: location words in the answers")
    parser.add_argument("--weights", type=Path, help="start from the weights of this run or exported model")
    parser.add_argument("--start", type=int, default=0, help="the step of the recipe at which to start, with --weights")
    options = vars(parser.parse_args())
    if options["device"] != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device={options['device']}: there is no GPU here")
    folder, weights, start, device, loaders = (
        options.pop(name) for name in ("folder", "weights", "start", "device", "loaders")
    )
    recipe = replace(Recipe(), **options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    if weights is not None:
        start_from(weights, recipe, folder, start)
    run(recipe, folder, device, loaders)


if __name__ == "__main__":
    main()
