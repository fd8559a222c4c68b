"""How each family is asked for a bounding box, and how it writes one: a prompt, a regular expression and a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from localization_heads.attention import Box, clip_box
from localization_heads.lvlm.families.geometry import Size, padded_box, whole_box

BOX = "box"
"""The `answer_span` that selects the numbers of the model's own box."""
_NUMBER = r"\s*(-?\d{1,7}(?:\.\d{0,17})?)\s*"
_LIST = r"\[" + ",".join([_NUMBER] * 4) + r"\]"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
_JSON = 'Locate {expression} in the image. Answer with one JSON object: {{"bbox_2d": [x1, y1, x2, y2]}}'


@dataclass(frozen=True)
class BoxFormat:
    """How a family is asked for a box, and how it writes one.

    Args:
        prompt: the question, with the placeholder `{expression}`.
        pattern: regular expression with a group for each of the four numbers; its first match is used.
        steps: the coordinate of the right and bottom edge; None for pixels of the resized image.
        offset: added to each number, as 0.5 for the centre of a bin.
        rows_first: y0 x0 y1 x1 instead of x0 y0 x1 y1.
        padded: coordinates are relative to the padded square instead of the image.
        chat: whether the question goes into the model's chat template.
        max_new_tokens: length of the longest answer, in tokens.
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
    # coordinates from 0 to 1 over the padded square
    "llava": BoxFormat(_REGION + "{expression}", steps=1, padded=True),
    # <|box_start|>(x1,y1),(x2,y2)<|box_end|>
    "qwen2": BoxFormat("Output the bounding box of {expression} in the image.", _PAIRS),
    # JSON with pixels of the resized image
    "qwen2_5": BoxFormat(_JSON, steps=None),
    # JSON, coordinates from 0 to 1000
    "qwen3": BoxFormat(_JSON, max_new_tokens=1024),
    # <ref>...</ref><box>[[x1, y1, x2, y2]]</box>
    "internvl": BoxFormat(_REGION + "<ref>{expression}</ref>"),
    # after its reasoning: <|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>
    "glm": BoxFormat(
        "Give the bounding box of {expression} in the image as [[x1,y1,x2,y2]].",
        r"<\|begin_of_box\|>\D{0,40}?" + _LIST,
        max_new_tokens=1024,
    ),
    # <loc_12><loc_34><loc_560><loc_780>: 1000 bins per side
    "florence2": BoxFormat("<CAPTION_TO_PHRASE_GROUNDING>{expression}", r"<loc_(\d{1,3})>" * 4, offset=0.5, chat=False),
    # <loc0012><loc0034><loc0560><loc0780>: rows first
    "paligemma": BoxFormat("detect {expression}", r"<loc(\d{4})>" * 4, steps=1024, rows_first=True, chat=False),
}
"""By the value of `model.native_box`."""


def read_box(text: str, box_format: BoxFormat, image_size: Size, resized: Size | None = None) -> Box | None:
    """The first box in an answer, in pixels of the original image and clipped to it.

    Args:
        image_size: `(W, H)` of the original image.
        resized: `(W, H)` of the image that the model saw, for a format in pixels.

    Returns:
        None if the answer has no box, or the box lies outside the image.

    >>> read_box('```json [{"bbox_2d": [10, 20, 500, 1000]}]', FORMATS["qwen3"], (640, 480))
    (6.4, 9.6, 320.0, 480.0)
    """
    match = re.search(box_format.pattern, text)
    if match is None:
        return None
    numbers = [float(number) + box_format.offset for number in match.groups()]
    if box_format.rows_first:
        numbers = [numbers[i] for i in (1, 0, 3, 2)]
    width, height = (box_format.steps, box_format.steps) if box_format.steps else (resized or image_size)
    left, top, right, bottom = padded_box(image_size) if box_format.padded else whole_box(image_size)
    xs = [left + number / width * (right - left) for number in numbers[0::2]]
    ys = [top + number / height * (bottom - top) for number in numbers[1::2]]
    x0, y0, x1, y1 = box = clip_box((xs[0], ys[0], xs[1], ys[1]), image_size)
    return box if x0 < x1 and y0 < y1 else None
