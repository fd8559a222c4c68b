"""All objects that an expression fits: the options of `ground` and `evaluate` about them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from localization_heads.errors import UsageError
from localization_heads.options.groups import Instances
from localization_heads.options.kinds import Options, option, options

InstancesBy = Literal["components", "places", "segmenter"]
PLACES = ("{} on the left", "{} on the right", "{} at the top", "{} at the bottom")
"""What is asked with `instances_by=places`: of several objects, each is meant by one of these or another."""


ImageBoxes = Literal["one", "each"]
TOGETHER_STAGES = ("ground", "collect", "pipeline")


@options
class TogetherOptions(Options):
    """Several images in one prompt."""

    together: bool | None = option(
        None,
        "Whether one prompt shows all images of image_file= (true), or each is an entry by itself (false); null takes "
        "a list such as [a.jpg,b.jpg] together, and the images of a folder or a pattern apart.",
        section="several images in one prompt (docs/grounding.md)",
        stages=("ground",),
    )
    image_boxes: ImageBoxes = option(
        "one",
        "Of several images in one prompt: a box in the one that draws most of the heads' attention (one), or a box in "
        "each of them (each).",
        stages=("ground", "batch", "pipeline"),
    )


@options
class InstanceOptions(Options):
    """How many objects an expression refers to."""

    instances: Instances = option(
        "one",
        'Boxes of an expression: the best one, or every object that it fits (all), as in "the dogs"; for ground and '
        "evaluate.",
        section="all objects (docs/grounding.md)",
        stages=("ground", "evaluate"),
    )
    instances_by: InstancesBy = option(
        "components",
        "For instances=all: the components of the expression's map (components), or of the mean map of the expression "
        "on the left, on the right, at the top and at the bottom (places), which measured better for the names of "
        "objects and worse for their kinds and colours; or what the segmenter proposes wherever it is, as far as the "
        "map attends to it (segmenter).",
        stages=("ground", "evaluate"),
    )

    @model_validator(mode="after")
    def _of_all(self) -> Self:
        if self.instances_by != "components" and self.instances != "all":
            raise UsageError(f"instances_by={self.instances_by}: write instances=all, or leave it out")
        if self.instances_by == "segmenter" and self.segmenter.kind == "none":  # type: ignore[attr-defined]
            raise UsageError("instances_by=segmenter needs one to propose objects: leave out segmenter=none")
        if self.instances_by == "places" and getattr(self, "paraphrases", None):
            raise UsageError("instances_by=places asks in wordings of its own: leave out paraphrases=")
        return self
