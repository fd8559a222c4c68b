"""What is said to the model around an expression: pure functions from text to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from localization_heads.errors import UsageError

CONV_MODES = ("referseg", "chat", "plain")

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The system sentence of the published code's `referseg` template (LLaVA-Llama-2's)."""

_CLOSING = ".!?。！？"  # noqa: RUF001
_STAND_IN = "EXPRESSION"


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

    The same template around a stand-in tells where: the text alone could be found in the template's own words.

    >>> locate_expression("user: {}. assistant:".format, "a")
    Prompt(text='user: a. assistant:', start=6, end=7)
    """
    text, words = render(expression), expression.rstrip(_CLOSING + " ") or expression
    start = render(_STAND_IN).find(_STAND_IN)
    if start < 0 or not text.startswith(words, start):
        start = text.rfind(words)  # the template changes with what is said
    if start < 0:
        raise UsageError(f"conv_mode: the template leaves out or rewrites the expression '{words}'")
    return Prompt(text, start, start + len(words))


def clean_expression(expression: str, special_tokens: tuple[str, ...] = ()) -> str:
    """The expression on one line, without the image placeholder that LLaVA data sets put before it.

    Raises:
        UsageError: nothing is left, it is no valid Unicode, or it holds another of the model's special tokens,
            which would be read as control tokens and not as text.
    """
    text = " ".join(expression.replace("<image>", " ").split())
    if not text:
        raise UsageError("the expression is empty: name something in the picture, such as query='the dog'")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError("the expression is not valid Unicode text: it came in another encoding than UTF-8")
    for token in special_tokens:
        if token in text:
            raise UsageError(
                f"the expression holds '{token}', which this model reads as a control token: leave it out"
            )
    return text


def close_sentence(expression: str) -> str:
    """End the expression with a full stop unless it already ends a sentence (PAPER: the query token is the stop).

    >>> close_sentence("the dog"), close_sentence("Where is it?")
    ('the dog.', 'Where is it?')
    """
    return expression if expression.endswith(tuple(_CLOSING)) else expression + "."


def referseg_prompt(expression: str, image_text: str, system: str = LLAVA_SYSTEM) -> str:
    """The paper's prompt: system sentence, newline, image, newline, expression; no roles, nothing after it.

    >>> referseg_prompt("the dog", "<image>", "Be helpful.")
    'Be helpful.\\n<image>\\nthe dog.'
    """
    head = f"{system}\n" if system else ""
    return f"{head}{image_text}\n{close_sentence(expression)}"


def plain_prompt(expression: str, image_text: str) -> str:
    """Only the image and the expression."""
    return f"{image_text}\n{close_sentence(expression)}"


def expression_prompt(
    expression: str, mode: str, *, image_text: str, system: str, chat: Callable[[str], str]
) -> str:
    """The prompt whose last token is the query token.

    Args:
        mode: `referseg` (the paper's), `chat` (the model's own template up to its answer) or `plain`.
        image_text: what stands for the image in this model's prompts.
        chat: applies the model's chat template to one user turn with an image.
    """
    if mode == "referseg":
        return referseg_prompt(expression, image_text, system)
    if mode == "plain":
        return plain_prompt(expression, image_text)
    if mode == "chat":
        return chat(close_sentence(expression))
    raise UsageError(f"conv_mode={mode}: choose one of {', '.join(CONV_MODES)}")
