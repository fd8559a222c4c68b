"""Options that several programs share, as base classes."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.declaration import (
    FolderPath,
    HeadChoice,
    Options,
    Paraphrases,
    PathText,
    Text,
    option,
    options,
)
from localization_heads.options.groups import (
    DEFAULT_GROUNDING,
    ConvMode,
    CriteriaOptions,
    Device,
    GroundingOptions,
    ModelSpec,
    QueryToken,
    SegmenterOptions,
    ViewChoice,
)
from localization_heads.options.stage_groups import check_answer_span

Count = Annotated[int, Field(ge=0)]


@options
class ModelUse(Options):
    """How a model is run and prompted, and which of its heads ground an expression: all programs but the viewer."""

    model: ModelSpec = option(
        ModelSpec(),
        "Model: tiny (embedded, offline), llava, llava-13b, qwen3-vl, internvl, ... (all in docs/models.md). "
        "model.name= takes any Hugging Face id or local folder; check an unlisted model with stage=doctor.",
        section="model",
        choice="tiny",
    )
    device: Device = option("auto", "Device of the model: auto, cpu, cuda, cuda:1, mps, or a GPU's number.")
    num_threads: Annotated[int, Field(ge=1)] | None = option(
        None,
        "CPU threads; null uses one for models as small as the embedded one, and torch's default for others.",
    )
    conv_mode: ConvMode | None = option(
        None,
        "Prompt template: referseg (the paper's), chat (the model's chat template) or plain; null uses "
        "model.conv_mode.",
    )
    query_token: QueryToken = option(
        "last",
        "Query token whose attention is read: last (of the prompt, paper), expression_end (the expression's last "
        "token), expression_mean (mean over the expression's tokens), answer_first (the answer's first token; "
        "slower), answer_mean (mean over the answer's tokens), answer_span (mean over those of answer_span=) or "
        "last_and_answer (geometric mean of last and answer_mean).",
    )
    answer_tokens: int = option(
        8,
        "For query_token=answer_mean, answer_span and last_and_answer: maximum number of answer tokens, not "
        "counting the end-of-sequence token.",
        ge=1,
        le=256,
    )
    answer_span: Text | None = option(
        None,
        "For query_token=answer_span: a part of the answer, with {} for the expression; or box, for the numbers of "
        "the box that the model is then asked to write.",
    )
    paraphrases: Paraphrases | None = option(
        None,
        'Average the maps of several wordings: up to eight templates such as ["the {}","a {}"]. An article that '
        "the expression already has is not repeated. null uses the expression alone (paper).",
    )
    signals: bool = option(
        False,
        "Also ask the model how sure it is: log-odds of yes against no to whether the object is there, "
        "log-probabilities of the expression and of the answer's first token, and maps of the objects that the "
        "model lists. Switched on by a calibration that needs it.",
    )
    view: ViewChoice = option(
        "combined",
        "For models that see both a downscaled image and tiles of it: combine both in one map (combined), or use "
        "only the whole image or only the tiles.",
    )
    drop_lone_spaces: bool = option(
        False,
        "Delete stand-alone SentencePiece spaces (after the image, before digits and emoji) from the prompt's "
        "tokens, as the published code does. LLaVA itself keeps them.",
    )
    heads: HeadChoice = option(
        "auto",
        "Heads to ground with: auto (the model's known heads if they were found with this prompt and query token, "
        "else its latest heads.json), greedy (selected per sample), a heads.json or another tool's scores, a hub "
        "repository user/repo, a ready-made list such as vrh-qwen3-vl, or a list such as [14-24,14-13,14-26]. "
        "Unless set, a batch uses the heads that it has just found.",
        section="heads",
    )
    k: int = option(3, "Number of heads whose maps are combined (the paper's k).", ge=1, le=10_000)
    criteria: CriteriaOptions = option(
        CriteriaOptions(),
        "Criteria for localization heads: paper; robust (adds a third criterion, which ranks heads last whose maps "
        "hardly depend on the expression; no worse in our measurements, but on one small model only, hence not "
        "the default); published or published_august (the code of June and August 2025).",
        section="method",
        choice="paper",
    )
    grounding: GroundingOptions = option(
        GroundingOptions(),
        "Read-out from maps to a box: sharp (the best measured with a single prefill), paper, or published (August "
        "2025: the box of all cells above the mean). Experiments and criteria=published* default to paper.",
        choice=DEFAULT_GROUNDING,
    )
    segmenter: SegmenterOptions = option(
        SegmenterOptions(),
        "Segmenter: grabcut (offline), none (the map's pseudo-mask), sam, sam2, sam3, or author_hint.",
        choice="grabcut",
    )
    calibration: PathText = option(
        "auto",
        "Calibration that turns confidences into probabilities: auto (calibration.json in the model's folder, if "
        "it was fitted with these heads and settings), none (the raw signal, agreement of the heads), or a path. "
        "stage=calibrate writes one.",
    )
    abstain: Annotated[float, Field(ge=0, le=1)] | None = option(
        None,
        "Answer that the object is absent if its probability of presence is below this (the confidence, if the "
        "calibration was fitted without absent entries); null always gives a box.",
        stages=("ground", "batch", "evaluate", "pipeline"),
    )
    output_dir: FolderPath = option(
        "outputs/localization_heads",
        "Output folder, with one subfolder per model.",
        section="run",
    )
    random_seed: int = option(42, "Seed of all random choices.", ge=0, le=2**32 - 1)
    debug: bool = option(False, "Show full tracebacks.")

    @model_validator(mode="after")
    def _check_mask_and_span(self) -> Self:
        if self.grounding.box_from == "mask" and self.segmenter.kind == "none":
            raise UsageError("grounding.box_from=mask needs a segmenter, such as segmenter=grabcut")
        check_answer_span(self.query_token, self.answer_span)
        return self


@options
class EntryChoice(Options):
    """Selection of a data file's entries."""

    process_all: bool = option(
        True,
        "Use every entry of data_file. start_index and end_index apply in any case.",
        section="entries",
    )
    start_index: int = option(0, "First entry to use, counted from 0.", ge=0)
    end_index: int = option(-1, "Entry to stop before; -1 goes to the end.", ge=-1)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if 0 <= self.end_index <= self.start_index:
            raise UsageError(
                f"start_index={self.start_index} end_index={self.end_index}: the range is empty; end_index is the "
                "entry before which to stop"
            )
        return self


@options
class ImageAddresses(Options):
    """Image addresses on the network."""

    allow_private_addresses: bool = option(
        False,
        "Also fetch images from this machine and from private networks.",
    )
