"""The box that a model writes itself, for the families that were trained to: how to ask, and how to read the answer.

The formats are those of the families' own documentation and training data. The embedded model was trained on text
alone and writes none; Kosmos-2, which does, has no grid of image tokens and is refused (`families.REFUSED`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localization_heads.attention import Box, rescaled
from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.geometry import Size, padded_box, whole_box
from localization_heads.lvlm.prompts import clean_expression

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM


_NUMBER = r"\s*(-?\d{1,7}(?:\.\d{0,17})?)\s*"
_LIST = r"\[" + ",".join([_NUMBER] * 4) + r"\]"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
_JSON = 'Locate {expression} in the image. Answer with one JSON object: {{"bbox_2d": [x1, y1, x2, y2]}}'


@dataclass(frozen=True)
class BoxFormat:
    """How a family is asked for a box, and how it writes one.

    Args:
        prompt: the question; `{expression}` stands in it.
        pattern: regular expression with a group for each of the four numbers; its first match counts.
        steps: numbers from one side of the image to the other; None for pixels of the image as it was resized.
        offset: added to each number: bins stand for their middle.
        rows_first: y0 x0 y1 x1 instead of x0 y0 x1 y1.
        padded: the numbers count over the padded square, not over the image.
        chat: asked in the model's chat template, not bare.
        max_new_tokens: length of the longest answer.
    """

    prompt: str
    pattern: str = _LIST
    steps: float | None = 1000
    offset: float = 0.0
    rows_first: bool = False
    padded: bool = False
    chat: bool = True
    max_new_tokens: int = 128

    def question(self, expression: str) -> str:
        return self.prompt.format(expression=expression)


FORMATS: dict[str, BoxFormat] = {
    # numbers from 0 to 1 over the padded square
    "llava": BoxFormat(_REGION + "{expression}", steps=1, padded=True),
    # <|box_start|>(x1,y1),(x2,y2)<|box_end|>
    "qwen2": BoxFormat("Output the bounding box of {expression} in the image.", _PAIRS),
    # JSON with pixels of the resized image
    "qwen2_5": BoxFormat(_JSON, steps=None),
    # JSON with thousandths
    "qwen3": BoxFormat(_JSON, max_new_tokens=1024),
    # <ref>...</ref><box>[[x1, y1, x2, y2]]</box>
    "internvl": BoxFormat(_REGION + "<ref>{expression}</ref>"),
    # after its thoughts: <|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>
    "glm": BoxFormat(
        "Give the bounding box of {expression} in the image as [[x1,y1,x2,y2]].",
        r"<\|begin_of_box\|>\D{0,40}?" + _LIST,
        max_new_tokens=1024,
    ),
    # <loc_12><loc_34><loc_560><loc_780>: a thousand bins a side
    "florence2": BoxFormat(
        "<CAPTION_TO_PHRASE_GROUNDING>{expression}", r"<loc_(\d{1,3})>" * 4, offset=0.5, chat=False
    ),
    # <loc0012><loc0034><loc0560><loc0780>: rows first
    "paligemma": BoxFormat(
        "detect {expression}", r"<loc(\d{4})>" * 4, steps=1024, rows_first=True, chat=False
    ),
}
"""By the name that `model.native_box` gives."""


def read_box(text: str, form: BoxFormat, image_size: Size, resized: Size | None = None) -> Box | None:
    """The first box in an answer, in pixels of the original image and cut at its edge.

    Args:
        image_size: `(W, H)` of the original image.
        resized: `(W, H)` of what the model saw, for a format in pixels.

    Returns:
        None if there is no box in the answer, or none that covers any of the image.

    >>> read_box('```json [{"bbox_2d": [10, 20, 500, 1000]}]', FORMATS["qwen3"], (640, 480))
    (6.4, 9.6, 320.0, 480.0)
    """
    match = re.search(form.pattern, text)
    if match is None:
        return None
    numbers = [float(number) + form.offset for number in match.groups()]
    if form.rows_first:
        numbers = [numbers[i] for i in (1, 0, 3, 2)]
    wide, high = (form.steps, form.steps) if form.steps else (resized or image_size)
    left, top, right, bottom = padded_box(image_size) if form.padded else whole_box(image_size)
    xs = [
        min(max(left + number / wide * (right - left), 0.0), float(image_size[0])) for number in numbers[0::2]
    ]
    ys = [
        min(max(top + number / high * (bottom - top), 0.0), float(image_size[1])) for number in numbers[1::2]
    ]
    return (xs[0], ys[0], xs[1], ys[1]) if xs[0] < xs[1] and ys[0] < ys[1] else None


def wanted_format(lvlm: LVLM, wanted: bool | None, *, by_default: bool) -> BoxFormat | None:
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
    box_prompt(lvlm, form, "it")  # raises now, not at the first image, if there is no chat template
    return form


def box_prompt(lvlm: LVLM, form: BoxFormat, expression: str) -> str:
    """The whole prompt. UsageError for a chat format where the checkpoint brings no chat template."""
    text = form.question(clean_expression(expression, lvlm.control_tokens))
    return lvlm.chat_prompt(text) if form.chat else lvlm.image_text + text


def ask_for_box(lvlm: LVLM, form: BoxFormat, image: Image.Image, expression: str) -> tuple[Box | None, str]:
    """The model's own box of an expression, and its whole answer, greedily generated.

    Raises:
        WorkError: out of memory.
    """

    import torch

    seen = lvlm.seen(image)
    inputs = lvlm.encode([seen], [box_prompt(lvlm, form, expression)])
    try:
        with torch.inference_mode():
            ids = lvlm.model.generate(
                **inputs,
                max_new_tokens=form.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=lvlm.processor.tokenizer.pad_token_id,
            )
    except torch.OutOfMemoryError as error:
        raise WorkError("out of memory: load the model in fewer bits, or write native=false") from error
    start = 0 if lvlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text = lvlm.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=False).strip()
    box = read_box(text, form, seen.size, _resized(lvlm, inputs))
    return None if box is None else rescaled(box, seen.size, image.size), text


def _resized(lvlm: LVLM, inputs: Mapping[str, Any]) -> Size | None:
    """`(W, H)` of the image as the model saw it, where the processor says so in patches (Qwen-VL)."""
    if "image_grid_thw" not in inputs:
        return None
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = lvlm.processor.image_processor.patch_size
    return columns * patch, rows * patch


BOX_TOKENS = "box_tokens"
NATIVE_BOX = "native_box"
"""What stands for query token and prompt of such heads in `heads.json`."""


def box_conditions(asked: Mapping[str, str | None]) -> dict[str, str | None]:
    """How a model is asked for its own box, for `found_with`, where it is otherwise `asked` like this."""
    return {**asked, "conv_mode": NATIVE_BOX, "query_token": BOX_TOKENS, "system": None, "paraphrases": None}


def needed_format(lvlm: LVLM) -> BoxFormat:
    """How the model writes boxes.

    Raises:
        UsageError: it is not known to write any, or brings no chat template for it.
    """
    if (known := lvlm.spec.native_box) is None:
        raise UsageError(
            f"heads_by=vrh: {lvlm.name} is not known to write boxes itself; rank by mass, iou or pointing, or say how "
            f"it writes them with model.native_box= one of {', '.join(FORMATS)}"
        )
    box_prompt(lvlm, FORMATS[known], "it")
    return FORMATS[known]
