"""The options of the method, one class per group: `criteria.tau` is `CriteriaOptions.tau`.

Defaults are the paper's. Presets, which change a few of them under a name, are the files of `config/<group>/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from localization_heads.heads.head import Head
from localization_heads.options.declaration import (
    FolderName,
    Fraction,
    FromList,
    OddInt,
    OptionError,
    Options,
    PathText,
    ReadAs,
    Requirement,
    Sentence,
    Word,
    option,
    options,
)
from localization_heads.store.paths import expand_home, model_folder

Sensitivity = Literal["none", "siblings"]
KIND_WORDS = ("animal", "thing", "vehicle")


@options
class SensitivityOptions(Options):
    """The third criterion: the map of a localization head changes with the expression."""

    sensitivity: Sensitivity = option(
        "none",
        "Third criterion: none (paper), or siblings (criteria=robust): rank the heads that pass criterion 1 by how "
        "much their maps change for other expressions of the same image. With heads=greedy each sample uses its "
        "own siblings only, without the mirrored image.",
        kw_only=True,
    )
    siblings: Annotated[
        tuple[Word, ...],
        FromList,
        Field(min_length=1, max_length=8),
        Requirement("write one to eight words such as [animal,thing,vehicle]"),
    ] = option(
        KIND_WORDS,
        "For criteria.sensitivity: words that serve as further expressions of an image. Each sample is compared "
        "with up to two other expressions of its image in the data, and with these words, up to three in all; "
        "words that the expression contains are skipped.",
        kw_only=True,
    )
    mirrored: int = option(
        10,
        "For criteria.sensitivity: number of images that are also mirrored, with left and right swapped in the "
        "expression. A head whose map does not mirror with the image is not localizing. 0 mirrors none.",
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
Device = Annotated[str | int, Requirement("write auto, cpu, cuda, cuda:1, mps or a GPU's number")]
"""Validated against the machine by `lvlm.checkpoints.loading.pick_device`."""


def _parse_heads(value: Any) -> Any:
    """Parse `[14-24, 14-13]` to heads."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(head if isinstance(head, Head) else Head.parse(str(head)) for head in value)


@options
class CriteriaOptions(SensitivityOptions):
    """The criteria for localization heads (Sec. 4, App. A and B)."""

    entropy: Weight = option(
        "area",
        "Weight of a connected component in the spatial entropy: its area (paper) or its attention mass (published "
        "code).",
    )
    threshold: Threshold = option(
        "mean",
        "A cell is positive if its attention A exceeds the mean of the map (mean, paper), or if relu(A - mean) "
        "exceeds this number (published code: 0.001).",
        measured=True,
    )
    elbow: ElbowRule = option(
        "value",
        "Heads that pass criterion 1: those whose attention sum is at least the elbow's (value, paper), or whose "
        "flat index is at least that of the head at the elbow (index, published code of June 2025).",
    )
    exclude_layers: int = option(2, "Number of first layers that are excluded everywhere.", ge=0)
    bottom_row_filter: bool = option(
        False,
        "Never select a head in a sample where its bottom row is in focus (published code of August 2025).",
    )
    tau: Annotated[float, Field(ge=0)] | None = option(
        None, "Fixed threshold of criterion 1; null computes the elbow, 0 disables the criterion."
    )
    means: float = option(
        1.0,
        "Multiple of the mean that is subtracted from a map before thresholding (paper: 1; published code of "
        "August 2025: 2).",
        ge=1,
        measured=True,
    )
    bottom_row_above: Annotated[float, Field(ge=0)] | None = option(
        None,
        "A map's bottom row is in focus if all of its cells are positive (null), or if any holds more attention "
        "than this number (published code of August 2025: 0.05).",
        measured=True,
    )
    elbow_heads: ElbowHeads = option(
        "considered",
        "Heads that the elbow is computed from: those of the layers not excluded (considered, paper) or all heads "
        "(all, published code).",
    )
    per_sample: bool = option(
        False,
        "When ranking over a data set, compute the elbow for each sample (true, published code) or once for the "
        "mean attention sums (false, paper).",
    )
    ties: Ties = option(
        "sum",
        "Order of heads with the same entropy: by descending attention sum (sum), or as in the model (order, "
        "published code).",
    )
    fallback: Fallback = option(
        "none",
        "With heads=greedy, what a sample uses if too few heads pass criterion 1: nothing (none); further heads in "
        "the order of the model (order, published code of June 2025); or, if none passes, the head of the highest "
        "attention sum (sum, August 2025).",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.tau is not None and self.elbow == "index":
            raise OptionError("tau", f"{self.tau:g}: it is a value, and cannot be combined with elbow=index")
        return self


DEFAULT_GROUNDING = "sharp"
"""The default preset of `grounding=` on the command line, in the demo and in Python.

Of the presets that need a single prefill it measured best on every data set (docs/readouts.md). Runs that are compared
with the paper (`experiment=`, `criteria=published*`) default to `paper` instead (`options.compose.implied_overrides`).
"""


@options
class GroundingOptions(Options):
    """The read-out from maps to a box (Sec. 5, App. B.2)."""

    kernel_size: OddInt = option(
        7, "Kernel size, in cells, of the Gaussian that smooths each map; 1 disables smoothing."
    )
    sigma: float = option(1.0, "Standard deviation of the Gaussian in cells; 0 disables smoothing.", ge=0)
    upsample: int = option(
        1,
        "Upsample each map by this factor along both axes before smoothing, for boxes finer than a cell (paper: "
        "1). Kernel size and sigma are then in the finer cells.",
        ge=1,
        le=16,
    )
    component: Component = option(
        "largest_hull",
        "Connected component of positive cells that becomes the box: the one with the largest convex hull (paper), "
        "the most attention (largest_mass) or the strongest cell (containing_peak), or all of them (all, "
        "published code).",
    )
    interpolation: Interpolation = option(
        "nearest",
        "Interpolation of the upsampled map: nearest or bilinear.",
    )
    binarise: Binarise = option(
        "mean",
        "A cell is positive if it exceeds a multiple of the mean (mean, paper) or Otsu's threshold (otsu), or if "
        "it is among the fewest cells that together hold a share of the attention (top_mass).",
    )
    top_mass: Fraction = option(0.7, "For binarise=top_mass: that share of the attention.")
    box_from: BoxFrom = option(
        "map",
        "Where the box comes from: the map (paper); the tight box of the segmenter's mask (mask); or refined: that "
        "of a mask prompted with the map's box widened by two cells, if it agrees with the map's box.",
    )
    ignore_padding: bool = option(
        False,
        "Treat the padded square as if it were the image: deliberately wrong, as in the published code.",
    )
    means: float = option(
        1.0, "For binarise=mean: the threshold as a multiple of the mean (paper and published code: 1).", ge=1
    )
    margin: float = option(0.0, "For binarise=mean: a constant that is added to the threshold (paper: 0).", ge=0)
    border: Border = option(
        "mirror",
        "Border mode of the smoothing: mirror reflects without repeating the edge cell (c b | a b c, as OpenCV), "
        "repeat reflects with it (b a | a b c, as scipy and thus the published code).",
    )
    edges: Edges = option(
        "cells",
        "Edges of the box: at the borders of its cells (paper), or where the map, interpolated linearly between "
        "cell centres, crosses the threshold (interpolated).",
    )
    mean_of: MeanOf = option(
        "grid",
        "For binarise=mean: the mean over all cells (grid, paper) or over those that show the image and not "
        "padding (image).",
    )
    peak_limit: Annotated[float, Field(ge=1)] | None = option(
        None,
        "Clip each cell of the sum at this multiple of the seventh highest value in its 5 x 5 neighbourhood, so "
        "that an attention sink cannot capture the box; null does not clip (paper).",
    )
    large: Fraction | None = option(
        None,
        "For binarise=mean: lower the threshold to this share of the attention-weighted mean if that is lower, so "
        "that a large object is not split; null never lowers it (paper).",
    )
    combine: Combine = option(
        "sum",
        "How the heads' maps are combined: added (sum, paper), or weighted by the fourth power of their mean "
        "overlap with the others (consensus), which makes more than three heads worthwhile.",
    )
    contrast: Contrast = option(
        "none",
        "What is subtracted from the combined map: nothing (paper), the map of an expression that names nothing "
        "(background), or the mean map of the image's other expressions (siblings).",
    )
    contrast_weight: float = option(
        0.5,
        "For contrast: weight of what is subtracted, with both maps normalised to a sum of 1.",
        ge=0,
        le=10,
    )
    point_sigma: Annotated[float, Field(ge=0)] | None = option(
        None,
        "Standard deviation, in cells, of the smoothing of the map whose strongest cell is the point; null uses "
        "the map of the box (paper).",
    )
    trim: bool = option(
        False,
        "Of the selected component, keep only cells that also exceed the threshold before smoothing.",
    )


@options
class SegmenterOptions(Options):
    """The segmenter, which makes the mask."""

    kind: SegmenterKind = option(
        "grabcut", "none (the map's pseudo-mask), grabcut (offline, no weights), or a family of SAMs."
    )
    name: Annotated[str, AfterValidator(expand_home), ReadAs("path")] = option(
        "", "Hugging Face id or local folder of a SAM checkpoint of that family.", kinds=SAMS
    )
    prompt: Annotated[tuple[SegmenterPrompt, ...], FromList, Field(min_length=1)] = option(
        ("box",),
        "Prompts of a SAM, one or more of box, points (from inside the map's component) and map (as a mask prompt).",
        kinds=SAMS,
    )
    num_points: int = option(3, "Maximum number of points.", kinds=SAMS, ge=1, le=100)
    points: Points = option(
        "positive",
        "For prompt=[points]: foreground points only (positive), or as many background points too, where the map "
        "is lowest inside the box (signed).",
        kinds=SAMS,
    )
    multimask: bool = option(False, "Predict three masks and keep the one with the SAM's highest score.", kinds=SAMS)
    device: Device | None = option(None, "Device of a SAM; null uses that of the model.", kinds=SAMS)
    iterations: int = option(5, "Number of GrabCut iterations.", kinds=("grabcut",), ge=1, le=100)


@options
class ModelSpec(Options):
    """A checkpoint, and what has to be known about it."""

    name: PathText = option(
        "embedded", "Hugging Face id, local folder, or `embedded` for the model inside the package."
    )
    label: FolderName | None = option(
        None,
        "Name of this model's folder below output_dir; null derives it from the model's name.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the weights: auto (as saved), float32, bfloat16 or float16."
    )
    device_map: Word | None = option(
        None, "Split a large model across devices: null (all on `device`), auto, balanced or sequential."
    )
    quantization: Literal["4bit", "8bit"] | None = option(
        None,
        "Quantise the weights at load time: null, 8bit or 4bit (needs the extra `quantization` and a GPU).",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = option(
        None,
        "Attention kernel: sdpa, eager or flash_attention_2; null uses what the family requires, else "
        "transformers' default (usually sdpa).",
    )
    pad_to_square: bool | None = option(
        None,
        "Pad images to a square instead of cropping them; null uses what the family requires (true for LLaVA-1.5 "
        "and its relatives), else the processor's setting.",
    )
    fix_mistral_regex: bool = option(
        False, "Load the tokenizer with transformers' fix for Mistral's pre-tokenization regex."
    )
    conv_mode: ConvMode | None = option(
        None,
        "Prompt template of this model while conv_mode=null; null uses that of the family, or referseg for an "
        "unknown one.",
    )
    system: Sentence | None = option(
        None, "System prompt of the referseg template; null uses the checkpoint's own, or else LLaVA's."
    )
    heads: Annotated[
        tuple[Head, ...],
        BeforeValidator(_parse_heads),
        Requirement("write a list such as [14-24,14-13,14-26]"),
    ] = option((), "Published localization heads (LAYER-HEAD, counted from 0), best first, for heads=auto.")
    lists: Annotated[tuple[Word, ...], FromList] = option(
        (),
        "Ready-made head lists for this model, best first (docs/find-heads.md); heads=auto uses the first that fits.",
    )
    top_n: int = option(
        10,
        "Heads selected per sample (N) while top_n=null. The paper uses 10 for every model.",
        ge=1,
        le=10_000,
    )
    native_box: NativeBox | None = option(
        None,
        "Format in which the model itself writes boxes, for stage=evaluate; null uses that of its family, if any.",
    )

    @property
    def folder(self) -> str:
        """The model's folder below `output_dir`."""
        return self.label or model_folder(self.name)
