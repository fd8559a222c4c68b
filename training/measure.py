"""What a trained model does on fixed scenes: attention of the final full stop, and the answers it gives."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from localization_heads.data.scenes import Expression, Scene
from training.batches import normalise
from training.language import IDS, encode
from training.model import PREFIX

BATCH = 25


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
    """Run the model's own forward on (scene, expression) samples, batched by length.

    `places`: a grid's side, and where in that grid the image's cells lie, if they do not fill it.
    """
    model.set_attn_implementation("eager")
    model.eval()
    samples = list(samples)
    texts = [_texts(expression) for _, expression in samples]
    order = sorted(range(len(samples)), key=lambda i: tuple(map(len, texts[i])))
    measured: dict[int, Measured] = {}
    while order:
        lengths = tuple(map(len, texts[order[0]]))
        chosen = [i for i in order[:BATCH] if tuple(map(len, texts[i])) == lengths]
        order = order[len(chosen) :]
        results = _run(model, [samples[i] for i in chosen], [texts[i] for i in chosen], places)
        measured.update(zip(chosen, results, strict=True))
    return [measured[i] for i in range(len(samples))]


def _texts(expression: Expression) -> tuple[list[int], list[int]]:
    """Token ids of the prompt after the image, and of the answer."""
    return encode(f"{expression.text} ."), [*encode(expression.answer), IDS["</s>"]]


def _run(model: LlavaForConditionalGeneration, samples: list, texts: list, places) -> list[Measured]:
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    start, image = len(PREFIX), [IDS["<image>"]] * grid**2
    ids = torch.tensor([[*PREFIX, *image, *prompt, *answer] for prompt, answer in texts])
    pixels = normalise(np.stack([scene.image for scene, _ in samples]))
    output = model(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        position_ids=_positions(places or (grid, torch.arange(grid**2)), ids.shape[1]),
        output_attentions=True,
        use_cache=False,
    )
    last = start + len(image) + len(texts[0][0]) - 1
    rows = torch.stack([a[:, :, last, start : start + len(image)] for a in output.attentions], 1)
    maps = rows.unflatten(-1, (grid, grid)).numpy()
    right = output.logits[:, last:-1].argmax(-1) == ids[:, last + 1 :]
    return [Measured(*s, m, tuple(r.tolist())) for s, m, r in zip(samples, maps, right, strict=True)]


def _positions(places: tuple[int, torch.Tensor], length: int) -> torch.Tensor:
    """Position of every token (1, T) of a prompt of `length` tokens: those of a prompt with the full grid."""
    (grid, cells), start = places, len(PREFIX)
    rest = start + grid**2 + torch.arange(length - start - len(cells))
    return torch.cat([torch.arange(start), start + cells, rest])[None]
