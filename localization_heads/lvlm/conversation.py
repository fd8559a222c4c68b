"""`Conversation`: questions about one image, with answers streamed token by token."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from localization_heads.data.sources import PromptImages
from localization_heads.errors import WorkError
from localization_heads.lvlm.answers.answering import GREEDY
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.prompts import clean_expression


@dataclass
class Conversation:
    """A conversation about an image, or without one; `ask` continues it."""

    lvlm: LVLM
    image: Image.Image | None = None
    max_new_tokens: int = 128
    messages: list[dict[str, Any]] = field(default_factory=list)

    def look_at(self, image: Image.Image) -> None:
        """Start over with another image, without the messages so far."""
        self.image = image
        self.messages.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, streamed. Closing the iterator stops the model, and keeps the answer so far.

        Raises:
            UsageError: an empty question, or one with control tokens.
            WorkError: the generation failed; the question is then dropped from the conversation.
        """
        question = clean_expression(question, self.lvlm.control_tokens)
        message = _message("user", question, with_image=self.image is not None and not self.messages)
        prompt = self._prompt([*self.messages, message], question)
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
                self.messages += [message, _message("assistant", "".join(pieces).strip())]

    def _prompt(self, messages: list[dict[str, Any]], question: str) -> str:
        if self.lvlm.conv_mode == "chat":
            return self.lvlm.apply_chat_template(messages)
        prompt = self.lvlm.prompt(question)  # the other templates have no turns
        return prompt if self.image else prompt.replace(f"{self.lvlm.image_token}\n", "")


def stream(lvlm: LVLM, image: PromptImages | None, prompt: str, max_new_tokens: int) -> Generator[str, None, None]:
    """Generate greedily in a thread, and yield the text as it comes. The thread ends with the iterator.

    Raises:
        WorkError: the generation failed.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    if image is not None:
        inputs = lvlm.model_inputs([image], [prompt])
    else:
        inputs = dict(lvlm.processor.tokenizer(prompt, return_tensors="pt").to(lvlm.device))
    streamer = TextIteratorStreamer(lvlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, errors = threading.Event(), list[Exception]()

    def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), stopped.is_set(), device=ids.device)

    def generate() -> None:
        try:
            with torch.inference_mode():
                lvlm.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    **GREEDY,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        except Exception as error:
            errors.append(error)
            streamer.end()  # otherwise the reader would wait for ever

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise WorkError(f"the model could not answer: {errors[0]}") from errors[0]


def _message(role: str, text: str, *, with_image: bool = False) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}
