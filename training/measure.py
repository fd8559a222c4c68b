"""What a trained model does on fixed scenes: attention of the final full stop, and the answers it gives."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from localization_heads.scenes.scene import Expression, Scene
from training.batches import normalise
from training.language import IDS, encode
from training.model import PREFIX


@dataclass(frozen=True)
class Measured:
    """One scene and expression, with every head's map of the prompt's last token."""

    scene: Scene
    expression: Expression
    maps: np.ndarray  # float32 (layer, head, h, w)
    right: tuple[bool, ...]  # each token of the answer, given the ones before; the last is the end

    @property
    def target(self):
        return self.scene.objects[self.expression.object_index]


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration,
    samples: Iterable[tuple[Scene, Expression]],
    places: tuple[int, torch.Tensor] | None = None,
) -> list[Measured]:
    """Run the model's own forward on (scene, expression) samples, one by one: larger batches are slower on a CPU.

    `places`: a grid's side, and where in that grid the image's cells lie, if they do not fill it.
    """
    model.set_attn_implementation("eager")
    model.eval()
    return [_measure(model, scene, expression, places) for scene, expression in samples]


def _measure(model: LlavaForConditionalGeneration, scene: Scene, expression: Expression, places) -> Measured:
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    start, image = len(PREFIX), [IDS["<image>"]] * grid**2
    prompt, answer = encode(f"{expression.text} ."), [*encode(expression.answer), IDS["</s>"]]
    ids = torch.tensor([[*PREFIX, *image, *prompt, *answer]])
    output = model(
        input_ids=ids,
        pixel_values=normalise(torch.from_numpy(scene.image[None])),
        attention_mask=torch.ones_like(ids),
        position_ids=_positions(places or (grid, torch.arange(grid**2)), ids.shape[1]),
        output_attentions=True,
        use_cache=False,
    )
    last = start + len(image) + len(prompt) - 1
    rows = torch.stack([a[0, :, last, start : start + len(image)] for a in output.attentions])
    right = output.logits[0, last:-1].argmax(-1) == ids[0, last + 1 :]
    return Measured(scene, expression, rows.unflatten(-1, (grid, grid)).numpy(), tuple(right.tolist()))


def _positions(places: tuple[int, torch.Tensor], length: int) -> torch.Tensor:
    """Position of every token (1, T) of a prompt of `length` tokens: those of a prompt with the full grid."""
    (grid, cells), start = places, len(PREFIX)
    rest = start + grid**2 + torch.arange(length - start - len(cells))
    return torch.cat([torch.arange(start), start + cells, rest])[None]
