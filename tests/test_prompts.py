"""Prompts: the text around an expression, and expressions that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.errors import UsageError
from localization_heads.lvlm.text.prompts import (
    clean_expression,
    close_sentence,
    expression_prompt,
    referseg_prompt,
)


@pytest.mark.parametrize(
    ("expression", "closed"),
    [
        ("the dog", "the dog."),
        ("the dog.", "the dog."),
        ("Where is it?", "Where is it?"),
        ("Look!", "Look!"),
        ("狗。", "狗。"),
        ("the dog,", "the dog,."),
        ("🐕", "🐕."),
    ],
)
def test_an_expression_ends_in_closing_punctuation(expression: str, closed: str) -> None:
    """A full stop is added only if there is no closing mark: the last token is the query token."""
    assert close_sentence(expression) == closed


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("the dog", "the dog"),
        ("  the\ndog\t on\r\nthe left ", "the dog on the left"),
        ("<image>\nthe dog", "the dog"),
        ("the<image>dog", "the dog"),
        ("<ima<image>ge> dog", "<ima ge> dog"),
        ("a < b > c", "a < b > c"),
    ],
)
def test_an_expression_is_cleaned_to_one_line(raw: str, clean: str) -> None:
    assert clean_expression(raw, ("<image>", "<s>", "</s>")) == clean


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        *((raw, "the expression is empty") for raw in ("", " ", "\n\t", "<image>", " <image> \n<image>", "\u3000")),
        *((raw, "reads as a control token") for raw in ("</s> the dog", "the<s>dog", "dog <pad>")),
        ("the caf\udce9", "not valid Unicode"),  # as from a terminal in another encoding
    ],
)
def test_unusable_expressions_are_refused(raw: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        clean_expression(raw, ("<s>", "</s>", "<pad>", "<image>"))


@given(st.text())
def test_a_clean_expression_is_one_line_without_tokens(raw: str) -> None:
    """For any text; and cleaning is idempotent."""
    try:
        clean = clean_expression(raw + "<image>", ("<image>", "<s>"))
    except UsageError:
        return
    assert clean
    assert "<image>" not in clean
    assert len(clean.splitlines()) == 1
    assert clean_expression(clean, ("<image>", "<s>")) == clean


def test_referseg_is_the_papers_prompt() -> None:
    assert referseg_prompt("the dog", "<image>", "Be kind.") == "Be kind.\n<image>\nthe dog."
    assert referseg_prompt("the dog", "<image>", "") == "<image>\nthe dog."
    assert referseg_prompt("the dog", "<image>").startswith("You are a helpful language and vision assistant.")


def test_prompt_of_each_mode() -> None:
    def prompt(mode: str) -> str:
        return expression_prompt(
            "the dog", mode, image_text="<I>", system="S.", chat=lambda text: f"USER: <I> {text} ASSISTANT:"
        )

    assert prompt("referseg") == "S.\n<I>\nthe dog."
    assert prompt("plain") == "<I>\nthe dog."
    assert prompt("chat") == "USER: <I> the dog. ASSISTANT:"
