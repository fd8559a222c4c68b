"""The options of the finder by subject: benchmarks, several images or objects, videos, labels, files."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.groups import Instances
from localization_heads.options.kinds import OneOrSeveral, Options, PathText, option, options

Dataset = Literal[
    "refcoco", "refcoco+", "refcocog", "reasonseg", "ref-l4", "grefcoco", "screenspot", "screenspot-v2",
    "screenspot-pro", "groundingme", "finecops-ref", "flickr30k",
]  # fmt: skip
Protocol = Literal["unc", "lmms"]
Sentence = Literal["all", "first", "longest"]
REFCOCO = ("refcoco", "refcoco+", "refcocog")
"""Those whose expressions are read under either `Protocol`; the others have one of their own."""


@options
class BenchmarkOptions(Options):
    """What `stage=prepare` reads and writes."""

    dataset: Dataset | None = option(
        None,
        "refcoco, refcoco+, refcocog, reasonseg, ref-l4, grefcoco, screenspot, screenspot-v2, screenspot-pro, "
        "groundingme, finecops-ref or flickr30k.",
        section="benchmarks (stage=prepare; docs/datasets.md)",
        stages=("prepare",),
    )
    dataset_path: PathText | None = option(
        None,
        "Where it is: a file of the set or the folder with its files, in their published form.",
        stages=("prepare",),
    )
    images: PathText | None = option(
        None,
        "Folder of the images (COCO's train2014 for RefCOCO and gRefCOCO), for sources that have none inside.",
        stages=("prepare",),
    )
    split: Literal["train", "val", "test", "testA", "testB"] | None = option(
        None,
        "train, val, test, testA or testB; null takes val, or the only one that there is. Of train, num_samples are "
        "drawn by random_seed; of the others all are taken unless num_samples is given.",
    )
    protocol: Protocol = option(
        "unc",
        "How the expressions of RefCOCO, RefCOCO+ and RefCOCOg are asked, which decides what the numbers compare "
        "with: each by itself (unc, as papers do), or all those of an object together in one prompt (lmms, as the "
        "task refcoco_grounding of lmms-eval does).",
        stages=("prepare",),
    )
    sentence: Sentence = option(
        "all",
        "Which expressions of an object are written: all, the first or the longest.",
        stages=("prepare",),
    )
    exclude: OneOrSeveral[PathText] = option(
        (),
        "Files written by stage=prepare whose images are left out: the evaluation sets, when train is prepared.",
        stages=("prepare",),
    )
    allow_leakage: bool = option(
        False,
        "Use heads on images that they were found on; draw a training sample that shows evaluation images.",
    )
    dataset_folder: PathText = option(
        "outputs/datasets", "Where prepared files are written.", stages=("prepare",)
    )


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


GROUND = ("ground",)
EVALUATED = ("ground", "evaluate")
MOST_FRAMES = 512
"""Frames in one prompt."""


@options
class VideoOptions(Options):
    """A video in place of an image."""

    video_file: PathText | None = option(
        None,
        "A video (.mp4, .mov, .mkv, .webm, .avi) in place of image_file=: a box in each of its frames.",
        section="video (stage=ground; docs/videos.md)",
        stages=GROUND,
    )
    video: Literal["frames", "native"] = option(
        "frames",
        "How the model sees a video (video_file=, or with stage=evaluate scenes.frames=): each frame as an image "
        "(frames), or frames_per_prompt of them as the family's own video tokens (native; docs/models.md says which "
        "families).",
        stages=EVALUATED,
    )
    frames_per_prompt: int = option(
        16,
        "For video=native: frames that go into one prompt; of large ones fewer, 100 million pixels together.",
        ge=1,
        le=MOST_FRAMES,
        stages=EVALUATED,
    )
    fps: Annotated[float, Field(gt=0, le=240)] | None = option(
        5.0, "For video_file=: frames a second that are looked at; null takes every frame.", stages=GROUND
    )
    smoothing: float = option(
        0.0,
        "For video_file=: how much of a frame's box comes from the boxes before it, from 0 (nothing) to below 1; the "
        "box of each frame alone stays in predictions.jsonl as raw_bbox.",
        ge=0,
        lt=1,
        stages=GROUND,
    )

    def check_video(self, *, moving: bool, **others: bool) -> None:
        """UsageError for `video=native` where there is no video, or with what is asked about images only.

        Args:
            moving: whether the entries are scenes that move.
            others: options by name, and whether they are set.
        """
        if self.video == "frames":
            if self.frames_per_prompt != type(self).__pydantic_fields__["frames_per_prompt"].default:
                raise UsageError(
                    "frames_per_prompt=: video=frames shows one frame a prompt; write video=native"
                )
            return
        if self.video_file is None and not moving:
            raise UsageError(
                "video=native needs a video: video_file=, or stage=evaluate data=scenes scenes.frames="
            )
        if wrong := [name for name, given in others.items() if given]:
            raise UsageError(f"video=native: leave out {' and '.join(wrong)}, which asks about images")


HeadsBy = Literal["criteria", "mass", "iou", "pointing", "vrh"]
Shrink = Literal["none", "ranks", "scores"]


@options
class LabelOptions(Options):
    """What ranks the heads."""

    heads_by: HeadsBy = option(
        "criteria",
        "What ranks the heads: criteria (without labels, as the paper does); or, on entries with boxes or masks, the "
        "mean over these of the attention mass in the truth (mass), of the IoU of a head's own map with it (iou), of "
        "the share of hits of its strongest cell (pointing), or of the attention of the box that the model writes "
        "itself on the patches that the true one touches (vrh, for families with a native box).",
        section="heads from labels (stage=find, rank; docs/find-heads.md)",
        stages=("find", "rank"),
    )
    num_labels: Annotated[int, Field(ge=1)] | None = option(
        None,
        "For heads_by=mass, iou, pointing and vrh: labelled entries that are drawn for the ranking, by random_seed; "
        "null takes all. num_trials draws show its spread.",
        stages=("find", "rank"),
    )
    shrink: Shrink = option(
        "none",
        "Mix the label-free ranking into one from few labels, with weight n0 / (n + n0): not at all (none), by the "
        "heads' places (ranks), or by scores and selection frequencies, each divided by its highest (scores).",
        stages=("find", "rank"),
    )
    shrink_n0: float = option(
        10.0,
        "For shrink: as many labels weigh as much as the label-free ranking (n0).",
        gt=0,
        stages=("find", "rank"),
    )

    def check_labels(self) -> None:
        """UsageError for options of labels where the heads are ranked without any."""
        fields = type(self).__pydantic_fields__
        for name in ("num_labels", "shrink"):
            if self.heads_by == "criteria" and getattr(self, name) != fields[name].default:
                raise UsageError(
                    f"{name}=: heads_by=criteria takes no labels; write heads_by=mass, iou, pointing or vrh"
                )


@options
class RankedFiles(Options):
    """Heads ranked over attention files on disk, whoever wrote them."""

    attention_files: PathText | None = option(
        None,
        "For rank: a folder of attention files or a pattern such as runs/*.pkl, ranked without the model; files of one "
        "image and different queries are compared for the third criterion. Takes the place of data_file.",
        section="input",
        stages=("rank",),
    )
