"""Check that the true boxes of a data set are in pixels: in coordinates from 0 to 1 or 1000 every score would be 0.

A single wrong box may be an accident; all of them are not. So the data set is judged as a whole, and it is an error
only where no other explanation is left:

- *all* boxes lie within the first pixel of their images, whose sides are longer than `TINY`: coordinates from 0 to 1;
- at least two boxes, and at least half of them, reach far beyond their images (by `BEYOND` of a side), and no
  coordinate exceeds 1000: coordinates from 0 to 1000, or pixels of larger copies. A few such boxes are hand-drawn or
  amodal.

Whatever may be an accident gives a note: some boxes within the first pixel, some beyond their images, or many in
images far larger than 1000 pixels with no coordinate above 1000. In smaller images the two scales cannot be told
apart.
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

TINY = 16
"""Pixels; an object of a smaller image may fill one."""
BEYOND = 0.05
"""Of an image's side; boxes drawn by hand end a little outside."""
FAR_ABOVE = 1250
"""Pixels of the shorter side: boxes of 0..1000 stay in the upper left of such images."""
MANY = 20
LOOKED_AT = 200
"""Images whose headers are read, evenly spread over the data set."""


class TrueBox(NamedTuple):
    """A true box (xyxy), the name of its entry, and the `(W, H)` of its image where that is known."""

    name: str
    box: Box
    size: tuple[int, int] | None


class Suspicion(NamedTuple):
    """What is wrong with the boxes, the index of one that shows it, and whether no accident can explain it."""

    what: str
    first: int
    is_certain: bool


def check_box_scale(boxes: Sequence[TrueBox], source: str) -> None:
    """Raises UsageError, naming `source`, if the boxes are certainly not in pixels; a mere suspicion is a note."""
    if not boxes:
        return
    sizes = np.array([one.size or (0, 0) for one in boxes])
    found = find_wrong_scale(np.array([one.box for one in boxes]), sizes)
    if found is None:
        return
    one = boxes[found.first]
    box = ", ".join(f"{number:g}" for number in one.box)
    size = f" in an image of {one.size[0]} x {one.size[1]} pixels" if one.size else ""
    message = (
        f"{source}: {found.what}, such as [{box}]{size} ({one.name}); boxes must be pixels, [x0, y0, x1, y1]"
    )
    if found.is_certain:
        raise UsageError(message)
    log.warning("%s", message)


def collect_true_boxes(samples: Sequence[Sample]) -> list[TrueBox]:
    """The boxes of the samples that have one, with the sizes of at most `LOOKED_AT` images."""
    boxed = [(sample, box) for sample in samples for box in sample.true_boxes]
    looked_at = set(np.linspace(0, len(boxed) - 1, LOOKED_AT).round()) if len(boxed) > LOOKED_AT else None
    return [
        TrueBox(sample_name(sample), box, _size(sample) if looked_at is None or number in looked_at else None)
        for number, (sample, box) in enumerate(boxed)
    ]


def _size(sample: Sample) -> tuple[int, int] | None:
    """From the header; None for an address, which is not fetched for this, and for what is no image."""
    if is_address(sample.image):
        return None
    try:
        return image_size(sample.single)
    except UsageError:
        return None


def find_wrong_scale(boxes: NDArray[np.floating], sizes: NDArray[np.integer]) -> Suspicion | None:
    """Evidence that boxes `(n, 4)`, xyxy, are not in pixels of images of `sizes` `(n, 2)`, W and H, 0 for unknown.

    >>> boxes = np.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.5, 1.0]])
    >>> find_wrong_scale(boxes, np.array([[640, 480], [640, 480]]))
    Suspicion(what='all 2 boxes lie within the first pixel: they look like 0 to 1', first=0, is_certain=True)
    """
    known = (sizes > 0).all(1)
    in_pixel = ((boxes >= -0.1) & (boxes <= 1.1)).all(1) & ~(known & (sizes <= TINY).any(1))
    if in_pixel.any():
        count = "all" if in_pixel.all() else f"{in_pixel.sum()} of the"
        what = f"{count} {len(boxes)} boxes lie within the first pixel: they look like 0 to 1"
        return Suspicion(what, int(in_pixel.argmax()), bool(in_pixel.all()))
    beyond = known & (boxes[:, 2:] > sizes * (1 + BEYOND)).any(1)
    of_1000 = bool(((boxes >= 0) & (boxes <= 1000)).all())
    if beyond.any():
        count = f"{beyond.sum()} of {known.sum()} boxes reach far beyond their images"
        guess = (
            "they look like 0 to 1000, or like pixels of larger copies" if of_1000 else "of larger copies?"
        )
        certain = of_1000 and beyond.sum() >= max(2, known.sum() / 2)
        return Suspicion(f"{count}: {guess}", int(beyond.argmax()), bool(certain))
    large = (sizes >= FAR_ABOVE).all(1)
    if of_1000 and large.sum() >= MANY and boxes[large].max() > 500:
        what = f"none of the {large.sum()} boxes in images of {FAR_ABOVE} pixels and more passes 1000"
        return Suspicion(f"{what}: do they go from 0 to 1000?", int(large.argmax()), False)
    return None
