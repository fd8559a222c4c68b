"""`ground` with `video_file=`: a box in each frame of a video, and a video of the boxes.

The video is read twice: once for the model, a chunk of frames at a time, and once to draw the boxes, so that memory
does not grow with its length. A chunk that a killed run has grounded is read from its log, and not decoded again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from localization_heads.data.samples import Sample
from localization_heads.data.video import Frame, Video, frames, open_video, write_video
from localization_heads.errors import BadEntry, NothingDoneError, UsageError
from localization_heads.grounding.boxes import smoothed
from localization_heads.located import prediction_of
from localization_heads.stages.chunks import Chunk, attend_samples
from localization_heads.stages.entries import Entries
from localization_heads.stages.ground import settings
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.store.files import RunLock, writable_folder
from localization_heads.store.journal import ResultLog
from localization_heads.store.paths import entry_path
from localization_heads.store.results import Prediction, write_predictions

log = logging.getLogger(__name__)

MAX_CHUNK_PIXELS = 24_000_000
"""Of the frames that are in memory together, unless one alone has more."""
MAX_CLIP_PIXELS = 100_000_000
"""The same where they go into one prompt (`video=native`)."""
THUMBNAILS = 8


@dataclass(frozen=True)
class VideoResult:
    """What became of a video.

    Args:
        predictions: one a frame, in their order, those that failed among them.
    """

    video: Video
    query: str
    predictions: Sequence[Prediction]
    paths: Sequence[Path]

    @property
    def failures(self) -> list[BadEntry]:
        return [BadEntry(one.frame or 0, one.id, one.error) for one in self.predictions if one.error]


def ground_video(run: Run) -> VideoResult:
    """The box of the expression in every frame -> `predictions.jsonl`, `<id>_video.mp4`, `<id>_timeline.png`."""
    options = run.options
    options.require("video_file", "query")
    if options.image_file or options.zoom or options.instances == "all":
        raise UsageError("video_file=: leave out image_file=, zoom= and instances=all")
    video, query = open_video(str(options.video_file)), str(options.query)
    id = image_id(run, video.path, query)
    drawn, timeline = (entry_path(run.attention_folder, id, end) for end in ("_video.mp4", "_timeline.png"))
    writable_folder(run.attention_folder)
    with RunLock(run.folder):
        asked = {**settings(run), "video": _identity(video), "query": query, "id": id, "fps": options.fps}
        journal = ResultLog(run.folder, "video", asked)
        found = list(_grounded(run, video, id, journal))
        if all(one.error for one in found):
            first = found[0].error if found else "it has no frame"
            raise NothingDoneError("no frame could be grounded", [BadEntry(0, id, first or "")])
        if lost := _cut_off(video, options.fps, found):
            said = "%s: the last %d or so of the %d frames that its header states are not there"
            log.warning(said, video.path, lost, video.count)
        found = _smoothed(found, options.smoothing)
        write_predictions(
            run.folder / "predictions.jsonl", [replace(one, heads_from=run.heads_from) for one in found]
        )
        thumbnails = _draw(video, options.fps, found, drawn)
        from localization_heads import figures

        timeline = run.draw(figures.plot_timeline, query, found, thumbnails, video.size, path=timeline)
        journal.finish()
    return VideoResult(video, query, found, [drawn, timeline, run.folder / "predictions.jsonl"])


def _identity(video: Video) -> list[Any]:
    """What tells a video from another without reading gigabytes: its facts, its first and its last megabyte."""
    size = video.path.stat().st_size
    with video.path.open("rb") as file:
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return [size, digest.hexdigest(), *video.size, video.rate, video.count]


def _grounded(run: Run, video: Video, id: str, journal: ResultLog) -> Iterator[Prediction]:
    """A prediction a frame, in their order; chunks are cut in the same way in every run."""
    run.check_named_heads()
    run.check_clips()
    size, most = (
        (run.frames_per_clip, MAX_CLIP_PIXELS) if run.frames_per_clip else (run.batch_size, MAX_CHUNK_PIXELS)
    )
    size = max(1, min(size, most // math.prod(video.size)))
    is_logged = cache(
        lambda chunk: journal.get(_key(chunk)) is not None
    )  # of each frame, and it reads the chunk
    looked_at = frames(video, run.options.fps, lambda place: is_logged(place // size))
    with tqdm(desc="frames", unit="frame", disable=None, total=_expected(video, run.options.fps)) as bar:
        number = -1
        while chunk := list(islice(looked_at, size)):
            number += 1
            logged = journal.get(_key(number))
            if logged is None:
                done = _ground_chunk(run, id, chunk)
                journal.append([(_key(number), {"predictions": [one.to_json() for one in done]})])
            else:
                done = [Prediction.from_json(one) for one in logged["predictions"]]
            yield from done
            bar.update(len(chunk))


def _key(chunk: int) -> bytes:
    return chunk.to_bytes(16, "big")


def _cut_off(video: Video, fps: float | None, found: Sequence[Prediction]) -> int:
    """About how many frames are missing at the end; 0 where that may be a header that is not exact."""
    between = 1 if fps is None else max(1, math.ceil(video.rate / fps))
    last = (found[-1].frame or 0) + between if found else 0
    return max(0, video.count - last) if video.count - last > 1 + video.count // 50 else 0


def _expected(video: Video, fps: float | None) -> int | None:
    """How many frames will be looked at, where the header says how many there are."""
    if not video.count:
        return None
    return video.count if fps is None else min(video.count, math.ceil(video.count / video.rate * fps))


def _ground_chunk(run: Run, id: str, chunk: Sequence[Frame]) -> list[Prediction]:
    """What cannot be decoded, or grounded, fails alone."""
    heads = run.named_heads
    calibration = run.calibration_of(heads)
    grounder = run.grounder(heads, calibration)
    entries = Entries([])
    names = {frame.number: f"{id}_f{frame.number:06d}" for frame in chunk}
    opened = [
        (
            Sample(
                frame.image,
                str(run.options.query),
                id=names[frame.number],
                line=frame.number + 1,
                facts={"time": frame.time},
            ),
            frame.image,
        )
        for frame in chunk
        if frame.image is not None
    ]
    extra_prompts = run.extra_prompts(heads, calibration)
    asked = Chunk([sample for sample, _ in opened], frozenset(names.values()), extra_prompts)
    found: dict[str, Prediction] = {}
    for one in attend_samples(run, entries, opened, grounder.last_layer, chunk=asked):
        with entries.skip_on_error(one.sample):
            found[one.sample.id] = prediction_of(one.sample.id, grounder.ground(one.maps, one.image))
    reasons = {failure.id: failure.reason for failure in entries.failures}
    return [
        replace(
            found.get(name) or Prediction(name, error=reasons.get(name, "the frame is broken")),
            frame=frame.number,
            time=frame.time,
        )
        for frame in chunk
        for name in (names[frame.number],)
    ]


def _smoothed(found: Sequence[Prediction], weight: float) -> list[Prediction]:
    if not weight:
        return list(found)
    boxes = smoothed([one.bbox for one in found], weight)
    return [replace(one, bbox=box, raw_bbox=one.bbox) for one, box in zip(found, boxes, strict=True)]


def _draw(
    video: Video, fps: float | None, found: Sequence[Prediction], path: Path
) -> list[tuple[float, Image.Image]]:
    """Write the frames with their boxes; returns a few of them, small, each with its time."""
    from localization_heads.figures.sequences import framed

    last = found[-1].time or 0.0
    rate = (len(found) - 1) / last if last and len(found) > 1 else fps or video.rate
    chosen = set(np.linspace(0, len(found) - 1, min(THUMBNAILS, len(found))).round().astype(int).tolist())
    thumbnails = []
    with write_video(path, video.size, rate) as file:
        for place, (frame, one) in enumerate(zip(frames(video, fps), found, strict=False)):
            if frame.image is None:
                continue
            pixels = framed(frame.image, one)
            file.add(pixels)
            if place in chosen:
                small = Image.fromarray(pixels)
                small.thumbnail((320, 320))
                thumbnails.append((frame.time, small))
    return thumbnails
