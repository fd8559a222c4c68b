"""The options of `stage=ground video_file=...`, and of scenes that move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.errors import UsageError
from localization_heads.options.kinds import Options, PathText, option, options

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
        section="video (stage=ground; docs/grounding.md)",
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
