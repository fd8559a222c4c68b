"""The options of what surrounds the method: scenes, phrases, traces, ablations, doctor, workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.errors import UsageError
from localization_heads.options.kinds import Options, PathText, Several, Text, option, options, shown

RAY = ("ray",)
ArtStyle = Literal["noto", "twemoji", "fluent", "openmoji"]
Targets = Literal["one", "all"]
SceneSplit = Literal["test", "validation", "train"]


@options
class ScenesOptions(Options):
    """The synthetic benchmark (stage=scenes, data=scenes)."""

    count: int = option(300, "Number of scenes, one expression each.", ge=1, le=100_000)
    seed: int = option(0, "Which set; sets of different seeds share no scene.", ge=0, le=1_000_000)
    split: SceneSplit = option("test", "test, validation or train; no scene is in two of them.")
    style: ArtStyle | None = option(
        None, "Art style: noto, twemoji, fluent, or openmoji (never trained on); null mixes the first three."
    )
    size: int = option(256, "Side of an image in pixels.", ge=32, le=2048)
    height: Annotated[int, Field(ge=16, le=2048)] | None = option(
        None, "Crop each image to this many rows around the object, to get landscape images; null keeps all."
    )
    smallest: float = option(
        0.26,
        "Longer side of the smallest objects in sides of the image; all others scale with it.",
        ge=0.05,
        le=0.4,
    )
    absent: float = option(
        0.0,
        "Share of the expressions that refer to nothing in their scene: by name, colour, place or relation.",
        ge=0,
        le=1,
    )
    targets: Targets = option(
        "one", "Expressions that refer to one object (one), or to all of several, such as the dogs (all)."
    )
    frames: int = option(
        1, "Frames of each scene, in which the objects move; every frame is an entry.", ge=1, le=1000
    )
    folder: PathText = option("outputs/scenes", "Where they are written.")


@options
class PhrasesOptions(Options):
    """Several objects in one query (stage=ground)."""

    by: Literal["split", "spacy", "whole"] = option(
        "split",
        "How a query becomes several: split (at each ;), spacy (the noun phrases of a sentence) or whole (never). "
        "Each phrase gets its own map, box and mask, under the id <id>_1, <id>_2, ...",
    )
    model: PathText = option(
        "en_core_web_sm", "The spaCy pipeline, a package or a folder, for phrases.by=spacy."
    )


@options
class DoctorOptions(Options):
    """How a new model is examined (stage=doctor)."""

    check: bool | None = option(
        None,
        "Compare the captured attention with eager attention on this input; null does so for small models only.",
    )


@options
class EngineOptions(Options):
    """Where the model runs over a data set."""

    kind: Literal["local", "ray"] = option(
        "local", "What runs the model: this process (local) or Ray's workers (ray)."
    )
    num_workers: Annotated[int, Field(ge=1, le=10_000)] | None = option(
        None,
        "Number of workers; null takes one per GPU or, without GPUs, as many as there are cores for.",
        kinds=RAY,
    )
    cpus_per_worker: int = option(2, "Cores of a worker.", kinds=RAY, ge=1, le=1024)
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = option(
        None,
        "GPUs of a worker, such as 2 with model.device_map=auto, or 0.5 to share one; null takes one if there "
        "are any.",
        kinds=RAY,
    )
    address: Text | None = option(
        None,
        "A Ray cluster: auto joins the one that this machine belongs to, HOST:PORT another; null starts Ray on this "
        "machine and stops it afterwards.",
        kinds=RAY,
    )
    object_store: int = option(
        1024, "MiB of memory for results in transit, where Ray is started on this machine.", kinds=RAY, ge=80
    )


Keep = Literal["heads", "mean", "all"]
Step = Literal["writes", "reads"]
TRACE_TOKENS = 64
"""Tokens of an answer, at most, where none are named."""
MOST_TOKENS = 1024
"""Of a trace: longer ones no page could show."""


@options
class TraceOptions(Options):
    """Maps of the answer (stage=trace)."""

    step: Step = option(
        "writes",
        "Which attention belongs to a word: that of the step that writes it, whose outcome the word is (writes), or "
        "that of the step that reads it to write the next (reads, as query_token=answer_first and answer_mean).",
    )
    keep: Keep = option(
        "heads",
        "What is kept of each token of the answer: the map of each chosen head (heads), their mean alone (mean), or "
        "the maps of all heads as well, which may take gigabytes (all).",
    )


def check_span(query_token: str, answer_span: str | None) -> None:
    """UsageError for a span without the query token that reads it, or the other way round."""
    if (query_token == "answer_span") != bool(answer_span and answer_span.strip()):
        raise UsageError(
            f"query_token={query_token} answer_span={shown(answer_span)}: query_token=answer_span needs "
            "answer_span=, a text of the answer or box, and nothing else reads it"
        )


@options
class AblateOptions(Options):
    """Heads switched off, or steered (stage=ablate)."""

    counts: Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], Several, Field(min_length=1)] = (
        option((0, 1, 2, 3, 5, 10), "How many heads of the list are switched off at a time.")
    )
    draws: int = option(5, "Random sets of as many heads of the same layers.", ge=1, le=100)
    measure: Literal["answers", "boxes", "maps", "all"] = option(
        "all",
        "What is measured: answers (those that are right), boxes (that the model writes itself), maps (of the heads "
        "that stay on), or all that the entries and the model allow.",
    )
    how: Literal["zero", "mean"] = option(
        "zero", "What a head that is switched off writes: zero, or its mean over the prompt."
    )
    answer_tokens: int = option(8, "Tokens of an answer that are read, at most.", ge=1, le=256)
    steer: bool = option(
        False,
        "Steer the heads towards regions instead of switching them off: does the answer name what is there? Entries "
        "have regions, each with its answer; of data=scenes, scenes of two objects are drawn.",
    )
    strength: float = option(
        4.0, "Of steering: what is added to the heads' logits on the region.", ge=-100, le=100
    )
