"""`pipeline`: grounding with the interface of a transformers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localization_heads.arguments import Heads, ReadOut
from localization_heads.grounding.ground import Grounding
from localization_heads.locating import ground

if TYPE_CHECKING:
    from localization_heads.data.sources import AnyImage
    from localization_heads.lvlm.model import LVLM


class GroundingPipeline:
    """A callable that returns groundings in the output format of transformers' object detection pipelines.

    Args:
        lvlm: the loaded model.
        heads: the heads whose maps are added; None for the default of `ground`.
        options: the read-out, from maps to a box.
    """

    task = "visual-grounding"

    def __init__(self, lvlm: LVLM, heads: Heads = None, options: ReadOut = None) -> None:
        self.lvlm, self.heads, self.options = lvlm, heads, options

    def __repr__(self) -> str:
        return f"GroundingPipeline({self.lvlm.name})"

    def __call__(self, image: AnyImage, expressions: str | Sequence[str]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return `{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}, "mask"}`, or a list of these for several.

        As in transformers, the box is in whole pixels and the mask a PIL image of mode L that is 255 inside.

        Args:
            image: as in `ground`.
            expressions: a text, a list of texts, or several texts joined by semicolons, "the dog; the cat".

        Raises:
            UsageError: an unusable image or expression.
        """
        texts = [expressions] if isinstance(expressions, str) else list(expressions)
        results = ground(self.lvlm, image, texts, self.heads, options=self.options)
        outputs = [answer_of(result, result.expression) for result in results]
        return outputs[0] if isinstance(expressions, str) and len(outputs) == 1 else outputs


def answer_of(grounding: Grounding, label: str) -> dict[str, Any]:
    """A grounding in the output format of a transformers pipeline."""
    from PIL import Image

    corners = zip(("xmin", "ymin", "xmax", "ymax"), grounding.box, strict=True)
    return {
        "label": label,
        "score": grounding.score,
        "box": {name: round(edge) for name, edge in corners},
        "mask": Image.fromarray(grounding.mask).convert("L"),
    }


def pipeline(
    model: str | LVLM = "tiny", heads: Heads = None, *, options: ReadOut = None, **loading: Any
) -> GroundingPipeline:
    """A pipeline for a loaded model, or for one by name.

    Args:
        loading: further arguments of `load_model`.

    Raises:
        UsageError, WorkError: as `load_model` does.
    """
    from localization_heads.lvlm.checkpoints.loading import load_model
    from localization_heads.lvlm.model import LVLM

    lvlm = model if isinstance(model, LVLM) else load_model(model, **loading)
    return GroundingPipeline(lvlm, heads, options)
