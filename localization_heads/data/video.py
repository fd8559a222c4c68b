"""Read untrusted videos frame by frame, and write MP4, with OpenCV (FFmpeg inside).

Only containers that hold their own frames are opened, judged by their first bytes: FFmpeg would also follow playlists,
which can point to other files and addresses. One decoded frame is in memory at a time.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.data.address import ImageError
from localization_heads.data.images import MAX_PIXELS, find_file
from localization_heads.errors import WorkError

MAX_FRAMES = 1_000_000
"""Frames that are read from one video; the rest is ignored. A header that claims 100 times as many is rejected."""
MAX_BROKEN_FRAMES = 250
"""Consecutive unreadable frames after which a video counts as finished."""
MAX_OUTPUT_SIDE = 1920
"""Longer side of a written video, in pixels."""
_FALLBACK_RATE = 25.0
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        number: its index in the video, from 0.
        time: seconds from the start.
        image: RGB; None if it cannot be decoded, or was not needed (`is_known`).
    """

    number: int
    time: float
    image: Image.Image | None


@dataclass(frozen=True)
class Video:
    """An opened video.

    Args:
        size: `(W, H)` of a frame, upright.
        rate: frames per second according to the header.
        count: number of frames according to the header; 0 if it does not say.
    """

    path: Path
    size: tuple[int, int]
    rate: float
    count: int


def open_video(source: str | Path) -> Video:
    """Read a video's size, rate and length. ImageError unless it is a known container within the size limits."""
    path = find_file(source)
    with path.open("rb") as file:
        if not _is_container(file.read(16)):
            raise ImageError(path, "not a video that can be read (MP4, MOV, MKV, WebM or AVI)")
    with _open_capture(path) as capture:
        width, height = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if width * height > MAX_PIXELS:
            raise ImageError(path, f"{width} x {height} pixels: the limit is {MAX_PIXELS // 1_000_000} million")
        ok, pixels = capture.read()
        if not ok or pixels is None:
            raise ImageError(path, "broken: its first frame cannot be decoded")
        height, width = pixels.shape[:2]  # the upright size; the header may give the rotated one
    rate = rate if math.isfinite(rate) and 0.01 <= rate <= 1000 else _FALLBACK_RATE
    count = int(count) if math.isfinite(count) and 0 < count < 2**40 else 0
    if count > 100 * MAX_FRAMES:
        raise ImageError(path, f"its header claims {count:,} frames: too many")
    return Video(path, (width, height), rate, count)


def _is_container(beginning: bytes) -> bool:
    if beginning[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return True
    return beginning[:4] == b"\x1a\x45\xdf\xa3" or (beginning[:4] == b"RIFF" and beginning[8:12] == b"AVI ")


@contextmanager
def _open_capture(path: Path) -> Iterator[Any]:
    """OpenCV's reader for one file, with logging turned off."""
    log: Any = getattr(cv2.utils, "logging", cv2)  # `cv2` itself in OpenCV 4.9
    previous_level = log.setLogLevel(0)
    capture = None
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise ImageError(path, "broken, or in an unsupported codec")
        yield capture
    finally:
        if capture is not None:
            capture.release()
        log.setLogLevel(previous_level)


def frames(
    video: Video, fps: float | None = None, is_known: Callable[[int], bool] = lambda _: False
) -> Iterator[Frame]:
    """Yield the frames of a video in order, at most `fps` per second: the first at or after each tick.

    An unreadable frame is yielded without an image if a readable one follows.

    Args:
        fps: None for every frame.
        is_known: takes a frame's index among the frames yielded; where true, the frame is not decoded (a cached result
            makes it unnecessary) and has no image.
    """
    with _open_capture(video.path) as capture:
        tick, sampled = 0, 0
        for number, time, is_intact in _grab_frames(capture, video):
            if sampled == MAX_FRAMES:
                return
            if fps is not None and time + 1e-3 < tick / fps:
                continue
            if fps is not None:
                tick = math.floor((time + 1e-3) * fps) + 1
            needed = is_intact and not is_known(sampled)
            yield Frame(number, time, _decode_frame(capture, video) if needed else None)
            sampled += 1


def _grab_frames(capture: Any, video: Video) -> Iterator[tuple[int, float, bool]]:
    """Yield number, time and readability of each frame. Unreadable frames are yielded once a readable one follows."""
    number, broken = -1, 0
    while broken <= MAX_BROKEN_FRAMES:
        if capture.grab():
            yield from ((n, n / video.rate, False) for n in range(number + 1, number + 1 + broken))
            number, broken = number + broken + 1, 0
            yield number, _frame_time(capture, number, video.rate), True
        elif number + broken + 1 < video.count:
            broken += 1
        else:
            return


def _frame_time(capture: Any, number: int, rate: float) -> float:
    """Seconds from the start, from the frame's own timestamp if it has one."""
    timestamp = float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
    return timestamp if math.isfinite(timestamp) and (timestamp > 0 or number == 0) else number / rate


def _decode_frame(capture: Any, video: Video) -> Image.Image | None:
    ok, pixels = capture.retrieve()
    if not ok or pixels is None or pixels.shape[:2] != (video.size[1], video.size[0]):
        return None
    return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


class VideoFile:
    """An MP4 that is being written; frames are scaled to `size`."""

    def __init__(self, writer: Any, size: tuple[int, int]) -> None:
        self._writer, self.size = writer, size

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Append a frame, RGB `[H, W, 3]`."""
        if (pixels.shape[1], pixels.shape[0]) != self.size:
            pixels = np.asarray(cv2.resize(pixels, self.size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        self._writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))


@contextmanager
def write_video(path: Path, size: tuple[int, int], rate: float) -> Iterator[VideoFile]:
    """Write an MP4 (MPEG-4) atomically: it appears at `path` when the block ends, and not at all if the block raises.

    Args:
        size: `(W, H)` of the frames. Sides above `MAX_OUTPUT_SIDE` are scaled down, and odd sides made even.
        rate: frames per second.

    Raises:
        WorkError: it cannot be written.
    """
    scale = min(1.0, MAX_OUTPUT_SIDE / max(size))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in size)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".mp4", prefix=f".{path.stem[:80]}-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
        if not writer.isOpened():
            raise WorkError(f"cannot write {path}: OpenCV has no encoder for MP4 here")
        try:
            yield VideoFile(writer, (width, height))
        finally:
            writer.release()
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
