"""The part of the page that shows an answer word by word: what the heads looked at when each was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localization_heads.apps.demo.session import (
    KEPT,
    MAX_EXPRESSION,
    MODEL,
    bounded,
    num_pixels,
    parse_heads,
    read_image,
)
from localization_heads.apps.demo.visitors import Visitors
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.options.stage_groups import DEFAULT_TRACE_TOKENS
from localization_heads.stages.run import DemoRun
from localization_heads.stages.trace import write_trace

QUESTION = "what is in this image?"


class Tracing:
    """Question, answer, figure and page.

    Args:
        upload_of: the file of the image that the browser sent.
    """

    def __init__(self, run: DemoRun, visitors: Visitors, upload_of: Callable[[object], Path | None]) -> None:
        self.run, self.visitors, self.upload_of = run, visitors, upload_of

    def layout(self) -> None:
        with gr.Accordion("The answer, word by word", open=False, elem_id="tracing"):
            with gr.Row():
                self.question = gr.Textbox(QUESTION, label="Question", scale=5, elem_id="trace_question")
                self.button = gr.Button("Answer", scale=1, elem_id="trace")
            self.answer = gr.Textbox(label="Answer", interactive=False, elem_id="trace_answer")
            self.figure = gr.Image(
                show_label=False,
                label="Each word's map and box",
                interactive=False,
                format="png",
                elem_id="trace_figure",
                buttons=["download", "fullscreen"],
            )
            self.page = gr.DownloadButton("Download page", elem_id="trace_page")

    def wire(self, image: gr.Image, heads: gr.Textbox, shown_to_people: Callable[..., Any]) -> None:
        """Events."""
        for event in (self.button.click, self.question.submit):
            event(
                shown_to_people(self.trace),
                [image, self.question, heads],
                [self.answer, self.figure, self.page],
                preprocess=False,
            )

    def trace(
        self, request: gr.Request, image: object, question: object, heads: object
    ) -> tuple[str, str, str]:
        """Run the model; its answer, and the files of figure and page, with the maps of the heads that are on."""
        chosen = parse_heads(heads)
        text = " ".join(bounded("the question", question, MAX_EXPRESSION).split())
        upload = self.upload_of(image)
        if upload is None:
            raise UsageError("choose an image first")
        with self.visitors.turn(request.session_hash) as visitor:
            with MODEL.room(3 * num_pixels(upload)):
                opened = MODEL.take(read_image, upload)
                found = MODEL.take(self._traced, opened, text, chosen)
                opened.thumbnail((KEPT, KEPT), Image.Resampling.LANCZOS)
            page, figure = write_trace(found, opened, visitor.new_folder() / "trace.html")
            return found.answer or "(nothing)", str(figure), str(page)

    def _traced(self, image: Image.Image, question: str, heads: Sequence[Head]) -> Trace:
        options = self.run.options
        if not heads:
            raise UsageError("switch at least one head on")
        found = self.run.lvlm.trace(
            image, question, heads, max_new_tokens=DEFAULT_TRACE_TOKENS, options=options.grounding
        )
        return replace(found, image_file="")
