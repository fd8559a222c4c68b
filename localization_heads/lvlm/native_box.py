"""The bounding box that a model itself generates, for the families that were trained to write boxes.

The formats are those of the families' documentation and training data. The embedded model was trained without boxes and
has none; Kosmos-2 writes boxes, but has no grid of image tokens and is refused (`families.REFUSED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from localization_heads.attention import Box, rescale_box
from localization_heads.data.sources import image_at
from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.answers.box_formats import BOX, FORMATS, BoxFormat, read_box
from localization_heads.lvlm.families.geometry import Size

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM


def native_box_format(lvlm: LVLM, native: bool | None, *, by_default: bool) -> BoxFormat | None:
    """The format in which to ask the model for its own boxes; None if it is not to be asked.

    Args:
        native: the option. None asks a model that is known to write boxes, if `by_default`.

    Raises:
        UsageError: the model is not known to write boxes, or has no chat template to ask for them.
    """
    known = lvlm.spec.native_box
    if native is False or (native is None and not (by_default and known)):
        return None
    if known is None:
        raise UsageError(
            f"native=true: {lvlm.name} is not known to write boxes; if it does, say how with model.native_box= one of "
            f"{', '.join(FORMATS)}"
        )
    box_format = FORMATS[known]
    lvlm.box_prompt(box_format, "it")  # raises now, not at the first image, if there is no chat template
    return box_format


def generate_box(lvlm: LVLM, box_format: BoxFormat, image: Image.Image, expression: str) -> tuple[Box | None, str]:
    """The model's own box for an expression (None if it writes none), and its whole answer, greedily generated.

    Raises:
        UsageError: several images.
        WorkError: out of memory.
    """
    import torch

    from localization_heads.lvlm.answers.answering import GREEDY

    image = image_at(image, None)
    seen = lvlm.image_for_processor(image)
    inputs = lvlm.model_inputs([seen], [lvlm.box_prompt(box_format, expression)])
    try:
        with torch.inference_mode():
            ids = lvlm.model.generate(
                **inputs,
                max_new_tokens=box_format.max_new_tokens,
                **GREEDY,
                pad_token_id=lvlm.processor.tokenizer.pad_token_id,
            )
    except torch.OutOfMemoryError as error:
        raise WorkError("out of memory: load the model in fewer bits, or write native=false") from error
    start = 0 if lvlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text = lvlm.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=False).strip()
    box = read_box(text, box_format, seen.size, _resized_size(lvlm, inputs))
    return None if box is None else rescale_box(box, seen.size, image.size), text


def _resized_size(lvlm: LVLM, inputs: Mapping[str, Any]) -> Size | None:
    """`(W, H)` of the image after the processor resized it; None unless it reports the patch grid (Qwen-VL)."""
    if "image_grid_thw" not in inputs:
        return None
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = lvlm.processor.image_processor.patch_size
    return columns * patch, rows * patch


def with_box_span(lvlm: LVLM) -> LVLM:
    """The same loaded model, with the maps of the tokens that spell its own box (`answer_span=box`).

    Raises:
        UsageError: the model is not known to write boxes, or has no chat template to ask for them.
    """
    if (known := lvlm.spec.native_box) is None:
        raise UsageError(
            f"heads_by=vrh: {lvlm.name} is not known to write boxes itself; rank by mass, iou or pointing, or say how "
            f"it writes them with model.native_box= one of {', '.join(FORMATS)}"
        )
    lvlm.box_prompt(FORMATS[known], "it")
    twin = copy(lvlm)
    twin.query_token, twin.answer_span, twin.paraphrases = "answer_span", BOX, None
    twin.answer_tokens = FORMATS[known].max_new_tokens
    return twin
