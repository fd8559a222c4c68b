"""The options of each program: the finder, the viewer, the conversation and the demo.

Groups (`model`, `criteria`, ...) are fields that presets are chosen for by name: `model=llava` is
`config/model/llava.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.declaration import (
    ImageChoice,
    PathText,
    Text,
    first_changed_option,
    option,
    option_metadata,
    options,
)
from localization_heads.options.experiments import ExperimentOptions, RungOptions
from localization_heads.options.finder_mixins import (
    TOGETHER_STAGES,
    BenchmarkOptions,
    InstanceOptions,
    LabelOptions,
    RankedFiles,
    TogetherOptions,
    VideoOptions,
)
from localization_heads.options.groups import DEFAULT_GROUNDING, ConvMode, CriteriaOptions, GroundingOptions
from localization_heads.options.shared import Count, EntryChoice, ImageAddresses, ModelUse
from localization_heads.options.stage_groups import (
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
"""Stages that run the model over a data set."""
SINGLE_IMAGE_STAGES = ("collect", "pipeline", "ground", "doctor", "trace")
"""Stages that accept one image and one query."""
BOX_STAGES = ("ground", "evaluate")
"""Stages that predict boxes with the model at hand."""


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
        "export, prepare, calibrate, trace, ablate or experiment. rank repeats the last step of find or batch "
        "without the model, from their statistics or from attention_files, for another top_n, k or criteria "
        "(except criteria that need the maps). trace shows where heads look as each word of an answer is written. "
        "calibrate fits calibration.json on labelled entries. ablate switches heads off and measures what is lost.",
    )
    image_file: ImageChoice | None = option(
        None,
        "An image (path or http address), for collect, pipeline, ground, trace and doctor. collect, pipeline and "
        "ground also take several in one prompt, [a.jpg,b.jpg]; ground takes a folder or a pattern such as "
        "'pics/*.jpg' for every image in it.",
        section="input",
        stages=SINGLE_IMAGE_STAGES,
    )
    query: Text | None = option(
        None,
        "What to look for in the image: a referring expression or a question.",
        stages=SINGLE_IMAGE_STAGES,
    )
    attention_file: PathText | None = option(
        None,
        "For analyze and visualize: a file written by collect or batch (.pkl, .safetensors, or the published "
        "code's own).",
        stages=("analyze", "visualize"),
    )
    data_file: PathText | None = option(
        None,
        "Entries as JSON lines (id, prompt, image_path, optionally bbox and mask), for stages that process a data "
        "set, such as batch, find, ground, evaluate and trace. Overrides data=.",
    )
    save_id: Text | None = option(
        None,
        "Base name of the files written for a single image; null derives it from the image's name and the query.",
        section="output",
        stages=SINGLE_IMAGE_STAGES,
    )
    zoom: bool = option(
        False,
        "Attend again to a crop around each box, and average both boxes if they agree: finer boxes of small "
        "objects for one more forward pass.",
        stages=(*BOX_STAGES, "calibrate"),
    )
    attention_format: Literal["pkl", "safetensors", "published", "published_august"] = option(
        "pkl",
        "Format of attention files: pkl or safetensors; or published and published_august, which the published "
        "code of June and August 2025 reads (square grids over padded images only).",
    )
    figure_format: Literal["png", "pdf", "svg"] = option("png", "Format of figures: png, or pdf or svg for a paper.")
    visualize_batch: bool = option(True, "Draw the maps and the box of a batch's entries.")
    visualize_limit: Count | None = option(32, "Maximum number of entries to draw in a batch; null draws all.")
    top_k: int = option(3, "Number of heads shown in figures and printed lists.", ge=1, le=100)
    show_plot: bool = option(False, "Also open the figures in a window (needs a display).")
    report: bool = option(
        True,
        "Write report.html at the end of batch, find and evaluate: a self-contained page to read and share.",
    )
    report_samples: int = option(
        200,
        "Samples in the report's gallery: half are the first of the data set, half are the worst of the rest.",
        ge=0,
        le=1000,
    )
    scenes: ScenesOptions = option(
        ScenesOptions(), "The synthetic benchmark (stage=scenes, data=scenes).", section="synthetic scenes"
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = option(
        8,
        "Entries per batch; those of one image share its encoding. auto uses 16, and fewer if they do not fit into "
        "memory (results then differ by rounding only). A batch holds at most 24 megapixels.",
    )
    max_new_tokens: Count = option(
        0,
        "Maximum length, in tokens, of the answer that collect and pipeline print (0: none) and trace shows (0: 64).",
    )
    top_n: Annotated[int, Field(ge=1, le=10_000)] | None = option(
        None,
        "Heads selected per sample when counting the selection frequency (N); null uses model.top_n: the paper's "
        "10 unless the model has few heads.",
    )
    num_trials: int = option(5, "Number of random draws that the selection frequency is averaged over.", ge=1, le=1000)
    num_samples: int = option(1000, "Number of samples per draw.", ge=1)
    controls: bool = option(
        True,
        "Also score the controls: random heads of the same layers, the mean of all heads, a centred box, and the "
        "oracle (the ground truth on the model's grid). They need all layers; false stops after the deepest chosen "
        "head.",
        section="evaluation",
    )
    native: bool | None = option(
        None,
        "Also score the box that the model itself writes: true, false, or null for models known to write boxes "
        "(docs/evaluation.md).",
        stages=("evaluate", "ablate", "experiment"),
    )
    bootstrap: Literal["expression", "image"] = option(
        "expression",
        "What the bootstrap of the 95 % intervals resamples: expressions (expression, as is usual) or images with "
        "all their expressions (image).",
        stages=("evaluate", "experiment"),
    )
    calibrate_from: PathText | None = option(
        None,
        "A calibration.json to adapt to a new domain: refits slope and intercept and changes the weights slightly, "
        "for which 50 labels suffice; null fits from scratch.",
        stages=("calibrate",),
    )
    worst: int = option(16, "Number of worst predictions drawn into failures/.", ge=0, le=200)
    phrases: PhrasesOptions = option(
        PhrasesOptions(), "Several objects in one query (stage=ground).", stages=("ground",)
    )
    trace: TraceOptions = option(TraceOptions(), "Maps of the answer (stage=trace).", stages=("trace",))
    verdict: bool = option(
        False,
        "Write the doctor's findings and the geometry traced on this model to a small JSON file, to attach to an "
        "issue.",
        stages=("doctor",),
    )
    doctor: DoctorOptions = option(DoctorOptions(), "Check of a new model (stage=doctor).", stages=("doctor",))
    experiment: ExperimentOptions = option(
        ExperimentOptions(),
        "Experiments of the paper, for stage=experiment: fig3, fig6a, fig6b, random, tab1 to tab5, tab8, fig13, "
        "fig14, all of them, or the ladder (docs/reproducing-the-paper.md); or causal: do answers depend on the "
        "heads found (docs/causal.md)?",
        choice="none",
        stages=("experiment",),
    )
    ablate: AblateOptions = option(AblateOptions(), "Heads switched off or steered (stage=ablate).", stages=("ablate",))
    rung: RungOptions = option(
        RungOptions(),
        "One rung of the ladder, as a preset for any stage: published, padding, hull, fixed, masks, mask_box or "
        "points.",
        choice="none",
    )
    engine: EngineOptions = option(
        EngineOptions(),
        "What runs the model over a data set: local (this process) or ray (docs/spread.md).",
        choice="local",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        for name, field in type(self).__pydantic_fields__.items():
            stages = option_metadata(field).get("stages")
            if stages and getattr(self, name) != field.default and self.stage not in stages:
                named = name if option_metadata(field)["choice"] else first_changed_option(name, getattr(self, name))
                raise UsageError(f"{named}=: stage={self.stage} does not read it; write stage={' or '.join(stages)}")
        self.check_labels()
        if isinstance(self.image_file, tuple):
            if self.stage not in TOGETHER_STAGES:
                raise UsageError(f"image_file=[...]: stage={self.stage} takes one image: name one")
            if self.zoom and self.together is not False:
                raise UsageError("zoom=true crops a single image; leave it out, or write together=false")
        if self.zoom and self.instances == "all":
            raise UsageError("zoom=true refines a single box; leave out zoom= or instances=all")
        if self.scenes.height is not None and self.scenes.height > self.scenes.size:
            raise UsageError(
                f"scenes.height={self.scenes.height}: the images have only scenes.size={self.scenes.size} rows"
            )
        if self.scenes.frames > 1 and (self.scenes.height or self.scenes.absent or self.scenes.targets == "all"):
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
            self._check_ray()
        return self

    def require(self, *names: str) -> None:
        """Raise UsageError for the first of these options that is missing."""
        for name in names:
            if not getattr(self, name):
                raise UsageError(f"{name}= is missing: stage={self.stage} needs {' and '.join(names)}")

    def _check_ray(self) -> None:
        """Ray assigns the GPUs of each worker, so `device` can only choose the type."""
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
        "Also fetch a file's image from this machine and from private networks.",
    )
    layer: Count | None = option(None, "Layer to show, counted from 0; null shows the file's top heads.")
    head: Count | None = option(None, "Head to show, counted from 0.")
    show_components: bool = option(
        False, "Also draw the connected components that the spatial entropy is computed from."
    )
    top_k: int = option(3, "Number of top heads to show.", ge=1, le=100)
    k: int = option(3, "Number of heads whose maps are combined for the box (the paper's k).", ge=1, le=10_000)
    data_file: PathText | None = option(
        "examples/visualization_data.jsonl",
        "For batch: JSON lines with an id, which names the figures, and optionally attention_file, layer and head. "
        "attention_file defaults to that of the id below outputs/localization_heads, layer and head to the top "
        "heads.",
    )
    output_dir: PathText | None = option(None, "Folder of the figures; null puts each beside its attention file.")
    save_fig: bool = option(True, "Write the figures to disk.")
    show_plot: bool = option(False, "Also open the figures in a window (needs a display).")
    debug: bool = option(False, "Show full tracebacks.")
    criteria: CriteriaOptions = option(
        CriteriaOptions(),
        "Criteria for localization heads: paper, published or published_august.",
        choice="paper",
    )
    grounding: GroundingOptions = option(
        GroundingOptions(),
        "Read-out from maps to a box: sharp, paper or published.",
        choice=DEFAULT_GROUNDING,
    )

    @model_validator(mode="after")
    def _check_box_from(self) -> Self:
        if self.grounding.box_from == "mask":
            raise UsageError("grounding.box_from=mask needs a segmenter, which stage=visualize of the finder has")
        return self


@options
class ChatOptions(ModelUse, ImageAddresses):
    """cli_llava.py"""

    cli_mode: bool = option(
        False, "Hold a conversation on the terminal; false answers one query and exits.", section="talk"
    )
    query: Text | None = option(None, "The question; required unless cli_mode=true.")
    image_file: PathText | None = option(None, "The image to ask about (path or http address).")
    max_new_tokens: int = option(128, "Maximum length of an answer in tokens.", ge=1)
    conv_mode: ConvMode | None = option(
        "chat",
        "Prompt template of the conversation: chat (the model's chat template), referseg or plain. /ground always "
        "uses the paper's prompt.",
    )
    picture_memory: Count = option(
        1024,
        "Cache size, in MiB, for the encoded images of /ground; 0 encodes the image again for every question.",
    )


@options
class DemoOptions(ModelUse):
    """python -m localization_heads.apps.demo"""

    host: Text = option(
        "127.0.0.1",
        "Address that the page is served on: 127.0.0.1 for this machine only, 0.0.0.0 for everybody who can reach it.",
        section="page",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = option(
        None, "Port of the page; null uses the first free one from 7860."
    )
    open_browser: bool = option(True, "Open the page in a browser.")
