"""The options of each program: the finder, the viewer, the conversation, the demo. `shared` has what several take.

Groups (`model`, `criteria`, ...) are fields whose values are chosen by name: `model=llava` takes
`config/model/llava.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.experiments import ExperimentOptions, RungOptions
from localization_heads.options.groups import NEWCOMER, ConvMode, CriteriaOptions, GroundingOptions
from localization_heads.options.kinds import (
    ImageChoice,
    PathText,
    Text,
    extra,
    first_changed,
    option,
    options,
)
from localization_heads.options.parts import (
    TOGETHER_STAGES,
    BenchmarkOptions,
    InstanceOptions,
    LabelOptions,
    RankedFiles,
    TogetherOptions,
    VideoOptions,
)
from localization_heads.options.shared import Count, EntryChoice, ImageAddresses, ModelUse
from localization_heads.options.surroundings import (
    AblateOptions,
    DoctorOptions,
    EngineOptions,
    PhrasesOptions,
    ScenesOptions,
    TraceOptions,
)

Stage = Literal[
    "batch", "find", "rank", "pipeline", "ground", "evaluate", "collect", "analyze", "visualize", "scenes", "doctor",
    "experiment", "export", "prepare", "calibrate", "trace", "ablate",
]  # fmt: skip
SPREAD_STAGES = ("find", "batch", "ground", "evaluate", "experiment", "calibrate", "ablate", "trace")
"""Those that run the model over a data set."""
ONE_IMAGE = ("collect", "pipeline", "ground", "doctor", "trace")
"""Those that take one image and one query."""
BOXES = ("ground", "evaluate")
"""Those that make boxes while the model is there."""


@options
class FinderOptions(
    BenchmarkOptions,
    ModelUse,
    EntryChoice,
    ImageAddresses,
    TogetherOptions,
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
        )
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
    image_file: ImageChoice | None = option(
        None,
        "An image (path or http address); for collect, pipeline, ground, trace and doctor. collect, pipeline and "
        "ground also take several in one prompt, [a.jpg,b.jpg]; ground a folder or a pattern such as 'pics/*.jpg': "
        "every image in it.",
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
    attention_format: Literal["pkl", "safetensors", "published", "published_august"] = option(
        "pkl",
        "Attention files as pkl or safetensors; published and published_august are what the published code of June and "
        "of August 2025 reads (square grids over padded images alone).",
    )
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
        stages=("evaluate", "ablate", "experiment"),
    )
    bootstrap: Literal["expression", "image"] = option(
        "expression",
        "What the bootstrap of the 95 % intervals draws: expression (as the field does), or image (with all its "
        "expressions).",
        stages=("evaluate", "experiment"),
    )
    calibrate_from: PathText | None = option(
        None,
        "A calibration.json to start from: slope and intercept are fitted anew and the weights moved a little, for "
        "which 50 labels of a new domain do; null fits everything.",
        stages=("calibrate",),
    )
    worst: int = option(16, "Number of worst boxes drawn into failures/.", ge=0, le=200)
    phrases: PhrasesOptions = option(
        PhrasesOptions(), "Several objects in one query (stage=ground).", stages=("ground",)
    )
    trace: TraceOptions = option(TraceOptions(), "Maps of the answer (stage=trace).", stages=("trace",))
    verdict: bool = option(
        False,
        "Write what doctor found, and the geometry as traced on this very model, as a small JSON file for an issue.",
        stages=("doctor",),
    )
    doctor: DoctorOptions = option(
        DoctorOptions(), "A new model: stage=doctor shows how it is read.", stages=("doctor",)
    )
    experiment: ExperimentOptions = option(
        ExperimentOptions(),
        "Experiments of the paper, for stage=experiment: fig3, fig6a, fig6b, random, tab1 to tab5, tab8, "
        "fig13, fig14, all of them, or the ladder (docs/reproducing-the-paper.md); causal: are the heads found "
        "those that the answers need (docs/causal.md)?",
        choice="none",
        stages=("experiment",),
    )
    ablate: AblateOptions = option(
        AblateOptions(), "Heads switched off, or steered (stage=ablate).", stages=("ablate",)
    )
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
                named = name if extra(field)["choice"] else first_changed(name, getattr(self, name))
                raise UsageError(
                    f"{named}=: stage={self.stage} does not read it; write stage={' or '.join(stages)}"
                )
        self.check_labels()
        if isinstance(self.image_file, tuple):
            if self.stage not in TOGETHER_STAGES:
                raise UsageError(f"image_file=[...]: stage={self.stage} takes one image: name one")
            if self.zoom and self.together is not False:
                raise UsageError("zoom=true looks again at one image; leave it out, or write together=false")
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
        self.check_video(
            moving=self.stage == "evaluate" and self.data_file == "scenes" and self.scenes.frames > 1,
            **{
                "zoom=": self.zoom,
                "paraphrases=": self.paraphrases is not None,
                "instances_by=places": self.instances_by == "places",
                "grounding.contrast=": self.grounding.contrast != "none",
                "signals=": self.signals,
            },
        )
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
