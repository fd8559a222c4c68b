"""Training batches: images, each with its conversations packed into one row of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from localization_heads.scenes.scene import TRAIN_SEEDS, Scene, render_scene
from training.language import IDS, encode, scene_turns, text_turns
from training.recipe import SPRITES, Canvas, Recipe, Stage

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Batch:
    """B images with packed conversations of T tokens; without images, the first three fields are None.

    Args:
        pixels: uint8 (B, h, w, 3).
        cells: (B, N), the index in the model's full grid of each image token.
        words: (B, vocabulary), 1 at the names and colours in the image's caption.
        ids, targets: (B, T), each token and the one that follows it.
        offsets, groups: (B, T), each token's position in its conversation, and the conversation's number (-1: padding).
        weights: (B, T), weights of the loss: 1 on answers, less on prompts, 0 on padding.
        firsts: (B, T), whether the target is the first token of an answer.
    """

    pixels: Tensor | None
    cells: Tensor | None
    words: Tensor | None
    ids: Tensor
    targets: Tensor
    offsets: Tensor
    groups: Tensor
    weights: Tensor
    firsts: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch moved to a device."""
        return Batch(**{name: part if part is None else part.to(device) for name, part in vars(self).items()})


def concatenate_batches(parts: list[Batch]) -> Batch:
    """Several batches of the same canvas as one."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))


def pack(turns: Iterator[tuple[str, str]], length: int, expression_weight: float) -> np.ndarray:
    """Pack (prompt, answer) turns into a row of `length` tokens: (6, T), in the order of `Batch`'s last six fields."""
    row = np.zeros((6, length))
    row[3] = -1
    start = group = 0
    for prompt, answer in turns if length else ():
        question, reply = encode_unknown(prompt), [*encode(answer), IDS["</s>"]]
        tokens = question + reply
        stop = start + len(tokens) - 1
        if stop > length:
            return row
        offsets = np.arange(len(tokens) - 1)
        row[0, start:stop], row[1, start:stop] = tokens[:-1], tokens[1:]
        row[2, start:stop], row[3, start:stop] = offsets, group
        row[4, start:stop] = np.where(offsets < len(question) - 1, expression_weight, 1.0)
        row[5, start + len(question) - 1] = 1
        start, group = stop, group + 1
    return row


def caption_words(scene: Scene) -> np.ndarray:
    """1 at the names and colours of the scene's objects, else 0: float32 (vocabulary,)."""
    marks = np.zeros(len(IDS), np.float32)
    for o in scene.objects:
        marks[[IDS[o.name], IDS[o.colour]]] = 1
    return marks


def encode_unknown(prompt: str) -> list[int]:
    """Token ids of a prompt that may start with `<unk>`."""
    unknown = prompt.startswith("<unk>")
    return [IDS["<unk>"]] * unknown + encode(prompt.removeprefix("<unk>"))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, h, w, 3) -> float (B, 3, h, w), normalised as by the image processor."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _bars(rng: Random) -> tuple[float, float]:
    """Shares of the side that padding bars take, left and right or top and bottom, as if the image were not square."""
    share = rng.uniform(0.02, 0.2)
    return rng.choice(((share, 0.0), (0.0, share)))


class BatchMaker:
    """Makes a worker's batch of any step; it depends on (seed, step, worker) alone."""

    def __init__(self, recipe: Recipe, worker: int = 0):
        self.recipe, self.model, self.worker = recipe, recipe.model, worker

    def make(self, step: int) -> Batch:
        """The worker's batch of a step."""
        stage = [s for s in self.recipe.stages if step >= s.start][-1]
        key = f"{self.recipe.seed} {step}"  # without the worker: all workers draw the same canvas
        canvas = Random(key).choices((None, *self.recipe.canvases), stage.mix)[0]
        rng = Random(f"{key} {self.worker}")
        return self._text_batch(rng) if canvas is None else self._image_batch(canvas, stage, rng)

    def _text_batch(self, rng: Random) -> Batch:
        rows = [pack(text_turns(rng), self.recipe.text_tokens, 0.5) for _ in range(self.recipe.text_rows)]
        return Batch(None, None, None, *self._tensors(rows))

    def _image_batch(self, canvas: Canvas, stage: Stage, rng: Random) -> Batch:
        scenes = [self._scene(canvas, stage, rng) for _ in range(canvas.images)]
        rows = [self._row(scene, canvas.text_tokens, stage, rng) for scene in scenes]
        cells = torch.from_numpy(np.stack([self._cells(canvas, rng) for _ in scenes]))
        words = torch.from_numpy(np.stack([caption_words(scene) for scene in scenes]))
        pixels = torch.from_numpy(np.stack([s.image for s in scenes]))
        return Batch(pixels, cells, words, *self._tensors(rows))

    def _scene(self, canvas: Canvas, stage: Stage, rng: Random) -> Scene:
        return render_scene(
            rng.randrange(TRAIN_SEEDS.stop),
            size=canvas.cells * self.model.patch_size,
            num_objects=rng.choice(canvas.num_objects) if canvas.num_objects else None,
            style=str(SPRITES / rng.choice(stage.styles)) if rng.random() < stage.training_styles_share else None,
            span=canvas.cells / (canvas.scene_cells or self.model.grid),
            bars=_bars(rng) if rng.random() < self.recipe.bars_share else (0.0, 0.0),
            augment=rng.random() < stage.augment_share,
            repeats=stage.repeats,
        )

    def _row(self, scene: Scene, length: int, stage: Stage, rng: Random) -> np.ndarray:
        turns = scene_turns(scene, rng, self.recipe.answer_places, dict(stage.kinds), stage.presence)
        return pack(turns, length, self.recipe.expression_weight)

    def _cells(self, canvas: Canvas, rng: Random) -> np.ndarray:
        """The canvas at a random place in the full grid: the index of each of its cells, row by row."""
        stride = self.model.grid / (canvas.scene_cells or self.model.grid)
        room = self.model.grid - (canvas.cells - 1) * stride
        starts = (rng.uniform(0, room) for _ in range(2))
        rows, columns = (np.floor(start + stride * np.arange(canvas.cells)) for start in starts)
        cells = rows.clip(max=self.model.grid - 1)[:, None] * self.model.grid + columns.clip(max=self.model.grid - 1)
        return cells.ravel().astype(np.int64)

    @staticmethod
    def _tensors(rows: list[np.ndarray]) -> list[Tensor]:
        dtypes = (torch.int64, torch.int64, torch.int64, torch.int64, torch.float32, torch.bool)
        stacked = torch.from_numpy(np.stack(rows, 1))
        return [field.to(dtype) for field, dtype in zip(stacked, dtypes, strict=True)]
