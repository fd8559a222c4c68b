"""Prompts: what is said around an expression, and which expressions are refused."""

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
    """A full stop is added only where none is there: the last token is the query token."""
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
    """One line, without the placeholder of LLaVA's data sets."""
    assert clean_expression(raw, ("<image>", "<s>", "</s>")) == clean


@pytest.mark.parametrize("raw", ["", " ", "\n\t", "<image>", " <image> \n<image>", "\u3000"])
def test_nothing_to_look_for(raw: str) -> None:
    with pytest.raises(UsageError, match="the expression is empty"):
        clean_expression(raw)


@pytest.mark.parametrize("raw", ["</s> the dog", "the<s>dog", "dog <pad>"])
def test_control_tokens_are_refused_by_name(raw: str) -> None:
    with pytest.raises(UsageError, match="reads as a control token"):
        clean_expression(raw, ("<s>", "</s>", "<pad>", "<image>"))


def test_broken_unicode_is_refused() -> None:
    """As it comes from a terminal in another encoding; a tokenizer would fail on it."""
    with pytest.raises(UsageError, match="not valid Unicode"):
        clean_expression("the caf\udce9")


@given(st.text())
def test_a_clean_expression_holds_no_token_and_one_line(raw: str) -> None:
    """Whatever comes in, and cleaning twice changes nothing."""
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
    assert referseg_prompt("the dog", "<image>").startswith(
        "You are a helpful language and vision assistant."
    )


def test_each_mode_has_its_own_words() -> None:
    """Each mode with its own words."""

    def prompt(mode: str) -> str:
        return expression_prompt(
            "the dog", mode, image_text="<I>", system="S.", chat=lambda text: f"USER: <I> {text} ASSISTANT:"
        )

    assert prompt("referseg") == "S.\n<I>\nthe dog."
    assert prompt("plain") == "<I>\nthe dog."
    assert prompt("chat") == "USER: <I> the dog. ASSISTANT:"
