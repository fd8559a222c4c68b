"""`Located`: a grounding together with its image and expression, which shows, saves and exports itself.

`prediction_of` turns any grounding into a line of `predictions.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from localization_heads.data.masks import encode_mask
from localization_heads.data.samples import Sample
from localization_heads.data.sources import PromptImages, image_at, images_of
from localization_heads.errors import UsageError
from localization_heads.grounding.ground import Grounding
from localization_heads.interop import coco, detections
from localization_heads.store.files import write_json
from localization_heads.store.paths import expand_home
from localization_heads.store.results import ImageShare, Instance, Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


@dataclass(frozen=True, eq=False)
class Located(Grounding):
    """The result of `ground`. A notebook displays it as the heat map, the mask and the box over the image.

    Args:
        image: the RGB image as the model saw it; if the prompt has several, the one at `image_index`.
        expression: the referring expression.
        name: the image's file, or its address without credentials; "" for an image in memory.
        images: all images of a prompt with several; `each` holds one grounding per image.
    """

    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (1, 1)), repr=False)
    expression: str = ""
    name: str = ""
    images: tuple[Image.Image, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, grounding: Grounding, shown: PromptImages, expression: str, name: str = "") -> Located:
        known = {one.name: getattr(grounding, one.name) for one in fields(Grounding)}
        images = images_of(shown) if grounding.each else ()
        image = image_at(shown, grounding.image_index)
        return cls(**known, image=image, expression=expression, name=name, images=images)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the box, the mask and the heat map over the image, and write the figure if a path is given."""
        from localization_heads.figures import plot_grounding, plot_together

        if self.each:
            return plot_together(self.images, self.each, path, expression=self.expression)
        return plot_grounding(self.image, self, path, expression=self.expression)

    def show(self) -> None:
        """Open the figure in a window and block until it is closed; log a warning if there is no display."""
        from localization_heads.figures import show

        show(self.plot())

    def save(self, path: str | Path) -> Path:
        """Write the figure (.png, .jpg, .pdf, .svg) or the values of `to_dict` (.json) atomically; return the path.

        Raises:
            UsageError: another file extension, or a path that cannot be written.
        """
        path = Path(expand_home(str(path)))
        extension = path.suffix.lower()
        if extension not in (*FIGURES, ".json"):
            raise UsageError(f"{path}: it must end in one of {', '.join((*FIGURES, '.json'))}")
        try:
            if extension == ".json":
                write_json(path, self.to_dict())
            else:
                self.plot(path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from error
        return path

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `predictions.jsonl` line (box in pixels, mask as COCO RLE), plus expression and image."""
        line = prediction_of(self.expression, self).to_json()
        del line["id"], line["error"]
        query = {"expression": self.expression, "image": self.name, "image_size": list(self.image_size)}
        return {**query, **line}

    def to_supervision(self) -> Any:
        """`supervision.Detections` with one detection. UsageError if supervision is not installed."""
        return detections.to_supervision([self], [self.expression])

    def to_coco(self) -> dict[str, Any]:
        """A COCO data set with this image and annotation; the function `to_coco` combines several results."""
        return to_coco([self])

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.plot().savefig(content, format="png", dpi=110)
        return content.getvalue()

    def _repr_json_(self) -> dict[str, Any]:
        return self.to_dict()


def to_coco(results: Sequence[Located]) -> dict[str, Any]:
    """Combine results into one COCO data set (`interop.coco`); results of one image share its entry."""
    samples = {
        str(number): Sample(one.name or one.image, one.expression, id=str(number)) for number, one in enumerate(results)
    }
    predictions = [prediction_of(id, one) for id, one in zip(samples, results, strict=True)]
    return coco.to_coco(predictions, samples)


def prediction_of(id: str, grounding: Grounding, several: Sequence[Grounding] | None = None) -> Prediction:
    """A line of `predictions.jsonl`. An absent object has neither box nor mask.

    Args:
        several: with `instances=all`, every object that the expression refers to, `grounding` first.
    """
    present = not grounding.absent
    boxes = None if several is None else [_instance(one) for one in several if present and not one.absent]
    mask = encode_mask(grounding.mask) if not boxes else boxes[0].mask
    return Prediction(
        id,
        bbox=grounding.box if present else None,
        score=grounding.score if present else None,
        mask=mask if present else None,
        heads=grounding.heads,
        boxes=boxes,
        agreement=grounding.agreement,
        confidence=grounding.confidence,
        calibrated=grounding.calibrated,
        presence=grounding.presence,
        absent=grounding.absent,
        image_index=grounding.image_index,
        images=tuple(_image_share(one) for one in grounding.each),
    )


def _image_share(grounding: Grounding) -> ImageShare:
    is_shown = grounding.chosen and not grounding.absent
    return ImageShare(grounding.image_share or 0.0, _instance(grounding) if is_shown else None)


def _instance(grounding: Grounding) -> Instance:
    return Instance(grounding.box, grounding.score, encode_mask(grounding.mask), grounding.confidence)
