"""The options of the method, a class a group: `criteria.tau` is `CriteriaOptions.tau`.

Defaults are the paper's. Presets, which change a few of them under a name, are the files of `config/<group>/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from localization_heads.heads.head import Head
from localization_heads.options.kinds import (
    FolderName,
    Odd,
    OptionError,
    Options,
    PathText,
    Reads,
    Sentence,
    Several,
    Share,
    Wants,
    Word,
    option,
    options,
)
from localization_heads.store.paths import expand_home, model_folder

Sensitivity = Literal["none", "siblings"]
KIND_WORDS = ("animal", "thing", "vehicle")


@options
class SensitivityOptions(Options):
    """The third criterion: a head that localizes moves when the expression changes."""

    sensitivity: Sensitivity = option(
        "none",
        "Third criterion: nothing (paper), or rank the heads that criterion 1 keeps by how far their maps move when "
        "other expressions of the same image are asked (siblings, criteria=robust). A sample that picks its own heads "
        "goes by its other expressions alone, without the mirrored image.",
        kw_only=True,
    )
    siblings: Annotated[
        tuple[Word, ...],
        Several,
        Field(min_length=1, max_length=8),
        Wants("write one to eight words such as [animal,thing,vehicle]"),
    ] = option(
        KIND_WORDS,
        "For criteria.sensitivity: words that are asked beside the other expressions which the data have of an image; "
        "two of those, filled up to three with words that the expression does not contain.",
        kw_only=True,
    )
    mirrored: int = option(
        10,
        "For criteria.sensitivity: of so many images the mirrored image is asked as well, with left and right swapped "
        "in the expression: a head whose map does not follow wanders and does not localize. 0 asks none.",
        ge=0,
        le=1_000_000,
        kw_only=True,
    )


ConvMode = Literal["referseg", "chat", "plain"]
QueryToken = Literal[
    "last",
    "expression_end",
    "expression_mean",
    "answer_first",
    "answer_mean",
    "answer_span",
    "last_and_answer",
]
ViewChoice = Literal["combined", "whole", "tiles"]
NativeBox = Literal["llava", "qwen2", "qwen2_5", "qwen3", "internvl", "glm", "florence2", "paligemma"]
Weight = Literal["area", "mass"]
ElbowRule = Literal["value", "index"]
ElbowHeads = Literal["considered", "all"]
Ties = Literal["sum", "order"]
Fallback = Literal["none", "order", "sum"]
Threshold = Annotated[float, Field(ge=0)] | Literal["mean"]
Component = Literal["largest_hull", "largest_mass", "containing_peak", "all"]
Edges = Literal["cells", "interpolated"]
Combine = Literal["sum", "consensus"]
Contrast = Literal["none", "background", "siblings"]
MeanOf = Literal["grid", "image"]
Binarise = Literal["mean", "otsu", "top_mass"]
Interpolation = Literal["nearest", "bilinear"]
Border = Literal["mirror", "repeat"]
BoxFrom = Literal["map", "mask", "refined"]
SegmenterKind = Literal["none", "grabcut", "sam", "sam2", "sam3"]
SAMS = ("sam", "sam2", "sam3")
SegmenterPrompt = Literal["box", "points", "map"]
Points = Literal["positive", "signed"]
Instances = Literal["one", "all"]
Device = Annotated[str | int, Wants("write auto, cpu, cuda, cuda:1, mps or a GPU's number")]
"""Checked against the machine by `lvlm.checkpoints.loading.pick_device`."""


def _heads(value: Any) -> Any:
    """`[14-24, 14-13]` as heads."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(head if isinstance(head, Head) else Head.parse(str(head)) for head in value)


@options
class CriteriaOptions(SensitivityOptions):
    """How localization heads are told from the others (Sec. 4, App. A and B)."""

    entropy: Weight = option(
        "area",
        "Weight of a component in the spatial entropy: its area (paper) or its attention mass (published code).",
    )
    threshold: Threshold = option(
        "mean",
        "A cell is positive if A exceeds the map's own mean (mean, paper), or if relu(A - mean) exceeds a number "
        "(published code: 0.001).",
        measured=True,
    )
    elbow: ElbowRule = option(
        "value",
        "Heads kept by criterion 1: those whose attention sum reaches the elbow's value (paper), or whose flat index "
        "reaches that of the head at the elbow (index, published code of June 2025).",
    )
    exclude_layers: int = option(2, "Number of first layers that are left out everywhere.", ge=0)
    bottom_row_filter: bool = option(
        False, "Never mark a head in a sample whose bottom row is in focus (published code of August 2025)."
    )
    tau: Annotated[float, Field(ge=0)] | None = option(
        None, "A fixed threshold for criterion 1; null takes the elbow, 0 switches the criterion off."
    )
    means: float = option(
        1.0,
        "Multiple of the mean that is subtracted from a map before it is thresholded (paper: 1; published code of "
        "August 2025: 2).",
        ge=1,
        measured=True,
    )
    bottom_row_above: Annotated[float, Field(ge=0)] | None = option(
        None,
        "Bottom-row focus: every cell of the row is positive (null), or any of them holds more attention than this "
        "number (published code of August 2025: 0.05).",
        measured=True,
    )
    elbow_heads: ElbowHeads = option(
        "considered",
        "Heads whose sums the elbow is computed from: those of the layers not left out (considered, paper) or "
        "all heads (all, published code).",
    )
    per_sample: bool = option(
        False,
        "In a ranking over a data set, each sample has its own elbow (true, published code), instead of that of the "
        "average sums (false, paper).",
    )
    ties: Ties = option(
        "sum",
        "Order of heads with the same entropy: higher attention sum first (sum), or as in the model (order, "
        "published code).",
    )
    fallback: Fallback = option(
        "none",
        "What a sample that picks its own heads takes where too few pass criterion 1: nothing (none); heads "
        "that fail, in the order of the model (order, June 2025); or, where none passes, the one of the "
        "highest sum (sum, August 2025).",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.tau is not None and self.elbow == "index":
            raise OptionError("tau", f"{self.tau:g}: it is a value, and cannot be combined with elbow=index")
        return self


NEWCOMER = "sharp"
"""The preset of `grounding=` that anybody gets who asks for a box without naming one, on the command line, in the demo
and in Python. Of the presets that cost one prefill it measured best on every set (docs/readouts.md). What is to be
compared with the paper (`experiment=`, `criteria=published*`) takes `paper` (`options.compose.implied`)."""


@options
class GroundingOptions(Options):
    """How maps become a box (Sec. 5, App. B.2)."""

    kernel_size: Odd = option(7, "Taps of the Gaussian that smooths each map; 1 switches smoothing off.")
    sigma: float = option(1.0, "Its standard deviation in cells; 0 switches smoothing off.", ge=0)
    upsample: int = option(
        1,
        "Split each cell into this many along both axes before smoothing, for boxes finer than a cell (paper: 1). "
        "Kernel and sigma then count the finer cells.",
        ge=1,
        le=16,
    )
    component: Component = option(
        "largest_hull",
        "Positive cells that make the box: those of the component with the largest convex hull (paper), with the most "
        "attention (largest_mass), with the strongest cell (containing_peak), or all (published code).",
    )
    interpolation: Interpolation = option(
        "nearest",
        "Value of the finer cells: that of the cell they are part of (nearest), or a linear transition from "
        "centre to centre (bilinear).",
    )
    binarise: Binarise = option(
        "mean",
        "A cell is positive above the mean (paper), above Otsu's threshold (otsu), or if it is among the "
        "fewest cells that hold a share of the attention (top_mass).",
    )
    top_mass: Share = option(0.7, "For binarise=top_mass: the share of the attention.")
    box_from: BoxFrom = option(
        "map",
        "Take the box from the map (paper); or from the segmenter's mask: its tight box (mask), or that of a mask "
        "started two cells wider, where it agrees with the map's box (refined).",
    )
    ignore_padding: bool = option(
        False,
        "Read the grid as if it covered the image and no padding: wrong on purpose, as in the published code.",
    )
    means: float = option(
        1.0, "For binarise=mean: the threshold as a multiple of the mean (paper and published code: 1).", ge=1
    )
    margin: float = option(
        0.0, "For binarise=mean: a constant that is added to the threshold (paper: 0).", ge=0
    )
    border: Border = option(
        "mirror",
        "How a map continues beyond its edge when it is smoothed: mirror does not repeat the edge cell (c b | a b c, "
        "as in OpenCV), repeat does (b a | a b c, as in scipy and so in the published code).",
    )
    edges: Edges = option(
        "cells",
        "Sides of the box: the borders of its cells (paper), or where the map, linear between the cells' centres, "
        "crosses the threshold (interpolated).",
    )
    mean_of: MeanOf = option(
        "grid",
        "For binarise=mean: the mean over all cells (grid, paper), or over those that show the image and no "
        "padding (image).",
    )
    peak_limit: Annotated[float, Field(ge=1)] | None = option(
        None,
        "Cap each cell of the sum at this multiple of the seventh highest value among its 5 x 5 neighbours, so that a "
        "sink of a few cells cannot take the box; null caps nothing (paper).",
    )
    large: Share | None = option(
        None,
        "For binarise=mean: lower the threshold to this share of the mean that each cell enters with its own "
        "attention as weight, where that is lower, so that a large object stays whole; null does not (paper).",
    )
    combine: Combine = option(
        "sum",
        "How the maps of the heads are added: as they are (sum, paper), or each weighted by how far it agrees with "
        "the others, to the fourth power (consensus), which makes more heads than three worth while.",
    )
    contrast: Contrast = option(
        "none",
        "What is subtracted from the sum: nothing (paper), the map of a query that names nothing (background), or the "
        "mean map of the image's other expressions (siblings).",
    )
    contrast_weight: float = option(
        0.5, "For contrast: how much of it is subtracted, both scaled to a sum of 1.", ge=0, le=10
    )
    point_sigma: Annotated[float, Field(ge=0)] | None = option(
        None,
        "Standard deviation in cells of the smoothing before the strongest cell is taken as the point; null takes the "
        "map of the box (paper).",
    )
    trim: bool = option(
        False,
        "Of the component, only the cells whose attention before smoothing exceeds the threshold make the box.",
    )


@options
class SegmenterOptions(Options):
    """What makes the mask."""

    kind: SegmenterKind = option(
        "grabcut", "none (the pseudo-mask of the map), grabcut (offline, no weights), or a family of SAMs."
    )
    name: Annotated[str, AfterValidator(expand_home), Reads("path")] = option(
        "", "Hugging Face id or local folder of a SAM of that family.", kinds=SAMS
    )
    prompt: Annotated[tuple[SegmenterPrompt, ...], Several, Field(min_length=1)] = option(
        ("box",),
        "What a SAM is prompted with, any of: box, points (interior points, from the map), map (as a mask).",
        kinds=SAMS,
    )
    num_points: int = option(3, "Number of points, at most.", kinds=SAMS, ge=1, le=100)
    points: Points = option(
        "positive",
        "For prompt=[points]: points on the object alone (positive), or as many on the background again, where the "
        "map is lowest inside the box (signed).",
        kinds=SAMS,
    )
    multimask: bool = option(
        False, "Predict three masks and take the one that the SAM scores highest.", kinds=SAMS
    )
    device: Device | None = option(None, "Device of a SAM; null takes that of the model.", kinds=SAMS)
    iterations: int = option(5, "GrabCut's iterations.", kinds=("grabcut",), ge=1, le=100)


@options
class ModelSpec(Options):
    """A checkpoint and the facts about it."""

    name: PathText = option(
        "embedded", "Hugging Face id, local folder, or `embedded` for the model inside the package."
    )
    label: FolderName | None = option(
        None,
        "Name of the folder below output_dir that holds this model's files; null derives one from the name.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the weights: auto (as saved), float32, bfloat16 or float16."
    )
    device_map: Word | None = option(
        None, "Spread a large model over devices: null (all on `device`), auto, balanced or sequential."
    )
    quantization: Literal["4bit", "8bit"] | None = option(
        None,
        "Quantise the weights while loading: null, 8bit or 4bit (needs the extra `quantization` and a GPU).",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = option(
        None,
        "Attention kernel: null (what the family needs, else transformers' choice, usually sdpa), sdpa, eager or "
        "flash_attention_2.",
    )
    pad_to_square: bool | None = option(
        None,
        "Pad images to a square instead of cropping them; null for what the family needs (LLaVA-1.5 and its "
        "like: true), else what the processor says.",
    )
    fix_mistral_regex: bool = option(
        False, "Load the tokenizer with transformers' own mend for Mistral's splitting of words."
    )
    conv_mode: ConvMode | None = option(
        None,
        "Prompt recommended for this model, used while conv_mode=null; null is what the family needs, and for "
        "an unknown one referseg.",
    )
    system: Sentence | None = option(
        None, "System sentence of the referseg template; null for the checkpoint's own, or else LLaVA's."
    )
    heads: Annotated[
        tuple[Head, ...], BeforeValidator(_heads), Wants("write a list such as [14-24,14-13,14-26]")
    ] = option(
        (), "Published localization heads (LAYER-HEAD, counted from 0), best first; used by heads=auto."
    )
    lists: Annotated[tuple[Word, ...], Several] = option(
        (), "Ready lists of its heads, best first (docs/find-heads.md); heads=auto takes the first that fits."
    )
    top_n: int = option(
        10,
        "Heads marked in each sample (N) while top_n=null. The paper takes 10 for every model.",
        ge=1,
        le=10_000,
    )
    native_box: NativeBox | None = option(
        None,
        "Format in which this model writes boxes itself, for stage=evaluate; null is that of its family, if it "
        "has one.",
    )

    @property
    def folder(self) -> str:
        """Name of this model's folder below `output_dir`."""
        return self.label or model_folder(self.name)
