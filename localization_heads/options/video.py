"""The options of `stage=ground video_file=...`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from localization_heads.options.kinds import Options, PathText, option, options

GROUND = ("ground",)


@options
class VideoOptions(Options):
    """A video in place of an image."""

    video_file: PathText | None = option(
        None,
        "A video (.mp4, .mov, .mkv, .webm, .avi) in place of image_file=: each frame is grounded by itself.",
        section="video (stage=ground; docs/grounding.md)",
        stages=GROUND,
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
