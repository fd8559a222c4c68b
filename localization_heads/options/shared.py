"""The options that several programs share."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.groups import (
    NEWCOMER,
    ConvMode,
    CriteriaOptions,
    Device,
    GroundingOptions,
    ModelSpec,
    QueryToken,
    SegmenterOptions,
    ViewChoice,
)
from localization_heads.options.kinds import (
    FolderPath,
    HeadChoice,
    Options,
    Paraphrases,
    PathText,
    Text,
    option,
    options,
)
from localization_heads.options.surroundings import check_span

Count = Annotated[int, Field(ge=0)]


@options
class ModelUse(Options):
    """How a model is run and asked, and which of its heads ground an expression; what every program but one takes."""

    model: ModelSpec = option(
        ModelSpec(),
        "Which model: tiny (embedded, offline), llava, llava-13b, qwen3-vl, internvl, ... (docs/models.md "
        "lists all). model.name= takes any Hugging Face id or local folder; stage=doctor shows whether a new "
        "one is read correctly.",
        section="model",
        choice="tiny",
    )
    device: Device = option("auto", "Device of the model: auto, cpu, cuda, cuda:1, mps, or a GPU's number.")
    num_threads: Annotated[int, Field(ge=1)] | None = option(
        None,
        "CPU threads; null takes one for a model as small as the embedded one, and torch's choice for the others.",
    )
    conv_mode: ConvMode | None = option(
        None,
        "The prompt: referseg (the paper's), chat (the model's own template) or plain; null is model.conv_mode.",
    )
    query_token: QueryToken = option(
        "last",
        "Query token whose attention is read: last (the prompt's last token, the paper's), expression_end (the "
        "expression's last token), expression_mean (the mean over its tokens), answer_first (the first token of the "
        "model's answer; slower), answer_mean (the mean over its tokens), answer_span (over those of answer_span=) or "
        "last_and_answer (last and answer_mean, of which the read-out takes the geometric mean).",
    )
    answer_tokens: int = option(
        8,
        "For query_token=answer_mean, answer_span and last_and_answer: tokens of the answer that are read, at most; "
        "the one that ends it does not count.",
        ge=1,
        le=256,
    )
    answer_span: Text | None = option(
        None,
        "For query_token=answer_span: a text of the answer, in which {} stands for the expression, or box: the numbers "
        "of the box that the model is then asked to write.",
    )
    paraphrases: Paraphrases | None = option(
        None,
        'Ask in several wordings and take the mean of their maps: templates such as ["the {}","a {}"], at most '
        "eight; an article of the expression itself is not doubled. null asks with the expression alone (paper).",
    )
    signals: bool = option(
        False,
        "Also ask how sure the model is: the log-odds of yes against no to whether such a thing is there, the "
        "log-probabilities of the expression and of the answer's first token, and the maps of what the model lists. A "
        "calibration that needs them has them asked.",
    )
    view: ViewChoice = option(
        "combined",
        "For models that see an image as a whole and again as tiles: combined (both in one map), whole or tiles.",
    )
    drop_lone_spaces: bool = option(
        False,
        "Delete SentencePiece's lone spaces (after the image, before digits and emoji) from the prompt's "
        "tokens, as the published code does; LLaVA itself, and nearly everybody, keeps them.",
    )
    heads: HeadChoice = option(
        "auto",
        "Heads to ground with: auto (the model's known heads, where they were found with this prompt and query token, "
        "else its latest heads.json), greedy (each sample picks its own), a heads.json (or another tool's scores), a "
        "hub repository user/repo, a ready list such as vrh-qwen3-vl, or a list like [14-24,14-13,14-26]. A batch "
        "grounds with the heads that it has just found, unless others are named.",
        section="heads",
    )
    k: int = option(3, "Number of heads that are summed into one map (the paper's k).", ge=1, le=10_000)
    criteria: CriteriaOptions = option(
        CriteriaOptions(),
        "How heads are found: paper, robust (its two criteria and a third: heads that rest whatever is asked come "
        "last; no worse where it was measured, but that is one small model, so not the default), published or "
        "published_august (the code of June and August 2025).",
        section="method",
        choice="paper",
    )
    grounding: GroundingOptions = option(
        GroundingOptions(),
        "How maps become a box: sharp (what measured best at the cost of one prefill), paper, or published (the box of "
        "August 2025, around all cells above the mean). Experiments and criteria=published* take paper unless told "
        "otherwise.",
        choice=NEWCOMER,
    )
    segmenter: SegmenterOptions = option(
        SegmenterOptions(),
        "What makes the mask: grabcut (offline), none (the map's own pseudo-mask), sam, sam2, sam3, or author_hint.",
        choice="grabcut",
    )
    calibration: PathText = option(
        "auto",
        "What makes the confidence the probability that the box is right: auto (calibration.json of the model's "
        "folder, if it was fitted with these heads and this recipe), none (the raw signal: agreement of the heads), "
        "or the path of one; stage=calibrate writes it.",
    )
    abstain: Annotated[float, Field(ge=0, le=1)] | None = option(
        None,
        "Answer that nothing is there where the probability of presence (without absent entries in the calibration, "
        "the confidence) is below this; null always gives a box.",
        stages=("ground", "batch", "evaluate", "pipeline"),
    )
    output_dir: FolderPath = option(
        "outputs/localization_heads",
        "Everything is written below this folder, in one folder per model.",
        section="run",
    )
    random_seed: int = option(42, "Seed of every random choice.", ge=0, le=2**32 - 1)
    debug: bool = option(False, "Show the whole traceback of an error.")

    @model_validator(mode="after")
    def _box_of_a_mask(self) -> Self:
        if self.grounding.box_from == "mask" and self.segmenter.kind == "none":
            raise UsageError("grounding.box_from=mask needs a segmenter, such as segmenter=grabcut")
        check_span(self.query_token, self.answer_span)
        return self


@options
class EntryChoice(Options):
    """Which entries of a data file are used."""

    process_all: bool = option(
        True,
        "Use every entry of data_file. A start_index or end_index applies whatever this says.",
        section="entries",
    )
    start_index: int = option(0, "First entry used, counted from 0.", ge=0)
    end_index: int = option(-1, "Entry before which to stop; -1 goes to the end.", ge=-1)

    @model_validator(mode="after")
    def _range(self) -> Self:
        if 0 <= self.end_index <= self.start_index:
            raise UsageError(
                f"start_index={self.start_index} end_index={self.end_index}: the range is empty; end_index is the "
                "entry before which to stop"
            )
        return self


@options
class ImageAddresses(Options):
    """Of the programs that fetch images."""

    allow_private_addresses: bool = option(
        False,
        "Fetch images also from addresses of this machine and of private networks (a server of your own).",
    )
