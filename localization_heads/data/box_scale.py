"""Check that a data set's ground-truth boxes are in pixels. Normalised boxes (0 to 1, or 0 to 1000) would all score 0.

A single bad box may be an annotation mistake, so the data set is judged as a whole. It is an error only if nothing
else explains it:

- *all* boxes lie within the first pixel of images with sides above `TINY_IMAGE_SIDE`: coordinates from 0 to 1;
- at least half of the boxes, and at least two, extend past their images by more than `OVERHANG` of a side, and no
  coordinate exceeds 1000: coordinates from 0 to 1000, or pixels of a larger copy of the image. (Hand-drawn and amodal
  boxes extend past the image too, but they are few.)

Weaker evidence gives a warning: some boxes within the first pixel, some past their images, or many boxes in images
far larger than 1000 pixels without a coordinate above 1000. In smaller images the two scales are indistinguishable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.data.address import is_address
from localization_heads.data.images import image_size
from localization_heads.data.samples import Sample, sample_name
from localization_heads.errors import UsageError

log = logging.getLogger(__name__)

TINY_IMAGE_SIDE = 16
"""In pixels. In an image this small, a box of one pixel is plausible."""
OVERHANG = 0.05
"""Share of a side by which a hand-drawn box may extend past its image."""
LARGE_IMAGE_SIDE = 1250
"""Pixels of the shorter side; in such images boxes of 0 to 1000 never reach the right and bottom edges."""
MIN_LARGE_IMAGES = 20
MAX_HEADERS_READ = 200
"""Images whose headers are read, evenly spaced over the data set."""


class TrueBox(NamedTuple):
    """A ground-truth box (xyxy), the name of its sample, and its image's `(W, H)` where known."""

    name: str
    box: Box
    size: tuple[int, int] | None


class ScaleProblem(NamedTuple):
    """What is wrong with the boxes, the index of an example, and whether it is an error or a warning."""

    description: str
    example: int
    is_error: bool


def check_box_scale(boxes: Sequence[TrueBox], source: str) -> None:
    """Raise UsageError, naming `source`, if the boxes are certainly not in pixels; warn if they may not be."""
    if not boxes:
        return
    sizes = np.array([box.size or (0, 0) for box in boxes])
    problem = find_scale_problem(np.array([box.box for box in boxes]), sizes)
    if problem is None:
        return
    example = boxes[problem.example]
    coordinates = ", ".join(f"{number:g}" for number in example.box)
    size = f" in an image of {example.size[0]} x {example.size[1]} pixels" if example.size else ""
    message = (
        f"{source}: {problem.description}, such as [{coordinates}]{size} ({example.name}); "
        "boxes must be pixels, [x0, y0, x1, y1]"
    )
    if problem.is_error:
        raise UsageError(message)
    log.warning("%s", message)


def collect_true_boxes(samples: Sequence[Sample]) -> list[TrueBox]:
    """All ground-truth boxes of the samples, with the sizes of at most `MAX_HEADERS_READ` images."""
    boxed = [(sample, box) for sample in samples for box in sample.true_boxes]
    with_size = set(np.linspace(0, len(boxed) - 1, min(len(boxed), MAX_HEADERS_READ)).round())
    return [
        TrueBox(sample_name(sample), box, _image_size(sample) if number in with_size else None)
        for number, (sample, box) in enumerate(boxed)
    ]


def _image_size(sample: Sample) -> tuple[int, int] | None:
    """`(W, H)` from the file's header. None for an address, which is not fetched, and for an unreadable image."""
    if is_address(sample.image):
        return None
    try:
        return image_size(sample.single)
    except UsageError:
        return None


def find_scale_problem(boxes: NDArray[np.floating], sizes: NDArray[np.integer]) -> ScaleProblem | None:
    """Evidence that boxes `(n, 4)`, xyxy, are not in pixels of images of sizes `(n, 2)`, W and H, 0 where unknown.

    >>> boxes = np.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 1.0]])
    >>> find_scale_problem(boxes, np.array([[640, 480], [640, 480]]))
    ScaleProblem(description='all 2 boxes lie within the first pixel: they look like 0 to 1', example=0, is_error=True)
    """
    has_size = (sizes > 0).all(1)
    in_first_pixel = ((boxes >= -0.1) & (boxes <= 1.1)).all(1) & ~(has_size & (sizes <= TINY_IMAGE_SIDE).any(1))
    if in_first_pixel.any():
        count = "all" if in_first_pixel.all() else f"{in_first_pixel.sum()} of the"
        description = f"{count} {len(boxes)} boxes lie within the first pixel: they look like 0 to 1"
        return ScaleProblem(description, int(in_first_pixel.argmax()), bool(in_first_pixel.all()))
    beyond = has_size & (boxes[:, 2:] > sizes * (1 + OVERHANG)).any(1)
    within_1000 = bool(((boxes >= 0) & (boxes <= 1000)).all())
    if beyond.any():
        count = f"{beyond.sum()} of {has_size.sum()} boxes reach far beyond their images"
        explanation = "of larger copies?"
        if within_1000:
            explanation = "they look like 0 to 1000, or like pixels of larger copies"
        is_error = within_1000 and beyond.sum() >= max(2, has_size.sum() / 2)
        return ScaleProblem(f"{count}: {explanation}", int(beyond.argmax()), bool(is_error))
    large = (sizes >= LARGE_IMAGE_SIDE).all(1)
    if within_1000 and large.sum() >= MIN_LARGE_IMAGES and boxes[large].max() > 500:
        description = f"none of the {large.sum()} boxes in images of {LARGE_IMAGE_SIDE} pixels and more passes 1000"
        return ScaleProblem(f"{description}: do they go from 0 to 1000?", int(large.argmax()), False)
    return None
