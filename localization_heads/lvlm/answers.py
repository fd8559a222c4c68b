"""The model's own answers: one conversation about one picture, streamed token by token."""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localization_heads.attention import Box, rescaled
from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.geometry import Size, padded_box, whole_box

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from localization_heads.lvlm.model import LVLM


@dataclass
class Conversation:
    """What has been said so far about a picture; `ask` continues it."""

    lvlm: LVLM
    image: Image.Image | None = None
    max_new_tokens: int = 128
    messages: list[dict[str, Any]] = field(default_factory=list)

    def look_at(self, image: Image.Image) -> None:
        """Take up another picture; what was said about the last one is forgotten."""
        self.image = image
        self.messages.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces. Closing the iterator stops the model; what was said until then is kept.

        Raises:
            UsageError: an empty question, or one with control tokens.
            WorkError: the generation failed; the question is forgotten.
        """
        from localization_heads.lvlm.prompts import clean_expression

        question = clean_expression(question, self.lvlm.control_tokens)
        turn = _turn("user", question, with_image=self.image is not None and not self.messages)
        prompt = self._prompt([*self.messages, turn], question)
        pieces: list[str] = []
        failed = False
        try:
            for piece in stream(self.lvlm, self.image, prompt, self.max_new_tokens):
                pieces.append(piece)
                yield piece
        except WorkError:
            failed = True
            raise
        finally:
            if not failed:
                self.messages += [turn, _turn("assistant", "".join(pieces).strip())]

    def _prompt(self, messages: list[dict[str, Any]], question: str) -> str:
        if self.lvlm.conv_mode == "chat":
            return self.lvlm.apply_chat_template(messages)
        prompt = self.lvlm.prompt(question)  # the other templates know no turns
        return prompt if self.image else prompt.replace(f"{self.lvlm.image_token}\n", "")


def stream(
    lvlm: LVLM, image: Image.Image | None, prompt: str, max_new_tokens: int
) -> Generator[str, None, None]:
    """Greedy generation in a thread, its text as it comes. The thread ends with the iterator.

    Raises:
        WorkError: the generation failed.
    """
    import torch
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = _inputs(lvlm, image, prompt)
    streamer = TextIteratorStreamer(lvlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, problems = threading.Event(), list[Exception]()

    def generate() -> None:
        try:
            with torch.inference_mode():
                lvlm.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda ids, *_, **__: _flags(ids, stopped)]),
                )
        except Exception as error:
            problems.append(error)
            streamer.end()  # or the reader would wait for ever

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if problems:
        raise WorkError(f"the model could not answer: {problems[0]}") from problems[0]


def _flags(ids: torch.Tensor, stopped: threading.Event) -> torch.Tensor:
    import torch

    return torch.full((ids.shape[0],), stopped.is_set(), device=ids.device)


def _inputs(lvlm: LVLM, image: Image.Image | None, prompt: str) -> dict[str, Any]:
    if image is not None:
        return lvlm.encode([image], [prompt])
    return dict(lvlm.processor.tokenizer(prompt, return_tensors="pt").to(lvlm.model.device))


def _turn(role: str, text: str, *, with_image: bool = False) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


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
        steps: numbers from one side of the picture to the other; None for pixels of the picture as it was resized.
        offset: added to each number: bins stand for their middle.
        rows_first: y0 x0 y1 x1 instead of x0 y0 x1 y1.
        padded: the numbers count over the padded square, not over the picture.
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
    # JSON with pixels of the resized picture
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
    """The first box in an answer, in pixels of the original picture and cut at its edge.

    Args:
        image_size: `(W, H)` of the original picture.
        resized: `(W, H)` of what the model saw, for a format in pixels.

    Returns:
        None if there is no box in the answer, or none that covers any of the picture.

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


def format_of(name: str | None, model: str) -> BoxFormat:
    """The format of that name. UsageError if the model has none."""
    if name is None:
        raise UsageError(
            f"native=true: {model} is not known to write boxes; if it does, say how with model.native_box= one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name]


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
    form = format_of(known, lvlm.name)
    box_prompt(lvlm, form, "it")  # a checkpoint without a chat template is heard of before the work
    return form


def box_prompt(lvlm: LVLM, form: BoxFormat, expression: str) -> str:
    """The whole prompt. UsageError for a chat format where the checkpoint brings no chat template."""
    from localization_heads.lvlm.prompts import clean_expression

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
    """`(W, H)` of the picture as the model saw it, where the processor says so in patches (Qwen-VL)."""
    if "image_grid_thw" not in inputs:
        return None
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = lvlm.processor.image_processor.patch_size
    return columns * patch, rows * patch
