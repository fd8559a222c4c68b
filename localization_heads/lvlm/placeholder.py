"""What stands for an image in a family's prompts: asked of its chat template, or else of its processor.

LLaVA writes `<image>`, Qwen `<|vision_start|><|image_pad|><|vision_end|>`, Gemma 3 `<start_of_image>`. One way to
find out serves them all: show the template an image and see what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from localization_heads.lvlm.chat_template import TemplateError, render_chat, template_of

Render = Callable[[list[dict[str, str]]], str]
"""The chat template applied to the content of one user turn."""

_BEFORE, _AFTER = "TEXTBEFORE", "TEXTAFTER"
_IMAGE = {"type": "image"}
_MARKS = ("vision_start_token", "vision_end_token")  # Qwen's; other processors add their marks themselves


def image_placeholder(processor: Any, image_token: str) -> str:
    """The text that a prompt needs where an image goes, without surrounding blanks.

    Args:
        image_token: what the processor looks for in a prompt and replaces by an image's tokens.
    """
    render = template_renderer(processor)
    found = None if render is None else template_placeholder(render)
    return found if found and image_token in found else _marked(processor, image_token)


def template_renderer(processor: Any) -> Render | None:
    """Its chat template as a function, or None if it brings none or refuses a turn with a picture."""
    if template_of(processor) is None:
        return None

    def render(content: list[dict[str, str]]) -> str:
        return render_chat(processor, [{"role": "user", "content": content}])

    try:
        render([_IMAGE, _text(_AFTER)])
    except TemplateError:
        return None
    return render


def template_placeholder(render: Render) -> str | None:
    """What a chat template writes for an image: what stands between two texts around it.

    Templates that put all images in front of all text show it as the difference to the same turn without one.
    """
    text = render([_text(_BEFORE), _IMAGE, _text(_AFTER)])
    if _BEFORE in text and _AFTER in text:
        between = text.partition(_BEFORE)[2].partition(_AFTER)[0].strip()
        if between:
            return between
    return _difference(render([_IMAGE, _text(_AFTER)]), render([_text(_AFTER)]))


def _difference(with_image: str, without: str) -> str | None:
    """What `with_image` has more than `without`, on whichever side of the text it stands.

    >>> _difference("USER: <image>\\nTEXTAFTER end", "USER: TEXTAFTER end")
    '<image>'
    >>> _difference("USER: TEXTAFTER <image> end", "USER: TEXTAFTER end")
    '<image>'
    """
    (head, _, tail), (bare_head, _, bare_tail) = with_image.partition(_AFTER), without.partition(_AFTER)
    before = head[_shared_start(head, bare_head) :].strip()
    shared = _shared_start(tail[::-1], bare_tail[::-1])
    return before or tail[: len(tail) - shared].strip() or None


def _shared_start(a: str, b: str) -> int:
    """How many characters two texts have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def image_comes_first(render: Render, placeholder: str) -> bool:
    """Whether a turn of image, then text comes out of the template in that order."""
    head = render([_IMAGE, _text(_AFTER)]).partition(_AFTER)[0]
    return placeholder in head


def _marked(processor: Any, image_token: str) -> str:
    """The image token between the start and end marks that the processor knows, if it knows any."""
    start, end = (_attribute(processor, name) for name in _MARKS)
    return f"{start}{image_token}{end}" if start and end else image_token


def _attribute(processor: Any, name: str) -> str | None:
    value = getattr(processor, name, None) or getattr(processor.tokenizer, name, None)
    return value if isinstance(value, str) else None


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
