"""Clips: frames of a video as the model's own video tokens, in one prompt (`video=native`).

The image processors of transformers make the pixels, frame by frame, and each family's rule lays them out in time: the
video processors do the same and need torchvision (`tests/test_clips.py` compares the two where it is installed).
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
from localization_heads.options.parts import MOST_FRAMES

if TYPE_CHECKING:
    from localization_heads.lvlm.loaded import LoadedModel

FEWEST_CELLS, MOST_CELLS = 128, 768
"""Tokens of two merged frames in Qwen's own preprocessing (qwen-vl-utils), if the image processor allows as many. A
checkpoint's own settings for videos take precedence."""
_SPACING = 0.5
"""Seconds between frames where a clip has only one."""


class Clip(NamedTuple):
    """What becomes of frames.

    Args:
        inputs: pixels, and what the model needs to place them.
        text: what stands in the prompt for the video.
        token: the id that the video's features replace, in the order of `grid`, with perhaps one more at the end.
        grid: `(t, h, w)` tokens in time, down and across.
        box: the region of a frame that they cover, in its pixels.
        together: frames that are merged into one token.
        lead: tokens ahead of each grid `(h, w)`, which have no place.
    """

    inputs: dict[str, Any]
    text: str
    token: int
    grid: tuple[int, int, int]
    box: Box
    together: int = 1
    lead: int = 0


Layout = Callable[["LoadedModel", Sequence[Image.Image], Sequence[float]], Clip]
"""A family's rule, from frames of one size and their times in seconds."""


def _qwen(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """Qwen2-VL, Qwen2.5-VL: two frames are one token in time; the last of an odd number is repeated."""
    ip = lvlm.processor.image_processor
    size = _areas(lvlm, len(frames))
    made = [ip(images=[frame], size=size, return_tensors="pt") for frame in frames]
    _, rows, columns = made[0]["image_grid_thw"][0].tolist()
    together = ip.temporal_patch_size
    # An image is the same frame in all places of a patch: [patch, colour, place in time, pixel].
    patches = [
        one["pixel_values"].view(rows * columns, -1, together, ip.patch_size**2)[:, :, 0] for one in made
    ]
    patches += patches[-1:] * (-len(patches) % together)
    pairs = [torch.stack(patches[at : at + together], 2) for at in range(0, len(patches), together)]
    t, h, w = len(pairs), rows // ip.merge_size, columns // ip.merge_size
    inputs: dict[str, Any] = {
        "pixel_values_videos": torch.cat(pairs).flatten(1),
        "video_grid_thw": torch.tensor([[t, rows, columns]]),
    }
    if lvlm.model.config.model_type == "qwen2_5_vl":
        spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else _SPACING
        inputs["second_per_grid_ts"] = [together * spacing]
    token = lvlm.processor.video_token
    text = lvlm.image_text.replace(lvlm.image_token, token * (t * h * w))
    box = whole_box(frames[0].size)
    return Clip(inputs, text, lvlm.model.config.video_token_id, (t, h, w), box, together)


def _areas(lvlm: LoadedModel, count: int) -> dict[str, int]:
    """The least and the largest area of each of `count` frames in pixels, as Qwen's image processors take them.

    The checkpoint's own are of each frame in Qwen2-VL and Qwen2.5-VL, of all frames together in Qwen3-VL and Qwen3.5.
    UsageError for settings that cannot be meant.
    """
    ip, own = lvlm.processor.image_processor, lvlm.video_settings()
    said = f"video=native: the settings for videos of {lvlm.name} have "
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        if (value := own.get(name)) not in (None, getattr(ip, name)):
            raise UsageError(
                f"{said}{name}={shown(value)}, those for images {getattr(ip, name)}: no model has two"
            )
    size = own["size"] if isinstance(own.get("size"), dict) else {}
    least, most = (own.get(old) or size.get(new) for old, new in _AREAS.items())
    if least is None or most is None:
        cell = (ip.patch_size * ip.merge_size) ** 2
        most = min(MOST_CELLS * cell, ip.size["longest_edge"])
        return {"shortest_edge": min(FEWEST_CELLS * cell, most), "longest_edge": most}
    if not all(isinstance(area, int) and area > 0 for area in (least, most)) or least > most:
        raise UsageError(f"{said}areas from {shown(least)} to {shown(most)} pixels: write two that rise")
    share = 1 if lvlm.model.config.model_type in ("qwen2_vl", "qwen2_5_vl") else count
    most = max(1, min(most // share, MAX_PREPARED_PIXELS // count))
    return {"shortest_edge": min(-(-least // share), most), "longest_edge": most}


_AREAS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Names of the least and the largest area, of 2024 and of now."""


def _qwen3(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """Qwen3-VL, Qwen3.5: the same, each token in time after the mean time of its frames, in marks of its own."""
    made = _qwen(lvlm, frames, times)
    t, h, w = made.grid
    shown = lvlm.image_text.replace(lvlm.image_token, lvlm.processor.video_token * (h * w))
    padded = [*times, *[times[-1]] * (made.together * t - len(times))]
    firsts, lasts = padded[:: made.together], padded[made.together - 1 :: made.together]
    middles = [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]
    return made._replace(text="".join(f"<{middle:.1f} seconds>{shown}" for middle in middles))


def _llava_onevision(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """LLaVA-OneVision: each frame squeezed into a square, its grid halved by interpolation; one more token ends all."""
    ip, vision = lvlm.processor.image_processor, lvlm.model.config.vision_config
    side = ip.size["height"]
    pixels = [  # the first part is the image as a whole
        ip(images=[frame], image_grid_pinpoints=[[side, side]], return_tensors="pt")["pixel_values"][0, :1]
        for frame in frames
    ]
    patches, covered = patches_of(vision)
    n = math.ceil(patches / 2)
    t, (W, H) = len(frames), frames[0].size
    return Clip(
        {"pixel_values_videos": torch.cat(pixels)[None]},
        lvlm.processor.video_token * (t * n * n + 1),
        lvlm.model.config.video_token_id,
        (t, n, n),
        (0.0, 0.0, covered * W, covered * H),
    )


def _llava_next_video(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """LLaVA-NeXT-Video: the centre of each frame, in cells of two by two patches."""
    config = lvlm.model.config
    return _centres(lvlm, frames, patches_of(config.vision_config)[0] // config.spatial_pool_stride)


def _video_llava(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """Video-LLaVA: the centre of each frame; the class token of its tower is kept."""
    return _centres(lvlm, frames, patches_of(lvlm.model.config.vision_config)[0], lead=1)


def _centres(lvlm: LoadedModel, frames: Sequence[Image.Image], n: int, lead: int = 0) -> Clip:
    """The centre of each frame, its short side resized, in `n x n` cells."""
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
    return Clip(
        {"pixel_values_videos": pixels[None]},
        lvlm.processor.video_token * (t * (lead + n * n)),
        config.video_token_id,
        (t, n, n),
        cropped_box(ip, whole_box(frames[0].size)),
        lead=lead,
    )


def _internvl(lvlm: LoadedModel, frames: Sequence[Image.Image], times: Sequence[float]) -> Clip:
    """InternVL: each frame squeezed into one tile, between marks and after its number."""
    processor, n = lvlm.processor, math.isqrt(lvlm.processor.image_seq_length)
    pixels = [
        processor.image_processor(images=[frame], crop_to_patches=False, return_tensors="pt")["pixel_values"]
        for frame in frames
    ]
    shown = processor.start_image_token + lvlm.image_token * (n * n) + processor.end_image_token
    return Clip(
        {"pixel_values": torch.cat(pixels)},
        "\n".join(f"Frame{number}: {shown}" for number in range(1, len(frames) + 1)),
        image_token_id(lvlm.model.config),
        (len(frames), n, n),
        whole_box(frames[0].size),
    )


LAYOUTS: Mapping[str, Layout] = {
    "internvl": _internvl,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "video_llava": _video_llava,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen3),
}
"""The families whose video tokens are read, by `model_type`."""


def check_supports_clips(config: Any) -> None:
    """UsageError for a family whose video tokens cannot be read, or that has none."""
    if config.model_type not in LAYOUTS:
        raise UsageError(
            f"video=native: model type '{config.model_type}' has no video tokens that are read here; video=frames "
            f"grounds each frame as an image (families with video=native: {', '.join(sorted(LAYOUTS))})"
        )


class ReadyClip(NamedTuple):
    """A clip in its prompt, as the model's inputs on the CPU, with a view for each of its tokens in time."""

    inputs: dict[str, Any]
    views: list[View]
    together: int


def make_clip_ready(
    lvlm: LoadedModel, frames: Sequence[Image.Image], text: str, times: Sequence[float]
) -> ReadyClip:
    """The processor's share of `attend_clip`.

    Args:
        frames: RGB images of one size.
        text: a prompt for an image, whose place the video takes.
        times: of the frames, in seconds.
    """
    check_supports_clips(lvlm.model.config)
    size: Size = frames[0].size
    if any(frame.size != size for frame in frames) or len(times) != len(frames):
        raise UsageError("the frames of a clip are of one size, and each has its time")
    what = (
        f"the processor of {lvlm.name} does not take the video ({size[0]} x {size[1]} pixels) with its text"
    )
    with memory_errors(), processor_errors(what):
        clip = LAYOUTS[lvlm.model.config.model_type](lvlm, frames, times)
        before, mark, after = text.partition(lvlm.image_text)
        if not mark:
            raise UsageError("the prompt has no place for a video")
        inputs = {**lvlm.tokenize(before + clip.text + after), **clip.inputs}
    if lvlm.dropped_token is not None:
        pad = lvlm.processor.tokenizer.pad_token_id or 0
        inputs = remove_token(inputs, lvlm.dropped_token, side="left", pad=pad)
    lvlm.check_length(inputs["input_ids"].shape[1])
    places = (inputs["input_ids"][0] == clip.token).nonzero()[:, 0].numpy()
    t, h, w = clip.grid
    each = clip.lead + h * w
    index = grid(places[: t * each], t, each)[:, clip.lead :].reshape(t, h, w)
    return ReadyClip(inputs, [even_view("whole", cells, clip.box) for cells in index], clip.together)


def attend_clip(
    lvlm: LoadedModel,
    frames: Sequence[Image.Image],
    expression: str,
    times: Sequence[float] | None = None,
    last_layer: int | None = None,
) -> list[AttentionMaps]:
    """The maps of each frame of a clip that the model is shown in one prompt.

    Frames that are merged into one token have the same map. Attention is shared out over all frames, so that a map's
    sums are smaller than an image's.

    Args:
        frames: RGB images of one size, in their order.
        times: of the frames, in seconds; None takes two frames a second.
        last_layer: as of `LVLM.attend`.

    Raises:
        UsageError: the family has no video tokens that are read, the frames are too many for the model's context, or
            it was changed, or is asked in paraphrases, in a way that is about images.
    """
    if not frames:
        return []
    if len(frames) > MOST_FRAMES:
        raise UsageError(f"a clip of {len(frames)} frames: {MOST_FRAMES} at most go into one prompt")
    if lvlm.paraphrases:
        raise UsageError("video=native: leave out paraphrases=, which asks about images")
    if lvlm.changes:
        raise UsageError(
            "a model whose heads are switched off or steered is asked about images, not about clips"
        )
    if not lvlm.image_comes_first:
        raise UsageError("video=native: the chat template puts the video after the text; use conv_mode=plain")
    times = [_SPACING * n for n in range(len(frames))] if times is None else times
    prompt = lvlm.located_prompt(expression)
    seen = [lvlm.image_for_processor(image_at(frame, None)) for frame in frames]
    ready = make_clip_ready(lvlm, seen, prompt.text, times)
    query = lvlm.query([prompt], ready.inputs)
    with memory_errors():
        found = lvlm.answered(lambda: lvlm.on_device(ready.inputs), query, [expression], last_layer)
        (one,) = found
    maps = [lvlm.maps(one, [[view]], seen[0], expression, prompt.text) for view in ready.views]
    return [maps[number // ready.together] for number in range(len(frames))]
