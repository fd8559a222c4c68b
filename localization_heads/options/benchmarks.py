"""The options of `stage=prepare`: which benchmark is read, from where, and what of it is written."""

from __future__ import annotations

from typing import Literal

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
    )
    allow_leakage: bool = option(
        False,
        "Use heads on images that they were found on; draw a training sample that shows evaluation images.",
    )
    dataset_folder: PathText = option("outputs/datasets", "Where prepared files are written.")
