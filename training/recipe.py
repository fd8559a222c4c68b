"""Every number of the training run in one place."""

import json
from dataclasses import dataclass, field
from pathlib import Path

SPRITES = Path(__file__).parent / "sprites"  # the styles that are there to learn from only, a file each
TRAINING_STYLES = ("noto_v1", "emojione", "fxemoji")
MORE_STYLES = (
    *TRAINING_STYLES,
    "emojione_v1",
    "fluent_3d",
    "streamline",
    "streamline",
)  # the last is the only one with outlines
LINE_STYLES = (*MORE_STYLES, "lines_a", "lines_b", "contrast", "solid", "glyphs")  # of icons, filled in


@dataclass(frozen=True)
class ModelRecipe:
    """Shape of the LLaVA: CLIP tower, projector, Llama."""

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
    """One kind of image: cells a side, how many objects (None: as in full scenes), images a step and worker.

    `text_tokens` is the room for conversations about each; with 0 the vision tower learns from captions alone.
    `scene_cells` is how many cells the side of a full scene would take (None: the model's grid). With fewer, scenes
    are drawn smaller, and the cells are spread over the grid, so that places and extents stay those of full images.
    """

    cells: int
    num_objects: tuple[int, ...] | None
    images: int
    text_tokens: int = 112
    scene_cells: int | None = None


@dataclass(frozen=True)
class Stage:
    """What a run shows from step `start` on: shares of (text only, each of the canvases), and what the images are.

    `kinds` weighs the kinds of expression that conversations draw from (1 for those not named; none: all alike);
    see `language.scene_turns`.
    """

    start: int
    mix: tuple[float, ...]
    kinds: tuple[tuple[str, float], ...] = ()
    augment_share: float = 0.6  # of the images drawn with varied outlines and contrast
    training_styles_share: float = 0.35  # of the images in the styles that are there to learn from only,
    styles: tuple[str, ...] = TRAINING_STYLES  # one of these
    repeats: float = 0.4  # share of the scenes in which a name comes more than once
    presence: float = 0.0  # share of the turns that ask whether an expression refers to something


@dataclass(frozen=True)
class Recipe:
    """One training run.

    The stages: language alone, as large models have it; the vision tower from captions, as CLIP has it; images of
    few objects; full scenes, drawn in 16 x 16 cells first, then in all of them; more of these, at rates that rise
    once more, with more places, colours and relations to tell apart, and a cost that few heads escape; once more, with
    more styles, and more things of one name to tell apart by where they are; and once more, in larger batches, with
    questions whether an expression refers to something.
    """

    steps: int = 53_373
    seed: int = 0
    workers: int = 1  # data-parallel processes of one thread each; on a GPU as many parts of a batch
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
        Stage(  # 16 workers' parts of a batch, on a GPU
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
    text_rows: int = 6  # rows of a batch without images,
    text_tokens: int = 112  # of so many tokens
    expression_weight: float = 0.15  # of the loss on prompt tokens; answers weigh 1
    caption_weight: float = 0.3  # of the loss of naming what patches show; see `FastForward.caption_loss`
    caption_beside: float = 0.5  # the same, beside conversations
    caption_keep: float = 0.2  # share of the patches that loss sees, so that every part of a thing is named
    answer_places: bool = False  # ablation: name the place first in every answer
    image_keep: float = 1.0  # share of the image tokens that the language model sees
    image_dropout: float = 0.3  # of attention from text to image tokens
    bars_share: float = 0.15  # of the images with bars, as of an image that was not square
    look_cost: float = 0.4  # of attention to the image, so that heads with nothing to see rest on the text
    look_from: int = 6_200  # the step from which that cost grows, once there is something to look for,
    look_steps: int = 1_500  # in so many steps
    # (step, weight), joined by lines. From the first of these steps on each head pays the root of what it looks, not
    # the amount itself: a little looking in many heads costs more than much in few.
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
    query_key_cap: float = 0.09  # largest root mean square of a query or key weight
    matrix_rate: float = 0.01  # Muon
    vector_rate: float = 1e-3  # AdamW, for embeddings, norms, biases
    weight_decay: float = 0.02
    # (step, share of the full rates), joined by lines; the last line goes to `last_rate` at the last step.
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
    probe_every: int = 2_000  # steps between looks at the validation scenes,
    probe_scenes: int = 120  # at so many of them
    half: bool = True  # bfloat16 forward and backward, float32 weights


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote beside its checkpoint."""
    values = json.loads(path.read_text())
    values["model"] = ModelRecipe(**values["model"])
    canvases = (
        Canvas(**c | {"num_objects": c["num_objects"] and tuple(c["num_objects"])})
        for c in values["canvases"]
    )
    stages = [s | {name: tuple(s[name]) for name in ("mix", "styles")} for s in values["stages"]]
    stages = [Stage(**s | {"kinds": tuple(map(tuple, s["kinds"]))}) for s in stages]
    values |= {"canvases": tuple(canvases), "stages": tuple(stages)}
    lines = {name: tuple(map(tuple, values[name])) for name in ("rates", "few_look_costs")}
    return Recipe(**values | lines)
