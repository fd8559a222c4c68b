"""The gradio page: where its parts are, and what each of them sets going."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localization_heads.apps.demo.drawing import draw_boxes, draw_grid, draw_heat, head_at
from localization_heads.apps.demo.session import (
    Asked,
    as_json,
    ask,
    example_pictures,
    parse_heads,
    toggled,
)
from localization_heads.data.image_error import ImageError
from localization_heads.errors import UsageError, WorkError
from localization_heads.grounding.binarise import Binarise
from localization_heads.heads.head import Head
from localization_heads.stages.run import Run

SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
"""Fonts of the visitor's machine: the page fetches nothing."""
ABOUT = """# Localization heads
**{model}**, {layers} layers x {heads} heads. A few of them look at what you name: those framed in the grid.
Choose a picture, type an expression, press Ground (or Shift+Enter). The model runs once for a question; sliders and
clicks only redo the sum and the box."""
CSS = "#grid img, #grid button {cursor: crosshair} footer {display: none !important}"


def serve(run: Run) -> None:
    """Load the model and serve the page until Ctrl-C. UsageError if the port is taken."""
    try:
        launch(build(run), run)
    except OSError as error:
        raise UsageError(f"host={run['host']} port={run['port']}: {error}") from error


def launch(page: gr.Blocks, run: Run, **options: Any) -> str:
    """Serve the page, to this machine unless `host` says otherwise; it fetches nothing from elsewhere. Its address."""
    page.launch(
        server_name=run["host"],
        server_port=run["port"],
        inbrowser=run["open_browser"],
        share=False,
        show_error=True,
        theme=gr.themes.Default(font=SYSTEM, font_mono=("ui-monospace", "monospace")),
        css=CSS,
        **options,
    )
    return str(page.local_url)


def shown_to_people(action: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours appear on the page as one sentence."""

    @wraps(action)
    def guarded(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (UsageError, WorkError, ImageError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return guarded


class Page:
    """The components by name, and the actions over them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = Path(tempfile.mkdtemp(prefix="localization-heads-"))
        self.examples = example_pictures()

    def layout(self) -> None:
        """Left the question, right the answer, below the heads."""
        lvlm = self.run.lvlm
        gr.Markdown(ABOUT.format(model=lvlm.name, layers=lvlm.num_layers, heads=lvlm.num_heads))
        self.asked, self.heads_b = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._question()
            with gr.Column(scale=7, min_width=320):
                self._answer()
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._settings()
            with gr.Column(scale=7, min_width=320):
                self._grid()

    def _question(self) -> None:
        picture, text = self.examples[0]
        self.image = gr.Image(picture, type="pil", label="Picture", elem_id="picture", height=330)
        self.text = gr.Textbox(
            text,
            lines=2,
            max_lines=6,
            label="Expressions, one a line or with ; between",
            elem_id="expression",
        )
        self.button = gr.Button("Ground", variant="primary", elem_id="ground")
        self.gallery = gr.Gallery(
            [(image, caption) for image, caption in self.examples],
            label="Examples",
            columns=3,
            height=300,
            allow_preview=False,
            elem_id="examples",
        )

    def _answer(self) -> None:
        with gr.Row():
            self.boxes = _picture("**Box and mask**", "boxes")
            self.heat = _picture("**Map**", "heat")
        with gr.Row(visible=False) as self.second:
            self.boxes_b = _picture("**Box and mask**, set B", "boxes_b")
            self.heat_b = _picture("**Map**, set B", "heat_b")
        self.table = gr.Dataframe(
            headers=["expression", "set", "box", "score"],
            interactive=False,
            label="Boxes",
            wrap=True,
            column_widths=["36%", "14%", "30%", "20%"],  # all four fit on a phone
            elem_id="table",
        )
        with gr.Row():
            self.json_file = gr.DownloadButton("JSON", elem_id="download_json")
            self.picture_file = gr.DownloadButton("Picture", elem_id="download_picture")

    def _settings(self) -> None:
        grounding = self.run.grounding
        self.which = gr.Dropdown([], label="Map of", elem_id="which")
        self.k = gr.Slider(1, 10, self.run["k"], step=1, label="k: heads that are on", elem_id="k")
        self.sigma = gr.Slider(
            0, 3, grounding.sigma, step=0.1, label="sigma: smoothing, in cells", elem_id="sigma"
        )
        self.binarise = gr.Radio(
            [("mean (paper)", "mean"), ("Otsu", "otsu"), ("share of the attention", "top_mass")],
            value=grounding.binarise,
            label="Threshold: cells above",
            elem_id="binarise",
        )
        self.threshold = gr.Slider(
            0.05, 0.95, grounding.top_mass, step=0.05, label="that share", elem_id="threshold"
        )
        self.compare = gr.Checkbox(False, label="Compare with a second set of heads", elem_id="compare")

    def _grid(self) -> None:
        self.edits = gr.Radio(["A", "B"], value="A", label="Clicks switch heads of set", visible=False)
        self.grid = _picture(
            "**Heads by attention sum.** A click switches one on (framed) or off; a dot: on in set B.",
            "grid",
            buttons=[],
        )
        self.heads = gr.Textbox(label="Heads that are on", elem_id="heads", placeholder="L2H0 L3H1")

    def wire(self, load: Callable[..., Any]) -> None:
        """Events. Only `asking` runs the model; `load` is the page's opening, which asks for the first example."""
        shown = [self.boxes, self.heat, self.boxes_b, self.heat_b, self.table, self.grid]
        shown += [self.json_file, self.picture_file]
        settings = [self.asked, self.heads, self.heads_b, self.which, self.sigma]
        settings += [self.binarise, self.threshold, self.compare]
        redo: dict[str, Any] = {"fn": shown_to_people(self.redraw), "inputs": settings, "outputs": shown}
        asking: dict[str, Any] = {
            "fn": shown_to_people(self.ask),
            "inputs": [self.image, self.text, self.k],
            "outputs": [self.asked, self.heads, self.heads_b, self.which],
        }
        for event in (load, self.button.click, self.text.submit):
            event(**asking).success(**redo)
        self.gallery.select(self.choose, None, [self.image, self.text]).then(**asking).success(**redo)
        # Not `release`, which the keyboard never fires; of the steps of a drag only the last that waits is drawn.
        last: dict[str, Any] = {"trigger_mode": "always_last"}
        picking = self.k.input(shown_to_people(self.best), [self.asked, self.k], self.heads, **last)
        picking.success(**redo)
        for event in (self.sigma.input, self.binarise.input, self.which.input, self.heads.submit):
            event(**redo, **last)
        self.threshold.input(lambda: "top_mass", None, self.binarise, **last).then(**redo)
        self.compare.input(self.show_second, self.compare, [self.second, self.edits]).then(**redo)
        self.grid.select(
            shown_to_people(self.switch),
            [self.asked, self.heads, self.heads_b, self.edits],
            [self.heads, self.heads_b],
        ).success(**redo)

    def ask(self, image: Image.Image | None, text: str, k: int) -> tuple[Any, ...]:
        """Run the model; the first `k` heads are on, the next `k` are set B."""
        asked = ask(self.run, image, text)
        second = list(asked.ranked[k : 2 * k]) or list(asked.ranked[:k])
        choices = gr.Dropdown(choices=list(asked.expressions), value=asked.expressions[0])
        return asked, _names(asked.ranked[:k]), second, choices

    def best(self, asked: Asked | None, k: int) -> str:
        if asked is None:
            raise UsageError("ask for something first")
        return _names(asked.ranked[:k])

    def choose(self, event: gr.SelectData) -> tuple[Image.Image, str]:
        chosen: tuple[Image.Image, str] = self.examples[event.index]
        return chosen

    def show_second(self, wanted: bool) -> tuple[Any, ...]:
        return gr.Row(visible=wanted), gr.Radio(visible=wanted)

    def switch(
        self, asked: Asked | None, heads: str, heads_b: list[Head], edits: str, event: gr.SelectData
    ) -> tuple[str, list[Head]]:
        """A click into the grid."""
        if asked is None:
            raise UsageError("ask for something first")
        x, y = event.index
        head = head_at(x, y, asked.shape)
        if head is None:
            return heads, heads_b
        if edits == "B":
            return heads, toggled([Head(*h) for h in heads_b], head)
        return _names(toggled(parse_heads(heads), head)), heads_b

    def redraw(
        self,
        asked: Asked | None,
        heads: str,
        heads_b: list[Head],
        which: str,
        sigma: float,
        binarise: Binarise,
        share: float,
        compare: bool,
    ) -> tuple[Any, ...]:
        """Everything but the model: the sum, the box, the pictures, the files to download."""
        if asked is None:
            raise UsageError("ask for something first")
        options = replace(self.run.grounding, sigma=float(sigma), binarise=binarise, top_mass=float(share))
        sets = {"A": parse_heads(heads), **({"B": [Head(*h) for h in heads_b]} if compare else {})}
        found = {name: asked.answers(chosen, options) for name, chosen in sets.items()}
        shown = asked.expressions.index(which) if which in asked.expressions else 0
        drawn = {
            name: (
                draw_boxes(asked.image, answers, asked.expressions),
                draw_heat(asked.image, answers[shown]),
            )
            for name, answers in found.items()
        }
        rows = [
            [expression, name, " ".join(f"{edge:.0f}" for edge in answer.box), f"{answer.score:.2f}"]
            for name, answers in found.items()
            for expression, answer in zip(asked.expressions, answers, strict=True)
        ]
        grid = draw_grid(asked.sums, sets["A"], sets.get("B", ()))
        return (*drawn["A"], *drawn.get("B", (None, None)), rows, grid, *self._files(asked, found["A"]))

    def _files(self, asked: Asked, answers: list[Any]) -> tuple[str, str]:
        """The downloads, in a folder of their own for each question."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "groundings.json").write_text(json.dumps(as_json(asked, answers), indent=2) + "\n")
        draw_boxes(asked.image, answers, asked.expressions, longest=None).save(folder / "groundings.png")
        return str(folder / "groundings.json"), str(folder / "groundings.png")


def _names(heads: Any) -> str:
    return " ".join(str(Head(*head)) for head in heads)


def _picture(title: str, name: str, **options: Any) -> gr.Image:
    """A picture that visitors look at, under its title: gradio's own label would hide a corner of it."""
    with gr.Column(min_width=260):
        gr.Markdown(title)
        shown: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
        return gr.Image(show_label=False, label=title, elem_id=name, **{**shown, **options})


def build(run: Run) -> gr.Blocks:
    """The page for one model, not yet served."""
    with gr.Blocks(title="Localization heads", analytics_enabled=False, delete_cache=(3600, 3600)) as opened:
        page = Page(run)
        page.layout()
        page.wire(opened.load)
    blocks: gr.Blocks = opened
    return blocks
