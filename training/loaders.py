"""Prefetching of batches in worker processes: on a GPU, drawing the scenes is the bottleneck."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from training.batches import Batch, BatchMaker, concatenate_batches
from training.recipe import Recipe


class StepDataset(Dataset[Batch]):
    """Maps a step to its batch, concatenated over all of the recipe's workers."""

    def __init__(self, recipe: Recipe):
        self.makers = [BatchMaker(recipe, worker) for worker in range(recipe.workers)]

    def __getitem__(self, step: int) -> Batch:
        return concatenate_batches([maker.make(step) for maker in self.makers])


def prefetch_batches(recipe: Recipe, steps: range, loaders: int) -> Iterator[Batch]:
    """The batches of the steps in order, made by `loaders` processes ahead of time."""
    # batch_size=None: the dataset's items are batches already.
    return iter(DataLoader(StepDataset(recipe), batch_size=None, sampler=steps, num_workers=loaders, prefetch_factor=3))
