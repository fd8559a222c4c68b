"""Option groups of single stages: scenes, phrases, doctor, engine, traces and ablations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.errors import UsageError
from localization_heads.options.declaration import (
    FromList,
    Options,
    PathText,
    Text,
    format_value,
    option,
    options,
)

RAY = ("ray",)
ArtStyle = Literal["noto", "twemoji", "fluent", "openmoji"]
Targets = Literal["one", "all"]
SceneSplit = Literal["test", "validation", "train"]


@options
class ScenesOptions(Options):
    """The synthetic benchmark (stage=scenes, data=scenes)."""

    count: int = option(300, "Number of scenes, with one expression each.", ge=1, le=100_000)
    seed: int = option(0, "Seed of the set; sets of different seeds share no scene.", ge=0, le=1_000_000)
    split: SceneSplit = option("test", "test, validation or train; no scene is in two splits.")
    style: ArtStyle | None = option(
        None,
        "Art style: noto, twemoji, fluent, or openmoji (never used in training); null mixes the first three.",
    )
    size: int = option(256, "Width and height of the images in pixels.", ge=32, le=2048)
    height: Annotated[int, Field(ge=16, le=2048)] | None = option(
        None,
        "Crop each image to this many rows around the object, for landscape images; null keeps the square.",
    )
    smallest: float = option(
        0.26,
        "Longer side of the smallest objects, relative to the image's side; all other objects scale with it.",
        ge=0.05,
        le=0.4,
    )
    absent: float = option(
        0.0,
        "Share of expressions that refer to nothing in their scene: wrong name, colour, place or relation.",
        ge=0,
        le=1,
    )
    targets: Targets = option(
        "one", "Expressions refer to exactly one object (one), or to all of several, such as the dogs (all)."
    )
    frames: int = option(1, "Frames per scene, with moving objects; every frame is an entry.", ge=1, le=1000)
    folder: PathText = option("outputs/scenes", "Folder that the scenes are written to.")


@options
class PhrasesOptions(Options):
    """Several objects in one query (stage=ground)."""

    by: Literal["split", "spacy", "whole"] = option(
        "split",
        "How a query is split into phrases: at each semicolon (split), into the noun phrases of a sentence "
        "(spacy), or not at all (whole). Each phrase gets its own map, box and mask, under the id <id>_1, <id>_2, "
        "...",
    )
    model: PathText = option("en_core_web_sm", "For phrases.by=spacy: the spaCy pipeline, a package or a folder.")


@options
class DoctorOptions(Options):
    """The check of a new model (stage=doctor)."""

    check: bool | None = option(
        None,
        "Compare the captured attention with eager attention on this input; null does so for small models only.",
    )


@options
class EngineOptions(Options):
    """What runs the model over a data set."""

    kind: Literal["local", "ray"] = option("local", "What runs the model: this process (local) or Ray workers (ray).")
    num_workers: Annotated[int, Field(ge=1, le=10_000)] | None = option(
        None,
        "Number of workers; null starts one per GPU or, without GPUs, as many as the cores allow.",
        kinds=RAY,
    )
    cpus_per_worker: int = option(2, "CPU cores per worker.", kinds=RAY, ge=1, le=1024)
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = option(
        None,
        "GPUs per worker, such as 2 with model.device_map=auto, or 0.5 to share one; null uses one if there are any.",
        kinds=RAY,
    )
    address: Text | None = option(
        None,
        "Ray cluster to join: auto (the one this machine belongs to) or HOST:PORT; null starts Ray on this machine "
        "and stops it at the end.",
        kinds=RAY,
    )
    object_store: int = option(
        1024, "Size in MiB of the object store of a Ray that is started on this machine.", kinds=RAY, ge=80
    )


Keep = Literal["heads", "mean", "all"]
Step = Literal["writes", "reads"]
DEFAULT_TRACE_TOKENS = 64
"""Maximum number of answer tokens to trace if max_new_tokens is not set."""
MAX_TRACE_TOKENS = 1024
"""Maximum length of a trace; no page could show a longer one."""


@options
class TraceOptions(Options):
    """Maps of the answer (stage=trace)."""

    step: Step = option(
        "writes",
        "Attention to show for a token: that of the forward pass that predicts it (writes), or that of the pass "
        "that reads it to predict the next (reads, as query_token=answer_first and answer_mean).",
    )
    keep: Keep = option(
        "heads",
        "Maps to keep for each answer token: of each chosen head (heads), only their mean (mean), or of all heads "
        "as well, which may take gigabytes (all).",
    )


def check_answer_span(query_token: str, answer_span: str | None) -> None:
    """Raise UsageError unless `answer_span` and `query_token=answer_span` are given together."""
    if (query_token == "answer_span") != bool(answer_span and answer_span.strip()):
        raise UsageError(
            f"query_token={query_token} answer_span={format_value(answer_span)}: query_token=answer_span needs "
            "answer_span=, a text of the answer or box, and nothing else reads it"
        )


@options
class AblateOptions(Options):
    """Heads switched off or steered (stage=ablate)."""

    counts: Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], FromList, Field(min_length=1)] = option(
        (0, 1, 2, 3, 5, 10), "Numbers of heads, from the top of the list, to switch off at a time."
    )
    draws: int = option(
        5, "Number of random sets, each of as many heads from the same layers, to compare with.", ge=1, le=100
    )
    measure: Literal["answers", "boxes", "maps", "all"] = option(
        "all",
        "What is measured: answers (the share that is right), boxes (those that the model itself writes), maps "
        "(those of the heads that stay on), or all that entries and model allow.",
    )
    how: Literal["zero", "mean"] = option(
        "zero", "Output of a head that is switched off: zero, or its mean over the prompt."
    )
    answer_tokens: int = option(8, "Maximum number of answer tokens.", ge=1, le=256)
    steer: bool = option(
        False,
        "Steer the heads towards regions instead of switching them off: does the answer name what is there? Each "
        "entry has regions with their answers; with data=scenes, scenes of two objects are drawn.",
    )
    strength: float = option(
        4.0, "For steering: bias added to the heads' attention logits inside the region.", ge=-100, le=100
    )
