"""The box that a model writes itself, for the families that were trained to: how to ask, and how to read the answer.

The formats are those of the families' own documentation and training data. The embedded model was trained on text
alone and writes none; Kosmos-2, which does, has no grid of image tokens and is refused (`families.REFUSED`).
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


def native_box_format(lvlm: LVLM, wanted: bool | None, *, by_default: bool) -> BoxFormat | None:
    """How the model is to be asked for its own boxes; None if it is not.

    Args:
        wanted: None asks a model that is known to write boxes, if it is to be asked `by_default`.

    Raises:
        UsageError: boxes are wanted of a model that is not known to write any, or without the chat template for it.
    """
    known = lvlm.spec.native_box
    if wanted is False or (wanted is None and not (by_default and known)):
        return None
    if known is None:
        raise UsageError(
            f"native=true: {lvlm.name} is not known to write boxes; if it does, say how with model.native_box= one of "
            f"{', '.join(FORMATS)}"
        )
    form = FORMATS[known]
    lvlm.box_prompt(form, "it")  # raises now, not at the first image, if there is no chat template
    return form


def generate_box(lvlm: LVLM, form: BoxFormat, image: Image.Image, expression: str) -> tuple[Box | None, str]:
    """The model's own box of an expression, and its whole answer, greedily generated.

    Raises:
        UsageError: several images.
        WorkError: out of memory.
    """

    import torch

    from localization_heads.lvlm.answers.answering import GREEDY

    image = image_at(image, None)
    seen = lvlm.image_for_processor(image)
    inputs = lvlm.model_inputs([seen], [lvlm.box_prompt(form, expression)])
    try:
        with torch.inference_mode():
            ids = lvlm.model.generate(
                **inputs,
                max_new_tokens=form.max_new_tokens,
                **GREEDY,
                pad_token_id=lvlm.processor.tokenizer.pad_token_id,
            )
    except torch.OutOfMemoryError as error:
        raise WorkError("out of memory: load the model in fewer bits, or write native=false") from error
    start = 0 if lvlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text = lvlm.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=False).strip()
    box = read_box(text, form, seen.size, _resized(lvlm, inputs))
    return None if box is None else rescale_box(box, seen.size, image.size), text


def _resized(lvlm: LVLM, inputs: Mapping[str, Any]) -> Size | None:
    """`(W, H)` of the image as the model saw it, where the processor says so in patches (Qwen-VL)."""
    if "image_grid_thw" not in inputs:
        return None
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = lvlm.processor.image_processor.patch_size
    return columns * patch, rows * patch


def with_box_span(lvlm: LVLM) -> LVLM:
    """The same loaded model, whose maps are those of the tokens that spell its own box (answer_span=box).

    Raises:
        UsageError: it is not known to write any, or brings no chat template for it.
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
