"""Muon for the hidden matrices, AdamW for the rest, with a cap on query and key weights.

The cap is essential for this model: without it, query and key weights grow tenfold, attention becomes one-hot, and
learning stops. `HalfCopy` provides mixed precision: float32 master weights and a bfloat16 copy for computing.
"""

import copy

import torch
from torch import Tensor, nn

from training.recipe import Recipe


class HalfCopy:
    """A bfloat16 copy (`twin`) of a model for the forward and backward pass; its embeddings stay float32."""

    def __init__(self, model: nn.Module):
        self.model, self.twin = model, copy.deepcopy(model)
        for name, parameter in self.twin.named_parameters():
            if not any(part in name for part in ("embed_tokens", "position_embedding", "class_embedding")):
                parameter.data = parameter.data.bfloat16()
        self.pairs = list(zip(model.parameters(), self.twin.parameters(), strict=True))

    def pull_gradients(self) -> None:
        """Move the twin's gradients to the float32 master weights."""
        for parameter, twin in self.pairs:
            parameter.grad = None if twin.grad is None else twin.grad.float()
            twin.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        """Copy the float32 master weights into the twin, rounding them."""
        for parameter, twin in self.pairs:
            twin.data.copy_(parameter.data)


class Optimiser:
    """Muon and AdamW as one optimiser; resumes exactly from its `state_dict`."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.recipe = recipe
        named = list(model.named_parameters())
        self.matrices: dict[tuple, list[Tensor]] = {}
        vectors = []
        for name, parameter in named:
            if parameter.ndim == 2 and "embed" not in name:
                self.matrices.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                vectors.append(parameter)
        self.capped = [p for n, p in named if n.endswith(("q_proj.weight", "k_proj.weight"))]
        self.momenta = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.matrices.items()}
        self.adam = torch.optim.AdamW(vectors, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        self.parameters = [p for _, p in named]
        self._cap()

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update all weights with learning rates scaled by `factor`, then clear the gradients."""
        for shape, parameters in self.matrices.items():
            self._muon_step(parameters, self.momenta[shape], factor)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.vector_rate * factor
        self.adam.step()
        self._cap()
        for parameter in self.parameters:
            parameter.grad = None

    def _muon_step(self, parameters: list[Tensor], momenta: Tensor, factor: float) -> None:
        """Update matrices of one shape with Muon; those without a gradient (the tower's on text alone) stay."""
        updated = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        if not updated:
            return
        gradients = torch.stack([parameters[i].grad for i in updated])
        momenta[updated] = momenta[updated].lerp(gradients, 0.05)
        directions = orthogonalise(gradients.lerp(momenta[updated], 0.95))
        rows, columns = parameters[0].shape
        rate = self.recipe.matrix_rate * factor
        for i, direction in zip(updated, directions, strict=True):
            parameters[i].mul_(1 - rate * self.recipe.weight_decay)
            parameters[i].add_(direction, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    @torch.no_grad()
    def _cap(self) -> None:
        """Scale each query and key weight down to a root mean square of at most `query_key_cap`."""
        for parameter in self.capped:
            rms = parameter.square().mean().sqrt()
            parameter.mul_((self.recipe.query_key_cap / rms).clamp(max=1.0))

    def state_dict(self) -> dict:
        return {"momenta": list(self.momenta.values()), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for momentum, saved in zip(self.momenta.values(), state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrices (n, r, c), by five Newton-Schulz steps in bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).float()
