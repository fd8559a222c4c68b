"""The options of what surrounds the method: scenes, phrases, the examination of a model, where it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.options.kinds import Options, PathText, Text, option, options

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
