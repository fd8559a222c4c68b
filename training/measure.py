"""A trained model's attention maps and answers on given scenes."""

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
class SceneResult:
    """A scene and expression, with every head's attention map from the prompt's last token (the full stop)."""

    scene: Scene
    expression: Expression
    maps: np.ndarray  # float32 (layer, head, h, w)
    answer_correct: tuple[bool, ...]  # each answer token given the true ones before it, `</s>` included

    @property
    def target(self):
        return self.scene.objects[self.expression.object_index]


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration,
    samples: Iterable[tuple[Scene, Expression]],
    cells: tuple[int, torch.Tensor] | None = None,
) -> list[SceneResult]:
    """Run the model on (scene, expression) samples, one at a time: larger batches are slower on a CPU.

    Args:
        cells: the side of the full grid, and the index in it of each of the image's cells; None if they fill the grid.
    """
    model.set_attn_implementation("eager")
    model.eval()
    return [_measure(model, scene, expression, cells) for scene, expression in samples]


def _measure(model: LlavaForConditionalGeneration, scene: Scene, expression: Expression, cells) -> SceneResult:
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    start, image = len(PREFIX), [IDS["<image>"]] * grid**2
    prompt, answer = encode(f"{expression.text} ."), [*encode(expression.answer), IDS["</s>"]]
    ids = torch.tensor([[*PREFIX, *image, *prompt, *answer]])
    output = model(
        input_ids=ids,
        pixel_values=normalise(torch.from_numpy(scene.image[None])),
        attention_mask=torch.ones_like(ids),
        position_ids=_positions(cells or (grid, torch.arange(grid**2)), ids.shape[1]),
        output_attentions=True,
        use_cache=False,
    )
    last = start + len(image) + len(prompt) - 1
    rows = torch.stack([a[0, :, last, start : start + len(image)] for a in output.attentions])
    correct = output.logits[0, last:-1].argmax(-1) == ids[0, last + 1 :]
    return SceneResult(scene, expression, rows.unflatten(-1, (grid, grid)).numpy(), tuple(correct.tolist()))


def _positions(grid_cells: tuple[int, torch.Tensor], length: int) -> torch.Tensor:
    """Position ids (1, T) of a prompt of `length` tokens, those that its tokens have in a prompt with the full grid."""
    (grid, cells), start = grid_cells, len(PREFIX)
    rest = start + grid**2 + torch.arange(length - start - len(cells))
    return torch.cat([torch.arange(start), start + cells, rest])[None]
