"""Clips: frames of a video as the model's own video tokens, in one prompt (`video=native`).

The frames go through the image processors of transformers, and each family's rule lays them out in time. The video
processors would do the same, but need torchvision (`tests/test_clips.py` compares the two if it is installed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.sources import image_at
from localization_heads.errors import UsageError, shown
from localization_heads.lvlm.families.geometry import (
    MAX_PREPARED_PIXELS,
    Size,
    View,
    cropped_box,
    even_view,
    grid,
    image_token_id,
    patches_of,
    whole_box,
)
from localization_heads.lvlm.forward.failures import memory_errors, processor_errors
from localization_heads.lvlm.text.query_tokens import remove_token
from localization_heads.options.finder_mixins import MAX_FRAMES_PER_PROMPT

if TYPE_CHECKING:
    from localization_heads.lvlm.attention_model import AttentionModel

MIN_TOKENS, MAX_TOKENS = 128, 768
"""Tokens per two merged frames in Qwen's own preprocessing (qwen-vl-utils), within what the image processor allows. A
checkpoint's own video settings take precedence."""
_FRAME_INTERVAL = 0.5
"""Seconds between frames, if they are not known."""


def attend_clip(
    lvlm: AttentionModel,
    frames: Sequence[Image.Image],
    expression: str,
    times: Sequence[float] | None = None,
    last_layer: int | None = None,
) -> list[AttentionMaps]:
    """The maps of each frame of a clip that the model is shown in one prompt.

    Merged frames have the same map. The attention is spread over all frames, so the sum of a map is smaller than that
    of an image's map.

    Args:
        frames: RGB images of one size, in order.
        times: of the frames, in seconds; None assumes two frames a second.
        last_layer: as for `LVLM.attend`.

    Raises:
        UsageError: the family's video tokens are not supported, the frames do not fit into the model's context, heads
            are switched off or steered, or the expression is asked in paraphrases.
    """
    if not frames:
        return []
    if len(frames) > MAX_FRAMES_PER_PROMPT:
        raise UsageError(f"a clip of {len(frames)} frames: {MAX_FRAMES_PER_PROMPT} at most go into one prompt")
    if lvlm.paraphrases:
        raise UsageError("video=native: leave out paraphrases=, which asks about images")
    if lvlm.changes:
        raise UsageError("clips cannot be used while heads are switched off or steered: give the frames as images")
    if not lvlm.image_comes_first:
        raise UsageError("video=native: the chat template puts the video after the text; use conv_mode=plain")
    times = [_FRAME_INTERVAL * n for n in range(len(frames))] if times is None else times
    prompt = lvlm.located_prompt(expression)
    seen = [lvlm.image_for_processor(image_at(frame, None)) for frame in frames]
    clip = prepare_clip(lvlm, seen, prompt.text, times)
    query = lvlm.query([prompt], clip.inputs)
    with memory_errors():
        samples = lvlm.read_attention(lambda: lvlm.on_device(clip.inputs), query, [expression], last_layer)
        (sample,) = samples
    maps = [lvlm.maps(sample, [[view]], seen[0], expression, prompt.text) for view in clip.views]
    return [maps[number // clip.merged_frames] for number in range(len(frames))]


class PreparedClip(NamedTuple):
    """A clip in its prompt, as model inputs on the CPU, with one view for each of its tokens in time."""

    inputs: dict[str, Any]
    views: list[View]
    merged_frames: int


def prepare_clip(
    lvlm: AttentionModel, frames: Sequence[Image.Image], text: str, times: Sequence[float]
) -> PreparedClip:
    """The CPU part of `attend_clip`.

    Args:
        frames: RGB images of one size.
        text: a prompt for an image, whose place the video takes.
        times: of the frames, in seconds.
    """
    check_supports_clips(lvlm.model.config)
    size: Size = frames[0].size
    if any(frame.size != size for frame in frames) or len(times) != len(frames):
        raise UsageError("the frames of a clip must be of one size, with one time for each")
    problem = f"the processor of {lvlm.name} does not take the video ({size[0]} x {size[1]} pixels) with its text"
    with memory_errors(), processor_errors(problem):
        video = VIDEO_FAMILIES[lvlm.model.config.model_type](lvlm, frames, times)
        before, placeholder, after = text.partition(lvlm.image_text)
        if not placeholder:
            raise UsageError("the prompt has no place for a video")
        inputs = {**lvlm.tokenize(before + video.text + after), **video.inputs}
    if lvlm.dropped_token is not None:
        pad = lvlm.processor.tokenizer.pad_token_id or 0
        inputs = remove_token(inputs, lvlm.dropped_token, side="left", pad=pad)
    lvlm.check_length(inputs["input_ids"].shape[1])
    positions = (inputs["input_ids"][0] == video.token_id).nonzero()[:, 0].numpy()
    t, h, w = video.grid
    per_step = video.lead + h * w
    index = grid(positions[: t * per_step], t, per_step)[:, video.lead :].reshape(t, h, w)
    views = [even_view("whole", cells, video.box) for cells in index]
    return PreparedClip(inputs, views, video.merged_frames)


def check_supports_clips(config: Any) -> None:
    """Raises UsageError for a family that has no video tokens, or whose video tokens are not supported."""
    if config.model_type not in VIDEO_FAMILIES:
        raise UsageError(
            f"video=native: model type '{config.model_type}' has no video tokens that are read here; video=frames "
            f"grounds each frame as an image (families with video=native: {', '.join(sorted(VIDEO_FAMILIES))})"
        )


class VideoTokens(NamedTuple):
    """Frames as a family's model inputs, and where their tokens lie.

    Args:
        inputs: pixels, and what the model needs to position them.
        text: what replaces the image placeholder in the prompt.
        token_id: the placeholder of video features, in the order of `grid`; a family may add one at the very end.
        grid: `(t, h, w)` tokens in time, down and across.
        box: the region of a frame that the grid covers, in its pixels.
        merged_frames: consecutive frames that share a token.
        lead: tokens before each grid `(h, w)` that belong to no cell.
    """

    inputs: dict[str, Any]
    text: str
    token_id: int
    grid: tuple[int, int, int]
    box: Box
    merged_frames: int = 1
    lead: int = 0


MakeTokens = Callable[["AttentionModel", Sequence[Image.Image], Sequence[float]], VideoTokens]
"""A family's rule, from frames of one size and their times in seconds."""


def _qwen2(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """Qwen2-VL, Qwen2.5-VL: two frames are merged in time; of an odd number, the last is repeated."""
    ip = lvlm.processor.image_processor
    size = _pixel_limits(lvlm, len(frames))
    outputs = [ip(images=[frame], size=size, return_tensors="pt") for frame in frames]
    _, rows, columns = outputs[0]["image_grid_thw"][0].tolist()
    merged = ip.temporal_patch_size
    # For an image, the processor repeats the frame along the time axis of a patch: [patch, colour, time, pixel].
    patches = [output["pixel_values"].view(rows * columns, -1, merged, ip.patch_size**2)[:, :, 0] for output in outputs]
    patches += patches[-1:] * (-len(patches) % merged)
    steps = [torch.stack(patches[at : at + merged], 2) for at in range(0, len(patches), merged)]
    t, h, w = len(steps), rows // ip.merge_size, columns // ip.merge_size
    inputs: dict[str, Any] = {
        "pixel_values_videos": torch.cat(steps).flatten(1),
        "video_grid_thw": torch.tensor([[t, rows, columns]]),
    }
    if lvlm.model.config.model_type == "qwen2_5_vl":
        interval = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else _FRAME_INTERVAL
        inputs["second_per_grid_ts"] = [merged * interval]
    text = lvlm.image_text.replace(lvlm.image_token, lvlm.processor.video_token * (t * h * w))
    box = whole_box(frames[0].size)
    return VideoTokens(inputs, text, lvlm.model.config.video_token_id, (t, h, w), box, merged)


def _pixel_limits(lvlm: AttentionModel, num_frames: int) -> dict[str, int]:
    """The least and largest area of a frame in pixels, as the `size` of Qwen's image processors.

    The checkpoint's own limits are per frame in Qwen2-VL and Qwen2.5-VL, and for all frames together in Qwen3-VL and
    Qwen3.5. UsageError for invalid settings.
    """
    ip, settings = lvlm.processor.image_processor, lvlm.video_settings()
    where = f"video=native: the settings for videos of {lvlm.name} have "
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        if (value := settings.get(name)) not in (None, getattr(ip, name)):
            raise UsageError(f"{where}{name}={shown(value)}, those for images {getattr(ip, name)}: they must be equal")
    size = settings["size"] if isinstance(settings.get("size"), dict) else {}
    least, most = (settings.get(old) or size.get(new) for old, new in _PIXEL_LIMITS.items())
    if least is None or most is None:
        cell = (ip.patch_size * ip.merge_size) ** 2
        most = min(MAX_TOKENS * cell, ip.size["longest_edge"])
        return {"shortest_edge": min(MIN_TOKENS * cell, most), "longest_edge": most}
    if not all(isinstance(area, int) and area > 0 for area in (least, most)) or least > most:
        raise UsageError(f"{where}areas from {shown(least)} to {shown(most)} pixels: write them in ascending order")
    share = 1 if lvlm.model.config.model_type in ("qwen2_vl", "qwen2_5_vl") else num_frames
    most = max(1, min(most // share, MAX_PREPARED_PIXELS // num_frames))
    return {"shortest_edge": min(-(-least // share), most), "longest_edge": most}


_PIXEL_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Names of the least and the largest area: those of 2024, and today's."""


def _qwen3(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """Qwen3-VL, Qwen3.5: as Qwen2-VL, but each merged frame follows its mean time, between start and end tokens."""
    video = _qwen2(lvlm, frames, times)
    merged, (t, h, w) = video.merged_frames, video.grid
    placeholder = lvlm.image_text.replace(lvlm.image_token, lvlm.processor.video_token * (h * w))
    padded = [*times, *[times[-1]] * (merged * t - len(times))]
    firsts, lasts = padded[::merged], padded[merged - 1 :: merged]
    middles = [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]
    return video._replace(text="".join(f"<{middle:.1f} seconds>{placeholder}" for middle in middles))


def _llava_onevision(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """LLaVA-OneVision: each frame resized to a square, its grid halved by interpolation; one token ends the video."""
    ip, vision = lvlm.processor.image_processor, lvlm.model.config.vision_config
    side = ip.size["height"]
    pixels = [  # the first tile is the whole image
        ip(images=[frame], image_grid_pinpoints=[[side, side]], return_tensors="pt")["pixel_values"][0, :1]
        for frame in frames
    ]
    patches, covered = patches_of(vision)
    n = math.ceil(patches / 2)
    t, (W, H) = len(frames), frames[0].size
    return VideoTokens(
        {"pixel_values_videos": torch.cat(pixels)[None]},
        lvlm.processor.video_token * (t * n * n + 1),
        lvlm.model.config.video_token_id,
        (t, n, n),
        (0.0, 0.0, covered * W, covered * H),
    )


def _llava_next_video(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """LLaVA-NeXT-Video: the centre crop of each frame, in cells of 2 x 2 patches."""
    config = lvlm.model.config
    return _centre_crops(lvlm, frames, patches_of(config.vision_config)[0] // config.spatial_pool_stride)


def _video_llava(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """Video-LLaVA: the centre crop of each frame, after the vision tower's class token."""
    return _centre_crops(lvlm, frames, patches_of(lvlm.model.config.vision_config)[0], lead=1)


def _centre_crops(lvlm: AttentionModel, frames: Sequence[Image.Image], n: int, lead: int = 0) -> VideoTokens:
    """The centre crop of each frame, after resizing its short side, in `n x n` cells."""
    from transformers import CLIPImageProcessorPil

    own, config, t = lvlm.processor.image_processor, lvlm.model.config, len(frames)
    side = config.vision_config.image_size
    ip = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=own.image_mean,
        image_std=own.image_std,
    )
    pixels = torch.cat([ip(images=[frame], return_tensors="pt")["pixel_values"] for frame in frames])
    return VideoTokens(
        {"pixel_values_videos": pixels[None]},
        lvlm.processor.video_token * (t * (lead + n * n)),
        config.video_token_id,
        (t, n, n),
        cropped_box(ip, whole_box(frames[0].size)),
        lead=lead,
    )


def _internvl(lvlm: AttentionModel, frames: Sequence[Image.Image], times: Sequence[float]) -> VideoTokens:
    """InternVL: each frame resized to one tile, after its number and between start and end tokens."""
    processor, n = lvlm.processor, math.isqrt(lvlm.processor.image_seq_length)
    pixels = [
        processor.image_processor(images=[frame], crop_to_patches=False, return_tensors="pt")["pixel_values"]
        for frame in frames
    ]
    placeholder = processor.start_image_token + lvlm.image_token * (n * n) + processor.end_image_token
    return VideoTokens(
        {"pixel_values": torch.cat(pixels)},
        "\n".join(f"Frame{number}: {placeholder}" for number in range(1, len(frames) + 1)),
        image_token_id(lvlm.model.config),
        (len(frames), n, n),
        whole_box(frames[0].size),
    )


VIDEO_FAMILIES: Mapping[str, MakeTokens] = {
    "internvl": _internvl,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2,
    "video_llava": _video_llava,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen3),
}
"""The families whose video tokens are supported, by `model_type`."""
