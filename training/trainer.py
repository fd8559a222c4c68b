"""The training loop: data parallel, resumable and deterministic.

A step's batch and dropout depend on (seed, step, worker) alone, so a run resumed from a checkpoint follows the same
trajectory as an uninterrupted one.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from training.batches import Batch, BatchMaker, normalise
from training.language import IDS
from training.loaders import prefetch_batches
from training.model import FastForward, build_model
from training.optimiser import HalfCopy, Optimiser
from training.recipe import Recipe, read_recipe

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"
LOOK_EPS = 1e-3  # keeps the gradient of the square root finite at 0


@dataclass(frozen=True)
class Progress:
    """Losses and accuracy of a step; the two accuracies are over the first and over all tokens of the answers."""

    step: int
    canvas: int  # image tokens per image, negative for captions alone
    loss: float
    caption_loss: float
    looked: float  # mean attention sum over the image
    first_right: float
    answer_right: float


class Trainer:
    """Model, optimiser and step counter of one worker. Resumes from the folder's checkpoint, if there is one.

    Args:
        loaders: processes that prefetch the concatenated batches of all workers, for a GPU; with 0, this worker's own
            batches are made in this process.
    """

    def __init__(self, recipe: Recipe, folder: Path, worker: int = 0, device: str = "cpu", loaders: int = 0):
        self.recipe, self.folder, self.worker = recipe, folder, worker
        self.device, self.loaders = torch.device(device), loaders
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model).to(self.device)
        self.optimiser = Optimiser(self.model, recipe)
        self.half = HalfCopy(self.model) if recipe.half else None
        self.forward = FastForward(self.half.twin if self.half else self.model, recipe.image_dropout, recipe.image_keep)
        self.step = 0
        if (folder / CHECKPOINT).exists():
            self._load()
        if self.half:
            self.half.push_weights()

    def train(self, report: Callable[[Progress], None] | None = None, until: int | None = None) -> "Trainer":
        """Train until a step (default: the recipe's last), saving checkpoints and calling `report` after each step."""
        last_save = time.monotonic()
        until = self.recipe.steps if until is None else until
        for batch in self._batches(until):
            progress = self._train_step(batch.to(self.device))
            if report:
                report(progress)
            if self.worker == 0 and time.monotonic() - last_save > self.recipe.checkpoint_seconds:
                self.save()
                last_save = time.monotonic()
        if self.worker == 0:
            self.save()
        return self

    def _batches(self, until: int) -> Iterator[Batch]:
        steps = range(self.step, until)
        if self.loaders:
            return prefetch_batches(self.recipe, steps, self.loaders)
        return map(BatchMaker(self.recipe, self.worker).make, steps)

    def _train_step(self, batch: Batch) -> Progress:
        torch.manual_seed(hash((self.recipe.seed, self.step, self.worker)))
        loss, caption, looked, logits = self._loss(batch)
        weight = self.recipe.caption_beside if batch.ids.shape[1] else self.recipe.caption_weight
        total = loss + weight * caption + self._look_cost(looked)
        total.backward()
        if self.half:
            self.half.pull_gradients()
        self._average_gradients()
        self.optimiser.step(self.rate_factor())
        if self.half:
            self.half.push_weights()
        self.step += 1
        return _progress(self.step, batch, (loss, caption, looked.mean()), logits)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The losses of conversations and captions, each head's mean attention sum over the image, and the logits."""
        features, caption = None, torch.zeros((), device=self.device)
        if batch.pixels is not None:
            features = self.forward.image_features(normalise(batch.pixels), batch.cells)
            caption = self.forward.caption_loss(features, batch.words, self.recipe.caption_keep)
        if batch.ids.shape[1] == 0:
            zero = torch.zeros(1, device=self.device)
            return zero[0], caption, zero, zero.expand(*batch.ids.shape, len(IDS))
        states, looked = self.forward.text_states(features, batch.cells, batch.ids, batch.offsets, batch.groups)
        logits = self.forward.logits(states).float()
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
        return loss, caption, looked, logits

    def _average_gradients(self) -> None:
        """Average the gradients over the workers, with a single all-reduce."""
        if not dist.is_initialized():
            return
        parameters = [p for p in self.optimiser.parameters if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _look_cost(self, looked: Tensor) -> Tensor:
        """The penalty on attention to the image: zero at first, then linear, finally on each head's square root.

        `looked` is each head's mean attention sum over the image. With the square root, the same total attention costs
        least if few heads have it.
        """
        recipe = self.recipe
        if self.step >= recipe.few_look_costs[0][0]:
            weight = float(np.interp(self.step, *zip(*recipe.few_look_costs, strict=True)))
            return weight * ((looked + LOOK_EPS).sqrt() - LOOK_EPS**0.5).mean()
        grown = min(1.0, max(0.0, (self.step - recipe.look_from) / recipe.look_steps))
        return recipe.look_cost * grown * looked.mean()

    def rate_factor(self) -> float:
        """Factor of the learning rates at the present step."""
        steps, factors = zip(*self.recipe.rates, (self.recipe.steps, self.recipe.last_rate), strict=True)
        return float(np.interp(self.step, steps, factors))

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{CHECKPOINT}.part"
        torch.save(state, part)
        part.replace(self.folder / CHECKPOINT)

    def _load(self) -> None:
        state = torch.load(self.folder / CHECKPOINT, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        log.info("resumed at step %d", self.step)


def start_from(weights: Path, recipe: Recipe, folder: Path, step: int = 0) -> None:
    """Create a run's folder with a first checkpoint of given weights, at `step`, unless it has a checkpoint.

    Args:
        weights: folder of another run, or of a model exported by `training.export`.
    """
    if (folder / CHECKPOINT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    trainer = Trainer(recipe, folder)
    trainer.model.load_state_dict(mean_weights([weights]))
    trainer.step = step
    trainer.save()


def mean_weights(folders: list[Path]) -> dict[str, Tensor]:
    """The mean weights of runs or exported models, by parameter name (model soups, arXiv:2203.05482)."""
    models = [_weights(folder) for folder in folders]
    return {name: torch.stack([weights[name].float() for weights in models]).mean(0) for name in models[0]}


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / CHECKPOINT).exists():
        return torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")["model"]
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()


def load_run(folder: Path) -> tuple[Recipe, LlavaForConditionalGeneration]:
    """The recipe and the model of a run, from its folder."""
    recipe = read_recipe(folder / "recipe.json")
    return recipe, Trainer(recipe, folder).model.eval()


@torch.no_grad()
def _progress(step: int, batch: Batch, losses: tuple[Tensor, ...], logits: Tensor) -> Progress:
    correct = logits.argmax(-1) == batch.targets
    answers = batch.weights == 1
    tokens = 0 if batch.cells is None else batch.cells.shape[1]
    values = [loss.item() for loss in losses]
    if batch.ids.shape[1] == 0:
        return Progress(step, -tokens, *values, 0.0, 0.0)
    accuracies = (correct[part].float().mean().item() for part in (batch.firsts, answers))
    return Progress(step, tokens, *values, *accuracies)
