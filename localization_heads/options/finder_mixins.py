"""The options of the finder by subject, as mixins: benchmarks, several images or objects, videos, labels."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.declaration import OneOrMore, Options, PathText, option, options
from localization_heads.options.groups import Instances

Dataset = Literal[
    "refcoco", "refcoco+", "refcocog", "reasonseg", "ref-l4", "grefcoco", "screenspot", "screenspot-v2",
    "screenspot-pro", "groundingme", "finecops-ref", "flickr30k",
]  # fmt: skip
Protocol = Literal["unc", "lmms"]
Sentence = Literal["all", "first", "longest"]
REFCOCO = ("refcoco", "refcoco+", "refcocog")
"""Data sets whose expressions can be prompted by either `Protocol`; each of the others has its own protocol."""


@options
class BenchmarkOptions(Options):
    """Benchmarks (stage=prepare)."""

    dataset: Dataset | None = option(
        None,
        "refcoco, refcoco+, refcocog, reasonseg, ref-l4, grefcoco, screenspot, screenspot-v2, screenspot-pro, "
        "groundingme, finecops-ref or flickr30k.",
        section="benchmarks (stage=prepare; docs/datasets.md)",
        stages=("prepare",),
    )
    dataset_path: PathText | None = option(
        None,
        "Where the benchmark is: a file, or the folder with its files, in the published form.",
        stages=("prepare",),
    )
    images: PathText | None = option(
        None,
        "Folder of the images (COCO's train2014 for RefCOCO and gRefCOCO), for benchmarks that do not contain them.",
        stages=("prepare",),
    )
    split: Literal["train", "val", "test", "testA", "testB"] | None = option(
        None,
        "train, val, test, testA or testB; null uses val, or the only one there is. From train, num_samples are "
        "drawn by random_seed; other splits are used in full unless num_samples is set.",
    )
    protocol: Protocol = option(
        "unc",
        "How the expressions of RefCOCO, RefCOCO+ and RefCOCOg are prompted, which decides what the results "
        "compare with: each on its own (unc, as in papers), or all those of an object in one prompt (lmms, as the "
        "lmms-eval task refcoco_grounding).",
        stages=("prepare",),
    )
    sentence: Sentence = option(
        "all",
        "Which expressions of an object are written: all, the first or the longest.",
        stages=("prepare",),
    )
    exclude: OneOrMore[PathText] = option(
        (),
        "Files written by stage=prepare whose images are excluded: the evaluation sets, when preparing train.",
        stages=("prepare",),
    )
    allow_leakage: bool = option(
        False,
        "Allow heads to be used on images that they were found on, and training samples to contain evaluation images.",
    )
    dataset_folder: PathText = option(
        "outputs/datasets", "Folder that prepared files are written to.", stages=("prepare",)
    )


InstancesBy = Literal["components", "places", "segmenter"]
PLACE_PARAPHRASES = ("{} on the left", "{} on the right", "{} at the top", "{} at the bottom")
"""The paraphrases of `instances_by=places`: between them they refer to each of several objects."""
ImageBoxes = Literal["one", "each"]
TOGETHER_STAGES = ("ground", "collect", "pipeline")


@options
class TogetherOptions(Options):
    """Several images in one prompt."""

    together: bool | None = option(
        None,
        "Show all images of image_file= in one prompt (true), or make each an entry of its own (false); null shows "
        "a list such as [a.jpg,b.jpg] together, but not the images of a folder or pattern.",
        section="several images in one prompt (docs/grounding.md)",
        stages=("ground",),
    )
    image_boxes: ImageBoxes = option(
        "one",
        "With several images in one prompt: one box, in the image with most of the heads' attention (one), or one "
        "in each image (each).",
        stages=("ground", "batch", "pipeline"),
    )


@options
class InstanceOptions(Options):
    """How many objects an expression refers to."""

    instances: Instances = option(
        "one",
        'Boxes per expression: the best one, or one for every object that it refers to (all), as in "the dogs".',
        section="all objects (docs/grounding.md)",
        stages=("ground", "evaluate"),
    )
    instances_by: InstancesBy = option(
        "components",
        "For instances=all, where the objects come from: the components of the expression's map (components); "
        "those of the mean map of the expression on the left, on the right, at the top and at the bottom (places; "
        "measured better for names of objects, worse for kinds and colours); or the segmenter's proposals, "
        "filtered by the map (segmenter).",
        stages=("ground", "evaluate"),
    )

    @model_validator(mode="after")
    def _of_all(self) -> Self:
        if self.instances_by != "components" and self.instances != "all":
            raise UsageError(f"instances_by={self.instances_by}: write instances=all, or leave it out")
        if self.instances_by == "segmenter" and self.segmenter.kind == "none":  # type: ignore[attr-defined]
            raise UsageError("instances_by=segmenter needs a segmenter that proposes objects: leave out segmenter=none")
        if self.instances_by == "places" and getattr(self, "paraphrases", None):
            raise UsageError("instances_by=places uses paraphrases of its own: leave out paraphrases=")
        return self


GROUND = ("ground",)
EVALUATED = ("ground", "evaluate")
MAX_FRAMES_PER_PROMPT = 512
"""Maximum number of frames per prompt."""


@options
class VideoOptions(Options):
    """A video instead of an image."""

    video_file: PathText | None = option(
        None,
        "A video (.mp4, .mov, .mkv, .webm, .avi) instead of image_file=: one box per frame.",
        section="video (stage=ground; docs/videos.md)",
        stages=GROUND,
    )
    video: Literal["frames", "native"] = option(
        "frames",
        "How the model sees a video (video_file=, or scenes.frames= with stage=evaluate): each frame as an image "
        "(frames), or frames_per_prompt frames as the family's video tokens (native; for the families marked in "
        "docs/models.md).",
        stages=EVALUATED,
    )
    frames_per_prompt: int = option(
        16,
        "For video=native: frames per prompt; fewer if they are large (100 million pixels in total).",
        ge=1,
        le=MAX_FRAMES_PER_PROMPT,
        stages=EVALUATED,
    )
    fps: Annotated[float, Field(gt=0, le=240)] | None = option(
        5.0, "For video_file=: frames per second to sample; null uses every frame.", stages=GROUND
    )
    smoothing: float = option(
        0.0,
        "For video_file=: weight of the previous frames' boxes in each box, from 0 (none) to below 1; "
        "predictions.jsonl keeps the unsmoothed box as raw_bbox.",
        ge=0,
        lt=1,
        stages=GROUND,
    )

    def check_video(self, *, moving: bool, **image_options: bool) -> None:
        """Raise UsageError for `video=native` without a video, or with options that apply to images only.

        Args:
            moving: whether the entries are scenes with several frames.
            image_options: whether each of these options is set.
        """
        if self.video == "frames":
            if self.frames_per_prompt != type(self).__pydantic_fields__["frames_per_prompt"].default:
                raise UsageError("frames_per_prompt=: video=frames shows one frame a prompt; write video=native")
            return
        if self.video_file is None and not moving:
            raise UsageError("video=native needs a video: video_file=, or stage=evaluate data=scenes scenes.frames=")
        if wrong := [name for name, is_set in image_options.items() if is_set]:
            raise UsageError(f"video=native: leave out {' and '.join(wrong)}, for images only")


HeadsBy = Literal["criteria", "mass", "iou", "pointing", "vrh"]
Shrink = Literal["none", "ranks", "scores"]


@options
class LabelOptions(Options):
    """Heads ranked by labels."""

    heads_by: HeadsBy = option(
        "criteria",
        "Ranking of the heads: criteria (label-free, paper); or, on entries with boxes or masks, by the mean of a "
        "score: attention mass inside the true box or mask (mass), IoU of the head's map with it (iou), hits of "
        "the map's strongest cell (pointing), or attention of the tokens of the box that the model writes on the "
        "true box's patches (vrh, for families with a native box).",
        section="heads from labels (stage=find, rank; docs/find-heads.md)",
        stages=("find", "rank"),
    )
    num_labels: Annotated[int, Field(ge=1)] | None = option(
        None,
        "For heads_by=mass, iou, pointing and vrh: number of labelled entries, drawn by random_seed; null uses "
        "all. num_trials draws show the spread.",
        stages=("find", "rank"),
    )
    shrink: Shrink = option(
        "none",
        "Shrink a ranking from n labels towards the label-free ranking, whose weight is n0 / (n + n0): not at all "
        "(none), by rank (ranks), or by score and selection frequency, each divided by its maximum (scores).",
        stages=("find", "rank"),
    )
    shrink_n0: float = option(
        10.0,
        "For shrink: n0, the number of labels at which both rankings weigh the same.",
        gt=0,
        stages=("find", "rank"),
    )

    def check_labels(self) -> None:
        """Raise UsageError for label options without a ranking by labels."""
        fields = type(self).__pydantic_fields__
        for name in ("num_labels", "shrink"):
            if self.heads_by == "criteria" and getattr(self, name) != fields[name].default:
                raise UsageError(
                    f"{name}=: heads_by=criteria takes no labels; write heads_by=mass, iou, pointing or vrh"
                )


@options
class RankedFiles(Options):
    """Heads ranked over attention files on disk, ours or another tool's."""

    attention_files: PathText | None = option(
        None,
        "For rank: a folder of attention files, or a pattern such as runs/*.pkl, to rank without the model; the "
        "third criterion compares files of one image with different queries. Replaces data_file.",
        section="input",
        stages=("rank",),
    )
