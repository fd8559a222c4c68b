"""Videos from users, frame by frame, read and written by OpenCV (FFmpeg inside), which the package needs anyway.

Only containers that hold their own frames are opened, by their first bytes: FFmpeg would also follow playlists, which
name other files and addresses. One decoded frame is in memory at a time.
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
"""That are looked at; more are refused by the length that the header states, or cut off where it states none."""
MOST_BROKEN = 250
"""Broken frames in a row after which a video is over."""
LARGEST_SIDE = 1920
"""Of a video that is written, in pixels."""
_FALLBACK_RATE = 25.0
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET


class Frame(NamedTuple):
    """A frame that was looked at.

    Attributes:
        number: its place in the video, from 0.
        time: in seconds from the beginning.
        image: RGB; None where it cannot be decoded, or is known already.
    """

    number: int
    time: float
    image: Image.Image | None


@dataclass(frozen=True)
class Video:
    """An opened video.

    Args:
        size: `(W, H)` of a frame, upright.
        rate: frames a second, as the header states it.
        count: frames, as the header states it; 0 where it does not.
    """

    path: Path
    size: tuple[int, int]
    rate: float
    count: int


def open_video(source: str | Path) -> Video:
    """The video's facts. ImageError for anything but a video of a known container and of bounded size."""
    path = find_file(source)
    with path.open("rb") as file:
        if not _is_container(file.read(16)):
            raise ImageError(path, "not a video that can be read (MP4, MOV, MKV, WebM or AVI)")
    with _capture(path) as capture:
        width, height = (
            int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if width * height > MAX_PIXELS:
            raise ImageError(
                path, f"{width} x {height} pixels: the limit is {MAX_PIXELS // 1_000_000} million"
            )
        found, pixels = capture.read()
        if not found or pixels is None:
            raise ImageError(path, "broken: its first frame cannot be decoded")
        height, width = pixels.shape[:2]  # upright: the header may speak of a turned one
    rate = rate if math.isfinite(rate) and 0.01 <= rate <= 1000 else _FALLBACK_RATE
    count = int(count) if math.isfinite(count) and 0 < count < 2**40 else 0
    if count > 100 * MAX_FRAMES:
        raise ImageError(path, f"it states {count:,} frames: too many")
    return Video(path, (width, height), rate, count)


def _is_container(beginning: bytes) -> bool:
    if beginning[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return True
    return beginning[:4] == b"\x1a\x45\xdf\xa3" or (beginning[:4] == b"RIFF" and beginning[8:12] == b"AVI ")


@contextmanager
def _capture(path: Path) -> Iterator[Any]:
    """OpenCV's reader of one file, silent."""
    log: Any = getattr(cv2.utils, "logging", cv2)  # of OpenCV 4.9
    before = log.setLogLevel(0)
    capture = None
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise ImageError(path, "broken, or in a coding that cannot be read")
        yield capture
    finally:
        if capture is not None:
            capture.release()
        log.setLogLevel(before)


def frames(
    video: Video, fps: float | None = None, is_known: Callable[[int], bool] = lambda _: False
) -> Iterator[Frame]:
    """The frames of a video in their order, at most `fps` a second: the first at or after each tick.

    One that is broken comes without an image, if a whole one follows.

    Args:
        fps: None for every frame.
        is_known: whether a frame, by its place among those looked at, need not be decoded: it comes without an image.
    """
    with _capture(video.path) as capture:
        tick, looked_at = 0, 0
        for number, time, whole in _grabbed(capture, video):
            if looked_at == MAX_FRAMES:
                return
            if fps is not None and time + 1e-3 < tick / fps:
                continue
            if fps is not None:
                tick = math.floor((time + 1e-3) * fps) + 1
            decodes = whole and not is_known(looked_at)
            yield Frame(number, time, _decoded(capture, video) if decodes else None)
            looked_at += 1


def _grabbed(capture: Any, video: Video) -> Iterator[tuple[int, float, bool]]:
    """Number and time of each frame, and whether it can be read; one that cannot is known by a later one that can."""
    number, broken = -1, 0
    while broken <= MOST_BROKEN:
        if capture.grab():
            yield from ((n, n / video.rate, False) for n in range(number + 1, number + 1 + broken))
            number, broken = number + broken + 1, 0
            yield number, _time(capture, number, video.rate), True
        elif number + broken + 1 < video.count:
            broken += 1
        else:
            return


def _time(capture: Any, number: int, rate: float) -> float:
    """Seconds from the beginning, by the frame's own stamp where it has one."""
    stamp = float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
    return stamp if math.isfinite(stamp) and (stamp > 0 or number == 0) else number / rate


def _decoded(capture: Any, video: Video) -> Image.Image | None:
    found, pixels = capture.retrieve()
    if not found or pixels is None or pixels.shape[:2] != (video.size[1], video.size[0]):
        return None
    return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


class VideoFile:
    """An MP4 that is being written; every frame is scaled to `size`."""

    def __init__(self, writer: Any, size: tuple[int, int]) -> None:
        self._writer, self.size = writer, size

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """One more frame, RGB `[H, W, 3]`."""
        if (pixels.shape[1], pixels.shape[0]) != self.size:
            pixels = np.asarray(cv2.resize(pixels, self.size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        self._writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))


@contextmanager
def write_video(path: Path, size: tuple[int, int], rate: float) -> Iterator[VideoFile]:
    """An MP4 (MPEG-4) that takes its name when the block ends, and is removed if the block raises.

    Args:
        size: `(W, H)` of the frames; larger ones than `LARGEST_SIDE` are scaled down, odd sides made even.
        rate: frames a second.

    Raises:
        WorkError: it cannot be written.
    """
    scale = min(1.0, LARGEST_SIDE / max(size))
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
