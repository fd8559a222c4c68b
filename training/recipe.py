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
    """One kind of picture: cells a side, how many objects (None: as in full scenes), room for text."""

    cells: int
    num_objects: tuple[int, ...] | None
    text_tokens: int = 112  # packed tokens of the conversations about it


@dataclass(frozen=True)
class Recipe:
    """One training run. `mixes` gives each curriculum stage's shares of (text only, canvas 0, 1, 2)."""

    steps: int = 7_400
    seed: int = 0
    workers: int = 1  # data-parallel processes of one thread each
    model: ModelRecipe = field(default_factory=ModelRecipe)
    canvases: tuple[Canvas, ...] = (Canvas(10, (1,), 48), Canvas(12, (2, 2, 3), 80), Canvas(16, None))
    stage_starts: tuple[float, ...] = (0.0, 0.05, 0.23, 0.40)  # shares of the run
    mixes: tuple[tuple[float, ...], ...] = (
        (1.0, 0.0, 0.0, 0.0),
        (0.1, 0.5, 0.4, 0.0),
        (0.08, 0.17, 0.6, 0.15),
        (0.08, 0.05, 0.15, 0.72),
    )
    image_tokens: int = 1100  # image tokens a step and worker; the number of pictures follows
    text_rows: int = 6  # rows of a batch without images,
    text_tokens: int = 112  # of so many tokens
    expression_weight: float = 0.15  # of the loss on prompt tokens; answers weigh 1
    answer_places: bool = False  # ablation: name the place first in every answer
    augment_share: float = 0.6  # of the pictures drawn with varied outlines and contrast
    image_dropout: float = 0.3  # of attention from text to image tokens
    query_key_cap: float = 0.09  # largest root mean square of a query or key weight
    matrix_rate: float = 0.01  # Muon
    vector_rate: float = 1e-3  # AdamW, for embeddings, norms, biases
    weight_decay: float = 0.02
    warmup_steps: int = 100
    decay_from: float = 0.3  # share of the run after which the rates fall linearly
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
