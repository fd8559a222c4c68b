"""Data-parallel training on one machine: CPU workers of one thread each, connected by gloo, or a single GPU."""

import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from training.recipe import Recipe
from training.report import LiveTable
from training.trainer import Progress, Trainer


def run(recipe: Recipe, folder: Path, device: str = "cpu", loaders: int = 0) -> None:
    """Train until the last step: with `recipe.workers` processes, or with their concatenated batches on one GPU.

    Args:
        loaders: data-loading processes for a GPU.
    """
    if device != "cpu":
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        trainer = Trainer(recipe, folder, device=device, loaders=loaders)
        trainer.train(LiveTable(trainer))
        return
    with tempfile.TemporaryDirectory() as rendezvous:
        arguments = (recipe, folder, f"{rendezvous}/gloo")
        if recipe.workers == 1:
            _run_worker(0, *arguments)
        else:
            multiprocessing.spawn(_run_worker, arguments, nprocs=recipe.workers)


def _run_worker(worker: int, recipe: Recipe, folder: Path, rendezvous_file: str) -> None:
    """Run one worker; worker 0 also reports and saves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if recipe.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=worker, world_size=recipe.workers)
    trainer, parent = Trainer(recipe, folder, worker), os.getppid()
    table = LiveTable(trainer) if worker == 0 else None

    def report(progress: Progress) -> None:
        if recipe.workers > 1 and os.getppid() != parent:
            sys.exit("the process that started this worker is gone")
        if table:
            table(progress)

    trainer.train(report)
