"""Batches made ahead of time by processes of their own: what keeps a GPU busy is drawing the scenes."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from training.batches import Batch, BatchMaker, joined
from training.recipe import Recipe


class Steps(Dataset[Batch]):
    """The batch of a step: what all the workers would see in it."""

    def __init__(self, recipe: Recipe):
        self.makers = [BatchMaker(recipe, worker) for worker in range(recipe.workers)]

    def __getitem__(self, step: int) -> Batch:
        return joined([maker.make(step) for maker in self.makers])


def made_ahead(recipe: Recipe, steps: range, loaders: int) -> Iterator[Batch]:
    """The batches of the steps, in order."""
    # Batches are made as they are, without a sampler's own (None), and are so large that a few ahead are enough.
    return iter(DataLoader(Steps(recipe), None, sampler=steps, num_workers=loaders, prefetch_factor=3))
