"""The part of the page that traces an answer: what the heads looked at when each word was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localization_heads.apps.demo.session import (
    MAX_EXPRESSION_LENGTH,
    MAX_SIDE,
    MODEL_QUEUE,
    check_text,
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
    """The components for a question, its answer, the figure and the page, and their action.

    Args:
        upload_of: returns the file of the image that the browser sent.
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

    def wire(self, image: gr.Image, heads: gr.Textbox, show_errors: Callable[..., Any]) -> None:
        """Connect the components to the action."""
        for event in (self.button.click, self.question.submit):
            event(
                show_errors(self.trace),
                [image, self.question, heads],
                [self.answer, self.figure, self.page],
                preprocess=False,
            )

    def trace(self, request: gr.Request, image: object, question: object, heads: object) -> tuple[str, str, str]:
        """Run the model; returns its answer and the files of the figure and the page, for the selected heads."""
        selected = parse_heads(heads)
        text = " ".join(check_text("the question", question, MAX_EXPRESSION_LENGTH).split())
        upload = self.upload_of(image)
        if upload is None:
            raise UsageError("choose an image first")
        with self.visitors.request(request.session_hash) as visitor:
            with MODEL_QUEUE.reserve(3 * num_pixels(upload)):
                opened = MODEL_QUEUE.run(read_image, upload)
                trace = MODEL_QUEUE.run(self._run_model, opened, text, selected)
                opened.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            page, figure = write_trace(trace, opened, visitor.new_folder() / "trace.html")
            return trace.answer or "(nothing)", str(figure), str(page)

    def _run_model(self, image: Image.Image, question: str, heads: Sequence[Head]) -> Trace:
        options = self.run.options
        if not heads:
            raise UsageError("switch at least one head on")
        trace = self.run.lvlm.trace(
            image, question, heads, max_new_tokens=DEFAULT_TRACE_TOKENS, options=options.grounding
        )
        return replace(trace, image_file="")
