"""The options of each program: the finder, the viewer, the conversation and the demo.

What several programs share stands in a class of its own. Groups (`model`, `criteria`, ...) are fields whose values are
chosen by name: `model=llava` takes `config/model/llava.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.ablation import AblateOptions
from localization_heads.options.benchmarks import BenchmarkOptions
from localization_heads.options.experiments import ExperimentOptions, RungOptions
from localization_heads.options.groups import (
    NEWCOMER,
    ConvMode,
    CriteriaOptions,
    Device,
    DoctorOptions,
    EngineOptions,
    GroundingOptions,
    ModelSpec,
    PhrasesOptions,
    QueryToken,
    ScenesOptions,
    SegmenterOptions,
    ViewChoice,
)
from localization_heads.options.instances import InstanceOptions
from localization_heads.options.kinds import (
    FolderPath,
    HeadChoice,
    Options,
    Paraphrases,
    PathText,
    Text,
    extra,
    option,
    options,
)
from localization_heads.options.labels import LabelOptions
from localization_heads.options.ranked_files import RankedFiles
from localization_heads.options.tracing import TraceOptions, check_span
from localization_heads.options.video import VideoOptions

Stage = Literal[
    "batch", "find", "rank", "pipeline", "ground", "evaluate", "collect", "analyze", "visualize", "scenes", "doctor",
    "experiment", "export", "prepare", "calibrate", "trace", "ablate",
]  # fmt: skip
SPREAD_STAGES = ("find", "batch", "ground", "evaluate", "experiment", "calibrate", "ablate")
"""Those that run the model over a data set."""
ONE_IMAGE = ("collect", "pipeline", "ground", "doctor", "trace")
"""Those that take one image and one query."""
BOXES = ("ground", "evaluate")
"""Those that make boxes while the model is there."""

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


@options
class FinderOptions(
    BenchmarkOptions,
    ModelUse,
    EntryChoice,
    ImageAddresses,
    InstanceOptions,
    VideoOptions,
    LabelOptions,
    RankedFiles,
):
    """localization_heads_finder.py (also installed as `locheads`)."""

    EXTRA_GROUPS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "data": (
            "examples",
            "Which entries: examples (shipped), or scenes (the synthetic benchmark). data_file= names your own.",
        ),
    }

    stage: Stage = option(
        "batch",
        "What to do: batch, find, rank, pipeline, ground, evaluate, collect, analyze, visualize, scenes, doctor, "
        "export, prepare, calibrate, trace, ablate or experiment. trace shows where heads look as each word of an "
        "answer is written. calibrate fits calibration.json on entries with truth. "
        "ablate switches heads off and measures what is lost. "
        "rank repeats the last step of find (or batch) without the model, from the statistics that it left or from "
        "attention_files: for another top_n or k, or other criteria, except those that need the maps again.",
    )
    image_file: PathText | None = option(
        None,
        "An image (path or http address); for collect, pipeline, ground, trace and doctor. ground also takes a folder "
        "or a pattern such as 'pics/*.jpg': every image in it.",
        section="input",
        stages=ONE_IMAGE,
    )
    query: Text | None = option(
        None, "What to look for in it: a referring expression or a question.", stages=ONE_IMAGE
    )
    attention_file: PathText | None = option(
        None,
        "A file written by collect or batch (.pkl, .safetensors, or the published code's own); for analyze and "
        "visualize.",
        stages=("analyze", "visualize"),
    )
    data_file: PathText | None = option(
        None,
        "Entries as JSON lines (id, prompt, image_path, optionally bbox and mask); for batch, find, ground, trace "
        "and evaluate. Overrides data=.",
    )
    save_id: Text | None = option(
        None,
        "Name of the files of stages with one image; null derives one from the image's name and the query.",
        section="output",
        stages=ONE_IMAGE,
    )
    zoom: bool = option(
        False,
        "Ask again about a crop around each box, and average both boxes where they agree: finer boxes of small objects "
        "for one more pass of the model; for ground, evaluate and calibrate.",
        stages=(*BOXES, "calibrate"),
    )
    attention_format: Literal["pkl", "safetensors"] = option("pkl", "Attention files as pkl or safetensors.")
    figure_format: Literal["png", "pdf", "svg"] = option(
        "png", "Figures as png, or as pdf or svg for a paper."
    )
    visualize_batch: bool = option(True, "Draw the maps and the box of the entries of a batch.")
    visualize_limit: Count | None = option(
        32, "At most this many entries are drawn in a batch; null draws all."
    )
    top_k: int = option(3, "Heads shown in a figure and listed on the screen.", ge=1, le=100)
    show_plot: bool = option(False, "Open the figures in a window as well (needs a display).")
    report: bool = option(
        True,
        "End batch, find and evaluate with a page for people, report.html: needs no network, may be sent to anyone.",
    )
    report_samples: int = option(
        200,
        "Samples in its gallery: half of them the first of the data set, half the worst of the others.",
        ge=0,
        le=1000,
    )
    scenes: ScenesOptions = option(
        ScenesOptions(), "The synthetic benchmark (stage=scenes, data=scenes).", section="synthetic scenes"
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = option(
        8,
        "Entries that go through the model together; those of one image share what is computed of it. auto takes 16, "
        "and fewer where they do not fit into memory (results then differ by rounding only). Large images make "
        "smaller batches: 24 megapixels at most.",
    )
    max_new_tokens: Count = option(
        0,
        "Tokens of the model's answer, at most, that collect and pipeline print (0: none) and trace shows (0: 64).",
    )
    top_n: Annotated[int, Field(ge=1, le=10_000)] | None = option(
        None,
        "Heads marked in each sample when the selection frequency is counted (N); null takes model.top_n, the "
        "paper's 10 unless the model has few heads.",
    )
    num_trials: int = option(5, "Random draws over which the selection frequency is averaged.", ge=1, le=1000)
    num_samples: int = option(1000, "Samples in each draw.", ge=1)
    controls: bool = option(
        True,
        "Score the controls beside the heads: random heads of the same layers, the mean of all heads, a centred box, "
        "and the oracle (the truth on the model's own grid). They need all layers; false stops after the "
        "deepest head.",
        section="evaluation",
    )
    native: bool | None = option(
        None,
        "Ask the model for a box of its own: true, false, or null for models known to write boxes "
        "(docs/evaluation.md).",
    )
    bootstrap: Literal["expression", "image"] = option(
        "expression",
        "What the bootstrap of the 95 % intervals draws: expression (as the field does), or image (with all its "
        "expressions).",
    )
    calibrate_from: PathText | None = option(
        None,
        "A calibration.json to start from: slope and intercept are fitted anew and the weights moved a little, for "
        "which 50 labels of a new domain do; null fits everything.",
        stages=("calibrate",),
    )
    worst: int = option(16, "Number of worst boxes drawn into failures/.", ge=0, le=200)
    phrases: PhrasesOptions = option(PhrasesOptions(), "Several objects in one query (stage=ground).")
    trace: TraceOptions = option(TraceOptions(), "Maps of the answer (stage=trace).")
    verdict: bool = option(
        False,
        "Write what doctor found, and the geometry as traced on this very model, as a small JSON file for an issue.",
        stages=("doctor",),
    )
    doctor: DoctorOptions = option(DoctorOptions(), "A new model: stage=doctor shows how it is read.")
    experiment: ExperimentOptions = option(
        ExperimentOptions(),
        "Experiments of the paper, for stage=experiment: fig3, fig6a, fig6b, random, tab1 to tab5, tab8, "
        "fig13, fig14, all of them, or the ladder (docs/reproducing-the-paper.md); causal: are the heads found "
        "those that the answers need (docs/causal.md)?",
        choice="none",
    )
    ablate: AblateOptions = option(AblateOptions(), "Heads switched off, or steered (stage=ablate).")
    rung: RungOptions = option(
        RungOptions(),
        "One rung of the ladder, as a preset for any stage: published, padding, hull, fixed, masks, mask_box "
        "or points.",
        choice="none",
    )
    engine: EngineOptions = option(
        EngineOptions(),
        "Where the model goes over a data set: local (this process), or ray (docs/spread.md).",
        choice="local",
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        for name, field in type(self).__pydantic_fields__.items():
            stages = extra(field).get("stages")
            if stages and getattr(self, name) != field.default and self.stage not in stages:
                raise UsageError(
                    f"{name}=: stage={self.stage} does not read it; write stage={' or '.join(stages)}"
                )
        self.check_labels()
        if self.zoom and self.instances == "all":
            raise UsageError("zoom=true looks again at one box; leave out zoom= or instances=all")
        if self.scenes.height is not None and self.scenes.height > self.scenes.size:
            raise UsageError(
                f"scenes.height={self.scenes.height}: the images have only scenes.size={self.scenes.size} rows"
            )
        if self.scenes.frames > 1 and (
            self.scenes.height or self.scenes.absent or self.scenes.targets == "all"
        ):
            raise UsageError("scenes.frames=: leave out scenes.height=, scenes.absent= and scenes.targets=")
        if self.engine.kind == "ray":
            self._spread()
        return self

    def require(self, *names: str) -> None:
        """Raises UsageError for the first of these options that is missing."""
        for name in names:
            if not getattr(self, name):
                raise UsageError(f"{name}= is missing: stage={self.stage} needs {' and '.join(names)}")

    def _spread(self) -> None:
        """Ray gives each worker its GPUs, so the device can only say whether to use any."""
        if self.stage not in SPREAD_STAGES:
            raise UsageError(f"engine=ray: stage={self.stage} has no data set to spread; leave out engine=")
        if self.image_file or self.query or self.video_file:
            raise UsageError("engine=ray: one image cannot be spread; leave out engine=")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise UsageError(f"device={self.device}: with engine=ray, choose one of auto, cpu, cuda, mps")


@options
class VisualizeOptions(EntryChoice):
    """visualize_attention.py"""

    mode: Literal["single", "batch"] = option(
        "single", "single (one attention_file) or batch (every entry of data_file)."
    )
    attention_file: PathText | None = option(
        None, "An attention file (.pkl, .safetensors, or the published code's own)."
    )
    allow_private_addresses: bool = option(
        False,
        "Fetch the image that a file names also from addresses of this machine and of private networks.",
    )
    layer: Count | None = option(None, "Layer to show, counted from 0; null shows the top heads of the file.")
    head: Count | None = option(None, "Head to show, counted from 0.")
    show_components: bool = option(False, "Also draw the connected components behind the spatial entropy.")
    top_k: int = option(3, "Number of top heads to show.", ge=1, le=100)
    k: int = option(
        3, "Number of heads whose sum makes the combined map and the box (the paper's k).", ge=1, le=10_000
    )
    data_file: PathText | None = option(
        "examples/visualization_data.jsonl",
        "batch: JSON lines with attention_file, layer and head, and an id, which names the figures. Without "
        "attention_file it is the one of the id below outputs/localization_heads; without layer and head the "
        "top heads are drawn.",
    )
    output_dir: PathText | None = option(
        None, "Folder for the figures; null puts each beside its attention file."
    )
    save_fig: bool = option(True, "Write the figures to disk.")
    show_plot: bool = option(False, "Open the figures in a window as well (needs a display).")
    debug: bool = option(False, "Show the whole traceback of an error.")
    criteria: CriteriaOptions = option(
        CriteriaOptions(),
        "How the heads of a file are ranked: paper, published or published_august.",
        choice="paper",
    )
    grounding: GroundingOptions = option(
        GroundingOptions(), "How maps become a box: sharp, paper or published.", choice=NEWCOMER
    )

    @model_validator(mode="after")
    def _no_segmenter(self) -> Self:
        if self.grounding.box_from == "mask":
            raise UsageError(
                "grounding.box_from=mask needs a segmenter, which stage=visualize of the finder has"
            )
        return self


@options
class ChatOptions(ModelUse, ImageAddresses):
    """cli_llava.py"""

    cli_mode: bool = option(
        False, "A conversation on the terminal; false answers one query and ends.", section="talk"
    )
    query: Text | None = option(None, "The question; needed unless cli_mode=true.")
    image_file: PathText | None = option(None, "The image it is about (path or http address).")
    max_new_tokens: int = option(128, "Longest answer, in tokens.", ge=1)
    conv_mode: ConvMode | None = option(
        "chat",
        "The prompt of the conversation: chat (the model's own template), referseg or plain. /ground asks with the "
        "paper's prompt, whatever this is.",
    )
    picture_memory: Count = option(
        1024,
        "Memory for the images that /ground was last asked about, in MiB; 0 reads an image anew each time.",
    )


@options
class DemoOptions(ModelUse):
    """python -m localization_heads.apps.demo"""

    host: Text = option(
        "127.0.0.1",
        "Who may open the page: 127.0.0.1 is this machine alone, 0.0.0.0 everybody who can reach it.",
        section="page",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = option(
        None, "The page's port; null takes the first free one from 7860."
    )
    open_browser: bool = option(True, "Open the page in a browser.")
