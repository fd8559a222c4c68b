"""The prompts around an expression, and its wordings: the templates that make them, and the mean of their maps.

Prompts are pure functions from text to text; the query positions are found in the tokenized prompt (`query_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.lvlm.text.chat_template import TemplateError, chat_template_of, render_chat
from localization_heads.options.groups import ConvMode

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The system sentence of the published code's `referseg` template (LLaVA-Llama-2's)."""

_CLOSING = ".!?。！？"  # noqa: RUF001
STAND_IN = "EXPRESSION"


class Prompt(NamedTuple):
    """A prompt and where its expression lies: `text[start:end]`, without the closing full stop."""

    text: str
    start: int
    end: int

    @property
    def expression(self) -> str:
        return self.text[self.start : self.end]


def locate_expression(render: Callable[[str], str], expression: str) -> Prompt:
    """The prompt that `render` makes of an expression, and where in it the expression lies.

    The template is also rendered around a stand-in, since the expression's text may occur in the template itself.

    >>> locate_expression("user: {}. assistant:".format, "a")
    Prompt(text='user: a. assistant:', start=6, end=7)
    """
    text, words = render(expression), strip_closing_marks(expression)
    start = render(STAND_IN).find(STAND_IN)
    if start < 0 or not text.startswith(words, start):
        start = text.rfind(words)  # the template changes with what is said
    if start < 0:
        raise UsageError(f"conv_mode: the template leaves out or rewrites the expression '{words}'")
    return Prompt(text, start, start + len(words))


def clean_expression(expression: str, special_tokens: tuple[str, ...] = ()) -> str:
    """The expression on one line, without the image placeholder that LLaVA's data sets put before it.

    Raises:
        UsageError: nothing is left, it is not valid Unicode, or it contains another of the model's special tokens,
            which would act as control tokens instead of text.
    """
    text = " ".join(expression.replace("<image>", " ").split())
    if not text:
        raise UsageError("the expression is empty: name something in the image, such as query='the dog'")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError("the expression is not valid Unicode text: it came in another encoding than UTF-8")
    for token in special_tokens:
        if token in text:
            raise UsageError(
                f"the expression holds '{token}', which this model reads as a control token: leave it out"
            )
    return text


def strip_closing_marks(expression: str) -> str:
    """The expression without the marks that end a sentence, unless it is nothing else.

    >>> strip_closing_marks("the dog."), strip_closing_marks("?")
    ('the dog', '?')
    """
    return expression.rstrip(_CLOSING + " ") or expression


def close_sentence(expression: str) -> str:
    """End the expression with a full stop unless it already ends a sentence (PAPER: the query token is the stop).

    >>> close_sentence("the dog"), close_sentence("Where is it?")
    ('the dog.', 'Where is it?')
    """
    return expression if expression.endswith(tuple(_CLOSING)) else expression + "."


def referseg_prompt(expression: str, image_text: str, system: str = LLAVA_SYSTEM) -> str:
    """The paper's prompt: system sentence, newline, image, newline, expression; no roles, nothing after it.

    Without a system sentence, it is the prompt of the mode `plain`.

    >>> referseg_prompt("the dog", "<image>", "Be helpful.")
    'Be helpful.\\n<image>\\nthe dog.'
    """
    head = f"{system}\n" if system else ""
    return f"{head}{image_text}\n{close_sentence(expression)}"


def expression_prompt(
    expression: str, mode: ConvMode, *, image_text: str, system: str, chat: Callable[[str], str]
) -> str:
    """The prompt whose last token is the query token.

    Args:
        mode: `referseg` (the paper's), `chat` (the model's own template up to its answer) or `plain`.
        image_text: the placeholder of the image in this model's prompts.
        chat: applies the model's chat template to one user turn with an image.
    """
    if mode == "chat":
        return chat(close_sentence(expression))
    return referseg_prompt(expression, image_text, system if mode == "referseg" else "")


Render = Callable[[list[dict[str, str]]], str]
"""The chat template applied to the content of one user turn."""

_BEFORE, _AFTER = "TEXTBEFORE", "TEXTAFTER"
_IMAGE = {"type": "image"}
# Qwen's, and Qwen-Omni's; other processors add their marks themselves.
_MARKS = (("vision_start_token", "vision_end_token"), ("vision_bos_token", "vision_eos_token"))


def image_placeholder(processor: Any, image_token: str) -> str:
    """The text that a prompt needs where an image goes, without surrounding whitespace.

    Args:
        image_token: what the processor looks for in a prompt and replaces by an image's tokens.
    """
    render = template_renderer(processor)
    found = None if render is None else template_placeholder(render)
    return found if found and image_token in found else _marked(processor, image_token)


def template_renderer(processor: Any) -> Render | None:
    """Its chat template as a function, or None if it brings none or refuses a turn with an image."""
    if chat_template_of(processor) is None:
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
    before = head[common_prefix_length(head, bare_head) :].strip()
    shared = common_prefix_length(tail[::-1], bare_tail[::-1])
    return before or tail[: len(tail) - shared].strip() or None


def common_prefix_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items (characters, tokens) two sequences have in common at their start.

    >>> common_prefix_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def image_comes_first(render: Render, placeholder: str) -> bool:
    """Whether a turn of image, then text comes out of the template in that order."""
    head = render([_IMAGE, _text(_AFTER)]).partition(_AFTER)[0]
    return placeholder in head


def _marked(processor: Any, image_token: str) -> str:
    """The image token between the start and end marks that the processor knows, if it knows any."""
    for names in _MARKS:
        start, end = (_attribute(processor, name) for name in names)
        if start and end:
            return f"{start}{image_token}{end}"
    return image_token


def _attribute(processor: Any, name: str) -> str | None:
    value = getattr(processor, name, None) or getattr(processor.tokenizer, name, None)
    return value if isinstance(value, str) else None


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


ARTICLES = ("the", "a", "an")


def paraphrase(expression: str, templates: Sequence[str] | None) -> list[str]:
    """An expression in each of the templates, each wording once; without templates, the expression as it is.

    Where a template has an article before the expression, that of the expression is left out.

    >>> paraphrase("the dog", ["{}", "a {}", "the {}", "please find {}"])
    ['the dog', 'a dog', 'please find the dog']
    """
    if not templates:
        return [expression]
    return list(dict.fromkeys(fill_template(expression, template) for template in templates))


def fill_template(expression: str, template: str) -> str:
    """An expression in a template."""
    before = template.partition("{}")[0].split()
    if before and before[-1].lower() in ARTICLES:
        expression = bare(expression)
    return template.replace("{}", expression)


def bare(expression: str) -> str:
    """An expression without its article.

    >>> bare("The dog"), bare("there"), bare("a")
    ('dog', 'there', 'a')
    """
    first, _, rest = expression.strip().partition(" ")
    return rest.strip() if rest.strip() and first.lower() in ARTICLES else expression


def average_paraphrases(found: Sequence[AttentionMaps], expression: str) -> AttentionMaps:
    """The maps of an expression from those of its wordings: what the model answers is taken of the first.

    Each head's map is the mean of its maps, each scaled to a sum of 1, times the mean of their sums: no wording
    counts for more because it draws more attention, and the criteria still see how much a head attends to the image.
    """
    first = found[0]
    if len(found) == 1:
        return first if first.query == expression else replace(first, query=expression)
    found = [one.at(first.image_index) for one in found]
    answers = [one.answer for one in found if one.answer is not None]
    return replace(
        first,
        attention=mean_of_shapes([one.attention for one in found]),
        answer=mean_of_shapes(answers) if answers else None,
        query=expression,
        images=tuple(
            average_paraphrases(each, expression) for each in zip(*(one.images for one in found), strict=True)
        ),
    )


def mean_of_shapes(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`mean_i(A_i / sum A_i) * mean_i(sum A_i)` of maps `[..., h, w]`, float32; one without attention counts as zeros.

    >>> mean_of_shapes([np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])]).tolist()
    [[1.0, 1.0]]
    """
    shapes = np.zeros(maps[0].shape)
    total = np.zeros((*maps[0].shape[:-2], 1, 1))
    for one in maps:
        sums = one.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
        shapes += one / np.where(sums > 0, sums, 1)
        total += sums
    return np.asarray(shapes * total / len(maps) ** 2, dtype=np.float32)
