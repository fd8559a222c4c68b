"""Every number of the training run in one place."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ModelRecipe:
    """Shape of the LLaVA: CLIP tower, projector, Llama."""

    image_size: int = 128
    patch_size: int = 8
    width: int = 128
    vision_layers: int = 5
    vision_heads: int = 4
    vision_mlp: int = 384
    text_layers: int = 6
    text_heads: int = 8
    head_dim: int = 24
    text_mlp: int = 320
    rope_theta: float = 1e6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Canvas:
    """One kind of picture: cells a side, how many objects (None: as in full scenes), pictures a step and worker.

    `text_tokens` is the room for conversations about each; with 0 the vision tower learns from captions alone.
    """

    cells: int
    num_objects: tuple[int, ...] | None
    pictures: int
    text_tokens: int = 112


@dataclass(frozen=True)
class Recipe:
    """One training run. `mixes` gives each stage's shares of (text only, each of the canvases).

    The stages: language alone, as large models have it; the vision tower from captions, as CLIP has it; pictures of
    few objects; full scenes.
    """

    steps: int = 5_200
    seed: int = 0
    workers: int = 1  # data-parallel processes of one thread each
    model: ModelRecipe = field(default_factory=ModelRecipe)
    canvases: tuple[Canvas, ...] = (
        Canvas(10, (1,), 40, 0),
        Canvas(12, (2, 2, 3), 26, 0),
        Canvas(10, (1,), 11, 48),
        Canvas(12, (2, 2, 3), 8, 80),
        Canvas(16, None, 5, 64),
    )
    stage_starts: tuple[int, ...] = (0, 300, 2_000, 2_450)  # steps
    mixes: tuple[tuple[float, ...], ...] = (
        (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.04, 0.66, 0.30, 0.0, 0.0, 0.0),
        (0.08, 0.0, 0.0, 0.17, 0.60, 0.15),
        (0.04, 0.10, 0.14, 0.02, 0.12, 0.58),
    )
    text_rows: int = 6  # rows of a batch without images,
    text_tokens: int = 112  # of so many tokens
    expression_weight: float = 0.15  # of the loss on prompt tokens; answers weigh 1
    caption_weight: float = 0.3  # of the loss of naming what patches show; see `FastForward.caption_loss`
    caption_keep: float = 0.3  # share of the patches that loss sees, so that every part of a thing is named
    answer_places: bool = False  # ablation: name the place first in every answer
    augment_share: float = 0.6  # of the pictures drawn with varied outlines and contrast
    image_dropout: float = 0.3  # of attention from text to image tokens
    look_cost: float = 0.4  # of attention to the image, so that heads with nothing to see rest on the text
    query_key_cap: float = 0.09  # largest root mean square of a query or key weight
    matrix_rate: float = 0.01  # Muon
    vector_rate: float = 1e-3  # AdamW, for embeddings, norms, biases
    weight_decay: float = 0.02
    warmup_steps: int = 100
    decay_from: float = 0.6  # share of the run after which the rates fall linearly
    checkpoint_seconds: float = 120.0
    probe_every: int = 250  # steps between looks at the validation scenes
    half: bool = True  # bfloat16 forward and backward, float32 weights


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote beside its checkpoint."""
    values = json.loads(path.read_text())
    values["model"] = ModelRecipe(**values["model"])
    canvases = (
        Canvas(**c | {"num_objects": c["num_objects"] and tuple(c["num_objects"])})
        for c in values["canvases"]
    )
    values |= {"canvases": tuple(canvases), "stage_starts": tuple(values["stage_starts"])}
    return Recipe(**values | {"mixes": tuple(map(tuple, values["mixes"]))})
