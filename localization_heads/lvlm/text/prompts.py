"""Prompts around an expression: prompt modes, image placeholders, and paraphrases with the mean of their maps.

Prompts are pure functions from text to text; `query_tokens` finds the query positions in the tokenized prompt.
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

_CLOSING_MARKS = ".!?。！？"  # noqa: RUF001
_MARKER = "EXPRESSION"
"""Rendered in place of an expression, to find where a template puts it."""


class Prompt(NamedTuple):
    """A prompt, in which the expression is `text[start:end]`, without the closing full stop."""

    text: str
    start: int
    end: int

    @property
    def expression(self) -> str:
        return self.text[self.start : self.end]


def locate_expression(render: Callable[[str], str], expression: str) -> Prompt:
    """Render an expression into a prompt, and find where in it the expression lies.

    The template is also rendered around a marker, since the expression's text may occur in the template itself.

    >>> locate_expression("user: {}. assistant:".format, "a")
    Prompt(text='user: a. assistant:', start=6, end=7)
    """
    text, words = render(expression), strip_closing_marks(expression)
    start = render(_MARKER).find(_MARKER)
    if start < 0 or not text.startswith(words, start):
        start = text.rfind(words)  # a template that depends on the text
    if start < 0:
        raise UsageError(f"conv_mode: the template leaves out or rewrites the expression '{words}'")
    return Prompt(text, start, start + len(words))


def clean_expression(expression: str, special_tokens: tuple[str, ...] = ()) -> str:
    """Normalise whitespace, and remove the image placeholder that LLaVA's data sets put before an expression.

    Raises:
        UsageError: nothing is left, it is not valid Unicode, or it contains one of the special tokens, which would act
            as control tokens instead of text.
    """
    text = " ".join(expression.replace("<image>", " ").split())
    if not text:
        raise UsageError("the expression is empty: name something in the image, such as query='the dog'")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError("the expression is not valid Unicode text: it came in another encoding than UTF-8")
    for token in special_tokens:
        if token in text:
            raise UsageError(f"the expression holds '{token}', which this model reads as a control token: leave it out")
    return text


def strip_closing_marks(expression: str) -> str:
    """Strip the punctuation that ends a sentence, unless nothing else is left.

    >>> strip_closing_marks("the dog."), strip_closing_marks("?")
    ('the dog', '?')
    """
    return expression.rstrip(_CLOSING_MARKS + " ") or expression


def close_sentence(expression: str) -> str:
    """End the expression with a full stop, the paper's query token, unless it already ends a sentence.

    >>> close_sentence("the dog"), close_sentence("Where is it?")
    ('the dog.', 'Where is it?')
    """
    return expression if expression.endswith(tuple(_CLOSING_MARKS)) else expression + "."


def referseg_prompt(expression: str, image_text: str, system: str = LLAVA_SYSTEM) -> str:
    """Return the paper's prompt: system sentence, newline, image, newline, expression; no roles, nothing after it.

    Without a system sentence, this is the prompt of `conv_mode=plain`.

    >>> referseg_prompt("the dog", "<image>", "Be helpful.")
    'Be helpful.\\n<image>\\nthe dog.'
    """
    head = f"{system}\n" if system else ""
    return f"{head}{image_text}\n{close_sentence(expression)}"


def expression_prompt(
    expression: str, mode: ConvMode, *, image_text: str, system: str, chat: Callable[[str], str]
) -> str:
    """Return the prompt for an expression.

    Args:
        mode: `referseg` (the paper's), `chat` (the model's own template, up to where its answer begins) or `plain`.
        image_text: the placeholder of the image in this model's prompts.
        chat: applies the model's chat template to one user turn with an image and a text.
    """
    if mode == "chat":
        return chat(close_sentence(expression))
    return referseg_prompt(expression, image_text, system if mode == "referseg" else "")


Render = Callable[[list[dict[str, str]]], str]
"""Applies the chat template to the content of one user turn."""

_BEFORE, _AFTER = "TEXTBEFORE", "TEXTAFTER"
_IMAGE = {"type": "image"}
_START_AND_END_TOKENS = (("vision_start_token", "vision_end_token"), ("vision_bos_token", "vision_eos_token"))
"""Qwen's and Qwen-Omni's; other processors write such tokens themselves."""


def image_placeholder(processor: Any, image_token: str) -> str:
    """Return the text that stands for an image in a prompt, without surrounding whitespace.

    Args:
        image_token: the text that the processor replaces by an image's tokens.
    """
    render = template_renderer(processor)
    placeholder = None if render is None else template_placeholder(render)
    if placeholder and image_token in placeholder:
        return placeholder
    return _with_start_and_end(processor, image_token)


def template_renderer(processor: Any) -> Render | None:
    """Return the chat template as a function; None if there is none, or it refuses a turn with an image."""
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
    """Return what a chat template writes for an image: the text between two texts on either side of it.

    For templates that put all images before all text, it is the difference from the same turn without an image.
    """
    text = render([_text(_BEFORE), _IMAGE, _text(_AFTER)])
    if _BEFORE in text and _AFTER in text:
        between = text.partition(_BEFORE)[2].partition(_AFTER)[0].strip()
        if between:
            return between
    return _inserted_text(render([_IMAGE, _text(_AFTER)]), render([_text(_AFTER)]))


def _inserted_text(with_image: str, without: str) -> str | None:
    """Return what `with_image` has in addition to `without`, before or after the text.

    >>> _inserted_text("USER: <image>\\nTEXTAFTER end", "USER: TEXTAFTER end")
    '<image>'
    >>> _inserted_text("USER: TEXTAFTER <image> end", "USER: TEXTAFTER end")
    '<image>'
    """
    (head, _, tail), (bare_head, _, bare_tail) = with_image.partition(_AFTER), without.partition(_AFTER)
    before = head[common_prefix_length(head, bare_head) :].strip()
    shared = common_prefix_length(tail[::-1], bare_tail[::-1])
    return before or tail[: len(tail) - shared].strip() or None


def common_prefix_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of leading items (characters, tokens) that two sequences have in common.

    >>> common_prefix_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def image_comes_first(render: Render, placeholder: str) -> bool:
    """Whether the template keeps the order of a turn with an image and then a text."""
    head = render([_IMAGE, _text(_AFTER)]).partition(_AFTER)[0]
    return placeholder in head


def _with_start_and_end(processor: Any, image_token: str) -> str:
    """Return the image token between the start and end tokens that the processor defines, if any."""
    for names in _START_AND_END_TOKENS:
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
    """Fill an expression into each of the templates, without duplicates; without templates, return it unchanged.

    Where a template has an article before the expression, the expression's own article is dropped.

    >>> paraphrase("the dog", ["{}", "a {}", "the {}", "please find {}"])
    ['the dog', 'a dog', 'please find the dog']
    """
    if not templates:
        return [expression]
    return list(dict.fromkeys(fill_template(expression, template) for template in templates))


def fill_template(expression: str, template: str) -> str:
    """Fill an expression into the `{}` of a template, without doubling an article."""
    before = template.partition("{}")[0].split()
    if before and before[-1].lower() in ARTICLES:
        expression = without_article(expression)
    return template.replace("{}", expression)


def without_article(expression: str) -> str:
    """Return an expression without its article.

    >>> without_article("The dog"), without_article("there"), without_article("a")
    ('dog', 'there', 'a')
    """
    first, _, rest = expression.strip().partition(" ")
    return rest.strip() if rest.strip() and first.lower() in ARTICLES else expression


def average_paraphrases(paraphrases: Sequence[AttentionMaps], expression: str) -> AttentionMaps:
    """Return the mean maps of an expression's paraphrases; everything else, such as the answer's text, is the first's.

    Maps are normalised to a sum of 1 before they are averaged, so that no paraphrase counts for more because it draws
    more attention. The result is scaled by their mean sum, so that criterion 1 still applies.
    """
    first = paraphrases[0]
    if len(paraphrases) == 1:
        return first if first.query == expression else replace(first, query=expression)
    paraphrases = [maps.at(first.image_index) for maps in paraphrases]
    answers = [maps.answer for maps in paraphrases if maps.answer is not None]
    per_image = zip(*(maps.images for maps in paraphrases), strict=True)
    return replace(
        first,
        attention=mean_of_normalised([maps.attention for maps in paraphrases]),
        answer=mean_of_normalised(answers) if answers else None,
        query=expression,
        images=tuple(average_paraphrases(maps, expression) for maps in per_image),
    )


def mean_of_normalised(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """`mean_i(A_i / sum A_i) * mean_i(sum A_i)` of maps `[..., h, w]`, float32; a map of zeros stays zeros.

    >>> mean_of_normalised([np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])]).tolist()
    [[1.0, 1.0]]
    """
    normalised = np.zeros(maps[0].shape)
    total = np.zeros((*maps[0].shape[:-2], 1, 1))
    for array in maps:
        sums = array.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
        normalised += array / np.where(sums > 0, sums, 1)
        total += sums
    return np.asarray(normalised * total / len(maps) ** 2, dtype=np.float32)
