"""All hyperparameters of the training run."""

import json
from dataclasses import dataclass, field
from pathlib import Path

SPRITES = Path(__file__).parent / "sprites"  # styles for training only, one atlas each
TRAINING_STYLES = ("noto_v1", "emojione", "fxemoji")
# "streamline" twice: the only one with outlines
MORE_STYLES = (*TRAINING_STYLES, "emojione_v1", "fluent_3d", "streamline", "streamline")
LINE_STYLES = (*MORE_STYLES, "lines_a", "lines_b", "contrast", "solid", "glyphs")  # and those of `line_art`


@dataclass(frozen=True)
class ModelRecipe:
    """Architecture of the LLaVA: CLIP vision tower, projector, Llama."""

    image_size: int = 192
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
    """A kind of training image.

    Args:
        cells: patches per side.
        num_objects: drawn from these; None: as in full scenes.
        images: images per step and worker.
        text_tokens: length of the packed conversations about each image; with 0, only the caption loss is used.
        scene_cells: cells that the side of a full scene takes (None: the model's grid). With fewer, scenes are drawn
            smaller and their cells are spread over the grid, so that positions and extents stay those of full images.
    """

    cells: int
    num_objects: tuple[int, ...] | None
    images: int
    text_tokens: int = 112
    scene_cells: int | None = None


@dataclass(frozen=True)
class Stage:
    """The training data from step `start` on.

    `mix` is the probability of a batch of text alone, then of each of the canvases. `kinds` are sampling weights of the
    kinds of expression (see `language.scene_turns`).
    """

    start: int
    mix: tuple[float, ...]
    kinds: tuple[tuple[str, float], ...] = ()
    augment_share: float = 0.6  # share of images with varied outlines and contrast
    training_styles_share: float = 0.35  # share of images in one of `styles`
    styles: tuple[str, ...] = TRAINING_STYLES
    repeats: float = 0.4  # share of scenes with several objects of one name
    presence: float = 0.0  # share of turns that ask whether an expression refers to anything


@dataclass(frozen=True)
class Recipe:
    """One training run.

    The stages: language alone, as in pretrained LLMs; the vision tower on captions, as in CLIP; images of few objects;
    full scenes, first of 16 x 16 cells, then of the full grid. Then the learning rate is raised again three times: with
    more places, colours and relations, and a penalty on attention to the image that favours few heads; with more
    styles, and more objects of one name that only their places tell apart; and in larger batches, with questions
    whether an expression refers to anything.
    """

    steps: int = 53_373
    seed: int = 0
    workers: int = 1  # data-parallel processes of one thread each; on a GPU, their batches are concatenated
    model: ModelRecipe = field(default_factory=ModelRecipe)
    canvases: tuple[Canvas, ...] = (
        Canvas(10, (1,), 40, 0, 16),
        Canvas(12, (2, 2, 3), 26, 0, 16),
        Canvas(14, (1, 2), 20, 0),
        Canvas(24, None, 5, 0),
        Canvas(10, (1,), 14, 48, 16),
        Canvas(12, (2, 2, 3), 11, 80, 16),
        Canvas(16, None, 7, 80, 16),
        Canvas(18, (2, 3), 5, 80),
        Canvas(24, None, 3, 128),
        Canvas(24, None, 2, 160),
    )
    stages: tuple[Stage, ...] = (
        Stage(0, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        Stage(300, (0.04, 0.42, 0.34, 0.20, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        Stage(4_200, (0.08, 0.0, 0.0, 0.0, 0.0, 0.17, 0.58, 0.17, 0.0, 0.0, 0.0)),
        Stage(5_400, (0.05, 0.06, 0.08, 0.06, 0.02, 0.03, 0.14, 0.42, 0.07, 0.07, 0.0)),
        Stage(9_000, (0.04, 0.0, 0.05, 0.05, 0.08, 0.0, 0.0, 0.04, 0.12, 0.0, 0.62)),
        Stage(
            12_700,
            (0.04, 0.0, 0.03, 0.04, 0.12, 0.0, 0.0, 0.0, 0.07, 0.0, 0.70),
            kinds=(("name", 0.7), ("place", 2.0), ("colour", 2.0), ("relation", 1.6)),
            augment_share=0.7,
            training_styles_share=0.45,
        ),
        Stage(
            21_700,
            (0.04, 0.0, 0.03, 0.04, 0.12, 0.0, 0.0, 0.0, 0.07, 0.0, 0.70),
            kinds=(("name", 0.7), ("place", 3.0), ("colour", 1.5), ("relation", 2.0)),
            augment_share=0.7,
            training_styles_share=0.5,
            styles=MORE_STYLES,
        ),
        Stage(
            25_565,
            (0.03, 0.0, 0.02, 0.02, 0.05, 0.0, 0.22, 0.18, 0.14, 0.0, 0.34),
            kinds=(("name", 0.7), ("place", 0.7), ("comparison", 6.0)),
            augment_share=0.7,
            training_styles_share=0.5,
            repeats=0.8,
            styles=MORE_STYLES,
        ),
        Stage(
            26_500,
            (0.04, 0.0, 0.0, 0.03, 0.10, 0.0, 0.08, 0.08, 0.07, 0.0, 0.60),
            kinds=(("name", 0.7), ("place", 0.7), ("colour", 1.5), ("comparison", 3.0)),
            augment_share=0.7,
            training_styles_share=0.5,
            repeats=0.6,
            styles=MORE_STYLES,
        ),
        Stage(
            28_500,
            (0.04, 0.0, 0.0, 0.03, 0.10, 0.0, 0.04, 0.06, 0.05, 0.0, 0.68),
            kinds=(("comparison", 2.0),),
            augment_share=0.7,
            training_styles_share=0.5,
            repeats=0.5,
            styles=MORE_STYLES,
        ),
        Stage(
            34_500,
            (0.03, 0.0, 0.0, 0.08, 0.22, 0.0, 0.05, 0.06, 0.05, 0.0, 0.51),
            kinds=(("comparison", 2.0),),
            augment_share=0.7,
            training_styles_share=0.65,
            repeats=0.5,
            styles=LINE_STYLES,
        ),
        Stage(
            40_500,
            (0.03, 0.0, 0.0, 0.18, 0.22, 0.0, 0.05, 0.06, 0.05, 0.0, 0.41),
            kinds=(("comparison", 2.0),),
            augment_share=0.7,
            training_styles_share=0.6,
            repeats=0.5,
            styles=LINE_STYLES,
        ),
        Stage(
            48_000,
            (0.03, 0.0, 0.0, 0.12, 0.22, 0.0, 0.05, 0.06, 0.05, 0.0, 0.47),
            kinds=(("comparison", 2.0),),
            augment_share=0.7,
            training_styles_share=0.45,
            repeats=0.5,
            styles=LINE_STYLES,
        ),
        Stage(  # run on a GPU with 16 workers' batches concatenated
            50_500,
            (0.03, 0.0, 0.0, 0.10, 0.20, 0.0, 0.05, 0.06, 0.06, 0.0, 0.50),
            kinds=(("comparison", 2.0),),
            augment_share=0.7,
            training_styles_share=0.5,
            repeats=0.5,
            styles=LINE_STYLES,
            presence=0.15,
        ),
    )
    text_rows: int = 6  # rows of a batch of text alone
    text_tokens: int = 112  # tokens of such a row
    expression_weight: float = 0.15  # weight of the loss on prompt tokens; 1 on answers
    caption_weight: float = 0.3  # weight of `FastForward.caption_loss` without conversations
    caption_beside: float = 0.5  # the same, with conversations
    caption_keep: float = 0.2  # share of patches in that loss, so that each part of an object is learned
    answer_places: bool = False  # ablation: start answers with the object's place
    image_keep: float = 1.0  # share of image tokens that the language model sees
    image_dropout: float = 0.3  # dropout of attention from text to image tokens
    bars_share: float = 0.15  # share of images with bars, as from padding to a square
    look_cost: float = 0.4  # penalty on attention to the image, so that unneeded heads attend to the text
    look_from: int = 6_200  # the step from which that penalty grows, when the model has learned to look
    look_steps: int = 1_500  # steps until it is fully grown
    # (step, weight), interpolated linearly. From the first of these steps on, the penalty is on the square root of each
    # head's attention to the image: a little in many heads costs more than much in few.
    few_look_costs: tuple[tuple[int, float], ...] = (
        (12_700, 0.4),
        (18_122, 0.4),
        (18_822, 1.2),
        (19_049, 1.2),
        (19_949, 2.4),
        (20_735, 2.4),
        (20_736, 1.2),
        (27_700, 1.2),
        (28_200, 0.6),
        (28_450, 0.6),
        (28_550, 1.2),
        (31_000, 1.2),
        (31_100, 0.3),
        (32_500, 0.3),
        (32_600, 0.05),
        (34_500, 0.05),
        (34_600, 0.15),
        (39_500, 0.15),
        (39_600, 0.05),
    )
    query_key_cap: float = 0.09  # largest root mean square of a query or key matrix
    matrix_rate: float = 0.01  # learning rate of Muon
    vector_rate: float = 1e-3  # learning rate of AdamW: embeddings, norms, biases
    weight_decay: float = 0.02
    # (step, factor of the learning rates), interpolated linearly, ending with `last_rate` at the last step.
    rates: tuple[tuple[int, float], ...] = (
        (0, 0.01),
        (99, 1.0),
        (4_191, 1.0),
        (6_326, 0.7491),
        (6_327, 0.4494),
        (12_416, 0.02),
        (12_700, 0.02),
        (12_850, 0.30),
        (16_373, 0.1910),
        (16_573, 0.16),
        (17_564, 0.1300),
        (21_700, 0.02),
        (21_850, 0.25),
        (25_565, 0.1728),
        (25_665, 0.35),
        (26_500, 0.30),
        (31_000, 0.02),
        (31_100, 0.12),
        (32_500, 0.02),
        (32_600, 0.15),
        (34_500, 0.02),
        (34_600, 0.25),
        (36_800, 0.22),
        (40_500, 0.02),
        (40_600, 0.14),
        (48_500, 0.11),
        (50_500, 0.02),
        (50_700, 0.30),
    )
    last_rate: float = 0.01
    checkpoint_seconds: float = 120.0
    probe_every: int = 2_000  # steps between evaluations on validation scenes
    probe_scenes: int = 120
    half: bool = True  # mixed precision: bfloat16 passes, float32 weights


def read_recipe(path: Path) -> Recipe:
    """Read the recipe.json of a run."""
    values = json.loads(path.read_text())
    values["model"] = ModelRecipe(**values["model"])
    canvases = (Canvas(**c | {"num_objects": c["num_objects"] and tuple(c["num_objects"])}) for c in values["canvases"])
    stages = [s | {name: tuple(s[name]) for name in ("mix", "styles")} for s in values["stages"]]
    stages = [Stage(**s | {"kinds": tuple(map(tuple, s["kinds"]))}) for s in stages]
    values |= {"canvases": tuple(canvases), "stages": tuple(stages)}
    schedules = {name: tuple(map(tuple, values[name])) for name in ("rates", "few_look_costs")}
    return Recipe(**values | schedules)
