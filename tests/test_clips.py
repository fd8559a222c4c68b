"""Clips compared with their pixels, with eager attention, and with the video processors of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import tiny
from front import Front, fronts, read_lines
from PIL import Image

from localization_heads.data.video import Frame, frames, open_video, write_video
from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.sources import video_settings
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.checks.footprints import cell_offset, footprint_colours, sampled_cells
from localization_heads.lvlm.clips import VIDEO_FAMILIES, PreparedClip, prepare_clip
from localization_heads.lvlm.forward.capture import capture
from localization_heads.lvlm.model import LVLM
from localization_heads.stages import chunks
from localization_heads.stages import video as stage

SIZE = (420, 300)
TIMES = (0.0, 0.2, 0.5, 0.6, 0.8)


def moving_coordinates(count: int, size: tuple[int, int] = SIZE) -> list[Image.Image]:
    """Frames whose red encodes x, whose green encodes y, and whose blue encodes their number."""
    x, y = ((np.arange(side) + 0.5) / side * 255 for side in size)
    frames = (np.broadcast_arrays(x[None], y[:, None], 255 * (n + 1) / count) for n in range(count))
    return [Image.fromarray(np.rint(np.stack(channels, -1)).astype(np.uint8)) for channels in frames]


def tiny_clip(name: str, count: int = 5) -> PreparedClip:
    lvlm = tiny(name)
    return prepare_clip(lvlm, moving_coordinates(count), lvlm.prompt("the red car"), TIMES[:count])


def merged(name: str) -> int:
    return 2 if name.startswith("qwen") else 1


@pytest.mark.parametrize("name", sorted(name for name in VIDEO_FAMILIES if not name.endswith("_moe")))
def test_footprints_lie_in_their_frames_and_cells(name: str) -> None:
    """Of five frames, so that the last of merged ones is alone."""
    lvlm, clip = tiny(name), tiny_clip(name)
    assert len(clip.views) == -(-5 // merged(name))
    for place, view in enumerate(clip.views):
        cells = sampled_cells(view, skip_border=False)[:: 1 if place == 0 else 4]
        traced = footprint_colours(lvlm, clip.inputs, [int(view.index[cell]) for cell in cells])
        for cell, (colours, influence) in zip(cells, traced, strict=True):
            assert {round(float(blue) * 5) - 1 for blue in colours[:, 2]} == {
                n for n in range(5) if n // merged(name) == place
            }
            shares = influence if name == "llava_onevision" else None  # interpolation weighs its neighbours
            x, y = np.average(colours[:, :2], axis=0, weights=shares) * SIZE
            assert np.abs(cell_offset(view, cell, (x, y))).max() < 0.25, (place, cell)


@pytest.mark.parametrize("name", sorted(VIDEO_FAMILIES))
def test_maps_equal_eager_attention(name: str) -> None:
    lvlm, clip = tiny(name), tiny_clip(name, 3)
    inputs = lvlm.on_device(clip.inputs)
    with torch.inference_mode(), capture(lvlm.attention_modules) as recorder:
        lvlm.model(**inputs, use_cache=False)
    with eager_attention(lvlm.model), torch.inference_mode():
        attention = lvlm.model(**inputs, output_attentions=True, use_cache=False).attentions
    expected = [one for one in attention if one is not None]
    if len(expected) == lvlm.num_layers:
        expected = [expected[layer] for layer in sorted(recorder.rows)]
    found = lvlm.attend_clip(moving_coordinates(3), "the red car", TIMES[:3])
    assert len(found) == 3
    for layer, full in zip(sorted(recorder.rows), expected, strict=True):
        assert float((recorder.rows[layer] - full[:, :, -1]).abs().max()) < 1e-5
        for number, maps in enumerate(found):
            index = clip.views[number // merged(name)].index
            row = full[0, :, -1].numpy()[:, index]
            np.testing.assert_allclose(maps.attention[layer], row, rtol=0, atol=1e-5)


def test_merged_frames_share_a_map() -> None:
    first, second, third = tiny("qwen2_vl").attend_clip(moving_coordinates(3), "the red car")
    assert np.array_equal(first.attention, second.attention)
    assert not np.allclose(first.attention, third.attention, atol=1e-6)
    assert first.image_size == third.image_size == SIZE
    assert first.image_box == (0, 0, *SIZE)


def with_videos(name: str) -> Any:
    """The family's own processor, with its video half; skips the test without torchvision."""
    pytest.importorskip("torchvision")
    import transformers as hf

    own = tiny(name).processor
    ip, options = own.image_processor, {}
    cell = (getattr(ip, "patch_size", 0) * getattr(ip, "merge_size", 0)) ** 2
    if name.startswith("qwen"):
        kind = hf.Qwen3VLVideoProcessor if "qwen3" in name else hf.Qwen2VLVideoProcessor
        size = {"shortest_edge": 128 * cell, "longest_edge": ip.size["longest_edge"]}
        if "qwen3" in name:  # whose limits are of all frames together
            size = {edge: 6 * pixels for edge, pixels in size.items()}
        videos = kind(patch_size=ip.patch_size, size=size, image_mean=ip.image_mean, image_std=ip.image_std)
    elif name == "llava_onevision":
        videos = hf.LlavaOnevisionVideoProcessor()
        options = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
    elif name == "llava_next_video":
        size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        videos = hf.LlavaNextVideoVideoProcessor(**size)
        options = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    elif name == "video_llava":
        videos = hf.VideoLlavaVideoProcessor()
        options = {"patch_size": 14, "num_additional_image_tokens": 1}
    else:
        videos = hf.InternVLVideoProcessor(size={"height": 224, "width": 224})
        options = {"image_seq_length": 64}
    kind = type(own).__mro__[1]
    return kind(image_processor=ip, tokenizer=own.tokenizer, video_processor=videos, **options)


@pytest.mark.parametrize("name", sorted(VIDEO_FAMILIES))
def test_inputs_equal_those_of_the_video_processor(name: str) -> None:
    """The same tokens and grids, and the same pixels up to rounding in the resizing."""
    lvlm, processor = tiny(name), with_videos(name)
    frames, times = moving_coordinates(6), [n / 5 for n in range(6)]
    ours = prepare_clip(lvlm, frames, lvlm.prompt("the red car"), times).inputs
    placed = processor.video_token
    if name in ("qwen2_vl", "qwen2_5_vl"):
        placed = lvlm.image_text.replace(lvlm.image_token, placed)
    text = lvlm.prompt("the red car").replace(lvlm.image_text, placed)
    theirs = processor(
        text=[text],
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        videos_kwargs={
            "video_metadata": [{"total_num_frames": 6, "fps": 5.0, "frames_indices": list(range(6))}],
            "do_sample_frames": False,
        },
        return_tensors="pt",
    )
    assert set(ours) == set(theirs) - {"video_metadata"}
    for key, value in ours.items():
        if not key.startswith("pixel"):
            assert np.allclose(np.asarray(theirs[key]), np.asarray(value)), key
            continue
        assert value.shape == theirs[key].shape
        assert float((value - theirs[key]).abs().max()) < 0.05, key


AREAS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 60}


@pytest.mark.parametrize(
    ("name", "settings", "grid"),
    [
        ("qwen2_vl", {}, (2, 11, 15)),  # 420 x 300 pixels in cells of 28
        ("qwen2_vl", {"size": AREAS, "patch_size": 14, "fps": 2}, (2, 6, 9)),  # at most 60 cells a frame
        ("qwen2_vl", {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 60}, (2, 6, 9)),
        ("qwen2_vl", {"size": {"shortest_edge": 28 * 28 * 400, "longest_edge": 10**9}}, (2, 17, 24)),
        ("qwen3_vl", {"size": AREAS}, (2, 2, 4)),  # 47,040 pixels for all four frames, cells of 32
    ],
)
def test_video_settings_of_a_checkpoint(
    name: str, settings: dict[str, Any], grid: tuple[int, int, int], tmp_path: Path
) -> None:
    """In a file of their own, or in the processor's, which takes precedence; the default is that of Qwen's code."""
    lvlm = copy(tiny(name))
    for file, content in (
        ("video_preprocessor_config.json", settings),
        ("processor_config.json", {"video_processor": settings}),
    ):
        (tmp_path / file).write_text(json.dumps(content))
        lvlm.video_settings = partial(video_settings, str(tmp_path))
        clip = prepare_clip(lvlm, moving_coordinates(4), lvlm.prompt("the red car"), TIMES[:4])
        assert (len(clip.views), *clip.views[0].index.shape) == grid
        (tmp_path / "video_preprocessor_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patch_size": 16}, "patch_size=16, those for images 14"),
        ({"size": {"shortest_edge": 9, "longest_edge": 4}}, "areas from 9 to 4 pixels"),
        ({"size": {"shortest_edge": "9", "longest_edge": 4}}, "areas from '?9'? to 4 pixels"),
    ],
)
def test_invalid_video_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    lvlm = copy(tiny("qwen2_vl"))
    lvlm.video_settings = lambda: settings
    with pytest.raises(UsageError, match=f"video=native: the settings for videos of .* have {said}"):
        lvlm.attend_clip(moving_coordinates(2), "the red car")


def test_a_broken_file_of_video_settings_is_refused(tmp_path: Path) -> None:
    assert video_settings(str(tmp_path)) == {}
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match="video_preprocessor_config"):
        video_settings(str(tmp_path))


def test_unsupported_clips_are_refused() -> None:
    lvlm, frames = tiny("qwen2_vl"), moving_coordinates(2)
    assert lvlm.attend_clip([], "the red car") == []
    for asked, clip, message in (
        (tiny("llava"), frames, "model type 'llava' has no video tokens"),
        (lvlm, [*frames, Image.new("RGB", (64, 64))], "of one size"),
        (lvlm, frames[:1] * 513, "a clip of 513 frames: 512 at most"),
        (lvlm.with_paraphrases(["{} here"]), frames, "leave out paraphrases="),
    ):
        with pytest.raises(UsageError, match=message):
            asked.attend_clip(clip, "the red car")


# ------------------------------------------------------------------------------------------------------- stages

ASKED = ("video=native", "heads=[1-0,1-2]", "segmenter=none", "conv_mode=plain", "model.name=weights", "k=2")
CLIP = ("stage=ground", "video_file=clip.mp4", "query=the red car", "save_id=one", "fps=null")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL."""
    folder = tmp_path_factory.mktemp("clips") / "weights"
    tiny("qwen2_vl").model.save_pretrained(folder)
    tiny("qwen2_vl").processor.save_pretrained(folder)
    return folder


@pytest.fixture
def front(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Front]:
    """A folder with that model and a clip of seven frames."""
    (tmp_path / "weights").symlink_to(weights)
    with write_video(tmp_path / "clip.mp4", (140, 112), 10) as file:
        for frame in moving_coordinates(7, (140, 112)):
            file.add(np.asarray(frame))
    yield from fronts(tmp_path, monkeypatch, capsys)


def out() -> Path:
    """The folder of the model's results."""
    (folder,) = Path("outputs/localization_heads").iterdir()
    return folder


def lines() -> list[dict[str, Any]]:
    return read_lines(out() / "predictions.jsonl")


def test_a_video_is_grounded_frame_by_frame(front: Front) -> None:
    """In prompts of four frames, of which each two have the same box."""
    front.succeed(*CLIP, *ASKED, "frames_per_prompt=4")
    found = lines()
    assert [line["frame"] for line in found] == list(range(7))
    boxes = [line["bbox"] for line in found]
    assert boxes[:6:2] == boxes[1::2]
    assert open_video(out() / "attention/one_video.mp4").count == 7
    assert (out() / "attention/one_timeline.png").is_file()


def test_each_prompt_holds_its_frames_and_their_times(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    front.succeed(*CLIP, *ASKED, "frames_per_prompt=4")
    assert asked == [pytest.approx([0, 0.1, 0.2, 0.3]), pytest.approx([0.4, 0.5, 0.6])]
    monkeypatch.setattr(stage, "MAX_CLIP_PIXELS", 2 * 140 * 112)
    asked.clear()
    front.succeed(*CLIP, *ASKED, "frames_per_prompt=4", "query=the dog")
    assert [len(times) for times in asked] == [2, 2, 2, 1], "large frames are fewer together"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The times of every clip that a model is shown from now on."""
    asked: list[list[float]] = []
    attend = LVLM.attend_clip

    def watch(lvlm: LVLM, frames: Any, expression: str, times: list[float], **named: Any) -> Any:
        asked.append(list(times))
        return attend(lvlm, frames, expression, times, **named)

    monkeypatch.setattr(LVLM, "attend_clip", watch)
    return asked


def test_an_interrupted_run_resumes_with_the_same_results(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*CLIP, *ASKED, "frames_per_prompt=2")
    front.succeed(*options)
    whole = (out() / "predictions.jsonl").read_bytes()
    (out() / "predictions.jsonl").unlink()
    attend, asked = chunks._attend_clip, []

    def twice(*arguments: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(1)
        return attend(*arguments)

    monkeypatch.setattr(chunks, "_attend_clip", twice)
    assert front.finder(*options).status == 130
    monkeypatch.setattr(chunks, "_attend_clip", attend)
    again = watched(monkeypatch)
    front.succeed(*options)
    assert len(again) == 2, "two of four prompts were in the log"
    assert (out() / "predictions.jsonl").read_bytes() == whole


def test_a_broken_frame_fails_alone(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Iterator[Frame]:
        for frame in frames(*arguments, **named):
            yield frame._replace(image=None) if frame.number == 1 else frame

    monkeypatch.setattr(stage, "frames", broken)
    asked = watched(monkeypatch)
    result = front.finder(*CLIP, *ASKED, "frames_per_prompt=4")
    assert result.status == 1
    assert "one_f000001" in result.out
    assert [line["error"] for line in lines()] == [None, "the frame is broken", *[None] * 5]
    assert asked[0] == pytest.approx([0, 0.2, 0.3])


def test_moving_scenes_are_evaluated_as_clips(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    scenes = ("data=scenes", "scenes.count=2", "scenes.frames=3", "scenes.size=64", "scenes.folder=scenes")
    options = ("stage=evaluate", *scenes, *ASKED, "visualize_batch=false")
    front.succeed(*options, "controls=false")
    assert asked == [pytest.approx([0, 0.2, 0.4])] * 2
    metrics = json.loads((out() / "metrics.json").read_text())
    assert (metrics["choices"]["video"], metrics["choices"]["frames_per_prompt"]) == ("native", 16)
    assert len(lines()) == 6


def test_a_clip_that_the_model_cannot_take_fails(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(LVLM, "run", refuse)
    result = front.finder(*CLIP, *ASKED, "frames_per_prompt=4")
    assert result.status == 1
    assert "the model cannot take its clip: RuntimeError: no" in result.err + result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.name=embedded"], "model type 'llava' has no video tokens"),
        (["zoom=true"], "leave out zoom="),
        (["grounding.contrast=background"], "leave out grounding.contrast="),
        (["signals=true"], "leave out signals="),
        (["heads=greedy", "criteria=robust"], "video=native: sensitivity cannot pick the heads of clips"),
        (["video_file=null", "image_file=a.png"], "video=native needs a video"),
        (["video=frames", "frames_per_prompt=4"], "write video=native"),
        (["frames_per_prompt=0"], "frames_per_prompt"),
        (["stage=find", "data=scenes", "video_file=null"], "video=: stage=find does not read it"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, front: Front) -> None:
    given = {option.partition("=")[0] for option in options}
    rest = [option for option in (*CLIP, *ASKED) if option.partition("=")[0] not in given]
    assert said in front.error(*rest, *options)
