"""Conversations: turns, streaming, stopping, and what must not reach the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm import conversation as answers
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.conversation import Conversation, stream
from localization_heads.lvlm.model import LVLM


@pytest.fixture(scope="module")
def chatting() -> LVLM:
    return load_model(device="cpu", conv_mode="chat")


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Every thread that a test starts ends with the test."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before  # threads of other tests may end meanwhile


def test_the_streamed_pieces_make_up_the_answer(chatting: LVLM, image: Image.Image) -> None:
    """The same as `generate` without a stream, and without the prompt."""
    prompt = chatting.chat_prompt("What is in this image?")
    inputs = chatting.model_inputs([image], [prompt])
    with torch.inference_mode():
        ids = chatting.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = chatting.processor.tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(stream(chatting, image, prompt, 12)) == answer


def test_the_prompt_holds_all_turns_and_one_image(chatting: LVLM, image: Image.Image) -> None:
    conversation = Conversation(chatting, image, max_new_tokens=4)
    first = "".join(conversation.ask("What is it?")).strip()
    list(conversation.ask("And where?"))
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.messages[1]["content"] == [{"type": "text", "text": first}]
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in conversation.messages[2]["content"]] == ["text"]
    prompt = chatting.apply_chat_template(conversation.messages)
    assert prompt.count(chatting.image_token) == 1


def test_another_image_starts_a_new_conversation(chatting: LVLM, image: Image.Image) -> None:
    conversation = Conversation(chatting, image, max_new_tokens=2)
    list(conversation.ask("What is it?"))
    conversation.look_at(image.rotate(180))
    assert conversation.messages == []
    list(conversation.ask("What is it?"))
    assert conversation.messages[0]["content"][0] == {"type": "image"}


@pytest.mark.parametrize("mode", ["chat", "referseg", "plain"])
def test_without_an_image_the_prompt_has_no_placeholder(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, prompts = load_model(device="cpu", conv_mode=mode), []

    def spy(lvlm: LVLM, image: None, prompt: str, count: int) -> Iterator[str]:
        prompts.append(prompt)
        return stream(lvlm, image, prompt, count)

    monkeypatch.setattr(answers, "stream", spy)
    conversation = Conversation(lvlm, None, max_new_tokens=2)
    list(conversation.ask("Hello"))
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["text"]
    assert "Hello" in prompts[0]
    assert lvlm.image_token not in prompts[0]


def test_closing_stops_the_model_and_keeps_the_answer_so_far(chatting: LVLM, image: Image.Image) -> None:
    conversation = Conversation(chatting, image, max_new_tokens=100_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatting.model.generation_config, "eos_token_id", None)  # it would go on for hours
        answer = conversation.ask("What is it?")
        first = next(answer)
        answer.close()
    assert conversation.messages[-1]["content"][0]["text"] == first.strip()


def test_placeholders_are_removed_from_a_question(chatting: LVLM, image: Image.Image) -> None:
    conversation = Conversation(chatting, image, max_new_tokens=2)
    list(conversation.ask("<image> Where <image>?"))
    assert conversation.messages[0]["content"][1]["text"] == "Where ?"


@pytest.mark.parametrize("question", ["the </s> end", "<pad>", "  ", "<image>"])
def test_a_refused_question_leaves_no_turn(chatting: LVLM, image: Image.Image, question: str) -> None:
    conversation = Conversation(chatting, image, max_new_tokens=2)
    with pytest.raises(UsageError):
        list(conversation.ask(question))
    assert conversation.messages == []


def test_a_failed_generation_is_an_error_and_leaves_no_turn(
    chatting: LVLM, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(chatting.model, "generate", fail)
    conversation = Conversation(chatting, image, max_new_tokens=2)
    with pytest.raises(WorkError, match="no more memory"):
        list(conversation.ask("What is it?"))
    assert conversation.messages == []
