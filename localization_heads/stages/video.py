"""`ground` with `video_file=`: a box in each frame of a video, and a video of the boxes.

The video is read twice, once for the model and once to draw the boxes, a chunk of frames at a time, so that memory does
not grow with its length. A run that was killed is resumed: chunks in its log are neither decoded nor grounded again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from localization_heads.data.samples import Sample
from localization_heads.data.video import Frame, Video, frames, open_video, write_video
from localization_heads.errors import BadEntry, NothingDoneError, UsageError
from localization_heads.grounding.boxes import smooth_boxes
from localization_heads.located import prediction_of
from localization_heads.stages.chunks import Chunk, attend_samples
from localization_heads.stages.entries import Entries
from localization_heads.stages.ground import grounding_settings
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.store.files import RunLock, writable_folder
from localization_heads.store.journal import ResultLog
from localization_heads.store.paths import entry_path
from localization_heads.store.results import Prediction, write_predictions

log = logging.getLogger(__name__)

MAX_CHUNK_PIXELS = 24_000_000
"""Pixels of the frames in memory at a time, unless a single frame has more."""
MAX_CLIP_PIXELS = 100_000_000
"""The same if the frames of a chunk share one prompt (`video=native`)."""
NUM_THUMBNAILS = 8


@dataclass(frozen=True)
class VideoResult:
    """The boxes of a video and the files written.

    Args:
        predictions: one per frame, in order, including frames that failed.
    """

    video: Video
    query: str
    predictions: Sequence[Prediction]
    paths: Sequence[Path]

    @property
    def failures(self) -> list[BadEntry]:
        return [BadEntry(one.frame or 0, one.id, one.error) for one in self.predictions if one.error]


def ground_video(run: Run) -> VideoResult:
    """Ground the expression in every frame -> `predictions.jsonl`, `<id>_video.mp4` and `<id>_timeline.png`."""
    from localization_heads import figures

    options = run.options
    options.require("video_file", "query")
    if options.image_file or options.zoom or options.instances == "all":
        raise UsageError("video_file=: leave out image_file=, zoom= and instances=all")
    video, query = open_video(str(options.video_file)), str(options.query)
    id = image_id(run, video.path, query)
    video_path, timeline_path = (
        entry_path(run.attention_folder, id, suffix) for suffix in ("_video.mp4", "_timeline.png")
    )
    predictions_path = run.folder / "predictions.jsonl"
    writable_folder(run.attention_folder)
    with RunLock(run.folder):
        conditions = {
            **grounding_settings(run),
            "video": _identity(video),
            "query": query,
            "id": id,
            "fps": options.fps,
        }
        log_file = ResultLog(run.folder, "video", conditions)
        predictions = list(_ground_frames(run, video, id, log_file))
        if all(one.error for one in predictions):
            reason = predictions[0].error if predictions else "it has no frame"
            raise NothingDoneError("no frame could be grounded", [BadEntry(0, id, reason or "")])
        if missing := _num_missing(video, options.fps, predictions):
            message = "%s: the last %d or so of the %d frames that its header states are not there"
            log.warning(message, video.path, missing, video.count)
        predictions = _smooth(predictions, options.smoothing)
        write_predictions(predictions_path, [replace(one, heads_from=run.heads_from) for one in predictions])
        thumbnails = _draw(video, options.fps, predictions, video_path)
        timeline_path = run.draw(figures.plot_timeline, query, predictions, thumbnails, video.size, path=timeline_path)
        log_file.finish()
    return VideoResult(video, query, predictions, [video_path, timeline_path, predictions_path])


def _identity(video: Video) -> list[Any]:
    """What identifies a video without reading gigabytes: its properties, and a hash of its first and last MiB."""
    size = video.path.stat().st_size
    with video.path.open("rb") as file:
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return [size, digest.hexdigest(), *video.size, video.rate, video.count]


def _ground_frames(run: Run, video: Video, id: str, log_file: ResultLog) -> Iterator[Prediction]:
    """Yield a prediction per frame, in order. Every run splits the frames into the same chunks."""
    run.check_named_heads()
    run.check_clips()
    if run.frames_per_clip:
        size, max_pixels = run.frames_per_clip, MAX_CLIP_PIXELS
    else:
        size, max_pixels = run.batch_size, MAX_CHUNK_PIXELS
    size = max(1, min(size, max_pixels // math.prod(video.size)))
    # Asked for every frame, while an answer reads the whole chunk from the log.
    is_logged = cache(lambda chunk: log_file.get(_chunk_key(chunk)) is not None)
    remaining = frames(video, run.options.fps, lambda frame: is_logged(frame // size))
    with tqdm(desc="frames", unit="frame", disable=None, total=_num_frames(video, run.options.fps)) as bar:
        for number in count():
            if not (chunk := list(islice(remaining, size))):
                return
            key = _chunk_key(number)
            if (logged := log_file.get(key)) is None:
                predictions = _ground_chunk(run, id, chunk)
                log_file.append([(key, {"predictions": [one.to_json() for one in predictions]})])
            else:
                predictions = [Prediction.from_json(one) for one in logged["predictions"]]
            yield from predictions
            bar.update(len(chunk))


def _chunk_key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _num_missing(video: Video, fps: float | None, predictions: Sequence[Prediction]) -> int:
    """About how many frames are missing at the end; 0 if the header may just be inexact."""
    step = 1 if fps is None else max(1, math.ceil(video.rate / fps))
    end = (predictions[-1].frame or 0) + step if predictions else 0
    return max(0, video.count - end) if video.count - end > 1 + video.count // 50 else 0


def _num_frames(video: Video, fps: float | None) -> int | None:
    """How many frames will be grounded; None if the header does not state how many there are."""
    if not video.count:
        return None
    return video.count if fps is None else min(video.count, math.ceil(video.count / video.rate * fps))


def _ground_chunk(run: Run, id: str, chunk: Sequence[Frame]) -> list[Prediction]:
    """A prediction per frame; a frame that cannot be decoded or grounded gets the error as its prediction."""
    heads = run.named_heads
    calibration = run.calibration_for(heads)
    grounder = run.grounder(heads, calibration)
    entries = Entries([])
    ids = {frame.number: f"{id}_f{frame.number:06d}" for frame in chunk}
    loaded = [
        (_frame_sample(frame, frame.image, str(run.options.query), ids[frame.number]), frame.image)
        for frame in chunk
        if frame.image is not None
    ]
    extra_prompts = run.extra_prompts(heads, calibration)
    samples = Chunk([sample for sample, _ in loaded], frozenset(ids.values()), extra_prompts)
    grounded: dict[str, Prediction] = {}
    for one in attend_samples(run, entries, loaded, grounder.last_layer, chunk=samples):
        with entries.skip_on_error(one.sample):
            grounded[one.sample.id] = prediction_of(one.sample.id, grounder.ground(one.maps, one.image))
    reasons = {failure.id: failure.reason for failure in entries.failures}

    def prediction(frame: Frame) -> Prediction:
        id = ids[frame.number]
        failed = Prediction(id, error=reasons.get(id, "the frame is broken"))
        return replace(grounded.get(id, failed), frame=frame.number, time=frame.time)

    return [prediction(frame) for frame in chunk]


def _frame_sample(frame: Frame, image: Image.Image, query: str, id: str) -> Sample:
    return Sample(image, query, id=id, line=frame.number + 1, facts={"time": frame.time})


def _smooth(predictions: Sequence[Prediction], weight: float) -> list[Prediction]:
    """The predictions with boxes smoothed over time (`smoothing=`), keeping the raw boxes beside them."""
    if not weight:
        return list(predictions)
    boxes = smooth_boxes([one.bbox for one in predictions], weight)
    return [replace(one, bbox=box, raw_bbox=one.bbox) for one, box in zip(predictions, boxes, strict=True)]


def _draw(
    video: Video, fps: float | None, predictions: Sequence[Prediction], path: Path
) -> list[tuple[float, Image.Image]]:
    """Write the frames with their boxes as a video -> a few of them as thumbnails, each with its time."""
    from localization_heads.figures.sequences import draw_prediction

    last = predictions[-1].time or 0.0
    rate = (len(predictions) - 1) / last if last and len(predictions) > 1 else fps or video.rate
    num_thumbnails = min(NUM_THUMBNAILS, len(predictions))
    chosen = set(np.linspace(0, len(predictions) - 1, num_thumbnails).round().astype(int).tolist())
    thumbnails = []
    with write_video(path, video.size, rate) as file:
        for index, (frame, one) in enumerate(zip(frames(video, fps), predictions, strict=False)):
            if frame.image is None:
                continue
            pixels = draw_prediction(frame.image, one)
            file.add(pixels)
            if index in chosen:
                small = Image.fromarray(pixels)
                small.thumbnail((320, 320))
                thumbnails.append((frame.time, small))
    return thumbnails
