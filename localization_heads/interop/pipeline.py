"""`pipeline`: grounding behind the interface of a transformers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localization_heads.data.images import ImageSource, load_image
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head
from localization_heads.locating import ground
from localization_heads.options.groups import GroundingOptions

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.heads.ranking import HeadRanking
    from localization_heads.lvlm.model import LVLM


class GroundingPipeline:
    """Called with an image and expressions, it answers in the format of transformers' object detection pipelines.

    Args:
        lvlm: the loaded model.
        heads: the heads whose maps are summed; None for the default of `ground`.
        options: the read-out, from maps to a box.
    """

    task = "visual-grounding"

    def __init__(
        self,
        lvlm: LVLM,
        heads: Sequence[Head] | HeadRanking | None = None,
        options: GroundingOptions | None = None,
    ) -> None:
        self.lvlm, self.heads, self.options = lvlm, heads, options

    def __repr__(self) -> str:
        return f"GroundingPipeline({self.lvlm.name})"

    def __call__(
        self, image: ImageSource, expressions: str | Sequence[str]
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """`{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}, "mask"}`; a list for several expressions.

        The box is in whole pixels, the mask a PIL image of mode L with 255 inside, as in transformers.

        Args:
            image: an image, a path or an http(s) address.

        Raises:
            UsageError: an image or an expression that cannot be used.
        """
        opened = load_image(image)
        if isinstance(expressions, str):
            return self._answer(opened, expressions)
        return [self._answer(opened, expression) for expression in expressions]

    def _answer(self, image: Image.Image, expression: str) -> dict[str, Any]:
        return answer_of(ground(self.lvlm, image, expression, self.heads, options=self.options), expression)


def answer_of(grounding: Grounding, label: str) -> dict[str, Any]:
    """A grounding as one entry of a transformers pipeline's output."""
    from PIL import Image

    corners = zip(("xmin", "ymin", "xmax", "ymax"), grounding.box, strict=True)
    return {
        "label": label,
        "score": grounding.score,
        "box": {name: round(edge) for name, edge in corners},
        "mask": Image.fromarray(grounding.mask).convert("L"),
    }


def pipeline(
    model: str | LVLM = "tiny",
    heads: Sequence[Head] | HeadRanking | None = None,
    *,
    options: GroundingOptions | None = None,
    **loading: Any,
) -> GroundingPipeline:
    """A pipeline for a model by name, or for a loaded one.

    Args:
        loading: further arguments of `load_model`.

    Raises:
        UsageError, WorkError: as `load_model` does.
    """
    from localization_heads.lvlm.loading import load_model
    from localization_heads.lvlm.model import LVLM

    lvlm = model if isinstance(model, LVLM) else load_model(model, **loading)
    return GroundingPipeline(lvlm, heads, options)
