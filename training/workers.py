"""Data-parallel workers: one process and one thread each, joined by gloo on this machine; or a GPU for all of them."""

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
    """Train with `recipe.workers` processes, or their parts of a batch on one GPU, until the last step is saved.

    Args:
        loaders: processes that draw the scenes for a GPU.
    """
    if device != "cpu":
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        trainer = Trainer(recipe, folder, device=device, loaders=loaders)
        trainer.follow(LiveTable(trainer))
        return
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (recipe, folder, f"{meeting}/meet")
        if recipe.workers == 1:
            _work(0, *arguments)
        else:
            multiprocessing.spawn(_work, arguments, nprocs=recipe.workers)


def _work(worker: int, recipe: Recipe, folder: Path, meeting_point: str) -> None:
    """One worker; worker 0 reports and saves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if recipe.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting_point}", rank=worker, world_size=recipe.workers
        )
    trainer, parent = Trainer(recipe, folder, worker), os.getppid()
    table = LiveTable(trainer) if worker == 0 else None

    def report(progress: Progress) -> None:
        if recipe.workers > 1 and os.getppid() != parent:
            sys.exit("the process that started this worker is gone")
        if table:
            table(progress)

    trainer.follow(report)
