"""Videos: frame sampling, hostile input, resumed runs, smoothed boxes, and moving scenes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from front import Front, read_lines
from test_figures import assert_all_text_fits

from localization_heads import figures
from localization_heads.cells import box_iou
from localization_heads.data import video as videos
from localization_heads.data.address import ImageError
from localization_heads.data.video import Frame, frames, open_video, write_video
from localization_heads.grounding.boxes import smooth_boxes
from localization_heads.heads.head import Head
from localization_heads.options.stage_groups import ScenesOptions
from localization_heads.scenes.scene import TEST_SEEDS, moving_scene, render_scene
from localization_heads.scenes.write import write_scenes
from localization_heads.stages import video as stage
from localization_heads.store.results import Prediction, read_predictions


def clip(path: Path, count: int = 10, rate: float = 10, size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frames are uniformly grey, each brighter than the one before."""
    with write_video(path, size, rate) as file:
        for number in range(count):
            file.add(np.full((size[1], size[0], 3), 20 * number, dtype=np.uint8))
    return path


def greys(path: Path, fps: float | None = None) -> list[int]:
    """The numbers of the sampled frames, from their grey level."""
    return [round(float(np.mean(np.array(frame.image))) / 20) for frame in frames(open_video(path), fps)]


# ------------------------------------------------------------------------------------------------------ files


def test_frames_are_sampled_by_fps(tmp_path: Path) -> None:
    path = clip(tmp_path / "clip.mp4")
    video = open_video(path)
    assert (video.size, video.rate, video.count) == ((64, 48), 10, 10)
    assert greys(path) == list(range(10))
    assert greys(path, fps=5) == [0, 2, 4, 6, 8]
    assert greys(path, fps=4) == [0, 3, 5, 8], "the first at or after each quarter of a second"
    assert greys(path, fps=100) == list(range(10)), "no frame comes twice"
    assert [frame.time for frame in frames(video, 5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_known_frames_are_not_decoded(tmp_path: Path) -> None:
    found = list(frames(open_video(clip(tmp_path / "clip.mp4")), 5, lambda place: place < 3))
    assert [frame.number for frame in found] == [0, 2, 4, 6, 8]
    assert [frame.image is None for frame in found] == [True, True, True, False, False]


@pytest.mark.parametrize(("size", "written"), [((65, 47), (64, 48)), ((4000, 30), (1920, 14)), ((1, 1), (2, 2))])
def test_written_video_is_scaled_and_even(size: tuple[int, int], written: tuple[int, int], tmp_path: Path) -> None:
    """The codec needs even sides, and the longer one is limited."""
    assert open_video(clip(tmp_path / "clip.mp4", 2, size=size)).size == written
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_failed_video_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_video(tmp_path / "clip.mp4", (64, 48), 10):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


REFUSED = {
    "text": (b"hello, this is no video", "not a video that can be read"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a video that can be read"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video that can be read"),
    "empty": (b"", "not a video that can be read"),
    "a header only": (b"\x00\x00\x00\x18ftypmp42" + bytes(40), "broken"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_video_is_rejected(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a one-line error, and without output of FFmpeg."""
    content, message = REFUSED[name]
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        open_video(path)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


def test_oversized_video_is_rejected_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match="64 x 48 pixels"):
        open_video(clip(tmp_path / "clip.mp4"))


# ----------------------------------------------------------------------------------------------- boxes over time


def test_smooth_boxes_by_hand() -> None:
    """b_t = w b_(t-1) + (1 - w) x_t, restarted after a gap."""
    boxes = [(0, 0, 10, 10), (8, 0, 18, 10), (8, 4, 18, 14), None, (8, 4, 18, 14)]
    assert list(smooth_boxes(boxes, 0.25)) == [
        (0, 0, 10, 10),
        (6, 0, 16, 10),
        (7.5, 3, 17.5, 13),
        None,
        (8, 4, 18, 14),
    ]
    assert list(smooth_boxes(boxes, 0)) == boxes


def test_timeline_text_fits() -> None:
    """With a long expression, gaps and failures."""
    found = [
        Prediction("a", (0, 0, 8, 8), 0.5, heads=(Head(0, 0),), frame=0, time=0.0, confidence=0.2),
        Prediction("b", error="the frame is broken", frame=1, time=0.2),
        Prediction("c", frame=2, time=0.4, absent=True, presence=0.1),
    ]
    images = [(0.0, videos.Image.new("RGB", (32, 18)))]
    figure = figures.plot_timeline("the dog " * 40, found, images, (32, 18))
    assert_all_text_fits(figure)


# ------------------------------------------------------------------------------------------------------- stage

OPTIONS = (
    "stage=ground", "video_file=clip.mp4", "query=the dog", "heads=[2-0]", "segmenter=none", "save_id=one",
)  # fmt: skip


def test_run_writes_predictions_video_and_timeline(front: Front) -> None:
    clip(Path("clip.mp4"), 6)
    result = front.finder(*OPTIONS, "fps=5", "smoothing=0.5")
    assert result.status == 0, result.err
    lines = read_lines(front.out / "predictions.jsonl")
    assert [(line["frame"], line["time"]) for line in lines] == [(0, 0.0), (2, 0.2), (4, 0.4)]
    boxes = [line["raw_bbox"] for line in lines]
    assert [line["bbox"] for line in lines] == [list(box) for box in smooth_boxes(boxes, 0.5)]
    assert open_video(front.out / "attention/one_video.mp4").count == 3
    assert (front.out / "attention/one_timeline.png").is_file()
    assert [one.frame for one in read_predictions(front.out / "predictions.jsonl")] == [0, 2, 4]
    assert not list(front.out.glob(".video*")), "a completed run deletes its log"


def test_killed_run_resumes_with_identical_results(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(Path("clip.mp4"), 6)
    options = (*OPTIONS, "fps=null", "batch_size=2")
    assert front.finder(*options).status == 0
    expected = (front.out / "predictions.jsonl").read_bytes()
    (front.out / "predictions.jsonl").unlink()
    attend, calls = stage.attend_samples, []

    def once(*arguments, **given):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return attend(*arguments, **given)

    monkeypatch.setattr(stage, "attend_samples", once)
    assert front.finder(*options).status == 130
    calls.clear()
    monkeypatch.setattr(stage, "attend_samples", lambda *a, **b: calls.append(1) or attend(*a, **b))
    assert front.finder(*options).status == 0
    assert len(calls) == 2, "one of three chunks was in the log"
    assert (front.out / "predictions.jsonl").read_bytes() == expected


def test_calibration_signals_are_computed_for_every_frame(front: Front) -> None:
    """`present` needs additional prompts; it is the same as for the frame as an image."""
    clip(Path("clip.mp4"), 2)
    heads = ("heads=[4-4,5-6]", "k=2", "visualize_batch=false")
    scenes = ("data=scenes", "scenes.count=80", "scenes.absent=0.5", "scenes.size=96")
    result = front.finder("stage=calibrate", *scenes, "signals=true", *heads)
    assert result.status == 0, result.err
    options = [option for option in OPTIONS if not option.startswith(("heads", "segmenter"))]
    result = front.finder(*options, *heads, "fps=null", "abstain=0.5")
    assert result.status == 0, result.err
    frame, _ = read_lines(front.out / "predictions.jsonl")
    first = next(frames(open_video(Path("clip.mp4"))))
    assert first.image is not None
    first.image.save("first.png")
    image = ("image_file=first.png", "query=the dog", "save_id=x")
    assert front.finder("stage=ground", *image, *heads).status == 0
    (alone,) = read_lines(front.out / "attention/x_prediction.jsonl")
    assert frame["present"] == pytest.approx(alone["present"], abs=1e-4)
    assert frame["calibrated"] and alone["calibrated"]


def test_frames_after_a_broken_frame_are_read(tmp_path: Path) -> None:
    """The fourth frame is zeroed, for which OpenCV returns the same as at the end of the video."""
    content = bytearray(clip(tmp_path / "clip.mp4").read_bytes())
    starts = [at for at in range(len(content)) if content.startswith(b"\0\0\1\xb6", at)]
    content[starts[3] : starts[4]] = bytes(starts[4] - starts[3])
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    found = list(frames(open_video(path)))
    assert [one.number for one in found if one.image is None] == [3]
    assert [one.number for one in found] == list(range(10))
    assert [one.time for one in found] == pytest.approx(np.arange(10) / 10)
    assert [one.number for one in frames(open_video(path), fps=3.0)] == [0, 4, 7]


def test_broken_frame_is_reported_and_skipped(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(Path("clip.mp4"), 4)

    def broken(*arguments, **given) -> Iterator[Frame]:
        for frame in frames(*arguments, **given):
            yield frame._replace(image=None) if frame.number == 2 else frame

    monkeypatch.setattr(stage, "frames", broken)
    result = front.finder(*OPTIONS, "fps=null")
    assert result.status == 1
    assert "one_f000002" in result.out
    lines = read_lines(front.out / "predictions.jsonl")
    assert [line["error"] for line in lines] == [None, None, "the frame is broken", None]


def test_video_that_ends_early_is_reported(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header claims ten frames, of which ten, then five are read."""
    clip(Path("clip.mp4"), 10)
    message = "the last 5 or so of the 10 frames that its header states are not there"
    assert message not in front.finder(*OPTIONS, "fps=null").err
    monkeypatch.setattr(stage, "frames", lambda *given: islice(frames(*given), 5))
    assert message in front.finder(*OPTIONS, "fps=null", "smoothing=0").err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["video_file=no.mp4"], "no.mp4: no such file"),
        (["image_file=cat.png"], "leave out image_file="),
        (["zoom=true"], "leave out image_file=, zoom="),
        (["engine=ray"], "leave out engine="),
        (["fps=0"], "fps"),
        (["smoothing=1"], "smoothing"),
    ],
)
def test_usage_errors(extra: list[str], message: str, front: Front) -> None:
    clip(Path("clip.mp4"), 2)
    given = {option.partition("=")[0] for option in extra}
    options = [option for option in OPTIONS if option.partition("=")[0] not in given]
    result = front.finder(*options, *extra)
    assert result.status == 2
    assert message in result.err


# ------------------------------------------------------------------------------------------------ moving scenes


@pytest.mark.parametrize("seed", range(3))
def test_moving_scene_is_continuous(seed: int) -> None:
    """It starts as the scene of its seed; then objects move in small steps and keep their size."""
    seed += TEST_SEEDS.start
    first, *rest = moving_scene(seed, 12, size=96)
    scene_of_the_seed = render_scene(seed, size=96)
    assert np.array_equal(first.image, scene_of_the_seed.image)
    assert first.expressions
    assert set(first.expressions) <= set(scene_of_the_seed.expressions)
    before = first
    moved = 0
    for scene in rest:
        assert [one.name for one in scene.objects] == [one.name for one in first.objects]
        for old, new, origin in zip(before.objects, scene.objects, first.objects, strict=True):
            moved += old.box != new.box
            assert box_iou(old.box, new.box) > 0.3, "a step is small"
            size = [new.box[n + 2] - new.box[n] for n in (0, 1)]
            assert size == pytest.approx([origin.box[n + 2] - origin.box[n] for n in (0, 1)], abs=6)
        before = scene
    assert moved > 5


def test_moving_scenes_have_an_entry_per_frame(tmp_path: Path) -> None:
    options = ScenesOptions(count=2, size=64, frames=3, folder=str(tmp_path))
    entries = read_lines(write_scenes(options))
    ids = [f"scene_0000{scene}_f00{frame}" for scene in range(2) for frame in range(3)]
    assert [entry["id"] for entry in entries] == ids
    assert len({entry["prompt"] for entry in entries[:3]}) == 1
    assert {entry["picture"] for entry in entries} == {"scene_00000", "scene_00001"}
    (folder,) = tmp_path.iterdir()
    assert all(cv2.imread(str(folder / entry["image_path"])) is not None for entry in entries)
